# SPDX-License-Identifier: Apache-2.0
"""`ShardedCoder`: the rows of a `SparseCoder` that one rank holds, encoding and decoding together with the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import _checks
from ...codes import SparseCodes
from ...nn import SparseCoder
from ...nn.init import random_unit_rows_
from ...nn.pre_bias import PreBias
from ...nn.sums import total
from ...ops import encode_batch_topk, encode_topk
from ...ops.decode_loss import DecodeLoss
from ...ops.selected import selected
from ..config import TrainConfig
from ..optimiser import new_training_coder
from .mesh import Mesh
from .select import every_row, keep_batch, keep_topk, scores


class _Sum(torch.autograd.Function):
    """The sum over the ranks that share the latents. What comes after it is the same on each of them, so that its
    gradient is that of every part."""

    @staticmethod
    def forward(ctx, x, mesh):
        return mesh.sum_(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumGradient(torch.autograd.Function):
    """A parameter that every rank holds whole, of which each sees a part of the gradient."""

    @staticmethod
    def forward(ctx, x, mesh):
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        wide = grad.to(_checks.accumulator(grad.dtype), copy=True)
        return ctx.mesh.sum_(wide).to(grad.dtype), None


class ShardedCoder(SparseCoder):
    """Rows ``first`` to ``first + config.m`` of a coder of `m` latents.

    The parameters with a row for each latent hold those; `b_dec` and `W_skip` are whole and the same on every rank.
    Codes are over this rank's latents, for all rows of a batch; reconstructions and losses are of all latents, and the
    same on every rank.

    Args:
        part: a coder of these latents, whose parameters this one takes over.
        mesh: the ranks.
        m: latents in all.

    A batch top-k, or a top-k of rows, is that of all latents; see `fusae.train.sharded.select` for ties. The masks of
    dead latents that `encode` and the losses take are ``[config.m + 1]``: this rank's, and whether any is dead at all.
    """

    def __init__(self, part: SparseCoder, mesh: Mesh, m: int) -> None:
        nn.Module.__init__(self)
        self.config, self.sparse_grad = part.config, part.sparse_grad
        self.mesh, self.m, self.first = mesh, m, mesh.latent_rank * part.config.m
        for name, parameter in part.named_parameters():
            setattr(self, name, parameter)
        for name, buffer in part.named_buffers():
            self.register_buffer(name, buffer)

    def part(self) -> SparseCoder:
        """A plain coder of this rank's latents, which shares the parameters."""
        coder = SparseCoder(self.config, seed=None, device="meta", sparse_grad=self.sparse_grad)
        for name, parameter in self.named_parameters():
            setattr(coder, name, parameter)
        for name, buffer in self.named_buffers():
            coder.register_buffer(name, buffer)
        return coder.train(self.training)

    @torch.no_grad()
    def tied_init_(self, seed: int = 0) -> ShardedCoder:
        """The rows that `SparseCoder.tied_init_` would give a coder of all latents."""
        for name in (*self.config.parameters(), *self.config.buffers()):
            if name not in ("W_enc", "W_dec"):
                getattr(self, name).zero_()
        random_unit_rows_(self.W_dec, seed, self.first, self.m)
        if self.W_enc.shape[1] == self.W_dec.shape[1]:
            self.W_enc.copy_(self.W_dec)
        else:
            random_unit_rows_(self.W_enc, seed + 1, self.first, self.m)
        return self

    # ---- encode ------------------------------------------------------------------------------------------------------

    def encoder_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.pre_bias:
            return x, self.b_enc
        b_dec = _SumGradient.apply(self.b_dec, self.mesh)
        return x - self.b_dec.detach(), PreBias.apply(self.b_enc, b_dec, self.W_enc.detach())

    def select(
        self, x: Tensor, aux_mask: Tensor | None = None, k_aux: int | None = None, k: int | None = None
    ) -> tuple[SparseCodes, Tensor | None, SparseCodes | None]:
        """As of `SparseCoder`, of all rows `x` ``[n, d]`` and of this rank's part of what was selected. Fixed-width
        entries lie at their place in the ranking of all latents; the others of the row have value 0 here."""
        if self.config.is_thresholded:
            return super().select(x, aux_mask, k_aux, k)
        self.check_input(x)
        config, mesh = self.config, self.mesh
        inputs, bias = self.encoder_input(x)
        inputs, W_enc, bias = _checks.encoder(inputs, self.W_enc, bias)
        norms = self.decoder_norms() if config.select_by_norm else None
        dead = None if aux_mask is None else aux_mask[:-1]
        k_aux = 0 if dead is None else config.k_aux if k_aux is None else k_aux
        with torch.no_grad():
            rows = mesh.rows(len(inputs))
            mine = inputs[rows], W_enc.detach(), bias.detach()
            codes, smallest, aux = self._encode(mine, norms, dead, k_aux, config.k if k is None else k, len(inputs))
            codes = every_row(mesh, codes, len(inputs))
            aux = None if aux is None else every_row(mesh, aux, len(inputs))
        codes, aux = selected(inputs, W_enc, bias, codes, aux, sparse_grad=self.sparse_grad)
        return codes, smallest, aux

    def _encode(
        self, mine: tuple[Tensor, Tensor, Tensor], norms: Tensor | None, dead: Tensor | None, k_aux: int, k: int, n: int
    ) -> tuple[SparseCodes, Tensor | None, SparseCodes | None]:
        """What was selected of this rank's latents in its share of the n rows."""
        config, mesh = self.config, self.mesh
        aux = {"norms": norms, "aux_mask": dead, "k_aux": min(k_aux, config.m)}
        magnitude = config.select == "abs"
        if config.select == "batch_topk":
            # These rows alone may have all that is selected.
            found = encode_batch_topk(*mine, min(k * mesh.data, config.m), config.activation, **aux)
            codes, extra = found[0], found[2] if len(found) == 3 else None
            latents = self.first, self.m
            first_row = mesh.rows(n).start
            codes, smallest = keep_batch(mesh, codes, scores(codes, norms, False), first_row, latents, n * k)
        elif config.select == "group_max":  # whole groups lie on each rank
            found, smallest = encode_topk(*mine, k, config.activation, "group_max", **aux), None
            codes, extra = found if isinstance(found, tuple) else (found, None)
        else:
            found, smallest = encode_topk(*mine, k, config.activation, config.select, **aux), None
            codes, extra = found if isinstance(found, tuple) else (found, None)
            codes = keep_topk(mesh, codes, scores(codes, norms, magnitude), k)
        if extra is not None:
            score = scores(extra, norms, magnitude)
            # Padding, where less of this rank's latents are dead.
            score = torch.where(dead[extra.indices.long()], score, -torch.inf)
            extra = keep_topk(mesh, extra, score, k_aux)
        return codes, smallest, extra

    # ---- decode ------------------------------------------------------------------------------------------------------

    def summed(self, x: Tensor) -> Tensor:
        """`x` added up over the ranks that share the latents, with a gradient."""
        return _Sum.apply(x, self.mesh)

    def decode_rows(self, codes: SparseCodes) -> Tensor:
        """``[n, d_out]`` of all latents, in the dtype of sums."""
        y = super().decode_rows(codes)
        return self.summed(y.to(_checks.accumulator(y.dtype)))

    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
        return self.add_skip(self.decode_rows(codes) + self.b_dec, x)

    def decode_loss(
        self,
        codes: SparseCodes,
        target: Tensor,
        prefixes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        nested: str = "latents",
    ) -> DecodeLoss:
        """As of `SparseCoder`, of all latents, by which the `prefixes` count. Holds ``[G, n, d_out]``."""
        groups = [self.m] if prefixes is None else list(prefixes)
        weights = [1.0] * len(groups) if weights is None else weights
        y = self.decode_rows(codes if len(groups) == 1 else self._by_group(codes, groups, nested))
        y = y.view(len(groups), len(target), -1).cumsum(0) + self.b_dec
        error = target.to(y.dtype) - y
        sse = torch.stack([total(part.square()) for part in error])
        loss = torch.stack([weight * part for weight, part in zip(weights, sse, strict=True)]).sum()
        return DecodeLoss(loss, sse.detach(), error[-1].detach().to(self.W_dec.dtype))

    def _by_group(self, codes: SparseCodes, groups: list[int], nested: str) -> SparseCodes:
        """Ragged codes of G·n rows: of every row those entries that prefix g has beyond the last one."""
        n, device = len(codes), codes.device
        if codes.offsets is None:
            width = codes.values.shape[1]
            row = torch.arange(n, device=device).repeat_interleave(width)
            place = torch.arange(width, device=device).repeat(n)
        else:
            row = place = codes.row_ids()
        values, indices = codes.values.reshape(-1), codes.indices.reshape(-1)
        key = indices.long() + self.first if nested == "latents" else place
        key = torch.bucketize(key, torch.tensor(groups[:-1], device=device), right=True) * n + row
        used = (values.detach() != 0).nonzero()[:, 0]
        used = used[key[used].argsort(stable=True)]
        counts = torch.bincount(key[used], minlength=len(groups) * n)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseCodes(values.index_select(0, used), indices[used], codes.m, offsets)


