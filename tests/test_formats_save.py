# SPDX-License-Identifier: Apache-2.0
"""Dictionaries written for other tools: no bit changes on the way there and back, and what a tool lacks is refused."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import fusae
from fusae import formats
from fusae.cli import app
from fusae.nn import CrossLayerConfig, CrossLayerTranscoder, SparseCoder, SparseCoderConfig


def _sibling(name):
    """A module beside this one (tests are no package), the same one for all."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


w = _sibling("formats_written")
layers = _sibling("formats_written_layers")
D, M, K = w.D, w.M, w.K


def make(**fields):
    coder = SparseCoder(SparseCoderConfig(**({"d": D, "m": M, "k": K} | fields)))
    for i, (name, value) in enumerate(sorted(coder.state_dict().items())):
        value.copy_(w.rand(*value.shape, seed=i) * 0.3)
        if name == "threshold":
            value.copy_(value.float().abs())  # of single precision, as most tools keep them
    return coder.eval()


TRANSCODER = {"d_out": D, "pre_bias": False}
# Every kind of coder and the formats that have it.
KINDS = {
    "topk": ({}, ["saelens", "sparsify", "dictionary_learning"]),
    "topk, no pre-bias": ({"pre_bias": False}, ["saelens"]),
    "topk by norm": ({"select_by_norm": True}, ["saelens"]),
    "abs": ({"select": "abs", "activation": "none"}, ["saelens"]),
    "group_max": ({"select": "group_max"}, ["sparsify"]),
    "relu": ({"select": "relu", "k": 1}, ["saelens", "dictionary_learning"]),
    "relu, no pre-bias": ({"select": "relu", "k": 1, "pre_bias": False}, ["saelens", "dictionary_learning"]),
    "gated": ({"select": "relu", "k": 1, "gated": True}, ["saelens", "dictionary_learning"]),
    "jumprelu": ({"select": "threshold", "k": 1}, ["saelens"]),
    "jumprelu, no pre-bias": ({"select": "threshold", "k": 1, "pre_bias": False}, ["saelens", "dictionary_learning"]),
    "batch_topk": ({"select": "batch_topk"}, ["dictionary_learning", "saelens batchtopk"]),
    "batch_topk by norm": ({"select": "batch_topk", "select_by_norm": True}, ["saelens batchtopk"]),
    "layer norm": ({"input_norm": "layer"}, ["saelens"]),
    "rms norm": ({"input_norm": "rms"}, ["saelens"]),
    "transcoder": ({"select": "relu", "k": 1, **TRANSCODER}, ["saelens", "circuit-tracer"]),
    "transcoder, wide": ({"select": "relu", "k": 1, **TRANSCODER, "d_out": 20}, ["saelens"]),
    "skip transcoder": ({"select": "relu", "k": 1, "skip": True, **TRANSCODER}, ["saelens", "circuit-tracer"]),
    "jumprelu transcoder": ({"select": "threshold", "k": 1, **TRANSCODER}, ["saelens", "circuit-tracer"]),
    "jumprelu skip transcoder": (
        {"select": "threshold", "k": 1, "skip": True, **TRANSCODER}, ["saelens", "circuit-tracer"],
    ),
    "topk transcoder": ({"skip": True, **TRANSCODER}, ["sparsify"]),
    "topk transcoder without relu": ({"activation": "none", **TRANSCODER}, ["circuit-tracer"]),
}  # fmt: skip
PAIRS = [(kind, name) for kind, (_, names) in KINDS.items() for name in names]


def close(a, b):
    """The same but for the order of sums, which can depend on where the weights lie in memory."""
    torch.testing.assert_close(a, b, rtol=0.02 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8 if tensor.ndim else tensor.dtype)


def only(found):
    """The one coder, of a folder of transcoders too."""
    return found[0] if isinstance(found, dict) else found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind, name", PAIRS, ids=[f"{kind}-{name}" for kind, name in PAIRS])
