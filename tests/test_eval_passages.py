# SPDX-License-Identifier: Apache-2.0
"""Choice of latents, top passages, and how tokens are shown."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusae.data import collect
from fusae.eval import (
    ActivationHistograms,
    choose_latents,
    nearest_latents,
    token_strings,
    top_passages,
    write_features,
)
from fusae.eval.passages import token_text

tokenizers = pytest.importorskip("tokenizers", reason="the extra 'lm' is not installed")
WORDS, CTX, CHUNKS, M = 50, 12, 9, 6


@pytest.fixture(scope="module")
def words():
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tok.decoder = tokenizers.decoders.Metaspace()
    return tok


@pytest.fixture(scope="module")
def byte_level():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("Ġt", "o")]
    vocabulary = alphabet + ["".join(m) for m in merges]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=merges))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True)])
    return tok


class Table(torch.nn.Module):
    """A 'language model' whose hidden state is a fixed vector for each (chunk token, position)."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 8)
        self.place = torch.nn.Embedding(CTX, 8)
        self.out = torch.nn.Identity()

    def forward(self, ids):
        return self.out(self.embed(ids) + self.place.weight)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    torch.manual_seed(0)
    chunks = np.random.default_rng(1).integers(0, WORDS, (CHUNKS, CTX)).astype(np.uint16)
    acts = collect(Table(), chunks, "out", tmp_path_factory.mktemp("a") / "a", skip_positions=1, progress=False)
    weight = torch.randn(M, 8)
    return chunks, acts, weight


def dense_codes(x, weight):
    codes = (x @ weight.T - 1.5).relu()
    codes[:, 5] = 0.0  # a dead latent
    return codes


def as_codes(dense, form):
    if form == "fixed":
        values, indices = dense.topk(M, dim=1)
        indices[values == 0] = 3  # padding may name any latent
        return SimpleNamespace(values=values, indices=indices.int(), offsets=None)
    rows, columns = dense.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    junk = torch.full((4,), 1e9)  # storage may be longer than offsets[-1]
    indices = torch.cat([columns, torch.zeros(4, dtype=torch.int64)]).int()
    return SimpleNamespace(values=torch.cat([dense[rows, columns], junk]), indices=indices, offsets=offsets)


@pytest.mark.parametrize("form", ["fixed", "ragged"])
@pytest.mark.parametrize("batch_chunks", [2, 32])
def test_top_passages_equal_a_plain_search(setting, words, form, batch_chunks):
    chunks, acts, weight = setting
    latents = [3, 0, 5]
    effects = [{"promoted": [f"p{latent}"], "suppressed": ["s"]} for latent in latents]
    features = top_passages(
        acts, chunks, lambda x: as_codes(dense_codes(x, weight), form), latents, words,
        passages=3, before=4, after=2, batch_chunks=batch_chunks, effects=effects, progress=False,
    )  # fmt: skip
    grid = np.zeros((CHUNKS, CTX, M), dtype=np.float32)
    where = np.asarray(acts.positions)
    grid[where[:, 0], where[:, 1]] = dense_codes(acts.take(slice(None)), weight).numpy()
    for latent, feature, effect in zip(latents, features, effects, strict=True):
        values = grid[:, :, latent]
        best = sorted(range(CHUNKS), key=lambda c: -values[c].max())
        best = [c for c in best[:3] if values[c].max() > 0]
        assert feature["latent"] == latent and feature["promoted"] == effect["promoted"]
        assert feature["density"] == pytest.approx((values != 0).sum() / len(acts))
        assert feature["max_value"] == pytest.approx(values.max(), rel=1e-6)
        assert len(feature["passages"]) == len(best)
        for passage, chunk in zip(feature["passages"], best, strict=True):
            peak = int(values[chunk].argmax())
            start, stop = max(0, peak - 4), min(CTX, peak + 3)
            assert passage["tokens"] == token_strings(words, chunks[chunk])[start:stop]
            assert passage["values"] == pytest.approx(values[chunk, start:stop].tolist(), rel=1e-6)
            assert passage["peak"] == peak - start
            assert passage["values"][passage["peak"]] == pytest.approx(values[chunk].max(), rel=1e-6)
    assert features[0]["passages"] and features[1]["passages"]
    assert features[2] == {
        "latent": 5, "density": 0.0, "max_value": 0.0, "promoted": ["p5"], "suppressed": ["s"], "passages": [],
        "histogram": {"width": 0.0, "counts": []},
    }  # fmt: skip
    for feature in features[:2]:
        counts, width = feature["histogram"]["counts"], feature["histogram"]["width"]
        assert sum(counts) == round(feature["density"] * len(acts))
        assert width * (len(counts) - 1) <= feature["max_value"] < width * len(counts)


