# SPDX-License-Identifier: Apache-2.0
"""Text from Parquet and Arrow files and from data sets on disk, laid out as the library `datasets` 5.2 writes them."""

import json
import sys

import pytest

from fusae.data import iter_documents

pyarrow = pytest.importorskip("pyarrow", reason="the extra 'text' is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="the extra 'text' is not installed")
TEXTS = [f"document {i} é" for i in range(2500)]


def table(texts=TEXTS, **columns):
    return pyarrow.table({"n": list(range(len(texts))), "text": texts, **columns})


def write_arrow(path, content, batch=1000):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=batch)


def write_saved(path, content, shards=1, split=None, **state):
    """What ``Dataset.save_to_disk`` writes."""
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        first, last = (len(content) * j // shards for j in (i, i + 1))
        write_arrow(path / name, content.slice(first, last - first))
    (path / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": n} for n in names], "_fingerprint": "c3", "_split": split, **state})
    )
    (path / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string", "_type": "Value"}}}))


def write_dict(path, **splits):
    for name, content in splits.items():
        write_saved(path / name, content)
    (path / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def write_cached(path, names, splits):
    for name, content in names.items():
        write_arrow(path / name, content)
    (path / "dataset_info.json").write_text(json.dumps({"splits": {s: {"num_examples": 1} for s in splits}}))


def test_parquet_in_row_groups(tmp_path):
    parquet.write_table(table(), tmp_path / "a.parquet", row_group_size=700)
    assert list(iter_documents(tmp_path / "a.parquet")) == TEXTS
    (tmp_path / "b.txt").write_text("more")
    assert list(iter_documents(tmp_path)) == [*TEXTS, "more"]


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_every_kind_of_text_column(tmp_path, kind):
    if kind == "string_view" and not hasattr(pyarrow, "string_view"):
        pytest.skip("this pyarrow has no string views")
    types = {"dictionary": lambda: pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    column = pyarrow.array(["a", None, " ", "b", "a"]).cast(types.get(kind, lambda: getattr(pyarrow, kind)())())
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"body": column}))
    assert list(iter_documents(tmp_path / "a.arrow", column="body")) == ["a", "b", "a"]


def test_arrow_files_in_both_formats(tmp_path):
    write_arrow(tmp_path / "stream.arrow", table())
    with pyarrow.OSFile(str(tmp_path / "file.arrow"), "wb") as sink:
        with pyarrow.ipc.new_file(sink, table().schema) as writer:
            writer.write_table(table(), max_chunksize=900)
    for name in ("stream", "file"):
        assert list(iter_documents(tmp_path / f"{name}.arrow")) == TEXTS


def test_saved_data_sets(tmp_path):
    write_saved(tmp_path / "one", table())
    write_saved(tmp_path / "shards", table(), shards=3, split="train")
    assert list(iter_documents(tmp_path / "one")) == TEXTS
    assert list(iter_documents(tmp_path / "shards")) == TEXTS
    assert list(iter_documents(tmp_path / "shards", split="train")) == TEXTS
    with pytest.raises(ValueError, match="one has no splits, got 'train'; leave it out"):
        list(iter_documents(tmp_path / "one", split="train"))
    with pytest.raises(ValueError, match="shards is the split 'train', got 'test'"):
        list(iter_documents(tmp_path / "shards", split="test"))


def test_splits_of_a_dict(tmp_path):
    write_dict(tmp_path / "two", train=table(), test=table(TEXTS[:9]))
    write_dict(tmp_path / "single", train=table())
    assert list(iter_documents(tmp_path / "two", split="train")) == TEXTS
    assert list(iter_documents(tmp_path / "two", split="test")) == TEXTS[:9]
    assert list(iter_documents(tmp_path / "two" / "test")) == TEXTS[:9]
    assert list(iter_documents(tmp_path / "single")) == TEXTS
    with pytest.raises(ValueError, match="two has the splits train, test; choose one"):
        list(iter_documents(tmp_path / "two"))
    with pytest.raises(ValueError, match="single has the splits train; got 'dev'"):
        list(iter_documents(tmp_path / "single", split="dev"))


def test_folders_of_the_cache(tmp_path):
    parts = {f"wiki-train-{i:05}-of-00002.arrow": table(TEXTS[i * 900 : i * 900 + 900]) for i in (0, 1)}
    others = {"wiki-test.arrow": table(TEXTS[:9]), "cache-2c7a03f8cef08e08.arrow": table(["made by map"])}
    write_cached(tmp_path / "c", parts | others, ["train", "test"])
    assert list(iter_documents(tmp_path / "c", split="train")) == TEXTS[:1800]
    assert list(iter_documents(tmp_path / "c", split="test")) == TEXTS[:9]
    with pytest.raises(ValueError, match="c has the splits train, test; choose one"):
        list(iter_documents(tmp_path / "c"))
    (tmp_path / "c" / "wiki-train-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="c has 1 Arrow files of the split 'train', not all"):
        list(iter_documents(tmp_path / "c", split="train"))


def spoil_cut(path):
    file = path / "data-00000-of-00002.arrow"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil_end(path):
    file = path / "data-00001-of-00002.arrow"  # what is left is a valid stream of fewer batches
    file.write_bytes(file.read_bytes()[:-8])


def spoil_bytes(path):
    file = path / "data-00000-of-00002.arrow"
    content = bytearray(file.read_bytes())
    content[8:400] = b"\xff" * 392
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_cut, "data-00000-of-00002.arrow is truncated or no Arrow file"),
        (spoil_end, "data-00001-of-00002.arrow is truncated or no Arrow file .its end is not marked"),
        (spoil_bytes, "data-00000-of-00002.arrow is damaged, truncated or of another format"),
        (lambda p: (p / "data-00000-of-00002.arrow").write_bytes(b""), "data-00000-of-00002.arrow is .*truncated"),
        (lambda p: (p / "data-00001-of-00002.arrow").unlink(), "data-00001-of-00002.arrow is missing; .* has 2 such"),
        (lambda p: (p / "state.json").write_text("{"), "state.json is missing or damaged"),
        (lambda p: (p / "state.json").write_text("[]"), "state.json is damaged .it holds no JSON object"),
        (lambda p: (p / "state.json").write_text("{}"), "state.json says nothing of '_data_files'"),
        (
            lambda p: (p / "state.json").write_text('{"_data_files": [1], "_indices_data_files": [1]}'),
            "keeps its order in a file of indices; save it again after flatten_indices",
        ),
    ],
)
def test_damaged_data_sets(tmp_path, spoil, says):
    write_saved(tmp_path / "d", table(), shards=2)
    spoil(tmp_path / "d")
    with pytest.raises(ValueError, match=says):
        list(iter_documents(tmp_path / "d"))


