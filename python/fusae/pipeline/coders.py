# SPDX-License-Identifier: Apache-2.0
"""The coder of a run, finished or not."""

from __future__ import annotations

from pathlib import Path

import torch

from ..formats.native import FormatError, check_sums, open_tensors
from ..nn import SparseCoder, SparseCoderConfig
from ..train import Trainer, checkpoint
from ..train.average import WeightAverage


def load_coder(run: str | Path, device: torch.device | str = "cpu") -> tuple[SparseCoder, int | None]:
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
        return SparseCoder.load(run / "coder", device), None
    about = checkpoint.read_about(path)
    config = about["config"]
    shape = SparseCoderConfig(
        config.d, config.m, config.k, select_by_norm=config.select_by_norm, k_aux=config.k_aux,
        dtype="float32" if config.dtype == "bfloat16" else config.dtype,
    )  # fmt: skip
    trainer = Trainer.__new__(Trainer)  # no data at hand, and none is needed for the export
    trainer.config, trainer.scale = config, about["scale"]
    trainer.coder = SparseCoder(shape, seed=None, device=device)
    trainer.average = WeightAverage(trainer.coder, config.ema) if config.ema else None
    trainer.centre = torch.zeros_like(trainer.coder.b_dec, requires_grad=False)
    targets = {name: param.detach() for name, param in trainer.coder.named_parameters()} | {"centre": trainer.centre}
    if trainer.average is not None:
        trainer.average.steps = about["step"]
        targets |= {f"{name}.average": value for name, value in trainer.average.sums.items()}
    file, header = open_tensors(path, "the checkpoint of an unfinished run")
    check_sums(path, file, header)
    names = set(file.keys())
    for name, target in targets.items():
        found = list(file.get_slice(name).get_shape()) if name in names else "nothing"
        if found != list(target.shape):
            raise FormatError(f"{path}: tensors.{name} must have shape {list(target.shape)}, got {found}")
        target.copy_(file.get_tensor(name))
    return trainer.export(), about["step"]
