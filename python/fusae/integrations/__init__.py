# SPDX-License-Identifier: Apache-2.0
"""fusae under the tools people already use: `accelerate` swaps the heavy operations of their models in place."""

from ._swap import SwapError, accelerate, describe, restore

__all__ = ["SwapError", "accelerate", "describe", "restore"]
