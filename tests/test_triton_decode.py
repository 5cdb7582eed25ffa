# SPDX-License-Identifier: Apache-2.0
"""The Triton decoders and losses: what the conformance suite does not show. Interpreted where there is no GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusae
from fusae import _dispatch, reference
from fusae.testing import Target, assert_equal, assert_within_budget

if _dispatch.why_not("decode_fwd", "triton", static=True) is not None:
    pytest.skip(f"triton: {_dispatch.why_not('decode_fwd', 'triton', static=True)}", allow_module_level=True)

from fusae.kernels import decode, entries

from fusae.backends import triton as backend

TRITON = Target("triton")
DEVICE = TRITON.device
needs_interpreter = pytest.mark.skipif(not TRITON.interpreted, reason="the order of programs is the GPU's own")


def run(op, *args, **kwargs):
    """The raw op of the backend."""
    return backend.TABLE[op][0](*args, **kwargs)


def inputs(n=5, d=40, m=30, k=6, dtype=torch.float32, seed=0, ragged=False):
    gen = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=gen)
    indices = torch.stack([torch.randperm(m, generator=gen)[:k] for _ in range(n)]) if n else torch.empty(0, k)
    W, b, goal = (torch.randn(*s, generator=gen) for s in ((m, d), (d,), (n, d)))
    values, W, b, goal = (t.to(dtype).to(DEVICE) for t in (values, W, b, goal))
    indices, offsets = indices.to(torch.int32).to(DEVICE), None
    if ragged:
        offsets = torch.arange(n + 1, device=DEVICE) * k
        values, indices = values.flatten(), indices.flatten()
    return values, indices, offsets, W, b, goal


class NoSync(TorchDispatchMode):
    """Nothing inside reads a number of the device, or makes a result whose size depends on one."""

    SYNCS = ("_local_scalar_dense", "nonzero", "unique", "is_nonzero", "masked_select", "repeat_interleave")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not any(sync in name for sync in self.SYNCS), f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_checks(monkeypatch):
    """As on a GPU, where the contents of codes are not looked at."""
    from fusae.backends.triton import checks

    monkeypatch.setattr(checks, "_check", lambda codes: None)
    monkeypatch.setattr(checks, "fits", lambda offsets, storage: None)


@pytest.fixture
def reversed_programs(monkeypatch):
    """A switch: the interpreter runs the programs of every launch from the last to the first."""
    from triton.runtime.interpreter import InterpreterBuilder

    ahead = InterpreterBuilder.set_grid_idx

    def backwards(self, x, y, z):
        ahead(self, *(size - 1 - at for size, at in zip(self.grid_dim, (x, y, z), strict=True)))

    return lambda: monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", backwards)


PASSES = {
    "decode": lambda v, i, o, W, b, goal: [run("decode_fwd", v, i, o, W, b)],
    "loss": lambda v, i, o, W, b, goal: run(
        "decode_loss_fwd", v, i, o, W, b, goal, [7, 20, 30], [1.0, 0.5, 2.0], False, True, True
    ),
    "many prefixes": lambda v, i, o, W, b, goal: run(
        "decode_loss_fwd", v, i, o, W, b, goal, [1, 9, 10, 29, 30], [0.25] * 5, False, True, True
    ),
    "value gradients": lambda v, i, o, W, b, goal: run("decode_bwd", goal, v, i, o, W, True, False, False)[:1],
    "gradients": lambda v, i, o, W, b, goal: run("decode_bwd", goal, v, i, o, W, True, True, False)[::2],
    "loss gradients": lambda v, i, o, W, b, goal: run(
        "decode_loss_bwd", goal.new_tensor(-2.0), v, i, o, W, torch.stack([goal, goal / 2]), [7, 30], False, True, True,
        False,
    )[::2],
    "encoder gradients": lambda v, i, o, W, b, goal: run("encode_bwd", v, i, o, goal, W, True, True, True, False)[::1],
}  # fmt: skip
each_pass = pytest.mark.parametrize("name", PASSES)


@each_pass
@needs_interpreter
def test_pitfall_10_determinism_whatever_program_runs_first(name, reversed_programs):
    given = inputs(n=5, d=150)
    first = PASSES[name](*given)
    reversed_programs()
    for got, wanted in zip(PASSES[name](*given), first, strict=True):
        assert_equal(got, wanted, name, signed_zero=True)


@each_pass
@needs_interpreter
@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
def test_pitfall_10_determinism_whatever_the_tile(name, ragged, monkeypatch):
    """The tiles of a GPU (of 512 columns, few rows) give the bits of the interpreter's wherever only columns are split:
    sums run over entries in one order. Dots over columns are split differently, and agree within rounding."""
    given = inputs(n=3, d=70, ragged=ragged)
    first = PASSES[name](*given)
    monkeypatch.setattr(entries, "INTERPRETED", False)
    for got, wanted in zip(PASSES[name](*given), first, strict=True):
        if got.shape == given[0].shape or name in ("loss", "many prefixes"):
            torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)
        else:
            assert_equal(got, wanted, name)


@each_pass
def test_pitfall_08_no_host_sync(name, no_checks):
    """Whatever a CUDA graph is to capture must not wait for the device."""
    given = inputs(ragged=True)
    with NoSync():
        PASSES[name](*given)


def test_the_guard_against_syncs_works():
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        int(torch.ones(1))


@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
def test_pitfall_08_a_latent_that_does_not_exist_reads_no_memory_and_shows(ragged, no_checks):
    """Where nobody looks at indices, they must not reach foreign memory; the row says NaN, the others are right."""
    values, indices, offsets, W, b, goal = inputs(ragged=ragged)
    wanted = run("decode_fwd", values, indices, offsets, W, b)
    bad = indices.clone()
    bad.view(-1)[2], bad.view(-1)[6 + 3], bad.view(-1)[12] = -1, 30, 2**31 - 1
    y = run("decode_fwd", values, bad, offsets, W, b)
    assert y[:3].isnan().all()
    assert_equal(y[3:], wanted[3:])
    nested = [7, 30], [1.0, 1.0], False, True, True
    _, residual, _, dots = run("decode_loss_fwd", values, bad, offsets, W, b, goal, *nested)
    assert residual[:3].isnan().all() and not residual[3:].isnan().any()
    assert not dots.view(5, 6)[3:].isnan().any()
    grad_values, _, grad_W = run("decode_bwd", goal, values, bad, offsets, W, True, True, False)
    used = values.clone()
    used.view(-1)[[2, 9, 12]] = 0.0
    wanted = reference.decode_bwd(goal, used, indices, offsets, W, True, True, False)
    assert_within_budget(grad_W, wanted[2], wanted[2])
    assert not grad_values.isnan().any()


def test_pitfall_08_entries_that_did_not_fit_are_left_out(no_checks):
    """offsets count more than the storage has: no kernel reads behind it."""
    values, indices, offsets, W, b, goal = inputs(ragged=True)
    cut = 20  # of 30: in row 3
    short = values[:cut].clone(), indices[:cut].clone(), offsets
    whole = values.clone(), indices, offsets
    whole[0][cut:] = 0.0
    assert_equal(run("decode_fwd", *short, W, b), run("decode_fwd", *whole, W, b))
    got, wanted = (run("decode_bwd", goal, *codes, W, True, True, False) for codes in (short, whole))
    assert_equal(got[0], wanted[0][:cut])
    assert_equal(got[2], wanted[2])


def test_pitfall_15_storage_not_in_use_is_never_read():
    values, indices, offsets, W, b, goal = inputs(ragged=True)
    tails = values.new_full((7,), torch.nan), indices.new_full((7,), 2**31 - 1)
    longer = torch.cat([values, tails[0]]), torch.cat([indices, tails[1]])
    assert_equal(run("decode_fwd", *longer, offsets, W, b), run("decode_fwd", values, indices, offsets, W, b))
    got, wanted = (run("decode_bwd", goal, *c, offsets, W, True, True, False) for c in (longer, (values, indices)))
    assert_equal(got[2], wanted[2])
    assert_equal(got[0][:-7], wanted[0])
    assert not got[0][-7:].any()


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_pitfall_03_and_05_padding_of_either_sign_reads_nothing(zero):
    """A value of ±0 beside an infinite row adds nothing, and is not touched by a row-sparse gradient."""
    values, indices, _, W, b, goal = inputs()
    values[:, 0] = zero
    W[indices[:, 0].long()] = torch.inf
    keep = (indices[:, 1:, None] == indices[None, None, :, 0]).any(-1)
    values[:, 1:] = values[:, 1:].masked_fill(keep, zero)
    y = run("decode_fwd", values, indices, None, W, b)
    assert torch.isfinite(y).all()
    _, rows, grad_W = run("decode_bwd", goal, values, indices, None, W, True, True, True)
    assert not set(rows.tolist()) & set(indices[:, 0].tolist())
    assert len(rows) == len(torch.unique(indices[values != 0])) == len(grad_W)


def test_pitfall_06_nan_and_infinities_stay_in_their_row():
    values, indices, _, W, b, _ = inputs(m=40)
    values[1, 2], values[2, 0], values[3, 1] = torch.nan, torch.inf, -torch.inf
    y = run("decode_fwd", values, indices, None, W, b)
    wanted = reference.decode_fwd(values, indices, None, W, b)
    assert_within_budget(y, wanted, wanted)
    assert torch.isfinite(y[[0, 4]]).all()


def strided(rows: int, d: int, apart: int, like: torch.Tensor) -> torch.Tensor:
    """``[rows, d]`` whose rows lie `apart` elements from each other. Only what is written takes memory."""
    return torch.empty((rows - 1) * apart + d, dtype=like.dtype, device=like.device).as_strided((rows, d), (apart, 1))


@needs_interpreter
@pytest.mark.parametrize("name", ["decode", "loss", "gradients", "value gradients", "encoder gradients"])
def test_pitfall_11_addresses_beyond_2_to_the_31(name):
    """m·d elements pass 2³¹, with a stride that fits 32 bits: in dictionaries and in what gradients gather."""
    values, indices, offsets, W, b, goal = inputs(n=3, d=16, m=3, k=2, dtype=torch.float16)
    far_W, far_goal = (strided(3, 16, 2**30 + 16, t) for t in (W, goal))
    far_W.copy_(W), far_goal.copy_(goal)
    assert far_W.storage_offset() + far_W.stride(0) * 2 > 2**31
    if name == "loss":
        got, wanted = (
            run("decode_loss_fwd", values, indices, offsets, w, b, g, [1, 3], [1.0, 1.0], False, True, True)
            for w, g in ((far_W, far_goal), (W, goal))
        )
    else:
        got, wanted = (PASSES[name](values, indices, offsets, w, b, g) for w, g in ((far_W, far_goal), (W, goal)))
    for one, other in zip(got, wanted, strict=True):
        assert_equal(one, other, name)


@pytest.mark.parametrize("d", [1, 7, 63, 127, 129, 257])
@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
def test_pitfall_14_ragged_tails_of_columns(d, ragged, dtype=torch.bfloat16):
    values, indices, offsets, W, b, goal = inputs(n=3, d=d, dtype=dtype, ragged=ragged)
    values, W, b, goal = (t.mul_(2).round_() for t in (values, W, b, goal))  # exact sums
    for got, wanted in zip(
        (run("decode_fwd", values, indices, offsets, W, b),
         *run("decode_bwd", goal, values, indices, offsets, W, True, True, False)[::2]),
        (reference.decode_fwd(values, indices, offsets, W, b),
         *reference.decode_bwd(goal, values, indices, offsets, W, True, True, False)[::2]), strict=True,
    ):  # fmt: skip
        assert_equal(got, wanted)


def test_pitfall_14_every_latent_in_every_row_and_single_ones():
    for n, m, k in ((4, 9, 9), (1, 1, 1), (3, 5, 1), (0, 5, 2)):
        values, indices, offsets, W, b, goal = inputs(n=n, m=m, k=k)
        wanted = reference.decode_bwd(goal, values, indices, offsets, W, True, True, False)
        got = run("decode_bwd", goal, values, indices, offsets, W, True, True, False)
        for one, other in zip(got[::2], wanted[::2], strict=True):
            assert_within_budget(one, other, other)
        assert run("decode_fwd", values, indices, offsets, W, b).shape == (n, 40)


@pytest.mark.parametrize("groups", [1, 2, 3, 8, 9, 17])
def test_any_number_of_prefixes(groups):
    """One alone needs no sort; of many, some have no entry in a row."""
    values, indices, _, W, b, goal = inputs(n=4, m=60, k=17)
    prefixes = sorted({*range(1, groups), 17})[-groups:]
    weights = [0.5 + g for g in range(groups)]
    given = (values, indices, None, W, b, goal, prefixes, weights, True, True, True)
    wanted = reference.decode_loss_fwd(*given)
    double = (t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in given)
    results = run("decode_loss_fwd", *given), wanted, reference.decode_loss_fwd(*double)
    for name, *parts in zip(("sse", "residual", "mixed", "dots"), *results, strict=True):
        assert_within_budget(*parts, name)


def test_pitfall_10_no_float_is_added_atomically():
    from pathlib import Path

    for module in ("decode", "decode_loss", "sums", "adam_rows", "dense", "entries"):
        source = (Path(decode.__file__).parent / f"{module}.py").read_text()
        assert "tl.atomic" not in source


def test_a_reconstruction_may_have_another_width():
    """Transcoders: d_in of the encoder is not d_out of the decoder."""
    gen = torch.Generator().manual_seed(1)
    x, W_enc, W_dec = (torch.randn(*s, generator=gen).to(DEVICE) for s in ((4, 10), (30, 10), (30, 23)))
    W_dec.requires_grad_()
    with TRITON.active():
        values, indices = (x @ W_enc.T).topk(3)
        codes = fusae.SparseCodes(values, indices.int(), 30)
        y = fusae.decode(codes, W_dec)
        grad = torch.autograd.grad(y.square().sum(), W_dec)[0]
    assert y.shape == (4, 23) and grad.shape == (30, 23)
    wanted = torch.autograd.grad((codes.to_dense().detach() @ W_dec).square().sum(), W_dec)[0]
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["decode_bwd", "decode_loss_fwd"])
def test_pitfall_06_infinities_beside_padding_and_in_the_first_of_nested_losses(op):
    """An infinite gradient beside a value of 0 adds nothing to its latent; a residual that is infinite from the first
    prefix on stays so in all weighted sums, and does not become NaN by a subtraction."""
    values, indices, _, W, b, goal = inputs()
    if op == "decode_bwd":
        goal[1], values[1] = torch.inf, 0.0
        given = (goal, values, indices, None, W, True, True, False)
    else:
        values.abs_()
        W[indices[1, 0].long(), 4] = torch.inf
        given = (values, indices, None, W, b, goal, [1, 3, 6], [1.0, 0.5, 2.0], True, True, False)
    for got, wanted in zip(run(op, *given), getattr(reference, op)(*given), strict=True):
        assert_within_budget(got, wanted, wanted)
