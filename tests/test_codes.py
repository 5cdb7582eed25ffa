# SPDX-License-Identifier: Apache-2.0
"""`SparseCodes`: both forms, their conversions, slicing, gradients, bad input."""

import dataclasses

import pytest
import torch

import fusae
from fusae import SparseCodes
from fusae.nn.join import split_codes
from fusae.testing import assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


@pytest.fixture
def dense():
    """``[6, 20]`` with rows of 0 to 5 entries, some of them negative."""
    t = torch.zeros(6, 20)
    for row in range(6):
        t[row, torch.randperm(20)[:row]] = torch.randn(row)
    return t


@pytest.fixture
def fixed():
    """k = 4, 3-D batch, with padding."""
    values, indices = torch.randn(2, 3, 4), torch.rand(2, 3, 20).argsort(-1)[..., :4].int()
    values[0, 1, 2:] = 0.0
    return SparseCodes(values, indices, 20)


@pytest.fixture
def ragged(dense):
    """The codes of `dense` in a storage with three more places of garbage."""
    codes = SparseCodes.from_dense(dense)
    values = torch.cat([codes.values, torch.full((3,), torch.nan)])
    indices = torch.cat([codes.indices, torch.full((3,), 2**31 - 1, dtype=torch.int32)])
    return SparseCodes(values, indices, 20, codes.offsets)


def test_from_dense_and_back(dense, ragged):
    codes = SparseCodes.from_dense(dense)
    assert codes.is_ragged and codes.values.shape == (15,) and codes.offsets.tolist() == [0, 0, 1, 3, 6, 10, 15]
    assert codes.indices.dtype == torch.int32
    assert_equal(codes.to_dense(), dense)
    assert_equal(ragged.to_dense(), dense)


def test_from_dense_keeps_nan_and_takes_negative_zero_for_zero():
    codes = SparseCodes.from_dense(torch.tensor([[torch.nan, -0.0, 0.0, torch.inf]]))
    assert codes.indices.tolist() == [0, 3]


def test_shapes_and_repr(fixed, ragged):
    assert fixed.shape == (2, 3, 20) and fixed.batch_shape == (2, 3) and len(fixed) == 2 and not fixed.is_ragged
    assert ragged.shape == (6, 20) and ragged.batch_shape == (6,) and len(ragged) == 6 and ragged.is_ragged
    assert "k=4" in repr(fixed) and "[2, 3, 20]" in repr(fixed)
    assert "ragged, storage 18" in repr(ragged)
    assert fixed.dtype == torch.float32 and fixed.device == torch.device("cpu")


def test_l0_counts_active_entries_only(fixed, ragged, dense):
    assert fixed.l0.tolist() == [[4, 2, 4], [4, 4, 4]]
    assert ragged.l0.tolist() == [0, 1, 2, 3, 4, 5]
    stored_zero = SparseCodes(
        ragged.values.masked_fill(torch.arange(18) == 14, 0.0), ragged.indices, 20, ragged.offsets
    )
    assert stored_zero.l0.tolist() == [0, 1, 2, 3, 4, 4]


def test_to_dense_of_fixed_width(fixed):
    wanted = torch.zeros(2, 3, 20)
    for i in range(2):
        for j in range(3):
            for value, latent in zip(fixed.values[i, j], fixed.indices[i, j], strict=True):
                wanted[i, j, latent] += value
    assert_equal(fixed.to_dense(), wanted)


def test_to_ragged_drops_padding(fixed):
    codes = fixed.to_ragged()
    assert codes.offsets.tolist() == [0, 4, 6, 10, 14, 18, 22] and (codes.values != 0).all()
    assert_equal(codes.to_dense(), fixed.to_dense().view(6, 20))
    assert codes.to_ragged() is codes


def test_to_sparse_csr(fixed, ragged, dense):
    for codes, wanted in ((fixed, fixed.to_dense().view(6, 20)), (ragged, dense)):
        csr = codes.to_sparse_csr()
        assert csr.layout == torch.sparse_csr
        assert_equal(csr.to_dense(), wanted)
        columns, rows = csr.col_indices(), csr.crow_indices()
        for i in range(6):
            row = columns[rows[i] : rows[i + 1]]
            assert (row[1:] > row[:-1]).all(), "latents ascend in every row"


