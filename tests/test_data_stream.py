# SPDX-License-Identifier: Apache-2.0
"""Rows straight from a model through a shuffle buffer, and the order in which stored ones come."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fusae.data import ActivationStream, TokenChunks, collect
from fusae.data.batches import BLOCK_ROWS, SHUFFLE_ROWS, Batches
from fusae.data.kept import REASONS

CTX, WIDTH, VOCABULARY, CHUNKS = 10, 6, 50, 60
PAD, SPECIAL = 0, 7


class Model(torch.nn.Module):
    """Rows differ for each (token, position); counts its forward passes."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.place = torch.nn.Embedding(CTX, WIDTH)
        self.out = torch.nn.Identity()
        self.to(dtype)
        self.calls = 0

    def forward(self, ids, attention_mask=None):
        self.calls += 1
        return self.out(self.embed(ids) + self.place.weight[: ids.shape[1]])


def chunks_of_many_lengths():
    random = np.random.default_rng(1)
    lengths = random.integers(1, CTX + 1, CHUNKS).astype(np.int32)
    ids = random.integers(1, VOCABULARY, (CHUNKS, CTX)).astype(np.uint16)
    ids[np.arange(CTX) >= lengths[:, None]] = PAD
    return TokenChunks(ids, lengths, PAD, (PAD, SPECIAL))


def stream(model=None, chunks=None, **options):
    options = {"buffer_rows": 64, "batch_size": 4, **options}
    return ActivationStream(model or Model(), chunks or chunks_of_many_lengths(), "out", **options)


def stored(tmp_path, model=None, chunks=None, **options):
    options = {"batch_size": 4, "dtype": "float32", "progress": False, "shard_rows": 50, **options}
    return collect(model or Model(), chunks or chunks_of_many_lengths(), "out", tmp_path / "a", **options)


def rows_of(batches):
    return sorted(map(tuple, torch.cat(list(batches)).tolist()))


# --- which rows ------------------------------------------------------------------------------------------------------


def test_rows_are_dropped_for_one_reason_each(tmp_path):
    model, chunks = Model(), chunks_of_many_lengths()
    with torch.no_grad():
        model.embed.weight[5] *= 1e4
        model.embed.weight[11, 2] = torch.nan
        model.embed.weight[12, 0] = torch.inf
    acts = stored(tmp_path, model, chunks, nonfinite="drop")
    used = np.arange(CTX) < chunks.lengths[:, None]
    later = used & (np.arange(CTX) >= 2)
    wanted = {
        "padding": int((~used).sum()),
        "first_positions": int((used & ~later).sum()),
        "special": int((later & (chunks.ids == SPECIAL)).sum()),
        "nonfinite": int((later & np.isin(chunks.ids, (11, 12))).sum()),
        "norm_outliers": int((later & (chunks.ids == 5)).sum()),
    }
    assert acts.dropped == wanted and min(wanted.values()) > 0
    assert sum(wanted.values()) + len(acts) == chunks.ids.size
    kept = later & ~np.isin(chunks.ids, (SPECIAL, 5, 11, 12))
    assert sorted(map(tuple, acts.positions.tolist())) == list(map(tuple, np.argwhere(kept).tolist()))
    from_model = stream(model, chunks, nonfinite="drop")
    batches = from_model.batches(1)
    assert rows_of(batches) == rows_of(acts.batches(1))
    assert batches.dropped == from_model.dropped == wanted and from_model.norm_limit == acts.norm_limit


