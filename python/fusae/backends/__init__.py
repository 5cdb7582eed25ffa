# SPDX-License-Identifier: Apache-2.0
"""Backends. Each module has ``TABLE: {op: (function, why_not)}`` and ``unavailable() -> str | None``."""