def test_to_sparse_csr_keeps_no_zero(ragged):
    """Zero-valued entries are padding, whichever form stores them."""
    stored_zero = SparseCodes(
        ragged.values.masked_fill(torch.arange(18) == 14, 0.0), ragged.indices, 20, ragged.offsets
    )
    padded = SparseCodes(torch.tensor([[2.0, 0.0]]), torch.tensor([[3, 1]]).int(), 20)
    assert stored_zero.to_sparse_csr().crow_indices().tolist() == [0, 0, 1, 3, 6, 10, 14]
    assert_equal(stored_zero.to_sparse_csr().to_dense(), stored_zero.to_dense())
    assert padded.to_sparse_csr().col_indices().tolist() == [3]


def test_flatten_of_no_rows_and_no_width():
    assert SparseCodes(torch.empty(2, 0, 3), torch.empty(2, 0, 3).int(), 5).flatten().values.shape == (0, 3)
    flat = SparseCodes(torch.empty(2, 3, 0), torch.empty(2, 3, 0).int(), 5).flatten()
    assert flat.values.shape == (6, 0) and flat.l0.tolist() == [0] * 6
    assert_equal(flat.to_dense(), torch.zeros(6, 5))


def test_no_rows_at_all():
    for codes in (
        SparseCodes.from_dense(torch.zeros(0, 5)),
        SparseCodes(torch.empty(0, 3), torch.empty(0, 3).int(), 5),
    ):
        assert codes.shape == (0, 5) and codes.l0.shape == (0,) and codes.to_dense().shape == (0, 5)
        assert codes.to_sparse_csr().shape == (0, 5) and codes.to_ragged().offsets.tolist() == [0]


def test_codes_that_did_not_fit_raise_where_the_host_reads(ragged):
    short = SparseCodes(ragged.values[:4], ragged.indices[:4], 20, ragged.offsets)
    for read in (
        lambda: short[1],
        lambda: short[4],
        lambda: short[2:],
        lambda: short[torch.tensor([0, 5])],
        lambda: short.to_dense(),
        lambda: short.to_sparse_csr(),
        lambda: split_codes(short, [8, 12]),
    ):
        with pytest.raises(IndexError, match="15 entries and a storage of 4.*capacity >= 15"):
            read()
    assert short.l0.tolist() == [0, 1, 2, 1, 0, 0]  # never read by the host: of the entries that are stored
    assert short.to_ragged() is short


def test_row_ids(ragged, fixed):
    assert ragged.row_ids().tolist() == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5, 6, 6, 6]
    with pytest.raises(ValueError, match="row_ids is for ragged codes"):
        fixed.row_ids()


@pytest.mark.parametrize(
    "rows",
    [slice(1, 4), slice(None, None, 2), slice(3, 3), torch.tensor([4, 0, 0]), torch.arange(6) % 2 == 0],
    ids=["slice", "step", "none", "list", "mask"],
)
def test_slicing_by_row(rows, ragged, dense):
    assert_equal(ragged[rows].to_dense(), dense[rows])
    assert_equal(fusae.topk(dense, 20)[rows].to_dense(), dense[rows])


def test_slicing_a_batch(fixed):
    assert_equal(fixed[1].to_dense(), fixed.to_dense()[1])


@pytest.mark.parametrize("row", [0, 2, 5, -1, -6])
def test_one_row_by_its_number(row, ragged, dense):
    """The first dimension goes, in both forms, as it does for a tensor."""
    for codes in (ragged, fusae.topk(dense, 20)):
        one = codes[row]
        assert one.shape == (20,) and one.batch_shape == () and not one.is_ragged
        assert_equal(one.to_dense(), dense[row])
        assert one.l0 == (dense[row] != 0).sum()
    for codes in (ragged, fusae.topk(dense, 20)):
        assert [one.l0.item() for one in codes] == [0, 1, 2, 3, 4, 5]
        for outside in (6, -7):
            with pytest.raises(IndexError):
                codes[outside]


@pytest.mark.parametrize("rows", [(0, 1), (slice(1), slice(2)), (Ellipsis, 0), None, Ellipsis, "0", [0, 1], True, 1.0])
def test_only_rows_can_be_picked(rows, fixed, ragged):
    for codes in (fixed, ragged):
        with pytest.raises(TypeError, match="rows must be an int, a slice or a tensor of rows, got"):
            codes[rows]


def test_rows_by_a_two_dimensional_tensor_are_refused(ragged, fixed):
    for codes in (fixed, ragged):
        with pytest.raises(ValueError, match=r"rows must have one dimension, got shape \[2, 2\]"):
            codes[torch.zeros(2, 2, dtype=torch.int64)]


