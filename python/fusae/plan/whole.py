# SPDX-License-Identifier: Apache-2.0
"""A plan: what a run needs, what the device has, and what to change where that is too little."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..train import TrainConfig
from .memory import Needs, bytes_by_degree, bytes_per_parameter, needs
from .rates import Rates, measure_rates
from .speed import Speed, speed

# Beside the counted parts: Python, torch and its libraries; on a GPU the context and its allocator's slack.
OVERHEAD = {"cpu": 350 << 20, "cuda": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes: config (resolved), device, needs, overhead and room (bytes), speed and rates (None: not measured),
    per_parameter (bytes, by mode), by_degree (bytes on each of 1, 2, 4, ... devices that share the latents), advice
    (one line each; empty where the run fits)."""

    config: TrainConfig
    device: str
    needs: Needs
    overhead: int
    room: int | None
    speed: Speed | None
    rates: Rates | None
    per_parameter: dict[str, float]
    by_degree: dict[int, int]
    advice: list[str]

    @property
    def fits(self) -> bool | None:
        """None where the device does not tell how much it has."""
        return None if self.room is None else self.needs.total + self.overhead <= self.room

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        speed = None if self.speed is None else dataclasses.asdict(self.speed)
        return {
            "config": self.config.to_dict(), "device": self.device, "bytes": self.needs.parts,
            "total_bytes": self.needs.total, "overhead_bytes": self.overhead, "room_bytes": self.room,
            "fits": self.fits, "evaluation_bytes": self.needs.evaluation, "parameters": self.needs.parameters,
            "touched_latents": self.needs.touched, "bytes_per_parameter": self.per_parameter, "speed": speed,
            "total_bytes_by_shard_latents": self.by_degree,
            "rates": None if self.rates is None else dataclasses.asdict(self.rates), "advice": self.advice,
        }  # fmt: skip


def plan(
    config: TrainConfig, device: str = "cpu", *, room: int | None = None, measured: bool = True
) -> Plan:
    """Plan a run.

    Args:
        config: resolved.
        device: 'cpu', 'cuda', 'cuda:1', ...; need not be here where nothing is measured and `room` is given.
        room: bytes that there are (default: what this machine has free).
        measured: time the pieces of a step on the device, some seconds, for the predicted speed.
    """
    need, kind = needs(config, device.split(":")[0]), device.split(":")[0]
    overhead = OVERHEAD.get(kind, 0)
    room = room_of(device) if room is None else room
    rates = measure_rates(config, device) if measured else None
    advice = [] if room is None or need.total + overhead <= room else advise(config, kind, room - overhead)
    return Plan(config, device, need, overhead, room, None if rates is None else speed(config, rates), rates,
                bytes_per_parameter(config), bytes_by_degree(config, kind), advice)  # fmt: skip


def room_of(device: str) -> int | None:
    """Bytes that are free on a device of this machine; None where it does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.exists() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
            found.append(int(text))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def advise(config: TrainConfig, kind: str, room: int) -> list[str]:
    """Changes after which the run fits, each on its own, the mildest first; then the widest dictionary that does."""
    steps: list[dict[str, Any]] = [{"moments": "bfloat16"}, {"moments": "8bit"}]
    if config.ema:
        steps.insert(0, {"ema": 0.0})
    if config.k_aux:
        steps.append({"k_aux": min(config.k_aux, config.k)})
    steps.append({"batch_size": max(1, config.batch_size // 4)})
    steps.append({"optimizer": "lazy", "beta1": 0.0})
    steps.append({"optimizer": "lazy", "beta1": 0.0, "moments": "8bit"})
    low = {"dtype": "bfloat16", "weights": "bfloat16", "ema": 0.0}
    steps += [{**low, "moments": "8bit"}, {**low, "moments": "8bit", "optimizer": "lazy", "beta1": 0.0}]
    lines = []
    for change in steps:
        try:
            changed = dataclasses.replace(config, **change)
        except ValueError:  # does not go with the rest
            continue
        total = needs(changed, kind).total
        if changed != config and total <= room:
            lines.append(f"{_toml(change)}: {gigabytes(total)} would do")
    for ranks, total in bytes_by_degree(config, kind).items():
        if ranks > (config.shard_latents or 1) and total <= room:
            lines.append(f"shard_latents = {ranks}: {gigabytes(total)} on each of as many devices would do")
            break
    widest = config.m
    while widest > config.k and needs(_of_width(config, widest), kind).total > room:
        widest //= 2
    if widest > config.k:
        lines.append(f"m = {widest}: {gigabytes(needs(_of_width(config, widest), kind).total)}")
    return lines or ["nothing that this knows of would make it fit: take a machine with more memory"]


def _of_width(config: TrainConfig, m: int) -> TrainConfig:
    """The same with m latents; nested prefixes are left to their default."""
    return dataclasses.replace(
        config, m=m, k_aux=min(config.k_aux, m), prefixes=None, k_start=config.k_start and min(config.k_start, m)
    )


def _toml(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in fields.items())


def gigabytes(size: float) -> str:
    """``1.23 GB``, in units of 10**9 (below 1 GB, MB)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
