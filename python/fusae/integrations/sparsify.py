# SPDX-License-Identifier: Apache-2.0
"""Adapter for EleutherAI's sparsify (eai-sparsify 1.3): `SparseCoder`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify.fused_encoder import EncoderOutput
from sparsify.sign_sgd import SignSGD
from sparsify.sparse_coder import ForwardOutput, SparseCoder
from torch import Tensor

from ..codes import SparseCodes
from ..ops import decode, encode_topk
from ._dense import autocasts, transformed
from ._rows import normalise_, parts, remove_parallel_
from ._swap import Adapter, Swapped

SELECTS = {"topk": "topk", "groupmax": "group_max"}


class _ReluForward(torch.autograd.Function):
    """ReLU whose gradient passes everywhere: what sparsify's encoder does to the entries that it selected."""

    @staticmethod
    def forward(values):
        return values.relu()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """sparsify decodes with ``embedding_bag``, which autocast leaves in the dtype of the weights."""
    return torch.autocast(tensor.device.type, enabled=False)


class _LazyOutput(EncoderOutput):
    """The tool's `EncoderOutput`, whose dense ``pre_acts`` ``[n, m]`` are made when somebody reads them.

    The input is kept as it was. Weights edited in between are noticed where torch counts edits (not through ``.data``).
    """

    def __new__(cls, acts: Tensor, indices: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None):
        self = super().__new__(cls, acts, indices, None)
        device = x.device.type
        self._source = x, weight, bias
        self._versions = _versions(weight, bias)
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._made = None
        return self

    @property
    def pre_acts(self) -> Tensor:
        if self._made is None:
            x, weight, bias = self._source
            if _versions(weight, bias) != self._versions:
                raise RuntimeError(
                    "pre_acts must be read before encoder.weight or encoder.bias are edited: they are made on demand. "
                    "Read output.pre_acts right after encode()"
                )
            device, dtype, enabled = self._autocast
            with torch.no_grad(), torch.autocast(device, dtype, enabled):
                self._made = torch.nn.functional.linear(x, weight, bias).relu_()
        return self._made

    def __iter__(self):
        return iter((self.top_acts, self.top_indices, self.pre_acts))

    def __getitem__(self, place):
        return tuple(self)[place] if place not in (0, 1, -2, -3) else super().__getitem__(place)

    def __reduce__(self):
        return EncoderOutput, tuple(self)

    def _replace(self, **fields):
        return EncoderOutput(*self)._replace(**fields)


def _versions(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]


