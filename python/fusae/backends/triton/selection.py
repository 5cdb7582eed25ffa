# SPDX-License-Identifier: Apache-2.0
"""Selections and encoders."""

from __future__ import annotations

TABLE: dict = {}
