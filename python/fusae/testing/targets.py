# SPDX-License-Identifier: Apache-2.0
"""What there is to test on this machine: every backend that can run, and every CPU instruction set it can run with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from .. import _dispatch
from .cases import Case

# What an interpreter takes on: Triton's needs 10 ms or so for a program of a kernel, whatever the program does.
INTERPRETED_ROWS, INTERPRETED_ELEMENTS = 40, 400_000


@dataclasses.dataclass(frozen=True)
class Target:
    """A backend; on the CPU with one of its instruction sets, and one way to take the products of the encoders."""

    backend: str
    isa: str | None = None
    gemm: str | None = None

    @property
    def device(self) -> torch.device:
        on_gpu = self.backend in ("cuda", "triton") and torch.cuda.is_available() and not self.interpreted
        return torch.device("cuda" if on_gpu else "cpu")

    @property
    def checks_codes(self) -> bool:
        """Whether codes that name no latent, or count more entries than they store, raise an IndexError.

        They do on the CPU. On a GPU a look would stall the stream: such a latent makes the row of its reconstruction
        NaN, and entries beyond the storage are left out; neither reads memory that is not the dictionary's.
        """
        return self.device.type == "cpu"

    @property
    def interpreted(self) -> bool:
        """Whether GPU kernels run on the CPU, by Triton's interpreter or (in tests/test_cuda_emulated.py) an emulation:
        right, but thousands of times slower than a GPU."""
        return self.backend in ("cuda", "triton") and _dispatch.by_name_only(self.backend) is not None

    def too_large(self, case: Case) -> str | None:
        """Why a case takes too long on this target, or None."""
        rows = case.shape.get("n", 1)
        elements = rows * max(case.shape.get("m", 1), case.shape.get("d", 1) * max(1, case.shape.get("k", 1)))
        if self.interpreted and (rows > INTERPRETED_ROWS or elements > INTERPRETED_ELEMENTS):
            return f"interpreted with at most {INTERPRETED_ROWS} rows and {INTERPRETED_ELEMENTS} elements"
        return None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Every fusae op inside runs on this target or raises."""
        with contextlib.ExitStack() as stack:
            if self.isa is not None:
                from ..backends import cpu

                stack.enter_context(cpu.force_isa(self.isa))
                stack.enter_context(cpu.force_gemm(self.gemm or "auto"))
            elif self.gemm is not None:
                from ..backends import triton

                stack.enter_context(triton.force_encoder(self.gemm))
            stack.enter_context(_dispatch.backend(self.backend))
            yield

    def __str__(self) -> str:
        return ".".join(filter(None, (self.backend, self.isa, self.gemm)))


def targets(*raw_ops: str, gemms: bool = False, interpreted: bool = False) -> list[Target]:
    """Targets that have all these raw ops on this machine (without any: that have one), in the order of dispatch.

    With `gemms`, each CPU instruction set twice: with its own GEMM and with torch's; Triton's `encode_topk` twice too.
    With `interpreted`, Triton's interpreter: only for inputs of a few thousand elements (`Target.too_large`).
    """
    found = []
    for backend in _dispatch.ORDER:
        missing = [_dispatch.why_not(op, backend, static=True) is not None for op in raw_ops or _dispatch.ops()]
        if any(missing) if raw_ops else all(missing):
            continue
        if backend == "cpu":
            from ..backends import cpu

            products = ("native", "torch") if gemms else (None,)
            found += [Target(backend, isa, gemm) for isa in cpu.isas() for gemm in products]
        elif interpreted or not Target(backend).interpreted:
            ways = ("fused", "chunked") if gemms and backend == "triton" and "encode_topk_fwd" in raw_ops else (None,)
            found += [Target(backend, gemm=way) for way in ways]
    return found


def left_out() -> dict[str, str]:
    """Why a backend (or one of its raw ops) is not tested here: ``{"triton": reason, "cuda topk_fwd": reason}``."""
    reasons = {}
    for backend in _dispatch.ORDER:
        if _dispatch.by_name_only(backend) is not None:
            reasons[backend] = _dispatch.by_name_only(backend)
        missing = {op: _dispatch.why_not(op, backend, static=True) for op in _dispatch.ops()}
        if len(set(missing.values())) == 1:
            missing = {"": next(iter(missing.values()))}
        reasons.update({f"{backend} {op}".strip(): why for op, why in missing.items() if why is not None})
    return reasons
