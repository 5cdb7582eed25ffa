# SPDX-License-Identifier: Apache-2.0
"""From text to activations: demo files, language models, token chunks, and activations on disk."""

from .activations import Activations
from .batches import Batches
from .capture import collect, weights_sha256
from .demo import DemoFiles, default_cache_dir, fetch_demo, find_demo
from .models import LoadedModel, load_model
from .sites import Site, sites
from .stream import ActivationStream
from .text import is_held_out, iter_documents, iter_part, split_documents
from .tokens import TokenChunks, tokenize

__all__ = [
    "ActivationStream",
    "Activations",
    "Batches",
    "DemoFiles",
    "LoadedModel",
    "Site",
    "TokenChunks",
    "collect",
    "default_cache_dir",
    "fetch_demo",
    "find_demo",
    "is_held_out",
    "iter_documents",
    "iter_part",
    "load_model",
    "sites",
    "split_documents",
    "tokenize",
    "weights_sha256",
]
