# SPDX-License-Identifier: Apache-2.0
"""The same bits from run to run, for any number of threads, any other rows in the batch, any instruction set.

Products of the encoders come from a GEMM whose sums may depend on the thread count and the row count; these tests use
integers, whose sums are exact, so that everything after the GEMM is under test.
"""

import pytest
import torch

import fusae
from fusae import _dispatch
from fusae.testing import assert_equal, targets

TARGETS = targets("encode_topk_fwd", "encode_bwd", "decode_fwd", "decode_bwd", "topk_fwd", "topk_bwd", "adam_rows_",
                  "decode_loss_fwd", "decode_loss_bwd", "codes_from_dense_fwd", "codes_from_dense_bwd",
                  "encode_threshold_fwd", "encode_threshold_bwd", "encode_batch_topk_fwd")  # fmt: skip
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
pytestmark = pytest.mark.usefixtures("on_the_targets_device")
N, D, M, K = 301, 33, 3001, 19


def _run(seed: int = 0) -> dict[str, torch.Tensor]:
    """Forward, backward and optimiser of every op. Float inputs wherever no GEMM comes before the result."""
    gen = torch.Generator().manual_seed(seed)
    out = {}
    pre = torch.randn(N, M, generator=gen)
    pre[:, ::7] = pre[:, 3:4]  # ties
    codes = fusae.topk(pre.requires_grad_(), K)
    codes.values.backward(torch.randn(N, K, generator=gen))
    out["topk values"], out["topk indices"], out["topk grad"] = codes.values.detach(), codes.indices, pre.grad

    x, W, b = (torch.randint(-3, 4, s, generator=gen).float().requires_grad_() for s in ((N, D), (M, D), (M,)))
    mask = torch.rand(M, generator=gen) < 0.3
    pair = fusae.encode_topk(x, W, b, K, "none", aux_mask=mask, k_aux=2 * K)
    for name, c in zip(("main", "aux"), pair, strict=True):
        out[f"{name} values"], out[f"{name} indices"] = c.values.detach(), c.indices
    grads = [torch.randn(c.values.shape, generator=gen) for c in pair]
    names = ("grad x", "grad W_enc", "grad b_enc")
    out.update(zip(names, torch.autograd.grad([c.values for c in pair], (x, W, b), grads), strict=True))

    theta = torch.randint(0, 40, (M,), generator=gen).float().requires_grad_()
    found, l0 = fusae.encode_threshold(x, W, b, theta, bandwidth=8.0, straight_through=True)
    batch, smallest, aux = fusae.encode_batch_topk(x, W, b, K, aux_mask=mask, k_aux=K)
    for name, c in (("threshold", found), ("batch", batch), ("batch aux", aux)):
        out[f"{name} values"], out[f"{name} indices"] = c.values.detach(), c.indices
    out["l0"], out["smallest"], out["batch offsets"] = l0.detach(), smallest, batch.offsets
    grads = [torch.randn(t.shape, generator=gen) for t in (found.values, l0, batch.values, aux.values)]
    names = (f"ragged grad {name}" for name in ("x", "W_enc", "b_enc", "threshold"))
    parts = (found.values, l0, batch.values, aux.values)
    out.update(zip(names, torch.autograd.grad(parts, (x, W, b, theta), grads), strict=True))

    for form in ("fixed", "ragged"):
        values = torch.randn(N, K, generator=gen)
        indices = codes.indices.clone()
        indices[:, 0] = torch.where((indices == 5).any(1), indices[:, 0], 5)  # one latent in every row
        c = fusae.SparseCodes(values, indices, M)
        c = c if form == "fixed" else c.to_ragged()
        v, W_dec, b_dec = c.values.requires_grad_(), torch.randn(M, D, generator=gen), torch.randn(D, generator=gen)
        c = fusae.SparseCodes(v, c.indices, M, c.offsets)
        y = fusae.decode(c, W_dec.requires_grad_(), b_dec.requires_grad_())
        out[f"y {form}"] = y.detach()
        grad = torch.randn(y.shape, generator=gen)
        names = (f"grad values {form}", f"grad W_dec {form}", f"grad b_dec {form}")
        out.update(zip(names, torch.autograd.grad(y, (v, W_dec, b_dec), grad, retain_graph=True), strict=True))
        sparse = torch.autograd.grad(fusae.decode(c, W_dec, sparse_grad=True), W_dec, grad)[0]
        out[f"sparse grad {form}"] = sparse.to_dense()

        goal, nested = torch.randn(N, D, generator=gen), [M // 5, M // 3, M]
        loss, *rest = fusae.decode_loss(c, W_dec, b_dec, goal.requires_grad_(), nested, [1.0, 0.5, 2.0])
        out[f"loss {form}"], out[f"sse {form}"], out[f"residual {form}"] = loss.detach(), *rest
        names = (f"loss grad {name} {form}" for name in ("values", "W_dec", "b_dec", "target"))
        out.update(zip(names, torch.autograd.grad(loss, (v, W_dec, b_dec, goal)), strict=True))

    f = torch.randn(N, M, generator=gen).relu().requires_grad_()
    c = fusae.codes_from_dense(f)
    c.values.backward(torch.randn(len(c.values), generator=gen))
    out["codes values"], out["codes indices"], out["codes offsets"] = c.values.detach(), c.indices, c.offsets
    out["grad f"] = f.grad

    state = [torch.rand(M, D, generator=gen) for _ in range(3)]
    options = {"lr": 0.1, "step": 3, "project": True, "renormalise": True}
    fusae.adam_rows_(*state, out["grad W_dec fixed"], **options)
    fusae.adam_rows_(*state, sparse, **options)
    fusae.adam_rows_(*state, sparse, masked=True, **options)
    out.update(zip(("param", "exp_avg", "exp_avg_sq"), state, strict=True))
    return out


def _assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_equal(got[name], value, name, signed_zero=True)


@each_target
def test_same_bits_from_run_to_run(target):
    with target.active():
        _assert_same(_run(), _run())


@each_target
def test_same_bits_for_any_number_of_threads(target):
    results = []
    with target.active():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_run())
    _assert_same(results[1], results[0])
    _assert_same(results[2], results[0])


