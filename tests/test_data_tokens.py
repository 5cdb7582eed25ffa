# SPDX-License-Identifier: Apache-2.0
"""TokenChunks: what they hold, their sum, and batches of similar lengths."""

import hashlib

import numpy as np
import pytest
import torch

from fusae.data import TokenChunks


def chunks_of(lengths, ctx=16, pad=3, dtype=np.uint16):
    ids = np.random.default_rng(0).integers(0, 100, (len(lengths), ctx)).astype(dtype)
    lengths = np.asarray(lengths, dtype=np.int32)
    ids[np.arange(ctx) >= lengths[:, None]] = pad
    return TokenChunks(ids, lengths, pad, (0, 3))


def test_of_arrays_tensors_and_itself():
    chunks = chunks_of([16, 4])
    assert TokenChunks.of(chunks) is chunks
    assert len(chunks) == 2 and chunks.shape == (2, 16) and chunks.tokens == 20 and chunks.padded
    assert repr(chunks) == "TokenChunks([2, 16] uint16, 20 tokens)"
    for form in (chunks.ids, torch.from_numpy(chunks.ids.astype(np.int64))):
        full = TokenChunks.of(form)
        assert full.ids.tolist() == chunks.ids.tolist() and full.lengths.tolist() == [16, 16] and not full.padded
        assert full.lengths.dtype == np.int32 and full.special == ()


def test_parts():
    chunks = chunks_of([16, 4, 7])
    part = chunks[1:]
    assert part.ids.tolist() == chunks.ids[1:].tolist() and part.lengths.tolist() == [4, 7]
    assert part.pad_id == 3 and part.special == (0, 3)
    assert chunks[np.array([2, 0])].lengths.tolist() == [7, 16]
    assert chunks.row(1).tolist() == chunks.ids[1, :4].tolist()
    with pytest.raises(TypeError, match="takes a slice or an index array"):
        chunks[1]
    with pytest.raises(ValueError, match="at least one chunk"):
        chunks[3:]


def test_sha256_is_of_the_tokens_in_use():
    chunks = chunks_of([16, 4, 7])
    assert chunks.sha256() == chunks_of([16, 4, 7], pad=9).sha256() == chunks_of([16, 4, 7], dtype=np.int32).sha256()
    full = TokenChunks.of(chunks.ids)
    assert full.sha256() == hashlib.sha256(chunks.ids.astype("<i8").tobytes()).hexdigest()
    changed = chunks.ids.copy()
    changed[1, 3] += 1
    others = [
        full,
        TokenChunks(changed, chunks.lengths),
        chunks[:2],
        chunks_of([16, 5, 7]),
        chunks[np.array([1, 0, 2])],
    ]
    assert len({c.sha256() for c in [chunks, *others]}) == 6
    many = chunks_of([5, 9] * 3000, ctx=10)  # more than are hashed at once
    used = np.where(np.arange(10) < many.lengths[:, None], many.ids, 0).astype("<i8")
    assert many.sha256() == hashlib.sha256(used.tobytes() + many.lengths.astype("<i8").tobytes()).hexdigest()


def test_batches_hold_similar_lengths_and_every_chunk_once():
    lengths = np.random.default_rng(1).integers(1, 17, 200)
    chunks = chunks_of(lengths)
    batches = chunks.batches(8, window=50)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200)) and max(map(len, batches)) == 8
    for window in range(4):  # each window's batches stand together and cover it
        part = batches[window * 7 : window * 7 + 7]
        assert sorted(np.concatenate(part).tolist()) == list(range(window * 50, window * 50 + 50))
        bounds = [(lengths[b].max(), lengths[b].min()) for b in part]
        assert all(before[1] >= after[0] for before, after in zip(bounds, bounds[1:], strict=False))
    assert [b.tolist() for b in chunks_of(lengths).batches(8, window=50)] == [b.tolist() for b in batches]
    computed = sum(len(b) * lengths[b].max() for b in chunks.batches(8))
    assert (
        computed
        < 1.15 * lengths.sum()
        < sum(len(lengths[i : i + 8]) * lengths[i : i + 8].max() for i in range(0, 200, 8))
    )


def test_batches_of_full_chunks_keep_their_order():
    full = TokenChunks.of(np.zeros((1000, 4), dtype=np.int32))
    batches = full.batches(12)
    np.testing.assert_array_equal(np.concatenate(batches), np.arange(1000))
    # 32 batches are a window, so only the last batch of all is smaller
    assert [len(b) for b in batches] == [12] * 83 + [4]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"ids": [[1, 2]]}, TypeError, "integer array of token ids .* got list"),
        ({"ids": torch.ones(2, 3).long()}, TypeError, "got dtype torch.int64"),
        ({"ids": np.ones((2, 3))}, TypeError, "got dtype float64"),
        ({"ids": np.ones(3, dtype=int)}, ValueError, r"shape \[chunks, ctx\].* got \[3\]"),
        ({"ids": np.ones((0, 3), dtype=int)}, ValueError, r"at least one chunk, got \[0, 3\]"),
        ({"lengths": [3, 3]}, TypeError, "lengths must be an integer array .* got list"),
        ({"lengths": np.array([3])}, ValueError, r"lengths must be \[2\] integers from 1 to 3, got \[1\]"),
        ({"lengths": np.array([3, 0])}, ValueError, r"got \[2\] from 0 to 3"),
        ({"lengths": np.array([4, 3])}, ValueError, r"got \[2\] from 3 to 4"),
    ],
)
def test_what_is_no_chunks(arguments, error, says):
    with pytest.raises(error, match=says):
        TokenChunks(**{"ids": np.ones((2, 3), dtype=np.int32), "lengths": np.array([3, 2]), **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((0,), "batch_size must be"), ((2.0,), "batch_size must be"), ((2, 0), "window must be"), ((2, "a"), "window")],
)
def test_bad_batches(arguments, says):
    with pytest.raises(ValueError, match=says):
        chunks_of([3, 2]).batches(*arguments)
