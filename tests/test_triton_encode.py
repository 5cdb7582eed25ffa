# SPDX-License-Identifier: Apache-2.0
"""What breaks selections on GPUs, one test each, on the Triton kernels. Interpreted where there is no GPU."""

import pytest
import torch

import fusae
from fusae import _dispatch
from fusae.testing import Target, assert_equal, cases
from fusae.testing.conformance import check_forward

if (REASON := _dispatch.why_not("encode_topk_fwd", "triton", static=True)) is not None:
    pytest.skip(f"triton: {REASON}", allow_module_level=True)

from fusae.kernels import encode_plan as plan
from fusae.kernels import topk as kernels

from fusae.backends import triton

DEVICE = Target("triton").device
FUSED = Target("triton", gemm="fused")
N, D, M, K = 5, 16, 2200, 9


def case(pattern, **options):
    return cases.encode_topk(N, D, M, options.pop("k", K), pattern=pattern, **options)


def codes(inputs, way="fused"):
    with triton.force_encoder(way):
        return fusae.encode_topk(**inputs, backend="triton")


def assert_as_reference(inputs, way="fused"):
    got, wanted = codes(inputs, way), fusae.encode_topk(**inputs, backend="reference")
    assert_equal(got.indices, wanted.indices, "indices")
    assert_equal(got.values, wanted.values, "values")


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        pytest.param("duplicates", {}, id="1-ties"),
        pytest.param("zero_x", {}, id="2-tie_storm_of_zeros"),
        pytest.param("equal_latents", {}, id="2-tie_storm_of_equal_latents"),
        pytest.param("few_positive", {}, id="3-fewer_than_k_positive"),
        pytest.param("all_negative", {"activation": "none"}, id="4-negative_values"),
        pytest.param("negative_zero", {"activation": "none"}, id="5-signed_zeros"),
        pytest.param("nan_rows", {}, id="6-rows_of_NaN"),
        pytest.param("nan_latent", {"activation": "none", "select": "abs"}, id="6-NaN_of_either_sign"),
        pytest.param("infinite", {"norms": True}, id="6-infinite"),
        pytest.param("integers", {"k": M}, id="14-k_is_m"),
        pytest.param("integers", {"k": 1}, id="14-k_is_1"),
    ],
)
def test_pitfall(pattern, options):
    check_forward(case(pattern, **options), FUSED, torch.float32)


@pytest.mark.parametrize(
    ("rank", "k", "what"),
    [
        pytest.param(1, 200, "under", id="7-a_bound_that_is_too_high_is_noticed"),
        pytest.param(60, 9, "over", id="8-a_buffer_that_overflows_is_noticed"),
    ],
)
@pytest.mark.parametrize("norms", [False, True])
def test_a_row_that_is_not_certified_is_repaired(monkeypatch, rank, k, what, norms):
    """The sample only ever decides speed: whatever bound it gives, the result is exact."""
    inputs = cases.encode_topk(N, D, 6000, k, pattern="wide_integers", norms=norms).inputs(device=DEVICE)
    failed = []
    monkeypatch.setattr(plan, "sample", lambda m, k, width: plan.Sample(128, rank, 1024))
    original = kernels.emit

    def spy(keys, pre, count, *args):
        failed.append(int((count == 0).sum()))
        original(keys, pre, count, *args)

    monkeypatch.setattr("fusae.kernels.encode_topk.emit", spy)
    assert_as_reference(inputs)
    assert failed and max(failed) > 0, f"no row was {what} its buffer: the test shows nothing"


