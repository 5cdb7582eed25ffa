# SPDX-License-Identifier: Apache-2.0
"""What a sparse coder is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .. import _fields

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
SELECTS = ("topk", "abs", "group_max", "batch_topk", "relu", "threshold")
INPUT_NORMS = ("none", "layer", "rms")


@dataclasses.dataclass(frozen=True)
class SparseCoderConfig:
    """The shape and the activation of a `SparseCoder`. Checked on construction.

    Attributes:
        d: width of the input.
        m: latents (dictionary size).
        k: latents active per row, ``1 <= k <= m``: exactly ('topk', 'abs', 'group_max'), on average ('batch_topk'), or
            wanted ('threshold' with a penalty that has a target; otherwise of no effect, as with 'relu').
        activation: 'relu' (a selected latent at or below 0 gets value 0) or 'none'.
        select: which latents are active. 'topk': the k largest pre-activations of a row; 'abs': by magnitude (wants
            activation 'none'); 'group_max': the largest of each of k groups of latents (k divides m); 'batch_topk': the
            n·k largest of a batch in training, those above a common threshold in eval mode (Bussmann et al. 2024,
            arXiv:2412.06410); 'relu': those above 0; 'threshold': those above a trained threshold per latent, which is
            at least 0 (JumpReLU, Rajamanoharan et al. 2024, arXiv:2407.14435).
        select_by_norm: select by pre-activation times the norm of the latent's decoder row, for dictionaries whose
            decoder rows are not of unit norm.
        k_aux: latents in the AuxK selection, ``0 <= k_aux <= m``; 0: the coder has none.
        dtype: of the parameters: 'float32', 'bfloat16', 'float16' or 'float64'. Thresholds are float32 throughout
            (float64 for 'float64').
        d_out: width of the output, for transcoders; None: d.
        pre_bias: subtract `b_dec` from the input before encoding (wants the output to be of the input's width).
        skip: add a dense linear map ``W_skip x`` to the output (skip transcoder, arXiv:2501.18823).
        gated: separate gates and magnitudes (Rajamanoharan et al. 2024, arXiv:2404.16014); wants select 'relu'.
        sites: widths of the parts that a row is joined from (crosscoder); the norm of a decoder row is then the sum of
            its parts' norms. Their sum is the width of the output.
        input_norm: what every row is normalised by before anything else, and the output back, in dictionaries of others
            (`fusae.load`): 'layer': ``(x - mean) / (std + 1e-5)`` with the unbiased std of the row; 'rms':
            ``x √d / ‖x‖``. For inference alone, with an output of the input's width; 'none' otherwise.

    Raises:
        TypeError, ValueError: naming the field, what was wanted and what came.
    """

    d: int
    m: int
    k: int
    activation: str = "relu"
    select: str = "topk"
    select_by_norm: bool = False
    k_aux: int = 0
    dtype: str = "float32"
    d_out: int | None = None
    pre_bias: bool = True
    skip: bool = False
    gated: bool = False
    sites: tuple[int, ...] | None = None
    input_norm: str = "none"

    def __post_init__(self) -> None:
        _fields.whole("d", self.d, 1)
        _fields.whole("m", self.m, 1, 2**31 - 1)
        _fields.whole("k", self.k, 1, self.m, "m")
        _fields.choice("activation", self.activation, ("relu", "none"))
        _fields.choice("select", self.select, SELECTS)
        if self.select == "abs" and self.activation != "none":
            raise ValueError(
                f"activation must be 'none' with select 'abs' (values are signed), got {self.activation!r}"
            )
        if self.is_thresholded and self.activation != "relu":
            raise ValueError(
                f"activation must be 'relu' with select {self.select!r} (its threshold is at least 0), "
                f"got {self.activation!r}"
            )
        if self.select == "group_max" and self.m % self.k:
            raise ValueError(f"k must divide m = {self.m} with select 'group_max' (k groups of latents), got {self.k}")
        for name in ("select_by_norm", "pre_bias", "skip", "gated"):
            _fields.flag(name, getattr(self, name))
        _fields.whole("k_aux", self.k_aux, 0, self.m, "m")
        if self.k_aux and self.is_thresholded:
            raise ValueError(f"k_aux must be 0 with select {self.select!r} (which has no AuxK), got {self.k_aux}")
        if self.gated and self.select != "relu":
            raise ValueError(f"select must be 'relu' with gated (gates are open above 0), got {self.select!r}")
        _fields.choice("dtype", self.dtype, tuple(DTYPES))
        if self.d_out is not None:
            _fields.whole("d_out", self.d_out, 1)
        if self.pre_bias and self.output_width != self.d:
            raise ValueError(
                f"pre_bias must be false where d_out differs from d (b_dec is of the output), got d_out {self.d_out}"
            )
        if self.sites is not None:
            object.__setattr__(self, "sites", tuple(self.sites))
            for width in self.sites:
                _fields.whole("sites", width, 1)
            if sum(self.sites) != self.output_width:
                raise ValueError(
                    f"sites must add up to the width of the output, {self.output_width}, got {list(self.sites)}"
                )
        _fields.choice("input_norm", self.input_norm, INPUT_NORMS)
        if self.input_norm != "none" and (self.d_out is not None or self.skip):
            raise ValueError(
                f"input_norm must be 'none' for transcoders (the output has its own scale), got {self.input_norm!r}"
            )

    @property
    def is_thresholded(self) -> bool:
        """Whether any number of latents can be active: all that are above a threshold."""
        return self.select in ("relu", "threshold")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def threshold_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def output_width(self) -> int:
        """`d_out`, or `d` where that is None."""
        return self.d if self.d_out is None else self.d_out

    def parameters(self) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and dtype of every trained tensor of the coder."""
        d, m, out, dtype = self.d, self.m, self.output_width, self.torch_dtype
        shapes = {"W_enc": ([m, d], dtype), "b_enc": ([m], dtype), "W_dec": ([m, out], dtype), "b_dec": ([out], dtype)}
        if self.skip:
            shapes["W_skip"] = ([out, d], dtype)
        if self.gated:  # magnitude = exp(r_mag) · (pre - b_enc) + b_mag
            shapes |= {"r_mag": ([m], dtype), "b_mag": ([m], dtype)}
        if self.select == "threshold":
            shapes["threshold"] = ([m], self.threshold_dtype)
        return shapes

    def buffers(self) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and dtype of what belongs to the coder and is not trained."""
        return {"threshold": ([], torch.float64)} if self.select == "batch_topk" else {}

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return values | {"sites": None if self.sites is None else list(self.sites)}

    @classmethod
    def from_dict(cls, values: Any) -> SparseCoderConfig:
        """From plain values. An unknown or missing field is an error."""
        if not isinstance(values, dict):
            raise TypeError(f"the configuration must be an object, got {type(values).__name__}")
        _fields.known("the configuration", values, [f.name for f in dataclasses.fields(cls)])
        for name in ("d", "m", "k"):
            if name not in values:
                raise ValueError(f"the configuration lacks the field {name!r}")
        if not isinstance(values.get("sites"), (list, tuple, type(None))):
            raise TypeError(f"sites must be a list of widths, got {type(values['sites']).__name__}")
        return cls(**values)