def test_passages_of_any_order_and_of_a_part(setting, words):
    """Rows of chunks in another order, as chunks of different lengths are stored; the same rows without a store."""
    chunks, acts, weight = setting
    # In fp64, so that values in fp32 do not depend on how many rows are encoded at once.
    encode = lambda x: as_codes(dense_codes(x.double(), weight.double()), "fixed")  # noqa: E731
    order = np.random.default_rng(3).permutation(CHUNKS)
    of_chunk = np.asarray(acts.positions[:, 0])
    index = np.concatenate([np.flatnonzero(of_chunk == chunk) for chunk in order])
    rows, where = acts.take(slice(None))[index], np.asarray(acts.positions)[index]

    class Shuffled:
        meta, positions = acts.meta, where
        take = staticmethod(lambda part: rows[part])

        def __len__(self):
            return len(rows)

    class Live:
        def __len__(self):
            return len(rows)

        def blocks(self, batch_chunks):
            for first in range(0, CHUNKS, batch_chunks):
                part = np.isin(where[:, 0], order[first : first + batch_chunks])
                yield rows[part], where[part]

    wanted = top_passages(acts, chunks, encode, [3, 0], words, progress=False)
    for source in (Shuffled(), Live()):
        for size in (1, 2, 32):
            assert top_passages(source, chunks, encode, [3, 0], words, batch_chunks=size, progress=False) == wanted
    part = top_passages(acts, chunks, encode, [3, 0], words, batch_chunks=2, max_rows=30, progress=False)
    every = top_passages(acts, chunks, encode, [3, 0], words, passages=CHUNKS, progress=False)
    for few, all_of_them in zip(part, every, strict=True):
        assert len(few["passages"]) <= 4 and all(passage in all_of_them["passages"] for passage in few["passages"])
    assert 0 < sum(sum(f["histogram"]["counts"]) for f in part) < sum(sum(f["histogram"]["counts"]) for f in every)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2), max_size=30), st.integers(0, 30))
def test_histograms_do_not_depend_on_the_batches(rows, cut):
    values = np.array(rows, dtype=np.float32).reshape(-1, 2)
    whole = ActivationHistograms(2, 8).update(values).result()
    merged = ActivationHistograms(2, 8).update(values[:cut]).merge(ActivationHistograms(2, 8).update(values[cut:]))
    assert merged.result() == whole
    for column, found in zip(values.T.astype(np.float64), whole, strict=True):
        sizes = np.abs(column[column != 0])
        assert sum(found["counts"]) == len(sizes)
        if len(sizes):
            edges = found["width"] * np.arange(9)
            assert edges[4] <= sizes.max() < edges[8]  # the range is no wider than twice what it must be
            padded = found["counts"] + [0] * (8 - len(found["counts"]))
            assert padded == [int(((sizes >= a) & (sizes < b)).sum()) for a, b in zip(edges, edges[1:], strict=False)]


def test_nearest_latents():
    torch.manual_seed(0)
    W_dec = torch.randn(100, 16) * torch.rand(100, 1)
    W_dec[7] = -2 * W_dec[3]
    W_dec[8] = 0.5 * W_dec[3] + 0.01 * torch.randn(16)
    W_dec[9] = 0
    found = nearest_latents(W_dec, [3, 9, 50], top=4)
    cosine = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[[3, 9, 50]][None], dim=-1)
    assert [len(each) for each in found] == [4, 4, 4]
    assert found[0][0]["latent"] == 8 and all(entry["latent"] != 3 for entry in found[0])
    for column, each in enumerate(found):
        for entry in each:
            assert entry["cosine"] == pytest.approx(float(cosine[entry["latent"], column]), abs=1e-6)
        assert [e["cosine"] for e in each] == sorted((e["cosine"] for e in each), reverse=True)
    assert nearest_latents(W_dec[:1], [0]) == [[]]
    with pytest.raises(ValueError, match="latents lie in 0..99, got 5 and .100."):
        nearest_latents(W_dec, [100])


