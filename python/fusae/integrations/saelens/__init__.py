# SPDX-License-Identifier: Apache-2.0
"""Adapters for SAELens 6.54: inference and training SAEs, transcoders."""

from __future__ import annotations

from sae_lens import saes
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitTrainingSAE
from sae_lens.saes.sae import SAE
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.training.sae_trainer import SAETrainer

from .._swap import Adapter
from . import inference, trainer, training_threshold, training_topk

_METHODS = ("encode", "decode", "forward")
_AUX, _AUX_ABS = ("calculate_aux_loss", "calculate_topk_aux_loss"), "calculate_abstopk_aux_loss"


def _why_not(sae: SAE) -> str:
    if isinstance(sae, (MatchingPursuitSAE, MatchingPursuitTrainingSAE)):
        return "matching pursuit chooses its latents one after the other, each by what the last one left over"
    if isinstance(sae, TemporalSAE):
        return "a temporal SAE attends over the sequence to find its codes"
    return f"no adapter for {type(sae).__name__}"


def _training(tool_class: type, mixin: type, *losses: str) -> Adapter:
    methods = (*_METHODS, "encode_with_hidden_pre", "training_forward_pass", *losses)
    return Adapter(tool_class, mixin, methods)


def _inference(tool_class: type, mixin: type) -> Adapter:
    return Adapter(tool_class, mixin, _METHODS)


ADAPTERS = (
    _inference(saes.StandardSAE, inference.FastStandard),
    _inference(saes.JumpReLUSAE, inference.FastJumpReLU),
    _inference(saes.TopKSAE, inference.FastTopK),
    _inference(saes.AbsTopKSAE, inference.FastAbsTopK),
    _inference(saes.GatedSAE, inference.FastGated),
    _inference(saes.Transcoder, inference.FastTranscoder),
    _inference(saes.SkipTranscoder, inference.FastTranscoder),
    _inference(saes.JumpReLUTranscoder, inference.FastJumpReLUTranscoder),
    _inference(saes.JumpReLUSkipTranscoder, inference.FastJumpReLUTranscoder),
    _training(saes.TopKTrainingSAE, training_topk.FastTopKTraining, *_AUX),
    _training(saes.AbsTopKTrainingSAE, training_topk.FastAbsTopKTraining, "calculate_aux_loss", _AUX_ABS),
    _training(saes.BatchTopKTrainingSAE, training_topk.FastBatchTopKTraining, *_AUX, "update_topk_threshold"),
    _training(
        saes.MatryoshkaBatchTopKTrainingSAE,
        training_topk.FastMatryoshkaTraining,
        *_AUX,
        "update_topk_threshold",
        "calculate_matryoshka_aux_loss",
        "_iterable_decode",
    ),
    _training(saes.StandardTrainingSAE, training_threshold.FastStandardTraining, "calculate_aux_loss"),
    _training(saes.JumpReLUTrainingSAE, training_threshold.FastJumpReLUTraining, "calculate_aux_loss"),
    _training(saes.GatedTrainingSAE, training_threshold.FastGatedTraining, "calculate_aux_loss"),
    Adapter(
        SAETrainer, trainer.FastTrainer, ("_train_step",), trainer.why_not, prepare=trainer.prepare, undo=trainer.undo
    ),
    Adapter(LanguageModelSAETrainingRunner, trainer.FastRunner, ("run_trainer_with_interruption_handling",)),
    Adapter(SAE, inference.FastSAE, (), _why_not),
)
