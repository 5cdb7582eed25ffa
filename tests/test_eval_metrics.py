# SPDX-License-Identifier: Apache-2.0
"""Streaming reconstruction metrics against the formulas in plain float64."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusae.eval import ReconstructionMetrics, measure
from fusae.eval.metrics import density_histogram

M, D, K = 40, 12, 5


def fixed(dense):
    values, indices = dense.abs().topk(K, dim=1)
    return SimpleNamespace(values=dense.gather(1, indices), indices=indices.int(), offsets=None)


def ragged(dense, spare=0):
    rows, columns = dense.nonzero(as_tuple=True)
    values = torch.cat([dense[rows, columns], torch.full((spare,), math.nan)])
    indices = torch.cat([columns, torch.full((spare,), -7)]).int()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    return SimpleNamespace(values=values, indices=indices, offsets=offsets)


def data(n=300, seed=0, offset=3.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g) + offset
    reconstruction = x * 0.9 + 0.3 * torch.randn(n, D, generator=g)
    dense = torch.zeros(n, M)
    for row in dense:  # at most K active of the first M - 4, some rows with fewer, some values negative
        count = int(torch.randint(0, K + 1, (), generator=g))
        row[torch.randperm(M - 4, generator=g)[:count]] = torch.randn(count, generator=g) + 0.01
    return x, reconstruction, dense


def oracle(x, reconstruction, dense):
    x, r = x.double(), reconstruction.double()
    fired = (dense != 0).double()
    return {
        "tokens": len(x),
        "fvu": float((x - r).square().sum() / (x - x.mean(0)).square().sum()),
        "explained_variance": float(1 - (x - r).square().sum() / (x - x.mean(0)).square().sum()),
        "mse": float((x - r).square().mean()),
        "cosine": float(torch.nn.functional.cosine_similarity(x, r).mean()),
        "l2_ratio": float((r.norm(dim=1) / x.norm(dim=1)).mean()),
        "relative_bias": float((r * r).sum() / (x * r).sum()),
        "l0": float(fired.sum(1).mean()),
        "latents": dense.shape[1],
        "dead_latents": int((fired.sum(0) == 0).sum()),
        "dead_fraction": float((fired.sum(0) == 0).double().mean()),
        "over_10_percent": int((fired.mean(0) > 0.1).sum()),
        "below_1e_5": int((fired.mean(0) < 1e-5).sum()),
        "density_histogram": histogram(fired.mean(0)),
        "density": fired.mean(0).tolist(),
    }


def histogram(density):
    """Latent by latent, from the edges: quarters of a power of ten."""
    counts = [0] * 32
    for value in density.tolist():
        if value > 0:
            counts[max(i for i in range(32) if i == 0 or value >= 10 ** (-8 + i / 4))] += 1
    return {"log10_from": -8.0, "log10_step": 0.25, "counts": counts}


def assert_same(found, expected, rel=1e-11):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wanted = value if name == "density_histogram" else pytest.approx(value, rel=rel, abs=1e-13)
        assert found[name] == wanted, name


@pytest.mark.parametrize("form", [fixed, ragged, lambda dense: ragged(dense, spare=9)])
def test_one_shot_equals_the_formulas(form):
    x, r, dense = data()
    result = ReconstructionMetrics(M).update(x, r, form(dense)).result()
    assert_same(result, oracle(x, r, dense))
    assert result["dead_latents"] >= 4
    assert sum(result["density_histogram"]["counts"]) == M - result["dead_latents"]
    json.dumps(result, allow_nan=False)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=5), st.booleans(), st.sampled_from([0.0, 3.0, 1e4]))
def test_batches_and_merges_equal_one_shot(cuts, merge, offset):
    x, r, dense = data(offset=offset)
    whole = ReconstructionMetrics(M)
    edges = [0, *sorted(cuts), 300]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        part = ReconstructionMetrics(M) if merge else whole
        part.update(x[start:stop], r[start:stop], ragged(dense[start:stop]))
        if merge:
            assert whole.merge(part) is whole
    # at offset 1e4 the squares are 1e8 times the variance; about 16 − 8 digits would be left without centring
    assert_same(whole.result(), oracle(x, r, dense), rel=1e-10)
    torch.testing.assert_close(whole.mean(), x.double().mean(0), rtol=1e-12, atol=1e-12)


def test_the_variance_is_about_the_mean_of_all_rows_not_of_a_batch():
    x = torch.cat([torch.zeros(10, D), torch.ones(10, D)])
    metrics = ReconstructionMetrics(M)
    nothing = torch.zeros(10, M)
    for batch in x.split(10):  # each batch has no variance of its own
        metrics.update(batch, batch - 0.25, ragged(nothing))
    assert metrics.result()["fvu"] == pytest.approx(0.25**2 / 0.5**2)


def test_leading_dimensions_and_low_precision():
    x, r, dense = data(24)
    codes = fixed(dense)
    shaped = SimpleNamespace(values=codes.values.view(4, 6, K), indices=codes.indices.view(4, 6, K), offsets=None)
    shaped_result = ReconstructionMetrics(M).update(x.view(4, 6, D), r.view(4, 6, D), shaped).result()
    assert_same(shaped_result, oracle(x, r, dense))
    low = ReconstructionMetrics(M).update(x.bfloat16(), r.bfloat16(), codes).result()
    assert_same(low, oracle(x.bfloat16(), r.bfloat16(), dense))


def test_zero_rows_and_constant_data():
    metrics = ReconstructionMetrics(M).update(torch.zeros(4, D), torch.ones(4, D), ragged(torch.zeros(4, M)))
    result = metrics.result()
    assert math.isnan(result["fvu"]) and math.isnan(result["l2_ratio"]) and result["cosine"] == 0.0
    assert result["mse"] == 1.0 and result["l0"] == 0.0 and result["dead_fraction"] == 1.0


def test_the_relative_bias_is_the_best_scale():
    """Dividing the reconstruction by it gives the least error (arXiv 2404.16014)."""
    x, r, dense = data()
    bias = ReconstructionMetrics(M).update(x, r * 0.5, fixed(dense)).result()["relative_bias"]
    error = [float((x - r * 0.5 / (bias * f)).double().square().sum()) for f in (0.99, 1.0, 1.01)]
    assert error[1] < error[0] and error[1] < error[2] and bias < 0.6


def test_densities_at_the_ends_of_the_histogram():
    found = density_histogram(torch.tensor([0.0, 1e-12, 1e-8, 0.056, 0.057, 1.0], dtype=torch.float64))["counts"]
    assert {i: n for i, n in enumerate(found) if n} == {0: 2, 26: 1, 27: 1, 31: 1}


def test_nan_is_not_hidden():
    x, r, dense = data(20)
    r[3, 4] = math.nan
    result = ReconstructionMetrics(M).update(x, r, fixed(dense)).result()
    assert math.isnan(result["fvu"]) and math.isnan(result["mse"]) and math.isnan(result["cosine"])


def test_errors():
    x, r, dense = data(20)
    metrics = ReconstructionMetrics(M)
    with pytest.raises(ValueError, match="no rows were seen"):
        metrics.result()
    with pytest.raises(ValueError, match="latents must be"):
        ReconstructionMetrics(0)
    with pytest.raises(ValueError, match="reconstruction must have the shape of x"):
        metrics.update(x, r[:, :3], fixed(dense))
    with pytest.raises(ValueError, match="codes must have 20 rows as x, got 19"):
        metrics.update(x, r, fixed(dense[:19]))
    with pytest.raises(ValueError, match="codes.indices must lie in 0..9"):
        ReconstructionMetrics(10).update(x, r, fixed(dense))
    metrics.update(x, r, fixed(dense))
    with pytest.raises(ValueError, match="x must have width 12"):
        metrics.update(x[:, :3], r[:, :3], fixed(dense))
    with pytest.raises(ValueError, match="other must be of 40 latents"):
        metrics.merge(ReconstructionMetrics(41))
    narrow = ReconstructionMetrics(M).update(x[:, :3], r[:, :3], fixed(dense))
    with pytest.raises(ValueError, match="other must be of width 12"):
        metrics.merge(narrow)
    assert_same(metrics.result(), oracle(x, r, dense))  # failed calls left nothing behind


@pytest.mark.parametrize("kind", ["rows", "batches"])
def test_measure_runs_over_all_rows(kind):
    x, r, dense = data(50)

    class Rows:
        def __len__(self):
            return 50

        def take(self, index):
            return x[index]

    class Batches:
        def __len__(self):
            return 50

        def __iter__(self):
            return iter(x.split(16))

    seen = []

    def encode(rows):
        start = sum(seen)
        seen.append(len(rows))
        return fixed(dense[start : start + len(rows)])

    def decode(codes):
        return r[sum(seen) - seen[-1] : sum(seen)]

    rows = Rows() if kind == "rows" else Batches()
    result = measure(rows, encode, decode, M, batch_size=16, progress=False).result()
    assert seen == [16, 16, 16, 2]
    assert_same(result, oracle(x, r, dense))


def test_measure_names_bad_rows():
    class Rows:
        def __len__(self):
            return 5

        def take(self, index):
            rows = torch.ones(5, D)
            rows[3, 1] = math.inf
            return rows[index]

    with pytest.raises(ValueError, match="rows: 1 of rows 2 to 3 hold NaN or infinite values; leave such rows out"):
        measure(Rows(), lambda x: ragged(torch.zeros(len(x), M)), lambda c: torch.ones(2, D), M, batch_size=2,
                progress=False)  # fmt: skip
