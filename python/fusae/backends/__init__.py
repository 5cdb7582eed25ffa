# SPDX-License-Identifier: Apache-2.0
"""Backends. Each module has ``TABLE: {op: (function, why_not)}`` and ``unavailable() -> str | None``.

``by_name_only() -> str | None``, where there is one, says why the backend is no automatic choice.
"""
