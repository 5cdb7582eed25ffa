# SPDX-License-Identifier: Apache-2.0
"""The Triton optimiser of rows: long rows, the order of projection, decay and renormalisation, tiles of a GPU."""

import itertools

import pytest
import torch

import fusae
from fusae import _dispatch
from fusae.testing import Target, assert_equal, assert_grads

if _dispatch.why_not("adam_rows_", "triton", static=True) is not None:
    pytest.skip(f"triton: {_dispatch.why_not('adam_rows_', 'triton', static=True)}", allow_module_level=True)

from fusae.kernels import adam_rows as kernels

TRITON = Target("triton")
NAMES = ("param", "exp_avg", "exp_avg_sq")


def state(m=6, d=40, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    param, mean, square, grad = (torch.randn(m, d, generator=gen) for _ in range(4))
    tensors = {"param": param.to(dtype), "exp_avg": 1e-2 * mean, "exp_avg_sq": 1e-3 * square.square()}
    return {name: t.to(TRITON.device) for name, t in {**tensors, "grad": (1e-1 * grad).to(dtype)}.items()}


def stepped(given, backend, double=False, **options):
    """Parameter and moments after a step; in float64, the truth."""
    tensors = {name: (t.double() if double else t.clone()) for name, t in given.items()}
    fusae.adam_rows_(**tensors, lr=0.05, step=3, **options, backend=backend)
    return [tensors[name] for name in NAMES]


def check(given, **options):
    got = stepped(given, "triton", **options)
    wanted, truth = stepped(given, "reference", **options), stepped(given, "reference", double=True, **options)
    for name, *parts in zip(NAMES, got, wanted, truth, strict=True):
        assert_grads(*parts, name)
    return got


@pytest.mark.parametrize("interpreted", [True, False], ids=["blocks", "whole rows"])
@pytest.mark.parametrize("project, renormalise", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("d", [1, 15, 256, 257, 600])
def test_pitfall_14_rows_of_any_length(d, project, renormalise, interpreted, monkeypatch):
    """In the tiles of the interpreter, rows past 256 elements are taken in blocks; in those of a GPU, whole."""
    monkeypatch.setattr(kernels, "INTERPRETED", interpreted)
    check(state(d=d), project=project, renormalise=renormalise, weight_decay=0.1, decoupled=True)


def test_rows_that_are_too_long_for_registers(monkeypatch):
    """Above `WHOLE` elements a row is read again for its projection and its length."""
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert not kernels.adam_tile(8200, True)["ONE"] and kernels.adam_tile(8192, True)["ONE"]
    check(state(m=2, d=8200), project=True, renormalise=True)


def test_pitfall_13_projection_comes_first_then_decay_then_the_step_then_the_length():
    """On a row along its gradient nothing is left of the gradient; decay still counts; the length is one in the end."""
    given = state(m=3, d=8)
    given["grad"] = 3 * given["param"].clone()
    for name in ("exp_avg", "exp_avg_sq"):
        given[name].zero_()
    param, mean, square = stepped(given, "triton", project=True, weight_decay=0.1, decoupled=True)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)
    length = stepped(given, "triton", project=True, renormalise=True, weight_decay=0.1)[0].norm(dim=1)
    torch.testing.assert_close(length, torch.ones_like(length), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_13_the_length_is_of_what_was_not_rounded_yet(dtype):
    """16-bit rows are rounded once, at the end: the update and its norm are taken in float32."""
    given = state(dtype=dtype, d=300)
    got = check(given, project=True, renormalise=True)[0]
    exact = stepped({name: t.float() for name, t in given.items()}, "triton", project=True, renormalise=True)[0]
    assert_equal(got, exact.to(dtype))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("d", [20, 300])
def test_pitfall_03_rows_without_an_entry(masked, d):
    """Masked, they keep every bit; else they take the step of a gradient of zero."""
    given = state(m=9, d=d)
    rows = torch.tensor([1, 4, 8], device=TRITON.device)
    dense = torch.zeros_like(given["grad"]).index_copy(0, rows, given["grad"][rows])
    sparse = torch.sparse_coo_tensor(rows[None], given["grad"][rows], dense.shape, is_coalesced=True)
    got = stepped({**given, "grad": sparse}, "triton", masked=masked)
    plain = stepped({**given, "grad": dense}, "triton")
    for name, one, other in zip(NAMES, got, plain, strict=True):
        if not masked:
            assert_equal(one, other, name, signed_zero=True)
        left = torch.ones(9, dtype=torch.bool).index_fill(0, rows.cpu(), False).to(one.device)
        assert torch.equal(one[left], given[name][left]) == masked
        assert not torch.equal(one[rows], given[name][rows])


def test_pitfall_06_nan_and_infinity_stay_in_their_row():
    given = state()
    given["grad"][1, 3], given["grad"][4, 0] = torch.nan, torch.inf
    param = stepped(given, "triton", project=True, renormalise=True)[0]
    assert param[[1, 4]].isnan().any(1).all() and torch.isfinite(param[[0, 2, 3, 5]]).all()


def test_a_row_of_length_zero_stays():
    given = state()
    for t in given.values():
        t[2] = 0.0
    assert not stepped(given, "triton", project=True, renormalise=True)[0][2].any()


def test_pitfall_10_the_same_bits_again():
    given = state(d=300, m=70)
    for one, other in zip(*(stepped(given, "triton", project=True, renormalise=True) for _ in range(2)), strict=True):
        assert_equal(one, other, signed_zero=True)


def test_many_steps_stay_beside_torch():
    """Fifty steps beside ``torch.optim.Adam``, with its own bookkeeping of the step."""
    given = state()
    param = torch.nn.Parameter(given["param"].clone())
    theirs = torch.optim.Adam([param], lr=0.01)
    mine = [given["param"].clone(), torch.zeros_like(param.data), torch.zeros_like(param.data)]
    for step in range(1, 51):
        gen = torch.Generator().manual_seed(step)
        grad = torch.randn(param.shape, generator=gen).to(param.device)
        param.grad = grad
        theirs.step()
        fusae.adam_rows_(*mine, grad, lr=0.01, step=step, backend="triton")
    torch.testing.assert_close(mine[0], param.data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"last_step": torch.zeros(6, dtype=torch.int32), "betas": (0.0, 0.999)}, "lazy steps"),
        ({"master": torch.zeros(6, 5), "param": torch.zeros(6, 5, dtype=torch.bfloat16)}, "with a master"),
        ({"seed": 1, "param": torch.zeros(6, 5, dtype=torch.bfloat16)}, "stochastic rounding"),
        ({"exp_avg": torch.zeros(6, 5, dtype=torch.bfloat16), "seed": 1}, "moments must be float32"),
    ],
)
def test_modes_without_a_kernel_are_declined(change, reason):
    given = {name: torch.zeros(6, 5) for name in ("param", "exp_avg", "exp_avg_sq")} | change
    given = {name: v.to(TRITON.device) if torch.is_tensor(v) else v for name, v in given.items()}
    grad = torch.zeros_like(given["param"])
    if "last_step" in change:
        grad = torch.sparse_coo_tensor([[1]], grad[:1], (6, 5), is_coalesced=True)
    with pytest.raises(fusae.BackendError, match=reason):
        fusae.adam_rows_(grad=grad, lr=1e-3, step=1, backend="triton", **given)
