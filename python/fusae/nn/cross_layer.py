# SPDX-License-Identifier: Apache-2.0
"""`CrossLayerTranscoder`: latents of every layer, each of which writes to its own layer and to all later ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks, _fields
from .._pages import large_pages
from ..codes import SparseCodes
from ..formats.native import load_pair, save_pair
from ..ops import decode
from .coder import STEM, SparseCoder
from .cross_layer_config import CrossLayerConfig
from .init import geometric_median, uniform_
from .join import add_up, largest_together, split_codes

FORMAT, VERSION = "fusae.CrossLayerTranscoder", 1


class _Source(SparseCoder):
    """One layer's latents: a coder of that layer's input whose rows of `W_dec` hold all the layers it writes to."""

    b_dec = None


class CrossLayerTranscoder(nn.Module):
    """Cross-layer transcoder (Ameisen et al. 2025, "Circuit Tracing"; Lindsey et al. 2025): L layers in one dictionary.

    Every layer s has m latents that read its input, ``codes_s = select(W_enc_s x_s + b_enc_s)``, and write to the
    targets of the layers t = s ... L - 1: ``ŷ_t = Σ_{s <= t} Σ_j v_j W_dec_s[i_j, t - s] + b_dec_t (+ W_skip_t x_t)``.
    All that a latent writes is one row of `W_dec`, so that one gather serves every target.

    Parameters (row = latent): `b_dec` ``[L, d_out]``; with ``config.skip`` `W_skip` ``[L·d_out, d]``; and those of
    ``sources[s]``: `W_enc` ``[m, d]``, `b_enc` ``[m]``, `W_dec` ``[m, (L-s)·d_out]`` (targets s, s + 1, ... in order)
    and thresholds as `SparseCoder` has them. Each source is a `SparseCoder`, which `fusae.nn.init_firing_rate_` and its
    like take too. With 'batch_topk' each layer takes the n·k largest of its own pre-activations and has a threshold of
    its own for eval mode; with ``config.joint`` the L·n·k largest of all layers together are taken, so that a layer has
    as many latents as it deserves, and all thresholds are the same.

    It starts as L transcoders do: decoder and encoder rows are random directions of unit norm, all else 0. With L = 1
    it is the `SparseCoder` of the same seed.

    Args:
        config: a `CrossLayerConfig`.
        seed: of the initial weights, a function of seed and shape on every device; None leaves them uninitialised.
        device: of the parameters.
        sparse_grad: give the gradients of encoders and decoders as ``torch.sparse_coo`` tensors of the touched rows. An
            attribute; can be changed at any time.
    """

    def __init__(
        self,
        config: CrossLayerConfig,
        *,
        seed: int | None = 0,
        device: torch.device | str | None = None,
        sparse_grad: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(config, CrossLayerConfig):
            raise TypeError(f"config must be a fusae.nn.CrossLayerConfig, got {type(config).__name__}")
        self._config = config
        for name, (shape, dtype) in config.parameters().items():
            if not name.startswith("sources."):
                setattr(self, name, nn.Parameter(large_pages(torch.empty(shape, dtype=dtype, device=device))))
        self.sources = nn.ModuleList(
            _Source(config.source(s), seed=None, device=device, sparse_grad=sparse_grad) for s in range(config.layers)
        )
        if seed is not None:
            self.tied_init_(_fields.whole("seed", seed))

    @property
    def config(self) -> CrossLayerConfig:
        return self._config

    @config.setter
    def config(self, config: CrossLayerConfig) -> None:
        self._config = config
        for s, source in enumerate(self.sources):
            source.config = config.source(s)

    @property
    def sparse_grad(self) -> bool:
        return self.sources[0].sparse_grad

    @sparse_grad.setter
    def sparse_grad(self, value: bool) -> None:
        for source in self.sources:
            source.sparse_grad = value

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.to_dict().items())

    def layered(self, x: Tensor) -> Tensor:
        """`x` as ``[..., L, d]``, from that or from ``[n, L·d]`` (or ``[L·d]``). Checked."""
        config = self.config
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if 1 <= x.ndim <= 2 and x.shape[-1] == config.input_width:
            x = x.unflatten(-1, (config.layers, config.d))
        if x.shape[-2:] != (config.layers, config.d):
            wanted = f"[..., {config.layers}, {config.d}] or [n, {config.input_width}], the inputs of all layers"
            raise ValueError(f"x must have shape {wanted}, got {list(x.shape)}")
        self.sources[0].check_input(x)
        return x

    def encode(
        self, x: Tensor, aux_mask: Tensor | None = None, k_aux: int | None = None
    ) -> list[SparseCodes] | tuple[list[SparseCodes], list[SparseCodes]]:
        """The active latents of every layer and row.

        Args:
            x: ``[..., L, d]`` or ``[n, L·d]`` in the dtype of the parameters (any float under ``torch.autocast``).
            aux_mask: bool ``[L·m]``, true at dead latents: also return the top-`k_aux` of each layer among those.
            k_aux: width of that selection (default: ``config.k_aux``).

        Returns:
            L `SparseCodes` over m latents, one for each layer, as `SparseCoder.encode` gives them; a pair (codes, aux
            codes) with `aux_mask`. `join_codes` makes one of them, over the latents of all layers.
        """
        found = self.select(x, aux_mask, k_aux)
        codes = [codes for codes, _, _ in found]
        return codes if aux_mask is None else (codes, [aux for _, _, aux in found])

    def select(
        self, x: Tensor, aux_mask: Tensor | None = None, k_aux: int | None = None
    ) -> list[tuple[SparseCodes, Tensor | None, SparseCodes | None]]:
        """`encode`, by layers, with the smallest selected score of each (with ``config.joint`` of all of them): see
        `SparseCoder.select`.

        The joint selection is exact: every layer gives its ``n·min(L·k, m)`` largest, and `largest_together` keeps the
        ``L·n·k`` largest of those. That takes ``n·L·min(L·k, m)`` entries of memory instead of ``[n, L·m]``.
        """
        x, config = self.layered(x), self.config
        together = config.joint and self.training
        k = min(config.layers * config.k, config.m) if together else None
        found = [
            source.select(x[..., s, :], mask, k_aux, k)
            for s, (source, mask) in enumerate(zip(self.sources, self.by_layer(aux_mask), strict=True))
        ]
        if not together:
            return found
        norms = [source.decoder_norms() for source in self.sources] if config.select_by_norm else None
        count = x.shape[:-2].numel() * config.layers * config.k
        codes, smallest = largest_together([codes for codes, _, _ in found], count, norms)
        return [(kept, smallest, aux) for kept, (_, _, aux) in zip(codes, found, strict=True)]

    def by_layer(self, mask: Tensor | None) -> Sequence[Tensor | None]:
        """A mask ``[L·m]`` of the joined latents as L masks ``[m]``; None as L times None."""
        config = self.config
        if mask is None:
            return [None] * config.layers
        if mask.shape != (config.latents,):
            raise ValueError(
                f"a mask of latents must have shape [{config.latents}], those of all layers, got {list(mask.shape)}"
            )
        return mask.split(config.m)

    def decode(self, codes: Sequence[SparseCodes] | SparseCodes, x: Tensor | None = None) -> Tensor:
        """The outputs ``[..., L, d_out]`` for one `SparseCodes` of each layer (``[n, L, d_out]`` for all of them joined
        by `join_codes`); with a skip connection, of the inputs `x` (as `encode` takes them) too."""
        config = self.config
        if isinstance(codes, SparseCodes):
            codes = split_codes(codes, [config.m] * config.layers)
        if len(codes) != config.layers:
            raise ValueError(f"codes must be {config.layers}, one for each layer, got {len(codes)}")
        if config.skip and x is None:
            raise ValueError("x must be given: the output of a coder with a skip connection depends on its input")
        bias = self.b_dec.reshape(-1)
        parts = [
            decode(part, source.W_dec, bias if s == 0 else None, sparse_grad=source.sparse_grad)
            for s, (source, part) in enumerate(zip(self.sources, codes, strict=True))
        ]
        y = add_up([part.reshape(-1, part.shape[-1]) for part in parts]).to(parts[0].dtype)
        y = y.reshape(*codes[0].batch_shape, config.layers, config.target_width)
        return self.add_skip(y, x)

    def add_skip(self, y: Tensor, x: Tensor | None) -> Tensor:
        """``y_t + W_skip_t x_t`` for `y` ``[..., L, d_out]``; `y` itself where there is no skip connection."""
        if not self.config.skip:
            return y
        x = self.layered(x)
        maps = enumerate(self.W_skip.split(self.config.target_width))
        skipped = torch.stack([F.linear(x[..., t, :], weight) for t, weight in maps], -2)
        return y + skipped.reshape(y.shape)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs ``[..., L, d_out]`` for `x` ``[..., L, d]``, or ``[n, L·d_out]`` for ``[n, L·d]``."""
        config, y = self.config, self.decode(self.encode(x), x)
        flat = x.ndim <= 2 and x.shape[-1] == config.input_width
        return y.reshape(*x.shape[:-1], config.output_width if flat else config.target_width)

    def decoder_norms(self) -> Tensor:
        """``[L·m]``, for every latent the sum of its norms at all targets. Detached."""
        return torch.cat([source.decoder_norms() for source in self.sources])

    @torch.no_grad()
    def clamp_(self) -> CrossLayerTranscoder:
        """Bring trained thresholds back to 0 where a step of the optimiser took them below; to be called after each."""
        for source in self.sources:
            source.clamp_()
        return self

    @torch.no_grad()
    def tied_init_(self, seed: int = 0) -> CrossLayerTranscoder:
        """Every source as by `SparseCoder.tied_init_`, with seeds ``seed + 2 s``; all else 0."""
        self._zero_()
        for s, source in enumerate(self.sources):
            source.tied_init_(seed + 2 * s)
        return self

    @torch.no_grad()
    def init_uniform_(self, seed: int = 0) -> CrossLayerTranscoder:
        """Encoders uniform in ±1 / √m, decoders in ±1 / √(L d_out) (Ameisen et al. 2025), the same on every device; all
        else 0, thresholds included."""
        config = self.config
        self._zero_()
        for s, source in enumerate(self.sources):
            uniform_(source.W_enc, config.m**-0.5, seed + 2 * s)
            uniform_(source.W_dec, config.output_width**-0.5, seed + 2 * s + 1)
        return self

    def _zero_(self) -> None:
        for value in (*self.parameters(), *self.buffers()):
            value.zero_()

    @torch.no_grad()
    def init_b_dec_(self, x: Tensor, method: str = "geometric_median") -> CrossLayerTranscoder:
        """Set `b_dec` to the centre of every layer's targets `x` ``[n, L·d_out]``: 'geometric_median' or 'mean'."""
        _fields.choice("method", method, ("geometric_median", "mean"))
        width = self.config.output_width
        if x.ndim != 2 or x.shape[1] != width or x.shape[0] == 0:
            raise ValueError(f"x must have shape [n, {width}] with at least one row, got {list(x.shape)}")
        for bias, part in zip(self.b_dec, x.split(self.config.target_width, 1), strict=True):
            acc = _checks.accumulator(x.dtype)
            bias.copy_(geometric_median(part) if method == "geometric_median" else part.mean(0, dtype=acc))
        return self

    def normalise_decoder_(self) -> CrossLayerTranscoder:
        """Scale every decoder row (what a latent writes to all targets) to unit norm, in place."""
        for source in self.sources:
            source.normalise_decoder_()
        return self

    @torch.no_grad()
    def fold_norms_(self) -> CrossLayerTranscoder:
        """Scale every latent so that its decoder norm is 1, the output unchanged: see `SparseCoder.fold_norms_`."""
        for source in self.sources:
            source.fold_norms_()
        self.config = dataclasses.replace(self.config, select_by_norm=False)
        return self

    @torch.no_grad()
    def fold_input_(
        self,
        scale: Sequence[float],
        centre: Tensor | None = None,
        out_scale: Sequence[float] | None = None,
        out_centre: Tensor | None = None,
    ) -> CrossLayerTranscoder:
        """Turn a transcoder trained on centred and scaled rows into the same one of plain rows.

        ``y_t(x) = trained_t(scale · (x - centre)) / out_scale_t + out_centre_t``, with a scale for every layer. The
        values of the codes stay as they are and decoder rows change their norms: call `fold_norms_` first where
        selection goes by norm.

        Args:
            scale, out_scale: L numbers above 0; `out_scale` None: `scale`.
            centre, out_centre: ``[L·d]`` and ``[L·d_out]``, of plain rows; None: 0.
        """
        config = self.config
        out_scale = scale if out_scale is None else out_scale
        if config.select_by_norm:
            raise ValueError("select_by_norm: call fold_norms_() first, or the folded coder would select other latents")
        for name, values in (("scale", scale), ("out_scale", out_scale)):
            if len(values) != config.layers:
                raise ValueError(f"{name} must be {config.layers} numbers, one for each layer, got {len(values)}")
            for value in values:
                _fields.number(name, value, above=True)
        for name, value, width in (
            ("centre", centre, config.input_width), ("out_centre", out_centre, config.output_width),
        ):  # fmt: skip
            if value is not None and value.shape != (width,):
                raise ValueError(f"{name} must have shape [{width}], got {list(value.shape)}")
        columns = self.b_dec.new_tensor(out_scale).repeat_interleave(config.target_width)
        self.b_dec /= columns.view_as(self.b_dec)
        if config.skip:
            self.W_skip /= columns[:, None]
            self.W_skip *= self.b_dec.new_tensor(scale).repeat_interleave(config.target_width)[:, None]
        for s, source in enumerate(self.sources):
            source.W_enc *= scale[s]
            source.W_dec /= columns[s * config.target_width :]
        if centre is not None:
            centre = centre.to(self.b_dec).view(config.layers, config.d)
            for source, shift in zip(self.sources, centre, strict=True):
                source.b_enc -= source.W_enc @ shift
            if config.skip:
                self.b_dec -= self.add_skip(torch.zeros_like(self.b_dec), centre)
        if out_centre is not None:
            self.b_dec += out_centre.to(self.b_dec).view_as(self.b_dec)
        return self

    def save(self, folder: str | Path) -> Path:
        """Write ``coder.safetensors`` and ``coder.json`` into `folder` (made if absent), each whole or not at all."""
        weights, wanted = self.state_dict(), _tensors(self.config)
        for name, (_, dtype) in wanted.items():
            if weights[name].dtype != dtype:
                raise ValueError(
                    f"{name} is {weights[name].dtype}, config.dtype says {self.config.dtype!r}: the module was cast "
                    "after construction; make a CrossLayerTranscoder of the wanted dtype and load_state_dict into it"
                )
        weights = {name: weights[name] for name in wanted}
        save_pair(Path(folder), STEM, FORMAT, VERSION, self.config.to_dict(), weights)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str | None = None) -> CrossLayerTranscoder:
        """Read what `save` wrote; in eval mode.

        Raises:
            FileNotFoundError: a file is not there.
            fusae.formats.FormatError: a file is truncated, foreign, of an unknown version, or does not fit its
                configuration; names the file and the field. Raised before any weight is read.
        """

        def expected(values):
            config = CrossLayerConfig.from_dict(values)
            return config, _tensors(config)

        config, weights = load_pair(Path(folder), STEM, FORMAT, VERSION, expected)
        coder = cls(config, seed=None, device=device)
        targets = coder.state_dict()
        for name, weight in weights:
            targets[name].copy_(weight)
        return coder.eval()


def _tensors(config: CrossLayerConfig) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of all that is saved."""
    return {**config.parameters(), **config.buffers()}