def test_there_and_back(tmp_path, kind, name, dtype):
    coder = make(**KINDS[kind][0], dtype=dtype)
    if hasattr(coder, "threshold") and dtype == "bfloat16":
        coder.threshold.data.copy_(coder.threshold.bfloat16())  # what the tool can hold
    format, *architecture = name.split()
    options = {"architecture": architecture[0]} if architecture else {}
    assert formats.save(coder, tmp_path / "out", format, **options) == tmp_path / "out"
    again = only(fusae.load(tmp_path / "out"))
    assert again.config == coder.config
    for (key, a), b in zip(coder.state_dict().items(), again.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(bits(a), bits(b)), key
    x = w.rand(9, D, seed=3).to(coder.W_enc.dtype)
    close(coder(x), again(x))


# Without pre-bias, an autoencoder is a transcoder for these tools, and comes back as one.
AS_TRANSCODER = [
    ("topk, no pre-bias", "sparsify"),
    ("relu, no pre-bias", "circuit-tracer"),
    ("jumprelu, no pre-bias", "circuit-tracer"),
]
REFUSED = [
    (kind, name)
    for kind, (_, names) in KINDS.items()
    for name in ("saelens", "sparsify", "dictionary_learning", "circuit-tracer")
    if name not in names and f"{name} batchtopk" not in names and (kind, name) not in AS_TRANSCODER
]


@pytest.mark.parametrize("kind, name", AS_TRANSCODER, ids=[f"{kind}-{name}" for kind, name in AS_TRANSCODER])
def test_autoencoders_without_pre_bias(tmp_path, kind, name):
    coder = make(**KINDS[kind][0])
    again = only(fusae.load(formats.save(coder, tmp_path / "out", name)))
    x = w.rand(9, D, seed=3)
    close(again(x), coder(x))
    assert again.config.d_out == D and torch.equal(again.W_enc, coder.W_enc)


@pytest.mark.parametrize("kind, name", REFUSED, ids=[f"{kind}-{name}" for kind, name in REFUSED])
def test_what_a_tool_lacks_is_refused(tmp_path, kind, name):
    tool = {"saelens": "SAELens"}.get(name, name)
    with pytest.raises(ValueError, match=f"^format: {tool} has no "):
        formats.save(make(**KINDS[kind][0]), tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_a_batch_topk_becomes_a_jumprelu_for_saelens(tmp_path):
    coder = make(select="batch_topk")
    again = fusae.load(formats.save(coder, tmp_path, "saelens"))
    assert again.config.select == "threshold" and bool((again.threshold == float(coder.threshold)).all())
    x = w.rand(50, D, seed=3)
    close(coder.encode(x).to_dense(), again.encode(x).to_dense())
    close(coder(x), again(x))
    by_norm = make(select="batch_topk", select_by_norm=True)
    with pytest.raises(ValueError, match="SAELens has no select_by_norm as 'jumprelu'; call coder.fold_norms_"):
        formats.save(by_norm, tmp_path, "saelens")
    before = by_norm(x)
    again = fusae.load(formats.save(by_norm.fold_norms_(), tmp_path / "folded", "saelens"))
    torch.testing.assert_close(again(x), before, rtol=1e-4, atol=1e-5)


def test_thresholds_are_not_rounded_unasked(tmp_path):
    coder = make(select="threshold", dtype="bfloat16", pre_bias=False)
    for name in ("saelens", "dictionary_learning"):
        with pytest.raises(ValueError, match="threshold is float32, and .* would round it to bfloat16"):
            formats.save(coder, tmp_path, name)
        again = fusae.load(formats.save(coder, tmp_path / name, name, dtype="float32"))
        assert torch.equal(again.threshold, coder.threshold) and torch.equal(again.W_enc, coder.W_enc.float())


def test_dictionary_learning_keeps_what_it_had(tmp_path):
    """A threshold beside a top-k; one that is not known yet; the groups of a Matryoshka."""
    for name, threshold in (("AutoEncoderTopK", 0.77), ("BatchTopKSAE", -1.0), ("MatryoshkaBatchTopKSAE", 0.3)):
        written = w.dictionary_learning(tmp_path / name, name, threshold)
        formats.save(fusae.load(written.path), tmp_path / "out", "dictionary_learning")
        before, after = (torch.load(p / "ae.pt", weights_only=True) for p in (written.path, tmp_path / "out"))
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(value, after[key]) and value.dtype == after[key].dtype, key
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["trainer"]["dict_class"] == name and config["trainer"]["layer"] == 3
        assert config["buffer"] == {"ctx_len": 128} and config["trainer"]["lm_name"] == "org/toy"


def test_metadata_goes_along(tmp_path):
    coder = fusae.load(w.saelens(tmp_path / "a", "topk").path)
    formats.save(coder, tmp_path / "b", "saelens", metadata={"model_name": "other", "context_size": 64})
    about = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert about["hook_name"] == "blocks.3.hook_resid_post" and about["model_name"] == "other"
    assert about["context_size"] == 64 and "format" not in about
    old = formats.save(fusae.load(w.saelens_old(tmp_path / "c").path), tmp_path / "d", "saelens")
    cfg = json.loads((old / "cfg.json").read_text())
    assert cfg["reshape_activations"] == "hook_z" and cfg["metadata"]["sae_lens_version"] == "6.0.0"
    with pytest.raises(ValueError, match="metadata must hold plain values"):
        formats.save(coder, tmp_path / "e", "saelens", metadata={"a": object()})


@pytest.mark.parametrize("select", ["threshold", "relu", "batch_topk"])
def test_cross_layer_transcoders(tmp_path, select):
    coder = CrossLayerTranscoder(CrossLayerConfig(layers=3, d=D, m=M, k=K, select=select)).eval()
    for i, value in enumerate(coder.state_dict().values()):
        value.copy_(w.rand(*value.shape, seed=i).abs().float() * 0.3)
    again = fusae.load(formats.save(coder, tmp_path, "circuit-tracer", metadata={"scan": "org/toy"}))
    x = w.rand(7, 3, D, seed=1)
    close(coder(x), again(x))
    assert again.metadata["scan"] == "org/toy"
    for s in range(3):
        assert torch.equal(coder.sources[s].W_dec, again.sources[s].W_dec)
    wrong = CrossLayerTranscoder(CrossLayerConfig(layers=2, d=D, m=M, k=K))
    with pytest.raises(ValueError, match="circuit-tracer has no cross-layer transcoder with select 'topk'"):
        formats.save(wrong, tmp_path / "no", "circuit-tracer")
    with pytest.raises(TypeError, match="coder must be a SparseCoder for format 'saelens', got CrossLayerTranscoder"):
        formats.save(wrong, tmp_path / "no", "saelens")


def test_a_transcoder_of_every_layer(tmp_path):
    coders = {i: make(select="threshold", **TRANSCODER) for i in range(3)}
    coders[2].W_enc.data.mul_(2)
    again = fusae.load(formats.save(coders, tmp_path, "circuit-tracer"))
    assert all(torch.equal(again[i].W_enc, coders[i].W_enc) for i in range(3))
    coders[1] = make(select="topk", activation="none", **TRANSCODER)
    with pytest.raises(ValueError, match="circuit-tracer has no set whose layers have several activations"):
        formats.save(coders, tmp_path / "no", "circuit-tracer")
    with pytest.raises(TypeError, match="coder must be one SparseCoder for format 'saelens', got 3 of them"):
        formats.save(coders, tmp_path / "no", "saelens")


def test_own_format(tmp_path):
    coder = fusae.load(w.openai(tmp_path / "in").path)
    again = fusae.load(formats.save(coder, tmp_path / "out"))
    x = w.rand(5, D)
    assert again.config == coder.config and again.metadata == coder.metadata == {"format": "openai"}
    close(again(x), coder(x))
    lens = fusae.load(w.saelens(tmp_path / "lens", "topk").path)  # to ours, and back
    back = formats.save(fusae.load(formats.save(lens, tmp_path / "way")), tmp_path / "back", "saelens")
    cfgs = [json.loads((folder / "cfg.json").read_text())["metadata"] for folder in (tmp_path / "lens", back)]
    assert cfgs[0].items() <= cfgs[1].items()


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="format 'openai' is read only; 'fusae', 'saelens', .* can be written"):
        formats.save(make(), tmp_path, "openai")
    with pytest.raises(ValueError, match="architecture must be 'topk' for this coder, got 'jumprelu'"):
        formats.save(make(), tmp_path, "saelens", architecture="jumprelu")
    with pytest.raises(TypeError, match="format 'sparsify' takes no option 'architecture'"):
        formats.save(make(), tmp_path, "sparsify", architecture="topk")
    with pytest.raises(ValueError, match="coder was cast after it was made for 'float32'; give dtype= here"):
        formats.save(make().bfloat16(), tmp_path, "sparsify")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="path must be a folder, got the file"):
        formats.save(make(), tmp_path / "file", "sparsify")