def test_a_dict_without_one_of_its_splits(tmp_path):
    write_dict(tmp_path, train=table())
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="test is missing or holds no state.json, which .*dataset_dict.json lists"):
        list(iter_documents(tmp_path, split="test"))


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(table(), path)
    good = path.read_bytes()
    for content in (b"", good[:100], good[: len(good) // 2], b"x" * 500):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.parquet is damaged, truncated or of another format"):
            list(iter_documents(path))


@pytest.mark.parametrize("write", [parquet.write_table, lambda content, path: write_arrow(path, content)])
def test_columns_that_are_not_there_or_no_text(tmp_path, write):
    path = tmp_path / ("a.parquet" if write is parquet.write_table else "a.arrow")
    write(table(turns=[["a"]] * len(TEXTS)), path)
    for column, says in (
        ("body", "a.(parquet|arrow) has no column 'body'; it has .'n', 'text', 'turns'"),
        ("n", "'n' of .*a.(parquet|arrow) holds int64, not text; columns of text: .'text'."),
        ("turns", "'turns' of .* holds list<.*string>, not text"),
    ):
        with pytest.raises(ValueError, match=says):
            list(iter_documents(path, column=column))
    write(table([None, " "]), path)
    with pytest.raises(ValueError, match="holds no text: 2 rows .column 'text'., all of them blank"):
        list(iter_documents(path))


def test_without_pyarrow(tmp_path, monkeypatch):
    parquet.write_table(table(), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"a.parquet needs 'pyarrow': pip install 'fusae\[text\]'"):
        list(iter_documents(tmp_path / "a.parquet"))
