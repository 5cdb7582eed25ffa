# SPDX-License-Identifier: Apache-2.0
"""How the ops meet PyTorch: opcheck, torch.compile, autocast, inference mode, torch.func."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fusae
from fusae import _dispatch
from fusae.testing import CASES, Target, assert_equal, targets

RAW = ("encode_topk_fwd", "encode_bwd", "decode_fwd", "decode_bwd", "topk_fwd", "topk_bwd")
TARGETS = targets(*RAW)
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)


def _raw_calls(target: Target):
    """Raw ops with the arguments that public calls give them: ``(op, args, kwargs)``."""
    seen = []

    def spy(op, args, kwargs, backend=None, original=_dispatch.select):
        run = original(op, args, kwargs, backend)

        def record(*args, **kwargs):
            seen.append((op, args, kwargs))
            return run(*args, **kwargs)

        return record

    original, _dispatch.select = _dispatch.select, spy
    try:
        wanted = ("topk-n37-m96", "encode_topk-n36", "encode_topk-n37-d64-m5000-k16-aux_all",
                  "decode-n36", "decode-n5-d7-m63-k1-normal-ragged", "adam_rows_-m300-d96-masked",
                  "decode_loss-n36", "decode_loss-n5-d7-m63-k1-normal-ragged", "codes_from_dense-n5-",
                  "codes_from_dense-n37-m96-normal-density0.1-capacity", "adam_rows_-m1-",
                  "encode_threshold-n36", "encode_threshold-n199-d64-m257", "encode_threshold-n19-d96-m300",
                  "encode_threshold-n0", "encode_batch_topk-n36", "encode_batch_topk-n37-d7", "encode_batch_topk-n0",
                  "encode_topk-n36-d7-m96-k4-group")  # fmt: skip
        for case in CASES:
            if not str(case).startswith(wanted):
                continue
            inputs = case.inputs(torch.float32, device=target.device)
            if "W_enc" in inputs:
                inputs["x"].requires_grad_(), inputs["W_enc"].requires_grad_()
            if "W_dec" in inputs:
                inputs["codes"].values.requires_grad_(), inputs["W_dec"].requires_grad_()
            for name in ("pre", "f"):
                if name in inputs:
                    inputs[name].requires_grad_()
            if "bandwidth" in inputs and isinstance(inputs["threshold"], torch.Tensor):
                inputs["threshold"].requires_grad_()
            with target.active():
                for extra in ({}, {"sparse_grad": True}) if "W_enc" in inputs or "W_dec" in inputs else ({},):
                    out = case.call({**inputs, **extra})
                    for o in out if isinstance(out, tuple) else (out,):
                        if o is not None and (isinstance(o, fusae.SparseCodes) or o.requires_grad):
                            (o.values if isinstance(o, fusae.SparseCodes) else o).sum().backward(retain_graph=True)
    finally:
        _dispatch.select = original
    return seen


@each_target
def test_opcheck_of_every_raw_op(target):
    """Schema (what is mutated), fake tensors, and ahead-of-time dispatch with dynamic sizes."""
    calls = _raw_calls(target)
    assert {op for op, _, _ in calls} == set(_dispatch.ops())
    with target.active():
        for name, args, kwargs in calls:
            op = getattr(torch.ops.fusae, name).default
            args = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            torch.library.opcheck(op, args, kwargs)


# --- torch.compile --------------------------------------------------------------------------------------------------


def _step(x, W_enc, b_enc, W_dec, b_dec, k):
    codes = fusae.encode_topk(x, W_enc, b_enc, k)
    return fusae.decode(codes, W_dec, b_dec), codes.values, codes.indices


def _aux_step(x, W_enc, b_enc, W_dec, b_dec, k):
    mask = b_enc > 0
    codes, aux = fusae.encode_topk(x, W_enc, b_enc, k, "none", aux_mask=mask, k_aux=2 * k)
    return fusae.decode(codes, W_dec, b_dec), aux.values, aux.indices


def _topk_step(x, W_enc, b_enc, W_dec, b_dec, k):
    codes = fusae.topk(torch.nn.functional.linear(x, W_enc, b_enc), k)
    return fusae.decode(codes, W_dec, b_dec), codes.values, codes.indices


def _parameters(m=40, d=8):
    return [t.requires_grad_() for t in (torch.randn(m, d), torch.randn(m), torch.randn(m, d), torch.randn(d))]


def _batch_step(x, W_enc, b_enc, W_dec, b_dec, k):
    codes, smallest, aux = fusae.encode_batch_topk(x, W_enc, b_enc, k, aux_mask=b_enc > 0, k_aux=2 * k)
    return fusae.decode(codes, W_dec, b_dec), codes.values + smallest, codes.indices, aux.values


def _threshold_step(x, W_enc, b_enc, W_dec, b_dec, k):
    threshold = b_enc.abs()  # stands for a parameter; k entries of storage for each latent
    codes, l0 = fusae.encode_threshold(x, W_enc, b_enc, threshold, bandwidth=0.5, capacity=40 * len(x))
    return fusae.decode(codes, W_dec, b_dec), codes.values + k, codes.indices, l0


def _group_step(x, W_enc, b_enc, W_dec, b_dec, k):
    codes = fusae.encode_topk(x, W_enc, b_enc, 8, select="group_max")
    return fusae.decode(codes, W_dec, b_dec), codes.values * k, codes.indices


STEPS = {"main": _step, "aux": _aux_step, "topk": _topk_step, "batch": _batch_step, "threshold": _threshold_step,
         "group": _group_step}  # fmt: skip


@each_target
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_compile_whole_graph_once_for_all_sizes(target, step):
    """``fullgraph=True``, one compilation for every n and k, same bits as eager, forward and backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    parameters, graphs = _parameters(), set()
    with target.active():
        for n, k in ((5, 3), (9, 3), (9, 4), (33, 7)):
            x = torch.randn(n, 8)
            wanted, got = step(x, *parameters, k), compiled(x, *parameters, k)
            for a, b in zip(got, wanted, strict=True):
                assert_equal(a, b)
            for a, b in zip(
                torch.autograd.grad(got[0].pow(2).sum() + got[1].sum(), parameters),
                torch.autograd.grad(wanted[0].pow(2).sum() + wanted[1].sum(), parameters),
                strict=True,
            ):
                assert_equal(a, b)
            graphs.add(counter.frame_count)
    # A float argument makes dynamo trace twice before it compiles once.
    assert graphs == {2 if step is _threshold_step else 1}


