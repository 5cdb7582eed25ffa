# SPDX-License-Identifier: Apache-2.0
"""`encode_threshold` and `encode_batch_topk` as a trainer uses them: losses in float64 against dense plain torch,
storage that is too small, thread counts, and what is refused."""

import pytest
import torch

import fusae
from fusae.testing import assert_equal, targets

TARGETS = targets("encode_threshold_fwd", "encode_threshold_bwd", "encode_batch_topk_fwd", "encode_bwd", "decode_bwd")
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
pytestmark = pytest.mark.usefixtures("on_the_targets_device")
EPS = 0.5


def _coder(n=20, d=6, m=40, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shapes = (n, d), (m, d), (m,), (m, d), (d,)
    x, W_enc, b_enc, W_dec, b_dec = (torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes)
    threshold = (0.2 + 2 * torch.rand(m, generator=gen, dtype=torch.float64)).to(dtype)
    W_enc[:, 0] = W_enc[:, 0].abs() + 1
    x[:3, 0] = -50.0  # rows with nothing above
    return [t.requires_grad_() for t in (x, W_enc, b_enc, W_dec, b_dec, threshold)]


# --- JumpReLU against a dense statement ------------------------------------------------------------------------------


class Step(torch.autograd.Function):
    """H(z), its derivative 1/ε in the open window."""

    @staticmethod
    def forward(ctx, pre, threshold, through):
        ctx.save_for_backward(pre, threshold)
        ctx.through = through
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        ramp = grad * ((pre - threshold).abs() < EPS / 2) / EPS
        return ramp if ctx.through else None, -ramp.sum(0), None


class JumpReLU(torch.autograd.Function):
    """pre · H(pre - threshold): its jump of height θ has the derivative θ/ε in the open window."""

    @staticmethod
    def forward(ctx, pre, threshold, through):
        ctx.save_for_backward(pre, threshold)
        ctx.through = through
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        ramp = grad * threshold * ((pre - threshold).abs() < EPS / 2) / EPS
        return grad * (pre > threshold) + (ramp if ctx.through else 0.0), -ramp.sum(0), None


LOSSES = {
    "reconstruction": lambda f, l0, y, x, norms: (y - x).pow(2).sum(-1).mean(),
    "l0": lambda f, l0, y, x, norms: (y - x).pow(2).sum(-1).mean() + 0.3 * l0.mean(),
    "quadratic l0": lambda f, l0, y, x, norms: (y - x).pow(2).sum(-1).mean() + 2 / 5 * (l0 - 5).pow(2).mean(),
    "l0 of the batch": lambda f, l0, y, x, norms: (y - x).pow(2).sum(-1).mean() + (l0.mean() / 5 - 1).pow(2),
    "tanh": lambda f, l0, y, x, norms: (y - x).pow(2).sum(-1).mean() + 0.1 * torch.tanh(4 * f * norms).sum(),
}


@pytest.mark.parametrize("through", [False, True], ids=["deepmind", "straight_through"])
@pytest.mark.parametrize("name", LOSSES)
def test_jumprelu_losses_equal_dense_autograd(name, through):
    """Every gradient of a training loss, in float64: the window's entries of value 0 bring dL/df to the thresholds."""
    leaves = x, W_enc, b_enc, W_dec, b_dec, threshold = _coder()
    codes, l0 = fusae.encode_threshold(x, W_enc, b_enc, threshold, bandwidth=EPS, straight_through=through)
    assert (codes.values == 0).any() and (l0 == codes.l0).all() and (l0 == 0).any()
    y = fusae.decode(codes, W_dec, b_dec)
    got = torch.autograd.grad(LOSSES[name](codes.values, l0, y, x, W_dec.norm(dim=1)[codes.indices.long()]), leaves)

    pre = x @ W_enc.T + b_enc
    f, dense_l0 = JumpReLU.apply(pre, threshold, through), Step.apply(pre, threshold, through).sum(-1)
    wanted = torch.autograd.grad(LOSSES[name](f, dense_l0, f @ W_dec + b_dec, x, W_dec.norm(dim=1)), leaves)
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * float(b.abs().max()) and b.any()


@each_target
@pytest.mark.parametrize("through", [False, True])
def test_the_window_is_open_and_the_comparison_strict(target, through):
    """Pre-activations exactly at the threshold, at ± half a bandwidth, and one step of float32 inside of that."""
    half, one = 0.25, torch.ones(1)
    inside, below = torch.nextafter(one + half, one), torch.nextafter(one - half, one)
    x = torch.tensor([1.0, 1.0 + half, 1.0 - half, float(inside), float(below), 0.5, 2.0])[:, None]
    W, threshold = torch.ones(1, 1, requires_grad=True), torch.ones(1, requires_grad=True)
    with target.active():
        codes, l0 = fusae.encode_threshold(x, W, None, threshold, bandwidth=2 * half, straight_through=through)
        codes.values.backward(torch.arange(1.0, len(codes.values) + 1), retain_graph=True)
        assert_equal(codes.offsets.diff(), torch.tensor([1, 1, 0, 1, 1, 0, 1]))
        assert_equal(codes.values.detach(), torch.tensor([0.0, 1.25, float(inside), 0.0, 2.0]))
        assert l0.tolist() == [0, 1, 0, 1, 0, 0, 1]
        # -θ/ε of the entries in the window: the first (at the threshold), third and fourth.
        assert threshold.grad.item() == -(1 + 3 + 4) / 0.5
        through_above = 2 * 1.25 + 3 * float(inside) + 5 * 2.0
        in_window = (1 * 1.0 + 3 * float(inside) + 4 * float(below)) / 0.5
        assert W.grad.item() == pytest.approx(through_above + through * in_window, rel=1e-6)
        (l0_grad,) = torch.autograd.grad(l0.sum(), threshold)
        assert l0_grad.item() == -3 / 0.5


@each_target
def test_padding_of_the_window_touches_no_row_of_the_decoder(target):
    x, W_enc, b_enc, W_dec, b_dec, threshold = _coder(dtype=torch.float32)
    with target.active():
        codes, _ = fusae.encode_threshold(x, W_enc, b_enc, threshold, bandwidth=EPS)
        plain = fusae.encode_threshold(x, W_enc, b_enc, threshold.detach())
        y = fusae.decode(codes, W_dec, b_dec, sparse_grad=True)
        y.pow(2).sum().backward()
        assert_equal(y, fusae.decode(plain, W_dec, b_dec))
    assert len(codes.values) > len(plain.values) and (codes.l0 == plain.l0).all()
    assert_equal(W_dec.grad.coalesce().indices()[0], torch.unique(plain.indices).long())


def test_one_threshold_for_all_gets_one_gradient():
    x, W_enc, b_enc, *_ = _coder()
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    codes, l0 = fusae.encode_threshold(x, W_enc, b_enc, theta, bandwidth=EPS)
    (got,) = torch.autograd.grad(codes.values.pow(2).sum() + l0.sum(), theta)
    vector = theta.detach().expand(40).clone().requires_grad_()
    codes, l0 = fusae.encode_threshold(x, W_enc, b_enc, vector, bandwidth=EPS)
    (wanted,) = torch.autograd.grad(codes.values.pow(2).sum() + l0.sum(), vector)
    assert got.shape == () and torch.allclose(got, wanted.sum(), rtol=1e-12)


@each_target
@pytest.mark.parametrize("used", ["l0", "values"])
def test_a_loss_of_one_output_alone(target, used):
    x, W_enc, b_enc, _, _, threshold = _coder(dtype=torch.float32)
    with target.active():
        outputs = fusae.encode_threshold(x, W_enc, b_enc, threshold, bandwidth=EPS, straight_through=True)
        out = {"values": outputs[0].values, "l0": outputs[1]}
        got = torch.autograd.grad(out[used].sum(), (x, W_enc, b_enc, threshold), retain_graph=True)
        both = torch.autograd.grad(
            [out["values"], out["l0"]], (x, W_enc, b_enc, threshold),
            [torch.full_like(out[key], float(key == used)) for key in ("values", "l0")],
        )  # fmt: skip
    for a, b in zip(got, both, strict=True):
        assert_equal(a, b)


# --- storage ---------------------------------------------------------------------------------------------------------


@each_target
def test_a_storage_that_is_too_small_is_told_where_the_host_reads(target):
    x, W_enc, b_enc, W_dec, b_dec, threshold = (t.detach() for t in _coder(dtype=torch.float32))
    with target.active():
        whole = fusae.encode_threshold(x, W_enc, b_enc, threshold)
        used = int(whole.offsets[-1])
        exact = fusae.encode_threshold(x, W_enc, b_enc, threshold, capacity=used)
        assert_equal(exact.values, whole.values), assert_equal(exact.indices, whole.indices)
        for capacity in (used - 1, 0):
            short = fusae.encode_threshold(x, W_enc, b_enc, threshold, capacity=capacity)
            assert_equal(short.offsets, whole.offsets)
            assert_equal(short.values, whole.values[:capacity])
            with pytest.raises(IndexError, match=f"{used} entries and a storage of {capacity}.*capacity >= {used}"):
                short.to_dense()
            if target.checks_codes:
                with pytest.raises(IndexError, match=rf"offsets.* at most the storage of {capacity} entries, .*{used}"):
                    fusae.decode(short, W_dec, b_dec)
            else:  # what did not fit is not there: a row in front of it is whole
                assert_equal(fusae.decode(short, W_dec, b_dec)[0], fusae.decode(whole, W_dec, b_dec)[0] if capacity
                             else b_dec.to(W_dec.dtype))  # fmt: skip


@each_target
def test_a_window_whose_entries_do_not_fit(target):
    """l0 counts what is above the threshold, stored or not; gradients need the entries and raise."""
    x, W_enc, b_enc, _, _, threshold = _coder(dtype=torch.float32)
    with target.active():
        whole, wanted = fusae.encode_threshold(x, W_enc, b_enc, threshold, bandwidth=EPS)
        used = int(whole.offsets[-1])
        for capacity in (used - 1, used // 3, 0):
            short, l0 = fusae.encode_threshold(x, W_enc, b_enc, threshold, bandwidth=EPS, capacity=capacity)
            assert_equal(l0, wanted)
            for out in (l0, short.values):
                with pytest.raises(IndexError, match=f"storage of {capacity}"):
                    torch.autograd.grad(out.sum(), threshold, retain_graph=True)
            with pytest.raises(IndexError, match=f"storage of {capacity}"):
                torch.autograd.grad([short.values.sum(), l0.sum()], threshold)


@each_target
def test_unused_storage_of_a_batch_holds_zeros(target):
    x, W_enc = torch.randn(9, 8), torch.randn(40, 8)
    bias = torch.full((40,), -100.0)
    bias[7] = 100.0
    with target.active():
        codes, smallest, aux = fusae.encode_batch_topk(
            x, W_enc.requires_grad_(), bias, 5, aux_mask=torch.arange(40) > 30, k_aux=3
        )
        (grad,) = torch.autograd.grad(codes.values.sum() + aux.values.sum(), W_enc)
    assert codes.values.shape == (45,) and int(codes.offsets[-1]) == 9 and not codes.values[9:].any()
    assert (codes.indices[:9] == 7).all() and smallest == codes.values[:9].min()
    assert grad.any(1).nonzero().flatten().tolist() == [7]


@each_target
def test_a_value_that_rounds_to_zero_gets_no_gradient(target):
    """In float16, behind a ReLU: as in `encode_topk`, an entry of value 0 is padding."""
    x, b = torch.ones(1, 1).half(), None
    W = torch.tensor([[1e-4], [2.0**-24], [-1.0]]).half().requires_grad_()
    with target.active():
        codes, _ = fusae.encode_batch_topk(0.25 * x, W, b, 2, sparse_grad=True)
        top = fusae.encode_topk(0.25 * x, W, b, 2, sparse_grad=True)
        above = fusae.encode_threshold(0.25 * x, W, b, 0.0, sparse_grad=True)
        window, l0 = fusae.encode_threshold(0.25 * x, W, b, 1e-9, bandwidth=1.5e-9, sparse_grad=True)
        for other in (top, above, window):
            assert (codes.to_dense() == other.to_dense()).all() and int(other.l0) == 1
        assert int(l0) == 2  # counted before rounding, as it is compared
        for values in (codes.values, top.values, above.values, window.values):
            (grad,) = torch.autograd.grad(values.sum(), W)
            assert grad.coalesce().indices().tolist() == [[0]]


def test_nothing_positive_has_no_smallest_score():
    codes, smallest = fusae.encode_batch_topk(torch.ones(3, 2), -torch.ones(5, 2), None, 2)
    assert int(codes.offsets[-1]) == 0 and smallest == torch.inf
    codes, smallest = fusae.encode_batch_topk(torch.ones(3, 2), -torch.ones(5, 2), None, 2, "none")
    assert int(codes.offsets[-1]) == 6 and smallest == torch.inf


# --- invariants ------------------------------------------------------------------------------------------------------


@each_target
def test_a_batch_of_one_row_is_a_top_k(target):
    # Integers: on a GPU the two may take their products from two GEMMs.
    x, W, b = (torch.randint(-9, 10, shape).float() for shape in ((1, 8), (400, 8), (400,)))
    with target.active():
        batch, smallest = fusae.encode_batch_topk(x, W, b, 20, "none")
        top = fusae.encode_topk(x, W, b, 20, "none")
    assert_equal(batch.to_dense(), top.to_dense())
    assert smallest == top.values[top.values > 0].min()


@each_target
def test_the_threshold_of_a_batch_selects_it_again(target):
    """Everything above the smallest selected score, and that one: BatchTopK at inference."""
    x, W, b = torch.randn(50, 8), torch.randn(400, 8), torch.randn(400)
    with target.active():
        batch, smallest = fusae.encode_batch_topk(x, W, b, 20)
        again = fusae.encode_threshold(x, W, b, torch.nextafter(smallest, torch.tensor(0.0)))
    assert_equal(again.offsets, batch.offsets)
    assert_equal(again.indices, batch.indices), assert_equal(again.values, batch.values)


@each_target
def test_groups_of_one_keep_everything_and_one_group_is_a_top_1(target):
    x, W, b = (torch.randint(-9, 10, shape).float() for shape in ((9, 8), (40, 8), (40,)))
    with target.active():
        one = fusae.encode_topk(x, W, b, 1, select="group_max")
        assert_equal(one.indices, fusae.encode_topk(x, W, b, 1).indices)
        every = fusae.encode_topk(x, W, b, 40, "none", select="group_max")
        assert_equal(every.indices, torch.arange(40, dtype=torch.int32).expand(9, 40))
        relu = fusae.encode_threshold(x, W, b, 0.0)
        assert_equal(relu.to_dense(), fusae.encode_topk(x, W, b, 40).to_dense())


@each_target
def test_the_thread_count_changes_no_bit(target):
    # Integers, whose sums are exact: of torch's GEMM those of floats may depend on the thread count.
    x, W, b = (torch.randint(-3, 4, shape).float() for shape in ((300, 33), (5000, 33), (5000,)))
    theta = torch.randint(40, 60, (5000,)).float().requires_grad_()
    mask = torch.rand(5000) < 0.1
    leaves = [t.requires_grad_() for t in (x, W, b)]

    def run():
        codes, l0 = fusae.encode_threshold(*leaves, theta, bandwidth=9.0, straight_through=True)
        batch, smallest, aux = fusae.encode_batch_topk(*leaves, 9, aux_mask=mask, k_aux=20)
        group = fusae.encode_topk(*leaves, 50, select="group_max")
        loss = codes.values.pow(2).sum() + l0.pow(2).sum() + batch.values.pow(2).sum() + aux.values.sum()
        grads = torch.autograd.grad(loss + group.values.pow(3).sum(), (*leaves, theta))
        indices = codes.indices, batch.indices, aux.indices, group.indices
        return [codes.values, l0, batch.values, smallest, *indices, *grads]

    threads = torch.get_num_threads()
    try:
        with target.active():
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_equal(a, b)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_bad_arguments():
    x, W, b = torch.randn(5, 8), torch.randn(40, 8), torch.randn(40)
    learned = torch.ones(40, requires_grad=True)
    encode = fusae.encode_threshold
    for call, error, message in (
        (lambda: encode(x, W, b, torch.ones(39)), ValueError, r"threshold must have shape \[40\] .*got \[39\]"),
        (lambda: encode(x, W, b, torch.ones(40).bfloat16()), TypeError, "threshold must be float32 .*got torch.bfl"),
        (lambda: encode(x, W, b, "0"), TypeError, "threshold must be a torch.Tensor or a number, got str"),
        (lambda: encode(x, W, b, learned), ValueError, "bandwidth must be given for a threshold that requires a gr"),
        (lambda: encode(x, W, b, 1.0, straight_through=True), ValueError, "bandwidth must be given with straight_thr"),
        (lambda: encode(x, W, b, 1.0, bandwidth=0.0), ValueError, "bandwidth must be greater than 0"),
        (lambda: encode(x, W, b, 1.0, bandwidth=1.0, norms=b), ValueError, "norms must be None with bandwidth"),
        (lambda: encode(x, W, b, 1.0, capacity=-1), ValueError, "capacity must be between 0 and"),
        (lambda: encode(x, W.T, b, 1.0), ValueError, r"W_enc must have shape \[m, 8\].*transposed"),
        (lambda: fusae.encode_batch_topk(x, W, b, 41), ValueError, "k must be between 1 and m = 40, got 41"),
        (lambda: fusae.encode_batch_topk(x, W, b, 3, "gelu"), ValueError, "activation must be one of 'relu', 'none'"),
        (lambda: fusae.encode_batch_topk(x, W, b, 3, k_aux=2), ValueError, "k_aux must be 0 without aux_mask"),
        (lambda: fusae.encode_topk(x, W, b, 7, select="group_max"), ValueError, "k must divide m = 40 .*got 7"),
    ):
        with pytest.raises(error, match=message):
            call()
    with torch.no_grad():  # a trained threshold at inference needs no window
        assert_equal(encode(x, W, b, learned).values, encode(x, W, b, 1.0).values)
