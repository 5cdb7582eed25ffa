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

# Classes whose objects are accelerated as soon as they are made, by module; "Class.method": once that method has run.
CLASSES = {
    "sae_lens.saes.standard_sae": ("StandardSAE", "StandardTrainingSAE"),
    "sae_lens.saes.jumprelu_sae": ("JumpReLUSAE", "JumpReLUTrainingSAE"),
    "sae_lens.saes.topk_sae": ("TopKSAE", "TopKTrainingSAE"),
    "sae_lens.saes.abstopk_sae": ("AbsTopKSAE", "AbsTopKTrainingSAE"),
    "sae_lens.saes.batchtopk_sae": ("BatchTopKTrainingSAE",),
    "sae_lens.saes.matryoshka_batchtopk_sae": ("MatryoshkaBatchTopKTrainingSAE",),
    "sae_lens.saes.gated_sae": ("GatedSAE", "GatedTrainingSAE"),
    "sae_lens.saes.transcoder": ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"),
    "sae_lens.training.sae_trainer": ("SAETrainer",),
    "sparsify.sparse_coder": ("SparseCoder",),
    "sparsify.trainer": ("Trainer",),
    "dictionary_learning.dictionary": ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"),
    "dictionary_learning.trainers.top_k": ("AutoEncoderTopK", "TopKTrainer"),
    "dictionary_learning.trainers.batch_top_k": ("BatchTopKSAE", "BatchTopKTrainer"),
    "dictionary_learning.trainers.matryoshka_batch_top_k": ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"),
    "circuit_tracer.transcoder.single_layer_transcoder": ("SingleLayerTranscoder", "TranscoderSet"),
    "circuit_tracer.transcoder.cross_layer_transcoder": ("CrossLayerTranscoder",),
    "circuit_tracer.replacement_model.replacement_model_transformerlens": (
        "TransformerLensReplacementModel._configure_replacement_model",
    ),
    "circuit_tracer.replacement_model.replacement_model_nnsight": (
        "NNSightReplacementModel._configure_replacement_model",
    ),
    "llamascopium.models.sae": ("SparseAutoEncoder",),
    "llamascopium.models.crosscoder": ("Crosscoder",),
    "llamascopium.models.clt": ("CrossLayerTranscoder",),
}
GRADIENTS = os.environ.get("FUSAE_PEER_GRADIENTS", "tool")
made: collections.Counter = collections.Counter()


def _accelerating(cls: type, method: str) -> None:
    own = getattr(cls, method)

    @functools.wraps(own)
    def accelerated(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        if type(self) is cls:  # not in the middle of the making of a subclass's
            fusae.accelerate(self, GRADIENTS)
            made[cls.__name__] += 1
        return result

    setattr(cls, method, accelerated)


def pytest_configure(config):
    for path, classes in CLASSES.items():
        if importlib.util.find_spec(path.split(".")[0]) is not None:
            module = importlib.import_module(path)
            for name in classes:
                cls, _, method = name.partition(".")
                _accelerating(getattr(module, cls), method or "__init__")


def pytest_terminal_summary(terminalreporter):
    total = ", ".join(f"{count} {name}" for name, count in sorted(made.items())) or "nothing"
    terminalreporter.write_line(f"on fusae (gradients {GRADIENTS!r}): {total}")
