# SPDX-License-Identifier: Apache-2.0
"""What llamascopium writes, fusae reads: the same codes and the same output for plain rows."""

import copy
import json

import pytest
import torch

import fusae
from fusae import formats
from fusae.testing.compare import assert_within_budget

pytest.importorskip("llamascopium", reason="llamascopium is not installed (the extra [integrations])")
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder  # noqa: E402

D, M, K = 12, 48, 5
IN, OUT = "blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out"


def _make(act, norm="dataset-wise", by_norm=True, transcoder=False, bias=True):
    cfg = SAEConfig(
        sae_type="sae", d_model=D, expansion_factor=M / D, act_fn=act, norm_activation=norm, top_k=K,
        sparsity_include_decoder_norm=by_norm, hook_point_in=IN, hook_point_out=OUT if transcoder else IN,
        use_decoder_bias=bias, dtype=torch.float32, device="cpu",
    )  # fmt: skip
    sae = SparseAutoEncoder(cfg)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 3)
            if "threshold" in name:
                p.copy_(p.abs() * 0.5 - 1)
    sae.set_dataset_average_activation_norm({IN: 2.0, OUT: 5.0} if transcoder else {IN: 2.0})
    return sae


def _codes(sae, x):
    """Of plain rows: normalised, encoded, and the codes brought back to the scale of plain rows."""
    batch = {IN: x, sae.cfg.hook_point_out: x}
    normalised, factors = sae.normalize_activations(batch, return_scale_factor=True)
    acts = sae.encode(normalised[IN])
    scale = 1.0 if sae.cfg.norm_activation == "token-wise" else factors[IN]
    out = sae.decode(acts) / factors[sae.cfg.hook_point_out]
    return acts / scale, out


CASES = [
    (act, norm, by_norm, transcoder)
    for act in ("relu", "topk", "jumprelu")
    for norm in ("dataset-wise", "inference", "token-wise")
    for by_norm in (False, True)
    for transcoder in (False, True)
    if not (transcoder and norm == "token-wise")
]


@pytest.mark.parametrize("act, norm, by_norm, transcoder", CASES)
def test_it_reads_what_the_tool_wrote(tmp_path, act, norm, by_norm, transcoder):
    theirs = _make(act, norm, by_norm, transcoder)
    theirs.save_pretrained(tmp_path)
    theirs.cfg.save_hyperparameters(tmp_path)
    ours = fusae.load(tmp_path)
    assert ours.config.d_out == (D if transcoder else None) and ours.metadata["hook_name"] == IN
    x = torch.randn(48, D, generator=torch.Generator().manual_seed(2)) * 1.3 + 0.2
    with torch.no_grad():
        acts, out = _codes(theirs, x)
        wide_acts, wide_out = _codes(copy.deepcopy(theirs).double(), x.double())
        assert_within_budget(ours.encode(x).to_dense(), acts, wide_acts, "codes")
        assert_within_budget(ours(x), out, wide_out, "output")


@pytest.mark.parametrize("act", ["relu", "topk"])
@pytest.mark.parametrize("transcoder", [False, True])
def test_the_tools_own_folding(tmp_path, act, transcoder):
    """Folded by the tool and read, or read and folded here: the same weights. (It leaves thresholds as they are.)"""
    theirs = _make(act, transcoder=transcoder)
    theirs.save_pretrained(tmp_path / "plain")
    theirs.cfg.save_hyperparameters(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "folded", fold_activation_scale=True)
    theirs.cfg.save_hyperparameters(tmp_path / "folded")
    assert json.loads((tmp_path / "folded" / "config.json").read_text())["norm_activation"] == "inference"
    ours, folded = fusae.load(tmp_path / "plain"), fusae.load(tmp_path / "folded")
    for (key, a), b in zip(ours.state_dict().items(), folded.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=0, msg=key)


def test_without_a_decoder_bias(tmp_path):
    theirs = _make("relu", bias=False)
    theirs.save_pretrained(tmp_path)
    theirs.cfg.save_hyperparameters(tmp_path)
    assert not fusae.load(tmp_path).b_dec.any()


def test_pickled_checkpoints(tmp_path):
    theirs = _make("jumprelu")
    theirs.save_checkpoint(tmp_path / "sae_weights.pt")
    theirs.cfg.save_hyperparameters(tmp_path)
    theirs.save_checkpoint(tmp_path / "sae_weights.safetensors")
    one = fusae.load(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    two = fusae.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_what_it_reads_of_saelens(tmp_path):
    """A dictionary of ours, as SAELens has it, opens in llamascopium too."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (the extra [integrations])")
    from fusae.nn import SparseCoder, SparseCoderConfig

    ours = SparseCoder(SparseCoderConfig(d=D, m=M, k=K, pre_bias=False)).eval()
    folder = formats.save(ours, tmp_path, "saelens", metadata={"hook_name": IN})
    theirs = SparseAutoEncoder.from_saelens(sae_lens.SAE.load_from_disk(folder))
    x = torch.randn(30, D)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), ours.encode(x).to_dense(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.decode(theirs.encode(x)), ours(x), rtol=1e-5, atol=1e-5)
