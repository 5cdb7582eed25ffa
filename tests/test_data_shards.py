# SPDX-License-Identifier: Apache-2.0
"""The folder of activations: its shards and dtypes, kill -9 and a full disk at any moment, and damage of every kind."""

import errno
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fusae.data import Activations, collect
from fusae.data import shards as shards_module
from fusae.data.shards import ShardWriter, file_sha256
from fusae.data.storage import StorageLoss, decode, encode

HELPER = Path(__file__).parent / "data_interrupted.py"
_spec = importlib.util.spec_from_file_location("data_interrupted", HELPER)
interrupted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(interrupted)
CTX, WIDTH, Slow = interrupted.CTX, interrupted.WIDTH, interrupted.Slow
chunks_of_many_lengths, collected = interrupted.chunks_of_many_lengths, interrupted.collected


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """762 int8 rows of two sites in shards of 100."""
    return collected(tmp_path_factory.mktemp("whole") / "a")


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole.path, tmp_path / "a"))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def expected_rows():
    """The rows that `collected` keeps, by (chunk, position)."""
    chunks, model = chunks_of_many_lengths(), Slow()
    rows = {}
    for c in range(len(chunks)):
        ids = torch.from_numpy(chunks.row(c).astype(np.int64))[None]
        both = torch.cat([model(ids), model.embed(ids)], -1)[0].detach()
        rows |= {(c, p): both[p] for p in range(2, len(both)) if int(ids[0, p]) != 3}
    return rows


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_rows_of_two_sites_over_shards(whole):
    rows = expected_rows()
    where = [tuple(pair) for pair in whole.positions.tolist()]
    assert sorted(where) == sorted(rows) and whole.shape == (len(rows), 2 * WIDTH)
    x = torch.stack([rows[pair] for pair in where])
    # Of an int8 at most half a step is lost.
    step = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) / 127 for part in x.split(WIDTH, 1)], 1)
    assert ((whole.take(slice(None)) - x).abs() <= step * 0.5001).all()
    stored = np.load(whole.path / "rows-00001.npy")
    assert stored.dtype == np.int8 and stored.shape == (100, 2 * WIDTH)
    assert np.load(whole.path / "scales-00001.npy").shape == (100, 2)
    assert whole.sites == [{"module": m, "side": "out", "width": WIDTH} for m in ("out", "embed")]
    assert len(whole.norm_limit) == 2 and sum(whole.dropped.values()) + len(rows) == 160 * CTX
    # A chunk's rows lie together, in order; chunks ascend within a batch.
    changes = np.flatnonzero(np.diff(whole.positions[:, 0])) + 1
    assert len(changes) + 1 == len(set(whole.positions[:, 0].tolist()))
    assert all((np.diff(part[:, 1]) > 0).all() for part in np.split(whole.positions, changes))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_stored_as(tmp_path, dtype):
    acts = collected(tmp_path / "a", dtype=dtype)
    rows = expected_rows()
    x = torch.stack([rows[tuple(pair)] for pair in acts.positions.tolist()])
    got = acts.take(slice(None))
    if dtype != "int8":
        assert torch.equal(got, x.to(getattr(torch, dtype)).float())
    assert got.dtype == torch.float32 and got.is_contiguous()
    fvu = float((x.double() - got).square().sum() / (x.double() - x.double().mean(0)).square().sum())
    assert acts.storage["dtype"] == dtype and acts.storage["fvu"] == pytest.approx(fvu, rel=1e-9)
    low, high = {"float32": (0, 0), "float16": (1e-9, 1e-6), "bfloat16": (1e-7, 1e-4), "int8": (1e-6, 1e-3)}[dtype]
    assert low <= fvu <= high
    assert f"{dtype}" in repr(acts) and (dtype == "float32" or f"FVU {fvu:.2g}" in repr(acts))
    torch.testing.assert_close(acts.mean(), got.double().mean(0))


def test_take(whole):
    everything = whole.take(slice(None))
    n = len(whole)
    for index in (np.arange(n)[::-7], np.array([40, 40, 3, n - 1, 0, -1]), np.array([], int), [99, 100, 299, 300]):
        assert torch.equal(whole.take(index), everything[torch.from_numpy(np.array(index, dtype=np.int64))])
    assert torch.equal(whole.take(slice(30, 120, 4)), everything[30:120:4])
    for index in ([n], [-n - 1]):
        with pytest.raises(IndexError, match="index must lie in"):
            whole.take(index)
    for index in ([0.5], np.zeros((2, 2), int)):
        with pytest.raises(TypeError, match="index must be a slice or integers"):
            whole.take(index)


