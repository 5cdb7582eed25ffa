# SPDX-License-Identifier: Apache-2.0
"""Real processes that are killed at random moments, and a disk that is full: what a run has learned is not lost."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
import traceback

import numpy as np
import pytest
import torch

from fusae.formats import FormatError, native
from fusae.nn import SparseCoder
from fusae.train import TrainConfig, Trainer, train
from fusae.train.progress import TrainingDisplay

D, M, STEPS = 24, 1024, 90
CHECKPOINT = "checkpoint.safetensors"
CONFIG = {
    "m": M, "k": 4, "batch_size": 64, "tokens": STEPS * 64, "dead_window": 700, "log_every": 1, "checkpoint_every": 2,
    "ema": 0.9, "k_start": 20, "k_anneal_steps": 50, "clip_norm": 1.0, "centre_input": True, "lr": 1e-3,
    "device": "cpu",
}  # fmt: skip


def data(n=1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(M, D, generator=generator)
    chosen = torch.rand(n, M, generator=generator).topk(4, 1).indices
    return directions[chosen].sum(1) + 3


def _work(rows, run, until, log):
    """What a user does after a crash: go on where there is a checkpoint, else begin."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    try:
        torch.set_num_threads(1)
        torch.manual_seed(7)
        there = os.path.exists(os.path.join(run, CHECKPOINT))
        config = None if there else TrainConfig(**CONFIG)
        Trainer(config, rows, run, resume=there, overwrite=not there, show=False).run(until=until)
    except KeyboardInterrupt:  # a SIGINT before the run could take it as a wish to stop
        os._exit(130)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def start(*args):
    # From a server that has imported torch already: a process in some milliseconds, with no thread of ours in it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusae.train", "torch._dynamo", "pytest"])
    process = context.Process(target=_work, args=[str(arg) if not isinstance(arg, int) else arg for arg in args])
    process.start()
    return process


def steps_logged(run):
    with contextlib.suppress(FileNotFoundError):
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]  # the last may be cut short
        return [json.loads(line) for line in lines if line.endswith("}")]
    return []


def last_step(run):
    return max((row["step"] for row in steps_logged(run)), default=0)


def without_times(row):
    return {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_s", "wait")}


def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    rows, run, log = tmp_path / "rows.npy", tmp_path / "killed", tmp_path / "stderr"
    np.save(rows, data().numpy())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    try:
        whole = Trainer(TrainConfig(**CONFIG), rows, tmp_path / "whole", show=False)
        begun = time.perf_counter()
        whole.run(until=STEPS - 1)
        per_step = (time.perf_counter() - begun) / (STEPS - 1)
    finally:
        torch.set_num_threads(before)
    chance, kinds, at = random.Random(5), [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT], []
    saved = 0
    while len(at) < 20:
        process = start(rows, run, STEPS - 1, log)
        # Now and then while it starts; else some steps later: in a step, between two, in a save, at a rename.
        further = chance.choice((0, 1, 2, 3, 4, 5, 6))
        deadline = time.monotonic() + 60
        while further and process.is_alive() and last_step(run) < min(saved + further, STEPS - 2):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 3 * per_step if further else 0.5))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, kinds[len(at) % len(kinds)])
        process.join(60)
        assert "Traceback" not in log.read_text(), log.read_text()
        reached, saved = last_step(run), 0
        if (run / CHECKPOINT).exists():
            saved = native.open_tensors(run / CHECKPOINT, "")[1]["step"]
        assert saved >= (reached - 1) // 2 * 2, "more was lost than the steps since the last checkpoint"
        at.append(reached)
    process = start(rows, run, STEPS - 1, log)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    assert len(set(at)) >= 8, f"the moments should differ: {at}"
    assert not list(run.glob(".*.tmp")), "what a killed process left is still there"

    one, other = ({}, {})
    about = []
    for found, path in ((one, tmp_path / "whole"), (other, run)):
        file, header = native.open_tensors(path / CHECKPOINT, "")
        found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        about.append({key: header[key] for key in ("step", "scales", "variance", "data", "dropped", "config")})
    assert about[0] == about[1]
    assert one.keys() == other.keys() > {"W_dec.average", "b_enc.exp_avg_sq", "tokens_since_fired"}
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    ours, theirs = (list(map(without_times, steps_logged(path))) for path in (tmp_path / "whole", run))
    assert ours == theirs and any(row["aux_loss"] for row in ours)


