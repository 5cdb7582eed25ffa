# SPDX-License-Identifier: Apache-2.0
"""TokenChunks: what they hold, their sum, batches of similar lengths, and how they are made from text."""

import hashlib

import numpy as np
import pytest
import torch

from fusae.data import LoadedModel, TokenChunks, tokenize

tokenizers = pytest.importorskip("tokenizers", reason="the extra 'lm' is not installed")


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


# --- tokenize --------------------------------------------------------------------------------------------------------


def word_level(*special, words=50):
    names = [*special, "[UNK]", *(f"w{i}" for i in range(words))]
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tok.add_special_tokens([*special, "[UNK]"])
    return tok


@pytest.fixture
def tokenizer():
    return word_level("<|endoftext|>")


def _words(first, count):
    return " ".join(f"w{i % 50}" for i in range(first, first + count))


def texts(chunks, tokenizer):
    return [" ".join(tokenizer.id_to_token(i) for i in chunks.row(c)) for c in range(len(chunks))]


def test_chunks_start_with_the_separator_and_never_mix_documents(tokenizer):
    chunks = tokenize([_words(0, 20), _words(7, 3), _words(30, 9)], tokenizer, ctx=8)
    assert chunks.ids.dtype == np.uint16 and chunks.lengths.dtype == np.int32 and not chunks.padded
    # 20 words give 2 pieces of 7, 3 words give none, 9 words give 1
    assert texts(chunks, tokenizer) == [f"<|endoftext|> {_words(start, 7)}" for start in (0, 7, 30)]
    assert chunks.special == (0,) and chunks.pad_id == 0
    plain = tokenize([_words(0, 20)], tokenizer, ctx=10, separator=None)
    assert texts(plain, tokenizer) == [_words(0, 10), _words(10, 10)]


def test_tails_are_kept_and_padded(tokenizer):
    documents = [_words(0, 20), _words(7, 3), _words(30, 9), _words(1, 14), ""]
    chunks = tokenize(documents, tokenizer, ctx=8, tails=True, min_tokens=3)
    assert texts(chunks, tokenizer) == [
        f"<|endoftext|> {_words(start, count)}"
        for start, count in ((0, 7), (7, 7), (14, 6), (7, 3), (30, 7), (1, 7), (8, 7))
    ]
    assert chunks.lengths.tolist() == [8, 8, 7, 4, 8, 8, 8] and chunks.tokens == 51
    assert (chunks.ids[3, 4:] == chunks.pad_id).all()
    longer = tokenize(documents, tokenizer, ctx=8, tails=True, min_tokens=4)
    assert longer.lengths.tolist() == [8, 8, 7, 8, 8, 8]
    # Whole pieces stay, however large min_tokens is.
    assert (
        tokenize(documents, tokenizer, ctx=8, tails=True, min_tokens=99).sha256()
        == tokenize(documents, tokenizer, ctx=8).sha256()
    )
    assert tokenize(documents, tokenizer, ctx=8, tails=True, min_tokens=1, limit=4).lengths.tolist() == [8, 8, 7, 4]


def test_what_stands_around_a_piece_is_up_to_the_tokenizer():
    bert = word_level("[PAD]", "[CLS]", "[SEP]", "[MASK]")
    bert.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    chunks = tokenize([_words(0, 9)], bert, ctx=8, tails=True, min_tokens=1)
    assert texts(chunks, bert) == [f"[CLS] {_words(0, 6)} [SEP]", f"[CLS] {_words(6, 3)} [SEP]"]
    assert chunks.pad_id == 0 and chunks.special == (0, 1, 2, 3)  # not [UNK], which is text
    llama = word_level("<s>", "</s>")
    llama.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert texts(tokenize([_words(0, 3)], llama, ctx=4), llama) == [f"<s> {_words(0, 3)}"]
    assert texts(tokenize([_words(0, 3)], llama, ctx=4, separator="</s>"), llama) == [f"</s> {_words(0, 3)}"]
    none = word_level()
    chunks = tokenize([_words(0, 8)], none, ctx=4)
    assert texts(chunks, none) == [_words(0, 4), _words(4, 4)] and chunks.special == ()
    named = word_level("<start>")
    assert texts(tokenize([_words(0, 3)], LoadedModel(None, named, "m", bos="<start>"), ctx=4), named) == [
        f"<start> {_words(0, 3)}"
    ]
    # Between documents there is an end of text, whatever a chat model begins its turns with.
    chat = word_level("<|im_start|>", "<|endoftext|>")
    chunks = tokenize([_words(0, 3)], LoadedModel(None, chat, "m", bos="<|im_start|>"), ctx=4)
    assert texts(chunks, chat) == [f"<|endoftext|> {_words(0, 3)}"] and chunks.special == (0, 1)


