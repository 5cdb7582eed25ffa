# SPDX-License-Identifier: Apache-2.0
"""The comparisons reject planted errors of every kind, and say what is wrong."""

import math

import pytest
import torch

from fusae import reference
from fusae.testing import (
    assert_equal,
    assert_grads,
    assert_same_nonfinite,
    assert_topk,
    assert_within_budget,
    selection_band,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _triple(dtype, rows=200, columns=33):
    """A result, the reference with other rounding errors, and the truth."""
    oracle = torch.randn(rows, columns, dtype=torch.float64)
    noise = torch.finfo(dtype).eps / 4 * oracle.abs()
    actual = (oracle + noise * torch.randn_like(oracle).clamp(-1, 1)).to(dtype)
    reference_ = (oracle + noise * torch.randn_like(oracle).clamp(-1, 1)).to(dtype)
    return actual, reference_, oracle


# --- assert_equal, assert_same_nonfinite ----------------------------------------------------------------------------


def test_equal_takes_nan_and_signed_zero_as_documented():
    a = torch.tensor([1.0, math.nan, -0.0, math.inf])
    assert_equal(a, torch.tensor([1.0, -math.nan, 0.0, math.inf]))
    with pytest.raises(AssertionError, match="1 of 4 elements differ, first at .2.: got -0.0, wanted 0.0"):
        assert_equal(a, torch.tensor([1.0, math.nan, 0.0, math.inf]), signed_zero=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.tensor([1.0, 2.0000002]), r"1 of 2 elements differ, first at \[1\]"),
        (torch.tensor([1.0, math.nan]), "got 2.0, wanted nan"),
        (torch.tensor([1.0]), r"shape \[1\] wanted, got \[2\]"),
        (torch.tensor([1.0, 2.0], dtype=torch.float64), "dtype torch.float64 wanted, got torch.float32"),
    ],
)
def test_equal_rejects(other, message):
    with pytest.raises(AssertionError, match=message):
        assert_equal(torch.tensor([1.0, 2.0]), other)


