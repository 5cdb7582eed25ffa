# SPDX-License-Identifier: Apache-2.0
"""Decoders."""

from __future__ import annotations

TABLE: dict = {}