def test_9_the_sample_is_in_step_with_no_period_of_the_latents():
    """Latents that repeat with the distance of the sampled ones: one place in every step would see one kind only."""
    m, size = 8192, plan.sample_size(8192)
    step = m // size
    j = torch.arange(size)
    h = (j * 2654435761) & 0xFFFFFFFF
    h = h ^ (h >> 15)
    latent = j * step + ((h * step) >> 32)
    assert bool((latent // step == j).all()) and int(latent.max()) < m
    places = torch.bincount(latent % step, minlength=step)
    assert int(places.min()) > 0 and int(places.max()) < 4 * size // step
    x = torch.ones(2, D, device=DEVICE)
    W = torch.zeros(m, D, device=DEVICE)
    W[:, 0] = (torch.arange(m, device=DEVICE) % step == 0).float() * (1 + torch.arange(m, device=DEVICE) % 97)
    assert_as_reference({"x": x, "W_enc": W, "b_enc": None, "k": K})


def test_10_a_row_has_the_same_bits_whatever_rows_are_beside_it():
    inputs = case("normal").inputs(device=DEVICE)
    together = codes(inputs)
    again = codes(inputs)
    assert torch.equal(together.values, again.values) and torch.equal(together.indices, again.indices)
    alone = codes({**inputs, "x": inputs["x"][3:4]})
    assert torch.equal(together.values[3:4], alone.values) and torch.equal(together.indices[3:4], alone.indices)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the GPU script has tensors that are this large for real")
def test_11_addresses_beyond_32_bits():
    """The second row lies 2³¹ elements behind the first; only the pages that are written take memory."""
    far, m = 2**31 + 64, 300
    flat = torch.empty(far + m, dtype=torch.float16)
    pre = flat.as_strided((2, m), (far, 1))
    pre.copy_(torch.randn(2, m).half())
    got, wanted = fusae.topk(pre, 7, backend="triton"), fusae.topk(pre.clone(), 7, backend="reference")
    assert_equal(got.indices, wanted.indices)
    W = flat.as_strided((2, 8), (far, 1))
    x = torch.randn(3, 8).half()
    got = fusae.encode_topk(x, W, None, 1, "none", backend="triton")
    wanted = fusae.encode_topk(x, W.clone(), None, 1, "none", backend="reference")
    assert_equal(got.indices, wanted.indices)


def test_12_exact_on_float32_sums_not_on_rounded_ones():
    """Sums that differ in float32 and agree in bfloat16: the float32 order counts."""
    check_forward(case("wide_integers"), FUSED, torch.bfloat16)


@pytest.mark.parametrize("n", [0, 1, 65])
def test_14_tails(n):
    """Rows, latents and widths that are no multiples of a tile, and more rows than one."""
    for way in ("fused", "chunked"):
        inputs = cases.encode_topk(n, 7, 1033, 5, pattern="integers").inputs(device=DEVICE)
        assert_as_reference(inputs, way)


# --- plans ----------------------------------------------------------------------------------------------------------


def test_the_way_is_a_function_of_the_shape():
    assert plan.fused(8192, 131_072, 64, 0, "topk", 256)
    assert plan.fused(8192, 131_072, 64, 2048, "topk", 256)
    assert plan.fused(8192, 1_048_576, 32, 512, "topk", 256)
    assert not plan.fused(8192, 4096, 64, 0, "topk", 256)  # few latents
    assert not plan.fused(8192, 131_072, 64, 0, "group_max", 256)
    assert not plan.fused(8192, 131_072, 50_000, 0, "topk", 256)
    assert not plan.fused(8192, 131_072, 64, 0, "topk", 256, "chunked")
    assert plan.fused(8192, 4096, 8, 0, "topk", 256, "fused")


@pytest.mark.parametrize(("m", "k"), [(131_072, 64), (1_048_576, 32), (32_768, 32), (1_048_576, 512)])
def test_a_sample_seldom_fails(m, k):
    """The tails, counted in a way of their own: of the k - 1 best, and of the `cap` best, how many are sampled."""
    stats = pytest.importorskip("scipy.stats", reason="scipy has the hypergeometric law")
    s = plan.sample(m, k, 256)
    assert stats.hypergeom.sf(s.rank - 1, m, k - 1, s.size) < 1e-8
    assert stats.hypergeom.cdf(s.rank - 1, m, s.cap, s.size) < 5e-6
    assert s.rank * m / s.size < s.cap <= plan.LARGEST_CAP


@pytest.mark.parametrize("aux", [False, True])
def test_rows_in_pieces_are_as_rows_at_once(monkeypatch, aux):
    """Buffers of candidates do not grow with the rows."""
    inputs = cases.encode_topk(5, 8, 600, 6, pattern="integers").inputs(device=DEVICE)
    if aux:
        inputs |= {"aux_mask": torch.arange(600, device=DEVICE) % 3 == 0, "k_aux": 4}
    pieces = []

    def two_rows(n, samples, side):
        pieces.append([slice(i, min(i + 2, n)) for i in range(0, n, 2)])
        return pieces[-1]

    monkeypatch.setattr(plan, "row_pieces", two_rows)
    with triton.force_encoder("fused"):
        got = fusae.encode_topk(**inputs, backend="triton")
    wanted = fusae.encode_topk(**inputs, backend="reference")
    assert len(pieces) == 1 and len(pieces[0]) == 3
    for one, other in zip(got, wanted, strict=True) if aux else [(got, wanted)]:
        assert_equal(one.indices, other.indices, "indices")
        assert_equal(one.values, other.values, "values")


def test_candidates_of_many_rows_take_bounded_memory():
    s = plan.sample(1_048_576, 512, 256)
    parts = plan.row_pieces(100_000, [plan.sample(1_048_576, 32, 256), s], False)
    assert [p.start for p in parts[1:]] == [p.stop for p in parts[:-1]] and parts[-1].stop == 100_000
    assert all((p.stop - p.start) % 1024 == 0 for p in parts[:-1])
    assert (parts[0].stop - parts[0].start) * 8 * s.cap <= plan.CANDIDATE_BYTES
    assert plan.row_pieces(8192, [plan.sample(131_072, 64, 256)], False) == [slice(0, 8192)]


def test_pieces_cover_every_latent_in_bounded_memory():
    whole = 70_000
    for n, m, multiple in (
        (8192, 131_072, 1), (5000, 131_072, 1), (5, 1_000_003, 1), (8192, 131_072, 512), (10**6, whole, whole),
    ):  # fmt: skip
        rows, columns = plan.chunk(n, m, multiple)
        assert 1 <= rows <= max(n, 1) and 1 <= columns <= m
        assert columns % (64 if multiple == 1 else multiple) == 0 or columns == m
        assert rows * columns * 4 <= 2 * max(256 << 20, 4 * multiple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("capability", "shared"), [((8, 0), 163), ((8, 9), 99), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)]
)
def test_the_operands_of_all_stages_fit_a_block(capability, shared, dtype):
    """KB of shared memory that a block can have."""
    t = plan.default_tiles(dtype, 4096, capability)
    assert t.stages * (t.BM + t.BN) * t.BK * dtype.itemsize <= shared * 1024


def test_repairs_are_split_over_the_columns_when_few():
    assert plan.repair_splits(256, 1, 32) == 32
    assert plan.repair_splits(256, 64, 32) == 4
    assert plan.repair_splits(64, 64, 32) == 1


# --- what a request does --------------------------------------------------------------------------------------------


def test_the_interpreter_is_never_an_automatic_choice():
    if DEVICE.type == "cuda":
        pytest.skip("the kernels are not interpreted here")
    chosen = _dispatch.select("topk_fwd", (torch.zeros(2, 8), 1), {})
    assert chosen is not _dispatch._load("triton").entries["topk_fwd"].run
    assert "only when asked for by name" in fusae.explain("topk_fwd")


def test_float64_is_refused_by_name():
    with pytest.raises(fusae.BackendError, match="float64 is only on the reference"):
        fusae.topk(torch.zeros(2, 8, dtype=torch.float64, device=DEVICE), 1, backend="triton")


def test_threshold_codes_that_do_not_fit_are_counted_and_cut():
    x, W = torch.ones(3, 8, device=DEVICE), torch.ones(40, 8, device=DEVICE)
    codes = fusae.encode_threshold(x, W, None, 0.0, capacity=50, backend="triton")
    assert codes.offsets.tolist() == [0, 40, 80, 120] and len(codes.values) == 50
    assert codes.indices.tolist() == [*range(40), *range(10)]


def test_threshold_ranges_that_overflow_their_buffer_are_done_again(monkeypatch):
    from fusae.kernels import encode_threshold

    monkeypatch.setattr(encode_threshold, "buffer_size", lambda n: 16)
    inputs = cases.encode_threshold(5, 16, 1500, 0.0, pattern="integers", bandwidth=3.0).inputs(device=DEVICE)
    got, l0 = fusae.encode_threshold(**inputs, backend="triton")
    wanted, wanted_l0 = fusae.encode_threshold(**inputs, backend="reference")
    assert_equal(got.offsets, wanted.offsets, "offsets")
    assert_equal(got.indices, wanted.indices, "indices")
    assert_equal(got.values, wanted.values, "values")
    assert_equal(l0, wanted_l0, "l0")


def test_an_unknown_way_to_encode_is_refused():
    with pytest.raises(ValueError, match="encoder must be 'auto', 'fused' or 'chunked', got 'fast'"):
        with triton.force_encoder("fast"):
            pass
