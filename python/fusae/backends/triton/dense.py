# SPDX-License-Identifier: Apache-2.0
"""Codes from dense activations."""

from __future__ import annotations

TABLE: dict = {}