def check_sharding(config: TrainConfig, mesh: Mesh) -> None:
    """Raises `ValueError` for what cannot be trained on more than one rank, naming the field and what to do."""
    if mesh.size == 1:
        return
    parts, what = mesh.latents, f"with {mesh.size} processes"
    if config.architecture == "cross_layer":
        raise ValueError(f"architecture 'cross_layer' is trained by one process, got {mesh.size}; start one")
    if config.form == "gated":
        raise ValueError(f"form 'gated' is trained by one process, got {mesh.size}; start one, or take form 'jumprelu'")
    if config.form in ("relu", "jumprelu") and mesh.data > 1:
        raise ValueError(
            f"shard_latents must be the number of processes, {mesh.size}, with form {config.form!r} (its rows are not "
            f"split), got {parts}"
        )
    if config.form == "jumprelu" and config.penalty not in ("l0", "tanh"):
        raise ValueError(f"penalty must be 'l0' or 'tanh' {what}, got {config.penalty!r}")
    if config.m % parts:
        raise ValueError(f"m must be a multiple of shard_latents = {parts}, got {config.m}")
    widest = max(config.k, config.k_start or 0) * (4 if config.multi_topk else 1)
    if config.form == "group_max" and config.k % parts:
        raise ValueError(f"k must be a multiple of shard_latents = {parts} with form 'group_max', got {config.k}")
    if config.form != "group_max" and widest > config.m // parts:
        raise ValueError(
            f"m / shard_latents must be at least the latents selected in a row, {widest}, got {config.m} / {parts}"
        )


def new_sharded_coder(config: TrainConfig, mesh: Mesh, *, seed: int | None, device: torch.device) -> ShardedCoder:
    """This rank's part of `new_training_coder`."""
    m = config.m // mesh.latents
    fields = {"m": m, "k_aux": min(config.k_aux, m), "prefixes": None}
    if config.form == "group_max":  # whole groups on each rank
        fields["k"] = config.k // mesh.latents
    part = new_training_coder(dataclasses.replace(config, **fields), seed=None, device=device)
    coder = ShardedCoder(part, mesh, config.m)
    if seed is not None:
        coder.tied_init_(seed)
        with torch.no_grad():
            coder.W_dec *= config.decoder_scale
    return coder
