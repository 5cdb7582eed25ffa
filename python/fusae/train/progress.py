# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds between two plain lines: a log file should stay readable after a day.
_LINE_EVERY = 10.0


class TrainingDisplay:
    """Shows steps and metrics of a run on stderr. A context manager; shows nothing unless `enabled`."""

    def __init__(self, enabled: bool, total_tokens: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=not enabled)
        self.total = total_tokens
        self._live = enabled and self.console.is_terminal
        self._last_line = float("-inf")
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[quality]}"),
            console=self.console,
            disable=not self._live,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task("train", total=total_tokens, rate="", quality="")

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        with contextlib.suppress(OSError):  # a log on a full disk is no reason to end a run
            self.console.print(text, highlight=False, soft_wrap=True)

    def tokens(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def metrics(self, row: dict[str, Any], last: bool = False, name: str | None = None) -> None:
        """A row of metrics.jsonl (of the run called `name`, where there are several)."""
        rate = f"{row['tokens_per_s']:,.0f} tokens/s"
        quality = "" if name is None else f"{name}: "
        quality += (
            f"FVU {'-' if row['fvu'] is None else format(row['fvu'], '.3f')}  L0 {row['l0']:.1f}  dead {row['dead']:,}"
        )
        self._progress.update(self._task, rate=rate, quality=quality)
        now = time.monotonic()
        if self._live or (now - self._last_line < _LINE_EVERY and not last):
            return
        self._last_line = now
        left = (self.total - row["tokens"]) / max(row["tokens_per_s"], 1e-9)
        share = f"{100 * row['tokens'] / self.total:3.0f} %"
        self.say(f"step {row['step']:,}  {share}  {rate}  left {_clock(left)}  {quality}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
