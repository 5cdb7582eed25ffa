# SPDX-License-Identifier: Apache-2.0
"""Every training loss and all its gradients against the same in plain torch over ``[n, m]``: `fusae.testing.losses`."""

import dataclasses

import pytest
import torch

from fusae import _dispatch
from fusae.nn import Moment, SparseCoder
from fusae.nn.objectives import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from fusae.testing import losses as dense
from fusae.testing.coders import CROSSCODER, D, K, M, coder_of, dead_of, gradients
from fusae.testing.compare import assert_grads, assert_within_budget

TOP = {"k_aux": 5}
BATCH = {"k_aux": 5, "select": "batch_topk"}
ABS = {"k_aux": 5, "select": "abs", "activation": "none"}
SKIP = {"pre_bias": False, "skip": True, "d_out": 5}
JUMP = {"select": "threshold"}
WIDE = 0.8  # of a window: some entries of most rows are in it


def jump(penalty, sparsity, through=False, preact=0.0, scale=1.0, prefixes=None):
    ours = JumpReLU(penalty, sparsity, WIDE, through, scale, preact, prefixes)
    given = dict(scale=scale, preact=preact, prefixes=prefixes)
    return ours, lambda *at: dense.jump_relu(*at, penalty, sparsity, WIDE, through, **given)


def both(ours, theirs, **options):
    return ours(**options), lambda *at: theirs(*at, **options)


# Name: fields of the coder, the objective, the same in plain torch.
FORMS = {
    "topk": (TOP, *both(TopK, dense.top_k, aux_coefficient=0.25)),
    "topk of 1": (TOP | {"k": 1}, *both(TopK, dense.top_k)),
    "topk of all": (TOP | {"k": M, "k_aux": M}, *both(TopK, dense.top_k)),
    "topk by norm": (TOP | {"select_by_norm": True}, *both(TopK, dense.top_k)),
    "topk without relu": (TOP | {"activation": "none"}, *both(TopK, dense.top_k)),
    "topk skip": (TOP | SKIP, *both(TopK, dense.top_k)),
    "abs": (ABS, *both(TopK, dense.top_k)),
    "group_max": (TOP | {"select": "group_max"}, *both(TopK, dense.top_k)),
    "multi_topk": (TOP, *both(TopK, dense.top_k, multi_topk=0.125)),
    "multi_topk of all": (TOP | {"k": 7}, *both(TopK, dense.top_k, multi_topk=0.5)),
    "multi_topk abs": (ABS, *both(TopK, dense.top_k, multi_topk=0.125)),
    "multi_topk skip": (TOP | SKIP, *both(TopK, dense.top_k, multi_topk=0.125)),
    "batch_topk": (BATCH, *both(BatchTopK, dense.top_k)),
    "batch_topk skip": (BATCH | SKIP, *both(BatchTopK, dense.top_k)),
    "batch_topk crosscoder": (BATCH | CROSSCODER | {"select_by_norm": True}, *both(BatchTopK, dense.top_k)),
    "relu": ({"select": "relu"}, *both(ReLU, dense.relu, sparsity=0.3)),
    "relu plain L1": ({"select": "relu"}, *both(ReLU, dense.relu, sparsity=0.3, by_norm=False)),
    "relu crosscoder": ({"select": "relu"} | CROSSCODER, *both(ReLU, dense.relu, sparsity=0.3)),
    "relu skip": ({"select": "relu"} | SKIP, *both(ReLU, dense.relu, sparsity=0.3)),
    "gated": ({"select": "relu", "gated": True}, *both(Gated, dense.gated, sparsity=0.3)),
    "gated skip": ({"select": "relu", "gated": True} | SKIP, *both(Gated, dense.gated, sparsity=0.3)),
    "jumprelu l0": (JUMP, *jump("l0", 0.1)),
    "jumprelu l0, straight through": (JUMP, *jump("l0", 0.1, True)),
    "jumprelu l0, reviving": (JUMP, *jump("l0", 0.1, preact=0.2)),
    "jumprelu l0_squared": (JUMP, *jump("l0_squared", 0.1)),
    "jumprelu l0_squared, nested": (JUMP, *jump("l0_squared", 0.1, prefixes=(5, 11, M))),
    "jumprelu l0_mean_squared": (JUMP, *jump("l0_mean_squared", 1.0)),
    "jumprelu l0 skip": (JUMP | SKIP, *jump("l0", 0.1, True, preact=0.2)),
    "jumprelu tanh": (JUMP, *jump("tanh", 0.3, True, 0.2, 1.5)),
    "jumprelu tanh, thresholds alone": (JUMP, *jump("tanh", 0.3, False, 0.2, 1.5)),
    "jumprelu tanh crosscoder": (JUMP | CROSSCODER, *jump("tanh", 0.3, True, 0.2, 1.5)),
    "matryoshka": (BATCH, *both(Matryoshka, dense.matryoshka, prefixes=(3, 8, M), weights=(0.5, 2.0, 1.0))),
    "matryoshka of unused latents": (BATCH, *both(Matryoshka, dense.matryoshka, prefixes=(1, M), weights=(1, 0.0))),
    "matryoshka topk": (TOP, *both(Matryoshka, dense.matryoshka, prefixes=(10, M), weights=(1.0, 1.0))),
    "matryoshka skip": (BATCH | SKIP, *both(Matryoshka, dense.matryoshka, prefixes=(10, M), weights=(1.0, 1.0))),
    "hierarchical": (TOP, HierarchicalTopK(), lambda *at: dense.hierarchical(*at, range(1, K + 1))),
    "hierarchical, some ranks": (TOP, *both(HierarchicalTopK, dense.hierarchical, ranks=(1, 3, K))),
    "hierarchical abs skip": (ABS | SKIP, *both(HierarchicalTopK, dense.hierarchical, ranks=(2, K))),
}  # fmt: skip