@each_target
def test_compile_with_as_many_entries_as_there_are(target):
    """Without a capacity the number of entries is known when the op has run: still one graph."""

    def step(x, W_enc, b_enc, W_dec, b_dec):
        codes = fusae.encode_threshold(x, W_enc, b_enc, 1.0)
        return fusae.decode(codes, W_dec, b_dec), codes.values.sum()

    torch._dynamo.reset()
    parameters = _parameters()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with target.active():
        for n in (5, 9):
            x = torch.randn(n, 8)
            for a, b in zip(compiled(x, *parameters), step(x, *parameters), strict=True):
                assert_equal(a, b)


def test_compile_bad_arguments_still_raise():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, W, k: fusae.encode_topk(x, W, None, k).values, backend="eager", dynamic=True)
    with pytest.raises(Exception, match="k must be between 1 and m = 40, got 41"):
        compiled(torch.randn(5, 8), torch.randn(40, 8), 41)


def test_compile_keeps_the_backend_it_was_traced_with():
    torch._dynamo.reset()
    x, W = torch.randn(5, 8), torch.randn(40, 8)
    compiled = torch.compile(
        lambda x: fusae.topk(x @ W.T, 3, backend="reference").values, fullgraph=True, backend="aot_eager"
    )
    assert_equal(compiled(x), fusae.topk(x @ W.T, 3, backend="reference").values)


def test_fake_tensors_past_two_to_the_31():
    """Shapes alone: n·m, m·d and n·k beyond int32."""
    with FakeTensorMode():
        x, W = torch.empty(3_000_000, 4096), torch.empty(1 << 20, 4096)
        values, indices, _, _ = torch.ops.fusae.encode_topk_fwd.default(x, W, None, None, None, 1024, 0, "relu", "topk")
        y = torch.ops.fusae.decode_fwd.default(values, indices, None, W, None)
    assert values.shape == indices.shape == (3_000_000, 1024) and indices.dtype == torch.int32
    assert y.shape == (3_000_000, 4096)


# --- autocast, inference mode, torch.func ---------------------------------------------------------------------------


@each_target
def test_autocast(target):
    """As ``linear``: inputs are taken in the autocast dtype, gradients come back in the dtype of the leaves."""
    x, (W_enc, b_enc, W_dec, b_dec) = torch.randn(5, 8, requires_grad=True), _parameters()
    half = [t.detach().bfloat16() for t in (x, W_enc, b_enc, W_dec, b_dec)]
    with target.active():
        with torch.autocast(target.device.type, torch.bfloat16):
            y, values, indices = _step(x, W_enc, b_enc, W_dec, b_dec, 3)
        y.float().pow(2).sum().backward()
        wanted = _step(*half, 3)
    assert y.dtype == values.dtype == torch.bfloat16 and indices.dtype == torch.int32
    for got, want in zip((y, values, indices), wanted, strict=True):
        assert_equal(got, want)
    for leaf in (x, W_enc, b_enc, W_dec, b_dec):
        assert leaf.grad.dtype == torch.float32 and leaf.grad.any()


@each_target
def test_autocast_takes_mixed_dtypes(target):
    x, (W_enc, b_enc, W_dec, b_dec) = torch.randn(5, 8), _parameters()
    with target.active(), torch.autocast(target.device.type, torch.bfloat16):
        codes = fusae.encode_topk(x.bfloat16(), W_enc, b_enc, 3)
        assert fusae.decode(codes, W_dec, b_dec).dtype == torch.bfloat16


@each_target
def test_inference_mode(target):
    x, parameters = torch.randn(5, 8), _parameters()
    with target.active():
        wanted = _step(x, *parameters, 3)
        with torch.inference_mode():
            got = _step(x, *parameters, 3)
            inside = torch.randn(5, 8)
            fusae.topk(inside, 3)
    assert got[0].is_inference() and not got[0].requires_grad
    for a, b in zip(got, wanted, strict=True):
        assert_equal(a, b.detach())


@each_target
def test_torch_func_grad(target):
    x, parameters = torch.randn(5, 8), [p.detach() for p in _parameters()]

    def loss(parameters):
        y, values, _ = _step(x, *parameters, 3)
        return (y - x).pow(2).sum() + values.sum()

    with target.active():
        got = torch.func.grad(loss)(parameters)
        leaves = [p.clone().requires_grad_() for p in parameters]
        wanted = torch.autograd.grad(loss(leaves), leaves)
    for a, b in zip(got, wanted, strict=True):
        assert_equal(a, b)


@each_target
def test_functional_call_and_checkpointing(target):
    from torch.utils.checkpoint import checkpoint

    x, parameters = torch.randn(5, 8), _parameters()
    with target.active():
        plain = torch.autograd.grad(_step(x, *parameters, 3)[0].sum(), parameters)
        saved = checkpoint(lambda *p: _step(x, *p, 3)[0], *parameters, use_reentrant=False)
        again = torch.autograd.grad(saved.sum(), parameters)
    for a, b in zip(again, plain, strict=True):
        assert_equal(a, b)
