# SPDX-License-Identifier: Apache-2.0
"""The ops under ``torch.vmap`` and what is built on it: like one call after the other; what cannot work says so."""

import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap

import fusae
from fusae import SparseCodes, _dispatch
from fusae.testing import assert_equal, targets

TARGETS = targets("encode_topk_fwd", "encode_bwd", "decode_fwd", "decode_bwd", "topk_fwd", "topk_bwd")
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
pytestmark = [
    pytest.mark.filterwarnings("error:There is a performance drop"),
    pytest.mark.usefixtures("on_the_targets_device"),
]
B, N, D, M, K = 3, 5, 8, 40, 4


def _ints(*shape):
    """Small integers: every sum is exact, so the way a batch is cut cannot show."""
    return torch.randint(-3, 4, shape).float()


def _encode(x, W, b):
    codes = fusae.encode_topk(x, W, b, K)
    return codes.values, codes.indices


def _encode_aux(x, W, b):
    mask = torch.arange(M) % 3 == 0
    codes, aux = fusae.encode_topk(x, W, b, K, "none", aux_mask=mask, k_aux=6)
    return codes.values, codes.indices, aux.values, aux.indices


def _batch_topk(x, W, b):
    codes, smallest, aux = fusae.encode_batch_topk(x, W, b, K, aux_mask=torch.arange(M) % 3 == 0, k_aux=6)
    return codes.values, aux.values, codes.indices, aux.indices, codes.offsets, smallest


def _threshold(x, W, b):
    codes, l0 = fusae.encode_threshold(x, W, b, 3.0, bandwidth=4.0, capacity=N * M)
    return codes.values, l0, codes.indices, codes.offsets


def _group_max(x, W, b):
    codes = fusae.encode_topk(x, W, b, K, select="group_max")
    return codes.values, codes.indices


def _decode(values, indices, W, b):
    return (fusae.decode(SparseCodes(values, indices, M), W, b),)


def _topk(pre):
    codes = fusae.topk(pre, K)
    return codes.values, codes.indices


def _indices(*batch):
    return torch.rand(*batch, N, M).argsort(-1)[..., :K].int()


CASES = {
    "topk": (_topk, (_ints(B, N, M),), (0,)),
    "topk of a vector": (_topk, (_ints(B, M),), (0,)),
    "topk, last": (_topk, (_ints(N, M, B),), (2,)),
    "encode": (_encode, (_ints(B, N, D), _ints(M, D), _ints(M)), (0, None, None)),
    "encode, middle": (_encode, (_ints(N, B, D), _ints(M, D), _ints(M)), (1, None, None)),
    "encode, weights": (_encode, (_ints(N, D), _ints(B, M, D), _ints(M)), (None, 0, None)),
    "encode, all": (_encode, (_ints(B, N, D), _ints(M, D, B), _ints(B, M)), (0, 2, 0)),
    "encode, aux": (_encode_aux, (_ints(B, N, D), _ints(M, D), _ints(M)), (0, None, None)),
    "group_max": (_group_max, (_ints(B, N, D), _ints(M, D), _ints(M)), (0, None, None)),
    "batch top-k": (_batch_topk, (_ints(B, N, D), _ints(M, D), _ints(M)), (0, None, None)),
    "batch top-k, weights": (_batch_topk, (_ints(N, D), _ints(B, M, D), _ints(M)), (None, 0, None)),
    "threshold": (_threshold, (_ints(B, N, D), _ints(M, D), _ints(M)), (0, None, None)),
    "threshold, all": (_threshold, (_ints(B, N, D), _ints(M, D, B), _ints(B, M)), (0, 2, 0)),
    "decode": (_decode, (_ints(B, N, K), _indices(B), _ints(M, D), _ints(D)), (0, 0, None, None)),
    "decode, values": (_decode, (_ints(B, N, K), _indices(), _ints(M, D), _ints(D)), (0, None, None, None)),
    "decode, indices": (_decode, (_ints(N, K), _indices(B), _ints(M, D), _ints(D)), (None, 0, None, None)),
    "decode, weights": (_decode, (_ints(N, K), _indices(), _ints(B, M, D), _ints(B, D)), (None, None, 0, 0)),
}
each_case = pytest.mark.parametrize(("function", "inputs", "dims"), CASES.values(), ids=CASES.keys())


def _one_by_one(function, inputs, dims):
    size = next(a.shape[at] for a, at in zip(inputs, dims, strict=True) if at is not None)
    pairs = list(zip(inputs, dims, strict=True))
    return [function(*(a if at is None else a.select(at, b) for a, at in pairs)) for b in range(size)]


