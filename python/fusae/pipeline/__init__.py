# SPDX-License-Identifier: Apache-2.0
"""Runs from raw text to a report: one command, resumable in every stage."""

from .coders import load_coder
from .config import DataConfig, Settings, example
from .errors import PipelineError
from .inputs import Inputs, load_inputs
from .stages import Pipeline

__all__ = ["DataConfig", "Inputs", "Pipeline", "PipelineError", "Settings", "example", "load_coder", "load_inputs"]
