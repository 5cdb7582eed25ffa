# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that runs a tool's own test files on fusae: each dictionary or trainer they make is accelerated.

::

    PYTHONPATH=<this folder> FUSAE_PEER_GRADIENTS=tool python -m pytest -p peer_plugin <the tool's tests>

The last line of the report says how many objects ran on fusae. The tool's suite has to give the same result as without.
"""

import collections
import functools
import importlib
import importlib.util
import os

import fusae

# Classes whose objects are accelerated as soon as they are made, by module.
CLASSES = {
    "sparsify.sparse_coder": ("SparseCoder",),
    "sparsify.trainer": ("Trainer",),
    "dictionary_learning.dictionary": ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"),
    "dictionary_learning.trainers.top_k": ("AutoEncoderTopK", "TopKTrainer"),
    "dictionary_learning.trainers.batch_top_k": ("BatchTopKSAE", "BatchTopKTrainer"),
    "dictionary_learning.trainers.matryoshka_batch_top_k": ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"),
}
GRADIENTS = os.environ.get("FUSAE_PEER_GRADIENTS", "tool")
made: collections.Counter = collections.Counter()


def _accelerating(cls: type) -> None:
    init = cls.__init__

    @functools.wraps(init)
    def accelerated(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self) is cls:  # not in the middle of the making of a subclass's
            fusae.accelerate(self, GRADIENTS)
            made[cls.__name__] += 1

    cls.__init__ = accelerated


def pytest_configure(config):
    for name, classes in CLASSES.items():
        if importlib.util.find_spec(name.split(".")[0]) is not None:
            module = importlib.import_module(name)
            for cls in classes:
                _accelerating(getattr(module, cls))


def pytest_terminal_summary(terminalreporter):
    total = ", ".join(f"{count} {name}" for name, count in sorted(made.items())) or "nothing"
    terminalreporter.write_line(f"on fusae (gradients {GRADIENTS!r}): {total}")
