# SPDX-License-Identifier: Apache-2.0
"""MMCS, MCC and PW-MCC: known values, what must not matter, what is refused."""

import itertools
import math
import sys

import pytest
import torch

from fusae.eval import recovery


def dictionary(m, d=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)


def brute_force_mcc(a, b):
    """The best assignment among all of them."""
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2).abs()
    if len(a) > len(b):
        cosines = cosines.T
    rows = range(cosines.shape[0])
    return max(
        float(cosines[list(rows), list(chosen)].mean())
        for chosen in itertools.permutations(range(cosines.shape[1]), len(rows))
    )


def test_known_values():
    truth = torch.eye(3)
    half = math.sqrt(0.5)
    found = torch.tensor([[1.0, 0, 0], [half, half, 0]])
    assert recovery.best_cosines(found, truth).tolist() == pytest.approx([1.0, half, 0.0])
    assert recovery.mmcs(found, truth) == pytest.approx((1 + half) / 3)
    rows, directions, cosines = recovery.match(found, truth)
    assert (rows.tolist(), directions.tolist()) == ([0, 1], [0, 1]) and rows.dtype == torch.int64
    assert cosines.tolist() == pytest.approx([1.0, half])
    assert recovery.mcc(found, truth) == pytest.approx((1 + half) / 2)


def test_one_row_cannot_be_matched_twice():
    truth = torch.tensor([[1.0, 0, 0], [1.0, 0.1, 0]])
    found = torch.tensor([[1.0, 0.05, 0], [0, 0, 1.0]])
    assert recovery.mmcs(found, truth) > 0.99
    assert recovery.mcc(found, truth) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("m", "t"), [(6, 6), (4, 6), (6, 4), (1, 5)])
def test_the_assignment_is_the_best_of_all(m, t):
    # In seven dimensions a greedy choice of the largest cosines first is wrong for some of these seeds.
    for seed in range(8):
        found, truth = dictionary(m, 7, seed), dictionary(t, 7, seed + 100)
        expected = brute_force_mcc(found, truth)
        assert recovery.mcc(found, truth) == pytest.approx(expected, rel=1e-12)
        assert recovery.mcc(truth, found) == pytest.approx(expected, rel=1e-12)
        rows, directions, _ = recovery.match(found, truth)
        assert len(set(rows.tolist())) == len(set(directions.tolist())) == min(m, t)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_order_length_and_sign_do_not_matter(dtype):
    truth = dictionary(30)
    noisy = truth + 0.2 * dictionary(30, seed=1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    length = torch.linspace(0.01, 100.0, 30, dtype=torch.float64)[:, None]
    sign = torch.where(torch.arange(30) % 2 == 0, 1.0, -1.0)[:, None]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    plain_mcc, plain_mmcs = recovery.mcc(noisy, truth), recovery.mmcs(noisy, truth)
    assert 0.9 < plain_mcc < 0.999
    moved = (noisy * length)[order].to(dtype)
    assert recovery.mcc(moved, truth.to(dtype)) == pytest.approx(plain_mcc, rel=tolerance)
    assert recovery.mmcs(moved, truth.to(dtype)) == pytest.approx(plain_mmcs, rel=tolerance)
    flipped = (noisy * length * sign)[order].to(dtype)
    assert recovery.mcc(flipped, truth.to(dtype)) == pytest.approx(plain_mcc, rel=tolerance)
    assert recovery.mmcs(flipped, truth.to(dtype)) < plain_mmcs - 0.1  # the cosine of MMCS is signed
    rows, directions, cosines = recovery.match(flipped.double(), truth)
    assert torch.equal(order[rows], directions) and torch.equal(cosines.sign(), sign[directions, 0])


def test_a_dictionary_is_itself():
    for m in (1, 40):
        rows = dictionary(m, dtype=torch.float32)
        assert recovery.mcc(rows, rows) == pytest.approx(1.0, abs=1e-6)
        assert recovery.mmcs(rows, rows) == pytest.approx(1.0, abs=1e-6)


def test_chunks_do_not_show(monkeypatch):
    found, truth = dictionary(20), dictionary(33, seed=1)
    whole = recovery.best_cosines(found, truth)
    monkeypatch.setattr(recovery, "_CHUNK", 7)
    torch.testing.assert_close(recovery.best_cosines(found, truth), whole)


def test_pairs_of_runs():
    a, b, c = (dictionary(9, seed=seed) for seed in range(3))
    pairs = [recovery.mcc(a, b), recovery.mcc(a, c), recovery.mcc(b, c)]
    assert recovery.pw_mcc([a, b, c]) == pytest.approx(sum(pairs) / 3)
    assert recovery.pw_mcc([a, a.flip(0), -a]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="dictionaries must be at least two, got 1"):
        recovery.pw_mcc([a])


def test_empty_rows_and_tiny_values():
    truth = torch.eye(4, dtype=torch.float32)
    found = torch.zeros(4, 4)
    found[0, 0] = 1e-30  # its square is not a float32
    assert recovery.best_cosines(found, truth).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert recovery.mcc(found, truth) == 0.25


@pytest.mark.parametrize(
    ("found", "truth", "error", "told"),
    [
        ([[1.0]], torch.eye(2), TypeError, "dictionary must be a torch.Tensor, got list"),
        (torch.eye(2), torch.ones(2), ValueError, r"truth must have shape \[rows, d\].*got \[2\]"),
        (torch.ones(0, 2), torch.eye(2), ValueError, r"dictionary must have shape .* got \[0, 2\]"),
        (torch.eye(2).long(), torch.eye(2), TypeError, "dictionary must be of a float dtype, got torch.int64"),
        (torch.ones(5, 3), torch.eye(2), ValueError, r"width of truth, 2, got 3 \(transposed\?\)"),
        (torch.tensor([[1.0, 0], [math.nan, 0]]), torch.eye(2), ValueError, "dictionary holds NaN .* 1 rows .* row 1"),
        (torch.eye(2), torch.tensor([[math.inf, 0]]), ValueError, "truth holds NaN or infinite values in 1 rows"),
    ],
)
@pytest.mark.parametrize("measure", [recovery.mmcs, recovery.mcc])
def test_errors(measure, found, truth, error, told):
    with pytest.raises(error, match=told):
        measure(found, truth)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"matching dictionaries needs scipy .*pip install 'fusae\[match\]'"):
        recovery.mcc(torch.eye(2), torch.eye(2))
    assert recovery.mmcs(torch.eye(2), torch.eye(2)) == 1.0
