# SPDX-License-Identifier: Apache-2.0
"""`fusae demo`: a dictionary of a real language model's activations, from download to report in minutes."""

from ..pipeline import PipelineError
from .config import BARS, DemoConfig
from .inputs import load_inputs
from .stages import Demo, run

__all__ = ["BARS", "Demo", "DemoConfig", "PipelineError", "load_inputs", "run"]