def test_integers_are_compared():
    with pytest.raises(AssertionError, match="got 1, wanted 2"):
        assert_equal(torch.tensor([0, 1]), torch.tensor([0, 2]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_lost_and_invented_nonfinite_values(value):
    clean, dirty = torch.zeros(3, 4), torch.zeros(3, 4)
    dirty[1, 2] = value
    with pytest.raises(AssertionError, match=r"differs at 1 of 12 places, first at \[1, 2\]"):
        assert_same_nonfinite(clean, dirty)
    with pytest.raises(AssertionError, match=r"differs at 1 of 12 places, first at \[1, 2\]"):
        assert_same_nonfinite(dirty, clean)


def test_nan_in_place_of_inf():
    with pytest.raises(AssertionError, match="NaN differs"):
        assert_same_nonfinite(torch.tensor([math.nan]), torch.tensor([math.inf]))


# --- assert_within_budget -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_errors_are_within_budget(dtype):
    assert_within_budget(*_triple(dtype))
    assert_grads(*_triple(dtype))


def test_empty_results_are_within_budget():
    empty = torch.empty(0, 5)
    assert_within_budget(empty, empty, empty.double())
    assert_grads(empty, empty, empty.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element(dtype):
    actual, reference_, oracle = _triple(dtype)
    actual[17, 3] += 20 * torch.finfo(dtype).eps * float(oracle.abs().max())
    with pytest.raises(AssertionError, match=r"exceeds the budget .* at \[17, 3\].*1 of 6600 elements over budget"):
        assert_within_budget(actual, reference_, oracle)


def test_a_lost_nan_and_a_wrong_value_beside_one():
    actual, reference_, oracle = _triple(torch.float32)
    reference_[0, 0] = oracle[0, 0] = math.nan
    with pytest.raises(AssertionError, match="NaN differs"):
        assert_within_budget(actual, reference_, oracle)
    actual[0, 0] = math.nan
    assert_within_budget(actual, reference_, oracle)
    actual[0, 1] += 1.0
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(actual, reference_, oracle)


def test_overflow_of_the_dtype_is_judged_by_the_reference():
    oracle = torch.tensor([[1e6, 1.0]], dtype=torch.float64)
    overflown = oracle.to(torch.float16)
    assert_within_budget(overflown, overflown, oracle)
    with pytest.raises(AssertionError, match=r"\+Inf differs"):
        assert_within_budget(torch.tensor([[65504.0, 1.0]], dtype=torch.float16), overflown, oracle)


def test_wrong_dtype_and_shape():
    actual, reference_, oracle = _triple(torch.float32)
    with pytest.raises(AssertionError, match="dtype torch.float32 wanted, got torch.float64"):
        assert_within_budget(actual.double(), reference_, oracle)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(actual[:-1], reference_, oracle)


# --- assert_grads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.01, 0.99, -1.0])
def test_a_scaled_gradient(dtype, factor):
    actual, reference_, oracle = _triple(dtype, 2000)
    with pytest.raises(AssertionError, match="budget|relative L2|signed bias"):
        assert_grads((oracle * factor).to(dtype), reference_, oracle)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_gradient_rounded_towards_zero_shows_as_bias(dtype):
    actual, reference_, oracle = _triple(dtype, 2000)
    actual = (oracle * (1 - torch.finfo(dtype).eps)).to(dtype)
    with pytest.raises(AssertionError, match="signed bias -"):
        assert_grads(actual, reference_, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_a_dropped_row_cannot_hide(dtype, scale):
    """Also a row far smaller than the rest, below the element budget of the whole."""
    if dtype == torch.float16 and scale < 1e-3:
        scale = 1e-3  # stays normal in float16
    actual, reference_, oracle = _triple(dtype)
    oracle[7] *= scale
    for t in (actual, reference_):
        t[7] = oracle[7].to(dtype)
    assert_grads(actual, reference_, oracle)
    actual[7] = 0.0
    with pytest.raises(AssertionError):
        assert_grads(actual, reference_, oracle)


def test_the_message_names_the_dropped_row():
    actual, reference_, oracle = _triple(torch.bfloat16)
    oracle[7] *= 1e-3
    actual[7], reference_[7] = 0.0, oracle[7].to(torch.bfloat16)
    with pytest.raises(AssertionError, match=r"1 of 200 rows are off, first row 7.*row dropped\?"):
        assert_grads(actual, reference_, oracle)


def test_swapped_rows_and_a_row_counted_twice():
    actual, reference_, oracle = _triple(torch.float32)
    swapped = actual.clone()
    swapped[[3, 4]] = actual[[4, 3]]
    twice = actual.clone()
    twice[3] *= 2
    for wrong in (swapped, twice):
        with pytest.raises(AssertionError):
            assert_grads(wrong, reference_, oracle)


def test_a_stray_gradient_in_an_untouched_row():
    actual, reference_, oracle = _triple(torch.float32)
    for t in (actual, reference_, oracle):
        t[5] = 0.0
    assert_grads(actual, reference_, oracle)
    actual[5, 0] = 1e-9
    with pytest.raises(AssertionError, match="1 rows without a gradient are not zero, first row 5"):
        assert_grads(actual, reference_, oracle)


def test_a_gradient_of_nothing_is_zero():
    zero = torch.zeros(3, 4)
    assert_grads(zero, zero, zero.double())
    with pytest.raises(AssertionError):
        assert_grads(zero + 1e-30, zero, zero.double())


# --- assert_topk ----------------------------------------------------------------------------------------------------


def _selection(pre, k, activation="none"):
    values, indices = reference.topk_fwd(pre, k)
    return (values.relu() if activation == "relu" else values), indices


@pytest.fixture
def ties():
    return torch.randint(-3, 4, (20, 50)).float()


def test_topk_accepts_the_reference(ties):
    for pre in (ties, torch.randn(20, 50), ties.index_fill(1, torch.tensor([3, 9]), math.nan)):
        assert_topk(pre.double(), *_selection(pre, 7), 7)
        assert_topk(pre.double(), *_selection(pre, 50), 50)


def _rejects(pre, values, indices, message, k=7, **options):
    with pytest.raises(AssertionError, match=message):
        assert_topk(pre.double(), values, indices, k, **options)


def test_swapped_values(ties):
    pre = torch.randn(20, 50)
    values, indices = _selection(pre, 7)
    values[4, [1, 2]] = values[4, [2, 1]]
    _rejects(pre, values, indices, r"2 of 140 elements differ, first at \[4, 1\]")


def test_swapped_places():
    pre = torch.randn(20, 50)
    values, indices = _selection(pre, 7)
    for t in (values, indices):
        t[4, [1, 2]] = t[4, [2, 1]]
    _rejects(pre, values, indices, "not sorted in 1 of 20 rows, first row 4")
    _rejects(pre, values, indices, "not sorted", band=1e-7)


def test_a_missed_latent():
    pre = torch.randn(20, 50)
    values, indices = _selection(pre, 8)
    values, indices = values[:, [0, 1, 2, 3, 4, 5, 7]], indices[:, [0, 1, 2, 3, 4, 5, 7]]
    _rejects(pre, values, indices, "an unselected latent scores .* 20 of 20 rows")


def test_an_off_by_one_tie(ties):
    values, indices = _selection(ties, 7)
    last = int((ties[0] == values[0, 6]).nonzero()[-1])
    assert last != int(indices[0, 6])
    indices[0, 6] = last
    _rejects(ties, values, indices, f"a tie is decided wrongly in 1 of 20 rows, first row 0: latent {last} at place 6")


def test_tied_places_in_the_wrong_order():
    pre = torch.zeros(3, 9)
    values, indices = _selection(pre, 4)
    indices[2, [0, 1]] = indices[2, [1, 0]]
    _rejects(pre, values, indices, "tie is decided wrongly.*row 2", k=4)


def test_a_duplicate_index(ties):
    values, indices = _selection(ties, 7)
    indices[3, 1], values[3, 1] = indices[3, 0], values[3, 0]
    _rejects(ties, values, indices, f"latent {int(indices[3, 0])} is selected twice in row 3")


@pytest.mark.parametrize("wrong", [-1, 50, 2_100_000_011])
def test_an_index_out_of_range(ties, wrong):
    values, indices = _selection(ties, 7)
    indices[3, 1] = wrong
    _rejects(ties, values, indices, rf"index {wrong} outside \[0, 50\) at row 3, place 1")


def test_wrong_index_dtype_and_width(ties):
    values, indices = _selection(ties, 7)
    _rejects(ties, values, indices.long(), "int32, got torch.int64")
    _rejects(ties, values, indices, r"indices of shape \[20, 6\] wanted", k=6)
    _rejects(ties, values[:, :6], indices, "values of shape")


def test_a_lost_nan():
    pre = torch.randn(20, 50)
    pre[5, 30] = math.nan
    values, indices = _selection(torch.where(pre.isnan(), -math.inf, pre), 7)
    _rejects(pre, values, indices, r"0 NaN selected, 1 wanted \(NaN is the largest\)")


def test_nan_not_in_front_and_the_wrong_nan():
    pre = torch.randn(20, 50)
    pre[5, [30, 40]] = math.nan
    values, indices = _selection(pre, 7)
    for t in (values, indices):
        t[5] = t[5].roll(1)
    _rejects(pre, values, indices, "NaN is not in front")
    values, indices = _selection(pre, 1)
    indices[5, 0] = 40
    _rejects(pre, values, indices, "tie is decided wrongly", k=1)


def test_nan_for_an_ordinary_value(ties):
    values, indices = _selection(ties, 7)
    values[2, 2] = math.nan
    _rejects(ties, values, indices, "NaN differs at 1 of 140")


def test_relu_is_checked():
    pre = torch.randn(20, 50) - 2.0
    values, indices = _selection(pre, 7, "relu")
    assert_topk(pre.double(), values, indices, 7, activation="relu")
    _rejects(pre, _selection(pre, 7)[0], indices, "minus sign", activation="relu")
    values[0, 6] = -0.0
    _rejects(pre, values, indices, "1 values with a minus sign", activation="relu")


def test_inside_the_band_either_latent_may_win_outside_it_not():
    pre = torch.randn(20, 50, dtype=torch.float64)
    pre[:, 11] = pre[:, 10] = 5.0
    pre[:, 11] -= 1e-6
    values, indices = _selection(pre, 1)
    indices[:] = 11
    assert_topk(pre, values, indices, 1, band=1e-6)
    with pytest.raises(AssertionError, match="not the activations|unselected"):
        assert_topk(pre, values, indices, 1, band=1e-7)


def test_a_value_off_by_more_than_its_rounding():
    pre = torch.randn(20, 50)
    for dtype in DTYPES:
        values, indices = _selection(pre, 7)
        values = values.to(dtype)
        assert_topk(pre.double(), values, indices, 7, band=1e-7)
        values[3, 0] *= 1 + 4 * torch.finfo(dtype).eps
        _rejects(pre, values, indices, "1 of 140 values are not the activations.*row 3, place 0", band=1e-7)


def test_scores_other_than_the_values():
    pre, norms = torch.randn(20, 50), torch.rand(50) + 0.5
    score = pre * norms
    indices = reference.topk_fwd(score, 7)[1]
    assert_topk(pre.double(), pre.gather(1, indices.long()), indices, 7, score=score.double())
    _rejects(pre, *_selection(pre, 7), "unselected latent|not sorted|tie", score=score.double())


def test_a_masked_selection():
    x, W = torch.randint(-2, 3, (20, 8)).float(), torch.randint(-2, 3, (50, 8)).float()
    mask = torch.zeros(50, dtype=torch.bool)
    mask[[7, 9, 30]] = True
    pre = (x @ W.T).double()
    _, _, values, indices = reference.encode_topk_fwd(x, W, None, None, mask, 1, 6, "none", "topk")
    assert_topk(pre, values, indices, 6, mask=mask)
    nonzero = values.clone()
    nonzero[0, 5] = 1.0
    _rejects(pre, nonzero, indices, "elements differ", k=6, mask=mask)
    filled = indices.clone()
    filled[4, 5] = 49
    _rejects(pre, values, filled, r"filled up with latents \[0, 1, 49\].*first row 4", k=6, mask=mask)
    early = indices.clone()
    early[4, [2, 3]] = early[4, [3, 2]]
    _rejects(pre, values, early, "differ|filled up|unmasked", k=6, mask=mask)


def test_the_selection_band_grows_with_the_error_of_the_reference():
    oracle = torch.randn(5, 5, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    top = float(oracle.abs().max())
    assert selection_band(oracle, oracle, torch.float32) == pytest.approx(2 * eps * top)
    assert selection_band(oracle + 1e-3, oracle, torch.bfloat16) == pytest.approx(2e-3 + 2 * eps * top)
    oracle[0, 0] = math.nan
    assert math.isfinite(selection_band(oracle, oracle, torch.float32))
