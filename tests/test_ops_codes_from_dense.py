# SPDX-License-Identifier: Apache-2.0
"""`codes_from_dense` beyond its conformance cases."""

import pytest
import torch
from torch.func import grad, vmap

import fusae
from fusae import SparseCodes
from fusae.testing import assert_equal, targets

TARGETS = targets("codes_from_dense_fwd", "codes_from_dense_bwd")
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
pytestmark = pytest.mark.usefixtures("on_the_targets_device")


def _dense(n=9, m=70):
    return torch.randn(n, m).relu()


@each_target
@pytest.mark.parametrize("capacity", [None, 9 * 70])
def test_through_codes_and_back(target, capacity):
    f = _dense().requires_grad_()
    W = torch.randn(70, 8)
    with target.active():
        codes = fusae.codes_from_dense(f, capacity)
        (got,) = torch.autograd.grad(fusae.decode(codes, W).square().sum(), f)
    (wanted,) = torch.autograd.grad((f @ W).square().sum(), f)
    assert_equal(codes.to_dense(), f)
    torch.testing.assert_close(got, torch.where(f > 0, wanted, 0.0), rtol=1e-5, atol=1e-5)


@each_target
def test_more_than_fits_raises_wherever_the_host_reads(target):
    f = _dense()
    count = int((f != 0).sum())
    with target.active():
        codes = fusae.codes_from_dense(f, count - 1)
        assert codes.offsets[-1] == count and len(codes.values) == count - 1
        with pytest.raises(IndexError, match=f"{count} entries .* storage of {count - 1}.* capacity >= {count}"):
            codes.to_dense()
        with pytest.raises(IndexError, match="capacity was too small"):
            codes.to_sparse_csr()
        W = torch.randn(70, 8)
        if target.checks_codes:
            with pytest.raises(IndexError, match="offsets"):
                fusae.decode(codes, W)
        else:  # what did not fit is not there
            fitting = torch.where(torch.arange(f.numel()).view(f.shape) == f.flatten().nonzero().max(), 0.0, f)
            torch.testing.assert_close(fusae.decode(codes, W), fitting @ W, rtol=1e-4, atol=1e-4)


@each_target
def test_the_order_of_latents_is_ascending_whatever_the_layout(target):
    f = _dense(33, 130)
    with target.active():
        wanted = fusae.codes_from_dense(f)
        for other in (f.T.contiguous().T, torch.cat([f, f], 1)[:, :130], f.repeat_interleave(2, 1)[:, ::2]):
            codes = fusae.codes_from_dense(other)
            assert_equal(codes.values, wanted.values)
            assert_equal(codes.indices, wanted.indices)
            assert_equal(codes.offsets, wanted.offsets)
    assert (wanted.indices.diff()[wanted.row_ids().diff() == 0] > 0).all()


@each_target
def test_torch_func(target):
    f, weight = _dense(), torch.rand(9 * 70)

    def loss(f):
        return (fusae.codes_from_dense(f, 9 * 70).values * weight).square().sum()

    with target.active():
        leaf = f.clone().requires_grad_()
        loss(leaf).backward()
        assert_equal(grad(loss)(f), leaf.grad)
        both = vmap(grad(loss))(torch.stack([f, 2 * f]))
    assert_equal(both, torch.stack([leaf.grad, 2 * leaf.grad]))


@each_target
def test_compile_with_a_capacity(target):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda f: fusae.codes_from_dense(f, 3000).values, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with target.active():
        for n in (6, 11, 33):
            f = _dense(n).requires_grad_()
            assert_equal(compiled(f), fusae.codes_from_dense(f, 3000).values)
            grads = (torch.autograd.grad(v.square().sum(), f)[0] for v in (compiled(f), f))
            assert_equal(*grads)


@each_target
def test_second_derivatives_raise(target):
    f = _dense().requires_grad_()
    with target.active():
        (first,) = torch.autograd.grad(fusae.codes_from_dense(f).values.square().sum(), f, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_from_dense_is_its_front():
    f = _dense().requires_grad_()
    codes = SparseCodes.from_dense(f)
    assert codes.values.requires_grad
    assert_equal(codes.values, fusae.codes_from_dense(f).values)


@pytest.mark.parametrize(
    ("f", "capacity", "error", "message"),
    [
        ([[1.0]], None, TypeError, "f must be a torch.Tensor, got list"),
        (torch.zeros(3), None, ValueError, r"f must have shape \[n, m\], got \[3\]"),
        (torch.zeros(3, 0), None, ValueError, r"f must have between 1 and .* latents .* got shape \[3, 0\]"),
        (torch.zeros(3, 4).int(), None, TypeError, "f must be float32, bfloat16"),
        (torch.zeros(3, 4).to_sparse(), None, TypeError, "f must be a dense tensor"),
        (torch.zeros(3, 4), -1, ValueError, "capacity must be between 0 and .* got -1"),
        (torch.zeros(3, 4), 2.0, TypeError, "capacity must be an int, got float"),
    ],
)
def test_bad_arguments(f, capacity, error, message):
    with pytest.raises(error, match=message):
        fusae.codes_from_dense(f, capacity)
