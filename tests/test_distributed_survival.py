# SPDX-License-Identifier: Apache-2.0
"""A rank that is lost, or asked to stop: all others end too, soon and with a reason, and nothing saved is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fusae.testing.ranks import config, data, spawn
from fusae.train import Trainer, checkpoint

NAME = checkpoint.NAME


def _killed(run, where):
    """Rank 1 is killed in step 12: while it computes, or while it saves."""
    from fusae.train.sharded import ShardedTrainer, files

    trainer = ShardedTrainer(config(checkpoint_every=5 if where == "step" else 6), data(), run, show=False)
    step, write = trainer.train_step, files.write_tensors

    def die():
        if trainer.mesh.rank == 1 and trainer.step >= 11:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_step(x):
        if where == "step":
            die()
        return step(x)

    def dying_write(path, *rest):
        write(path, *rest)
        if where == "save":
            die()

    trainer.train_step, files.write_tensors = dying_step, dying_write
    trainer.run()


@pytest.mark.parametrize("where, kept", [("step", 10), ("save", 6)])
def test_a_rank_that_is_killed_ends_the_others_and_keeps_the_last_checkpoint(tmp_path, where, kept):
    with pytest.raises(AssertionError) as error:
        spawn(2, _killed, tmp_path / "run", where)
    assert "exit codes [1, -9]" in str(error.value)
    assert "RankLost: another rank of the run has ended, or has not answered for 600 seconds" in str(error.value)
    trainer = Trainer(None, data(), tmp_path / "run", resume=True, show=False)
    assert trainer.step == kept
    assert len(list((tmp_path / "run" / "checkpoint.shards").iterdir())) == 2  # not those of the save cut short


def _asked_to_stop(run):
    """Rank 1 alone gets a Ctrl-C, in step 7."""
    from fusae.train.sharded import ShardedTrainer

    trainer = ShardedTrainer(config(), data(), run, show=False)
    step = trainer.train_step

    def interrupted(x):
        if trainer.mesh.rank == 1 and trainer.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(x)

    trainer.train_step = interrupted
    trainer.run()
    return trainer.step


def test_all_ranks_stop_after_the_same_step_where_one_is_asked_to(tmp_path):
    assert spawn(2, _asked_to_stop, tmp_path / "run") == [8, 8]
    assert checkpoint.read_about(tmp_path / "run" / NAME)["step"] == 8


def _full_disk(run):
    from fusae.train.sharded import ShardedTrainer, files

    trainer = ShardedTrainer(config(checkpoint_every=5, tokens=64 * 12), data(), run, show=False)
    write = files.write_tensors

    def no_room(path, *rest):
        if trainer.mesh.rank == 1 and trainer.step == 10:
            raise OSError(28, "No space left on device")
        write(path, *rest)

    files.write_tensors, seen = no_room, []
    check = trainer._try_checkpoint
    trainer._try_checkpoint = lambda display: (check(display), seen.append(_step_of(run)))
    trainer.run()
    return seen


def _step_of(run):
    return checkpoint.read_about(run / NAME)["step"]


def test_a_full_disk_on_one_rank_keeps_the_checkpoint_before_and_the_run(tmp_path):
    assert spawn(2, _full_disk, tmp_path / "run") == [[5, 5], [5, 5]]
    assert (tmp_path / "run" / "coder" / "coder.json").exists()


def _sends_batches(fields):
    import torch.distributed as dist

    from fusae.testing.ranks import losses
    from fusae.train.sharded import ShardedTrainer

    rows = data() if dist.get_rank() == 0 else None
    return losses(ShardedTrainer(config(**fields), rows, None, show=False, sent=True), 8)


def test_batches_that_one_rank_sends_are_those_that_all_would_read():
    from fusae.testing.ranks import losses

    found = spawn(2, _sends_batches, {"shard_latents": 1})
    assert found[0] == found[1] == losses(Trainer(config(), data(), None, show=False), 8)


def _refused(cases):
    from fusae.train.sharded import ShardedTrainer

    said = []
    for fields in cases:
        with pytest.raises(ValueError) as error:
            ShardedTrainer(config(**fields), data(), None, show=False)
        said.append([str(error.value)])
    return said


def test_what_several_processes_cannot_train_is_said_before_any_work():
    cases = {
        "shard_latents must divide the number of processes, 2, got 3": {"shard_latents": 3},
        "m must be a multiple of shard_latents = 2, got 63": {"m": 63},
        "form 'gated' is trained by one process, got 2; start one": {"form": "gated"},
        "penalty must be 'l0' or 'tanh' with 2 processes": {"form": "jumprelu", "penalty": "l0_squared"},
        "shard_latents must be the number of processes, 2, with form 'relu'": {"form": "relu", "shard_latents": 1},
        "m / shard_latents must be at least the latents selected in a row, 40, got 64 / 2": {"k": 40},
    }
    for said in spawn(2, _refused, list(cases.values())):
        assert [message.startswith(start) for (message,), start in zip(said, cases, strict=True)] == [True] * 6, said


def _workers(agent):
    """Process ids of an agent's workers, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"\nPPid:\t{agent}\n" in (folder / "status").read_text():
                environment = (folder / "environ").read_bytes().split(b"\0")
                found |= {int(e[5:]): int(folder.name) for e in environment if e.startswith(b"RANK=")}
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
def test_torchrun_goes_on_from_the_checkpoint_after_a_rank_was_killed(tmp_path):
    np.save(tmp_path / "x.npy", data().numpy())
    run, steps = tmp_path / "run", 400
    arguments = ["--data", str(tmp_path / "x.npy"), "--out", str(run), "--m", "64", "--k", "4", "--batch-size", "64",
                 "--tokens", str(64 * steps), "--checkpoint-every", "20", "--device", "cpu"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
               "--monitor-interval", "0.2", "--standalone", "-m", "--", "fusae", "train", *arguments]  # fmt: skip
    with open(tmp_path / "said", "w") as said:
        agent = subprocess.Popen(command, stderr=said, stdout=said, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while not (run / NAME).exists() and agent.poll() is None:
            time.sleep(0.02)
        os.kill(_workers(agent.pid)[1], signal.SIGKILL)
        try:
            ended = agent.wait(240)
        finally:
            agent.terminate()  # torchrun ends its ranks
        assert ended == 0, (tmp_path / "said").read_text()
    assert "another rank of the run has ended" in (tmp_path / "said").read_text()
    assert "Traceback" not in (tmp_path / "said").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(10, steps + 1, 10))
    assert sorted(p.name for p in run.iterdir()) == ["coder", "config.json", "metrics.jsonl"]
