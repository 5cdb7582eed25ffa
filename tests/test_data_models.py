# SPDX-License-Identifier: Apache-2.0
"""Loading a causal LM from a GGUF file (written here from a tiny model) and from a Hugging Face folder."""

import numpy as np
import pytest
import torch

from fusae.data import find_demo, iter_documents, load_model, split_documents, tokenize

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
gguf = pytest.importorskip("gguf", reason="the extra 'lm' is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the extra 'lm' is not installed")

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]


def vocabulary():
    return SPECIAL + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + [m.replace(" ", "") for m in MERGES]


def tiny_model(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary()), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def interleave(weight, heads):
    """Rows of a projection in llama.cpp's order, written out: row i of the first half of a head, then of the second."""
    size = weight.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in range(2)]
    return weight[order]


def write_gguf(path, model, architecture="llama", pre="smollm", quantise=None, drop=(), extra=()):
    writer = gguf.GGUFWriter(str(path), architecture)
    config = model.config
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    for name, weight in model.state_dict().items():
        if name in drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        stem = name.removesuffix(".weight")
        block = ""
        if stem.startswith("model.layers."):
            number, stem = stem.removeprefix("model.layers.").split(".", 1)
            block = f"blk.{number}."
        if stem.endswith(("q_proj", "k_proj")):
            weight = interleave(weight, 4 if stem.endswith("q_proj") else 2)
        array = weight.numpy()
        kind = None
        if quantise and array.ndim == 2:
            array, kind = gguf.quantize(array, quantise), quantise
        writer.add_tensor(f"{block}{NAMES[stem]}.weight", array, raw_dtype=kind)
    for name in extra:
        writer.add_tensor(name, np.zeros(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_gives_the_same_logits(tmp_path, tied):
    model = tiny_model(tied)
    loaded = load_model(write_gguf(tmp_path / "tiny.gguf", model))
    ids = torch.randint(0, len(vocabulary()), (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)
    assert loaded.name == "tiny" and not loaded.model.training
    assert (loaded.model.lm_head.weight.data_ptr() == loaded.model.model.embed_tokens.weight.data_ptr()) == tied


def test_quantised_weights_and_dtype(tmp_path):
    model = tiny_model(True)
    path = write_gguf(tmp_path / "tiny.gguf", model, quantise=gguf.GGMLQuantizationType.Q8_0)
    loaded = load_model(path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    expected, found = model.state_dict(), load_model(path).model.state_dict()
    for name, weight in expected.items():
        # Q8_0: 32 values share a scale of max / 127, so the error is at most half of that (and half rounding of fp16)
        bound = weight.abs().max() / 127 * 0.51 + 1e-3 * weight.abs().max() if weight.ndim == 2 else 0
        assert (found[name] - weight).abs().max() <= bound, name


def test_gguf_tokenizer(tmp_path):
    model = tiny_model(True)
    tokenizer = load_model(write_gguf(tmp_path / "tiny.gguf", model)).tokenizer
    encoding = tokenizer.encode("on the 12é<|endoftext|>")
    assert encoding.tokens == ["o", "n", "Ġthe", "Ġ", "1", "2", "Ã", "©", "<|endoftext|>"]  # digits stand alone
    assert encoding.ids == [vocabulary().index(t) for t in encoding.tokens]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == "on the 12é<|endoftext|>"
    plain = load_model(write_gguf(tmp_path / "plain.gguf", model, pre="gpt-2")).tokenizer
    assert plain.encode("12").tokens == ["12"]


def test_huggingface_folder(tmp_path):
    model = tiny_model(True)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(Exception, match="(?i)tokenizer"):
        load_model(tmp_path / "m")
    tokenizer = load_model(write_gguf(tmp_path / "tiny.gguf", model)).tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)
    assert loaded.tokenizer.encode("on the").tokens == ["o", "n", "Ġthe"] and loaded.name == "m"


def test_bad_files_say_what_is_wrong(tmp_path):
    model = tiny_model(True)
    good = write_gguf(tmp_path / "good.gguf", model).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(good[: len(good) // 2])
    (tmp_path / "head.gguf").write_bytes(good[:200])
    (tmp_path / "other.gguf").write_bytes(b"PK\3\4 not a model")
    (tmp_path / "empty").mkdir()
    write_gguf(tmp_path / "arch.gguf", model, architecture="qwen2")
    write_gguf(tmp_path / "pre.gguf", model, pre="llama-bpe")
    write_gguf(tmp_path / "extra.gguf", model, extra=["rope_freqs.weight"])
    write_gguf(tmp_path / "missing.gguf", model, drop=["model.layers.1.mlp.up_proj.weight"])
    for name, error, says in (
        ("absent.gguf", FileNotFoundError, "no file or folder at"),
        ("cut.gguf", ValueError, "damaged or truncated"),
        ("head.gguf", ValueError, "damaged or truncated"),
        ("other.gguf", ValueError, "is no GGUF file"),
        ("empty", ValueError, "holds no config.json"),
        ("arch.gguf", ValueError, "architecture 'qwen2'"),
        ("pre.gguf", ValueError, "pre-tokenizer 'llama-bpe'"),
        ("extra.gguf", ValueError, "a tensor 'rope_freqs.weight'"),
        ("missing.gguf", ValueError, "do not make up a Llama model.*up_proj"),
    ):
        with pytest.raises(error, match=says):
            load_model(tmp_path / name)


demo = find_demo()


@pytest.mark.skipif(demo is None, reason="the demo's files are not in the cache (fusae.data.fetch_demo gets them)")
def test_demo_model_speaks_english():
    loaded = load_model(demo.model)
    ids = loaded.tokenizer.encode("The capital of Germany is").ids
    assert ids == [504, 3575, 282, 4521, 314]
    _, held_out = split_documents(iter_documents(demo.news))
    chunks = torch.from_numpy(tokenize(held_out, loaded.tokenizer, limit=3).ids.astype(np.int64))
    assert chunks.shape == (3, 128) and (chunks[:, 0] == 0).all()
    with torch.inference_mode():
        assert loaded.tokenizer.decode([int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())]) == " Berlin"
        logits = loaded.model(chunks).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), chunks[:, 1:].flatten())
    assert 3.2 < float(loss) < 4.4  # 3.8 over all held-out articles; rotary rows in the wrong order give 5.5