def test_int8_of_special_rows():
    x = torch.zeros(4, 6)
    x[1] = torch.tensor([127.0, -127.0, 63.5, 0.49, 0.51, -1.5])  # half to even: 64, -2
    x[2] = 1e-45  # its scale underflows
    x[3, :3] = 3e38
    arrays = encode(x, "int8", [3, 3])
    back = decode(arrays["rows"], arrays["scales"], "int8", [3, 3])
    assert back[0].eq(0).all() and back[2].eq(0).all() and back.isfinite().all()
    assert encode(x, "int8", [6])["rows"][1].tolist() == [127, -127, 64, 0, 1, -2]
    torch.testing.assert_close(back[3], x[3], rtol=1e-6, atol=0)


def test_loss_of_storage_is_that_of_all_rows_at_once():
    x = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)) * 0.1 + 1000.0
    stored = x.half().float()
    loss = StorageLoss(5)
    for start, stop in ((0, 1), (1, 1), (1, 400), (400, 1000)):
        loss.add(x[start:stop], stored[start:stop])
        other = StorageLoss(5)
        other.load_state_dict(json.loads(json.dumps(loss.state_dict())))
        loss = other
    x, stored = x.double(), stored.double()
    assert loss.fvu == pytest.approx(float((x - stored).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-9)


# --- survival --------------------------------------------------------------------------------------------------------


def helper(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HELPER), *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_and_resumed_to_the_same_bytes(whole, tmp_path, seed):
    assert int(helper("kill", tmp_path / "a", seed)) >= 4
    assert contents(tmp_path / "a") == contents(whole.path)


def test_full_disk(whole, tmp_path):
    said = helper("full", tmp_path / "a", 3000)  # a shard of rows takes 128 + 100 * 48 bytes
    assert "no room to write" in said and "rows-0000" in said and "File too large" in said
    assert "is safe in" in said and "run collect again with the same inputs to go on" in said
    meta = json.loads((tmp_path / "a" / "activations.json").read_text())
    assert not meta["complete"]
    collected(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(whole.path)


def test_disk_full_while_saving(whole, tmp_path, monkeypatch):
    calls, fsync = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no room to write .*No space left on device.*free some space"):
        collected(tmp_path / "a")
    monkeypatch.undo()
    collected(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(whole.path)


@pytest.mark.parametrize("at", ["finish", "rename"])
def test_killed_while_the_last_shard_gets_its_name(whole, tmp_path, monkeypatch, at):
    """What a kill there leaves behind: the header rewritten, or one of the files renamed and the others not."""
    if at == "finish":
        monkeypatch.setattr(ShardWriter, "_end", _raise_at_last(ShardWriter._end))
    else:
        monkeypatch.setattr(shards_module.os, "replace", _raise_at_last_rename(os.replace))
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is unfinished .160 of 160 chunks.; run collect again"):
        Activations(tmp_path / "a")
    collected(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(whole.path)


def _raise_at_last(end):
    def stopped(self):
        if self.rows % self.shard_rows:
            raise KeyboardInterrupt
        end(self)

    return stopped


def _raise_at_last_rename(replace):
    def stopped(source, target):
        replace(source, target)
        if str(target).endswith("rows-00007.npy"):
            raise KeyboardInterrupt

    return stopped


class _Stop(Slow):
    """Interrupted at its `at`-th forward pass."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def forward(self, ids, attention_mask=None):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().forward(ids)


def go_on(path, model=None, **options):
    options = {"batch_size": 4, "dtype": "int8", "shard_rows": 100, "progress": False, **options}
    return collect(model or Slow(), chunks_of_many_lengths(), ["out", "embed"], path, **options)


@pytest.fixture
def part(tmp_path):
    """Stopped after 11 of 40 batches."""
    with pytest.raises(KeyboardInterrupt):
        go_on(tmp_path / "part", _Stop(12))
    return tmp_path / "part"


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def edit(path, change):
    meta = json.loads((path / "activations.json").read_text())
    change(meta)
    (path / "activations.json").write_text(json.dumps(meta))


def begun(folder, stem):
    return next(folder.glob(f"{stem}-*.part"))


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda p: begun(p, "rows").unlink(), "rows-0000.*part is missing; put back"),
        (lambda p: os.truncate(begun(p, "scales"), 130), "scales-0000.*part is truncated: it has 130 bytes, the"),
        (lambda p: flip(begun(p, "positions")), "positions-0000.*part is damaged .its sha256"),
        (lambda p: flip(p / "rows-00000.npy"), "rows-00000.npy has sha256 .*: it is damaged or was changed; put back"),
        (lambda p: os.truncate(p / "positions-00000.npy", 200), "positions-00000.npy is truncated"),
        (lambda p: (p / "scales-00000.npy").unlink(), "scales-00000.npy is missing"),
        (lambda p: edit(p, lambda m: m["cursor"].pop("loss")), "activations.json is damaged .its cursor: 'loss'"),
        (lambda p: edit(p, lambda m: m["cursor"].update(batches="x")), "activations.json is damaged .its cursor"),
        (lambda p: edit(p, lambda m: m["cursor"].update(batches=99)), "batch 99 of 40 cannot be after 44 chunks"),
        (lambda p: edit(p, lambda m: m.update(rows=m["rows"] + 500)), "is missing; put back"),
        (lambda p: edit(p, lambda m: m["cursor"].update(batch_size=5)), "batch_size: .* begun with batches of 5 .* 4;"),
    ],
)
def test_a_damaged_part_is_refused_untouched_and_can_be_replaced(whole, part, damage, says):
    damage(part)
    before = contents(part)
    with pytest.raises(ValueError, match=says):
        go_on(part)
    assert contents(part) == before
    if "positions" in says:
        go_on(part, overwrite=True)
        assert contents(part) == contents(whole.path)


def test_options_that_may_change_on_resuming(whole, part):
    assert len(go_on(part, shard_rows=1000, nonfinite="drop")) == len(whole)
    assert contents(part) == contents(whole.path)


def test_one_process_at_a_time(part):
    handle = os.open(part, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is collecting into"):
        go_on(part)
    os.close(handle)
    go_on(part)


# --- damage ----------------------------------------------------------------------------------------------------------


def swap(one, other):
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def as_float(path):
    np.save(path, np.load(path).astype(np.float32))


HOSTILE = {
    "truncated": (lambda p: os.truncate(p / "rows-00002.npy", 1000), "rows-00002.npy is truncated: it has 1,000 bytes"),
    "empty": (lambda p: os.truncate(p / "rows-00002.npy", 0), "rows-00002.npy is truncated: it has 0 bytes"),
    "missing": (lambda p: (p / "rows-00003.npy").unlink(), "rows-00003.npy is missing; put back the file"),
    "no positions": (lambda p: (p / "positions-00007.npy").unlink(), "positions-00007.npy is missing"),
    "no scales": (lambda p: (p / "scales-00000.npy").unlink(), "scales-00000.npy is missing"),
    "a bit": (lambda p: flip(p / "rows-00004.npy"), "rows-00004.npy has sha256 .* it is damaged or was changed"),
    "a scale": (lambda p: flip(p / "scales-00004.npy"), "scales-00004.npy has sha256"),
    "header": (lambda p: flip(p / "rows-00004.npy", 20), "rows-00004.npy holds something else than the 100 rows of 48"),
    "swapped": (
        lambda p: swap(p / "rows-00005.npy", p / "rows-00006.npy"),
        "rows-00005.npy has sha256 .* it has the content of rows-00006.npy .swapped or copied over",
    ),
    "copied over": (
        lambda p: shutil.copy(p / "rows-00005.npy", p / "rows-00006.npy"),
        "rows-00006.npy has sha256 .* it has the content of rows-00005.npy",
    ),
    "another array": (
        lambda p: shutil.copy(p / "positions-00005.npy", p / "rows-00005.npy"),
        "rows-00005.npy is truncated|rows-00005.npy holds something else",
    ),
    "another dtype": (lambda p: as_float(p / "rows-00005.npy"), "holds something else than the 100 rows of 48 int8"),
    "longer": (lambda p: os.truncate(p / "rows-00001.npy", 9000), "rows-00001.npy holds something else .*9,000 bytes"),
    "no JSON": (lambda p: (p / "activations.json").write_text("{"), "activations.json is damaged or of another format"),
    "a list": (lambda p: (p / "activations.json").write_text("[]"), "activations.json is damaged or of another format"),
    "format 1": (
        lambda p: edit(p, lambda m: m.update(format="fusae-activations-1")),
        "an earlier version .format fusae-activations-1., which is no longer read; collect again with overwrite=True",
    ),
    "format x": (lambda p: edit(p, lambda m: m.update(format="x")), "has format 'x', expected 'fusae-activations-2'"),
    "no rows": (lambda p: edit(p, lambda m: m.pop("rows")), "is damaged .it lacks 'rows'"),
    "text rows": (lambda p: edit(p, lambda m: m.update(rows="9")), "is damaged .rows is '9'"),
    "0 rows": (lambda p: edit(p, lambda m: m.update(rows=0)), "is damaged .rows is 0"),
    "fewer rows": (lambda p: edit(p, lambda m: m.update(rows=m["rows"] - 1)), "-00007.npy holds something else than"),
    "d": (lambda p: edit(p, lambda m: m.update(d=40)), "d is 40, its sites have widths .24, 24."),
    "site": (lambda p: edit(p, lambda m: m["sites"][0].pop("side")), "is damaged .sites is"),
    "stored": (lambda p: edit(p, lambda m: m["storage"].update(dtype="int4")), "stored as 'int4', known are float32, "),
    "loss": (lambda p: edit(p, lambda m: m["storage"].pop("fvu")), "the measured loss of storage is None"),
    "shard_rows": (lambda p: edit(p, lambda m: m["storage"].update(shard_rows=0)), "is damaged .shard_rows is 0"),
    "other shards": (lambda p: edit(p, lambda m: m["storage"].update(shard_rows=101)), "-00000.npy is truncated"),
    "no sum": (lambda p: edit(p, lambda m: m["sha256"].pop("rows-00006.npy")), "rows-00006.npy has sha256 .*says None"),
}


@pytest.mark.parametrize("damage, says", HOSTILE.values(), ids=HOSTILE)
def test_damage_is_named_before_anything_is_touched(folder, damage, says):
    damage(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=says) as caught:
        Activations(folder)
    assert "collect again" in str(caught.value)
    with pytest.raises(ValueError, match=says):
        go_on(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("case", ["missing", "no JSON", "format x"])
def test_damage_is_repaired_by_collecting_again(whole, folder, case):
    HOSTILE[case][0](folder)
    go_on(folder, overwrite=True)
    assert contents(folder) == contents(whole.path)


def test_without_verify_sizes_are_still_checked(folder):
    flip(folder / "rows-00004.npy")
    assert len(Activations(folder, verify=False))
    os.truncate(folder / "rows-00004.npy", 1000)
    with pytest.raises(ValueError, match=r"rows-00004.npy is truncated"):
        Activations(folder, verify=False)


def test_a_folder_without_a_description(folder, tmp_path):
    (folder / "activations.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no activations .activations.json is not there"):
        Activations(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"holds .*-00000.npy but no activations.json that says what it is"):
        go_on(folder)
    assert contents(folder) == before
    with pytest.raises(FileNotFoundError, match="holds no activations"):
        Activations(tmp_path / "nothing")


def test_files_of_others_stay(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.npy").write_bytes(b"mine")
    go_on(tmp_path / "a")
    assert (tmp_path / "a" / "rows.npy").read_bytes() == b"mine"


def test_format_1_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "activations.json").write_text('{"format": "fusae-activations-1"}')
    for name in ("rows.npy", "positions.npy"):
        (folder / name).write_bytes(b"old")
    go_on(folder, overwrite=True)
    assert not (folder / "rows.npy").exists() and not (folder / "positions.npy").exists()


def test_sums_are_those_of_the_files(whole):
    assert whole.meta["sha256"] == {
        file.name: file_sha256(file) for file in sorted(whole.path.iterdir()) if file.suffix == ".npy"
    }


def test_too_many_open_files(whole, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(shards_module.mmap, "mmap", full)
    with pytest.raises(OSError, match="too many open files; raise the limit .ulimit -n. or collect with a larger"):
        Activations(whole.path)
