# SPDX-License-Identifier: Apache-2.0
"""How gradients meet autograd: gradcheck, subsets of inputs, unused and twice-used outputs, second derivatives."""

import pytest
import torch

import fusae
from fusae.testing import assert_equal, targets

TARGETS = targets("encode_topk_fwd", "encode_bwd", "decode_fwd", "decode_bwd", "topk_fwd", "topk_bwd",
                  "encode_threshold_fwd", "encode_batch_topk_fwd")  # fmt: skip
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
pytestmark = pytest.mark.usefixtures("on_the_targets_device")


def _weights(n=9, d=8, m=40, dtype=torch.float32):
    x, W, b = torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype), torch.randn(m, dtype=dtype)
    return [t.requires_grad_() for t in (x, W, b)]


# --- the reference against finite differences -----------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("k_aux", [0, 6])
def test_gradcheck_encode_topk(activation, k_aux):
    x, W, b = _weights(5, 4, 12, torch.float64)
    mask = torch.arange(12) % 3 == 0 if k_aux else None

    def values(x, W, b):
        out = fusae.encode_topk(x, W, b, 3, activation, aux_mask=mask, k_aux=k_aux, backend="reference")
        return tuple(c.values for c in out) if k_aux else out.values

    assert torch.autograd.gradcheck(values, (x, W, b))


@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck_decode(ragged):
    W, b = torch.randn(12, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
    codes = fusae.topk(torch.randn(5, 12, dtype=torch.float64), 3)
    codes = codes.to_ragged() if ragged else codes

    def y(values, W, b):
        return fusae.decode(fusae.SparseCodes(values, codes.indices, 12, codes.offsets), W, b, backend="reference")

    assert torch.autograd.gradcheck(y, (codes.values.requires_grad_(), W, b.requires_grad_()))


def test_gradcheck_topk():
    pre = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: fusae.topk(p, 3, backend="reference").values, (pre,))


def test_gradcheck_through_the_coder_and_back():
    """Gradients of the codes' values meet: encode, decode, and the values used twice."""
    x, W, b = _weights(4, 4, 10, torch.float64)
    W_dec = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)

    def loss(x, W, b, W_dec):
        codes = fusae.encode_topk(x, W, b, 3, backend="reference")
        return (fusae.decode(codes, W_dec, backend="reference") - x).pow(2).sum() + codes.values.abs().sum()

    assert torch.autograd.gradcheck(loss, (x, W, b, W_dec))


# --- which gradients are asked for ----------------------------------------------------------------------------------

SUBSETS = [("x",), ("W",), ("b",), ("x", "b"), ("W", "b"), ("x", "W")]


@each_target
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_encode_gradients_of_a_subset(target, wanted, sparse_grad):
    leaves = dict(zip("xWb", _weights(), strict=True))
    grad = torch.randn(9, 5)

    def gradients(names):
        args = {name: t.detach().requires_grad_(name in names) for name, t in leaves.items()}
        with target.active():
            codes = fusae.encode_topk(args["x"], args["W"], args["b"], 5, sparse_grad=sparse_grad)
            codes.values.backward(grad)
        return {name: t.grad for name, t in args.items()}

    everything, some = gradients("xWb"), gradients(wanted)
    for name in "xWb":
        if name not in wanted:
            assert some[name] is None
        else:
            full, part = everything[name], some[name]
            assert part.is_sparse == (sparse_grad and name == "W")
            assert_equal(part.to_dense(), full.to_dense(), f"grad {name}")


@each_target
@pytest.mark.parametrize("wanted", [("v",), ("W",), ("b",), ("v", "b"), ("v", "W"), ("W", "b")], ids="+".join)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_decode_gradients_of_a_subset(target, wanted, sparse_grad):
    codes = fusae.topk(torch.randn(9, 40), 5).to_ragged()
    leaves = {"v": codes.values, "W": torch.randn(40, 8), "b": torch.randn(8)}
    grad = torch.randn(9, 8)

    def gradients(names):
        args = {name: t.detach().requires_grad_(name in names) for name, t in leaves.items()}
        with target.active():
            codes_ = fusae.SparseCodes(args["v"], codes.indices, 40, codes.offsets)
            fusae.decode(codes_, args["W"], args["b"], sparse_grad=sparse_grad).backward(grad)
        return {name: t.grad for name, t in args.items()}

    everything, some = gradients("vWb"), gradients(wanted)
    for name in "vWb":
        if name not in wanted:
            assert some[name] is None
        else:
            assert_equal(some[name].to_dense(), everything[name].to_dense(), f"grad {name}")


@each_target
def test_only_one_of_two_selections_is_used(target):
    """The loss touches the auxiliary codes only, then the main codes only: the other half gives nothing."""
    # Integers: a sum among zeros may be taken in another order than without them.
    x, W, b = (torch.randint(-9, 10, t.shape).float().requires_grad_() for t in _weights())
    mask = torch.arange(40) % 2 == 0
    with target.active():
        both = fusae.encode_topk(x, W, b, 5, aux_mask=mask, k_aux=7)
        alone = fusae.encode_topk(x, W, b, 5)
        masked_bias = torch.where(mask, b, -1e4)
        aux_alone = fusae.encode_topk(x, W, masked_bias, 7)
    for used, wanted in ((both[0], alone), (both[1], aux_alone)):
        assert_equal(used.indices, wanted.indices)
        got = torch.autograd.grad(used.values.sum(), (x, W, b), retain_graph=True)
        for g, w in zip(got, torch.autograd.grad(wanted.values.sum(), (x, W, b)), strict=True):
            assert_equal(g, w)