def test_features_file(setting, words, tmp_path):
    chunks, acts, weight = setting
    encode = lambda x: as_codes(dense_codes(x, weight), "fixed")  # noqa: E731
    features = top_passages(acts, chunks, encode, [1, 2], words, progress=False)
    assert "promoted" not in features[0]
    write_features(tmp_path / "features.json", features)
    assert json.loads((tmp_path / "features.json").read_text()) == features
    assert [p.name for p in tmp_path.iterdir()] == ["features.json"]


def test_errors(setting, words):
    chunks, acts, weight = setting
    encode = lambda x: as_codes(dense_codes(x, weight), "fixed")  # noqa: E731
    for arguments, says in (
        ({"latents": [1, 1]}, "latents must be distinct"),
        ({"chunks": chunks[:4]}, "chunks must be those of the activations"),
        ({"effects": [{}]}, "effects must have one entry"),
        ({"passages": 0}, "passages"),
        ({"encode": lambda x: encode(x[:-1])}, "encode must return codes of"),
    ):
        options = {"chunks": chunks, "encode": encode, "latents": [0, 1], "progress": False, **arguments}
        with pytest.raises(ValueError, match=says):
            top_passages(acts, options.pop("chunks"), options.pop("encode"), options.pop("latents"), words, **options)


def test_choice_of_latents():
    density = np.zeros(1000)
    density[100:900] = np.random.default_rng(0).permutation(np.geomspace(1e-5, 0.5, 800))
    chosen = choose_latents(density, 12)
    assert len(set(chosen)) == 12 and chosen == choose_latents(torch.from_numpy(density), 12)
    assert all(density[latent] > 0 for latent in chosen)
    quantiles = np.array([(density[density > 0] < density[latent]).mean() for latent in chosen])
    assert (np.diff(quantiles) > 0).all()
    assert quantiles[0] < 0.25 and quantiles[-1] > 0.75  # spread over the range
    assert ((quantiles > 0.3) & (quantiles < 0.7)).sum() >= 6  # most of them in the middle
    assert choose_latents(density, 12, seed=1) != chosen
    assert all(density[latent] > 1e-3 for latent in choose_latents(density, 12, min_density=1e-3))


def test_choice_among_few_latents():
    assert choose_latents([0.0, 0.0]) == []
    assert sorted(choose_latents([0.5, 0.0, 0.1, 0.1, 0.0])) == [0, 2, 3]
    for seed in range(50):
        for count in range(1, 15):
            chosen = choose_latents([0.1] * 13, count, seed=seed)
            assert len(set(chosen)) == len(chosen) == min(count, 13)
    with pytest.raises(ValueError, match="count"):
        choose_latents([0.1], 0)


def test_token_strings_of_a_byte_level_tokenizer(byte_level):
    text = "x to é 🎉\n<|endoftext|>\ufffd!"
    ids = byte_level.encode(text).ids
    strings = token_strings(byte_level, ids)
    assert len(strings) == len(ids) and "".join(strings) == text
    assert strings[:2] == ["x", " to"]
    at = strings.index("🎉")
    assert strings[at - 3 : at] == ["", "", ""] and "<|endoftext|>" in strings
    # a passage that ends inside a character, and one that begins inside
    assert token_strings(byte_level, ids[: at - 1])[-1] == "\ufffd"
    assert token_strings(byte_level, ids[at:])[:2] == ["\ufffd", "\n"]
    assert token_text(byte_level, ids[1]) == " to" and token_text(byte_level, ids[at]) == "\ufffd"
    with pytest.raises(ValueError, match="not in the vocabulary"):
        token_strings(byte_level, [100000])


def test_token_strings_of_other_tokenizers():
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁to": 0, "▁be": 1, "ing": 2}, unk_token="▁to"))
    tok.decoder = tokenizers.decoders.Metaspace()
    assert token_strings(tok, [0, 1, 2]) == ["to", " be", "ing"]
