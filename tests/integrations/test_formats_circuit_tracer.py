# SPDX-License-Identifier: Apache-2.0
"""circuit-tracer writes and fusae reads, fusae writes and circuit-tracer reads: the same, bit by bit, both ways.

Of the project at github.com/decoderesearch/circuit-tracer, which is not on the package index.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fusae
from fusae import formats
from fusae.nn import CrossLayerConfig, CrossLayerTranscoder, SparseCoder, SparseCoderConfig
from fusae.testing.compare import assert_within_budget

pytest.importorskip(
    "circuit_tracer.transcoder.single_layer_transcoder",
    reason="circuit-tracer is not installed (from its repository; the extra [integrations] lists what it needs)",
    exc_type=ImportError,
)
import yaml  # noqa: E402
from circuit_tracer.transcoder import cross_layer_transcoder, single_layer_transcoder  # noqa: E402
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK  # noqa: E402
from circuit_tracer.utils import hf_utils  # noqa: E402

D, M, K, L = 12, 40, 5, 3
CPU = torch.device("cpu")


def _written(name):
    """The writers of tests/test_formats.py."""
    if name in sys.modules:
        return sys.modules[name]
    path = Path(__file__).parents[1] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


w, layers = _written("formats_written"), _written("formats_written_layers")


def _randomise(module, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 3)
            if name.endswith("threshold"):
                p.copy_(p.abs())
    return module


def _set(activation, skip):
    made = {"relu": lambda: F.relu, "jump_relu": lambda: JumpReLU(torch.zeros(M), 0.1), "topk": lambda: TopK(K)}
    layers = {
        i: _randomise(
            single_layer_transcoder.SingleLayerTranscoder(
                D, M, made[activation](), i, skip_connection=skip, device=CPU, dtype=torch.float32
            ),
            i,
        )
        for i in range(L)
    }
    return single_layer_transcoder.TranscoderSet(layers, "mlp.hook_in", "hook_mlp_out", "org/toy")


def _open(folder, lazy=False):
    """As the tool opens what it cached: by config.yaml, from local files."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["transcoders"] = [str(folder / f"layer_{i}.safetensors") for i in range(len(list(folder.glob("layer_*"))))]
    return hf_utils.load_transcoders(config, CPU, torch.float32, lazy_encoder=lazy, lazy_decoder=lazy)


def _compare(ours, theirs, x):
    with torch.no_grad():
        acts, output = theirs.encode(x), theirs(x)
        theirs.double()
        assert_within_budget(ours.encode(x).to_dense(), acts, theirs.encode(x.double()), "codes")
        assert_within_budget(ours(x), output, theirs(x.double()), "output")
        theirs.float()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "jump_relu", "topk"])
def test_transcoders_both_ways(tmp_path, activation, skip):
    theirs = _set(activation, skip)
    theirs.to_safetensors(str(tmp_path / "tool"))
    ours = fusae.load(tmp_path / "tool")  # no config.yaml: top-k is told by its tensor k
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(9))
    for i in range(L):
        _compare(ours[i], theirs[i], x)
    folder = formats.save(ours, tmp_path / "ours", "circuit-tracer", metadata={"scan": "org/toy"})
    again = _open(folder)
    assert again.scan == "org/toy" and again.n_layers == L and again.skip_connection == skip
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    lazy = _open(folder, lazy=True)
    assert torch.equal(lazy[1].W_enc, theirs[1].W_enc) and torch.equal(lazy[1].W_dec, theirs[1].W_dec)
    with torch.no_grad():
        parts, same = (t.compute_attribution_components(x.expand(L, -1, -1).clone()) for t in (theirs, again))
    for key, value in parts.items():
        value, other = (v.to_dense() if v.is_sparse else v for v in (value, same[key]))
        assert torch.equal(value, other), key


@pytest.mark.parametrize("select", ["relu", "threshold", "batch_topk", "topk"])
def test_a_transcoder_of_ours_opens_there(tmp_path, select):
    config = SparseCoderConfig(
        d=D,
        m=M,
        k=K,
        select=select,
        d_out=D,
        pre_bias=False,
        skip=True,
        activation="none" if select == "topk" else "relu",
    )
    ours = _randomise(SparseCoder(config).eval())
    if select == "batch_topk":
        ours.threshold.fill_(0.25)
    theirs = _open(formats.save(ours, tmp_path, "circuit-tracer", metadata={"scan": "x"}))[0]
    _compare(ours, theirs, torch.randn(30, D, generator=torch.Generator().manual_seed(9)))