class FastSparseCoder(Swapped):
    """Methods of an accelerated `SparseCoder`."""

    def _fusae_serves(self, x: Tensor) -> bool:
        """Whether the fused encoder takes this call; else the tool's own code runs, or raises its own error."""
        (m, d), k, kind = self.encoder.weight.shape, self.cfg.k, self.cfg.activation
        dtype = self.encoder.weight.dtype
        fits = x.ndim > 0 and x.shape[-1] == d and x.device.type != "meta"
        known = kind in SELECTS and 1 <= k <= m and (kind == "topk" or m % k == 0)
        # The bias that is taken off the input makes its dtype that of the weights.
        same = torch.promote_types(x.dtype, x.dtype if self.cfg.transcode else self.b_dec.dtype) == dtype
        return fits and known and (same or autocasts(x.device)) and not transformed()

    def _fusae_select(
        self, x: Tensor, k: int, kind: str, aux_mask: Tensor | None = None, k_aux: int = 0
    ) -> tuple[SparseCodes, SparseCodes | None]:
        """Codes of `x` (already centred) with the tool's gradient or the right one, and those of the dead latents."""
        correct = self._fusae_correct
        out = encode_topk(
            x, self.encoder.weight, self.encoder.bias, k, "relu" if correct else "none", SELECTS[kind],
            aux_mask=aux_mask, k_aux=k_aux,
        )  # fmt: skip
        codes, aux = (out, None) if aux_mask is None else out
        if not correct and aux is not None:  # the tool's AuxK loss does not reach the encoder
            aux = SparseCodes(aux.values.detach().relu(), aux.indices, aux.m)
        return codes, aux

    def _fusae_centred(self, x: Tensor) -> Tensor:
        return x if self.cfg.transcode else x - self.b_dec

    def _fusae_acts(self, values: Tensor) -> Tensor:
        return values if self._fusae_correct else _ReluForward.apply(values)

    def encode(self, x: Tensor) -> EncoderOutput:
        if not self._fusae_serves(x):
            return super().encode(x)
        x = self._fusae_centred(x)
        codes, _ = self._fusae_select(x, self.cfg.k, self.cfg.activation)
        acts, indices = self._fusae_acts(codes.values), codes.indices.long()
        weight, bias = self.encoder.weight, self.encoder.bias
        if torch.compiler.is_compiling() or acts.requires_grad:
            # Under torch.compile what nobody reads is dropped anyway.
            pre_acts = torch.nn.functional.linear(x, weight, bias).relu()
            return EncoderOutput(acts, indices, pre_acts if self._fusae_correct else pre_acts.detach())
        return _LazyOutput(acts, indices, x.clone() if self.cfg.transcode else x, weight, bias)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        if transformed() or self.W_dec is None or top_acts.device.type == "meta":
            return super().decode(top_acts, top_indices)
        return self._fusae_decode(top_acts, top_indices.int(), self.b_dec)

    def _fusae_decode(self, acts: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
        with _no_autocast(acts):
            return decode(SparseCodes(acts.to(self.dtype), indices, self.W_dec.shape[0]), self.W_dec, bias)

    # As the tool wraps its own.
    @torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_bf16_supported())
    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> ForwardOutput:
        k, kind, multi = self.cfg.k, self.cfg.activation, self.cfg.multi_topk
        m = self.encoder.weight.shape[0]
        if not self._fusae_serves(x) or self.W_dec is None or (multi and 4 * k > m):
            return super().forward(x, y, dead_mask=dead_mask, total_variance=total_variance)
        batch = x.shape[:-1]
        y = x if y is None else y
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])

        num_dead = 0 if dead_mask is None else int(dead_mask.sum())
        k_aux = min(y.shape[-1] // 2, num_dead)
        aux_mask = dead_mask.bool() if k_aux else None
        # One selection of 4 k serves both, for it is sorted; of groups there are two.
        joint = multi and kind == "topk"
        centred = self._fusae_centred(x)
        codes, aux = self._fusae_select(centred, 4 * k if joint else k, kind, aux_mask, k_aux)
        acts, indices = self._fusae_acts(codes.values[:, :k]), codes.indices[:, :k]

        sae_out = self._fusae_decode(acts, indices, self.b_dec)
        if self.W_skip is not None:
            sae_out = sae_out + x.to(self.dtype) @ self.W_skip.mT
        e = y - sae_out
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        fvu = e.pow(2).sum() / total_variance

        auxk_loss = sae_out.new_tensor(0.0)
        if aux is not None:
            e_hat = self._fusae_decode(aux.values, aux.indices, None)
            scale = min(num_dead / (y.shape[-1] // 2), 1.0)
            auxk_loss = scale * (e_hat - e.detach()).pow(2).sum() / total_variance

        multi_topk_fvu = sae_out.new_tensor(0.0)
        if multi:
            if not joint:
                codes, _ = self._fusae_select(centred, 4 * k, "topk")
            # The tool's loss of the wider selection does not reach the encoder.
            acts = codes.values if self._fusae_correct else codes.values.detach().relu()
            indices = codes.indices
            sae_out = self._fusae_decode(acts, indices, self.b_dec)
            multi_topk_fvu = (sae_out - y).pow(2).sum() / total_variance

        return ForwardOutput(
            sae_out.reshape(*batch, sae_out.shape[-1]),
            acts.reshape(*batch, acts.shape[-1]),
            indices.long().reshape(*batch, acts.shape[-1]),
            fvu,
            auxk_loss,
            multi_topk_fvu,
        )

    def set_decoder_norm_to_unit_norm(self) -> None:
        if self.W_dec is None:
            return super().set_decoder_norm_to_unit_norm()
        normalise_(self.W_dec.data, torch.finfo(self.W_dec.dtype).eps)

    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        if self.W_dec is None or self.W_dec.grad is None:
            return super().remove_gradient_parallel_to_decoder_directions()
        remove_parallel_(self.W_dec.grad, self.W_dec.data)


class FastSignum(Swapped):
    """`step` of schedule-free SignSGD in three passes of each parameter and its one state, instead of ten.

    With y the weights (between the average x and the iterate z), beta the momentum and c the weight of the new
    iterate, the tool's passes come to ``z' = z - lr s`` and ``y' = (1 - c) y + c z - (1 - beta (1 - c)) lr s``.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        if not self.train_mode or closure is not None:
            return super().step(closure)
        for group in self.param_groups:
            lr = group["lr"]
            scaled = lr * group.get("d", 1.0)
            group["lr_max"] = max(scaled, group.get("lr_max", 0))
            weight = (group.get("k", 0) + 1) ** self.r * group["lr_max"] ** self.weight_lr_power
            group["weight_sum"] = group.get("weight_sum", 0.0) + weight
            c = weight / group["weight_sum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "z" not in state:
                    state["z"] = torch.clone(p, memory_format=torch.preserve_format)
                for y, z, grad in parts(p, state["z"], p.grad):
                    sign = grad.sign()
                    y.lerp_(z, c).add_(sign, alpha=-lr * (1 - self.momentum * (1 - c)))
                    z.add_(sign, alpha=-lr)
            group["k"] = group.get("k", 0) + 1
        return None


def _why_not_signum(optimizer: ScheduleFreeWrapper) -> str | None:
    if type(optimizer.base) is not SignSGD:
        return f"it wraps {type(optimizer.base).__name__}, not SignSGD"
    return "it decays weights" if optimizer.weight_decay_at_y else None


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(
        SparseCoder,
        FastSparseCoder,
        ("encode", "decode", "forward", "set_decoder_norm_to_unit_norm",
         "remove_gradient_parallel_to_decoder_directions"),  # fmt: skip
        differences=(
            "the AuxK loss and the Multi-TopK loss train the encoder (the tool drops their gradient)",
            "a latent that was selected at 0 gets no gradient (the tool gives it one, past the ReLU)",
        ),
    ),
    Adapter(ScheduleFreeWrapper, FastSignum, ("step",), _why_not_signum),
)
