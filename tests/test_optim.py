# SPDX-License-Identifier: Apache-2.0
"""`fusae.optim.Adam` against torch's optimisers, over 50 steps."""

import copy

import pytest
import torch

from fusae.optim import Adam

STEPS, M, D = 50, 7, 5
TOL = {torch.float32: 2e-6, torch.float64: 1e-14}


def parameters(dtype, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(M, D, dtype=dtype).requires_grad_(), torch.randn(M, dtype=dtype).requires_grad_()]


def gradients(step, dtype, sparse):
    """(matrix gradient, vector gradient) of a step; sparse: over some rows, unsorted, with a duplicate."""
    gen = torch.Generator().manual_seed(1000 + step)
    vector = torch.randn(M, generator=gen, dtype=dtype)
    if not sparse:
        return torch.randn(M, D, generator=gen, dtype=dtype), vector
    rows = torch.tensor([4, 1, 4]) if step % 2 else torch.tensor([6, 0, 2])
    values = torch.randn(3, D, generator=gen, dtype=dtype)
    return torch.sparse_coo_tensor(rows[None], values, (M, D), check_invariants=True), vector


def run(optimizer, params, dtype, steps=range(STEPS), *, sparse=False, dense_copy=False):
    for step in steps:
        matrix, vector = gradients(step, dtype, sparse)
        params[0].grad = matrix.to_dense() if dense_copy else matrix
        params[1].grad = vector
        optimizer.step()
    return params


def close(ours, theirs, dtype):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=TOL[dtype], atol=TOL[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
def test_equals_torch_adam(dtype, sparse, decoupled, weight_decay):
    options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": weight_decay}
    ours, theirs = parameters(dtype), parameters(dtype)
    run(Adam(ours, decoupled=decoupled, **options), ours, dtype, sparse=sparse)
    torch_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    run(torch_class(theirs, **options), theirs, dtype, sparse=sparse, dense_copy=True)
    close(ours, theirs, dtype)


def test_a_sparse_gradient_still_moves_the_rows_it_lacks():
    params = parameters(torch.float64)
    optimizer = Adam(params, lr=0.01)
    run(optimizer, params, torch.float64, [0], sparse=True)
    before = params[0].detach().clone()
    run(optimizer, params, torch.float64, [1], sparse=True)
    moved = (params[0] - before).abs().amax(1) > 1e-4
    assert moved.tolist() == [True, True, True, False, True, False, True], "3 and 5 have never had a gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_equals_torch_sparse_adam(dtype):
    options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-5}
    ours, theirs = parameters(dtype), parameters(dtype)
    start = ours[0].detach().clone()
    run(Adam(ours, masked=True, **options), ours, dtype, sparse=True)
    run(torch.optim.SparseAdam([theirs[0]], **options), theirs, dtype, sparse=True)
    reference = parameters(dtype)
    run(torch.optim.Adam(reference, **options), reference, dtype, sparse=True, dense_copy=True)
    close([ours[0]], [theirs[0]], dtype)
    close([ours[1]], [reference[1]], dtype)  # a vector is never masked
    assert torch.equal(ours[0][[3, 5]], start[[3, 5]])


