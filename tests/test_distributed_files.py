# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several processes: gone on with by as many others, whole or not at all; and the finished coder."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open

from fusae.formats import FormatError
from fusae.nn import load
from fusae.pipeline.coders import load_coder
from fusae.testing.ranks import M, config, data, losses, spawn
from fusae.train import TrainConfig, Trainer, train

NAME, FOLDER = "checkpoint.safetensors", "checkpoint.shards"
GIVEN = {"form": "batch_topk", "ema": 0.9, "moments": "8bit", "k_start": 8, "tokens": 64 * 24}


def _trained(run, until, fields, resume=False):
    """Train to a step; the losses of some steps from there (not saved)."""
    from fusae.train.sharded import ShardedTrainer

    given = {k: v for k, v in fields.items() if k == "shard_latents"} if resume else config(**fields)
    trainer = ShardedTrainer(given, data(), run, resume=resume, show=False)
    if until:
        trainer.run(until=until)
    trainer.mesh.objects(None)
    return losses(trainer, 4)


def _resumed_from(runs, fields):
    return [_trained(run, 0, fields, resume=True) for run in runs]


def _goes_on(run):
    return losses(Trainer(None, data(), run, resume=True, show=False), 4)


def _finish(run, fields):
    from fusae.train.sharded import ShardedTrainer

    ShardedTrainer(config(**fields), data(), run, show=False).run()
    return True


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of 1, 2 and 4 processes stopped after step 8, and the losses of the steps after it."""
    root = tmp_path_factory.mktemp("runs")
    alone = Trainer(config(**GIVEN), data(), root / "1", show=False)
    alone.run(until=8)
    found = {1: losses(alone, 4)}
    for size in (2, 4):
        found[size] = spawn(size, _trained, root / str(size), 8, GIVEN)[0]
    return root, found


def close(a, b):
    return [value for pair in a for value in pair] == pytest.approx(
        [value for pair in b for value in pair], rel=2e-2, abs=1e-6
    )


def test_a_checkpoint_of_any_degree_is_gone_on_with_by_any_other(runs):
    """Only stochastic rounding tells them apart, whose bits are by row of a rank's matrix."""
    root, found = runs
    every = [root / str(size) for size in (1, 2, 4)]
    assert _goes_on(every[0]) == found[1]
    two, four = spawn(2, _resumed_from, every, {})[0], spawn(4, _resumed_from, every, {"shard_latents": 2})[0]
    for origin, after in ((1, 0), (2, 1), (4, 2)):
        assert close(_goes_on(every[after]), found[origin])
        assert close(two[after], found[origin])
        assert close(four[after], found[origin])
    assert two[1] == found[2]  # the same degree: the same bits


def test_every_rank_writes_its_latents_and_one_file_names_them(runs):
    root, _ = runs
    for size in (2, 4):
        shards = sorted((root / str(size) / FOLDER).iterdir())
        assert [shard.name.split("-")[3:] for shard in shards] == [
            [str(rank + 1), "of", f"{size}.safetensors"] for rank in range(size)
        ]
        whole = _elements(root / "1" / NAME)
        common, parts = _elements(root / str(size) / NAME), [_elements(shard) for shard in shards]
        assert not set(common) & set(parts[0]) and set(common) | set(parts[0]) == set(whole)
        assert all(part == {name: whole[name] // size for name in part} for part in parts)
        assert {name: whole[name] for name in common} == common and "W_enc" not in common


def _elements(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118


def _spoiled(runs, tmp_path, spoil):
    root, _ = runs
    shutil.copytree(root / "2", tmp_path / "run")
    first, second = sorted((tmp_path / "run" / FOLDER).iterdir())
    spoil(first, second)
    return second.name


@pytest.mark.parametrize("what", ["missing", "stale", "damaged"])
def test_a_shard_that_is_missing_stale_or_damaged_is_named(runs, tmp_path, what):
    def spoil(first, second):
        if what == "missing":
            second.unlink()
        elif what == "stale":
            shutil.copyfile(first.parent.parent.parent.parent / "older", second)
        else:
            raw = bytearray(second.read_bytes())
            raw[-100] ^= 1
            second.write_bytes(raw)

    if what == "stale":
        older = spawn(2, _stale, tmp_path / "other")
        assert older == [True, True]
        shutil.copyfile(sorted((tmp_path / "other" / FOLDER).iterdir())[1], tmp_path.parent / "older")
    name = _spoiled(runs, tmp_path, spoil)
    wanted = {
        "missing": f"{name} is missing: the checkpoint of step 8 has its latents {M // 2} to {M - 1} there",
        "stale": f"{name} is of another save, of step 5: the checkpoint of step 8",
        "damaged": rf"{name}: \S+ is damaged",
    }[what]
    with pytest.raises(FormatError, match=wanted):
        Trainer(None, data(), tmp_path / "run", resume=True, show=False)


def _stale(run):
    _trained(run, 5, GIVEN)
    return True


def test_one_process_that_goes_on_leaves_one_file(runs, tmp_path):
    root, _ = runs
    shutil.copytree(root / "2", tmp_path / "run")
    (tmp_path / "run" / FOLDER / "step-9-of-a-save-cut-short.safetensors").write_bytes(b"half")
    trainer = Trainer(None, data(), tmp_path / "run", resume=True, show=False)
    assert len(list((tmp_path / "run" / FOLDER).iterdir())) == 2
    trainer.run(until=10)
    assert not (tmp_path / "run" / FOLDER).exists() and (tmp_path / "run" / NAME).exists()


def test_the_coder_of_an_unfinished_run_is_read_from_its_shards(runs):
    root, _ = runs
    (one, step), (two, same) = load_coder(root / "1"), load_coder(root / "2")
    assert step == same == 8 and two.config == one.config
    torch.testing.assert_close(two.W_dec, one.W_dec, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("given", [{}, {"form": "jumprelu"}])
def test_the_finished_coder_is_that_of_one_process_to_rounding(tmp_path, given):
    fields = {"tokens": 64 * 20, **given}
    spawn(2, _finish, tmp_path / "two", fields)
    train(TrainConfig.from_dict(config(**fields).to_dict()), data(), tmp_path / "one", show=False)
    one, two = load(tmp_path / "one" / "coder"), load(tmp_path / "two" / "coder")
    assert one.config == two.config and not (tmp_path / "two" / FOLDER).exists()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    rows = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
            for run in ("one", "two")]  # fmt: skip
    for ours, theirs in zip(*rows, strict=True):
        for key in ("step", "loss", "fvu", "l0", "dead", "aux_loss", "lr", "k"):
            wanted = ours[key]
            assert theirs[key] == (wanted if wanted is None else pytest.approx(wanted, rel=1e-4)), key
