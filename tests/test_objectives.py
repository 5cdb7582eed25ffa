# SPDX-License-Identifier: Apache-2.0
"""Every training loss and all its gradients against the same in plain torch over ``[n, m]``: `fusae.testing.losses`."""

import copy
import dataclasses

import pytest
import torch

from fusae.nn import (
    Moment,
    SparseCoder,
    SparseCoderConfig,
    init_firing_rate_,
    init_thresholds_,
    init_uniform_encoder_,
)
from fusae.nn.objectives import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from fusae.testing import losses as dense
from fusae.testing.compare import assert_grads, assert_within_budget

D, M, K = 6, 20, 4
TOP = {"k_aux": 5}
BATCH = {"k_aux": 5, "select": "batch_topk"}
ABS = {"k_aux": 5, "select": "abs", "activation": "none"}
CROSS = {"pre_bias": False, "sites": (2, 4)}
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
    "batch_topk crosscoder": (BATCH | CROSS | {"select_by_norm": True}, *both(BatchTopK, dense.top_k)),
    "relu": ({"select": "relu"}, *both(ReLU, dense.relu, sparsity=0.3)),
    "relu plain L1": ({"select": "relu"}, *both(ReLU, dense.relu, sparsity=0.3, by_norm=False)),
    "relu crosscoder": ({"select": "relu"} | CROSS, *both(ReLU, dense.relu, sparsity=0.3)),
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
    "jumprelu tanh crosscoder": (JUMP | CROSS, *jump("tanh", 0.3, True, 0.2, 1.5)),
    "matryoshka": (BATCH, *both(Matryoshka, dense.matryoshka, prefixes=(3, 8, M), weights=(0.5, 2.0, 1.0))),
    "matryoshka of unused latents": (BATCH, *both(Matryoshka, dense.matryoshka, prefixes=(1, M), weights=(1, 0.0))),
    "matryoshka topk": (TOP, *both(Matryoshka, dense.matryoshka, prefixes=(10, M), weights=(1.0, 1.0))),
    "matryoshka skip": (BATCH | SKIP, *both(Matryoshka, dense.matryoshka, prefixes=(10, M), weights=(1.0, 1.0))),
    "hierarchical": (TOP, HierarchicalTopK(), lambda *at: dense.hierarchical(*at, range(1, K + 1))),
    "hierarchical, some ranks": (TOP, *both(HierarchicalTopK, dense.hierarchical, ranks=(1, 3, K))),
    "hierarchical abs skip": (ABS | SKIP, *both(HierarchicalTopK, dense.hierarchical, ranks=(2, K))),
}  # fmt: skip


def coder_of(fields, seed=0, sparse_grad=False, d=D, **more):
    """A coder away from its start, with biases below 0: a row of zeros (less `b_dec`) has no positive latent."""
    config = SparseCoderConfig(**({"d": d, "m": M, "k": K, "dtype": "float64"} | fields | more))
    coder = SparseCoder(config, seed=seed, sparse_grad=sparse_grad)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in coder.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.5 * noise).to(parameter.dtype)
        coder.b_enc.copy_(-0.1 - coder.b_enc.abs())
        for name in ("threshold", "b_mag"):
            if hasattr(coder, name):
                getattr(coder, name).abs_()
    return coder


def batch_of(coder, n=11, seed=1):
    """Rows and targets; row 3 has negative pre-activations only."""
    config, generator = coder.config, torch.Generator().manual_seed(seed)
    x = torch.randn(n, config.d, generator=generator, dtype=torch.float64)
    if n > 3:
        x[3] = coder.b_dec.detach() if config.pre_bias else 0.0
    y = None if config.d_out is None else torch.randn(n, config.d_out, generator=generator, dtype=torch.float64)
    return x.to(config.torch_dtype), None if y is None else y.to(config.torch_dtype)


def gradients(loss, coder, x):
    """Dense gradients by name; 0 where there is none."""
    named = {**dict(coder.named_parameters()), "x": x}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(of) if grad is None else grad.to_dense()
        for (name, of), grad in zip(named.items(), grads, strict=True)
    }


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


def dead_of(which):
    return {
        "none given": None,
        "some": torch.arange(M) % 3 == 0,
        "fewer than k_aux": torch.arange(M) < 2,
        "empty": torch.zeros(M, dtype=torch.bool),
        "all": torch.ones(M, dtype=torch.bool),
    }[which]


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


# What the forms do beside their losses.