@contextlib.contextmanager
def no_file_longer_than(size):
    """As a full disk: a write that would make a file longer fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def short(**fields):
    return TrainConfig(**(CONFIG | {"tokens": 12 * 64, "k_anneal_steps": 5} | fields))


def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_run(tmp_path, monkeypatch):
    """It fills up after step 4 and has room again after step 9: nothing is missing in the end."""
    run, x, lines, size_of = tmp_path / "run", data(), [], []
    monkeypatch.setattr(TrainingDisplay, "say", lambda self, text: lines.append(text))
    with contextlib.ExitStack() as full:

        def happen(row):
            if row["step"] == 4:
                size_of.append((run / "metrics.jsonl").stat().st_size + 20)
                full.enter_context(no_file_longer_than(size_of[0]))
            if row["step"] == 7:
                assert native.open_tensors(run / CHECKPOINT, "")[1]["step"] == 2
                # Room for a copy, which must do to go on with.
                full.close()
                shutil.copytree(run, tmp_path / "then")
                full.enter_context(no_file_longer_than(size_of[0]))
            if row["step"] == 9:
                full.close()

        Trainer(short(), x, run, show=False).run(on_log=happen, until=11)
    assert Trainer(None, x, tmp_path / "then", resume=True, show=False).step == 2
    said = "\n".join(lines)
    assert f"warning: no checkpoint of step 6: no room to write {run / CHECKPOINT}" in said
    assert "what was there before is kept; free some and try again" in said
    assert f"warning: {run / 'metrics.jsonl'} could not be written (File too large); trying again" in said
    assert native.open_tensors(run / CHECKPOINT, "")[1]["step"] == 11
    train(short(), x, tmp_path / "whole", show=False)
    coder = Trainer(None, x, run, resume=True, show=False).run()
    assert torch.equal(coder.W_dec, SparseCoder.load(tmp_path / "whole" / "coder").W_dec)
    ours, theirs = (list(map(without_times, steps_logged(path))) for path in (tmp_path / "whole", run))
    assert ours == theirs


def test_no_room_for_the_result_is_an_error_that_keeps_the_checkpoint(tmp_path):
    run, x = tmp_path / "run", data()
    Trainer(short(), x, run, show=False).run(until=11)
    resumed = Trainer(None, x, run, resume=True, show=False)
    with no_file_longer_than(20_000), pytest.raises(OSError, match="no room to write .*coder.safetensors"):
        resumed.run()
    assert (run / CHECKPOINT).exists() and not (run / "coder" / "coder.json").exists()
    Trainer(None, x, run, resume=True, show=False).run()
    assert (run / "coder" / "coder.json").exists() and not (run / CHECKPOINT).exists()


@pytest.mark.parametrize(
    "name", ["W_enc", "b_dec.average", "W_dec.exp_avg_sq", "tokens_since_fired", "rng_state", "centre"]
)
def test_one_flipped_bit_is_noticed_before_anything_is_taken_over(tmp_path, name):
    run, x = tmp_path / "run", data()
    Trainer(short(), x, run, show=False).run(until=4)
    path = run / CHECKPOINT
    whole = bytearray(path.read_bytes())
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    where = 8 + int.from_bytes(whole[:8], "little") + header[name]["data_offsets"][0]
    whole[where] ^= 1
    path.write_bytes(whole)
    with pytest.raises(FormatError, match=rf"{CHECKPOINT}: {name} is damaged: its sha256"):
        Trainer(None, x, run, resume=True, show=False)
    assert path.read_bytes() == whole


def test_a_flipped_bit_in_a_saved_coder_is_noticed(tmp_path):
    coder = train(short(), data(), tmp_path / "run", show=False)
    path = tmp_path / "run" / "coder" / "coder.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(FormatError, match="coder.safetensors: .* is damaged: its sha256"):
        SparseCoder.load(tmp_path / "run" / "coder")
    coder.save(tmp_path / "run" / "coder")
    assert torch.equal(SparseCoder.load(tmp_path / "run" / "coder").W_enc, coder.W_enc)


def test_scratch_files_of_the_dead_are_removed_and_of_the_living_kept(tmp_path):
    path = tmp_path / "file.json"
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    dead, living = tmp_path / f".file.json.{process.pid}.tmp", tmp_path / f".file.json.{os.getppid()}.tmp"
    for scratch in (dead, living):
        scratch.write_text("half")
    native.write_json(path, {})
    assert not dead.exists() and living.exists() and path.exists()


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    run, x, refused = tmp_path / "run", data(), []

    def another(row):
        for options in ({"overwrite": True}, {"resume": True}):
            if options == {"overwrite": True} or (run / CHECKPOINT).exists():
                with pytest.raises(ValueError, match=f"another process is training in {run}; wait for it, or stop it"):
                    Trainer(None if "resume" in options else short(), x, run, show=False, **options)
                refused.append(options)

    coder = Trainer(short(), x, run, show=False).run(on_log=another)
    assert {"overwrite": True} in refused and {"resume": True} in refused
    assert len(steps_logged(run)) == 12 and torch.equal(SparseCoder.load(run / "coder").W_dec, coder.W_dec)
    Trainer(short(), x, run, overwrite=True, show=False)
