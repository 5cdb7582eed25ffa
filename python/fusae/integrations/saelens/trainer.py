# SPDX-License-Identifier: Apache-2.0
"""SAELens' trainer: its Adam in one pass over memory, and an encoder held the way its gradient is made.

Both belong together (see `align`). So they change here alone, where both are in hand; a saved state is as the tool
writes it.
"""

from __future__ import annotations

import weakref

import torch
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.optim import Adam, Optimizer

from .._optim import align
from .._swap import SwappedGeneric, accelerate
from .training import FastTraining

_saving: weakref.WeakKeyDictionary[Optimizer, object] = weakref.WeakKeyDictionary()
_OURS, _TOOLS = {"fused": True, "foreach": False}, {"fused": None, "foreach": None}


def _as_the_tool_saves(optimizer: Optimizer, saved: dict) -> dict:
    """The state that the untouched tool would have: without our choice of kernel, row-major."""
    groups = [
        {**group, **_TOOLS} if all(group.get(name) is value for name, value in _OURS.items()) else group
        for group in saved["param_groups"]
    ]
    state = {
        index: {name: v.contiguous() if isinstance(v, Tensor) else v for name, v in entry.items()}
        for index, entry in saved["state"].items()
    }
    return {**saved, "param_groups": groups, "state": state}


def _fuse(optimizer: Optimizer) -> bool:
    """Let an Adam whose user has not chosen a kernel run in one pass. Whether it does."""
    if type(optimizer) is not Adam:
        return False
    for group in optimizer.param_groups:
        kernels = all(p.device.type in ("cpu", "cuda") and torch.is_floating_point(p) for p in group["params"])
        free = not (group["differentiable"] or group["capturable"])
        if kernels and free and all(group[name] is value for name, value in _TOOLS.items()):
            group.update(_OURS)
    return True


class FastTrainer(SwappedGeneric):
    """Methods of an accelerated `SAETrainer`."""

    def _train_step(self, sae: FastTraining, sae_in: Tensor):
        if _fuse(self.optimizer):  # again: a loaded state brings its own options
            align(self.optimizer)
        return super()._train_step(sae, sae_in)


class FastRunner(SwappedGeneric):
    """Methods of an accelerated training runner, which makes its trainer when it runs."""

    def run_trainer_with_interruption_handling(self, trainer: SAETrainer):
        return super().run_trainer_with_interruption_handling(accelerate(trainer, self._fusae_gradients))


def _encoder(trainer: SAETrainer) -> Tensor | None:
    """W_enc, where its gradient comes latent by latent and the optimiser is one that can be kept in step with it."""
    sae, optimizer = trainer.sae, trainer.optimizer
    W = getattr(sae, "W_enc", None)
    held = type(optimizer) is Adam and any(W is p for group in optimizer.param_groups for p in group["params"])
    return W if held and isinstance(sae, FastTraining) and W.ndim == 2 else None


def prepare(trainer: SAETrainer) -> None:
    accelerate(trainer.sae, trainer._fusae_gradients)  # which may come after its trainer
    W = _encoder(trainer)
    if W is None:
        return
    W.data = W.data.T.contiguous().T
    _fuse(trainer.optimizer)
    align(trainer.optimizer)
    _saving[trainer.optimizer] = trainer.optimizer.register_state_dict_post_hook(_as_the_tool_saves)


def undo(trainer: SAETrainer) -> None:
    optimizer = trainer.optimizer
    hook = _saving.pop(optimizer, None)
    if hook is None:
        return
    hook.remove()
    for group in optimizer.param_groups:
        if all(group.get(name) is value for name, value in _OURS.items()):
            group.update(_TOOLS)
        for param in group["params"]:
            param.data = param.data.contiguous()
    align(optimizer)


def why_not(trainer: SAETrainer) -> str | None:
    return None if type(trainer.optimizer) is Adam else f"its optimiser is {type(trainer.optimizer).__name__}, not Adam"
