# SPDX-License-Identifier: Apache-2.0
"""sparsify writes and fusae reads, fusae writes and sparsify reads: the same dictionary, bit by bit, both ways."""

import json

import pytest
import torch

import fusae
from fusae import formats
from fusae.nn import SparseCoder, SparseCoderConfig
from fusae.testing.compare import assert_within_budget

pytest.importorskip("sparsify", reason="eai-sparsify is not installed (the extra [integrations])")
import sparsify  # noqa: E402

D, M, K = 12, 40, 5
KINDS = {
    "topk": {}, "groupmax": {"activation": "groupmax"}, "skip": {"skip_connection": True},
    "transcoder": {"transcode": True}, "skip transcoder": {"transcode": True, "skip_connection": True},
    "multi": {"multi_topk": True, "normalize_decoder": False},
}  # fmt: skip


def _randomise(module):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 3)
    return module


def _make(**fields):
    return _randomise(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=M, k=K, **fields)))


def _x():
    return torch.randn(48, D, generator=torch.Generator().manual_seed(2)) * 1.3 + 0.2


def _dense(found):
    acts = found.top_acts
    return acts.new_zeros(len(acts), M).scatter(1, found.top_indices, acts)


def _output(coder, x):
    """In the dtype of the weights: the tool's own `forward` may be under autocast."""
    y = coder.decode(*coder.encode(x)[:2])
    return y if coder.W_skip is None else y + x @ coder.W_skip.mT


def _compare(ours, theirs):
    x = _x()
    wide = _copy(theirs).double()
    with torch.no_grad():
        assert_within_budget(
            ours.encode(x).to_dense(), _dense(theirs.encode(x)), _dense(wide.encode(x.double())), "codes"
        )
        assert_within_budget(ours(x), _output(theirs, x), _output(wide, x.double()), "output")


def _copy(coder):
    other = sparsify.SparseCoder(D, coder.cfg, dtype=coder.dtype)
    other.load_state_dict(coder.state_dict())
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways(tmp_path, kind):
    theirs = _make(**KINDS[kind])
    theirs.save_to_disk(tmp_path / "tool")
    ours = fusae.load(tmp_path / "tool")
    _compare(ours, theirs)
    again = sparsify.SparseCoder.load_from_disk(formats.save(ours, tmp_path / "ours", "sparsify"))
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    old, new = (json.loads((tmp_path / which / "cfg.json").read_text()) for which in ("tool", "ours"))
    old.pop("expansion_factor"), new.pop("expansion_factor")  # of no effect beside num_latents
    assert old == new


def test_expansion_factor_alone(tmp_path):
    theirs = _randomise(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(expansion_factor=4, k=K)))
    theirs.save_to_disk(tmp_path)
    assert fusae.load(tmp_path).config.m == 4 * D


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(tmp_path, dtype):
    theirs = _make().to(dtype)
    theirs.save_to_disk(tmp_path / "tool")
    ours = fusae.load(tmp_path / "tool")
    assert ours.W_enc.dtype == dtype
    again = sparsify.SparseCoder.load_from_disk(formats.save(ours, tmp_path / "ours", "sparsify"))
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]) and value.dtype == again.state_dict()[key].dtype, key


OURS = {
    "topk": {}, "group_max": {"select": "group_max"}, "no pre-bias": {"pre_bias": False},
    "skip transcoder": {"pre_bias": False, "d_out": D, "skip": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", OURS)
def test_a_dictionary_of_ours_opens_there(tmp_path, kind):
    ours = _randomise(SparseCoder(SparseCoderConfig(d=D, m=M, k=K, **OURS[kind]))).eval()
    theirs = sparsify.SparseCoder.load_from_disk(formats.save(ours, tmp_path, "sparsify"))
    assert torch.equal(theirs.W_dec, ours.W_dec) and torch.equal(theirs.encoder.weight, ours.W_enc)
    _compare(ours, theirs)


def test_a_folder_of_hookpoints(tmp_path):
    made = {name: _make() for name in ("layers.1", "layers.10", "layers.2")}
    for i, (name, theirs) in enumerate(made.items()):
        theirs.b_dec.data += i
        theirs.save_to_disk(tmp_path / name)
    ours = fusae.load(tmp_path)
    assert set(ours) == set(made)
    for name, coder in ours.items():
        assert torch.equal(coder.b_dec, made[name].b_dec)
        formats.save(coder, tmp_path / "again" / name, "sparsify")
    for name, theirs in sparsify.SparseCoder.load_many(str(tmp_path / "again"), local=True).items():
        assert torch.equal(theirs.b_dec, made[name].b_dec)
