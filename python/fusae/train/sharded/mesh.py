# SPDX-License-Identifier: Apache-2.0
"""The processes (ranks) of one run as a grid ``[data, latents]``, and what they say to each other."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class RankLost(RuntimeError):
    """Another rank of the run has ended, or has not answered in time. What was saved last is kept."""


def is_launched() -> bool:
    """Whether torchrun started this process, or a process group is there already."""
    return dist.is_available() and (dist.is_initialized() or dist.is_torchelastic_launched())


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    known = dist.is_available() and dist.is_initialized()
    return (dist.get_rank() if known else int(os.environ.get("RANK", 0))) == 0


def restarts() -> int:
    """How often torchrun has begun anew (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def connect(device: torch.device, timeout: float) -> None:
    """Meet the other ranks, at the address that torchrun gives: over NCCL on GPUs, gloo on CPUs (and for what lies in
    the memory of the host). Nothing where they have met before.

    Args:
        timeout: seconds to wait for a rank, then and whenever later.
    """
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = datetime.timedelta(seconds=timeout)
    with _watched(timeout):
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        # torchrun keeps its store when it begins anew, with the addresses of ranks that are gone.
        store = dist.PrefixStore(f"fusae/{restarts()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)


@contextlib.contextmanager
def _watched(timeout: float) -> Iterator[None]:
    """Turn what a broken connection raises into `RankLost`."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError, and what gloo raises itself
        if isinstance(error, RankLost):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RankLost(
            f"another rank of the run has ended, or has not answered for {timeout:g} seconds; what was saved last is "
            f"kept ({reason})"
        ) from error


class Mesh:
    """Ranks ``data · latents + j``: each holds the latents of part j of `latents`, and encodes its share of the rows.

    Args:
        latents: ranks that share the latents among them; None: all.
        device: of this rank.
        timeout: seconds, for messages; that of `connect`.

    Attributes:
        rank, size: of the whole run.
        latents, data: extents of the grid.
        latent_rank, data_rank: this rank's place in it.

    Every method is collective: all ranks of the grid, or of the line that it names, must call it in the same order. A
    sum comes out with the same bits on each of them.

    Raises:
        ValueError: `latents` does not divide the number of ranks.
    """

    def __init__(self, latents: int | None, device: torch.device, timeout: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device, self.timeout = device, timeout
        self.latents = self.size if latents is None else latents
        if self.size % self.latents:
            raise ValueError(
                f"shard_latents must divide the number of processes, {self.size}, got {self.latents}; start as many as "
                f"torchrun --nproc-per-node {self.latents}, or leave it out"
            )
        self.data = self.size // self.latents
        self.data_rank, self.latent_rank = divmod(self.rank, self.latents)
        with _watched(timeout):
            mesh = dist.init_device_mesh(device.type, (self.data, self.latents), mesh_dim_names=("data", "latents"))
            self._groups = {name: mesh.get_group(name) for name in ("data", "latents")}
        self._groups["all"] = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Mesh:
        return self

    def _extent(self, over: str) -> int:
        return self.size if over == "all" else getattr(self, over)

    def rows(self, n: int) -> slice:
        """The rows, of n, that this rank encodes."""
        return slice(n * self.data_rank // self.data, n * (self.data_rank + 1) // self.data)

    def sum_(self, x: Tensor, over: str = "latents") -> Tensor:
        """Add up `x` in place."""
        if self._extent(over) > 1:
            with _watched(self.timeout):
                dist.all_reduce(x, group=self._groups[over])
        return x

    def gather(self, x: Tensor, over: str = "latents") -> list[Tensor]:
        """Every rank's `x`, all of the same shape."""
        if self._extent(over) == 1:
            return [x]
        x = x.contiguous()
        raw = x.view(torch.uint8) if x.dtype in (torch.bfloat16, torch.float16) else x
        parts = [torch.empty_like(raw) for _ in range(self._extent(over))]
        with _watched(self.timeout):
            dist.all_gather(parts, raw, group=self._groups[over])
        return [part.view(x.dtype) for part in parts]

    def gather_rows(self, x: Tensor, over: str = "latents", sizes: list[int] | None = None) -> list[Tensor]:
        """Every rank's `x` ``[l, ...]``, whose lengths may differ. `sizes`: all the lengths, where they are known."""
        if self._extent(over) == 1:
            return [x]
        if sizes is None:
            sizes = [int(part) for part in self.gather(torch.tensor([len(x)], device=x.device), over)]
        if max(sizes) == 0:
            return [x] * len(sizes)
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        return [part[:size] for part, size in zip(self.gather(padded, over), sizes, strict=True)]

    def objects(self, value: T) -> list[T]:
        """Every rank's plain value. Waits for all of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _watched(self.timeout):
            dist.all_gather_object(found, value)
        return found

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank; all raise what it raises there."""
        return first(make, self.timeout)

    def flags(self, flag: int) -> list[int]:
        """Every rank's small number, by way of the host's memory."""
        return [int(part) for part in self.gather(torch.tensor([flag]), "all")]

    def broadcast_(self, x: Tensor) -> Tensor:
        """Take over the first rank's `x`, in place."""
        if self.size > 1:
            with _watched(self.timeout):
                dist.broadcast(x, 0)
        return x

    def to_first(self, x: Tensor | None, source: int, like: Tensor) -> Tensor | None:
        """On the first rank, the tensor `x` of rank `source`; `like`: of its shape and dtype, in the host's memory.
        Only these two need to call."""
        if source == 0:
            return x
        with _watched(self.timeout):
            if self.rank == source:
                dist.send(x.cpu().contiguous().view(torch.uint8), 0)
            elif self.rank == 0:
                dist.recv(like.view(torch.uint8), source)
        return like


def first(make: Callable[[], T], timeout: float) -> T:
    """`Mesh.first` of all ranks that there are, before there is a mesh."""
    if dist.get_world_size() == 1:
        return make()
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            said[0] = (make(), None)
        except Exception as error:
            said[0] = (None, error)
    with _watched(timeout):
        dist.broadcast_object_list(said, 0)
    value, error = said[0]
    if error is not None:
        raise error
    return value
