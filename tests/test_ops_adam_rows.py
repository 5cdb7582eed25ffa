# SPDX-License-Identifier: Apache-2.0
"""`adam_rows_` over many steps, against the optimisers of torch, and with gradients as autograd hands them over."""

import pytest
import torch

import fusae
from fusae.testing import assert_equal, assert_within_budget, targets

each_target = pytest.mark.parametrize("target", targets("adam_rows_"), ids=str)
pytestmark = pytest.mark.usefixtures("on_the_targets_device")
STEPS = 30


def _state(m=40, d=17, dtype=torch.float32):
    param = torch.nn.functional.normalize(torch.randn(m, d), dim=1).to(dtype)
    return [param, torch.zeros(m, d), torch.zeros(m, d)]


def _theirs(kind, param, grads, **options):
    """The trajectory's end in torch, in the dtype of `param`."""
    param = param.clone().requires_grad_()
    optimizer = kind([param], **options)
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
    return param.detach()


@each_target
@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.Adam, {}), (torch.optim.Adam, {"weight_decay": 0.1}), (torch.optim.AdamW, {"weight_decay": 0.1})],
    ids=["adam", "l2", "adamw"],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_many_steps_of_dense_adam(target, kind, options, sparse):
    """A sparse gradient without `masked` means zero elsewhere: rows without one still move by their momentum."""
    state = _state()
    start, grads = state[0].clone(), []
    for _ in range(STEPS):
        grad = torch.randn(40, 17)
        grads.append(grad * (torch.rand(40, 1) < 0.3) if sparse else grad)
    with target.active():
        for step, grad in enumerate(grads, 1):
            given = grad.to_sparse(1) if sparse else grad
            fusae.adam_rows_(*state, given, lr=1e-2, step=step, decoupled=kind is torch.optim.AdamW, **options)
    torch_options = {"lr": 1e-2, "foreach": False, **options}
    truth = _theirs(kind, start.double(), [g.double() for g in grads], **torch_options)
    assert_within_budget(state[0], _theirs(kind, start, grads, **torch_options), truth, "param")


@each_target
def test_many_steps_of_masked_adam(target):
    state = _state()
    start = state[0].clone()
    grads = [(torch.randn(40, 17) * (torch.rand(40, 1) < 0.3)).to_sparse(1) for _ in range(STEPS)]
    with target.active():
        for step, grad in enumerate(grads, 1):
            fusae.adam_rows_(*state, grad, lr=1e-2, step=step, masked=True)
    truth = _theirs(torch.optim.SparseAdam, start.double(), grads, lr=1e-2)
    assert_within_budget(state[0], _theirs(torch.optim.SparseAdam, start, grads, lr=1e-2), truth, "param")


@each_target
def test_decoder_rows_stay_on_the_unit_sphere(target):
    """Projected and renormalised, and the first moments' step is tangent: the loss along the row never changes it."""
    state = _state()
    with target.active():
        for step in range(1, STEPS):
            before = state[0].clone()
            fusae.adam_rows_(*state, torch.randn(40, 17), lr=1e-2, step=step, project=True, renormalise=True)
            assert not torch.equal(state[0], before)
            torch.testing.assert_close(state[0].norm(dim=1), torch.ones(40), rtol=0, atol=3e-7)
        fresh = _state()
        rows = fresh[0].clone()
        fusae.adam_rows_(*fresh, 5.0 * rows, lr=1e-2, step=1, project=True, eps=1.0)
        torch.testing.assert_close(fresh[0], rows, rtol=0, atol=1e-6)


@each_target
def test_an_uncoalesced_gradient_is_added_up(target):
    rows = torch.tensor([[7, 3, 7, 0]])
    values = torch.randn(4, 17)
    sparse = torch.sparse_coo_tensor(rows, values, (40, 17), check_invariants=False)
    assert not sparse.is_coalesced()
    dense = torch.zeros(40, 17).index_add_(0, rows[0], values)
    one, other = _state(), _state()
    other[0].copy_(one[0])
    with target.active():
        fusae.adam_rows_(*one, sparse, lr=1e-2, step=1)
        fusae.adam_rows_(*other, dense, lr=1e-2, step=1)
    for a, b in zip(one, other, strict=True):
        assert_equal(a, b)


@each_target
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stays_in_its_row(target, bad):
    clean, dirty = _state(), _state()
    dirty[0].copy_(clean[0])
    grad = torch.randn(40, 17)
    broken = grad.clone()
    broken[3, 5] = bad
    with target.active():
        fusae.adam_rows_(*clean, grad, lr=1e-2, step=1, project=True, renormalise=True)
        fusae.adam_rows_(*dirty, broken, lr=1e-2, step=1, project=True, renormalise=True)
    assert not dirty[0][3].isfinite().all()
    others = torch.arange(40) != 3
    for a, b in zip(dirty, clean, strict=True):
        assert_equal(a[others], b[others])


@each_target
def test_a_large_step_count(target):
    state = _state()
    with target.active():
        fusae.adam_rows_(*state, torch.randn(40, 17), lr=1e-2, step=10**9)
    assert all(t.isfinite().all() for t in state)


@each_target
def test_autograd_sees_that_the_tensors_were_written(target):
    state = _state()
    weight = state[0].requires_grad_()
    stale = weight.pow(2).sum()
    before = [t._version for t in state]
    with target.active(), torch.no_grad():
        fusae.adam_rows_(*state, torch.randn(40, 17), lr=1e-2, step=1)
    assert all(t._version > v for t, v in zip(state, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@each_target
def test_inference_tensors_are_stepped_too(target):
    with target.active(), torch.inference_mode():
        state = _state()
        before = state[0].clone()
        fusae.adam_rows_(*state, torch.randn(40, 17), lr=1e-2, step=1)
        assert not torch.equal(state[0], before)


@each_target
@pytest.mark.parametrize("rows", [[3, 40], [-1, 3], [3, 3], [7, 3], [2**40, 2**41]], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_are_no_set_of_rows_are_refused(target, rows, masked):
    """A sparse gradient can be built without checks and can claim to be coalesced: nothing is written then."""
    state, values = _state(), torch.randn(2, 17)
    before = [t.clone() for t in state]
    grad = torch.sparse_coo_tensor(
        torch.tensor([rows]), values, (40, 17), is_coalesced=True, check_invariants=False
    )
    with target.active(), pytest.raises(IndexError, match="grad: rows must"):
        fusae.adam_rows_(*state, grad, lr=1e-2, step=1, masked=masked)
    for a, b in zip(state, before, strict=True):
        assert_equal(a, b)