def batch_of(coder, n=11, seed=1):
    """Rows and targets; row 3 has negative pre-activations only."""
    config, generator = coder.config, torch.Generator().manual_seed(seed)
    x = torch.randn(n, config.d, generator=generator, dtype=torch.float64)
    if n > 3:
        x[3] = coder.b_dec.detach() if config.pre_bias else 0.0
    y = None if config.d_out is None else torch.randn(n, config.d_out, generator=generator, dtype=torch.float64)
    return x.to(config.torch_dtype), None if y is None else y.to(config.torch_dtype)


def compare(form, sparse_grad, x_of=lambda x: x, **moment):
    """One loss on one batch, exactly; gives the result, the coder and the gradients for further checks."""
    fields, objective, theirs = FORMS[form]
    coder = coder_of(fields, sparse_grad=sparse_grad)
    x, y = batch_of(coder)
    x, y = x_of(x).requires_grad_(), None if y is None else x_of(y)
    moment = Moment(**moment)
    result = objective(coder, x, y, moment)
    expected = theirs(coder, x, x if y is None else y, moment)
    torch.testing.assert_close(result.loss, expected, rtol=1e-11, atol=1e-13)
    mine, wanted = gradients(result.loss, coder, x), gradients(expected, coder, x)
    for name in wanted:
        torch.testing.assert_close(mine[name], wanted[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    return result, coder, mine


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dead", ["none given", "some", "fewer than k_aux", "empty", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_all_gradients(form, dead, sparse_grad):
    _, coder, grads = compare(form, sparse_grad, dead=dead_of(dead), ramp=0.7)
    moved = {name for name, grad in grads.items() if grad.any()}
    assert moved == set(grads), f"no gradient in the case: {set(grads) - moved}"


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("rows", ["one", "one without positives", "all alike", "all negative", "given variance"])
@pytest.mark.parametrize("form", FORMS)
def test_odd_batches(form, rows, sparse_grad):
    pick = {
        "one": lambda x: x[:1],
        "one without positives": lambda x: x[3:4],
        "all alike": lambda x: x[5].expand(11, -1).clone(),
        "all negative": lambda x: x[3].expand(5, -1).clone(),
        "given variance": lambda x: x,
    }[rows]
    variance = 2.5 if rows == "given variance" else None
    result, _, grads = compare(form, sparse_grad, pick, dead=dead_of("some"), variance=variance)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    if "negative" in rows and FORMS[form][0].get("activation") != "none":
        assert not result.codes.values.any()


@pytest.mark.parametrize("form", FORMS)
def test_what_a_loss_reports(form):
    fields, objective, _ = FORMS[form]
    coder = coder_of(fields)
    x, y = batch_of(coder)
    result = objective(coder, x[None], None if y is None else y[None], Moment(dead_of("some"), ramp=0.5))
    f, target = result.codes.to_dense(), x if y is None else y
    torch.testing.assert_close(result.reconstruction, dense.output(coder, f, x).detach())
    torch.testing.assert_close(result.sse, (target - result.reconstruction).square().sum())
    torch.testing.assert_close(result.mse, dense.error(target, result.reconstruction, Moment()))
    assert result.loss.requires_grad and result.loss.ndim == 0
    assert (result.aux is not None) == (coder.config.k_aux > 0)
    for name, value in [("mse", result.mse), ("sse", result.sse), *result.terms.items()]:
        assert value.ndim == 0 and not value.requires_grad, name
    assert not result.codes.values.requires_grad and not result.reconstruction.requires_grad


def as_dtype(coder, dtype):
    other = SparseCoder(dataclasses.replace(coder.config, dtype=dtype), seed=None, sparse_grad=coder.sparse_grad)
    with torch.no_grad():
        for name, value in coder.state_dict().items():
            getattr(other, name).copy_(value)
    return other


@pytest.mark.parametrize("form", FORMS)
def test_float32_within_its_budget(form):
    fields, objective, theirs = FORMS[form]
    coder = as_dtype(coder_of(fields), "float32")
    exact = as_dtype(coder, "float64")
    x, y = batch_of(coder)
    moment, results = Moment(dead_of("some"), variance=3.0), []
    for c, loss in ((coder, objective), (coder, theirs), (exact, theirs)):
        at, to = x.to(c.W_enc.dtype).requires_grad_(), None if y is None else y.to(c.W_enc.dtype)
        value = loss(c, at, to, moment).loss if loss is objective else loss(c, at, at if to is None else to, moment)
        results.append((value, gradients(value, c, at)))
    (loss, ours), (loss_32, plain), (loss_64, oracle) = results
    assert loss.dtype == torch.float32
    assert_within_budget(loss[None], loss_32[None], loss_64[None], "loss")
    for name in ours:
        assert_grads(ours[name], plain[name], oracle[name], f"gradient of {name}")


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("form", FORMS)
def test_autocast(form, sparse_grad):
    fields, objective, _ = FORMS[form]
    coder = as_dtype(coder_of(fields, sparse_grad=sparse_grad), "float32")
    x, y = batch_of(coder, n=64)
    moment, results = Moment(dead_of("some"), variance=3.0), []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = objective(coder, x.requires_grad_(), y, moment).loss
        assert loss.dtype == torch.float32
        results.append((loss, gradients(loss, coder, x)))
    (loss, ours), (wanted, theirs) = results
    torch.testing.assert_close(loss, wanted, rtol=0.02, atol=0)
    for name, grad in ours.items():
        assert grad.dtype == theirs[name].dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), theirs[name].flatten(), dim=0)
        assert cosine > 0.95, (name, cosine)


