# SPDX-License-Identifier: Apache-2.0
"""From text to activations: demo files, language models, token chunks, and activations on disk."""

from .activations import Activations, Batches
from .capture import collect, weights_sha256
from .demo import DemoFiles, default_cache_dir, fetch_demo, find_demo
from .models import LoadedModel, load_model
from .text import is_held_out, iter_documents, split_documents, tokenize
from .tokens import TokenChunks

__all__ = [
    "Activations",
    "Batches",
    "DemoFiles",
    "LoadedModel",
    "TokenChunks",
    "collect",
    "default_cache_dir",
    "fetch_demo",
    "find_demo",
    "is_held_out",
    "iter_documents",
    "load_model",
    "split_documents",
    "tokenize",
    "weights_sha256",
]
