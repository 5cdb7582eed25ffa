# SPDX-License-Identifier: Apache-2.0
"""One look for every long loop over tokens: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

# Seconds between two plain lines: a log file shows that the work goes on and stays readable.
_LINE_EVERY = 15.0


class _TokenRate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("- tokens/s" if speed is None else f"{speed:,.0f} tokens/s", style="progress.data.speed")


class _TokenCount(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_count_of(task).rjust(9), style="progress.download")


def _count_of(task: Task) -> str:
    return f"{task.completed:,.0f}" + ("" if task.total is None else f"/{task.total:,.0f}")


class _TokenProgress(Progress):
    """On a terminal a `rich` bar; elsewhere, where a bar cannot be redrawn, plain lines."""

    _last_line = float("-inf")

    def start(self) -> None:
        self._last_line = time.monotonic()
        super().start()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        task, now = self._tasks[task_id], time.monotonic()
        if self.disable or self.console.is_terminal or now - self._last_line < _LINE_EVERY or not task.speed:
            return
        self._last_line = now
        left = "" if task.total is None else f"  left {(task.total - task.completed) / task.speed:,.0f} s"
        self.console.print(f"{task.description} {_count_of(task)}  {task.speed:,.0f} tokens/s{left}", highlight=False)


def token_progress(enabled: bool = True) -> Progress:
    """A `rich.progress.Progress` on stderr, counted in tokens; a context manager. Silent when `enabled` is false.

    A task with ``total=None`` (no end known) counts up.
    """
    return _TokenProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        _TokenCount(),
        _TokenRate(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
        # The default window of 30 s jumps about when one batch takes seconds.
        speed_estimate_period=120,
    )
