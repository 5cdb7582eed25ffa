# SPDX-License-Identifier: Apache-2.0
"""The training loop of one coder on many processes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...nn import CoderLoss, SparseCoder
from ...nn.objectives import Objective
from .. import checkpoint, shards
from ..config import TrainConfig
from ..feed import Feed
from ..measure import Scaling, measure
from ..run_dir import _DONE, CODER, prepare, start_files
from ..setup import device_of, new_feed
from ..trainer import Trainer
from . import files
from .coder import ShardedCoder, check_sharding, new_sharded_coder
from .feed import SharedFeed, interruptible_together
from .mesh import Mesh, connect, first, is_first, restarts
from .objectives import sharded_objective

# Of the sums of an interval, the one that every rank has a part of: see `fusae.train.metrics`.
_ACTIVE = 3


class ShardedTrainer(Trainer):
    """A `Trainer` for each of many processes (ranks), which train one coder together; started by torchrun.

    ``config.shard_latents`` ranks share the latents: each holds its rows of encoder and decoder and their moments. As
    many such groups as there are encode different rows of every batch. All that a step computes from the codes is of
    the whole batch, so that every group has the same weights, and the run is that of one process to the rounding of
    sums, however many there are.

    Args:
        data: as of `Trainer`, the same on every rank; or, with `sent`, on the first one alone, from which the batches
            are sent to all others: for rows that come straight from a model. The others then pass None.
        sent: see `data`.

    `coder` and `export()` are of this rank's latents; the finished coder lies in ``run_dir/coder``, whole, in the form
    that one process writes. Only the first rank writes (all write their shards of a checkpoint) and shows.
    Where torchrun has begun anew after a rank was lost, the run goes on from its checkpoint (without one, from the
    start).

    Raises:
        RankLost: another rank has ended, or did not answer for ``config.rank_timeout`` seconds.
        Besides those of `Trainer`, which all ranks raise; what only one of them does, ends the others with `RankLost`.
    """

    mesh: Mesh
    coder: ShardedCoder
    _interruptible = staticmethod(interruptible_together)

    def __init__(
        self, config: TrainConfig | dict[str, Any] | None, data: Any, run_dir: Any = None, *, resume: bool = False,
        overwrite: bool = False, show: bool = True, about: dict[str, Any] | None = None, sent: bool = False,
    ) -> None:  # fmt: skip
        self._sent = sent
        given = config if isinstance(config, TrainConfig) else None
        device = device_of(_local(given.device if given else (config or {}).get("device", "auto")))
        timeout = given.rank_timeout if given else float((config or {}).get("rank_timeout", 600.0))
        connect(device, timeout)
        self._timeout = timeout
        self._writes = is_first()
        show = show and self._writes
        super().__init__(config, data, run_dir, resume=resume, overwrite=overwrite, show=show, about=about)

    # ---- the beginning -----------------------------------------------------------------------------------------------

    def _prepare(self, config: Any, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        path = None if self.run_dir is None else self.run_dir / checkpoint.NAME

        def look() -> dict[str, Any] | None:
            if path is None or not restarts() or resume:
                return prepare(self.run_dir, config, resume, overwrite)
            return prepare(self.run_dir, config, path.exists(), not (self.run_dir / _DONE).exists())

        return first(look, self._timeout)

    def _open(self, config: TrainConfig, data: Any) -> tuple[Any, Any, TrainConfig]:
        if not self._sent:
            return super()._open(config, data)
        found: list[Any] = [None, None]

        def look() -> TrainConfig:
            source, batches, resolved = super(ShardedTrainer, self)._open(config, data)
            found[:] = source, batches
            return resolved

        resolved = first(look, self._timeout)
        return found[0] or _Elsewhere((None, resolved.d)), found[1], resolved

    def _start(self) -> torch.device:
        device = device_of(_local(self.config.device))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.mesh = Mesh(self.config.shard_latents, device, self.config.rank_timeout)
        check_sharding(self.config, self.mesh)
        m = self.config.m // self.mesh.latents
        low = self.mesh.latent_rank * m
        self.part = shards.Part(low, low + m, self.config.m)
        return device

    def _new_feed(self, batches: Any) -> SharedFeed:
        own: Feed | None = None
        if not self._sent or self.mesh.rank == 0:
            own = new_feed(self.config, batches, self.device)
        return SharedFeed(own, self.mesh, sent=self._sent)

    def _new_coder(self, seed: int | None) -> tuple[ShardedCoder, Objective]:
        coder = new_sharded_coder(self.config, self.mesh, seed=seed, device=self.device)
        return coder, sharded_objective(self.config)

    def _measure(self, rows: int) -> Scaling:
        """Of the first rank."""
        mesh, b_dec = self.mesh, self.coder.b_dec.detach()

        def look() -> tuple[Any, ...]:
            found = measure(self.config, self.feed.peek(rows), self.coder)
            return found.scales, found.variance, found.centre.cpu(), found.mean.cpu(), b_dec.cpu()

        scales, variance, centre, mean, start = mesh.first(look)
        b_dec.copy_(start)
        scaling = Scaling.unknown(self.config, b_dec)
        return dataclasses.replace(scaling, scales=scales, variance=variance, centre=centre.to(b_dec),
                                   mean=mean.to(b_dec))  # fmt: skip

    def _start_files(self, new: bool) -> None:
        path = self.run_dir / checkpoint.NAME

        def start() -> None:
            files.remove_scratch_of(path)
            start_files(self, new)

        self.mesh.first(start)
        if not new and self.mesh.latent_rank:  # the first one has the sum of all
            self.interval.sums[_ACTIVE] = 0

    def _resume(self, found: dict[str, Any], shared: bool) -> None:
        """What one rank finds amiss, all of them raise: the shards that they read are not the same."""
        try:
            super()._resume(found, shared)
            error = None
        except (ValueError, OSError) as raised:
            error = raised
        for other in self.mesh.objects(error):
            if other is not None:
                raise other

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _dead(self) -> tuple[Tensor | None, int]:
        config = self.config
        if not (config.k_aux or config.preact_coefficient) or self.tokens < config.dead_window:
            return None, 0
        mask = self.dead.mask()
        if config.k_aux == 0:
            return mask, 0
        k_aux = min(config.k_aux, int(self._dead_count()))
        return (torch.cat([mask, mask.new_ones(1)]), k_aux) if k_aux else (None, 0)

    def _anneal(self, step: int) -> None:
        if self.config.form != "group_max":  # each rank has some of the groups, and their number stays
            super()._anneal(step)

    def _dead_count(self) -> Tensor:
        return self.mesh.sum_(super()._dead_count())

    def _clip(self) -> Tensor:
        names = {id(param): name for name, param in self.coder.named_parameters()}

        def joint(params: list[Tensor], squares: Tensor) -> Tensor:
            held = [shards.has_rows(names[id(param)], param) for param in params]
            spread = torch.tensor(held, device=squares.device)
            here = torch.where(spread, squares, 0.0).sum()
            return self.mesh.sum_(here) + torch.where(spread, 0.0, squares).sum()

        return self.optimizer.clip_grad_norm_(self.config.clip_norm, joint)

    # ---- what is written ---------------------------------------------------------------------------------------------

    def _join_counts(self) -> None:
        """The active latents of the interval: of all ranks on the first one, none on the others."""
        active = self.mesh.sum_(self.interval.sums[_ACTIVE].clone())
        self.interval.sums[_ACTIVE] = active if self.mesh.latent_rank == 0 else 0

    def _row(self) -> dict[str, Any]:
        self._check_same("all", [param for name, param in self._named() if not shards.has_rows(name, param)])
        self.interval.sums[_ACTIVE] = self.mesh.sum_(self.interval.sums[_ACTIVE].clone())
        return super()._row()

    def _named(self) -> list[tuple[str, Tensor]]:
        return [(name, param.detach()) for name, param in self.coder.named_parameters()]

    def check_alike(self) -> None:
        """Raises `RuntimeError` where two ranks that should hold the same weights do not, down to a bit."""
        self._check_same("all", [param for name, param in self._named() if not shards.has_rows(name, param)])
        self._check_same("data", [param for name, param in self._named() if shards.has_rows(name, param)])

    def _check_same(self, over: str, params: list[Tensor]) -> None:
        if (self.mesh.data if over == "data" else self.mesh.size) == 1:
            return
        sums = torch.stack([_checksum(param) for param in params])
        alike = [torch.equal(other, sums) for other in self.mesh.gather(sums, over)]
        if 0 in self.mesh.flags(all(alike)):
            raise RuntimeError(
                f"after step {self.step} rank {self.mesh.rank} finds that ranks that should hold the same weights do "
                "not: do all run on the same kind of machine, with the same number of threads?"
            )

    def _check_finite(self) -> None:
        try:
            super()._check_finite()
            said = None
        except FloatingPointError as error:
            said = str(error)
        for rank, message in enumerate(self.mesh.objects(said)):
            if message is not None:
                raise FloatingPointError(f"rank {rank}: {message}")

    def save_checkpoint(self) -> Any:
        if self.run_dir is None:
            raise ValueError("save_checkpoint needs a run_dir; this trainer was made without one")
        self._check_finite()
        self.check_alike()
        self._join_counts()
        files.save_checkpoint(self, self.run_dir / checkpoint.NAME)
        return self.run_dir / checkpoint.NAME

    def _plain(self) -> SparseCoder:
        return self.coder.part()

    def _save_coder(self) -> None:
        fields = {"k": self.config.k, "k_aux": self.config.k_aux}
        files.save_coder(self.export(), self.mesh, self.part, fields, self.run_dir / CODER)

    def take(self, x: Tensor, start: float, waited: float) -> dict[str, Any] | None:
        row = super().take(x, start, waited)
        return row if self._writes else None

    def train_step(self, x: Tensor) -> CoderLoss:
        """As of `Trainer`; `x` is the whole batch, the same on all ranks. The codes are of this rank's latents."""
        return super().train_step(x)

    def close(self) -> None:
        """Take leave of the other ranks. A process whose run failed just ends."""
        dist.destroy_process_group()


def is_finished(run_dir: Path) -> bool:
    """Whether the run in a directory has its coder, and nothing to go on with."""
    return (run_dir / _DONE).exists() and not (run_dir / checkpoint.NAME).exists()


class _Elsewhere(NamedTuple):
    """Stands for data that the first rank has."""

    shape: tuple[int | None, int]


def _local(device: str) -> str:
    """'cuda' and 'auto' are the GPU of this rank among those of its machine."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    return device


def _checksum(x: Tensor) -> Tensor:
    """int64 sum of the bits of `x`."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return x.reshape(-1).view(kinds[x.element_size()]).sum(dtype=torch.int64)