def test_multi_topk_reaches_latents_that_are_not_among_the_k():
    coder = coder_of(TOP)
    x, _ = batch_of(coder)
    unused = ~(coder.encode(x).to_dense() != 0).any(0)
    plain, multi = (
        gradients(TopK(0.0, w)(coder, x, None, Moment()).loss, coder, x.requires_grad_()) for w in (0.0, 1.0)
    )
    assert unused.any() and not plain["W_enc"][unused].any() and multi["W_enc"][unused].any()


def test_batch_topk_keeps_a_running_threshold():
    coder = coder_of(BATCH)
    wanted = 0.0
    for step in range(30):
        x, _ = batch_of(coder, seed=step)
        smallest = coder.select(x)[1]
        BatchTopK(threshold_decay=0.9)(coder, x, None, Moment(step=step))
        decay = min(0.9, step / (step + 10))
        wanted = decay * wanted + (1 - decay) * smallest.item()
        assert coder.threshold.item() == pytest.approx(wanted, rel=1e-12)
    x, _ = batch_of(coder, n=200, seed=99)
    p = dense.pre_of(coder, x)
    torch.testing.assert_close(coder.eval().encode(x).to_dense(), p * (p > coder.threshold))
    assert abs(coder.encode(x).l0.double().mean().item() - K) < 1
    before = coder.threshold.clone()
    BatchTopK()(coder, x, None, Moment(step=30))  # in eval mode: nothing is learnt from it
    assert torch.equal(coder.threshold, before)
    coder.train()
    BatchTopK()(coder, x[:0].new_zeros(2, D) + coder.b_dec.detach(), None, Moment(step=30))  # nothing is positive
    assert torch.equal(coder.threshold, before)


def test_matryoshka_keeps_it_too():
    one, other = coder_of(BATCH), coder_of(BATCH)
    x, _ = batch_of(one)
    BatchTopK(threshold_decay=0.5)(one, x, None, Moment(step=20))
    Matryoshka((5, M), threshold_decay=0.5)(other, x, None, Moment(step=20))
    assert one.threshold == other.threshold > 0


def test_thresholds_are_clamped():
    coder = coder_of(JUMP)
    with torch.no_grad():
        coder.threshold[:5] = -1.0
    after = coder.clamp_().threshold
    assert not after[:5].any() and (after[5:] > 0).all()
    for fields in ({"select": "relu"}, BATCH, TOP):
        before = coder_of(fields)
        assert all(map(torch.equal, before.state_dict().values(), copy.deepcopy(before).clamp_().state_dict().values()))


def test_jumprelu_defaults_by_penalty():
    coder = coder_of(JUMP)
    x, _ = batch_of(coder)
    for penalty, sparsity in (("l0", 1e-3), ("l0_squared", 1e-3), ("l0_mean_squared", 1.0), ("tanh", 10 / D)):
        scale = 4 * D**0.5 if penalty == "tanh" else None
        named = JumpReLU(penalty, sparsity, 0.5, tanh_scale=scale)(coder, x, None, Moment())
        assert torch.equal(JumpReLU(penalty, bandwidth=0.5)(coder, x, None, Moment()).loss, named.loss)


def test_anthropic_recipe_is_the_published_one_at_another_scale():
    """On rows of √d times the size, with everything that is in units of activations scaled, the published numbers."""
    unit, big = coder_of(JUMP), coder_of(JUMP)
    with torch.no_grad():
        for name in ("b_enc", "b_dec", "threshold"):
            getattr(big, name).mul_(D**0.5)
    x, _ = batch_of(unit)
    dead = dead_of("some")
    published = JumpReLU("tanh", 10.0, 2.0, True, 4.0, 3e-6)
    loss = JumpReLU.anthropic(D)(unit, x, None, Moment(dead, variance=1.0)).loss
    theirs = published(big, D**0.5 * x, None, Moment(dead, variance=1.0)).loss
    torch.testing.assert_close(D * loss, theirs)
    ours, wanted = (gradients(at, c, x.requires_grad_()) for at, c in ((loss, unit), (theirs, big)))
    torch.testing.assert_close(D * ours["W_enc"], wanted["W_enc"])
    torch.testing.assert_close(D**0.5 * ours["threshold"], wanted["threshold"])


