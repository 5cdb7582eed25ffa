# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders of tiny random models: causal LMs and encoders, sharded and damaged ones."""

import json
import pickle
import sys

import pytest
import torch

from fusae.data import LoadedModel, hooks, load_model, sites, tokenize

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the extra 'lm' is not installed")
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<s>", *(f"w{i}" for i in range(59))]
SMALL = {"vocab_size": len(WORDS), "initializer_range": 0.4}
BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENDS = {"bos_token_id": 4, "eos_token_id": 4}


def llama(cls="LlamaForCausalLM", **options):
    config = transformers.LlamaConfig(**SMALL, **BLOCKS, num_key_value_heads=2, max_position_embeddings=64, **options)
    return getattr(transformers, cls)(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SMALL, **ENDS, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def neox():
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**SMALL, **ENDS, **BLOCKS, max_position_embeddings=64)
    )


def opt():
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=len(WORDS), init_std=0.4, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, pad_token_id=0,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, bos_token_id=4, eos_token_id=2,
        )
    )  # fmt: skip


def bert(cls="BertModel"):
    return getattr(transformers, cls)(transformers.BertConfig(**SMALL, **BLOCKS, max_position_embeddings=64))


def distilbert():
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=len(WORDS), dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
        )
    )


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


def add_tokenizer(folder, **options):
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if "cls_token" in options:
        tok.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="[UNK]", **options).save_pretrained(folder)


def save(folder, model, **options):
    model.eval().save_pretrained(folder, **options)
    add_tokenizer(folder, bos_token="<s>")
    return folder


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture(autouse=True)
def _same_weights():
    torch.manual_seed(0)


@pytest.mark.parametrize("make", [llama, gpt2, neox, opt])
def test_causal_models(tmp_path, make):
    model = make()
    loaded = load_model(save(tmp_path / "m", model))
    assert isinstance(loaded, LoadedModel) and loaded.kind == "causal" and loaded.bos == "<s>" and loaded.name == "m"
    ids = torch.arange(2, 62).reshape(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)
    assert not loaded.model.training
    chunks = tokenize(["w1 w2 w3 w4"], loaded, ctx=4, tails=True, min_tokens=1)
    assert chunks.ids.tolist() == [[4, 6, 7, 8], [4, 9, 0, 0]]


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
def test_encoders(tmp_path, cls, capfd):
    model = bert(cls).eval()
    model.save_pretrained(tmp_path / "m")
    add_tokenizer(tmp_path / "m", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    capfd.readouterr()
    loaded = load_model(tmp_path / "m")
    assert capfd.readouterr() == ("", "")  # also where a head is left out
    assert loaded.kind == "encoder" and loaded.bos == "[CLS]" and type(loaded.model).__name__ == "BertModel"
    chunks = tokenize(["w1 w2 w3 w4"], loaded, ctx=5, tails=True, min_tokens=1)
    assert chunks.ids.tolist() == [[1, 6, 7, 8, 2], [1, 9, 2, 0, 0]] and chunks.lengths.tolist() == [5, 3]
    ids, mask = hooks.batch_of(chunks, slice(0, 2), torch.device("cpu"))
    with torch.no_grad():
        rows = hooks.run_to(loaded.model, hooks.Sites.find(loaded.model, "encoder.layer.1"), ids, mask)
        plain = (model if cls == "BertModel" else model.bert)(torch.tensor([[1, 9, 2]])).last_hidden_state
    torch.testing.assert_close(rows[1:, :3], plain, rtol=1e-4, atol=1e-5)


def test_the_encoder_of_t5_and_a_decoder_without_its_head(tmp_path):
    loaded = load_model(save(tmp_path / "t5", t5()))
    assert loaded.kind == "encoder" and type(loaded.model).__name__ == "T5EncoderModel"
    loaded = load_model(save(tmp_path / "base", llama("LlamaModel")))
    assert loaded.kind == "encoder" and type(loaded.model).__name__ == "LlamaModel"


def test_what_a_folder_without_architectures_holds(tmp_path):
    for name, model, kind in (("llama", llama(), "causal"), ("bert", bert(), "encoder")):
        edit(save(tmp_path / name, model) / "config.json", architectures=None)
        assert load_model(tmp_path / name).kind == kind


def test_shards(tmp_path):
    model = llama()
    save(tmp_path / "m", model, max_shard_size="20KB")
    files = sorted(tmp_path.glob("m/model-*.safetensors"))
    assert len(files) > 2
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "m").model(ids).logits, model(ids).logits)
    files[1].rename(tmp_path / "kept")
    with pytest.raises(
        ValueError, match=f"{files[1].name} is missing; model.safetensors.index.json lists {len(files)}"
    ):
        load_model(tmp_path / "m")
    files[1].write_bytes((tmp_path / "kept").read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{files[1].name} is truncated or damaged: it has"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json has no weight_map"):
        load_model(tmp_path / "m")


