# SPDX-License-Identifier: Apache-2.0
"""Sums by latent."""

from __future__ import annotations

TABLE: dict = {}
