# SPDX-License-Identifier: Apache-2.0
"""Writing files of other tools: whole or not at all, nothing rounded unasked, nothing left out in silence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .native import replacing, write_json


class Rounded:
    """Thresholds in the dtype that a tool gives all its weights. Raises where that would change one."""

    def __init__(self, dtype: torch.dtype, tool: str) -> None:
        self.dtype, self.tool = dtype, tool

    def __call__(self, name: str, value: Tensor) -> Tensor:
        rounded = value.to(self.dtype)
        if not torch.equal(rounded.to(value.dtype), value):
            raise ValueError(
                f"{name} is {str(value.dtype)[6:]}, and {self.tool} would round it to {str(self.dtype)[6:]} with the "
                "rest; save with dtype='float32', or round it in the coder"
            )
        return rounded


def cannot(tool: str, what: str) -> ValueError:
    return ValueError(f"format: {tool} has no {what}")


def without(tool: str, config: Any, *features: str) -> None:
    """Raises where the coder of this configuration has one of these, which the tool has not."""
    for name in features:
        value = getattr(config, name, None)
        if name == "select_by_norm" and value and config.select != "relu":
            raise cannot(tool, "coder with select_by_norm; call coder.fold_norms_() first")
        if name != "select_by_norm" and value not in (None, False, "none"):
            raise cannot(tool, f"coder with {name} {value!r}")


def plain_json(value: Any) -> Any:
    """`value` where JSON can hold it; a `ValueError` naming metadata otherwise."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must hold plain values ({error})") from error


def write_folder(path: Path, weights: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, Any]) -> None:
    """Files of tensors (``.safetensors``, or ``torch.save`` for ``.pt``) and of JSON, each whole or not at all.

    The weights first: a folder that has a new configuration has the weights of it.
    """
    path.mkdir(parents=True, exist_ok=True)
    for name, tensors in weights.items():
        plain = {key: _plain(value) for key, value in tensors.items()}
        with replacing(path / name) as scratch:
            if name.endswith(".safetensors"):
                safetensors.torch.save_file(plain, scratch, {"format": "pt"})
            else:
                torch.save(plain, scratch)
    for name, value in texts.items():
        if name.endswith(".json"):
            write_json(path / name, value)
        else:
            with replacing(path / name) as scratch:
                scratch.write_text(value, encoding="utf-8")


def _plain(value: Tensor) -> Tensor:
    """Memory of its own, of just its elements: what a file is to hold."""
    value = value.detach().cpu().contiguous()
    return value if value.numel() * value.element_size() == value.untyped_storage().nbytes() else value.clone()