def test_rows_that_are_not_finite_stop_and_are_named(tmp_path):
    model, chunks = Model(), chunks_of_many_lengths()
    full = int(np.flatnonzero(chunks.lengths == CTX)[-1])
    chunks.ids[full, 5] = 49
    chunks.ids[chunks.ids == 49] = 48
    chunks.ids[full, 5] = 49
    with torch.no_grad():
        model.embed.weight[49] = torch.nan
    with pytest.raises(ValueError, match=f"activation at chunk {full}, position 5 holds NaN.*nonfinite='drop' leaves"):
        stored(tmp_path, model, chunks)
    # What was done before stays; with the other option the rest follows.
    assert not json.loads((tmp_path / "a" / "activations.json").read_text())["complete"]
    assert stored(tmp_path, model, chunks, nonfinite="drop").dropped["nonfinite"] == 1
    with pytest.raises(ValueError, match="collected with nonfinite='drop' and lacks 1 rows that were not finite; pass"):
        stored(tmp_path, model, chunks)
    with pytest.raises(ValueError, match=f"chunk {full}, position 5"):
        list(stream(model, chunks).batches(8))
    # Rows that are dropped anyhow may hold anything.
    model.place.weight.data[:2] = torch.nan
    model.embed.weight.data[49] = 0.0
    assert stored(tmp_path / "b", model, chunks).dropped["nonfinite"] == 0


def test_an_outlier_at_one_of_two_sites_is_dropped(tmp_path):
    model, chunks = Model(), chunks_of_many_lengths()
    with torch.no_grad():
        model.embed.weight.mul_(1e-4)
        model.embed.weight[5] *= 1e3  # far above the norm of its own site, far below that of the other
    options = {"batch_size": 4, "progress": False, "drop_special": False}
    both = collect(model, chunks, ["embed", "out"], tmp_path / "a", **options)
    assert both.dropped["norm_outliers"] == int((chunks.ids[:, 2:] == 5).sum()) > 0
    assert both.dropped["special"] == 0
    one = collect(model, chunks, "out", tmp_path / "b", **options)
    assert one.dropped["norm_outliers"] == 0


def test_first_batches_without_a_row_to_keep(tmp_path):
    random = np.random.default_rng(0)
    lengths = np.array([2] * 256 + [6] * 8, dtype=np.int32)
    chunks = TokenChunks(random.integers(1, VOCABULARY, (264, CTX)).astype(np.uint16), lengths)
    acts = stored(tmp_path, chunks=chunks)
    assert len(acts) == 8 * 4 and acts.norm_limit > 0
    assert rows_of(stream(chunks=chunks).batches(1)) == rows_of(acts.batches(1))
    short = dataclasses.replace(chunks[:8], lengths=np.full(8, 2, np.int32))
    with pytest.raises(ValueError, match="leave no row at all"):
        stream(chunks=short)
    with pytest.raises(ValueError, match="leave no row at all .dropped: .'padding': 64, 'first_positions': 16,"):
        stored(tmp_path / "b", chunks=short)


# --- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer_rows, batch", [(64, 16), (40, 16), (1, 5), (10**6, 16)])
def test_stream_gives_every_row_once_a_pass(tmp_path, buffer_rows, batch):
    everything = torch.cat(list(stored(tmp_path).batches(1)))
    source = stream(buffer_rows=buffer_rows)
    assert source.shape == (None, WIDTH) and source.sites == [{"module": "out", "side": "out", "width": WIDTH}]
    given = list(source.batches(batch, seed=3, epochs=3))
    assert len(given) == 3 * len(everything) // batch  # nothing is left out between blocks or passes
    assert all(b.shape == (batch, WIDTH) and b.dtype == torch.float32 for b in given)
    counts = {}
    for row in map(tuple, torch.cat(given).tolist()):
        counts[row] = counts.get(row, 0) + 1
    wanted = {}
    for row in map(tuple, everything.tolist()):
        wanted[row] = wanted.get(row, 0) + 3
    assert set(counts) <= set(wanted) and all(counts[row] <= wanted[row] for row in counts)
    again = list(stream(buffer_rows=buffer_rows).batches(batch, seed=3, epochs=3))
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))
    assert not torch.equal(given[0], next(source.batches(batch, seed=4)))
    assert source.batches(batch, seed=3, epochs=0).dropped == dict.fromkeys(REASONS, 0)
    assert list(source.batches(batch, epochs=0)) == []


