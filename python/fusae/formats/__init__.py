# SPDX-License-Identifier: Apache-2.0
"""Dictionaries on disk."""

from .native import FormatError

__all__ = ["FormatError"]
