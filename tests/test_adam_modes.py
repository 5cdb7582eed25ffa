# SPDX-License-Identifier: Apache-2.0
"""Modes of the row optimiser: lazy steps, moments in few bits, 16-bit weights. Against the reference and dense Adam."""

import functools
import itertools

import pytest
import torch

import fusae
from fusae.ops.adam_rows import moment_width
from fusae.optim import Adam
from fusae.reference import moments
from fusae.testing import targets
from fusae.train import TrainConfig, Trainer

TARGETS = targets("adam_rows_")
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
pytestmark = pytest.mark.usefixtures("on_the_targets_device")
F32, BF16, FP16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
SETTINGS = [
    (dtype, kind, lazy, unit, master)
    for dtype, kind, lazy, unit, master in itertools.product(
        (F32, BF16, FP16), (F32, BF16, U8), (False, True), (False, True), (False, True)
    )
    if not (master and dtype == F32) and (master or dtype != FP16)
]


def run(target, call):
    """`call()` on the target. Backends other than the CPU's may decline a mode, saying so."""
    with target.active():
        try:
            return call()
        except fusae.BackendError as error:
            if target.backend in ("cpu", "reference"):
                raise
            pytest.skip(f"{target} has no such mode: {error}")


def state(m, d, dtype, kind, lazy, master):
    param = torch.nn.functional.normalize(torch.randn(m, d), dim=1).to(dtype)
    shape = (m, moment_width(d, kind))
    return {
        "param": param,
        "exp_avg": torch.zeros(0 if lazy else shape, dtype=kind),
        "exp_avg_sq": torch.zeros(shape, dtype=kind),
        "last_step": torch.zeros(m, dtype=torch.int32) if lazy else None,
        "master": param.float() if master else None,
    }


def gradient(m, d, dtype, gen, share=0.4):
    rows = (torch.rand(m, generator=gen) < share).nonzero().flatten()
    values = torch.randn(len(rows), d, generator=gen) * torch.exp(2 * torch.randn(len(rows), d, generator=gen))
    return torch.sparse_coo_tensor(rows[None], values.to(dtype), (m, d), is_coalesced=True, check_invariants=False)


def wide(name, value, d):
    if value is None or name == "last_step" or value.numel() == 0:
        return value
    return moments.read(value, d, signed=name == "exp_avg") if value.dtype == U8 else value.float()


@each_target
@pytest.mark.parametrize("d", [5, 300, 513])
def test_every_mode_follows_the_reference(target, d):
    """Where a float32 sum rounds the other way, stochastic rounding may take the other neighbour: seldom, no more."""
    m = 40
    for dtype, kind, lazy, unit, master in SETTINGS:
        found = {}
        options = {"lr": 0.01, "betas": (0.0 if lazy else 0.9, 0.99), "project": unit, "renormalise": unit, "seed": 7}

        def steps(dtype=dtype, kind=kind, lazy=lazy, master=master, options=options):
            torch.manual_seed(1)
            held, gen = state(m, d, dtype, kind, lazy, master), torch.Generator().manual_seed(3)
            for step in range(1, 4):
                fusae.adam_rows_(**held, grad=gradient(m, d, dtype, gen), step=step, **options)
            return held

        found = run(target, steps)
        with fusae.backend("reference"):
            wanted = steps()
        for name, value in wanted.items():
            a, b = wide(name, found[name], d), wide(name, value, d)
            if b is None:
                continue
            assert torch.isfinite(b.float()).all()
            differ = ((a - b).abs() > 1e-5 * b.abs() + 1e-9).float().mean() if b.numel() else 0.0
            assert differ < 0.05, f"{name} of {dtype, kind, lazy, unit, master}"
            if b.numel():
                assert ((a - b).abs() <= 0.126 * b.abs() + 1e-4 * b.abs().max()).all()


@each_target
@pytest.mark.parametrize("kind", [BF16, U8])
def test_moments_in_few_bits_are_those_of_the_reference_bit_by_bit(target, kind):
    """Powers of two: all sums are exact, so only the rounding is left, and that is specified."""
    m, d = 30, 700
    gen = torch.Generator().manual_seed(0)
    grads = [torch.exp2(torch.randint(-20, 3, (m, d), generator=gen).float()) for _ in range(3)]

    def steps():
        torch.manual_seed(0)
        held = state(m, d, F32, kind, False, False)
        for step, grad in enumerate(grads, 1):
            fusae.adam_rows_(**held, grad=grad, step=step, lr=0.0, betas=(0.5, 0.5), seed=11)
        return held

    found = run(target, steps)
    with fusae.backend("reference"):
        wanted = steps()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(found[name], wanted[name])
        assert found[name].unique().numel() > 50


