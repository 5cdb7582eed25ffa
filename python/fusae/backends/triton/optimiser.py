# SPDX-License-Identifier: Apache-2.0
"""The optimiser of rows."""

from __future__ import annotations

TABLE: dict = {}
