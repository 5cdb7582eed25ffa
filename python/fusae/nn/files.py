# SPDX-License-Identifier: Apache-2.0
"""`load`: whatever coder lies in a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ..formats.native import FormatError, read_json
from . import coder, cross_layer
from .coder import SparseCoder
from .cross_layer import CrossLayerTranscoder

_CLASSES = {coder.FORMAT: SparseCoder, cross_layer.FORMAT: CrossLayerTranscoder}


def load(folder: str | Path, device: torch.device | str | None = None) -> SparseCoder | CrossLayerTranscoder:
    """The coder that `save` wrote into `folder`, of the class that its files name; in eval mode.

    Raises:
        FileNotFoundError: a file is not there.
        fusae.formats.FormatError: a file is truncated, foreign, of an unknown version, or does not fit its
            configuration; names the file and the field. Raised before any weight is read.
    """
    path = Path(folder) / f"{coder.STEM}.json"
    name = read_json(path, "a folder written by the save method of a coder").get("format")
    if name not in _CLASSES:
        known = " or ".join(map(repr, _CLASSES))
        raise FormatError(f"{path}: field 'format' must be {known}, got {name!r}")
    return _CLASSES[name].load(folder, device)
