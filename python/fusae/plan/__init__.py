# SPDX-License-Identifier: Apache-2.0
"""What a training run will need, before it is begun: bytes by part, operations, tokens a second."""

from .memory import Needs, bytes_per_parameter, needs
from .rates import Rates, measure_rates
from .speed import Speed, speed
from .whole import Plan, plan

__all__ = ["Needs", "Plan", "Rates", "Speed", "bytes_per_parameter", "measure_rates", "needs", "plan", "speed"]
