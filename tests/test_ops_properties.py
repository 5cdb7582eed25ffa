# SPDX-License-Identifier: Apache-2.0
"""Properties that hold for every input, on random ones (hypothesis). Small integers: sums are exact."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusae
from fusae.testing import assert_equal, targets

TARGETS = targets("encode_topk_fwd", "encode_bwd", "decode_fwd", "decode_bwd", "topk_fwd", "topk_bwd")
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
pytestmark = pytest.mark.usefixtures("on_the_targets_device")
few = settings(
    max_examples=15, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@st.composite
def problems(draw):
    """x ``[n, d]``, W ``[m, d]``, b ``[m]`` of small integers, and k."""
    n, d, m = draw(st.integers(0, 9)), draw(st.integers(1, 20)), draw(st.integers(1, 700))
    k = draw(st.integers(1, min(m, draw(st.sampled_from([4, 40, 700])))))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([1, 3, 9]))
    x, W, b = (torch.randint(-spread, spread + 1, s, generator=gen).float() for s in ((n, d), (m, d), (m,)))
    return x, W, b, k


@each_target
@few
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_permuting_latents_permutes_codes(target, problem, seed):
    x, W, _, k = problem
    order = torch.randperm(len(W), generator=torch.Generator().manual_seed(seed))
    x, W = x.clone(), W.clone()
    x[:, 0], W[:, 0] = 1.0, torch.arange(len(W)) / 1024  # every latent its own fraction: no ties
    with target.active():
        codes, moved = fusae.encode_topk(x, W, None, k, "none"), fusae.encode_topk(x, W[order], None, k, "none")
    assert_equal(moved.values, codes.values)
    assert_equal(order[moved.indices.long()].int(), codes.indices)


@each_target
@few
@given(problem=problems(), exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_values(target, problem, exponent):
    x, W, b, k = problem
    scale = 2.0**exponent
    with target.active():
        codes, scaled = fusae.encode_topk(x, W, b, k), fusae.encode_topk(scale * x, W, scale * b, k)
    assert_equal(scaled.indices, codes.indices)
    assert_equal(scaled.values, scale * codes.values)


@each_target
@few
@given(problem=problems(), shift=st.integers(-50, 50))
def test_a_common_shift_of_the_bias_changes_no_selection(target, problem, shift):
    x, W, b, k = problem
    with target.active():
        codes, shifted = fusae.encode_topk(x, W, b, k, "none"), fusae.encode_topk(x, W, b + shift, k, "none")
    assert_equal(shifted.indices, codes.indices)
    assert_equal(shifted.values, codes.values + shift)


@each_target
@few
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_the_order_of_rows_does_not_matter(target, problem, seed):
    x, W, b, k = problem
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    with target.active():
        codes, moved = fusae.encode_topk(x, W, b, k), fusae.encode_topk(x[order], W, b, k)
    assert_equal(moved.indices, codes.indices[order])
    assert_equal(moved.values, codes.values[order])


@each_target
@few
@given(problem=problems())
def test_topk_of_everything_is_a_stable_sort(target, problem):
    x, W, b, _ = problem
    pre = x @ W.T + b
    values, indices = torch.sort(pre, dim=1, descending=True, stable=True)
    with target.active():
        for codes in (fusae.topk(pre, len(W)), fusae.encode_topk(x, W, b, len(W), "none")):
            assert_equal(codes.indices, indices.int())
            assert_equal(codes.values, values)


@each_target
@few
@given(problem=problems())
def test_a_smaller_k_is_a_prefix(target, problem):
    x, W, b, k = problem
    with target.active():
        more, fewer = fusae.encode_topk(x, W, b, k), fusae.encode_topk(x, W, b, (k + 1) // 2)
    assert_equal(more.indices[:, : (k + 1) // 2], fewer.indices)
    assert_equal(more.values[:, : (k + 1) // 2], fewer.values)


@each_target
@few
@given(problem=problems())
def test_encode_is_topk_of_the_dense_product(target, problem):
    x, W, b, k = problem
    with target.active():
        fused, plain = fusae.encode_topk(x, W, b, k), fusae.topk(x @ W.T + b, k)
    assert_equal(fused.indices, plain.indices)
    assert_equal(fused.values, plain.values.relu())


@each_target
@few
@given(problem=problems())
def test_the_auxiliary_selection_is_independent_of_the_main_one(target, problem):
    """Of a mask: the same as a selection with everything else pushed out of the way. Of no mask: nothing changes."""
    x, W, b, k = problem
    mask = torch.arange(len(W)) % 3 != 1
    k_aux = min(k, int(mask.sum()))
    with target.active():
        main, aux = fusae.encode_topk(x, W, b, k, "none", aux_mask=mask, k_aux=k_aux)
        alone = fusae.encode_topk(x, W, b, k, "none")
        pushed = fusae.encode_topk(x, W, torch.where(mask, b, -(2.0**20)), k_aux, "none")
    assert_equal(main.indices, alone.indices)
    assert_equal(main.values, alone.values)
    assert_equal(aux.indices, pushed.indices)
    assert_equal(aux.values, pushed.values)


@each_target
@few
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_decode_is_the_transpose_of_its_gradient(target, problem, seed):
    """``<decode(a), y> = <a, grad_values(y)>``, and both equal the dense products; decode is linear in the values."""
    x, W, b, k = problem
    y = torch.randint(-3, 4, x.shape, generator=torch.Generator().manual_seed(seed)).float()
    with target.active():
        codes = fusae.topk(x @ W.T + b, k)
        values = codes.values.requires_grad_()
        out = fusae.decode(codes, W)
        (grad,) = torch.autograd.grad(out, values, y)
        doubled = fusae.decode(fusae.SparseCodes(2 * values, codes.indices, codes.m), W)
    assert_equal(out, codes.to_dense() @ W)
    assert (out * y).double().sum() == (values * grad).double().sum()
    assert_equal(doubled, 2 * out)


@each_target
@few
@given(problem=problems())
def test_ragged_and_fixed_width_codes_decode_alike(target, problem):
    x, W, b, k = problem
    with target.active():
        codes = fusae.encode_topk(x, W, b, k)
        assert_equal(fusae.decode(codes.to_ragged(), W), fusae.decode(codes, W))