@pytest.mark.parametrize("form", [f for f in FORMS if "nested" not in f and "matryoshka" not in f])
def test_sparse_gradients_are_of_the_touched_rows(form):
    fields, objective, _ = FORMS[form]
    coder = coder_of(fields, sparse_grad=True, m=400, **({"k_aux": 5} if "k_aux" in fields else {}))
    with torch.no_grad():
        coder.b_enc[5:200] = -1e3
    x, y = batch_of(coder)
    dead = torch.zeros(400, dtype=torch.bool)
    dead[:3] = True
    objective(coder, x, y, Moment(dead)).loss.backward()
    for name in ("W_enc", "W_dec"):
        grad = getattr(coder, name).grad
        assert grad.is_sparse, name
        if fields.get("activation") != "none":
            assert not grad.coalesce().to_dense()[5:200].any() and grad.coalesce().indices().numel() <= 205, name


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("form", FORMS)
def test_no_dependence_on_the_number_of_threads(form, sparse_grad):
    """Whole numbers in the encoder: its product is exact, so that the sums of the loss are under test."""
    fields, objective, _ = FORMS[form]
    coder = as_dtype(coder_of(fields, sparse_grad=sparse_grad), "float32")
    generator, results = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_dec"):
            value = getattr(coder, name)
            value.copy_(torch.randint(-2, 3, value.shape, generator=generator))
    x = torch.randint(-5, 6, (3000, D), generator=generator).float()
    y = None if coder.config.d_out is None else torch.randn(3000, coder.config.d_out, generator=generator)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = objective(coder, x.requires_grad_(), y, Moment(dead_of("some")))
            results.append({"loss": result.loss, **result.terms, **gradients(result.loss, coder, x)})
    finally:
        torch.set_num_threads(before)
    for name, wanted in results[0].items():
        assert all(torch.equal(other[name], wanted) for other in results), name