@each_target
def test_padding_gets_no_gradient(target):
    """Rows with fewer than k positives: a ReLU'd latent passes nothing back, whatever the gradient of its value is."""
    x, W, b = torch.randn(9, 8), torch.randn(40, 8), torch.full((40,), -1e4)
    b[3] = 1e4
    leaves = [t.requires_grad_() for t in (x, W, b)]
    with target.active():
        codes = fusae.encode_topk(*leaves, 5)
        codes.values.backward(torch.full((9, 5), 1e6))
    assert (codes.values[:, 1:] == 0).all() and not torch.signbit(codes.values).any()
    assert (b.grad.nonzero().flatten() == 3).all() and b.grad[3] == 9e6
    assert (W.grad.abs().sum(1).nonzero().flatten() == 3).all()
    assert_equal(x.grad, (1e6 * W[3]).detach().expand(9, 8))


@each_target
def test_values_used_twice(target):
    x, W, _ = _weights()
    with target.active():
        codes = fusae.encode_topk(x, W, None, 5)
        (once,) = torch.autograd.grad(3.0 * codes.values.sum(), W, retain_graph=True)
        (twice,) = torch.autograd.grad(codes.values.sum() + 2.0 * codes.values.sum(), W)
    assert_equal(twice, once)


@each_target
def test_second_derivatives_raise(target):
    x, W, _ = _weights()
    with target.active():
        for out in (
            fusae.decode(fusae.encode_topk(x, W, None, 5), W).pow(2).sum(),
            fusae.topk(x, 3).values.pow(2).sum(),
        ):
            (grad,) = torch.autograd.grad(out, x, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                grad.sum().backward()


SECOND = {
    "encode_topk": lambda x, W, v: fusae.encode_topk(x, W, None, 5).values,
    "encode_threshold": lambda x, W, v: fusae.encode_threshold(x, W, None, 0.5).values,
    "encode_batch_topk": lambda x, W, v: fusae.encode_batch_topk(x, W, None, 5)[0].values,
    "decode": lambda x, W, v: fusae.decode(fusae.SparseCodes(v, torch.arange(45, dtype=torch.int32).view(9, 5), 45), W),
}


@each_target
@pytest.mark.parametrize("op", SECOND)
def test_second_derivatives_of_a_sum_raise(target, op):
    """A sum hands the op a constant gradient, on which what it gives back depends through the other argument alone."""
    x, W, v = (torch.randn(s).requires_grad_() for s in ((9, 8), (45, 8), (9, 5)))
    first, second = (v, W) if op == "decode" else (x, W)
    for at, other in ((first, second), (second, first)):
        with target.active():
            (grad,) = torch.autograd.grad(SECOND[op](x, W, v).sum(), at, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                torch.autograd.grad(grad.square().sum() + other.sum(), other)


@each_target
def test_no_graph_without_gradients(target):
    x, W, b = (t.detach() for t in _weights())
    with target.active():
        codes = fusae.encode_topk(x, W, b, 5)
        assert not codes.values.requires_grad and not fusae.decode(codes, W).requires_grad
        codes = fusae.encode_topk(x.requires_grad_(), W, b, 5)
    assert codes.values.requires_grad and not codes.indices.requires_grad


@each_target
def test_a_view_of_a_transposed_parameter_gets_its_gradient(target):
    """The ``[d, m]`` parameter of other libraries, used through ``.T``: the gradient arrives in its own layout."""
    x, W = torch.randint(-2, 3, (9, 8)).float(), torch.randint(-2, 3, (40, 8)).float().requires_grad_()  # exact sums
    other = W.detach().T.contiguous().requires_grad_()
    with target.active():
        fusae.decode(fusae.encode_topk(x, W, None, 5), W).pow(2).sum().backward()
        fusae.decode(fusae.encode_topk(x, other.T, None, 5), other.T).pow(2).sum().backward()
    assert_equal(other.grad, W.grad.T)


def test_row_sparse_gradients_under_autocast():
    """A float32 weight used in bfloat16 gets its row-sparse gradient back in float32, from encoder and decoder."""
    x, W_enc, W_dec = (
        torch.randn(8, 16),
        torch.randn(40, 16, requires_grad=True),
        torch.randn(40, 16, requires_grad=True),
    )
    with torch.autocast("cpu", torch.bfloat16):
        codes = fusae.encode_topk(x, W_enc, None, 4, sparse_grad=True)
        y = fusae.decode(codes, W_dec, sparse_grad=True)
    y.float().square().sum().backward()
    for weight in (W_enc, W_dec):
        assert weight.grad.layout == torch.sparse_coo and weight.grad.dtype == torch.float32
        assert 0 < weight.grad._nnz() <= 32
