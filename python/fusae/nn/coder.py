# SPDX-License-Identifier: Apache-2.0
"""`SparseCoder`: a top-k sparse autoencoder (Gao et al. 2024, arXiv:2406.04093) on fusae's ops."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import _checks, _fields
from ..codes import SparseCodes
from ..formats.native import load_pair, save_pair
from ..ops import decode, encode_topk
from .config import SparseCoderConfig
from .init import geometric_median, random_unit_rows_, unit_rows_
from .sums import total

FORMAT, VERSION, STEM = "fusae.SparseCoder", 1, "coder"


@dataclasses.dataclass(frozen=True, eq=False)
class CoderLoss:
    """What `SparseCoder.loss` returns. All on the device of the input; nothing has been read back.

    Attributes:
        loss: scalar to minimise: `mse` + coefficient · `aux`.
        mse: reconstruction error, summed over d, mean over rows, divided by the variance of the data. Detached.
        aux: AuxK term before its coefficient (detached), or None where no dead latents were given.
        sse: ``Σ ||x - x̂||²`` over the batch (detached): the numerator of the FVU.
        codes: the main codes, detached.
        reconstruction: ``[n, d]``, detached.
    """

    loss: Tensor
    mse: Tensor
    aux: Tensor | None
    sse: Tensor
    codes: SparseCodes
    reconstruction: Tensor


class _PreBias(torch.autograd.Function):
    """`b_enc` as it is; its gradient also reaches `b_dec`, which was subtracted from the input.

    The pre-activation is ``W_enc (x - b_dec) + b_enc``, so ``∂/∂b_dec = -(∂/∂b_enc) W_enc``: one product with the
    summed gradient in place of the gradient of every row of x.
    """

    @staticmethod
    def forward(b_enc, b_dec, W_enc):
        return b_enc.view_as(b_enc)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        (W_enc,) = ctx.saved_tensors
        return grad, -(grad.to(W_enc.dtype) @ W_enc) if ctx.needs_input_grad[1] else None, None


class SparseCoder(nn.Module):
    """Top-k sparse autoencoder: ``codes = top-k(W_enc (x - b_dec) + b_enc)``, ``x̂ = Σ_j v_j W_dec[i_j] + b_dec``.

    Parameters (row = latent): `W_enc` ``[m, d]``, `b_enc` ``[m]``, `W_dec` ``[m, d]``, `b_dec` ``[d]``. They start
    tied: decoder rows are random directions of unit norm, ``W_enc = W_dec``, biases 0.

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
        for name, (shape, dtype) in _tensors(config).items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
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
            `SparseCodes` ``[..., k]``, or a pair (codes, aux codes ``[..., k_aux]``) with `aux_mask`. Gradients reach
            x, `W_enc`, `b_enc` and `b_dec` through both.
        """
        self._check_input(x)
        config = self.config
        if aux_mask is not None and config.k_aux == 0:
            raise ValueError("aux_mask was given but config.k_aux is 0; make the coder with k_aux >= 1")
        norms = None
        if config.select_by_norm:
            acc = _checks.accumulator(self.W_dec.dtype)
            norms = torch.linalg.vector_norm(self.W_dec.detach(), dim=1, dtype=acc)
        return encode_topk(
            x - self.b_dec.detach(),
            self.W_enc,
            _PreBias.apply(self.b_enc, self.b_dec, self.W_enc.detach()),
            config.k,
            config.activation,
            config.select,
            norms=norms,
            aux_mask=aux_mask,
            k_aux=0 if aux_mask is None else config.k_aux if k_aux is None else k_aux,
            sparse_grad=self.sparse_grad,
        )

    def decode(self, codes: SparseCodes) -> Tensor:
        """The reconstruction ``[..., d]`` of codes over the m latents."""
        return decode(codes, self.W_dec, self.b_dec, sparse_grad=self.sparse_grad)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of `x` ``[..., d]``."""
        return self.decode(self.encode(x))

    def loss(
        self,
        x: Tensor,
        dead: Tensor | None = None,
        k_aux: int | None = None,
        *,
        aux_coefficient: float = 1 / 32,
        variance: Tensor | float | None = None,
    ) -> CoderLoss:
        """The training loss of a batch: normalised squared error, plus AuxK for dead latents. No host sync.

        Its sums do not depend on the number of threads. With `dead`, a reconstruction in a 16-bit dtype is rounded once
        before `b_dec` is added and once after; without, and in `decode`, only after.

        Args:
            x: ``[..., d]``.
            dead: bool ``[m]``, or None for no AuxK term. The dead latents' best `k_aux` reconstruct the residual
                ``x - x̂`` (detached), without `b_dec`; normalised by the variance of the residual; 0 where that is 0 or
                nothing is dead.
            k_aux: as in `encode`.
            aux_coefficient: weight of the AuxK term.
            variance: mean squared distance of the data from their mean, by which the error is divided, above 0 (a
                tensor is not looked at); None: that of the batch.

        Raises:
            ValueError, TypeError: naming the argument.

        Equivalent to::

            mse = (x - x_hat).square().sum(-1).mean() / variance
            e = (x - x_hat).detach()
            aux = (e - e_hat).square().sum(-1).mean() / (e - e.mean(0)).square().sum(-1).mean()
            loss = mse + aux_coefficient * aux
        """
        self._check_input(x)
        x = x.reshape(-1, self.config.d)
        n = x.shape[0]
        if n == 0:
            raise ValueError(f"x must have at least one row, got shape {list(x.shape)}")
        if variance is not None and not isinstance(variance, Tensor):
            _fields.number("variance", variance, above=True)
        acc = _checks.accumulator(x.dtype)
        if dead is None:
            codes = self.encode(x)
            reconstruction, aux_reconstruction = self.decode(codes), None
        else:
            codes, aux_codes = self.encode(x, dead, k_aux)
            reconstruction, aux_reconstruction = self._decode_both(codes, aux_codes)
        target = x.to(acc)
        error = reconstruction.to(acc) - target
        sse = total(error.square())
        if variance is None:
            variance = total((target - target.mean(0)).square()) / n
            variance = torch.where(variance > 0, variance, 1.0)  # rows all alike: the plain error
        mse = sse / n / variance
        loss, aux = mse, None
        if aux_reconstruction is not None:
            residual = -error.detach()
            spread = total((residual - residual.mean(0)).square())
            used = (spread > 0) & dead.any()
            # Divided by 1 where unused: a division by 0 would put NaN into the gradients even behind a `where`.
            aux = total((aux_reconstruction.to(acc) - residual).square()) / torch.where(used, spread, 1.0)
            aux = torch.where(used, aux, 0.0)
            loss = mse + aux_coefficient * aux
        return CoderLoss(
            loss,
            mse.detach(),
            None if aux is None else aux.detach(),
            sse.detach(),
            codes.detach(),
            reconstruction.detach(),
        )

    def _decode_both(self, codes: SparseCodes, aux: SparseCodes) -> tuple[Tensor, Tensor]:
        """``(decode(codes) + b_dec, decode(aux))`` in one pass: one gradient of `W_dec`, not two to add up.

        `decode` would add `b_dec` to the rows of both, so it is added after; in 16 bits that rounds once more.
        """
        n, k, k_aux = len(codes), codes.values.shape[1], aux.values.shape[1]
        device = codes.device
        offsets = torch.cat([torch.arange(n, device=device) * k, torch.arange(n + 1, device=device) * k_aux + n * k])
        values = torch.cat([codes.values.reshape(-1), aux.values.reshape(-1)])
        indices = torch.cat([codes.indices.reshape(-1), aux.indices.reshape(-1)])
        both = SparseCodes(values, indices, codes.m, offsets)
        main, extra = decode(both, self.W_dec, sparse_grad=self.sparse_grad).split(n)
        return main + self.b_dec, extra

    def _check_input(self, x: Tensor) -> None:
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
    def tied_init_(self, seed: int = 0) -> SparseCoder:
        """Decoder rows: random directions of unit norm; ``W_enc = W_dec``; biases 0."""
        random_unit_rows_(self.W_dec, seed)
        self.W_enc.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_dec.zero_()
        return self

    @torch.no_grad()
    def init_b_dec_(self, x: Tensor, method: str = "geometric_median") -> SparseCoder:
        """Set `b_dec` to the centre of the rows of `x` ``[n, d]``: their 'geometric_median' or their 'mean'."""
        _fields.choice("method", method, ("geometric_median", "mean"))
        if x.ndim != 2 or x.shape[1] != self.config.d or x.shape[0] == 0:
            raise ValueError(f"x must have shape [n, {self.config.d}] with at least one row, got {list(x.shape)}")
        acc = _checks.accumulator(x.dtype)
        self.b_dec.copy_(geometric_median(x) if method == "geometric_median" else x.mean(0, dtype=acc))
        return self

    def normalise_decoder_(self) -> SparseCoder:
        """Scale every decoder row to unit norm, in place. The encoder stays, so the reconstruction changes."""
        unit_rows_(self.W_dec.data)
        return self

    @torch.no_grad()
    def fold_input_(self, scale: float = 1.0, centre: Tensor | None = None) -> SparseCoder:
        """Turn a coder trained on ``scale · (x - centre)`` into the same coder of plain ``x``, with the same latents
        selected.

        Divides both biases and moves `b_dec`: ``coder(x) = trained(scale · (x - centre)) / scale + centre``.

        Args:
            scale: above 0.
            centre: ``[d]``, of plain inputs; None: 0.
        """
        _fields.number("scale", scale, above=True)
        if centre is not None and centre.shape != self.b_dec.shape:
            raise ValueError(f"centre must have shape {list(self.b_dec.shape)}, got {list(centre.shape)}")
        self.b_enc /= scale
        self.b_dec /= scale
        if centre is not None:
            self.b_dec += centre.to(self.b_dec)
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
        """Read what `save` wrote.

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
        return coder


def _tensors(config: SparseCoderConfig) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of every parameter."""
    d, m, dtype = config.d, config.m, config.torch_dtype
    shapes = {"W_enc": [m, d], "b_enc": [m], "W_dec": [m, d], "b_dec": [d]}
    return {name: (shape, dtype) for name, shape in shapes.items()}
