# SPDX-License-Identifier: Apache-2.0
"""Documents from files and folders, and the held-out split."""

import gzip
import hashlib
import json
import zipfile

import pytest

from fusae.data import is_held_out, iter_documents, iter_part, split_documents


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


def test_gz_and_hidden_files(tmp_path):
    lines = json.dumps({"text": "one"}) + "\n" + json.dumps({"text": None}) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"text\ntwo\n"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress("drei é".encode()))
    (tmp_path / "README.md").write_text("not a text of the corpus")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "d.txt").write_text("left by a tool")
    assert list(iter_documents(tmp_path)) == ["one", "two", "drei é"]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a.jsonl.gz", "a.jsonl.gz")
        archive.writestr("__MACOSX/._a.txt", b"\xff\xfe")
    assert list(iter_documents(tmp_path / "all.zip")) == ["one"]


def test_splits_of_a_folder_of_files(tmp_path):
    for name in ("train-00000-of-00002.txt", "train-00001-of-00002.txt", "test.txt", "validation/training.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(iter_documents(tmp_path, split="train")) == ["train-00000-of-00002.txt", "train-00001-of-00002.txt"]
    assert list(iter_documents(tmp_path, split="test")) == ["test.txt"]
    assert list(iter_documents(tmp_path, split="validation")) == ["validation/training.txt"]
    assert len(list(iter_documents(tmp_path))) == 4
    with pytest.raises(ValueError, match="no file of .* is of the split 'dev'; it has test.txt, train-00000-of-00002"):
        list(iter_documents(tmp_path, split="dev"))
    with pytest.raises(ValueError, match="split: .*test.txt is one file, which has no splits, got 'test'"):
        list(iter_documents(tmp_path / "test.txt", split="test"))


def test_files_are_read_as_they_are_used(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": ')
    documents = iter_documents(tmp_path / "a.jsonl")
    assert next(documents) == "one" and next(documents) == "two"
    with pytest.raises(ValueError, match="line 3 of .*a.jsonl is damaged"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("a.csv", b"id,body\n1,x\n", ValueError, "a.csv has no column 'text'; it has .'id', 'body'"),
        ("a.csv", b"", ValueError, "a.csv has no column 'text'; it has None"),
        ("a.csv", b"id,text\n1\n2,\n", ValueError, "a.csv holds no text: 2 rows .column 'text'., all of them blank"),
        ("a.jsonl", b'{"body": 1}\n', ValueError, "line 1 of .*a.jsonl has no key 'text'; it has .'body'"),
        ("a.jsonl", b'\n{"text": 3}\n', ValueError, "'text' in line 2 of .*a.jsonl must be a string, got a int"),
        ("a.jsonl", b'["text"]\n', ValueError, "line 1 of .*a.jsonl must be an object, got a list"),
        ("a.jsonl", b'{"text": \n', ValueError, "line 1 of .*a.jsonl is damaged"),
        ("a.jsonl", b"[" * 100_000, ValueError, "line 1 of .*a.jsonl is damaged"),
        ("a.jsonl", b'{"text": "\xff"}', ValueError, "a.jsonl is damaged or not UTF-8"),
        ("a.jsonl", b"", ValueError, "a.jsonl holds no text: 0 rows"),
        ("a.jsonl.gz", b"plain", ValueError, "a.jsonl.gz is no gzip file, truncated or damaged"),
        # mtime: the bytes are part of the test's name, which every pytest-xdist worker must agree on.
        ("a.txt.gz", gzip.compress(bytes(range(65, 91)) * 99, mtime=0)[:-12], ValueError, "is no gzip file, truncated"),
        ("a.txt.gz", b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 20, ValueError, "a.txt.gz is no gzip file, truncated"),
        ("a.txt", b"\xff\xfe\x00", ValueError, "not UTF-8"),
        ("a.txt", b" \n", ValueError, "a.txt holds no text: 1 rows"),
        ("a.zip", b"PK nonsense", ValueError, "no zip file or is damaged"),
        ("a.rds", b"x", ValueError, "must end in .csv, .jsonl, .txt .or these with .gz., .arrow, .parquet or .zip"),
        (None, b"", FileNotFoundError, "no file or folder"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, content, error, says):
    path = tmp_path / (name or "absent.csv")
    if name:
        path.write_bytes(content)
    with pytest.raises(error, match=says):
        list(iter_documents(path))


def test_zips_and_folders_without_text_say_what_they_hold(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.pdf", "x")
    with pytest.raises(ValueError, match="no .csv, .jsonl, .* file in .*a.zip; it has a.pdf"):
        list(iter_documents(tmp_path / "a.zip"))
    with pytest.raises(ValueError, match="path: no .csv, .*.parquet file in"):
        list(iter_documents(tmp_path))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "secret")
    data = (tmp_path / "a.zip").read_bytes()
    central = data.index(b"PK\1\2")
    marked = bytearray(data)
    marked[6] |= 1
    marked[central + 8] |= 1  # both headers say that it is encrypted
    (tmp_path / "a.zip").write_bytes(marked)
    with pytest.raises(ValueError, match="a.zip cannot be unpacked .*password"):
        list(iter_documents(tmp_path / "a.zip"))


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


def test_parts_as_streams():
    documents = [f"document {i}" for i in range(2000)]
    copies = documents + documents[::-1]
    train, held_out = split_documents(copies)
    assert list(iter_part(copies, "train")) == [d for d in documents if d in set(train)]
    assert list(iter_part(copies, "held_out")) == [d for d in documents if d in set(held_out)]
    assert list(iter_part(copies, "train", 0.0)) == documents and list(iter_part(copies, "train", 1.0)) == []

    def endless():
        i = 0
        while True:
            yield f"document {i}"
            i += 1

    stream = iter_part(endless(), "train")  # nothing is read ahead
    assert [next(stream) for _ in range(50)] == [d for d in documents if d in set(train)][:50]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_bad_parts(share):
    with pytest.raises(ValueError, match="held_out_share must lie in 0..1"):
        split_documents(["a"], share)
    with pytest.raises(ValueError, match="held_out_share must lie in 0..1"):
        iter_part(["a"], "train", share)  # at once, not when it is read
    with pytest.raises(ValueError, match="part must be 'train' or 'held_out', got 'test'"):
        iter_part(["a"], "test")