def test_a_failed_write_leaves_the_old_weights(tmp_path, monkeypatch):
    formats.save(make(), tmp_path, "sparsify")
    before = (tmp_path / "sae.safetensors").read_bytes()

    def fail(tensors, path, header):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        formats.save(make(), tmp_path, "sparsify")
    assert (tmp_path / "sae.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae.safetensors"]


def test_a_folder_can_be_written_over_itself(tmp_path):
    """Weights that are mapped from the file that is replaced."""
    written = w.sparsify(tmp_path / "a")
    before = safetensors.torch.load_file(written.path / "sae.safetensors")
    before = {key: value.clone() for key, value in before.items()}
    coder = fusae.load(written.path)
    formats.save(coder, written.path, "sparsify")
    after = safetensors.torch.load_file(written.path / "sae.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


# --- the command ----------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_convert(tmp_path):
    source = w.saelens(tmp_path / "in", "topk").path
    done = run(source, tmp_path / "out", "--format", "sparsify", "--dtype", "float64")
    assert done.exit_code == 0 and done.output.strip() == str(tmp_path / "out")
    again = fusae.load(tmp_path / "out")
    assert again.config.dtype == "float64" and torch.equal(again.W_enc.float(), fusae.load(source).W_enc)
    again = run(source, tmp_path / "out", "--format", "sparsify")
    assert again.exit_code == 1 and "is there already; --overwrite" in str(again.exception)
    assert run(source, tmp_path / "out", "--format", "sparsify", "--overwrite").exit_code == 0
    wrong = run(source, tmp_path / "x", "--format", "openai")
    assert "--format must be one of 'fusae', 'saelens'" in str(wrong.exception)


def test_convert_with_hints_and_metadata(tmp_path):
    path = w.qwen(tmp_path / "q").path
    done = run(path, tmp_path / "out", "--format", "saelens", "--hint", "k=7", "--metadata", "model_name=Qwen3",
               "--from", "qwen-scope")  # fmt: skip
    assert done.exit_code == 0, done.exception
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg["k"] == 7 and cfg["metadata"]["model_name"] == "Qwen3" and cfg["metadata"]["layer"] == 7
    assert "--hint must be NAME=VALUE, got 'k'" in str(run(path, tmp_path / "y", "--hint", "k").exception)
    norms = w.saelens(tmp_path / "n", "batchtopk", rescale_acts_by_decoder_norm=True).path
    assert "call coder.fold_norms_()" in str(run(norms, tmp_path / "z", "--format", "dictionary_learning").exception)
    assert run(norms, tmp_path / "z", "--format", "dictionary_learning", "--fold-norms").exit_code == 0


def test_convert_several(tmp_path):
    for name in ("layers.1", "layers.2"):
        w.sparsify(tmp_path / "in" / name)
    assert run(tmp_path / "in", tmp_path / "out", "--format", "saelens").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["layers.1", "layers.2"]
    path = layers.circuit_tracer(tmp_path / "plt", "jump_relu")[0].path
    assert run(path, tmp_path / "lens", "--format", "saelens").exit_code == 0
    assert fusae.load(tmp_path / "lens" / "layer_2").config.select == "threshold"
    assert run(path, tmp_path / "plt2", "--format", "circuit-tracer").exit_code == 0
    assert list(fusae.load(tmp_path / "plt2")) == [0, 1, 2]
