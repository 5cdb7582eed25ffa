# SPDX-License-Identifier: Apache-2.0
"""The same batches on every rank, and one answer to whether to go on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..feed import Feed
from ..interrupt import interruptible
from .mesh import Mesh

_GOOD, _STOP, _ENDED, _FAILED = range(4)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class AgreedStop:
    """An event that is set on all ranks after the same step, where one of them was asked to stop."""

    def __init__(self, asked: threading.Event) -> None:
        self.asked, self.agreed = asked, False

    def is_set(self) -> bool:
        return self.agreed


@contextlib.contextmanager
def interruptible_together() -> Iterator[AgreedStop]:
    """`interruptible`, agreed upon by `SharedFeed.next`."""
    with interruptible() as asked:
        yield AgreedStop(asked)


class SharedFeed:
    """Batches ``[batch_size, d]`` that are the same on all ranks: what is to become of them is split later.

    Args:
        feed: of this rank; every rank reads the same source. None: the first rank's alone, which sends its batches to
            all others (a model that makes them runs once). Then it is None on every other rank.
        mesh: the ranks.
        sent: whether the first rank sends.

    Attributes and methods as of `Feed`. After a batch each rank has said whether it has it and whether it was asked to
    stop: all of them go on, stop or fail after the same step.
    """

    def __init__(self, feed: Feed | None, mesh: Mesh, *, sent: bool = False) -> None:
        self.feed, self.mesh, self.sent = feed, mesh, sent
        self._waited, self._dropped = 0.0, 0

    @property
    def waited(self) -> float:
        return self._waited if self.feed is None else self.feed.waited

    @property
    def dropped(self) -> int:
        return self._dropped if self.feed is None else self.feed.dropped

    def state_dict(self) -> Any:
        return None if self.feed is None else self.feed.state_dict()

    def load_state_dict(self, state: Any, dropped: int = 0, step: int = 0) -> None:
        if self.feed is not None:
            self.feed.load_state_dict(state, dropped, step)
        self._dropped = dropped

    def peek(self, rows: int) -> Tensor:
        """On the first rank alone."""
        return self.feed.peek(rows)

    def next(self, stopped: AgreedStop | None = None) -> Tensor | None:
        """The next batch.

        Raises:
            StopIteration: the source has ended.
            ValueError: a rank's source failed; on that rank with the reason.
        """
        batch, error, flag = None, None, _GOOD
        try:
            if self.feed is not None:
                batch = self.feed.next(stopped)
        except StopIteration:
            flag = _ENDED
        except Exception as raised:
            error, flag = raised, _FAILED
        if flag == _GOOD and stopped is not None and stopped.asked.is_set():
            flag = _STOP
        flags = self.mesh.flags(flag)
        if error is not None:
            raise error if isinstance(error, ValueError) else ValueError(f"data: {error!r}") from error
        if _FAILED in flags:
            raise ValueError(f"data: rank {flags.index(_FAILED)} could not read its batch, and says why")
        if _ENDED in flags:
            raise StopIteration
        if stopped is not None and _STOP in flags:
            stopped.agreed = True  # after this batch
        return self._send(batch) if self.sent else batch

    def _send(self, batch: Tensor | None) -> Tensor:
        mesh = self.mesh
        head = torch.zeros(4, dtype=torch.int64)
        if batch is not None:
            head[:] = torch.tensor([*batch.shape, _DTYPES.index(batch.dtype), self.feed.dropped])
        rows, d, kind, self._dropped = mesh.broadcast_(head).tolist()
        x = torch.empty(rows, d, dtype=_DTYPES[kind], device=mesh.device)
        if batch is not None:
            x.copy_(batch)
        mesh.broadcast_(x if x.dtype.itemsize > 2 else x.view(torch.uint8))
        return x

    def close(self) -> None:
        if self.feed is not None:
            self.feed.close()
