# SPDX-License-Identifier: Apache-2.0
"""The Triton gradients by latent: hot latents, chunks, row-sparse results, and what padding must not touch."""

import pytest
import torch

from fusae import _dispatch, reference
from fusae.testing import Target, assert_equal, assert_grads

if _dispatch.why_not("encode_bwd", "triton", static=True) is not None:
    pytest.skip(f"triton: {_dispatch.why_not('encode_bwd', 'triton', static=True)}", allow_module_level=True)

from fusae.kernels import sums
from fusae.kernels.entries import Codes

from fusae.backends import triton as backend

TRITON = Target("triton")
DEVICE = TRITON.device


def run(op, *args):
    return backend.TABLE[op][0](*args)


def codes(n=40, m=50, k=5, seed=0, dtype=torch.float32, hot=0, exact=True):
    """Values, indices of fixed width and rows ``[n, 20]``; the `hot` lowest latents are in every row."""
    gen = torch.Generator().manual_seed(seed)
    numbers = (lambda *s: torch.randint(-3, 4, s, generator=gen)) if exact else lambda *s: torch.randn(s, generator=gen)
    values, rows, W = numbers(n, k), numbers(n, 20), numbers(m, 20)
    values = torch.where(values == 0, torch.ones_like(values), values)
    indices = torch.stack([hot + torch.randperm(m - hot, generator=gen)[:k] for _ in range(n)]).to(torch.int32)
    indices[:, :hot] = torch.arange(hot)
    return (*(t.to(dtype).to(DEVICE) for t in (values, rows, W)), indices.to(DEVICE))


def entries(values, indices, m=50, offsets=None, zeros=False):
    return sums.ByLatent(Codes.of(values, indices, offsets, m), zeros=zeros)


@pytest.mark.parametrize("chunk", [1, 3, 4, 39, 40, 41, 1000])
@pytest.mark.parametrize("row_sparse", [False, True], ids=["dense", "rows"])
def test_pitfall_10_hot_latents_in_chunks(chunk, row_sparse, monkeypatch):
    """Latents in every row: cut into chunks of any size, the sums are exactly those of the reference."""
    monkeypatch.setattr(sums, "CHUNK", chunk)
    values, rows, W, indices = codes(hot=2)
    for op, arguments in (
        ("decode_bwd", (rows, values, indices, None, W, True, True, row_sparse)),
        ("encode_bwd", (values, indices, None, rows, W, True, True, True, row_sparse)),
    ):
        for got, wanted in zip(run(op, *arguments), getattr(reference, op)(*arguments), strict=True):
            assert_equal(got, wanted, op)


@pytest.mark.parametrize("n", [31, 32, 33, 64, 65, 200])
def test_pitfall_02_everything_in_one_latent(n):
    """The whole batch on one latent, beside empty ones: as with rows that are all equal, or all zero."""
    values, rows, _, _ = codes(n=n, k=1)
    indices = torch.full((n, 1), 3, dtype=torch.int32, device=DEVICE)
    by_latent = entries(values, indices, m=7)
    out = torch.empty(7, 20, device=DEVICE)
    by_latent.sums(rows, out)
    wanted = torch.zeros(7, 20, device=DEVICE)
    wanted[3] = (values * rows).sum(0)
    assert_equal(out, wanted)
    assert_equal(by_latent.coef_sums(torch.float32), torch.zeros(7, device=DEVICE).index_fill(
        0, torch.tensor([3], device=DEVICE), values.sum().item()))  # fmt: skip


