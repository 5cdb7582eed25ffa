# SPDX-License-Identifier: Apache-2.0
"""`fusae demo`: a dictionary of a real language model's activations, from download to report in minutes."""

from .config import BARS, DemoConfig
from .inputs import DemoInputs, load_inputs
from .stages import DemoError, run

__all__ = ["BARS", "DemoConfig", "DemoError", "DemoInputs", "load_inputs", "run"]