@pytest.mark.parametrize("sparse", [False, True])
def test_project_and_renormalise_equal_the_written_out_steps(sparse):
    dtype = torch.float64
    ours, theirs = parameters(dtype), parameters(dtype)
    for params in (ours, theirs):
        with torch.no_grad():
            params[0] /= params[0].norm(dim=1, keepdim=True)
    run(Adam(ours, lr=0.01, project=True, renormalise=True), ours, dtype, sparse=sparse)
    plain = torch.optim.Adam(theirs, lr=0.01)
    for step in range(STEPS):
        matrix, theirs[1].grad = gradients(step, dtype, sparse)
        matrix, w = matrix.to_dense(), theirs[0].detach()
        theirs[0].grad = matrix - (matrix * w).sum(1, keepdim=True) * w
        plain.step()
        with torch.no_grad():
            theirs[0] /= theirs[0].norm(dim=1, keepdim=True)
    close(ours, theirs, dtype)
    torch.testing.assert_close(ours[0].norm(dim=1), torch.ones(M, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_dict_round_trip_goes_on_with_the_same_bits(dtype):
    whole, halves = parameters(dtype), parameters(dtype)
    run(Adam(whole, lr=0.01), whole, dtype, sparse=True)
    first = Adam(halves, lr=0.01)
    run(first, halves, dtype, range(20), sparse=True)
    saved = copy.deepcopy(first.state_dict())
    moments = torch.float64 if dtype == torch.float64 else torch.float32
    assert saved["state"][0]["exp_avg_sq"].dtype == moments
    second = Adam(halves, lr=0.5)
    second.load_state_dict(saved)
    assert second.state[halves[0]]["exp_avg_sq"].dtype == moments
    run(second, halves, dtype, range(20, STEPS), sparse=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_load_state_dict_refuses_other_shapes():
    params = parameters(torch.float32)
    optimizer = Adam(params)
    run(optimizer, params, torch.float32, range(1))
    other = Adam([torch.zeros(M, D + 1, requires_grad=True), torch.zeros(M, requires_grad=True)])
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 must have shape \[7, 6\], got \[7, 5\]"):
        other.load_state_dict(optimizer.state_dict())


def test_load_state_dict_refuses_a_state_of_torch_and_changes_nothing():
    params = parameters(torch.float32)
    theirs, ours = torch.optim.Adam(params), Adam(params, lr=0.25)
    run(theirs, params, torch.float32, range(1))
    with pytest.raises(ValueError, match=r"group 0 lacks decoupled, masked, .*; it is not of a fusae.optim"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.25 and not ours.state
    run(ours, params, torch.float32, range(1))
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][0] |= {"lr": -1.0}
    with pytest.raises(ValueError, match="lr must be at least 0"):
        ours.load_state_dict(saved)
    saved = copy.deepcopy(ours.state_dict())
    del saved["state"][1]["exp_avg_sq"]
    with pytest.raises(ValueError, match="state_dict: parameter 1 lacks exp_avg_sq"):
        ours.load_state_dict(saved)
    assert ours.param_groups[0]["lr"] == 0.25 and ours.state[params[0]]["step"] == 1


def test_groups_and_schedulers():
    def schedule(cls):
        params = parameters(torch.float64)
        optimizer = cls([params[0]], lr=0.1)
        optimizer.add_param_group({"params": [params[1]], "lr": 0.02, "betas": (0.5, 0.9)})
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(STEPS):
            params[0].grad, params[1].grad = gradients(step, torch.float64, False)
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.02 / (1 + STEPS))
        return params

    close(schedule(Adam), schedule(torch.optim.Adam), torch.float64)


def test_closure_and_missing_gradient():
    params = parameters(torch.float32)
    optimizer = Adam(params, lr=0.1)
    before = params[1].detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first
    assert torch.equal(params[1], before)
    assert not optimizer.state[params[1]]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_equals_torch(sparse, max_norm):
    params, plain = parameters(torch.float64), parameters(torch.float64)
    grads = gradients(3, torch.float64, sparse)
    for p, q, g in zip(params, plain, grads, strict=True):
        p.grad, q.grad = g.clone(), g.to_dense().clone()
    norm = Adam(params).clip_grad_norm_(max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(plain, max_norm))
    close([p.grad.to_dense() for p in params], [p.grad for p in plain], torch.float64)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_clip_of_a_non_finite_norm_equals_torch(bad):
    params, plain = parameters(torch.float64), parameters(torch.float64)
    for p, q in zip(params, plain, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        p.grad[0] = q.grad[0] = bad
    Adam(params).clip_grad_norm_(1.0), torch.nn.utils.clip_grad_norm_(plain, 1.0)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)
        rest = p.grad[1:]
        assert p.grad[0].isnan().all() and ((rest == 0) if bad == torch.inf else rest.isnan()).all()


@pytest.mark.parametrize("seed", range(6))
def test_clip_does_not_depend_on_the_number_of_threads(seed):
    before, generator, norms = torch.get_num_threads(), torch.Generator().manual_seed(seed), []
    weight = torch.randn(4096, 96, generator=generator).requires_grad_()
    weight.grad = torch.randn(4096, 96, generator=generator)
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            norms += [[float(Adam([weight], project=project).clip_grad_norm_(1e9)) for project in (True, False)]]
    finally:
        torch.set_num_threads(before)
    assert all(pair == norms[0] for pair in norms), norms


@pytest.mark.parametrize("sparse", [False, True])
def test_clip_measures_the_projected_gradient(sparse):
    params = parameters(torch.float64)
    params[0].grad, _ = gradients(3, torch.float64, sparse)
    w, grad = params[0].detach(), params[0].grad.to_dense()
    projected = grad - (grad * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
    torch.testing.assert_close(Adam(params, project=True).clip_grad_norm_(1.0), projected.norm())
    assert (projected.norm() - grad.norm()).abs() > 0.1


def test_a_failed_step_is_not_counted():
    params = parameters(torch.float32)
    optimizer = Adam(params, masked=True)
    params[0].grad = torch.ones(M, D)
    with pytest.raises(ValueError, match="masked=True needs a sparse_coo grad"):
        optimizer.step()
    assert optimizer.state[params[0]]["step"] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"lr": float("nan")}, "lr must be .* got nan"),
        ({"lr": torch.tensor(0.1)}, "lr must be a plain number, got Tensor"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be at least 0 and less than 1, got 1"),
        ({"betas": 0.9}, "betas must be a pair"),
        ({"eps": float("inf")}, "eps must be"),
        ({"weight_decay": 0.1, "masked": True}, "weight_decay must be 0 with masked=True"),
        ({"project": 1}, "project must be true or false, got int 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Adam(parameters(torch.float32), **options)


def test_bad_parameters_and_groups():
    with pytest.raises(ValueError, match=r"contiguous \[m, d\] matrices .* got shape \[5, 7\]"):
        Adam([torch.zeros(M, D).T.requires_grad_()])
    with pytest.raises(ValueError, match=r"got shape \[2, 2, 2\]"):
        Adam([torch.zeros(2, 2, 2, requires_grad=True)])
    optimizer = Adam([torch.zeros(M, D, requires_grad=True)])
    with pytest.raises(ValueError, match=r"unknown options \['renormalize'\]"):
        optimizer.add_param_group({"params": [torch.zeros(M, requires_grad=True)], "renormalize": True})
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group({"params": [torch.zeros(M, requires_grad=True)], "lr": -1.0})
    with pytest.raises(ValueError, match="got shape"):
        optimizer.add_param_group({"params": [torch.zeros(1, 1, 1, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1


def test_empty_sparse_gradient():
    params, plain = parameters(torch.float64), parameters(torch.float64)
    nothing = torch.zeros(0, D, dtype=torch.float64)
    rows = torch.zeros(1, 0, dtype=torch.int64)
    empty = torch.sparse_coo_tensor(rows, nothing, (M, D), check_invariants=True)
    ours, theirs = Adam(params, weight_decay=0.1), torch.optim.Adam(plain, weight_decay=0.1)
    params[0].grad, plain[0].grad = empty, torch.zeros(M, D, dtype=torch.float64)
    ours.step(), theirs.step()
    close(params, plain, torch.float64)