def test_chunks_cover_every_long_segment_once():
    sizes = [0, 1, 31, 32, 33, 64, 65, 0, 200]
    values = torch.ones(1, sum(sizes), device=DEVICE)
    indices = torch.repeat_interleave(torch.arange(9), torch.tensor(sizes)).to(torch.int32)[None].to(DEVICE)
    by_latent = entries(values, indices, m=9)
    chunk = sums.CHUNK
    wanted = []
    for latent, (first, size) in enumerate(zip(by_latent.start.tolist(), sizes, strict=False)):
        if size > chunk:
            wanted += [(latent, at, min(at + chunk, first + size)) for at in range(first, first + size, chunk)]
    parts = by_latent.chunk_latent, by_latent.chunk_begin, by_latent.chunk_end
    assert [c for c in zip(*(part.tolist() for part in parts), strict=True) if c[2] > c[1]] == wanted
    assert by_latent.start.tolist() == [0, *torch.tensor(sizes).cumsum(0).tolist()]
    joined = zip(by_latent.long.tolist(), by_latent.long_begin.tolist(), by_latent.long_end.tolist(), strict=True)
    joined = [j for j in joined if j[2] > j[1]]
    assert [latent for latent, _, _ in joined] == [i for i, size in enumerate(sizes) if size > chunk]
    assert [b - a for _, a, b in joined] == [-(-size // chunk) for size in sizes if size > chunk]


def test_pitfall_10_bits_of_float_sums_repeat_and_do_not_depend_on_other_latents():
    values, rows, W, indices = codes(n=120, hot=2, exact=False)
    first = run("decode_bwd", rows, values, indices, None, W, True, True, False)
    again = run("decode_bwd", rows, values, indices, None, W, True, True, False)
    for one, other in zip(first, again, strict=True):
        assert_equal(one, other, signed_zero=True)
    alone = values.clone()
    alone[:, 2:] = 0.0  # only the hot ones are left; they sum up as before
    only = run("decode_bwd", rows, alone, indices, None, W, False, True, False)
    assert_equal(only[2][:2], first[2][:2], signed_zero=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_10_sums_of_16_bit_rows_are_taken_in_float32(dtype):
    """Many small numbers beside a large one, whose sum a 16-bit accumulator would lose."""
    n = 90
    values, indices = torch.ones(n, 1), torch.zeros(n, 1, dtype=torch.int32)
    rows = torch.full((n, 20), 2.0**-5)
    rows[0] = 256.0
    values, rows = values.to(dtype).to(DEVICE), rows.to(dtype).to(DEVICE)
    by_latent = entries(values, indices.to(DEVICE), m=2)
    out = torch.empty(2, 20, dtype=dtype, device=DEVICE)
    by_latent.sums(rows, out)
    assert_equal(out[0], torch.full((20,), 256 + 89 / 32).to(dtype).to(DEVICE))
    assert not out[1].any()


@pytest.mark.parametrize("need_values", [False, True])
def test_pitfall_03_padding_touches_no_row_and_makes_no_latent_hot(need_values):
    """All padding on latent 0, as an encoder that finds too few positives may leave it: no gradient row, no work."""
    values, rows, W, indices = codes()
    values[:, 2:], indices[:, 2:] = 0.0, 0
    indices[:, 0] += indices[:, 0] == 0
    indices[:, 1] = torch.where(indices[:, 1] == 0, 1, indices[:, 1])
    grad_values, touched, grad_W = run("decode_bwd", rows, values, indices, None, W, need_values, True, True)
    assert touched.tolist() == sorted(set(indices[:, :2].flatten().tolist()))
    dense = run("decode_bwd", rows, values, indices, None, W, need_values, True, False)
    assert_equal(grad_W, dense[2][touched])
    assert not dense[2][0].any()
    if need_values:  # those of padding are given all the same: the encoder knows what to do with them
        assert_equal(grad_values, (W[indices.long()] * rows[:, None]).sum(-1))
    assert int(entries(values, indices).start[1]) == 0


def test_row_sparse_results_of_no_entry():
    values, rows, W, indices = codes()
    for got in (
        run("decode_bwd", rows, torch.zeros_like(values), indices, None, W, True, True, True)[1:],
        run("encode_bwd", torch.zeros_like(values), indices, None, rows, W, True, True, True, True)[1:3],
    ):
        assert got[0].shape == (0,) and got[0].dtype == torch.int64 and got[1].shape == (0, 20)


def test_pitfall_06_a_nan_coefficient_is_an_entry():
    """NaN is not padding: it reaches its latent's row and bias, and no other."""
    values, rows, W, indices = codes()
    values[3, 1] = torch.nan
    at = int(indices[3, 1])
    _, touched, grad_W, grad_b = run("encode_bwd", values, indices, None, rows, W, False, True, True, True)
    assert at in touched.tolist()
    bad = grad_W.isnan().all(1)
    assert touched[bad].tolist() == [at] and grad_b.isnan().nonzero().flatten().tolist() == [at]


def test_pitfall_05_a_coefficient_of_minus_zero_is_padding():
    values, rows, W, indices = codes()
    values[:, 0] = -0.0
    _, touched, _, _ = run("encode_bwd", values, indices, None, rows, W, False, True, False, True)
    assert touched.tolist() == sorted(set(indices[:, 1:].flatten().tolist()))


@pytest.mark.parametrize("groups", [[10, 50], [1, 2, 3, 30, 50]], ids=len)
def test_pitfall_14_gradients_of_nested_losses_when_all_is_odd(groups):
    """Ragged rows, an odd width, prefixes as ends of groups: latents on both sides of each."""
    gen = torch.Generator().manual_seed(3)
    values, rows, W, indices = codes(n=9, k=6)
    W = torch.randint(-3, 4, (50, 13), generator=gen).float().to(DEVICE)
    mixed = torch.randint(-3, 4, (len(groups), 9, 13), generator=gen).float().to(DEVICE)
    offsets = torch.tensor([0, 0, 6, 7, 7, 20, 33, 33, 40, 50], device=DEVICE)
    factor = torch.tensor(-0.5, device=DEVICE)
    for row_sparse in (False, True):
        given = (factor, values.flatten(), indices.flatten(), offsets, W, mixed, groups, False, True, True, row_sparse)
        for got, wanted in zip(run("decode_loss_bwd", *given), reference.decode_loss_bwd(*given), strict=True):
            assert_equal(got, wanted)
    frozen = (*given[:-2], False, False)
    assert_equal(run("decode_loss_bwd", *frozen)[0], reference.decode_loss_bwd(*frozen)[0])


def test_float_sums_are_as_exact_as_the_reference():
    values, rows, W, indices = codes(n=150, hot=3, exact=False)
    given = values, indices, None, rows, W, True, True, True, False
    truth = reference.encode_bwd(*(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in given))
    results = run("encode_bwd", *given), reference.encode_bwd(*given), truth
    for name, *parts in zip(("x", "rows", "W_enc", "b_enc"), *results, strict=True):
        if name != "rows":
            assert_grads(*parts, name)