@pytest.mark.parametrize("kind", [BF16, U8])
@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_rounding_keeps_the_mean(kind, signed):
    torch.manual_seed(0)
    a = torch.randn(20, 300) * torch.exp(torch.randn(20, 300))
    a = a if signed else a * a
    total, times = torch.zeros_like(a, dtype=torch.float64), 600
    for step in range(times):
        bits = moments.random_bits(3, step, torch.arange(20), 300)
        stored = moments.write(a, kind, bits[0 if signed else 1], signed)
        total += moments.read(stored, 300, signed).double()
    error = total / times - a
    spacing = torch.where(a.abs() > 0, a.abs() * (2.0**-7 if kind == BF16 else 2.0**-3), 1.0)
    normal = a.abs() > 1e-4 * a.abs().amax()
    # A uniform error of one spacing has a standard deviation of at most half of it.
    assert (error / spacing)[normal].abs().max() < 5 * 0.5 / times**0.5
    assert abs(float((error / spacing)[normal].mean())) < 5 * 0.5 / (times * normal.sum()) ** 0.5
    nearest = a.to(BF16).float() - a if kind == BF16 else None
    assert nearest is None or (nearest / spacing).abs().max() > 0.2, "rounding to nearest would fail this test"


def test_random_bits_are_uniform_and_unlike_one_another():
    bits = moments.random_bits(0, 1, torch.arange(64), 256)
    others = (moments.random_bits(seed, step, torch.arange(64), 256) for seed, step in ((0, 2), (1, 1)))
    flat = torch.stack([b.flatten().double() for lot in (bits, *others) for b in lot])
    assert (flat.mean(1) / 65535 - 0.5).abs().max() < 0.02
    assert (torch.corrcoef(flat) - torch.eye(len(flat))).abs().max() < 0.04
    for bit in range(16):
        assert abs(float(((bits[2] >> bit) & 1).double().mean()) - 0.5) < 0.02


@each_target
def test_a_part_of_the_rows_gets_the_bits_of_the_whole(target):
    m, d = 24, 65
    grad = torch.randn(m, d).bfloat16()
    options = {"step": 1, "lr": 0.1, "seed": 5}

    def whole():
        torch.manual_seed(0)
        held = state(m, d, BF16, U8, False, False)
        parts = {name: None if t is None else t[10:].clone() for name, t in held.items()}
        fusae.adam_rows_(**held, grad=grad, **options)
        fusae.adam_rows_(**parts, grad=grad[10:], first_row=10, **options)
        return held, parts

    held, parts = run(target, whole)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(held[name][10:], parts[name])


@each_target
def test_a_second_moment_above_0_never_becomes_0_and_a_nan_stays_visible(target):
    m, d = 4, 512

    def step():
        torch.manual_seed(0)
        held = state(m, d, F32, U8, False, False)
        grad = torch.full((m, d), 1e-12)
        grad[:, 0] = 1.0
        grad[3, 300] = float("nan")
        fusae.adam_rows_(**held, grad=grad, step=1, lr=1e-3, seed=0)
        return held

    held = run(target, step)
    square = moments.read(held["exp_avg_sq"], d, signed=False)
    assert (square[:3] > 0).all()
    assert torch.isnan(square[3, 256:]).all() and torch.isfinite(square[3, :256]).all()
    assert torch.isnan(held["param"][3, 300]) and torch.isfinite(held["param"][:3]).all()