# --- in 16 bits -----------------------------------------------------------------------------------------------------

# Relative L2 error of the reference's loss and gradients, in units of eps of the dtype.
LOSS_BOUND, GRADIENT_BOUND = 1.0, 3.0


def sixteenths(x):
    return (x * 16).round() / 16


def pair_of(fields, dtype):
    """The same coder in 16 and in 64 bits."""
    wide = coder_of(fields)
    with torch.no_grad():
        wide.b_dec.copy_(sixteenths(wide.b_dec))
    narrow = SparseCoder(type(wide.config).from_dict({**wide.config.to_dict(), "dtype": dtype}))
    narrow.load_state_dict({name: value.to(narrow.state_dict()[name]) for name, value in wide.state_dict().items()})
    wide.load_state_dict({name: value.to(wide.state_dict()[name]) for name, value in narrow.state_dict().items()})
    return narrow, wide


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_of_16_bits_are_within_their_budget(form, dtype):
    """Against float64 autograd of the dense statement on the same weights.

    The rows and `b_dec` are multiples of 1/16, so that their difference is exact: what is selected is then the same in
    16 and in 64 bits, and what is left is the rounding of values, of reconstructions and of gradients. The budget is
    twice the error of the reference backend in that dtype; that error, of the same losses, has a bound of its own.
    """
    fields, objective, theirs = FORMS[form]
    narrow, wide = pair_of(fields, dtype)
    generator = torch.Generator().manual_seed(1)
    # More rows than columns: the gradients of rows and of latents are sums of several terms.
    x = sixteenths(torch.randn(24, wide.config.d, generator=generator, dtype=torch.float64))
    y = None
    if wide.config.d_out is not None:
        y = sixteenths(torch.randn(24, wide.config.d_out, generator=generator, dtype=torch.float64))
    moment = Moment(dead_of("some"), variance=2.0, ramp=0.7)

    def of(coder, loss, dtype):
        rows = x.to(dtype, copy=True).requires_grad_()
        target = rows if y is None else y.to(dtype)
        out = loss(coder, rows, target, moment)
        out = getattr(out, "loss", out)
        return out.detach(), gradients(out, coder, rows)

    oracle, wanted = of(wide, theirs, torch.float64)
    short = narrow.config.torch_dtype
    loss, grads = of(narrow, objective, short)
    with _dispatch.backend("reference"):
        reference, plain = of(narrow, objective, short)
    assert loss.dtype == torch.float32
    assert_within_budget(loss, reference, oracle, "loss")
    eps = torch.finfo(short).eps
    assert abs(float(reference - oracle)) <= LOSS_BOUND * eps * float(oracle)
    for name, truth in wanted.items():
        assert_grads(grads[name], plain[name], truth, name)
        relative = float((plain[name].double() - truth).norm() / truth.norm())
        assert truth.any() and relative <= GRADIENT_BOUND * eps, f"{name}: {relative / eps:.2f} eps"
