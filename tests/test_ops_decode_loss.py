# SPDX-License-Identifier: Apache-2.0
"""`decode_loss` beyond its conformance cases: how it meets autograd, torch.func, compile and autocast; its checks."""

import pytest
import torch
from torch.func import grad, vmap

import fusae
from fusae import SparseCodes, _dispatch
from fusae.testing import assert_equal, targets

TARGETS = targets("decode_loss_fwd", "decode_loss_bwd")
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
pytestmark = pytest.mark.usefixtures("on_the_targets_device")
N, D, M, K = 9, 8, 40, 5
NESTINGS = {
    "plain": {},
    "latents": {"prefixes": [3, 20, M], "weights": [1.0, 0.5, 2.0]},
    "rank": {"prefixes": [1, 2, K], "nested": "rank"},
}
each_nesting = pytest.mark.parametrize("options", NESTINGS.values(), ids=NESTINGS.keys())


def _inputs(dtype=torch.float32, n=N):
    codes = fusae.topk(torch.randint(-9, 10, (n, M)).to(dtype), K)
    W, b, goal = (torch.randint(-3, 4, s).to(dtype) for s in ((M, D), (D,), (n, D)))
    return codes, [t.requires_grad_() for t in (codes.values, W, b, goal)]


def _loss(codes, options, **more):
    def loss(values, W, b, goal):
        made = SparseCodes(values, codes.indices, codes.m, codes.offsets)
        return fusae.decode_loss(made, W, b, goal, **options, **more).loss

    return loss


@pytest.mark.parametrize(
    ("name", "ragged"), [(name, form) for name in NESTINGS for form in (False, True) if (name, form) != ("rank", True)]
)  # ragged codes by rank are refused, see below
def test_gradcheck(name, ragged):
    options = NESTINGS[name]
    codes, leaves = _inputs(torch.float64, 4)
    if ragged:
        codes = codes.detach().to_ragged()
        leaves[0] = codes.values.requires_grad_()
    assert torch.autograd.gradcheck(_loss(codes, options, backend="reference"), leaves)


@each_target
def test_one_prefix_is_the_squared_error_of_decode(target):
    codes, leaves = _inputs()
    values, W, b, goal = leaves
    with target.active():
        loss = fusae.decode_loss(codes, W, b, goal)
        y = fusae.decode(codes, W, b)
        plain = (goal - y).square().sum()
        for got, wanted in zip(
            torch.autograd.grad(loss.loss, leaves), torch.autograd.grad(plain, leaves), strict=True
        ):
            assert_equal(got, wanted)
    assert_equal(loss.loss, plain)
    assert_equal(loss.sse, plain.detach()[None])
    assert_equal(loss.residual, (goal - y).detach())
    assert not loss.sse.requires_grad and not loss.residual.requires_grad


