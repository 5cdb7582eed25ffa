# SPDX-License-Identifier: Apache-2.0
"""Dictionaries on disk: those of other tools too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .native import FormatError

if TYPE_CHECKING:
    import torch

    from ..nn import CrossLayerTranscoder, SparseCoder

__all__ = ["FormatError", "load", "names", "save"]

# `fusae.nn` reads and writes by `native`, so that what builds on `fusae.nn` is imported when it is used.


def load(
    path: str | Path,
    format: str | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str | None = None,
    **hints: Any,
) -> SparseCoder | CrossLayerTranscoder | dict[str | int, SparseCoder]:
    """A dictionary of fusae or of another tool, as a `SparseCoder` (a `CrossLayerTranscoder` for a CLT), in eval mode.

    Reads fusae, SAELens, sparsify, dictionary_learning, circuit-tracer, OpenAI, Gemma Scope 1 and 2, Llama Scope,
    llamascopium, Qwen Scope, Goodfire and DeepSeek-R1 checkpoints: ``docs/formats.md`` has what is done with each. The
    coder encodes and decodes as the tool that wrote it does: weights ``[m, d]`` (row = latent), input biases, scales
    and normalisations by that tool's rule.

    Args:
        path: a folder, or a file of it.
        format: one of `names`; None: recognised by what is there.
        dtype: of the parameters; None: as the file has them (or as the tool casts them).
        device: of the parameters; None: the CPU, where weights that lie in the file as they should are mapped into
            memory, not copied.
        hints: what a format leaves open, such as ``k=``; errors name them.

    Returns:
        The coder, with what else is known about it in ``coder.metadata``; several by hookpoint or layer, where there
        are several in the folder.

    Raises:
        FileNotFoundError: `path`, or a file that belongs to it, is not there.
        FormatError: damaged, hostile, of no format, of one that has no such coder, or short of a hint; names the file
            and the field. Nothing in a file is executed.
        TypeError, ValueError: an argument.
    """
    from . import table

    return table.load(path, format, dtype, device, hints)


def save(
    coder: SparseCoder | CrossLayerTranscoder | dict[int, SparseCoder],
    path: str | Path,
    format: str = "fusae",
    *,
    dtype: str | torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a folder that another tool opens, and in which the dictionary does the same.

    Args:
        coder: one; for 'circuit-tracer' also one of every layer, by number.
        path: the folder; made if absent. What is in it is replaced, each file whole or not at all.
        format: 'fusae', 'saelens', 'sparsify', 'dictionary_learning' or 'circuit-tracer'.
        dtype: of the weights; None: that of the coder.
        metadata: what the tool notes beside the weights, such as ``model_name`` and ``hook_name``; over what
            ``coder.metadata`` has.
        options: ``architecture='batchtopk'`` for 'saelens': a batch top-k as in training there, not as a JumpReLU.

    Raises:
        ValueError: the format has no such coder; says what it lacks.
    """
    from . import table

    return table.save(coder, path, format, dtype, metadata, options)


def names() -> list[str]:
    """Of the formats that `load` reads."""
    from .table import FORMATS

    return list(FORMATS)