@pytest.mark.parametrize("activation", ["relu", "jump_relu"])
def test_cross_layer_transcoders_both_ways(tmp_path, activation):
    theirs = _randomise(
        cross_layer_transcoder.CrossLayerTranscoder(
            L, M, D, activation, lazy_decoder=False, device=CPU, dtype=torch.float32
        )
    )
    theirs.to_safetensors(str(tmp_path / "tool"))
    ours = fusae.load(tmp_path / "tool")
    assert isinstance(ours, CrossLayerTranscoder)
    _compare_clt(ours, theirs)
    folder = formats.save(ours, tmp_path / "ours", "circuit-tracer")
    for lazy in (False, True):
        again = cross_layer_transcoder.load_clt(str(folder), device=CPU, dtype=torch.float32, lazy_decoder=lazy)
        for i in range(L):
            assert torch.equal(again._get_decoder_vectors(i), theirs.W_dec[i]), i
        for key, value in again.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), key


def _compare_clt(ours, theirs):
    x = torch.randn(20, L, D, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        acts, output = theirs.encode(x.transpose(0, 1)), theirs(x.transpose(0, 1))
        theirs.double()
        wide = x.double().transpose(0, 1)
        codes = torch.stack([part.to_dense() for part in ours.encode(x)])
        assert_within_budget(codes, acts, theirs.encode(wide), "codes")
        assert_within_budget(ours(x).transpose(0, 1), output, theirs(wide), "output")
        theirs.float()


@pytest.mark.parametrize("select", ["relu", "threshold", "batch_topk"])
def test_a_cross_layer_transcoder_of_ours_opens_there(tmp_path, select):
    ours = _randomise(CrossLayerTranscoder(CrossLayerConfig(layers=L, d=D, m=M, k=K, select=select)).eval())
    if select == "batch_topk":
        for source in ours.sources:
            source.threshold.fill_(0.25)
    folder = formats.save(ours, tmp_path, "circuit-tracer")
    theirs = cross_layer_transcoder.load_clt(str(folder), device=CPU, dtype=torch.float32, lazy_decoder=False)
    _compare_clt(ours, theirs)


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_as_the_tool_reads_it(monkeypatch, tmp_path, skip):
    """Of the input's width, which the tool takes for granted."""
    monkeypatch.setattr(w, "OUT", D)
    path = w.gemma_2(tmp_path / "a", skip).path
    theirs = single_layer_transcoder.load_gemma_scope_2_transcoder(str(path / "params.safetensors"), 0, CPU)
    _compare(fusae.load(path, transcoder=True), theirs, torch.randn(30, D))


def test_gemma_scope_as_the_tool_reads_it(tmp_path):
    path = w.gemma(tmp_path / "a").path
    theirs = single_layer_transcoder.load_gemma_scope_transcoder(str(path / "params.npz"), 0, CPU)
    _compare(fusae.load(path, transcoder=True), theirs, torch.randn(30, D))


def test_gemma_scope_2_clt_as_the_tool_reads_it(tmp_path):
    """The tool leaves the last of the layers that it is given out, so it is given one more."""
    path = layers.clt(tmp_path / "a", gemma=True, layers=L).path
    files = {i: str(path / f"params_layer_{i}.safetensors") for i in range(L)}
    theirs = cross_layer_transcoder.load_gemma_scope_2_clt({**files, L: files[0]}, device=CPU, dtype=torch.float32)
    ours = fusae.load(path)
    x = torch.randn(20, L, D, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        inputs = x.transpose(0, 1)
        features = theirs.encode(inputs)
        codes = torch.stack([part.to_dense() for part in ours.encode(x)])
        torch.testing.assert_close(codes, features, rtol=1e-5, atol=1e-5)
        wanted = theirs.decode(features.to_sparse(), inputs)  # its forward adds the skip connection twice
        torch.testing.assert_close(ours(x).transpose(0, 1), wanted, rtol=1e-5, atol=1e-5)
