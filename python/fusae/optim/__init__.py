# SPDX-License-Identifier: Apache-2.0
"""Optimisers for matrices of latent rows."""

from .adam import Adam

__all__ = ["Adam"]
