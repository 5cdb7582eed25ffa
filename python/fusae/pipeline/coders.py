# SPDX-License-Identifier: Apache-2.0
"""The coder of a run, finished or not."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..nn import CrossLayerTranscoder, SparseCoder, load
from ..train import Trainer, checkpoint, shards


def load_coder(
    run: str | Path, device: torch.device | str = "cpu"
) -> tuple[SparseCoder | CrossLayerTranscoder, int | None]:
    """The coder of plain inputs in a run's directory, and after how many steps, for an unfinished run (else None).

    Of an unfinished run it is what `Trainer.export` would give at the last checkpoint; nothing in the directory is
    touched, so it may still be training.

    Raises:
        FileNotFoundError: neither a finished coder nor a checkpoint.
        fusae.formats.FormatError: a file is damaged or foreign.
    """
    run = Path(run)
    path = run / checkpoint.NAME
    if not path.exists():
        if not (run / "coder" / "coder.json").exists():
            raise FileNotFoundError(
                f"{run} holds neither coder/coder.json nor {checkpoint.NAME}: is it the directory of a run? One that "
                f"was stopped before its first checkpoint goes on with: fusae train --resume {run}"
            )
        return load(run / "coder", device).eval(), None
    with tempfile.TemporaryDirectory(prefix="fusae-") as scratch:
        # The same files even where the run replaces or removes them meanwhile.
        _keep(path, Path(scratch) / checkpoint.NAME)
        about = checkpoint.read_about(Path(scratch) / checkpoint.NAME)
        for name in shards.files_of(about):
            _keep(run / shards.FOLDER / name, Path(scratch) / shards.FOLDER / name)
        given = {"device": str(device), "tensorboard": False}
        trainer = Trainer(given, _NoRows(about["config"].d), scratch, resume=True, show=False)
    return trainer.export().eval(), trainer.step


def _keep(path: Path, copy: Path) -> None:
    copy.parent.mkdir(exist_ok=True)
    try:
        os.link(path, copy)
    except OSError:  # another file system
        shutil.copyfile(path, copy)


class _NoRows:
    """Stands for the data of a trainer that does not train."""

    def __init__(self, d: int) -> None:
        self.shape = (None, d)

    def batches(self, *_: Any, **_options: Any) -> _NoRows:
        return self

    def __iter__(self) -> _NoRows:
        return self

    def __next__(self) -> Any:
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, _state: dict[str, Any]) -> None:
        pass
