# SPDX-License-Identifier: Apache-2.0
"""`decode_dense`: all gradients of the dense product, from the non-zeros."""

import pytest
import torch

from fusae.integrations._dense import decode_dense, transformed


def _inputs(dtype=torch.float64, n=7, m=40, d=9):
    g = torch.Generator().manual_seed(0)
    f = torch.randn(n, m, generator=g, dtype=torch.float64)
    f = torch.where(torch.rand(n, m, generator=g) < 0.2, f, 0.0)
    W, b = torch.randn(m, d, generator=g, dtype=torch.float64), torch.randn(d, generator=g, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (f, W, b)]


@pytest.mark.parametrize("shape", [(7,), (7, 1), (1, 7), ()])
def test_equals_the_dense_product_with_every_gradient(shape):
    f, W, b = _inputs()
    lead = f[0] if shape == () else f.reshape(*shape, f.shape[1])
    y, wanted = decode_dense(lead, W, b), lead @ W + b
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad(y, (f, W, b), g), torch.autograd.grad(wanted, (f, W, b), g), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_latents_that_are_off_get_their_gradient():
    f, W, b = _inputs()
    (grad,) = torch.autograd.grad(decode_dense(f, W, b).sum(), f)
    assert (grad[f == 0] != 0).all()


def test_second_derivatives_are_those_of_the_dense_product():
    inputs = _inputs(n=3, m=8, d=4)
    assert torch.autograd.gradgradcheck(decode_dense, inputs)


def test_a_decoder_held_the_other_way_round():
    f, W, b = _inputs()
    held = W.detach().T.contiguous().requires_grad_()  # [d, m], as nn.Linear holds a decoder
    (grad,) = torch.autograd.grad(decode_dense(f, held.T, b).square().sum(), held)
    (wanted,) = torch.autograd.grad((f @ held.T + b).square().sum(), held)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


def test_autocast_multiplies_in_its_dtype():
    f, W, b = _inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = decode_dense(f, W, b)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert f.grad.dtype == W.grad.dtype == b.grad.dtype == torch.float32


def test_transforms_are_seen():
    assert not transformed()
    seen = []
    torch.func.vmap(lambda x: (seen.append(transformed()), x)[1])(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        seen.append(transformed())
    assert seen == [True, True]
