# SPDX-License-Identifier: Apache-2.0
"""Dictionaries of other tools: each format, written by hand, encodes and decodes as the tool's own formulas say."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fusae
from fusae import formats
from fusae.formats import FormatError
from fusae.nn import CrossLayerTranscoder, SparseCoder, SparseCoderConfig


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

CASES = {
    **{f"saelens {a}": partial(w.saelens, architecture=a) for a in (
        "standard", "gated", "jumprelu", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "transcoder",
        "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder",
    )},
    "saelens topk by norm": partial(w.saelens, architecture="topk", rescale_acts_by_decoder_norm=True),
    "saelens abstopk by norm": partial(w.saelens, architecture="abstopk", rescale_acts_by_decoder_norm=True),
    "saelens batchtopk by norm": partial(w.saelens, architecture="batchtopk", rescale_acts_by_decoder_norm=True),
    "saelens jumprelu, no pre-bias": partial(w.saelens, architecture="jumprelu", apply_b_dec_to_input=False),
    "saelens layer norm": partial(w.saelens, architecture="topk", normalize_activations="layer_norm"),
    "saelens constant norm": partial(w.saelens, architecture="standard", normalize_activations="constant_norm_rescale"),
    "saelens bfloat16": partial(w.saelens, architecture="jumprelu", dtype="torch.bfloat16"),
    "saelens 5": w.saelens_old,
    "sparsify": w.sparsify,
    "sparsify group max": partial(w.sparsify, activation="groupmax"),
    "sparsify skip transcoder": partial(w.sparsify, transcode=True, skip_connection=True),
    "sparsify autoencoder with skip": partial(w.sparsify, skip_connection=True),
    **{f"dictionary_learning {name}": partial(w.dictionary_learning, name=name) for name in (
        "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
    )},
    "dictionary_learning threshold not known": partial(w.dictionary_learning, name="BatchTopKSAE", threshold=-1.0),
    "openai": w.openai,
    "openai identity": partial(w.openai, post="Identity"),
    "openai relu": partial(w.openai, activation="ReLU"),
    "openai tied": partial(w.openai, tied=True),
    "qwen": w.qwen,
    "goodfire": partial(w.linear, format="goodfire"),
    "deepseek-r1": partial(w.linear, format="deepseek-r1"),
    "gemma scope": w.gemma,
    "gemma scope embedding": partial(w.gemma, embedding=True),
    "gemma scope 2": w.gemma_2,
    "gemma scope 2 skip transcoder": partial(w.gemma_2, skip=True),
    "llama scope": w.llama_scope,
    **{f"llama scope transcoder, threshold of {side}": partial(
        w.llama_scope, hook_point_out="blocks.8.hook_mlp_out", threshold_side=side,
        dataset_average_activation_norm={"in": 4.0, "out": 0.7},
    ) for side in ("in", "out")},
    "llama scope r1": w.llama_scope_r1,
    **{f"llamascopium {a} {n}": partial(w.llamascopium, act=a, norm=n)
       for a in ("relu", "topk", "jumprelu") for n in ("dataset-wise", "inference", "token-wise")},
    "llamascopium without norms": partial(w.llamascopium, by_norm=False),
    "llamascopium transcoder": partial(w.llamascopium, hook_point_out="blocks.2.hook_mlp_out"),
    "llamascopium transcoder without norms": partial(w.llamascopium, by_norm=False, hook_point_out="blocks.2.mlp"),
    **{f"circuit-tracer {a}{' skip' * s}": lambda path, a=a, s=s: layers.circuit_tracer(path, a, bool(s))[1]
       for a in ("relu", "topk", "jump_relu") for s in (0, 1)},
}  # fmt: skip


def same(actual, wanted, what):
    """In float64 both ways: all that may differ is the order of sums."""
    torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_it_does_what_the_tool_does(tmp_path, name):
    written = CASES[name](tmp_path / "dictionary")
    x = w.rand(64, D, seed=99).double() * 1.5 + 0.3
    coder = fusae.load(written.path, dtype="float64", **written.hints)
    assert isinstance(coder, SparseCoder) and not coder.training
    for field, value in written.config.items():
        assert getattr(coder.config, field) == value, field
    assert coder.metadata["format"] == written.format
    with torch.no_grad():
        codes = coder.encode(x)
        wanted = written.encode(x)
        values = codes.to_dense()
        if written.format == "saelens" and coder.config.select_by_norm:  # the tool's values are times the norms
            values = values * coder.decoder_norms()
        same(values, wanted, "codes")
        assert 0.02 < float((wanted != 0).double().mean()) < 0.98  # a threshold or k has something to do
        same(coder.decode(codes, x), written.decode(wanted, x), "output")
        same(coder(x), written.decode(wanted, x), "forward")


@pytest.mark.parametrize("name", CASES)
def test_what_is_recognised_can_be_named(tmp_path, name):
    written = CASES[name](tmp_path / "dictionary")
    named = fusae.load(written.path, written.format, **written.hints)
    found = fusae.load(written.path, **written.hints)
    assert named.config == found.config
    for (key, a), b in zip(named.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("gemma, thresholds", [(False, True), (False, False), (True, True)])
def test_cross_layer_transcoders(tmp_path, gemma, thresholds):
    written = layers.clt(tmp_path / "clt", thresholds, gemma)
    coder = fusae.load(written.path, dtype="float64")
    assert isinstance(coder, CrossLayerTranscoder) and coder.metadata["format"] == written.format
    for field, value in written.config.items():
        assert getattr(coder.config, field) == value, field
    x = w.rand(50, 3, D, seed=98).double()
    with torch.no_grad():
        wanted = written.encode(x)
        codes = coder.encode(x)
        same(torch.stack([part.to_dense() for part in codes], 1), wanted, "codes")
        same(coder(x), written.decode(wanted, x), "output")


def test_folders_of_several(tmp_path):
    found = layers.circuit_tracer(tmp_path / "plt", "jump_relu")
    coders = fusae.load(tmp_path / "plt", dtype="float64")
    assert list(coders) == [0, 1, 2] and [c.metadata["layer"] for c in coders.values()] == [0, 1, 2]
    x = w.rand(20, D, seed=4).double()
    for i, written in enumerate(found):
        same(coders[i](x).detach(), written.decode(written.encode(x), x), i)
        assert torch.equal(fusae.load(tmp_path / "plt", layer=i).W_enc, coders[i].W_enc.float())
        assert torch.equal(fusae.load(tmp_path / "plt" / f"layer_{i}.safetensors").W_enc, coders[i].W_enc.float())
    for name in ("layers.3", "layers.7.mlp"):
        w.sparsify(tmp_path / "hooks" / name)
    assert list(fusae.load(tmp_path / "hooks")) == ["layers.3", "layers.7.mlp"]
    one = fusae.load(tmp_path / "hooks", hookpoint="layers.7.mlp")
    assert one.metadata["hookpoint"] == "layers.7.mlp"
    with pytest.raises(FormatError, match="hookpoint 'layers.8' is not there; it has 'layers.3', 'layers.7.mlp'"):
        fusae.load(tmp_path / "hooks", hookpoint="layers.8")
    with pytest.raises(FormatError, match="layer 9 is not there; it has 0 to 2"):
        fusae.load(tmp_path / "plt", layer=9)


def test_a_file_stands_for_its_folder(tmp_path):
    for written, name in (
        (w.saelens(tmp_path / "a", "topk"), "sae_weights.safetensors"),
        (w.sparsify(tmp_path / "b"), "cfg.json"),
        (w.dictionary_learning(tmp_path / "c", "AutoEncoder"), "ae.pt"),
        (w.gemma(tmp_path / "d"), "params.npz"),
        (w.gemma_2(tmp_path / "e"), "params.safetensors"),
    ):
        assert fusae.load(written.path / name).config == fusae.load(written.path).config


def test_own_folders(tmp_path):
    coder = SparseCoder(SparseCoderConfig(d=D, m=M, k=K))
    coder.save(tmp_path / "own")
    loaded = fusae.load(tmp_path / "own")
    assert loaded.config == coder.config and torch.equal(loaded.W_enc, coder.W_enc)
    wide = fusae.load(tmp_path / "own", dtype="float64")
    assert wide.config.dtype == "float64" and torch.equal(wide.W_dec, coder.W_dec.double())
    assert fusae.load(tmp_path / "own" / "coder.json").config == coder.config
    coder.save(tmp_path / "run" / "coder")
    assert fusae.load(tmp_path / "run").config == coder.config


# --- dtypes and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_is_kept(tmp_path, dtype):
    written = w.saelens(tmp_path / "a", "jumprelu", dtype=dtype)
    stored = safetensors.torch.load_file(written.path / "sae_weights.safetensors")
    coder = fusae.load(written.path)
    assert coder.config.dtype == dtype
    assert torch.equal(coder.W_enc, stored["W_enc"].T) and torch.equal(coder.W_dec, stored["W_dec"])
    assert coder.threshold.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(coder.threshold, stored["threshold"].to(coder.threshold.dtype))
    half = fusae.load(written.path, dtype=torch.float16)
    assert half.config.dtype == "float16" and half.W_enc.dtype == torch.float16


def test_weights_that_lie_as_they_should_are_not_copied(tmp_path):
    def mapped(tensor):
        inside = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        return any(int(a.split("-")[0], 16) <= tensor.data_ptr() < int(a.split("-")[1], 16) for a, *_ in inside)

    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not list mapped memory")
    coder = fusae.load(w.sparsify(tmp_path / "a").path)
    assert mapped(coder.W_enc) and mapped(coder.W_dec) and coder.W_enc.is_contiguous()
    other = fusae.load(w.saelens(tmp_path / "b", "topk").path)
    assert mapped(other.W_dec) and not mapped(other.W_enc) and other.W_enc.is_contiguous()
    pickled = fusae.load(w.dictionary_learning(tmp_path / "c", "AutoEncoderTopK").path)
    assert mapped(pickled.W_enc) and not mapped(pickled.W_dec) and pickled.W_dec.is_contiguous()
    before = safetensors.torch.load_file(tmp_path / "a" / "sae.safetensors")["W_dec"]
    with torch.no_grad():
        coder.W_dec.zero_()  # its own copy of the pages: the file stays
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a" / "sae.safetensors")["W_dec"], before)


def test_files_of_torch_save_before_zip(tmp_path):
    written = w.dictionary_learning(tmp_path / "a", "AutoEncoderTopK")
    new = fusae.load(written.path)
    state = torch.load(written.path / "ae.pt", weights_only=True)
    torch.save(state, written.path / "ae.pt", _use_new_zipfile_serialization=False)
    old = fusae.load(written.path)
    assert torch.equal(old.W_dec, new.W_dec) and old.config == new.config


def test_a_loaded_coder_trains(tmp_path):
    coder = fusae.load(w.sparsify(tmp_path / "a").path).train()
    coder.loss(w.rand(32, D, seed=3)).loss.backward()
    assert coder.W_enc.grad.abs().sum() > 0 and coder.W_dec.requires_grad


# --- rows that are normalised one by one ----------------------------------------------------------------------------


def test_input_norm_asks_for_the_input_and_is_for_inference(tmp_path):
    coder = fusae.load(w.openai(tmp_path).path)
    x = w.rand(6, D)
    codes = coder.encode(x)
    with pytest.raises(ValueError, match="x must be given: .* input_norm 'layer'"):
        coder.decode(codes)
    assert coder(x.reshape(2, 3, D)).shape == (2, 3, D)
    with pytest.raises(ValueError, match="input_norm is 'layer', and such a coder is for inference"):
        coder.train().loss(x)
    for fold in (lambda: coder.fold_input_(2.0), lambda: coder.fold_columns_(torch.ones(D))):
        with pytest.raises(ValueError, match="input_norm"):
            fold()
    with pytest.raises(ValueError, match="input_norm must be 'none' for transcoders"):
        SparseCoderConfig(d=4, m=8, k=2, d_out=4, pre_bias=False, input_norm="rms")
    with pytest.raises(ValueError, match="input_norm must be one of 'none', 'layer', 'rms', got 'batch'"):
        SparseCoderConfig(d=4, m=8, k=2, input_norm="batch")
    again = SparseCoder.load(coder.save(tmp_path / "own"))
    assert again.config == coder.config and torch.equal(again(x), coder.eval()(x))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_input_norm_in_16_bits_and_its_gradient(kind):
    coder = SparseCoder(SparseCoderConfig(d=D, m=M, k=K, input_norm=kind)).eval()
    x = w.rand(8, D, seed=2) * 300
    low = SparseCoder(SparseCoderConfig(d=D, m=M, k=K, input_norm=kind, dtype="bfloat16")).eval()
    low.load_state_dict(coder.state_dict())
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16 and float(((y.float() - coder(x)).norm() / coder(x).norm()).detach()) < 0.05
    wide = SparseCoder(SparseCoderConfig(d=D, m=M, k=K, input_norm=kind, dtype="float64")).eval()
    assert torch.autograd.gradcheck(wide, (x[:2].double().requires_grad_(),), eps=1e-5)


# --- what a format leaves open --------------------------------------------------------------------------------------


def test_a_k_that_the_file_contradicts(tmp_path):
    for name in ("topk", "batchtopk"):
        path = w.saelens(tmp_path / name, name).path
        assert fusae.load(path, k=K).config.k == K
        with pytest.raises(FormatError, match=rf"cfg.json: field 'k' is {K}, but k is {K + 1}"):
            fusae.load(path, k=K + 1)
    with pytest.raises(FormatError, match=r"field 'architecture' is 'gated', so k must not be given"):
        fusae.load(w.saelens(tmp_path / "gated", "gated").path, k=K)
    traced = layers.circuit_tracer(tmp_path / "plt", "topk")[0].path
    with pytest.raises(FormatError, match=rf"config.yaml: field 'k' is {K}, but k is 1"):
        fusae.load(traced, layer=0, k=1)
    counted = w.dictionary_learning(tmp_path / "dl", "AutoEncoderTopK").path
    tensors = torch.load(counted / "ae.pt", weights_only=True)
    for there in (tensors, {name: value for name, value in tensors.items() if name != "k"}):
        torch.save(there, counted / "ae.pt")
        with pytest.raises(FormatError, match=rf"k' is {K}(\.0)?, but k is 1"):
            fusae.load(counted, k=1)
    fraction = w.saelens(tmp_path / "fraction", "batchtopk", k=K + 0.5).path
    assert fusae.load(fraction, k=K).config.k == K


def test_hints(tmp_path):
    plain = tmp_path / "plain" / "layer7.sae.pt"
    plain.parent.mkdir()
    plain.write_bytes(w.qwen(tmp_path / "q").path.read_bytes())
    with pytest.raises(FormatError, match=r"layer7.sae.pt: .*give k="):
        fusae.load(plain)
    assert fusae.load(plain, k=3).config.k == 3
    with pytest.raises(TypeError, match="format 'qwen-scope' takes no hint 'kk'; it takes k: latents active per row"):
        fusae.load(plain, kk=3)
    bare = w.dictionary_learning(tmp_path / "dl", "BatchTopKSAE")
    (bare.path / "config.json").unlink()
    with pytest.raises(FormatError, match="give dict_class='AutoEncoderTopK' or 'BatchTopKSAE'"):
        fusae.load(bare.path)
    assert fusae.load(bare.path, dict_class="BatchTopKSAE").config.select == "batch_topk"
    assert fusae.load(bare.path, dict_class="AutoEncoderTopK").config.select == "topk"
    told = {"AutoEncoder": "relu", "GatedAutoEncoder": "relu", "MatryoshkaBatchTopKSAE": "batch_topk"}
    told |= {"AutoEncoderNew": "relu", "JumpReluAutoEncoder": "threshold"}  # by tensors that no other class has
    for name, select in told.items():
        written = w.dictionary_learning(tmp_path / name, name)
        (written.path / "config.json").unlink()
        assert fusae.load(written.path).config.select == select
    with pytest.raises(FormatError, match="give embedding=True for scaled rows"):
        fusae.load(w.gemma(tmp_path / "embedding").path)
    with pytest.raises(FormatError, match="give threshold_side='in' or 'out'"):
        side = {"dataset_average_activation_norm": {"in": 4.0, "out": 0.7}}
        fusae.load(w.llama_scope(tmp_path / "tc", **side).path)
    r1 = w.llama_scope_r1(tmp_path / "r1")
    with pytest.raises(FormatError, match="give input_scale="):
        fusae.load(r1.path)
    batch = w.llamascopium(tmp_path / "b", "topk")
    w.text(
        batch.path / "config.json", {**w.json.loads((batch.path / "config.json").read_text()), "act_fn": "batchtopk"}
    )
    with pytest.raises(FormatError, match="give threshold="):
        fusae.load(batch.path)
    assert float(fusae.load(batch.path, threshold=0.25).threshold) == 0.25


def test_expected_average_scales(tmp_path):
    """SAELens notes the scale of the rows beside a checkpoint of training, or not at all."""
    written = w.saelens(tmp_path / "a", "jumprelu", normalize_activations="expected_average_only_in")
    with pytest.raises(FormatError, match="field 'normalize_activations' is 'expected_average_only_in'.*input_scale="):
        fusae.load(written.path)
    x = w.rand(40, D, seed=5).double()
    plain = fusae.load(written.path, dtype="float64", input_scale=1.0)
    same(plain(x).detach(), written.decode(written.encode(x), x), "as it is")
    folded = fusae.load(written.path, dtype="float64", input_scale=2.5)
    same(folded.encode(x).to_dense().detach(), written.encode(2.5 * x), "codes")
    same(folded(x).detach(), written.decode(written.encode(2.5 * x), x) / 2.5, "output")
    w.text(written.path / "activation_scaler.json", {"scaling_factor": 2.5})
    assert torch.equal(fusae.load(written.path, dtype="float64").W_enc, folded.W_enc)
    transcoder = w.saelens(tmp_path / "t", "transcoder", normalize_activations="expected_average_only_in").path
    with pytest.raises(FormatError, match="give it as input_scale="):  # nothing says what its output is scaled by
        fusae.load(transcoder, input_scale=2.5)
    assert fusae.load(transcoder, input_scale=1.0).config.d_out == w.OUT
    with pytest.raises(FormatError, match="'normalize_activations' is 'none', so input_scale must not be given"):
        fusae.load(w.saelens(tmp_path / "n", "standard").path, input_scale=2.0)
    norm = w.saelens(
        tmp_path / "b", "batchtopk", normalize_activations="expected_average_only_in", rescale_acts_by_decoder_norm=True
    )
    folded = fusae.load(norm.path, dtype="float64", input_scale=2.5)
    same(folded(x).detach(), norm.decode(norm.encode(2.5 * x), x) / 2.5, "thresholds in the unit of their scores")


def test_negative_thresholds_are_zero_behind_a_relu(tmp_path):
    written = w.saelens(tmp_path / "a", "jumprelu")
    path = written.path / "sae_weights.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["threshold"] = tensors["threshold"] - 0.2
    tensors["threshold"][3] = torch.inf  # a latent that was turned off
    w.store(path, tensors)
    x = w.rand(40, D, seed=5)
    t = {name: value.double() for name, value in tensors.items()}
    wanted = w.jump((x.double() - t["b_dec"]) @ t["W_enc"] + t["b_enc"], t["threshold"])
    same(fusae.load(written.path, dtype="float64").encode(x.double()).to_dense().detach(), wanted, "codes")


def test_logarithms_of_thresholds(tmp_path):
    """As SAELens had them in checkpoints of training."""
    written = w.saelens(tmp_path / "a", "jumprelu")
    path = written.path / "sae_weights.safetensors"
    tensors = safetensors.torch.load_file(path)
    wanted = fusae.load(written.path).threshold.clone()
    tensors["log_threshold"] = tensors.pop("threshold").log()
    w.store(path, tensors)
    torch.testing.assert_close(fusae.load(written.path).threshold.detach(), wanted, rtol=1e-6, atol=0)


def test_training_of_batch_topk_is_by_norm_unless_said(tmp_path):
    written = w.saelens(tmp_path / "a", "batchtopk", rescale_acts_by_decoder_norm=None)
    assert fusae.load(written.path).config.select_by_norm
    assert not fusae.load(
        w.saelens(tmp_path / "b", "topk", rescale_acts_by_decoder_norm=None).path
    ).config.select_by_norm


def test_metadata(tmp_path):
    coder = fusae.load(w.saelens_old(tmp_path / "old").path)
    assert coder.metadata == {
        "format": "saelens", "hook_name": "blocks.2.attn.hook_z", "model_name": "gpt2-small",
        "reshape_activations": "hook_z",
    }  # fmt: skip
    coder = fusae.load(w.dictionary_learning(tmp_path / "dl", "MatryoshkaBatchTopKSAE").path)
    assert coder.metadata["group_sizes"] == [8, 12, 20] and coder.metadata["lm_name"] == "org/toy"


def test_names():
    assert set(formats.names()) == set(formats.table.FORMATS) and "saelens" in formats.names()
    assert fusae.load is formats.load