def test_chunks_come_in_a_new_order_each_pass():
    source = stream(buffer_rows=1)  # no shuffle: rows as the model gives them
    count = len(rows_of(source.batches(1)))
    both = torch.cat(list(source.batches(1, epochs=2)))
    first, second = both[:count], both[count:]
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))
    assert not torch.equal(first, second)
    shuffled = torch.cat(list(stream(buffer_rows=10**6).batches(1)))
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, first.tolist()))
    assert float((shuffled == first).all(1).float().mean()) < 0.1


def test_stream_without_end():
    batches = stream().batches(16, epochs=None)
    assert len([next(batches) for _ in range(200)]) == 200


@pytest.mark.parametrize("buffer_rows", [16, 48, 150])
def test_stream_resumes_at_every_batch(buffer_rows):
    source = stream(buffer_rows=buffer_rows)
    first = source.batches(16, seed=1, epochs=2)
    states, given, dropped = [], [], []
    while True:
        states.append(json.loads(json.dumps(first.state_dict())))
        dropped.append(first.dropped)
        batch = next(first, None)
        if batch is None:
            break
        given.append(batch)
    for done, state in enumerate(states):
        second = source.batches(16, seed=1, epochs=2)
        second.load_state_dict(state)
        rest = list(second)
        assert len(rest) == len(given) - done
        assert all(torch.equal(a, b) for a, b in zip(rest, given[done:], strict=True))
        assert second.dropped == first.dropped
    assert next(first, None) is None and list(first) == []


def test_resuming_runs_the_model_over_one_block_only():
    model = Model()
    source = stream(model, buffer_rows=32)
    batches = source.batches(16, seed=1, epochs=None)
    for _ in range(60):
        next(batches)
    state, model.calls = batches.state_dict(), 0
    second = source.batches(16, seed=1, epochs=None)
    second.load_state_dict(state)
    next(second)
    assert model.calls <= 6  # 32 rows, of batches of 4 chunks with some 15 rows each; the stream ran 60 such


def test_stream_of_bfloat16_and_of_two_sites():
    source = ActivationStream(Model(torch.bfloat16), chunks_of_many_lengths(), ["embed", "out:in"], batch_size=4)
    x = next(source.batches(32))
    assert source.shape == (None, 2 * WIDTH) and x.dtype == torch.float32
    assert torch.equal(x, x.bfloat16().float())
    assert len(source.norm_limit) == 2 and source.sites[1] == {"module": "out", "side": "in", "width": WIDTH}
    assert "embed, out:in of Model" in repr(source)


def test_training_mode_and_grad_are_left_alone():
    model = Model().train()
    x = next(stream(model).batches(16))
    assert model.training and not x.requires_grad and not x.is_inference()
    (x @ torch.ones(WIDTH, 1, requires_grad=True)).sum().backward()  # rows may take part in autograd


