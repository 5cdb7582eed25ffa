# SPDX-License-Identifier: Apache-2.0
"""Triton: dense activations to codes and back, and the gradients of thresholds."""

import itertools

import pytest
import torch

from fusae import _dispatch, reference
from fusae.testing import Target, assert_equal, assert_grads

if _dispatch.why_not("codes_from_dense_fwd", "triton", static=True) is not None:
    pytest.skip(f"triton: {_dispatch.why_not('codes_from_dense_fwd', 'triton', static=True)}", allow_module_level=True)

from fusae.kernels import dense

from fusae.backends import triton as backend

TRITON = Target("triton")
DEVICE = TRITON.device


def run(op, *args):
    return backend.TABLE[op][0](*args)


def activations(n=7, m=100, share=0.3, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    f = torch.randn(n, m, generator=gen).masked_fill(torch.rand(n, m, generator=gen) >= share, 0.0)
    return f.to(dtype).to(DEVICE)


def check(f, capacity=None):
    for name, got, wanted in zip(("values", "indices", "offsets"), run("codes_from_dense_fwd", f, capacity),
                                 reference.codes_from_dense_fwd(f, capacity), strict=True):  # fmt: skip
        assert_equal(got, wanted, name)


@pytest.mark.parametrize("m", [1, 31, 32, 33, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_pitfall_14_blocks_of_columns_end_anywhere(m, share):
    check(activations(n=3, m=m, share=share))


@pytest.mark.parametrize("interpreted", [True, False], ids=["tall", "flat"])
@pytest.mark.parametrize("capacity", [None, 0, 1, 150, 10_000])
def test_pitfall_08_a_storage_of_any_size(capacity, interpreted, monkeypatch):
    """What does not fit is left out, never written behind the storage; offsets count it."""
    monkeypatch.setattr(dense, "INTERPRETED", interpreted)
    check(activations(), capacity)


def test_pitfalls_04_to_06_negative_minus_zero_nan_and_infinity():
    f = activations()
    f[0, :6] = torch.tensor([-1.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45])
    check(f)
    values, indices, _ = run("codes_from_dense_fwd", f, None)
    assert 1 not in indices[:5].tolist() and indices[:5].tolist() == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("layout", ["columns", "rows apart", "expanded"])
def test_strides(layout):
    f = activations(n=6, m=40)
    check({"columns": f.T.contiguous().T, "rows apart": f[::2], "expanded": f[:1].expand(6, 40)}[layout])


def test_scatter_of_wide_and_of_ragged_codes():
    gen = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(50, generator=gen)[:5] for _ in range(8)]).to(torch.int32).to(DEVICE)
    grad = torch.randn(8, 5, generator=gen).to(DEVICE)
    assert_equal(run("topk_bwd", grad, indices, 50), reference.topk_bwd(grad, indices, 50))
    offsets = torch.tensor([0, 0, 3, 20, 20, 38, 40, 40, 40, 40], device=DEVICE)
    ragged = indices.view(-1), offsets, 50
    distinct = torch.cat([torch.arange(hi - lo) for lo, hi in itertools.pairwise(offsets.tolist())]).to(indices)
    got = run("codes_from_dense_bwd", grad.view(-1), distinct, *ragged[1:])
    assert_equal(got, reference.codes_from_dense_bwd(grad.view(-1), distinct, *ragged[1:]))


@pytest.mark.parametrize("op", ["codes_from_dense_bwd", "encode_threshold_bwd"])
def test_pitfall_08_gradients_of_entries_that_did_not_fit(op, monkeypatch):
    """The host is told; where it cannot be (a CUDA graph is captured), the gradients are NaN."""
    from fusae.backends.triton import dense as family

    indices, offsets = torch.arange(4, dtype=torch.int32, device=DEVICE), torch.tensor([0, 3, 6], device=DEVICE)
    grad, state = torch.ones(4, device=DEVICE), torch.full((4,), 3, dtype=torch.uint8, device=DEVICE)
    arguments = {
        "codes_from_dense_bwd": (grad, indices, offsets, 9),
        "encode_threshold_bwd": (indices, offsets, state, grad, None, torch.ones(9, device=DEVICE), 0.5, True, True),
    }[op]
    with pytest.raises(IndexError, match="6 entries and a storage of 4.*capacity >= 6"):
        run(op, *arguments)
    monkeypatch.setattr(family, "fits", lambda offsets, storage: None)
    got = run(op, *arguments)
    got = got if isinstance(got, tuple) else (got,)
    assert all(part.isnan().any() for part in got)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("given", ["values", "l0", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_thresholds(given, straight_through, dtype):
    gen = torch.Generator().manual_seed(1)
    n, m, storage, used = 40, 6, 130, 120
    widths = torch.full((n,), 3)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), widths.cumsum(0)])
    indices = torch.stack([torch.randperm(m, generator=gen)[:3] for _ in range(n)]).flatten()
    indices = torch.cat([indices, torch.full((storage - used,), 2**31 - 1)]).to(torch.int32)
    state = torch.randint(0, 4, (storage,), generator=gen).to(torch.uint8)
    grad_values = torch.randn(storage, generator=gen).to(dtype)
    grad_values[used:] = torch.nan
    grad_l0, threshold = torch.randn(n, generator=gen), torch.rand(m, generator=gen)
    tensors = (indices, offsets, state, grad_values if given != "l0" else None, grad_l0 if given != "values" else None)
    tensors = [None if t is None else t.to(DEVICE) for t in (*tensors, threshold)]
    rest = 0.25, straight_through, True
    got, wanted = (f(*tensors, *rest) for f in (
        lambda *a: run("encode_threshold_bwd", *a), reference.encode_threshold_bwd))  # fmt: skip
    double = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    truth = reference.encode_threshold_bwd(*double, *rest)
    for name, *parts in zip(("pre", "threshold"), got, wanted, truth, strict=True):
        assert_grads(*parts, name)
    assert not got[0][used:].any()
    assert run("encode_threshold_bwd", *tensors, 0.25, straight_through, False)[1].shape == (0,)


def test_pitfall_06_an_infinite_threshold_outside_of_its_window():
    """threshold · gradient is Inf or NaN there, and must not show."""
    indices, offsets = torch.arange(2, dtype=torch.int32, device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    state = torch.tensor([1, 3], dtype=torch.uint8, device=DEVICE)
    threshold, grad = torch.tensor([torch.inf, 1.0], device=DEVICE), torch.tensor([0.0, 2.0], device=DEVICE)
    pre, limits = run("encode_threshold_bwd", indices, offsets, state, grad, None, threshold, 0.5, False, True)
    assert pre.tolist() == [0.0, 2.0] and limits.tolist() == [0.0, -4.0]
