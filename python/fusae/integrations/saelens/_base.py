# SPDX-License-Identifier: Apache-2.0
"""What every accelerated SAE of SAELens shares: when fused code serves, and how codes pass from encode to decode.

SAELens' own ``forward`` and ``training_forward_pass`` stay in charge. They call `encode` and `decode`, and between the
two goes an `Activations`: a tensor that is written only if somebody else looks at it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...codes import SparseCodes
from ...ops import codes_from_dense, decode
from .._dense import SAMPLED, decode_dense, eager, hooked, sampled
from .._later import Activations
from .._swap import Swapped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """What an SAE's method knows of the method that called it."""

    sae: Any
    dead: Tensor | None = None  # bool [m], in a training step with an auxiliary loss
    k_aux: int = 0


# Whose encode may hand out `Activations`, and whose input has gone through the tool's preprocessing already.
_lazy: ContextVar[Call | None] = ContextVar("fusae_saelens_lazy", default=None)
_processed: ContextVar[tuple[Any, Tensor] | None] = ContextVar("fusae_saelens_processed", default=None)


@contextlib.contextmanager
def _set(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def lazily(sae: Any, dead: Tensor | None = None, k_aux: int = 0) -> contextlib.AbstractContextManager:
    """In the block, codes go from `sae`'s encode to its decode. `dead` ``[m]`` bool: with an auxiliary top-`k_aux`."""
    return _set(_lazy, Call(sae, dead, k_aux))


def lazy(sae: Any) -> Call | None:
    call = _lazy.get()
    return call if call is not None and call.sae is sae else None


def plain(*tensors: Any) -> bool:
    """Whether these are ordinary tensors in memory, of one dtype that kernels know, on one device."""
    first = tensors[0]
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.layout == torch.strided
        and t.device == first.device
        and t.dtype == first.dtype
        for t in tensors
    ) and (first.dtype in DTYPES and first.device.type != "meta")


def sampled_density(x: Tensor, W_enc: Tensor, b_enc: Tensor, above: Tensor | float) -> float:
    """Share of active latents in a few rows of `x` ``[n, d]``; 0 for few rows, whose cost is the reading of weights."""
    if x.shape[0] < 8 * SAMPLED:
        return 0.0
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return float((sampled(x) @ W_enc + b_enc > above).float().mean())


def at(vector: Tensor, codes: SparseCodes) -> Tensor:
    """``vector[latent]`` of every stored entry."""
    return vector.index_select(0, codes.indices.flatten()).view(codes.values.shape)


class Encoded(NamedTuple):
    codes: SparseCodes  # as the decoder takes them
    scale: Tensor | None = None  # activations are values of codes times this [m]
    extra: Any = None  # what the loss of an architecture needs besides


class FastSAE(Swapped):
    """Methods of an accelerated inference SAE. An architecture adds `_fusae_encode` and perhaps `_fusae_scale`."""

    def _fusae_weights(self) -> tuple[Tensor, ...]:
        """W_enc ``[d, m]``, then what is ``[m]``."""
        return self.W_enc, self.b_enc

    def _fusae_encode(self, x: Tensor) -> Encoded | None:
        """Codes of processed inputs ``[n, d]``; None where the tool's own code does better."""
        raise NotImplementedError

    def _fusae_scale(self) -> Tensor | None:
        """``[m]`` by which activations are larger than what meets the decoder rows."""
        return None

    def _fusae_aside(self) -> bool:
        return not eager() or hooked(self.hook_sae_acts_pre)

    def _fusae_fits(self, x: Any) -> bool:
        """Whether fused code can take these inputs and weights as they are now; if not, the tool says what is wrong."""
        W_enc, *vectors = self._fusae_weights()
        if not plain(x, W_enc, self.W_dec, *vectors) or W_enc.ndim != 2 or self.W_dec.ndim != 2 or x.ndim < 1:
            return False
        d, m = W_enc.shape
        return x.shape[-1] == d and self.W_dec.shape[0] == m > 0 and d > 0 and all(v.shape == (m,) for v in vectors)

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        given = None if torch.compiler.is_compiling() else _processed.get()
        if given is not None and given[0] is self:
            return given[1]
        return super().process_sae_in(sae_in)

    def _fusae_given(self, sae_in: Tensor) -> contextlib.AbstractContextManager:
        """In the block, the tool's own code goes on from the preprocessed `sae_in`: hooks and statistics run once."""
        return _set(_processed, (self, sae_in))

    def _fusae_codes(self, x: Tensor) -> tuple[Tensor, Encoded | None]:
        """Preprocessed input, and its codes unless the tool's own code should go on from there."""
        sae_in = self.process_sae_in(x)
        if not self._fusae_fits(sae_in):
            return sae_in, None
        return sae_in, self._fusae_encode(sae_in.reshape(-1, sae_in.shape[-1]))

    def _fusae_handed_out(self, encoded: Encoded, batch: torch.Size, codes_do: bool) -> Tensor:
        """Activations as the caller may have them, past the hooks on them."""
        coo = getattr(self.activation_fn, "use_sparse_activations", False)
        acts = Activations(encoded.codes, batch, encoded.scale, coo)
        if hooked(self.hook_sae_acts_post):
            return self.hook_sae_acts_post(acts.made)
        return acts if codes_do else acts.made

    def encode(self, x: Tensor) -> Tensor:
        if self._fusae_aside():
            return super().encode(x)
        sae_in, encoded = self._fusae_codes(x)
        if encoded is None:
            with self._fusae_given(sae_in):
                return super().encode(x)
        return self._fusae_handed_out(encoded, sae_in.shape[:-1], lazy(self) is not None)

    def decode(self, feature_acts: Tensor) -> Tensor:
        if not eager():
            return super().decode(feature_acts)
        if isinstance(feature_acts, Activations):
            if feature_acts.sparse:
                y = decode(feature_acts.codes, self.W_dec)
                return self._fusae_finish(y.reshape(*feature_acts.batch, y.shape[-1]) + self.b_dec)
            feature_acts = feature_acts.made
        W_dec = self.W_dec
        if not plain(feature_acts, W_dec) or W_dec.ndim != 2 or feature_acts.shape[-1:] != W_dec.shape[:1]:
            return super().decode(feature_acts)
        return self._fusae_finish(self._fusae_decode_dense(feature_acts) + self.b_dec)

    def _fusae_decode_dense(self, f: Tensor) -> Tensor:
        scale = self._fusae_scale()
        if scale is None:
            return decode_dense(f, self.W_dec)
        inverse = 1 / scale
        if torch.is_grad_enabled() and any(t.requires_grad for t in (f, self.W_dec)):
            return decode_dense(f * inverse, self.W_dec)
        codes = codes_from_dense(f.reshape(-1, f.shape[-1]))
        codes = SparseCodes(codes.values * at(inverse, codes), codes.indices, codes.m, codes.offsets)
        return decode(codes, self.W_dec).reshape(*f.shape[:-1], self.W_dec.shape[1])

    def _fusae_finish(self, sae_out_pre: Tensor) -> Tensor:
        """What the tool does to a reconstruction."""
        sae_out_pre = self.run_time_activation_norm_fn_out(self.hook_sae_recons(sae_out_pre))
        return self.reshape_fn_out(sae_out_pre, self.d_head)

    def forward(self, x: Tensor) -> Tensor:
        if self._fusae_aside():
            return super().forward(x)
        with lazily(self):
            return super().forward(x)