@each_target
@each_nesting
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 1), (0, 3), (1, 2)], ids=str)
def test_gradients_of_a_subset(target, options, wanted):
    codes, leaves = _inputs()
    loss = _loss(codes, options)
    with target.active():
        everything = torch.autograd.grad(loss(*leaves), leaves)
        some = [leaf.detach().requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
        for i, got in zip(wanted, torch.autograd.grad(loss(*some), [some[i] for i in wanted]), strict=True):
            assert_equal(got, everything[i])


@each_target
@each_nesting
def test_value_gradients_that_the_forward_pass_left_out(target, options):
    """The same from the backward pass, where the rows met have been rounded: not in float32."""
    codes, _ = _inputs()
    W, goal = torch.randn(M, D), torch.randn(N, D)
    prefixes, weights = options.get("prefixes", [M]), options.get("weights", [1.0] * len(options.get("prefixes", "1")))
    by_rank = options.get("nested") == "rank"
    common = (codes.values.detach(), codes.indices, None, W)
    with target.active():
        forward = torch.ops.fusae.decode_loss_fwd.default
        _, residual, mixed, dots = forward(*common, None, goal, prefixes, weights, by_rank, True, True)
        mixed = mixed if len(prefixes) > 1 else residual[None]
        factor = torch.tensor(-0.75)
        got, rows, grad_W = torch.ops.fusae.decode_loss_bwd.default(
            factor, *common, mixed, prefixes, by_rank, True, False, False
        )
        none = forward(*common, None, goal, prefixes, weights, by_rank, False, False)
    torch.testing.assert_close(got, factor * dots, rtol=1e-5, atol=1e-5)
    assert rows.numel() == grad_W.numel() == 0
    assert_equal(none[1], residual)
    assert none[2].numel() == none[3].numel() == 0


@each_target
def test_without_gradients_nothing_is_kept(target, monkeypatch):
    codes, (_, W, b, goal) = _inputs()
    seen, original = [], _dispatch.select
    monkeypatch.setattr(_dispatch, "select", lambda op, args, *_: seen.append(args[-2:]) or original(op, args, *_))
    with target.active():
        with torch.no_grad():
            fusae.decode_loss(codes, W, b, goal, [3, M])
        fusae.decode_loss(codes.detach(), W, b, goal, [3, M])
        fusae.decode_loss(codes, W, b, goal, [3, M])
    assert seen == [(False, False), (True, False), (True, True)]


@each_target
@each_nesting
def test_torch_func(target, options):
    """``grad`` and ``vmap`` over it, in both orders: the same as autograd, one element after the other."""
    codes, leaves = _inputs()
    loss = _loss(codes, options)
    with target.active():
        wanted = torch.autograd.grad(loss(*leaves), leaves)
        leaves = [leaf.detach() for leaf in leaves]
        got = grad(loss, (0, 1, 2, 3))(*leaves)
        goals = torch.stack([leaves[3], 2 * leaves[3]])
        batched = vmap(grad(loss, (0, 1, 2, 3)), (None, None, None, 0))(*leaves[:3], goals)
        summed = grad(lambda goals: vmap(loss, (None, None, None, 0))(*leaves[:3], goals).sum())(goals)
    for g, w, b in zip(got, wanted, batched, strict=True):
        assert_equal(g, w)
        assert_equal(b[0], w)
    assert_equal(summed, batched[3])


@each_target
@each_nesting
def test_compile_whole_graph(target, options):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(values, indices, W, b, goal):
        out = fusae.decode_loss(SparseCodes(values, indices, M), W, b, goal, **options)
        return out.loss, out.sse, out.residual

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    with target.active():
        for n in (6, 11, 33):  # none of them the size of another dimension
            codes, leaves = _inputs(n=n)
            args = (leaves[0], codes.indices, *leaves[1:])
            got, wanted = compiled(*args), step(*args)
            for a, b in zip(got, wanted, strict=True):
                assert_equal(a, b)
            grads = (torch.autograd.grad(out[0], leaves) for out in (got, wanted))
            for a, b in zip(*grads, strict=True):
                assert_equal(a, b)
    assert counter.frame_count == 1


@each_target
def test_opcheck(target):
    codes, (values, W, b, goal) = _inputs()
    values, W, b, goal = (t.detach() for t in (values, W, b, goal))
    ragged = codes.detach().to_ragged()
    with target.active():
        for c in (codes.detach(), ragged):
            for prefixes, weights in (([M], [1.0]), ([3, M], [1.0, 0.5])):
                common = (c.values, c.indices, c.offsets, W)
                args = (*common, b, goal, prefixes, weights, False, True, True)
                torch.library.opcheck(torch.ops.fusae.decode_loss_fwd.default, args)
                mixed = torch.randn(len(prefixes), N, D)
                for row_sparse in (False, True):
                    args = (torch.tensor(2.0), *common, mixed, prefixes, False, True, True, row_sparse)
                    torch.library.opcheck(torch.ops.fusae.decode_loss_bwd.default, args)


@each_target
@pytest.mark.parametrize("trained", [(0, 1, 2, 3), (0,), (1,), (2,), (3,)], ids=str)
@each_nesting
def test_second_derivatives_raise(target, trained, options):
    """Whatever of values, W_dec, b_dec and target is trained: the loss is quadratic in each."""
    codes, leaves = _inputs()
    leaves = [leaf if i in trained else leaf.detach() for i, leaf in enumerate(leaves)]
    with target.active():
        for i in trained:
            (first,) = torch.autograd.grad(_loss(codes, options)(*leaves), leaves[i], create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                first.sum().backward()


@each_target
def test_many_prefixes_of_large_errors_do_not_overflow(target):
    """In float16 the sum of what 64 prefixes leave of rows of size 1000 is far above 65504; their mean is not."""
    gen = torch.Generator().manual_seed(0)
    codes = fusae.topk(torch.randn(N, 200, generator=gen).half(), 64)
    W, b, goal = (torch.randn(s, generator=gen).half() for s in ((200, D), (D,), (N, D)))
    leaves = [t.requires_grad_() for t in (codes.values, W, b, 1000 * goal)]
    options = {"prefixes": list(range(1, 65)), "nested": "rank"}
    weight = 2.0**-12  # the gradients themselves stay in range

    def gradients(leaves):
        return torch.autograd.grad(weight * _loss(codes, options)(*leaves), leaves)

    with target.active():
        got = gradients(leaves)
    with fusae.backend("reference"):
        wanted = gradients([leaf.detach().double().requires_grad_() for leaf in leaves])
    for g, w in zip(got, wanted, strict=True):
        assert float((g.double() - w).abs().max()) <= 4e-3 * float(w.abs().max())


@each_target
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_small_factor_of_the_loss_does_not_underflow(target, dtype):
    """A mean over many rows has a gradient below float16's range at every element of the reconstruction, yet not in the
    sums: rows are kept as residuals, the factor comes last."""
    codes, leaves = _inputs(dtype, n=64)
    W = leaves[1]
    scale = 2.0**-22
    with target.active():
        loss = _loss(codes, {"prefixes": [20, M], "weights": [scale, 2 * scale]})(*leaves)
        (got,) = torch.autograd.grad(loss, W)
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        with fusae.backend("reference"):
            (wanted,) = torch.autograd.grad(_loss(codes, {"prefixes": [20, M], "weights": [scale, 2 * scale]})(*wide),
                                            wide[1])  # fmt: skip
    big = wanted.abs() > 1e-3 * wanted.abs().max()
    rounding = torch.finfo(dtype).eps + 2.0**-24 / float(wanted[big].abs().min()) * (dtype == torch.float16)
    assert ((got.double() - wanted).abs()[big] <= (rounding + 4 * torch.finfo(dtype).eps) * wanted.abs()[big]).all()


@each_target
def test_autocast_leaves_the_target_in_float32(target):
    codes, _ = _inputs()
    W, b, goal = torch.randn(M, D, requires_grad=True), torch.randn(D, requires_grad=True), torch.randn(N, D)
    with target.active():
        with torch.autocast("cpu", torch.bfloat16):
            out = fusae.decode_loss(codes, W, b, goal, sparse_grad=True)
        low = [t.detach().to(torch.bfloat16) for t in (codes.values, W, b)]
        wanted = fusae.decode_loss(SparseCodes(low[0], codes.indices, M), *low[1:], goal)
        out.loss.backward()
    assert_equal(out.loss.detach(), wanted.loss)
    assert out.loss.dtype == torch.float32 and out.residual.dtype == torch.bfloat16
    assert W.grad.layout == torch.sparse_coo and W.grad.dtype == b.grad.dtype == torch.float32


def test_the_last_prefix_may_be_the_only_one_and_weights_may_be_zero():
    codes, leaves = _inputs()
    a = fusae.decode_loss(codes, *leaves[1:], [M], [0.5])
    b = fusae.decode_loss(codes, *leaves[1:])
    assert_equal(a.loss, 0.5 * b.loss)
    zero = fusae.decode_loss(codes, *leaves[1:], [3, M], [0.0, 0.0])
    assert zero.loss == 0 and (zero.sse > 0).all()
    assert all(not g.any() for g in torch.autograd.grad(zero.loss, leaves))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": torch.zeros(N, K)}, TypeError, "codes must be a fusae.SparseCodes, got Tensor"),
        ({"W_dec": torch.zeros(D, M)}, ValueError, r"W_dec must have shape \[40, d\].* got \[8, 40\] \(transposed\?\)"),
        ({"W_dec": torch.zeros(M, D).double()}, TypeError, "codes must have dtype torch.float64 like W_dec"),
        ({"b_dec": torch.zeros(D + 1)}, ValueError, r"b_dec must have shape \[8\]"),
        ({"target": torch.zeros(N, D + 1)}, ValueError, r"target must have shape \[9, 8\] .* got \[9, 9\]"),
        ({"target": torch.zeros(N, D).half()}, TypeError, "target must have dtype torch.float32 like W_dec"),
        ({"target": torch.zeros(N, D).int()}, TypeError, "target must be float32, bfloat16"),
        ({"prefixes": []}, TypeError, r"prefixes must be a list of ints that ascend to m = 40, got \[\]"),
        ({"prefixes": 40}, TypeError, "prefixes must be a list of ints"),
        ({"prefixes": [3.0, 40]}, TypeError, "prefixes must be an int, got float 3.0"),
        ({"prefixes": [0, 40]}, ValueError, "prefixes must be between 1 and m = 40, got 0"),
        ({"prefixes": [3, 20]}, ValueError, r"prefixes must ascend and end with m = 40, got \[3, 20\]"),
        ({"prefixes": [3, 3, 40]}, ValueError, "prefixes must ascend and end with m = 40"),
        ({"prefixes": [3, 40], "nested": "rank"}, ValueError, "prefixes must be between 1 and k = 5, got 40"),
        ({"nested": "width"}, ValueError, "nested must be one of 'latents', 'rank', got 'width'"),
        ({"weights": [1.0, 2.0]}, ValueError, r"weights must be 1 numbers, one for each prefix, got \[1.0, 2.0\]"),
        ({"weights": [-1.0]}, ValueError, "weights must be at least 0 and finite, got -1.0"),
        ({"weights": torch.ones(1)}, ValueError, "weights must be 1 numbers"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, error, message):
    codes, (_, W, b, goal) = _inputs()
    with pytest.raises(error, match=message):
        fusae.decode_loss(**{"codes": codes, "W_dec": W, "b_dec": b, "target": goal, **change})


def test_rank_needs_codes_of_fixed_width():
    codes, (_, W, b, goal) = _inputs()
    with pytest.raises(ValueError, match="nested='rank' needs codes of fixed width.* got ragged codes"):
        fusae.decode_loss(codes.detach().to_ragged(), W, b, goal, nested="rank")


@each_target
def test_indices_outside_the_dictionary_raise_or_show(target):
    codes, (_, W, b, goal) = _inputs()
    for bad in (-1, M):
        indices = codes.indices.clone()
        indices[3, 2] = bad
        wrong = SparseCodes(codes.values.detach(), indices, M)
        if target.checks_codes:
            with target.active(), pytest.raises(IndexError):
                fusae.decode_loss(wrong, W, b, goal, [3, M])
            continue
        with target.active():
            loss, sse, residual = fusae.decode_loss(wrong, W, b, goal, [3, M])
        assert loss.isnan() and sse[-1].isnan()
        assert residual[3].isnan().all() and not residual[[0, 1, 2]].isnan().any()


def test_too_many_rows_times_prefixes_are_refused():
    """The sort by latent writes row and prefix as one int32."""
    from fusae.backends import cpu

    if cpu.unavailable() is not None:
        pytest.skip("the native module is missing")
    from fusae.backends.cpu.native import _C

    n = 2**30  # rows without entries, whose memory is one zero
    with pytest.raises(IndexError, match=r"rows times prefixes must be at most 2\*\*31 - 1, got 1073741824 times 3"):
        _C.by_latent((0, 0, 0, 0, n, 0, 0), 4, [1, 2, 4], False, 0, 0, 0)
