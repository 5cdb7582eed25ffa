# SPDX-License-Identifier: Apache-2.0
"""Adapter for dictionary_learning 0.1: its dictionaries, and the trainers of its TopK kinds."""

from .dictionaries import ADAPTERS as DICTIONARIES
from .trainers import ADAPTERS as TRAINERS

ADAPTERS = (*DICTIONARIES, *TRAINERS)
