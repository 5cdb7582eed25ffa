# SPDX-License-Identifier: Apache-2.0
"""SAELens writes and fusae reads, fusae writes and SAELens reads: the same dictionary, bit by bit, both ways."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fusae
from fusae import formats
from fusae.nn import SparseCoder, SparseCoderConfig
from fusae.testing.compare import assert_within_budget

pytest.importorskip("sae_lens", reason="sae-lens is not installed (the extra [integrations])")
from sae_lens import SAE  # noqa: E402
from sae_lens.loading import pretrained_sae_loaders as loaders  # noqa: E402
from sae_lens.registry import get_sae_class, get_sae_training_class  # noqa: E402
from sae_lens.saes.sae import TrainingSAE  # noqa: E402


def _written():
    """The writers of tests/test_formats.py."""
    if "formats_written" in sys.modules:
        return sys.modules["formats_written"]
    path = Path(__file__).parents[1] / "formats_written.py"
    spec = importlib.util.spec_from_file_location("formats_written", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


w = _written()
D, M, K, OUT = w.D, w.M, w.K, w.OUT
INFERENCE = {
    "standard": {}, "standard, no pre-bias": {"apply_b_dec_to_input": False},
    "standard, layer norm": {"normalize_activations": "layer_norm"},
    "topk, constant norm": {"normalize_activations": "constant_norm_rescale", "k": K},
    "gated": {}, "jumprelu": {}, "jumprelu, no pre-bias": {"apply_b_dec_to_input": False}, "topk": {"k": K},
    "topk, by norm": {"k": K, "rescale_acts_by_decoder_norm": True}, "abstopk": {"k": K},
    "abstopk, by norm": {"k": K, "rescale_acts_by_decoder_norm": True},
    **{f"{a}transcoder": {"apply_b_dec_to_input": False, "d_out": OUT}
       for a in ("", "skip_", "jumprelu_", "jumprelu_skip_")},
}  # fmt: skip
TRAINING = {
    "standard": {}, "gated": {}, "jumprelu": {}, "topk": {"k": K}, "topk, not by norm": {
        "k": K, "rescale_acts_by_decoder_norm": False},
    "abstopk": {"k": K}, "batchtopk": {"k": float(K)}, "batchtopk, not by norm": {
        "k": float(K), "rescale_acts_by_decoder_norm": False},
    "matryoshka_batchtopk": {"k": float(K), "matryoshka_widths": [8, M]},
}  # fmt: skip

DICTIONARY_LEARNING = (
    "AutoEncoder", "AutoEncoderTopK", "GatedAutoEncoder", "JumpReluAutoEncoder", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)  # fmt: skip


def _randomise(sae):
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(sae.state_dict().items())):
            p.copy_(w.rand(*p.shape, seed=i) * 0.4)
            if "threshold" in name:
                p.copy_(p.abs() * 0.5)
    return sae.eval()


def _make(name, fields, training=False, dtype="float32"):
    architecture = name.split(",")[0]
    cls, cfg = (get_sae_training_class if training else get_sae_class)(architecture)
    return _randomise(cls(cfg(d_in=D, d_sae=M, dtype=dtype, **fields)))


def _x(n=48):
    return w.rand(n, D, seed=77) * 1.3 + 0.2


def _wide(sae, folder):
    """The same SAE in float64, by SAELens itself."""
    return type(sae).load_from_disk(folder, dtype="float64").eval()


def _compare(coder, sae, oracle, x):
    """Codes and output of both in their dtype, against float64."""
    with torch.no_grad():
        acts, want, truth = coder.encode(x).to_dense(), sae.encode(x), oracle.encode(x.double())
        if coder.config.select_by_norm:  # SAELens' activations are times the norms, and divided again
            acts = acts * coder.decoder_norms()
        assert_within_budget(acts, want, truth, "codes")
        assert_within_budget(coder(x), sae(x), oracle(x.double()), "output")


@pytest.mark.parametrize("name", INFERENCE)
def test_both_ways(tmp_path, name):
    sae = _make(name, INFERENCE[name])
    sae.save_model(tmp_path / "tool")
    coder = fusae.load(tmp_path / "tool")
    _compare(coder, sae, _wide(sae, tmp_path / "tool"), _x())
    again = SAE.load_from_disk(formats.save(coder, tmp_path / "ours", "saelens"))
    assert type(again) is type(sae)
    before, after = sae.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) and value.dtype == after[key].dtype, key
    old, new = (json.loads((tmp_path / which / "cfg.json").read_text()) for which in ("tool", "ours"))
    assert {k: v for k, v in old.items() if k != "metadata"} == {k: v for k, v in new.items() if k != "metadata"}
    assert torch.equal(again(_x()), sae(_x()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(tmp_path, dtype):
    sae = _make("jumprelu", {}, dtype=dtype)
    sae.save_model(tmp_path / "tool")
    coder = fusae.load(tmp_path / "tool")
    assert coder.W_enc.dtype == sae.W_enc.dtype
    again = SAE.load_from_disk(formats.save(coder, tmp_path / "ours", "saelens"))
    for key, value in sae.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]) and value.dtype == again.state_dict()[key].dtype, key


@pytest.mark.parametrize("name", TRAINING)
def test_training_checkpoints(tmp_path, name):
    """Read as they are; and by what SAELens itself makes of them for inference."""
    sae = _make(name, TRAINING[name], training=True)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    sae = type(sae).load_from_disk(tmp_path / "training").eval()  # saving for inference folds norms into this one
    tool = SAE.load_from_disk(tmp_path / "inference").eval()
    trained, ready = fusae.load(tmp_path / "training"), fusae.load(tmp_path / "inference")
    x = _x()
    _compare(ready, tool, _wide(tool, tmp_path / "inference"), x)
    with torch.no_grad():
        assert_within_budget(trained(x), tool(x), _wide(tool, tmp_path / "inference")(x.double()), "output")
    if name.startswith("batchtopk"):
        folder = formats.save(trained, tmp_path / "ours", "saelens", architecture="batchtopk")
        again = TrainingSAE.load_from_disk(folder)
        assert type(again) is type(sae)
        for key, value in sae.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key


OURS = {
    "topk": {}, "topk by norm": {"select_by_norm": True}, "abs": {"select": "abs", "activation": "none"},
    "relu": {"select": "relu"}, "gated": {"select": "relu", "gated": True}, "jumprelu": {"select": "threshold"},
    "batch_topk": {"select": "batch_topk"}, "layer": {"input_norm": "layer"}, "rms": {"input_norm": "rms"},
    "transcoder": {"select": "relu", "d_out": OUT, "pre_bias": False},
    "skip transcoder": {"select": "threshold", "d_out": OUT, "pre_bias": False, "skip": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_a_dictionary_of_ours_opens_there(tmp_path, name):
    coder = _randomise(SparseCoder(SparseCoderConfig(d=D, m=M, k=K, **OURS[name])))
    about = {"model_name": "gpt2", "hook_name": "blocks.4.hook_resid_post"}
    sae = SAE.load_from_disk(formats.save(coder, tmp_path / "a", "saelens", metadata=about)).eval()
    assert sae.cfg.metadata.model_name == "gpt2" and sae.cfg.metadata.hook_name == about["hook_name"]
    _compare(coder, sae, _wide(sae, tmp_path / "a"), _x())


def test_configurations_of_version_5(tmp_path):
    written = w.saelens_old(tmp_path / "old")
    path = written.path / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hook_point": "blocks.2.hook_resid_pre"}))
    sae = SAE.load_from_disk(written.path).eval()
    _compare(fusae.load(written.path), sae, _wide(sae, written.path), _x())


# --- SAELens' own readers of what others published ------------------------------------------------------------------


def _published(monkeypatch, name, root, repo, folder, **cfg):
    """The SAE that SAELens makes of files of another tool, which lie in `root` and not on a hub."""

    def download(repo_id=None, filename=None, subfolder=None, **_):
        path = root / (subfolder or "") / filename
        if not path.exists():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    def shapes(repo_id, filename):
        return {k: list(v.shape) for k, v in safetensors.torch.load_file(root / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    load = loaders.NAMED_PRETRAINED_SAE_LOADERS[name]
    about, state, _ = load(repo, folder, "cpu", False, {"d_in": D, "d_sae": M, "dtype": "float32", **cfg})
    about = loaders.handle_config_defaulting(about)
    cls, config = get_sae_class(about["architecture"])
    sae = cls(config.from_dict(about))
    sae.load_state_dict({k: v.float().contiguous() for k, v in state.items()})
    return sae.eval()


def _same(coder, sae):
    x = _x()
    oracle = type(sae)(sae.cfg).double()
    oracle.dtype = torch.float64
    oracle.load_state_dict(sae.state_dict())
    _compare(coder, sae, oracle.eval(), x)


def test_gemma_scope_as_saelens_reads_it(monkeypatch, tmp_path):
    folder = "layer_3/width_16k/average_l0_10"
    w.gemma(tmp_path / folder)
    sae = _published(monkeypatch, "gemma_2", tmp_path, "google/gemma-scope-2b-pt-res", folder)
    _same(fusae.load(tmp_path / folder), sae)
    tool = _published(
        monkeypatch, "gemma_2_transcoder", tmp_path, "google/gemma-scope-2b-pt-transcoders", folder, d_out=D
    )
    _same(fusae.load(tmp_path / folder, transcoder=True), tool)


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_as_saelens_reads_it(monkeypatch, tmp_path, skip):
    folder = "transcoder_all/layer_3_width_16k_l0_small" + "_affine" * skip
    w.gemma_2(tmp_path / folder, skip)
    sae = _published(monkeypatch, "gemma_3", tmp_path, "google/gemma-scope-2-1b-pt", folder, d_out=OUT if skip else D)
    _same(fusae.load(tmp_path / folder, transcoder=True), sae)


def test_llama_scope_as_saelens_reads_it(monkeypatch, tmp_path):
    w.llama_scope(tmp_path / "L8R")
    sae = _published(monkeypatch, "llama_scope", tmp_path, "fnlp/Llama3_1-8B-Base-LXR-8x", "L8R")
    sae.fold_activation_norm_scaling_factor(D**0.5 / 1.75)
    _same(fusae.load(tmp_path / "L8R"), sae)


def test_llama_scope_r1_as_saelens_reads_it(monkeypatch, tmp_path):
    written = w.llama_scope_r1(tmp_path / "L8R")
    sae = _published(monkeypatch, "llama_scope_r1_distill", tmp_path, "fnlp/Llama-Scope-R1-Distill", "L8R")
    sae.fold_activation_norm_scaling_factor(1.5)
    _same(fusae.load(written.path, input_scale=1.5), sae)


def test_single_files_as_saelens_reads_them(monkeypatch, tmp_path):
    qwen = w.qwen(tmp_path).path
    repo = f"Qwen/{qwen.parent.name}"
    sae = _published(monkeypatch, "qwen_scope", qwen.parent, repo, qwen.name)
    assert sae.cfg.k == K
    _same(fusae.load(qwen), sae)
    path = w.linear(tmp_path / "g", "goodfire").path
    name = "Llama-3.1-8B-Instruct-SAE-l19.pth"
    path.rename(path.with_name(name))
    repo = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19"
    _same(fusae.load(path.with_name(name)), _published(monkeypatch, "goodfire", path.parent, repo, name))
    path = w.linear(tmp_path / "d", "deepseek-r1").path
    path.rename(path.with_name("sae_l19.pth"))
    sae = _published(monkeypatch, "deepseek_r1", path.parent, "x", "sae_l19.pth")
    _same(fusae.load(path.with_name("sae_l19.pth")), sae)


@pytest.mark.parametrize("name", DICTIONARY_LEARNING)
def test_dictionary_learning_as_saelens_reads_it(monkeypatch, tmp_path, name):
    w.dictionary_learning(tmp_path / "trainer_0", name)
    sae = _published(monkeypatch, "dictionary_learning_1", tmp_path, "canrager/lm_sae", "trainer_0")
    _same(fusae.load(tmp_path / "trainer_0"), sae)


def test_what_fusae_wrote_for_dictionary_learning_opens_in_saelens(monkeypatch, tmp_path):
    coder = _randomise(SparseCoder(SparseCoderConfig(d=D, m=M, k=K, select="batch_topk")))
    coder.threshold.copy_(coder.threshold.float())
    about = {"layer": 3, "model_name": "EleutherAI/pythia-70m", "context_size": 128}
    formats.save(coder, tmp_path / "a", "dictionary_learning", metadata=about)
    _same(coder, _published(monkeypatch, "dictionary_learning_1", tmp_path, "x", "a"))
