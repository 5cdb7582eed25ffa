# SPDX-License-Identifier: Apache-2.0
"""`SparseCoder`: sparse autoencoders and transcoders on fusae's ops."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks, _fields
from .._pages import large_pages
from ..codes import SparseCodes
from ..formats.native import load_pair, save_pair
from ..ops import decode, encode_batch_topk, encode_threshold, encode_topk
from .config import SparseCoderConfig
from .decoding import Decoding
from .init import geometric_median, random_unit_rows_, unit_rows_
from .input_norm import InputNorm
from .objectives import CoderLoss, Moment, TopK
from .pre_bias import PreBias
from .sums import running_, take

FORMAT, VERSION, STEM = "fusae.SparseCoder", 2, "coder"


class SparseCoder(Decoding, nn.Module):
    """Sparse autoencoder or transcoder: a few of m latents are active in each row, and decoded.

    ``pre = W_enc (x - b_dec) + b_enc`` (`b_dec` only with ``config.pre_bias``), ``codes = select(pre)`` as
    ``config.select`` says, ``ŷ = Σ_j v_j W_dec[i_j] + b_dec (+ W_skip x)``.

    Parameters (row = latent): `W_enc` ``[m, d]``, `b_enc` ``[m]``, `W_dec` ``[m, d_out]``, `b_dec` ``[d_out]``, and
    what the configuration calls for: `W_skip` ``[d_out, d]``; `threshold` ``[m]`` of select 'threshold'; `r_mag` and
    `b_mag` ``[m]`` of a gated coder, whose values are ``exp(r_mag) · (pre - b_enc) + b_mag`` where ``pre > 0``. Select
    'batch_topk' has a buffer `threshold` (a scalar, the running mean of the smallest selected score) for eval mode.

    They start tied: decoder rows are random directions of unit norm, ``W_enc = W_dec`` (independent directions where
    the widths differ), all else 0.

    Args:
        config: a `SparseCoderConfig`.
        seed: of the initial weights, a function of seed and shape on every device; None leaves them uninitialised.
        device: of the parameters.
        sparse_grad: give the gradients of `W_enc` and `W_dec` as ``torch.sparse_coo`` tensors of the touched rows, as
            `fusae.optim.Adam` takes them. An attribute; can be changed at any time.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(
        self,
        config: SparseCoderConfig,
        *,
        seed: int | None = 0,
        device: torch.device | str | None = None,
        sparse_grad: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(config, SparseCoderConfig):
            raise TypeError(f"config must be a fusae.nn.SparseCoderConfig, got {type(config).__name__}")
        self.config = config
        self.sparse_grad = sparse_grad
        for name, (shape, dtype) in config.parameters().items():
            setattr(self, name, nn.Parameter(large_pages(torch.empty(shape, dtype=dtype, device=device))))
        for name, (shape, dtype) in config.buffers().items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        if seed is not None:
            self.tied_init_(_fields.whole("seed", seed))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.to_dict().items())

    def encode(
        self, x: Tensor, aux_mask: Tensor | None = None, k_aux: int | None = None
    ) -> SparseCodes | tuple[SparseCodes, SparseCodes]:
        """The active latents of every row.

        Args:
            x: ``[..., d]`` in the dtype of the parameters (any float under ``torch.autocast``).
            aux_mask: bool ``[m]``, true at dead latents: also return the top-`k_aux` among those, from the same pass.
            k_aux: width of that selection (default: ``config.k_aux``). Pass the number of dead latents where it is
                smaller and known: the result has less padding, which costs time and changes nothing.

        Returns:
            `SparseCodes` ``[..., k]`` (ragged, of all rows joined, for select 'batch_topk', 'relu' and 'threshold'), or
            a pair (codes, aux codes ``[..., k_aux]``) with `aux_mask`. Gradients reach x, `W_enc`, `b_enc` and `b_dec`
            through both; thresholds only through `fusae.nn.objectives.JumpReLU`.
        """
        codes, _, aux = self.select(x, aux_mask, k_aux)
        return codes if aux_mask is None else (codes, aux)

    def select(
        self, x: Tensor, aux_mask: Tensor | None = None, k_aux: int | None = None, k: int | None = None
    ) -> tuple[SparseCodes, Tensor | None, SparseCodes | None]:
        """`encode`, and for a batch top-k in training the smallest selected score: (codes, smallest, aux codes).

        `k`: in place of ``config.k``.
        """
        self.check_input(x)
        config = self.config
        k = config.k if k is None else k
        if aux_mask is None:
            k_aux = 0
        elif config.k_aux == 0:
            raise ValueError("aux_mask was given but config.k_aux is 0; make the coder with k_aux >= 1")
        elif k_aux is None:
            k_aux = config.k_aux
        inputs, bias = self.encoder_input(x)
        aux = {"aux_mask": aux_mask, "k_aux": k_aux, "sparse_grad": self.sparse_grad}
        norms = self.decoder_norms() if config.select_by_norm and config.select != "relu" else None
        if config.is_thresholded:
            threshold = 0.0 if config.select == "relu" else self.threshold.detach()
            codes = encode_threshold(inputs, self.W_enc, bias, threshold, norms=norms, sparse_grad=self.sparse_grad)
            return self.magnitudes(codes) if config.gated else codes, None, None
        if config.select != "batch_topk":
            found = encode_topk(inputs, self.W_enc, bias, k, config.activation, config.select, norms=norms, **aux)
            return (found, None, None) if aux_mask is None else (found[0], None, found[1])
        if self.training:
            found = encode_batch_topk(inputs, self.W_enc, bias, k, config.activation, norms=norms, **aux)
            return (*found, None) if aux_mask is None else found
        if aux_mask is not None:
            raise ValueError("aux_mask is for training: in eval mode a batch top-k has a threshold; call .train()")
        threshold = self.threshold.to(_checks.accumulator(x.dtype))
        codes = encode_threshold(inputs, self.W_enc, bias, threshold, norms=norms, sparse_grad=self.sparse_grad)
        return codes, None, None

    def encoder_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoding ops take for `x`: input less `b_dec`, and a bias whose gradient also reaches `b_dec`."""
        x = InputNorm.of(self.config, x).normalise(x)
        if not self.config.pre_bias:
            return x, self.b_enc
        return x - self.b_dec.detach(), PreBias.apply(self.b_enc, self.b_dec, self.W_enc.detach())

    def decoder_norms(self) -> Tensor:
        """``[m]`` norms of the decoder rows, for a row joined from sites the sum of its parts' norms. Detached."""
        return self.norms_of(self.W_dec.detach())

    def norms_of(self, decoder_rows: Tensor) -> Tensor:
        """The same ``[u]`` of some rows of `W_dec` ``[u, d_out]``, with a gradient."""
        acc = _checks.accumulator(decoder_rows.dtype)
        parts = decoder_rows.split(list(self.config.sites or (decoder_rows.shape[1],)), dim=1)
        return torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=acc) for part in parts]).sum(0)

    def magnitudes(self, gates: SparseCodes) -> SparseCodes:
        """The codes of a gated coder from its open gates."""
        scale, bias, shift = (take(of, gates.indices) for of in (torch.exp(self.r_mag), self.b_enc, self.b_mag))
        values = scale * (gates.values - bias) + shift
        return SparseCodes(torch.relu(values).to(gates.values.dtype), gates.indices, gates.m, gates.offsets)

    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
        """The output ``[..., d_out]`` for codes over the m latents; with a skip connection or an ``input_norm``, of the
        input `x` too."""
        if x is None and (self.config.skip or self.config.input_norm != "none"):
            what = "a skip connection" if self.config.skip else f"input_norm {self.config.input_norm!r}"
            raise ValueError(f"x must be given: the output of a coder with {what} depends on its input")
        y = self.add_skip(decode(codes, self.W_dec, self.b_dec, sparse_grad=self.sparse_grad), x)
        return InputNorm.of(self.config, x).restore(y)

    def add_skip(self, y: Tensor, x: Tensor | None) -> Tensor:
        """``y + W_skip x``; `y` itself where the coder has no skip connection."""
        return y + F.linear(x.reshape(*y.shape[:-1], self.config.d), self.W_skip) if self.config.skip else y

    def forward(self, x: Tensor) -> Tensor:
        """The output ``[..., d_out]`` for `x` ``[..., d]``."""
        return self.decode(self.encode(x), x).reshape(*x.shape[:-1], self.config.output_width)

    def loss(
        self,
        x: Tensor,
        dead: Tensor | None = None,
        k_aux: int | None = None,
        *,
        aux_coefficient: float = 1 / 32,
        variance: Tensor | float | None = None,
    ) -> CoderLoss:
        """The loss of a top-k autoencoder: `fusae.nn.objectives.TopK` of the rows `x` ``[..., d]``.

        Args:
            x: ``[..., d]``.
            dead: bool ``[m]``, or None for no AuxK term.
            k_aux: as in `encode`.
            aux_coefficient: weight of the AuxK term.
            variance: as in `fusae.nn.objectives.Moment`.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        return TopK(aux_coefficient)(self, x, None, Moment(dead, k_aux, variance))

    def check_input(self, x: Tensor) -> None:
        """Raises `TypeError` or `ValueError` where `x` is no ``[..., d]`` of the dtype of the parameters."""
        d = self.config.d
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim < 1 or x.shape[-1] != d:
            raise ValueError(f"x must have shape [..., {d}], the coder's d, got {list(x.shape)}")
        if x.dtype != self.W_enc.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"x must have the dtype of the parameters, {self.W_enc.dtype}, got {x.dtype}; cast one of them, or use "
                "torch.autocast"
            )

    @torch.no_grad()
    def update_threshold_(self, smallest: Tensor, decay: float, steps: int) -> None:
        """Take the smallest selected score of a step into the running mean that is the threshold in eval mode.

        Args:
            smallest: scalar, from `select`; not finite (nothing was selected): no change.
            decay: of the running mean in the long run; in the first steps the mean is over fewer.
            steps: taken before this one.
        """
        running_(self.threshold, smallest, decay, steps)

    @torch.no_grad()
    def clamp_(self) -> SparseCoder:
        """Bring trained thresholds back to 0 where a step of the optimiser took them below; to be called after each."""
        if self.config.select == "threshold":
            self.threshold.clamp_(min=0.0)
        return self

    @torch.no_grad()
    def tied_init_(self, seed: int = 0) -> SparseCoder:
        """Decoder rows: random directions of unit norm; ``W_enc = W_dec``, or random ones of their own where the widths
        differ; all else 0."""
        for name in (*self.config.parameters(), *self.config.buffers()):
            if name not in ("W_enc", "W_dec"):
                getattr(self, name).zero_()
        random_unit_rows_(self.W_dec, seed)
        if self.W_enc.shape == self.W_dec.shape:
            self.W_enc.copy_(self.W_dec)
        else:
            random_unit_rows_(self.W_enc, seed + 1)
        return self

    @torch.no_grad()
    def init_b_dec_(self, x: Tensor, method: str = "geometric_median") -> SparseCoder:
        """Set `b_dec` to the centre of the rows of `x` ``[n, d_out]``: their 'geometric_median' or their 'mean'."""
        _fields.choice("method", method, ("geometric_median", "mean"))
        width = self.config.output_width
        if x.ndim != 2 or x.shape[1] != width or x.shape[0] == 0:
            raise ValueError(f"x must have shape [n, {width}] with at least one row, got {list(x.shape)}")
        acc = _checks.accumulator(x.dtype)
        self.b_dec.copy_(geometric_median(x) if method == "geometric_median" else x.mean(0, dtype=acc))
        return self

    def normalise_decoder_(self) -> SparseCoder:
        """Scale every decoder row to unit norm, in place. The encoder stays, so the reconstruction changes."""
        unit_rows_(self.W_dec.data)
        return self

    @torch.no_grad()
    def fold_input_(
        self,
        scale: float = 1.0,
        centre: Tensor | None = None,
        out_scale: float | None = None,
        out_centre: Tensor | None = None,
    ) -> SparseCoder:
        """Turn a coder trained on centred and scaled rows into the same coder of plain ones, the same latents selected.

        ``coder(x) = trained(scale · (x - centre)) / out_scale + out_centre``. Decoder rows keep their norms.

        Args:
            scale, out_scale: above 0; `out_scale` None: `scale`.
            centre, out_centre: ``[d]`` and ``[d_out]``, of plain rows; None: 0, but an autoencoder's `out_centre` is
                its `centre`.
        """
        config = self.config
        if config.input_norm != "none":
            raise ValueError(f"input_norm is {config.input_norm!r}: a scale per row is there already, nothing to fold")
        out_scale = scale if out_scale is None else out_scale
        for name, value in (("scale", scale), ("out_scale", out_scale)):
            _fields.number(name, value, above=True)
        if out_centre is None and config.d_out is None:
            out_centre = centre
        for name, value, width in (("centre", centre, config.d), ("out_centre", out_centre, config.output_width)):
            if value is not None and value.shape != (width,):
                raise ValueError(f"{name} must have shape [{width}], got {list(value.shape)}")
        none = None in (centre, out_centre)
        same = out_centre is centre if none else torch.equal(out_centre.to(centre), centre)
        if config.pre_bias and not (scale == out_scale and same):
            raise ValueError("scale and centre must be the same on both sides of a coder with pre_bias")
        for name in ("b_enc", "b_dec", "b_mag", "threshold"):
            if hasattr(self, name):
                getattr(self, name).div_(out_scale)
        if scale != out_scale:
            self.W_enc *= scale / out_scale
        if config.skip:
            self.W_skip *= scale / out_scale
        if centre is not None:
            self._shift_input_(centre.to(self.W_enc))
        if out_centre is not None:
            self.b_dec += out_centre.to(self.b_dec)
        return self

    @torch.no_grad()
    def fold_columns_(self, scale: Tensor, centre: Tensor | None = None) -> SparseCoder:
        """`fold_input_` with a scale for every column ``[d]``, of input and output alike: a crosscoder's sites.

        The values of the codes stay as they are and decoder rows change their norms: call `fold_norms_` first where
        selection goes by norm.
        """
        config = self.config
        if config.input_norm != "none" or config.pre_bias or config.output_width != config.d:
            wanted = "coders without pre_bias and input_norm whose output is of the input's width"
            raise ValueError(f"columns can be folded into {wanted}")
        if config.select_by_norm:
            raise ValueError("select_by_norm: call fold_norms_() first, or the folded coder would select other latents")
        if scale.shape != (config.d,) or not bool((scale > 0).all()):
            raise ValueError(f"scale must have shape [{config.d}] and be greater than 0, got shape {list(scale.shape)}")
        scale = scale.to(self.W_enc)
        self.W_enc *= scale
        self.W_dec /= scale
        self.b_dec /= scale
        if config.skip:
            self.W_skip *= scale / scale[:, None]
        if centre is not None:
            self._shift_input_(centre.to(self.W_enc))
            self.b_dec += centre.to(self.b_dec)
        return self

    def _shift_input_(self, centre: Tensor) -> None:
        """Turn encoder and skip connection of ``x - centre`` into those of x."""
        if not self.config.pre_bias:  # which is centred by b_dec
            moved = self.W_enc @ centre
            self.b_enc -= moved
            if self.config.gated:
                self.b_mag -= torch.exp(self.r_mag) * moved
        if self.config.skip:
            self.b_dec -= self.W_skip @ centre

    @torch.no_grad()
    def fold_norms_(self) -> SparseCoder:
        """Scale every latent so that its decoder norm is 1, the output unchanged; norms no longer matter to selection.

        With `select_by_norm`, the same latents are selected without it then: one of decoder norm 0, whose score was 0,
        loses its encoder. Otherwise it stays as it is.
        """
        norms = self.decoder_norms()
        divisor = torch.where(norms > 0, norms, 1.0)
        factor = norms if self.config.select_by_norm else divisor
        if not self.config.select_by_norm and not self.config.is_thresholded:
            raise ValueError("norms can be folded where selection goes by norm or by a threshold per latent; else the "
                             "folded coder would select other latents")  # fmt: skip
        # Scores that are multiplied by the norms already keep their thresholds.
        for name in ("W_enc", "b_enc", "b_mag", *(() if self.config.select_by_norm else ("threshold",))):
            value = getattr(self, name, None)
            if value is not None:
                value.mul_(factor.to(value.dtype).view(-1, *[1] * (value.ndim - 1)))
        self.W_dec.div_(divisor.to(self.W_dec.dtype)[:, None])
        self.config = dataclasses.replace(self.config, select_by_norm=False)
        return self

    def save(self, folder: str | Path) -> Path:
        """Write ``coder.safetensors`` and ``coder.json`` into `folder` (made if absent), each whole or not at all."""
        weights = {name: getattr(self, name) for name in _tensors(self.config)}
        for name, (_, dtype) in _tensors(self.config).items():
            if weights[name].dtype != dtype:
                raise ValueError(
                    f"{name} is {weights[name].dtype}, config.dtype says {self.config.dtype!r}: the module was cast "
                    "after construction; make a SparseCoder of the wanted dtype and load_state_dict into it"
                )
        save_pair(Path(folder), STEM, FORMAT, VERSION, self.config.to_dict(), weights)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str | None = None) -> SparseCoder:
        """Read what `save` wrote; in eval mode.

        Raises:
            FileNotFoundError: a file is not there.
            fusae.formats.FormatError: a file is truncated, foreign, of an unknown version, or does not fit its
                configuration; names the file and the field. Raised before any weight is read.
        """

        def expected(values):
            config = SparseCoderConfig.from_dict(values)
            return config, _tensors(config)

        config, weights = load_pair(Path(folder), STEM, FORMAT, VERSION, expected)
        coder = cls(config, seed=None, device=device)
        with torch.no_grad():
            for name, weight in weights:
                getattr(coder, name).copy_(weight)
        return coder.eval()


def _tensors(config: SparseCoderConfig) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of all that is saved."""
    return {**config.parameters(), **config.buffers()}
