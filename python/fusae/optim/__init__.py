# SPDX-License-Identifier: Apache-2.0
"""Optimisers for matrices of latent rows."""

from .adam import MOMENTS, Adam, state_layout

__all__ = ["MOMENTS", "Adam", "state_layout"]