def test_gradients_flow_through_values(dense, ragged, fixed):
    weight = torch.randn(6, 20)
    leaf = dense.clone().requires_grad_()
    (SparseCodes.from_dense(leaf).to_dense() * weight).sum().backward()
    assert_equal(leaf.grad, torch.where(dense != 0, weight, 0.0))
    for codes in (ragged, fixed):
        values = codes.values.clone().requires_grad_()
        sliced = SparseCodes(values, codes.indices, 20, codes.offsets)[1:]
        out = sliced.to_dense()
        (grad,) = torch.autograd.grad(out.sum(), values)
        used = grad.flatten() if not codes.is_ragged else grad[:15]
        first = codes.values[0].numel() if not codes.is_ragged else 0
        assert (used[first:] == 1).all() and (grad.flatten()[len(used) :] == 0).all()


def test_detach_and_to(fixed, ragged):
    for codes in (fixed, ragged):
        live = dataclasses.replace(codes, values=codes.values.clone().requires_grad_())
        assert not live.detach().values.requires_grad
        half = live.to(torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half.indices.dtype == torch.int32
        assert half.offsets is None or half.offsets.dtype == torch.int64


def test_codes_are_immutable(fixed):
    with pytest.raises(dataclasses.FrozenInstanceError):
        fixed.m = 3


@pytest.mark.parametrize(
    ("values", "indices", "offsets", "error", "message"),
    [
        (
            torch.ones(2, 3),
            torch.zeros(2, 3, dtype=torch.int64),
            None,
            TypeError,
            "indices must be int32, got torch.int64",
        ),
        (torch.ones(2, 3), torch.zeros(2, 4).int(), None, ValueError, r"same shape, got \[2, 3\] and \[2, 4\]"),
        (torch.ones(()), torch.zeros(()).int(), None, ValueError, r"shape \[\.\.\., k\], got a scalar"),
        (torch.ones(2, 3), torch.zeros(2, 3).int(), torch.zeros(3).long(), ValueError, r"shape \[nnz\], got \[2, 3\]"),
        (torch.ones(3), torch.zeros(3).int(), torch.zeros(3).int(), ValueError, "dtype int64, got .3. torch.int32"),
        (torch.ones(3), torch.zeros(3).int(), torch.zeros(0).long(), ValueError, r"shape \[n \+ 1\]"),
    ],
    ids=["int64", "shapes", "scalar", "2d ragged", "int32 offsets", "no offsets"],
)
def test_bad_codes(values, indices, offsets, error, message):
    with pytest.raises(error, match=message):
        SparseCodes(values, indices, 20, offsets)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, "values must be a torch.Tensor, got list"),
        ({"indices": None}, TypeError, "indices must be a torch.Tensor, got NoneType"),
        ({"offsets": [0, 3]}, TypeError, "offsets must be a torch.Tensor, got list"),
        ({"indices": torch.zeros(3, device="meta").int()}, ValueError, "indices must be on cpu like values, got meta"),
        ({"offsets": torch.zeros(2, device="meta").long()}, ValueError, "offsets must be on cpu like values, got meta"),
        ({"values": torch.ones(3).to_sparse()}, TypeError, "values must be a dense tensor, got .*sparse_coo"),
        ({"m": "8"}, TypeError, "m must be an int, got str '8'"),
        ({"m": 8.0}, TypeError, "m must be an int, got float 8.0"),
        ({"m": True}, TypeError, "m must be an int, got bool True"),
        ({"m": None}, TypeError, "m must be an int, got NoneType"),
        ({"m": -5}, ValueError, "m must be between 1 and 2..31 - 1 .indices are int32., got -5"),
        ({"m": 0}, ValueError, "m must be between 1 .* got 0"),
        ({"m": 2**31}, ValueError, "m must be between 1 .* got 2147483648"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_parts_of_codes(change, error, message):
    parts = {"values": torch.ones(3), "indices": torch.arange(3).int(), "m": 20, "offsets": torch.tensor([0, 3])}
    SparseCodes(**parts)
    with pytest.raises(error, match=message):
        SparseCodes(**{**parts, **change})


def test_bad_dense():
    with pytest.raises(ValueError, match=r"f must have shape \[n, m\], got \[20\]"):
        SparseCodes.from_dense(torch.zeros(20))