def test_padding_and_special_ids_are_no_plain_words():
    tok = word_level("<s>")
    chunks = tokenize([_words(0, 3)], tok, ctx=8, tails=True, min_tokens=2, separator=None)
    assert chunks.special == (0,) and chunks.pad_id == 0
    plain = word_level()
    chunks = tokenize([_words(0, 3)], plain, ctx=8, tails=True, min_tokens=2)
    assert chunks.special == ()  # the id it is padded with is a word


def test_a_tokenizer_that_cuts_and_pads_does_not_here(tokenizer):
    expected = tokenize([_words(0, 30)], tokenizer, ctx=8)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5, pad_id=1, pad_token="[UNK]")
    before = tokenizer.truncation, tokenizer.padding
    assert tokenize([_words(0, 30)], tokenizer, ctx=8).sha256() == expected.sha256()
    assert (tokenizer.truncation, tokenizer.padding) == before and len(tokenizer.encode(_words(0, 9)).ids) == 5


def test_long_documents_are_read_in_parts(tokenizer, monkeypatch):
    documents = [_words(0, 1000), _words(3, 5), _words(9, 777)]
    whole = tokenize(documents, tokenizer, ctx=8, tails=True, min_tokens=1)
    monkeypatch.setattr("fusae.data.tokens._BLOCK_CHARACTERS", 100)
    parts = tokenize(documents, tokenizer, ctx=8, tails=True, min_tokens=1)
    assert parts.sha256() == whole.sha256()
    monkeypatch.setattr("fusae.data.tokens._BLOCK_CHARACTERS", 10)
    assert tokenize(["x" * 95], tokenizer, ctx=4, tails=True, min_tokens=1).tokens == 10 + 4  # no blank to cut at


def test_documents_are_not_read_beyond_the_limit(tokenizer):
    read = []

    def documents():
        for i in range(100_000):
            read.append(i)
            yield _words(i, 30)

    everything = tokenize((_words(i, 30) for i in range(200)), tokenizer, ctx=8)
    assert everything.shape == (800, 8)
    some = tokenize(documents(), tokenizer, ctx=8, limit=37)
    assert some.sha256() == everything[:37].sha256() and len(read) <= 128


def test_large_vocabulary_and_gaps_in_it(tokenizer):
    tokenizer.add_tokens([f"extra{i}" for i in range(1 << 16)])
    wide = tokenize([_words(0, 30), "extra65000 " * 7], tokenizer, ctx=8)
    assert wide.ids.dtype == np.int32 and wide.ids[-1, 1] > 65000
    gap = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    assert tokenize(["b"], gap, ctx=2, tails=True, min_tokens=1).ids.tolist() == [[70_000, 0]]


def test_half_a_surrogate_is_replaced(tokenizer):
    assert tokenize(["w1 \ud800 w2"], tokenizer, ctx=4).ids.tolist() == [
        [0, *(tokenizer.token_to_id(w) for w in ("w1", "[UNK]", "w2"))]
    ]


def test_progress_is_shown_when_asked(tokenizer, capsys):
    documents = [_words(0, 70)] * 10
    tokenize(documents, tokenizer, ctx=8)
    assert capsys.readouterr().err == ""
    tokenize(documents, tokenizer, ctx=8, progress=True)
    assert "800 " in capsys.readouterr().err  # no end is known
    tokenize(documents, tokenizer, ctx=8, limit=90, progress=True)
    assert "/720" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("documents", "options", "error", "says"),
    [
        (["w1"], {"separator": "<s>"}, ValueError, "separator: '<s>' is no token of this vocabulary"),
        (["w1 w2"], {}, ValueError, "none of 1 has the 127 tokens that one chunk of ctx 128 needs; tails=True keeps"),
        (["w1 w2", "w1"], {"tails": True}, ValueError, "none of 2 has the 8 tokens that one chunk of ctx 128 needs$"),
        ([], {}, ValueError, "documents: there is none"),
        (["w1 w2"], {"ctx": 1}, ValueError, "ctx must be at least 2, got 1"),
        (["w1 w2"], {"ctx": 1, "separator": None}, ValueError, "ctx must be at least 2, got 1"),
        (["w1 w2"], {"limit": 0}, ValueError, "limit must be at least 1 or None, got 0"),
        (["w1 w2"], {"min_tokens": 0}, ValueError, "min_tokens must be at least 1, got 0"),
        ("w1 w2", {}, TypeError, "documents must be an iterable of strings, got one str"),
        (["w1", None], {}, TypeError, "documents must be strings, got a NoneType"),
    ],
)
def test_tokenize_errors(tokenizer, documents, options, error, says):
    with pytest.raises(error, match=says):
        tokenize(documents, tokenizer, **options)


def test_a_frame_needs_room_for_text():
    bert = word_level("[CLS]", "[SEP]")
    bert.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    assert tokenize(["w1 w2"], bert, ctx=3).shape == (2, 3)
    with pytest.raises(ValueError, match="ctx must be at least 3, got 2"):
        tokenize(["w1 w2"], bert, ctx=2)
