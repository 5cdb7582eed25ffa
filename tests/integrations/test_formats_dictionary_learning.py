# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning writes and fusae reads, and the other way: the same dictionary, bit by bit, both ways."""

import json

import pytest
import torch

import fusae
from fusae import formats
from fusae.nn import SparseCoder, SparseCoderConfig
from fusae.testing.compare import assert_within_budget

pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed (the extra [integrations])")
from dictionary_learning import utils  # noqa: E402

D, M, K = 12, 40, 5
CLASSES = [
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
]  # fmt: skip


def _randomise(module, unit=None):
    """Random weights; columns of `unit` of norm 1, where the tool would scale them to it on loading."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 3)
            if name == "threshold":
                p.copy_(p.abs())
        if unit is not None:
            unit /= unit.norm(dim=0)
    return module


def _make(name):
    cls = getattr(utils, name)
    args = {"AutoEncoderTopK": (K,), "BatchTopKSAE": (K,), "MatryoshkaBatchTopKSAE": (K, [8, 12, 20])}.get(name, ())
    ae = cls(D, M, *args)
    _randomise(ae, ae.decoder.weight.data if name == "AutoEncoder" else None)
    if "TopK" in name:
        ae.threshold.fill_(0.37)
    return ae.eval()


def _save(ae, path, **trainer):
    path.mkdir(parents=True)
    torch.save(ae.state_dict(), path / "ae.pt")
    about = {"dict_class": type(ae).__name__, "activation_dim": D, "dict_size": M, "k": K, "layer": 3, "lm_name": "a/b"}
    (path / "config.json").write_text(json.dumps({"trainer": {**about, **trainer}, "buffer": {"ctx_len": 64}}))
    return path


def _compare(ours, theirs):
    x = torch.randn(48, D, generator=torch.Generator().manual_seed(2)) * 1.3 + 0.2
    with torch.no_grad():
        acts, output = theirs.encode(x), theirs(x)
        theirs.double()
        assert_within_budget(ours.encode(x).to_dense(), acts, theirs.encode(x.double()), "codes")
        assert_within_budget(ours(x), output, theirs(x.double()), "output")


@pytest.mark.parametrize("name", CLASSES)
def test_both_ways(tmp_path, name):
    theirs = _make(name)
    ours = fusae.load(_save(theirs, tmp_path / "tool"))
    formats.save(ours, tmp_path / "ours", "dictionary_learning")
    again, config = utils.load_dictionary(str(tmp_path / "ours"), device="cpu")
    assert type(again) is type(theirs) and config["trainer"]["dict_class"] == name and config["trainer"]["layer"] == 3
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]) and value.dtype == again.state_dict()[key].dtype, key
    _compare(ours, theirs)


@pytest.mark.parametrize("name", [c for c in CLASSES if c not in ("AutoEncoderTopK", "BatchTopKSAE")])
def test_the_class_is_seen_without_a_configuration(tmp_path, name):
    theirs = _make(name)
    path = _save(theirs, tmp_path / "tool")
    (path / "config.json").unlink()
    _compare(fusae.load(path), theirs)


def test_a_threshold_that_is_not_known_stays_unknown(tmp_path):
    theirs = _make("BatchTopKSAE")
    theirs.threshold.fill_(-1.0)
    ours = fusae.load(_save(theirs, tmp_path / "tool"))
    again, _ = utils.load_dictionary(str(formats.save(ours, tmp_path / "ours", "dictionary_learning")), device="cpu")
    assert float(again.threshold) == -1.0
    _compare(ours, theirs)


OURS = {
    "AutoEncoderTopK": {}, "BatchTopKSAE": {"select": "batch_topk"}, "AutoEncoder": {"select": "relu"},
    "AutoEncoderNew": {"select": "relu", "pre_bias": False}, "GatedAutoEncoder": {"select": "relu", "gated": True},
    "JumpReluAutoEncoder": {"select": "threshold", "pre_bias": False},
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_a_dictionary_of_ours_opens_there(tmp_path, name):
    ours = _randomise(SparseCoder(SparseCoderConfig(d=D, m=M, k=K, **OURS[name])).eval())
    if name == "BatchTopKSAE":
        ours.threshold.fill_(0.25)
    if name == "AutoEncoder":
        ours.normalise_decoder_()
    formats.save(ours, tmp_path, "dictionary_learning", metadata={"layer": 2, "model_name": "org/toy"})
    theirs, config = utils.load_dictionary(str(tmp_path), device="cpu")
    assert type(theirs).__name__ == name and config["trainer"]["lm_name"] == "org/toy"
    _compare(ours, theirs)


def test_rows_that_are_not_of_norm_1_are_scaled_by_the_tool(tmp_path):
    """Its loader of an AutoEncoder makes decoder columns unit norm: other codes, the same output."""
    ours = _randomise(SparseCoder(SparseCoderConfig(d=D, m=M, k=1, select="relu")).eval())
    formats.save(ours, tmp_path, "dictionary_learning")
    theirs, _ = utils.load_dictionary(str(tmp_path), device="cpu")
    x = torch.randn(20, D)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.encode(x), ours.fold_norms_().encode(x).to_dense(), rtol=1e-4, atol=1e-4)
