# SPDX-License-Identifier: Apache-2.0
"""Documents, the held-out split and token chunks."""

import hashlib
import json
import zipfile

import numpy as np
import pytest

from fusae.data import is_held_out, iter_documents, split_documents, tokenize

tokenizers = pytest.importorskip("tokenizers", reason="the extra 'lm' is not installed")


@pytest.fixture
def tokenizer():
    words = ["<|endoftext|>", "[UNK]", *(f"w{i}" for i in range(50))]
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tok


def _words(first, count):
    return " ".join(f"w{i % 50}" for i in range(first, first + count))


def test_reads_csv_jsonl_txt_zip_and_folder(tmp_path):
    big = "x" * 200_000  # above csv's default field limit
    (tmp_path / "a.csv").write_text(f'id,text\n1,"one, two\nthree"\n2,\n3,{big}\n', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "four"}) + "\n\n" + json.dumps({"text": " "}) + "\n")
    (tmp_path / "c.txt").write_text("\ufefffive é", encoding="utf-8")
    expected = {"a.csv": ["one, two\nthree", big], "b.jsonl": ["four"], "c.txt": ["five é"]}
    for name, documents in expected.items():
        assert list(iter_documents(tmp_path / name)) == documents
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in reversed(expected):
            archive.write(tmp_path / name, name)
    everything = [document for documents in expected.values() for document in documents]
    assert list(iter_documents(tmp_path / "all.zip")) == everything
    (tmp_path / "all.zip").unlink()
    assert list(iter_documents(tmp_path)) == everything


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("a.csv", b"id,body\n1,x\n", ValueError, "no column 'text'"),
        ("a.jsonl", b'{"body": 1}\n', ValueError, "no key 'text'"),
        ("a.jsonl", b'{"text": \n', ValueError, "damaged"),
        ("a.txt", b"\xff\xfe\x00", ValueError, "not UTF-8"),
        ("a.zip", b"PK nonsense", ValueError, "no zip file or is damaged"),
        ("a.rds", b"x", ValueError, "must end in"),
        (None, b"", FileNotFoundError, "no file or folder"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, content, error, says):
    path = tmp_path / (name or "absent.csv")
    if name:
        path.write_bytes(content)
    with pytest.raises(error, match=says):
        list(iter_documents(path))


def test_truncated_zip(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "".join(hashlib.sha1(bytes([i])).hexdigest() for i in range(200)))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="damaged"):
        list(iter_documents(path))


def test_split_depends_on_the_document_alone():
    documents = [f"document {i}" for i in range(4000)]
    train, held_out = split_documents(documents)
    assert sorted(train + held_out) == sorted(documents)
    assert 0.035 < len(held_out) / len(documents) < 0.065
    assert all(is_held_out(d) for d in held_out) and not any(is_held_out(d) for d in train)
    again = split_documents(list(reversed(documents)) + documents[:100])  # order and copies change nothing
    assert again == (train, held_out)
    # the definition, written out
    first = int(hashlib.sha1(documents[0].encode()).hexdigest()[:16], 16) / 2**64
    assert is_held_out(documents[0], first + 1e-9) and not is_held_out(documents[0], first - 1e-9)
    assert split_documents(documents, 0.0)[1] == [] and split_documents(documents, 1.0)[0] == []


def test_chunks_start_with_the_separator_and_never_mix_documents(tokenizer):
    chunks = tokenize([_words(0, 20), _words(7, 3), _words(30, 9)], tokenizer, ctx=8)
    assert chunks.ids.dtype == np.uint16
    # 20 words give 2 pieces of 7, 3 words give none, 9 words give 1
    words = [[f"w{i % 50}" for i in range(start, start + 7)] for start in (0, 7, 30)]
    assert chunks.ids.tolist() == [[0, *(tokenizer.token_to_id(w) for w in piece)] for piece in words]
    plain = tokenize([_words(0, 20)], tokenizer, ctx=10, separator=None)
    assert plain.shape == (2, 10) and plain.ids[0, 0] == tokenizer.token_to_id("w0")


def test_limit_and_large_vocabulary(tokenizer):
    documents = [_words(i, 30) for i in range(200)]
    everything = tokenize(documents, tokenizer, ctx=8)
    assert everything.shape == (800, 8)
    np.testing.assert_array_equal(tokenize(documents, tokenizer, ctx=8, limit=37).ids, everything.ids[:37])
    tokenizer.add_tokens([f"extra{i}" for i in range(1 << 16)])
    wide = tokenize(documents[:1] + ["extra65000 " * 7], tokenizer, ctx=8)
    assert wide.ids.dtype == np.int32 and wide.ids[-1, 1] > 65000


def test_tokenize_errors(tokenizer):
    with pytest.raises(ValueError, match="separator: '<s>'"):
        tokenize(["w1"], tokenizer, separator="<s>")
    with pytest.raises(ValueError, match="none of them has the 127 tokens"):
        tokenize(["w1 w2"], tokenizer)
    with pytest.raises(ValueError, match="ctx must be at least 2"):
        tokenize(["w1 w2"], tokenizer, ctx=1)
    with pytest.raises(ValueError, match="limit must be"):
        tokenize(["w1 w2"], tokenizer, limit=0)
