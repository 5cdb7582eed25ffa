# SPDX-License-Identifier: Apache-2.0
"""Batches made ready by a thread while the step before them runs, looked at before they reach the weights."""

from __future__ import annotations

import collections
import threading
import time
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Seconds between two looks at whether to stop, on either side of the queue.
_POLL = 0.1


class _Item(NamedTuple):
    batch: Tensor | None
    dropped: int
    state: Any
    error: BaseException | None = None


class Feed:
    """Checked batches ``[batch_size, d]`` of a source, up to `ahead` of them made before they are asked for.

    Args:
        batches: an iterator of ``[batch_size, d]`` floating-point tensors with `state_dict` and `load_state_dict`.
        batch_size, d: what a batch must be.
        nonfinite: 'stop' raises at a row with NaN or infinite values, 'drop' leaves it out and counts it.
        ahead: batches to hold ready; 0: made when asked for, without a thread.
        pin: put them into page-locked memory, from which a GPU copies while it computes.

    Attributes:
        waited: seconds that `next` has waited for the source.
        dropped: rows left out of the batches that `next` has given.

    The order of the batches, and `state_dict`, are those of the source read one batch at a time: what lies ready counts
    as not read yet.
    """

    def __init__(
        self, batches: Any, batch_size: int, d: int, *, nonfinite: str = "stop", ahead: int = 2, pin: bool = False
    ) -> None:
        self.batches, self.batch_size, self.d = batches, batch_size, d
        self.nonfinite, self.ahead, self.pin = nonfinite, ahead, pin
        self.waited, self.dropped = 0.0, 0
        self._step = 0  # of the last batch made, for messages
        self._ready: collections.deque[_Item] = collections.deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stop = False
        self._state = batches.state_dict()

    def state_dict(self) -> Any:
        """The place in the source after the last batch that `next` gave."""
        return self._state

    def load_state_dict(self, state: Any, dropped: int = 0, step: int = 0) -> None:
        """Go on at a place that `state_dict` gave, after `step` batches. Only before the first `next`."""
        self.batches.load_state_dict(state)
        self._state, self.dropped, self._step = state, dropped, step

    def peek(self, rows: int) -> Tensor:
        """The rows of the next batches, `rows` of them (fewer where the source ends); they stay to be given."""
        while sum(len(item.batch) for item in self._ready if item.batch is not None) < rows:
            self._ready.append(self._make())
            if self._ready[-1].error is not None:
                if isinstance(self._ready[-1].error, StopIteration) and len(self._ready) > 1:
                    break
                raise self._ready[-1].error
        return torch.cat([item.batch for item in self._ready if item.batch is not None])[:rows]

    def next(self, stopped: threading.Event | None = None) -> Tensor | None:
        """The next batch; None if `stopped` was set while waiting for it.

        Raises:
            StopIteration: the source has ended.
            ValueError: the batch is none, or holds rows that are not finite.
        """
        start = time.perf_counter()
        try:
            if self.ahead == 0:
                item = self._ready.popleft() if self._ready else self._make()
            else:
                item = self._wait(stopped)
        finally:
            self.waited += time.perf_counter() - start
        if item is None:
            return None
        if item.error is not None:
            raise item.error
        self._state = item.state
        self.dropped += item.dropped
        return item.batch

    def _wait(self, stopped: threading.Event | None) -> _Item | None:
        with self._changed:
            if self._thread is None and not self._ends():
                self._stop = False
                # Not a method of this object, which would live as long as the thread.
                arguments = (weakref.ref(self), self._changed)
                self._thread = threading.Thread(target=_produce, args=arguments, name="fusae feed", daemon=True)
                self._thread.start()
            while not self._ready:
                if stopped is not None and stopped.is_set():
                    return None
                self._changed.wait(_POLL)
            item = self._ready.popleft() if self._ready[0].error is None else self._ready[0]
            self._changed.notify_all()
            return item

    def _ends(self) -> bool:
        return bool(self._ready) and self._ready[-1].error is not None

    def _make(self) -> _Item:
        try:
            batch = next(self.batches)
            self._step += 1
            batch, dropped = self._checked(batch, f"step {self._step}")
            if self.pin and not batch.is_cuda:
                batch = batch.pin_memory()
            return _Item(batch, dropped, self.batches.state_dict())
        except BaseException as error:  # raised again by `next`, in the thread that asked
            return _Item(None, 0, None, error)

    def _checked(self, x: Any, where: str) -> tuple[Tensor, int]:
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != self.d or x.shape[0] != self.batch_size:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"data: {where}: a batch must have shape [batch_size, d] = [{self.batch_size}, {self.d}], got {shape}"
            )
        if _sum_is_finite(x):
            return x, 0
        good = torch.isfinite(x).all(1)
        bad = int((~good).sum())
        if bad == 0:
            return x, 0  # finite values whose sum is not
        if self.nonfinite == "stop":
            raise ValueError(
                f"data: {where}: {bad} of {len(x)} rows hold NaN or infinite values (the first is row "
                f"{int((~good).nonzero()[0])} of the batch); leave such rows out of the data, or set nonfinite = 'drop'"
            )
        if bad == len(x):
            raise ValueError(f"data: {where}: all {bad} rows hold NaN or infinite values: nothing is left to train on")
        return x[good], bad

    def close(self) -> None:
        """End the thread. What lies ready stays so: `next` may be called again."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with self._changed:
                self._stop = True
                self._changed.notify_all()
            thread.join()


def _produce(reference: weakref.ref[Feed], changed: threading.Condition) -> None:
    """What the thread does, until it is told to stop, the source ends, or nobody has the feed any more."""
    while True:
        with changed:
            feed = reference()
            if feed is None or feed._stop:
                return
            if len(feed._ready) >= feed.ahead:
                del feed
                changed.wait(_POLL)
                continue
        item = feed._make()
        with changed:
            feed._ready.append(item)
            changed.notify_all()
        if item.error is not None:
            return
        del feed


def _sum_is_finite(x: Tensor) -> bool:
    """A finite sum means finite values, and a sum is a third of the work of a look at each."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return bool(torch.isfinite(x.sum(dtype=torch.float32)))
    # numpy: a parallel op of torch in a second thread would bring threads of its own, beside those of the step.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(x.detach().numpy().sum()))