def test_starting_points_of_jumprelu():
    coder = SparseCoder(SparseCoderConfig(D, 5000, 4, select="threshold", dtype="float64"))
    init_uniform_encoder_(init_thresholds_(coder, 0.1 / D**0.5), seed=3)
    bound = D**-0.5
    assert coder.W_enc.abs().max() <= bound and coder.W_enc.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    x = torch.randn(1000, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    init_firing_rate_(coder, x, 0.02)
    fired = (coder.encode(x).to_dense() > 0).sum(0)
    assert (fired == 20).all()
    plain = init_firing_rate_(
        SparseCoder(SparseCoderConfig(D, 30, 4, select="relu", pre_bias=False, dtype="float64")), x, 0.5
    )
    assert ((plain.encode(x).to_dense() > 0).sum(0) == 500).all()
    with pytest.raises(ValueError, match="rate must be between 1 / 1000 and 1 - 1 / 1000"):
        init_firing_rate_(coder, x, 1e-4)
    with pytest.raises(ValueError, match="coder must have select 'threshold', got 'topk'"):
        init_thresholds_(coder_of(TOP), 0.1)


def test_terms():
    coder = coder_of(BATCH)
    x, _ = batch_of(coder)
    result = Matryoshka((3, 8, M))(coder, x, None, Moment())
    assert set(result.terms) == {"mse_3", "mse_8"}
    torch.testing.assert_close(result.loss.detach(), result.mse + sum(result.terms.values()))
    coder = coder_of(JUMP)
    result = JumpReLU(sparsity=0.5, preact_coefficient=0.25)(coder, x, None, Moment(dead_of("some"), ramp=0.5))
    wanted = result.mse + 0.5 * 0.5 * result.terms["sparsity"] + 0.25 * result.terms["preact"]
    torch.testing.assert_close(result.loss.detach(), wanted)
    torch.testing.assert_close(result.terms["sparsity"], result.codes.l0.double().mean())


@pytest.mark.parametrize(
    "objective, fields, message",
    [
        (TopK(), BATCH, "TopK needs a coder with select 'topk' or 'abs' or 'group_max', got 'batch_topk'"),
        (TopK(multi_topk=0.1), {"select": "group_max"}, "TopK needs a coder with select 'topk' or 'abs'"),
        (BatchTopK(), TOP, "BatchTopK needs a coder with select 'batch_topk', got 'topk'"),
        (ReLU(), JUMP, "ReLU needs a coder with select 'relu', got 'threshold'"),
        (ReLU(), {"select": "relu", "gated": True}, "ReLU needs a coder that is not gated"),
        (Gated(), {"select": "relu"}, "Gated needs a coder that is gated"),
        (JumpReLU(), {"select": "relu"}, "JumpReLU needs a coder with select 'threshold'"),
        (JumpReLU(), JUMP | {"select_by_norm": True}, "without select_by_norm; call coder.fold_norms_"),
        (Matryoshka((5, M)), JUMP, "Matryoshka needs a coder with select 'batch_topk' or"),
        (Matryoshka((5, 10)), BATCH, "prefixes must ascend and end with m = 20"),
        (HierarchicalTopK(), BATCH, "HierarchicalTopK needs a coder with select 'topk' or 'abs'"),
        (HierarchicalTopK((1, 3)), TOP, "prefixes must ascend and end with k = 4"),
    ],
)
def test_a_coder_that_does_not_fit(objective, fields, message):
    coder = coder_of(fields)
    with pytest.raises(ValueError, match=message):
        objective(coder, batch_of(coder)[0], None, Moment())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TopK(-1.0), "aux_coefficient must be at least 0"),
        (lambda: TopK(multi_topk="1"), "multi_topk must be a plain number"),
        (lambda: BatchTopK(threshold_decay=1.0), "threshold_decay must be at least 0 and less than 1"),
        (lambda: ReLU(float("nan")), "sparsity must be at least 0"),
        (lambda: ReLU(by_norm=1), "by_norm must be true or false"),
        (lambda: JumpReLU("l1"), "penalty must be one of 'l0', 'l0_squared'"),
        (lambda: JumpReLU(bandwidth=0.0), "bandwidth must be greater than 0"),
        (lambda: JumpReLU(weights=(1.0,)), "weights are of prefixes, which were not given"),
        (lambda: Matryoshka(()), "prefixes must be a tuple of ascending whole numbers"),
        (lambda: Matryoshka((4, 4)), r"prefixes must ascend, got \[4, 4\]"),
        (lambda: Matryoshka((0, 4)), "prefixes must be at least 1, got 0"),
        (lambda: Matryoshka((2, 4), (1.0,)), "weights must be 2 numbers"),
        (lambda: HierarchicalTopK((3, 1)), "ranks must ascend"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
