# SPDX-License-Identifier: Apache-2.0
"""One look for every long loop over tokens: bar, tokens done, tokens per second, time left."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _TokenRate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("- tokens/s" if speed is None else f"{speed:,.0f} tokens/s", style="progress.data.speed")


def token_progress(enabled: bool = True) -> Progress:
    """A `rich.progress.Progress` counted in tokens; a context manager. Prints nothing when `enabled` is false."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:>9,.0f}/{task.total:,.0f}"),
        _TokenRate(),
        TextColumn("left"),
        TimeRemainingColumn(),
        disable=not enabled,
        # The default window of 30 s jumps about when one batch takes seconds.
        speed_estimate_period=120,
    )