def _trained(dtype, lazy, unit, optimizer=None, steps=1000):
    """A matrix after as many steps, and as it was before."""
    torch.manual_seed(0)
    gen = torch.Generator().manual_seed(1)
    param = torch.nn.functional.normalize(torch.randn(60, 17, dtype=torch.float64), dim=1).to(dtype).requires_grad_()
    start, options = param.detach().clone(), {"lr": 1e-3, "betas": (0.0, 0.999)}
    if optimizer is None:
        adam = Adam([param], lazy=lazy, project=unit, renormalise=unit, **options)
    else:
        adam = optimizer([param], **options)
    for _ in range(steps):
        grad = gradient(60, 17, F32, gen, 0.03).to(dtype)
        if optimizer is None:
            param.grad = grad
            adam.clip_grad_norm_(5.0)
        else:
            param.grad = grad.to_dense()
            torch.nn.utils.clip_grad_norm_([param], 5.0)
        adam.step()
    return param.detach(), start


@functools.cache
def _exactly(unit):
    with fusae.backend("reference"):
        return _trained(torch.float64, True, unit)


def test_lazy_equals_torch_adam_in_float64():
    exact, start = _exactly(False)
    theirs, _ = _trained(torch.float64, False, False, torch.optim.Adam)
    assert (theirs - start).norm() > 0.1
    assert (exact - theirs).norm() / (theirs - start).norm() < 1e-12


@each_target
@pytest.mark.parametrize("unit", [False, True])
def test_lazy_equals_dense_adam_after_1000_steps(target, unit):
    (lazy, _), (dense, _) = (run(target, lambda lazy=lazy: _trained(F32, lazy, unit)) for lazy in (True, False))
    exact, _ = _exactly(unit)
    assert (lazy - exact).norm() / exact.norm() < 1e-6 and (lazy - dense).norm() / dense.norm() < 1e-6


@pytest.mark.parametrize(
    "fields",
    [
        {"moments": "8bit"},
        {"moments": "bfloat16", "optimizer": "masked"},
        {"optimizer": "lazy", "beta1": 0.0, "clip_norm": 1.0},
        {"dtype": "bfloat16", "weights": "bfloat16", "moments": "8bit", "optimizer": "lazy", "beta1": 0.0},
        {"dtype": "bfloat16", "weights": "bfloat16_master", "moments": "bfloat16"},
    ],
    ids=str,
)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path, fields):
    x = torch.randn(640, 12, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(m=50, k=3, batch_size=32, dead_window=100, log_every=5, device="cpu", lr=1e-2, **fields)
    threads = torch.get_num_threads()
    whole = Trainer(config, x, show=False)
    wanted = whole.run()
    Trainer(config, x, tmp_path / "run", show=False).run(until=9)
    try:
        torch.set_num_threads(1)
        again = Trainer(None, x, tmp_path / "run", show=False, resume=True)
        found = again.run()
    finally:
        torch.set_num_threads(threads)
    for name, value in wanted.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
    for theirs, ours in zip(whole.coder.parameters(), again.coder.parameters(), strict=True):
        for name, value in whole.optimizer.state[theirs].items():
            mine = again.optimizer.state[ours][name]
            assert torch.equal(value, mine) if isinstance(value, torch.Tensor) else value == mine, name
    loaded = fusae.nn.SparseCoder.load(tmp_path / "run" / "coder")
    assert loaded.W_enc.dtype == (torch.bfloat16 if "weights" in fields else torch.float32)


@pytest.mark.parametrize("unit", [False, True])
def test_a_lazy_run_is_the_dense_one_to_rounding(unit):
    x = torch.randn(1280, 12, generator=torch.Generator().manual_seed(0))
    coders = []
    for optimizer in ("lazy", "dense"):
        config = TrainConfig(m=50, k=3, batch_size=32, beta1=0.0, optimizer=optimizer, unit_decoder=unit, device="cpu")
        coders.append(Trainer(config, x, show=False).run())
    for a, b in zip(coders[0].parameters(), coders[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_state_dicts_of_every_mode_go_on_with_the_same_bits():
    for options in (
        {"moments": "8bit", "seed": 3},
        {"moments": "bfloat16", "seed": 3, "masked": True},
        {"lazy": True, "betas": (0.0, 0.99)},
        {"master": True},
    ):
        gen = torch.Generator().manual_seed(0)
        params = [torch.randn(9, 300).bfloat16().requires_grad_() for _ in range(2)]
        with torch.no_grad():
            params[1].copy_(params[0])
        grads = [gradient(9, 300, BF16, gen) for _ in range(6)]
        optimizers = [Adam([p], lr=0.01, **options) for p in params]

        def go(i, which, params=params, optimizers=optimizers):
            for grad in which:
                params[i].grad = grad.clone()
                optimizers[i].step()

        go(0, grads)
        go(1, grads[:3])
        fresh = Adam([params[1]], lr=0.5, **options)
        fresh.load_state_dict(optimizers[1].state_dict())
        optimizers[1] = fresh
        go(1, grads[3:])
        assert torch.equal(*params)
        for name, value in optimizers[0].state[params[0]].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(fresh.state[params[1]][name])), name


def test_a_state_from_before_the_modes_still_loads():
    param = torch.randn(4, 3).requires_grad_()
    optimizer = Adam([param])
    param.grad = torch.randn(4, 3)
    optimizer.step()
    saved = optimizer.state_dict()
    for name in ("lazy", "moments", "master", "seed"):
        del saved["param_groups"][0][name]
    again = Adam([param])
    again.load_state_dict(saved)
    assert again.state[param]["step"] == 1 and again.param_groups[0]["moments"] == "float32"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lazy": True}, ValueError, r"betas\[0\] must be 0 with lazy=True, got 0.9"),
        ({"lazy": True, "betas": (0, 0.9), "weight_decay": 0.1}, ValueError, "weight_decay must be 0 with lazy=True"),
        ({"lazy": True, "betas": (0, 0.9), "masked": True}, ValueError, "masked must be False with lazy=True"),
        ({"moments": "8bit"}, ValueError, "seed must be given with moments '8bit'"),
        ({"moments": "4bit"}, ValueError, "moments must be one of 'float32', 'bfloat16', '8bit', got '4bit'"),
        ({"seed": -1}, ValueError, "seed must be between 0"),
        ({"master": 1}, TypeError, "master must be true or false"),
    ],
)
def test_what_is_not_exact_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Adam([torch.zeros(3, 2).requires_grad_()], **options)


