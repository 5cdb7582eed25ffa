# SPDX-License-Identifier: Apache-2.0
"""The best of a batch by Triton kernels: bounds from a sample that only decide speed. Interpreted without a GPU."""

import pytest
import torch

import fusae
from fusae import _dispatch
from fusae.testing import Target, assert_equal

if (REASON := _dispatch.why_not("encode_batch_topk_fwd", "triton", static=True)) is not None:
    pytest.skip(f"triton: {REASON}", allow_module_level=True)

from fusae.kernels import encode_batch_topk as kernels
from fusae.kernels import encode_plan as plan

DEVICE = Target("triton").device
N, M, K = 7, 500, 9


def integers(n=N, d=4, m=M, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x, W = (torch.randint(-3, 4, shape, generator=gen).float() for shape in ((n, d), (m, d)))
    return {"x": x.to(DEVICE), "W_enc": W.to(DEVICE), "b_enc": None, "k": K}


@pytest.fixture
def verdicts(monkeypatch):
    """Whether each batch was certified by its candidates."""
    seen, original = [], kernels.BatchCandidates.certified

    def spy(self):
        good = original(self)
        seen.append(bool(good))
        return good

    monkeypatch.setattr(kernels.BatchCandidates, "certified", spy)
    return seen


def assert_as_reference(inputs):
    got, wanted = (fusae.encode_batch_topk(**inputs, backend=b) for b in ("triton", "reference"))
    for part, other in zip(got, wanted, strict=True):
        if isinstance(part, torch.Tensor):
            assert_equal(part, other, "smallest")
            continue
        assert_equal(part.indices, other.indices, "indices")
        assert_equal(part.values, other.values, "values", signed_zero=True)
        if part.offsets is not None:
            assert_equal(part.offsets, other.offsets, "offsets")


CERTIFIED = {
    "ties": {},
    "any sign": {"activation": "none"},
    "all equal": {"x": torch.zeros(N, 4, device=DEVICE), "activation": "none"},
    "nothing positive": {"x": torch.zeros(N, 4, device=DEVICE)},
    "one row": {"x": torch.ones(1, 4, device=DEVICE), "k": 1},
    "k is m": {"k": M, "activation": "none"},
    "fewer latents than a sample": {"W_enc": torch.ones(3, 4, device=DEVICE), "k": 2},
    "a row of NaN": {"x": torch.cat([torch.ones(N - 1, 4), torch.full((1, 4), torch.nan)]).to(DEVICE), "k": 90},
    "infinities": {"x": torch.tensor([[torch.inf, 1, 2, 3]] * N, device=DEVICE), "k": 300, "activation": "none"},
    "norms": {"norms": (torch.arange(M, device=DEVICE) % 3).float()},
    "norms, any sign": {"norms": (torch.arange(M, device=DEVICE) % 3).float(), "activation": "none"},
}


@pytest.mark.parametrize("change", CERTIFIED.values(), ids=CERTIFIED)
def test_one_pass_is_enough(change, verdicts):
    assert_as_reference({**integers(), **change})
    assert verdicts == [True]


WRONG = {
    "too high a bound": plan.BatchSample(128, 2, 3000),
    "too small a buffer": plan.BatchSample(128, 60, N * K),
    "no buffer": plan.BatchSample(0, 0, 0),
}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("sample", WRONG.values(), ids=WRONG)
def test_a_batch_that_is_not_certified_is_repaired(sample, norms, verdicts, monkeypatch):
    monkeypatch.setattr(kernels, "batch_sample", lambda n, m, k: sample)
    inputs = integers()
    assert_as_reference({**inputs, "norms": (torch.arange(M, device=DEVICE) % 3).float() if norms else None})
    assert verdicts == [False]


@pytest.mark.parametrize("step", [2.0**-23, 2.0**-15, 2.0**-7, 1.0], ids=["last", "middle", "first", "all"])
def test_the_repair_finds_the_pivot_by_all_of_its_bits(step, monkeypatch):
    """Scores that differ in the bits of one pass alone, of both signs, some of them equal."""
    monkeypatch.setattr(kernels, "batch_sample", lambda n, m, k: plan.BatchSample(0, 0, 0))
    place = torch.arange(M, device=DEVICE)
    W = (1 + step * (place * 37 % 101)).float()
    for W_enc in (torch.where(place % 3 == 0, -W, W), -W):
        inputs = {"x": torch.ones(N, 1, device=DEVICE), "W_enc": W_enc[:, None], "b_enc": None, "k": K}
        assert_as_reference({**inputs, "activation": "none"})


@pytest.mark.parametrize("certified", [True, False])
def test_auxiliary_latents_come_from_the_same_pass(certified, verdicts, monkeypatch):
    """And do not depend on whether the batch is certified."""
    if not certified:
        monkeypatch.setattr(kernels, "batch_sample", lambda n, m, k: plan.BatchSample(0, 0, 0))
    mask = torch.arange(M, device=DEVICE) % 5 == 1
    for way in ("fused", "chunked"):
        with _encoder(way):
            assert_as_reference({**integers(), "aux_mask": mask, "k_aux": 6})
    assert verdicts == [certified, certified]


def test_a_storm_of_hits_is_cut_off(monkeypatch):
    """Every score passes, in many tiles: once the buffer is full nothing more is counted, and the result is exact."""
    monkeypatch.setattr(kernels, "batch_sample", lambda n, m, k: plan.BatchSample(0, 0, n * k))
    totals, original = [], kernels.BatchCandidates.certified
    monkeypatch.setattr(
        kernels.BatchCandidates, "certified", lambda self: (totals.append(int(self.total)), original(self))[1]
    )
    inputs = integers(m=1100)
    assert_as_reference({**inputs, "activation": "none"})
    assert N * K < totals[0] < N * 1100


def test_a_row_has_the_same_codes_whatever_the_candidates_order(monkeypatch):
    """Programs from the last to the first: other slots for every candidate, the same result."""
    if DEVICE.type == "cuda":
        pytest.skip("the order of programs is the GPU's")
    from triton.runtime.interpreter import InterpreterBuilder

    inputs = integers(n=70)
    wanted = fusae.encode_batch_topk(**inputs, backend="triton")
    ahead = InterpreterBuilder.set_grid_idx

    def backwards(self, x, y, z):
        ahead(self, *(size - 1 - at for size, at in zip(self.grid_dim, (x, y, z), strict=True)))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", backwards)
    got = fusae.encode_batch_topk(**inputs, backend="triton")
    assert_equal(got[0].indices, wanted[0].indices), assert_equal(got[0].values, wanted[0].values)
    assert_equal(got[0].offsets, wanted[0].offsets), assert_equal(got[1], wanted[1])


@pytest.mark.parametrize(("n", "m", "k"), [(8192, 131_072, 64), (8192, 1_048_576, 32), (4096, 65_536, 64), (3, 900, 5)])
def test_a_sample_of_a_batch_seldom_fails(n, m, k):
    """The tails, counted in a way of their own, and the memory that the buffer may take."""
    stats = pytest.importorskip("scipy.stats", reason="scipy has the binomial law")
    s, p = plan.batch_sample(n, m, k), plan.batch_sample(n, m, k).size / m
    assert stats.binom.sf(s.rank - 1, n * k, p) < 1e-9
    assert stats.binom.cdf(s.rank - 1, s.cap, p) < 1e-7
    assert n * s.size <= 1 << 24
    assert s.cap <= max(3 * n * k, 4000)


def test_huge_batches_have_no_buffer():
    assert plan.batch_sample(10**7, 10**6, 200).cap == 0


def _encoder(way):
    from fusae.backends import triton

    return triton.force_encoder(way)