def test_stream_refuses_what_cannot_be():
    source = stream()
    for options, says in (
        ({"buffer_rows": 0}, "buffer_rows must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"skip_positions": CTX}, "skip_positions must lie in 0..9"),
        ({"nonfinite": "x"}, "nonfinite must be 'stop' or 'drop', got 'x'"),
    ):
        with pytest.raises(ValueError, match=says):
            stream(**options)
    with pytest.raises(ValueError, match="batch_size must be an integer"):
        source.batches(0)
    with pytest.raises(ValueError, match="epochs must be at least 0"):
        source.batches(8, epochs=-1)
    state = source.batches(8, seed=1).state_dict()
    for name, other in (
        ("seed", source.batches(8, seed=2)),
        ("batch_size", source.batches(16, seed=1)),
        ("block_rows", stream(buffer_rows=80).batches(8, seed=1)),
        ("sha256", stream(skip_positions=1).batches(8, seed=1)),
        ("sha256", stream(batch_size=5).batches(8, seed=1)),
    ):
        with pytest.raises(ValueError, match=f"state: {name} is"):
            other.load_state_dict(state)
    for change in ({"batch": 9}, {"block": -1}, {"start": {"epoch": 0, "cursor": 99, "offset": 0}}, {"batch": "1"}):
        with pytest.raises(ValueError, match="is no place in this stream of 15 batches a pass"):
            source.batches(8, seed=1).load_state_dict({**state, **change})
    for change in ({"start": {"epoch": 0}}, {"dropped": 3}):
        with pytest.raises(ValueError, match="state: .* must have"):
            source.batches(8, seed=1).load_state_dict({**state, **change})


# --- the order of stored rows ----------------------------------------------------------------------------------------


class Numbered:
    """Rows that are their own numbers."""

    fingerprint = "numbers"

    def __init__(self, count, size=0):
        self.count, self.bytes = count, size

    def __len__(self):
        return self.count

    def take(self, index):
        return torch.arange(self.count)[index]


@pytest.mark.parametrize("count, shuffle_rows", [(5000, 1024), (5000, 1), (4096, 512), (700, 600), (5001, 5000)])
def test_block_shuffle_is_a_permutation_within_buffers(count, shuffle_rows):
    batches = Batches(Numbered(count), 100, seed=2, epochs=2, drop_last=False, shuffle_rows=shuffle_rows)
    buffer = max(1, shuffle_rows // BLOCK_ROWS) * BLOCK_ROWS
    given = [int(i) for batch in batches for i in batch]
    first, second = given[:count], given[count:]
    assert sorted(first) == sorted(second) == list(range(count)) and first != second
    assert first == [int(i) for b in Batches(Numbered(count), 100, seed=2, drop_last=False, shuffle_rows=shuffle_rows)
                     for i in b]  # fmt: skip
    # Rows of a buffer come from as many blocks as it holds, and each block's from one buffer. Batches are sorted
    # within, so buffers that are whole batches tell.
    if buffer % 100 == 0 or count <= buffer:
        return
    blocks = [set() for _ in range(-(-count // buffer))]
    for place, row in enumerate(first):
        if place // 100 * 100 // buffer == min(place // 100 * 100 + 99, count - 1) // buffer:  # a batch of one buffer
            blocks[place // buffer].add(row // BLOCK_ROWS)
    assert all(len(b) <= buffer // BLOCK_ROWS for b in blocks) and not set.intersection(*blocks[:2])


def test_whole_permutation_is_the_default_up_to_a_bound_in_bytes():
    assert Batches(Numbered(3 << 20, 8 << 30), 100).shuffle_rows == 3 << 20
    assert Batches(Numbered(3 << 20, (8 << 30) + 1), 100).shuffle_rows == SHUFFLE_ROWS
    assert Batches(Numbered(3 << 20, 9 << 30), 100, shuffle_rows=1 << 22).shuffle_rows == 3 << 20
    order = np.random.default_rng([5, 1]).permutation(1000)
    second = list(Batches(Numbered(1000), 100, seed=5, epochs=2))[10:]
    assert torch.equal(torch.cat(second), torch.from_numpy(np.sort(order.reshape(10, 100), 1).reshape(-1)))
    for shuffle_rows in (0, 2.5):
        with pytest.raises(ValueError, match="shuffle_rows must be an integer of at least 1, or None"):
            Batches(Numbered(1000), 100, shuffle_rows=shuffle_rows)


@pytest.mark.parametrize("done", [0, 3, 7, 8, 11, 16])
def test_block_shuffle_of_a_store_resumes(tmp_path, done):
    lengths = np.full(300, CTX, np.int32)
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (300, CTX)).astype(np.uint16)
    acts = stored(tmp_path, chunks=TokenChunks(ids, lengths), shard_rows=333)
    options = {"seed": 4, "epochs": 2, "shuffle_rows": 512}
    first = acts.batches(300, **options)
    assert len(first) == 16
    for _ in range(done):
        next(first)
    second = acts.batches(300, **options)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest, again = list(first), list(second)
    assert len(rest) == 16 - done and all(torch.equal(a, b) for a, b in zip(rest, again, strict=True))
    everything = [b for b in acts.batches(300, epochs=1, shuffle_rows=512)]
    assert rows_of(everything) == rows_of(acts.batches(300, shuffle=False))
    with pytest.raises(ValueError, match="state: shuffle_rows is 512, these batches have 2400"):
        acts.batches(300, seed=4, epochs=2).load_state_dict(first.state_dict())