def test_parameters_that_do_not_go_with_a_mode():
    with pytest.raises(TypeError, match="moments must be 'float32'"):
        Adam([torch.zeros(3, 2, dtype=torch.float64).requires_grad_()], moments="8bit", seed=0)
    with pytest.raises(TypeError, match="a float16 parameter is rounded to nearest alone"):
        Adam([torch.zeros(3, 2, dtype=FP16).requires_grad_()], seed=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"exp_avg_sq": torch.zeros(4, 5, dtype=U8)}, ValueError, r"exp_avg_sq must be .* have shape \[4, 6\]"),
        ({"exp_avg_sq": torch.zeros(4, 6, dtype=U8), "seed": None}, ValueError, "seed must be given: exp_avg_sq"),
        ({"exp_avg": torch.zeros(0)}, ValueError, r"exp_avg may be empty only where betas\[0\] is 0"),
        ({"exp_avg": torch.zeros(4, 5, dtype=FP16)}, TypeError, "exp_avg must be float32, bfloat16 or uint8"),
        ({"last_step": torch.zeros(4)}, ValueError, r"last_step must be a contiguous int32 \[4\]"),
        ({"last_step": torch.zeros(4, dtype=torch.int32)}, ValueError, "last_step needs a sparse_coo grad"),
        ({"master": torch.zeros(4, 5)}, TypeError, "master is for a bfloat16 or float16 parameter"),
        ({"first_row": -1}, ValueError, "first_row must be an int >= 0"),
        ({"seed": -1}, ValueError, "seed must be an int in"),
    ],
)
def test_bad_calls(change, error, message):
    call = {"param": torch.zeros(4, 5), "exp_avg": torch.zeros(4, 5), "exp_avg_sq": torch.zeros(4, 5),
            "grad": torch.zeros(4, 5), "lr": 0.1, "step": 1, "seed": 0}  # fmt: skip
    with pytest.raises(error, match=message):
        fusae.adam_rows_(**{**call, **change})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "lazy"}, "beta1 must be 0 with optimizer 'lazy', got 0.9"),
        ({"weights": "bfloat16"}, "weights 'bfloat16' need dtype 'bfloat16', got 'float32'"),
        ({"weights": "bfloat16", "dtype": "bfloat16", "ema": 0.9}, "ema must be 0 with weights"),
        ({"moments": "8bit", "dtype": "float64"}, "moments must be 'float32'"),
        ({"moments": "int8"}, "moments must be one of"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(m=8, k=2, **fields)