@each_target
def test_rows_do_not_depend_on_each_other(target):
    """A row's codes and its reconstruction are the same alone, in another order and in a larger batch."""
    x, W = torch.randint(-3, 4, (N, D)).float(), torch.randint(-3, 4, (M, D)).float()
    W_dec = torch.randn(M, D)
    order = torch.randperm(N)
    with target.active():
        codes = fusae.encode_topk(x, W, None, K)
        y = fusae.decode(codes, W_dec)
        shuffled = fusae.encode_topk(x[order], W, None, K)
        assert_equal(shuffled.indices, codes.indices[order])
        assert_equal(fusae.decode(shuffled, W_dec), y[order])
        for i in (0, 17, N - 1):
            alone = fusae.encode_topk(x[i : i + 1], W, None, K)
            assert_equal(alone.indices, codes.indices[i : i + 1])
            assert_equal(fusae.decode(alone, W_dec), y[i : i + 1])


NATIVE = [t for t in targets("encode_topk_fwd", gemms=True) if t.gemm == "native"]


@pytest.mark.parametrize("target", NATIVE, ids=str)
@pytest.mark.parametrize("d", [9, 33, 65, 200])
def test_native_gemm_does_not_depend_on_threads_or_other_rows(target, d):
    """The CPU backend's own GEMM sums in one fixed order: any floats will do. Again and again, to meet a race."""
    x, W, b = torch.randn(N, d), torch.randn(M // 3, d), torch.randn(M // 3)
    with target.active():
        torch.set_num_threads(1)
        alone = fusae.encode_topk(x, W, b, K)
        for _ in range(10):
            for threads in (2, 3):
                torch.set_num_threads(threads)
                codes = fusae.encode_topk(x, W, b, K)
                assert_equal(codes.indices, alone.indices)
                assert_equal(codes.values, alone.values)
        some = fusae.encode_topk(x[5:42], W, b, K)
    assert_equal(some.indices, alone.indices[5:42])
    assert_equal(some.values, alone.values[5:42])


ISAS = [t for t in TARGETS if t.backend == "cpu"]


@pytest.mark.skipif(len(ISAS) < 2, reason="fewer than two CPU instruction sets run here")
def test_cpu_instruction_sets_select_alike():
    """Selections are comparisons and copies: not one bit may differ. Sums may be in another order: within rounding."""
    results = []
    for target in ISAS:
        with target.active():
            results.append(_run())
    for other in results[1:]:
        for name, value in results[0].items():
            if name.startswith(("topk", "main", "aux")):
                assert_equal(other[name], value, name, signed_zero=True)
            else:
                torch.testing.assert_close(
                    other[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
                )


@each_target
def test_inputs_are_left_alone(target):
    """No op writes to its inputs, `adam_rows_` apart, and that only to its first three."""
    calls = []

    def spy(op, args, kwargs, backend=None, original=_dispatch.select):
        run = original(op, args, kwargs, backend)

        def check(*args, **kwargs):
            kept = [a for a in args if isinstance(a, torch.Tensor)][3 if op == "adam_rows_" else 0 :]
            before = [a.clone() for a in kept]
            result = run(*args, **kwargs)
            for a, b in zip(kept, before, strict=True):
                assert_equal(a, b, f"an input of {op}", signed_zero=a.is_floating_point())
            calls.append(op)
            return result

        return check

    with target.active(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "select", spy)
        _run()
    assert set(calls) == set(_dispatch.ops())
