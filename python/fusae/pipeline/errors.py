# SPDX-License-Identifier: Apache-2.0
"""How a stage fails. A file of its own: the command line knows it without loading torch."""

from __future__ import annotations


class PipelineError(RuntimeError):
    """A stage of a run from text failed; the message names it."""