@each_target
@each_case
def test_vmap_equals_one_call_after_the_other(target, function, inputs, dims):
    inputs = [a.to(target.device) for a in inputs]
    with target.active():
        got, wanted = vmap(function, dims)(*inputs), _one_by_one(function, inputs, dims)
    for g, w in zip(got, zip(*wanted, strict=True), strict=False):
        assert_equal(g, torch.stack(w))
    assert all(len(g) == len(wanted) for g in got)


@each_target
@each_case
def test_gradients_of_a_batch(target, function, inputs, dims):
    """``vmap(grad)``: one gradient for each element, for the weights too."""
    inputs = [a.to(target.device) for a in inputs]
    floats = tuple(i for i, a in enumerate(inputs) if a.is_floating_point())

    def loss(*args):
        return sum((out * out).sum() for out in function(*args) if out.is_floating_point())

    def gradients(*args):
        return grad(loss, floats)(*args)

    with target.active():
        got, wanted = vmap(gradients, dims)(*inputs), _one_by_one(gradients, inputs, dims)
    for g, w in zip(got, zip(*wanted, strict=True), strict=True):
        assert_equal(g, torch.stack(w))


@each_target
def test_a_batch_of_rows_is_one_call(target, monkeypatch):
    calls, original = [], _dispatch.select
    monkeypatch.setattr(_dispatch, "select", lambda op, *rest: calls.append(op) or original(op, *rest))
    with target.active():
        for name in ("topk", "encode", "encode, aux", "decode", "decode, values", "decode, indices"):
            function, inputs, dims = CASES[name]
            calls.clear()
            vmap(function, dims)(*(a.to(target.device) for a in inputs))
            assert len(calls) == 1, name
        (pre,) = CASES["topk"][1]
        calls.clear()
        vmap(grad(lambda pre: fusae.topk(pre, K).values.sum()))(pre.to(target.device))
    assert calls == ["topk_fwd", "topk_bwd"]


@each_target
def test_ragged_codes_with_a_batch_of_values_and_the_jacobian(target):
    codes, W = fusae.topk(_ints(N, M).abs() + 1.0, K).to_ragged(), _ints(M, D)

    def y(values):
        return fusae.decode(SparseCodes(values, codes.indices, M, codes.offsets), W)

    with target.active():
        values = torch.stack([codes.values, 2.0 * codes.values])
        assert_equal(vmap(y)(values), torch.stack([y(values[0]), y(values[1])]))
        jacobian = jacrev(y)(codes.values)
    wanted = torch.zeros(N, D, N * K)
    for entry, row in enumerate(codes.row_ids()):
        wanted[row, :, entry] = W[codes.indices[entry]]
    assert_equal(jacobian, wanted)


def test_vmap_in_vmap():
    pre = torch.randn(2, 3, N, M)
    assert_equal(vmap(vmap(lambda p: fusae.topk(p, K).values))(pre), fusae.topk(pre, K).values)


@each_target
def test_what_vmap_cannot_do(target):
    x, W = _ints(B, N, D), _ints(M, D)
    with target.active():
        with pytest.raises(RuntimeError, match="row-sparse gradients differ in size.* use sparse_grad=False"):
            vmap(grad(lambda W, x: fusae.encode_topk(x, W, None, K, sparse_grad=True).values.sum()), (None, 0))(W, x)
        with pytest.raises(RuntimeError, match="encode_threshold_fwd differ in size .*give a capacity"):
            vmap(lambda x: fusae.encode_threshold(x, W, None, 3.0).values)(x)
        codes = fusae.topk(_ints(N, M), K)
        with pytest.raises(RuntimeError, match="vmap of decode_fwd over .'W_dec'. needs at least one element"):
            vmap(lambda W: fusae.decode(codes, W))(_ints(0, M, D))
        state = [torch.zeros(B, M, D) for _ in range(4)]
        with pytest.raises(RuntimeError, match="adam_rows_ works in place and has no vmap rule; call it once for each"):
            vmap(lambda *s: fusae.adam_rows_(*s, lr=1e-3, step=1))(*state)


def test_there_is_no_forward_mode():
    x, W = _ints(N, D), _ints(M, D)
    codes = fusae.topk(_ints(N, M), K)
    for f, at in (
        (lambda x: fusae.encode_topk(x, W, None, K).values, x),
        (lambda W: fusae.decode(codes, W), W),
        (lambda x: fusae.topk(x, K).values, x),
    ):
        with pytest.raises(NotImplementedError, match="jvp .* forward mode AD"):
            jvp(f, (at,), (at,))
