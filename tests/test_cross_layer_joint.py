# SPDX-License-Identifier: Apache-2.0
"""The L·n·k largest of all layers of a cross-layer transcoder: exact, with its ties, its threshold, its files."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusae import SparseCodes, encode_batch_topk
from fusae.formats import FormatError
from fusae.nn import CrossLayerConfig, CrossLayerTranscoder, Moment, load
from fusae.nn.join import largest_together
from fusae.nn.objectives import BatchTopK, CrossLayer

L, D, OUT, M, K, N = 3, 6, 5, 16, 2, 40
JOINT = {"layers": L, "d": D, "d_out": OUT, "m": M, "k": K, "select": "batch_topk", "joint": True}


def ragged(dense):
    """Codes of the positive entries (and NaN) of ``[n, m]``, with some storage behind them that holds anything."""
    used = (dense > 0) | dense.isnan()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), used.sum(1).cumsum(0)])
    values = torch.cat([dense[used], torch.full((5,), 9.0, dtype=dense.dtype)])
    indices = torch.cat([used.nonzero()[:, 1], torch.arange(5)]).int()
    return SparseCodes(values, indices, dense.shape[1], offsets)


def dense_of(dense, count, norms=None):
    """The statement of `largest_together`: a stable sort of everything."""
    joined = torch.cat(dense, 1)
    kept = torch.where((joined > 0) | joined.isnan(), joined, 0.0)
    score = kept.float() if kept.dtype != torch.float64 else kept
    score = score if norms is None else score * torch.cat(list(norms))
    best = torch.sort(score.flatten(), descending=True, stable=True).indices[:count]
    out = torch.zeros_like(kept.flatten()).index_copy(0, best, kept.flatten()[best])
    left = torch.zeros_like(score.flatten()).index_copy(0, best, score.flatten()[best])
    left = left[left > 0]
    return out.view_as(kept), left.min() if len(left) else torch.tensor(torch.inf)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_largest_together_is_a_stable_sort_of_everything(data):
    n, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    # Few values, so that most of them are equal to others; and those that are no ordinary numbers.
    value = st.sampled_from([-1.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 2.0, 3e-8, torch.inf, torch.nan])
    dense = [
        torch.tensor(data.draw(st.lists(st.lists(value, min_size=m, max_size=m), min_size=n, max_size=n)), dtype=dtype)
        for m in sizes
    ]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    norms = [torch.tensor(data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=m, max_size=m)), dtype=acc)
             for m in sizes] if data.draw(st.booleans()) else None  # fmt: skip
    kept, smallest = largest_together([ragged(part) for part in dense], count, norms)
    wanted, least = dense_of(dense, count, norms)
    got = torch.cat([part.to_dense() for part in kept], 1)
    assert torch.equal(got.nan_to_num(7e4, 6e4), wanted.nan_to_num(7e4, 6e4))
    assert float(smallest) == float(least) and smallest.dtype == acc
    assert sum(int(part.offsets[-1]) for part in kept) <= count, "no more than asked for, whatever is equal"
    for part, before in zip(kept, dense, strict=True):
        assert part.m == before.shape[1] and part.values.shape == ragged(before).values.shape


def test_equal_scores_go_to_the_lower_row_then_layer_then_latent():
    dense = [torch.ones(2, 3), torch.ones(2, 2), torch.ones(2, 1)]
    for count in range(1, 13):
        kept, _ = largest_together([ragged(part) for part in dense], count)
        got = torch.cat([part.to_dense() for part in kept], 1).flatten()
        assert got.tolist() == [1.0] * count + [0.0] * (12 - count)


def test_gradients_reach_what_is_kept():
    dense = [torch.rand(4, 3, dtype=torch.float64) + 0.1 for _ in range(2)]
    parts = [ragged(part) for part in dense]
    for part in parts:
        part.values.requires_grad_()
    kept, _ = largest_together(parts, 7)
    weight = torch.rand(4, 6, dtype=torch.float64)
    (torch.cat([part.to_dense() for part in kept], 1) * weight).sum().backward()
    chosen = dense_of(dense, 7)[0] != 0
    for part, wanted, used in zip(parts, weight.split(3, 1), chosen.split(3, 1), strict=True):
        assert torch.equal(part.values.grad[:12].view(4, 3), wanted * used) and not part.values.grad[12:].any()


def coder_of(dtype="float32", **fields):
    coder = CrossLayerTranscoder(CrossLayerConfig(**JOINT | {"dtype": dtype} | fields), seed=3)
    with torch.no_grad():
        for s, source in enumerate(coder.sources):  # layers of different strength: they deserve different shares
            source.W_enc *= 1.0 + s
    return coder


def rows(n=N, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, L, w, generator=generator).to(dtype) for w in (D, OUT))


@pytest.mark.parametrize("by_norm", [False, True], ids=["by value", "by norm"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_is_one_batch_top_k_over_all_latents(dtype, by_norm):
    """Layers that read the same input are one dictionary of L·m latents."""
    coder = coder_of(dtype, select_by_norm=by_norm)
    x = rows(dtype=coder.config.torch_dtype)[0][:, :1].expand(-1, L, -1)
    codes = coder.encode(x)
    sources = coder.sources
    wanted, smallest = encode_batch_topk(
        x[:, 0].contiguous(),
        torch.cat([source.W_enc for source in sources]),
        torch.cat([source.b_enc for source in sources]),
        L * K,
        norms=coder.decoder_norms() if by_norm else None,
    )
    got = torch.cat([part.to_dense() for part in codes], 1)
    assert torch.equal(got != 0, wanted.to_dense() != 0)
    torch.testing.assert_close(got, wanted.to_dense())
    assert (got != 0).sum() == N * L * K
    shares = [float(part.l0.float().mean()) for part in codes]
    assert shares[0] < 0.7 * K and shares[2] > 1.2 * K, "layers have what they deserve"
    assert all(float(found[1]) == pytest.approx(float(smallest), rel=1e-6) for found in coder.select(x))


def test_fewer_positives_than_asked_for_and_no_rows():
    coder, (x, y) = coder_of(k=M), rows()
    codes = coder.encode(x)
    for s, part in enumerate(codes):
        pre = x[:, s] @ coder.sources[s].W_enc.T
        torch.testing.assert_close(part.to_dense(), pre.relu())
    assert [part.shape for part in coder.encode(x[:0])] == [(0, M)] * L
    assert coder(x[:0]).shape == (0, L, OUT)
    silent = CrossLayer(BatchTopK())(coder, torch.zeros_like(x), y, Moment())
    silent.loss.backward()
    assert not silent.codes.values.any() and not any(source.threshold.any() for source in coder.sources)


def test_one_threshold_which_keeps_the_l0():
    coder, (x, y) = coder_of(), rows(4000)
    for step, part in enumerate(zip(x.split(200), y.split(200), strict=True)):
        CrossLayer(BatchTopK(threshold_decay=0.9))(coder, *part, Moment(step=step))
    thresholds = {float(source.threshold) for source in coder.sources}
    assert len(thresholds) == 1 and thresholds.pop() > 0
    held_out = rows(2000, seed=1)[0]
    apart = torch.cat([part.to_dense() for part in coder.encode(held_out)], 1)
    codes = coder.eval().encode(held_out)
    together = torch.cat([part.to_dense() for part in codes], 1)
    assert float((together != 0).sum(1).float().mean()) == pytest.approx(L * K, rel=0.05)
    assert float(((together != 0) == (apart != 0)).float().mean()) > 0.99, "nearly what training selects"
    fixed = coder_of(joint=False)
    shares = [float(part.l0.float().mean()) for part in fixed.encode(held_out)]
    assert shares == pytest.approx([K] * L), "by layers, each has its own"


def test_files_and_annealing(tmp_path):
    coder, x = coder_of().eval(), rows()[0]
    for source in coder.sources:
        source.threshold.fill_(0.25)
    coder.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == coder.config and loaded.config.joint and torch.equal(loaded(x), coder(x))
    coder.train().config = dataclasses.replace(coder.config, k=1)
    assert sum(int(part.l0.sum()) for part in coder.encode(x)) == N * L
    about = (tmp_path / "coder.json").read_text()
    (tmp_path / "coder.json").write_text(about.replace('"joint": true', '"joint": 1'))
    with pytest.raises(FormatError, match="joint must be true or false, got int 1"):
        load(tmp_path)


def test_an_error():
    with pytest.raises(ValueError, match="joint must be false with select 'topk': only 'batch_topk' can"):
        CrossLayerConfig(**JOINT | {"select": "topk"})