def test_dtypes(tmp_path):
    save(tmp_path / "m", llama().to(torch.bfloat16))
    for asked, got in ((torch.float32,) * 2, ("float16", torch.float16), ("auto", torch.bfloat16)):
        assert {p.dtype for p in load_model(tmp_path / "m", asked).model.parameters()} == {got}
    for bad in (torch.int8, "fp16", None):
        with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, auto, got"):
            load_model(tmp_path / "m", bad)
    assert load_model(tmp_path / "m", device="meta").model.device.type == "meta"


class Harmful:
    def __reduce__(self):
        return (sys.exit, ("code of the folder was run",))


def spoil_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))


def spoil_code(folder):
    edit(folder / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Model"})
    (folder / "mine.py").write_text("raise SystemExit('code of the folder was run')")


def cut(folder, size):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_pickle, r"in pickle files \(pytorch_model.bin\), which can run code .* convert them to safetensors"),
        (spoil_code, r"a model of type 'mine' \(LlamaForCausalLM\), which transformers .* does not know; code in"),
        (lambda f: cut(f, -50), "model.safetensors is truncated or damaged: it has"),
        (lambda f: cut(f, 100), "model.safetensors is truncated or no safetensors file"),
        (lambda f: cut(f, 0), "model.safetensors is truncated or no safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
            "model.safetensors is a pointer of Git LFS",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors .nor its index., so it has no weig"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json, so it is no Hugging Face model folder"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged .it holds no JSON object"),
        (lambda f: edit(f / "config.json", model_type=None), "a model of type None .LlamaForCausalLM."),
        (
            lambda f: edit(f / "config.json", num_hidden_layers=3),
            "do not make up the LlamaForCausalLM of its config.json: 9 are missing",
        ),
        (
            lambda f: edit(f / "config.json", hidden_size=64),
            r"\d+ differ: lm_head.weight is \[64, 32\], not \[64, 64\]",
        ),
        (lambda f: edit(f / "config.json", num_attention_heads="four"), "cannot be loaded as a model"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer .none of tokenizer.json, .*tokenizer.save_pre"),
        (lambda f: (f / "tokenizer.json").write_text('{"model": '), "the tokenizer of .* cannot be loaded"),
    ],
)
def test_bad_folders_say_what_is_wrong(tmp_path, spoil, says):
    spoil(save(tmp_path / "m", llama()))
    with pytest.raises(ValueError, match=says) as caught:
        load_model(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)


def test_models_of_something_else_than_text(tmp_path):
    config = transformers.ViTConfig(**BLOCKS, image_size=16, patch_size=8)
    save(tmp_path / "vit", transformers.ViTModel(config))
    with pytest.raises(ValueError, match="holds a ViTModel, which takes pixel_values, not text"):
        load_model(tmp_path / "vit")


# --- sites -----------------------------------------------------------------------------------------------------------


def t5_encoder():
    return transformers.T5EncoderModel(t5().config)


@pytest.mark.parametrize("make", [llama, gpt2, neox, opt, bert, distilbert, t5_encoder])
def test_listed_sites_are_there_and_as_wide_as_listed(make):
    model = make().eval()
    listed = sites(model)
    assert [(site.layer, site.kind) for site in listed] == [
        (layer, kind) for layer in (0, 1) for kind in ("residual", "attention_out", "mlp_in", "mlp_out")
    ]
    places = hooks.Sites.find(model, [site.name for site in listed])
    with hooks.evaluating(model):
        rows = hooks.run_to(model, places, torch.arange(12).reshape(2, 6))
    assert places.widths == tuple(site.width for site in listed) == (32,) * 8
    parts = dict(zip([(site.layer, site.kind) for site in listed], rows.split(32, -1), strict=True))
    assert len({round(float(part[0, 0, 0]), 5) for part in parts.values()}) == 8
    if make in (llama, gpt2, opt):  # one block after the other adds to the stream
        total = parts[0, "residual"] + parts[1, "attention_out"] + parts[1, "mlp_out"]
        torch.testing.assert_close(total, parts[1, "residual"], rtol=1e-4, atol=1e-5)


def test_sites_of_other_modules():
    with pytest.raises(
        ValueError, match="Linear has no stack of blocks .nn.ModuleList.; choose from its named_modules"
    ):
        sites(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Sequential has no config.hidden_size"):
        sites(torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)])))
