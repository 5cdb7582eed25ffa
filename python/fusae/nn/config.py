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


@dataclasses.dataclass(frozen=True)
class SparseCoderConfig:
    """The shape and the activation of a `SparseCoder`. Checked on construction.

    Attributes:
        d: width of the activations.
        m: latents (dictionary size).
        k: latents active per row, ``1 <= k <= m``.
        activation: 'relu' (a selected latent at or below 0 gets value 0) or 'none'.
        select: 'topk' by pre-activation, or 'abs' by its magnitude (wants activation 'none').
        select_by_norm: select by pre-activation times the norm of the latent's decoder row, for dictionaries whose
            decoder rows are not of unit norm.
        k_aux: latents in the AuxK selection, ``0 <= k_aux <= m``; 0: the coder has none.
        dtype: of the parameters: 'float32', 'bfloat16', 'float16' or 'float64'.

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

    def __post_init__(self) -> None:
        _fields.whole("d", self.d, 1)
        _fields.whole("m", self.m, 1, 2**31 - 1)
        _fields.whole("k", self.k, 1, self.m, "m")
        _fields.choice("activation", self.activation, ("relu", "none"))
        _fields.choice("select", self.select, ("topk", "abs"))
        if self.select == "abs" and self.activation != "none":
            raise ValueError(
                f"activation must be 'none' with select 'abs' (values are signed), got {self.activation!r}"
            )
        _fields.flag("select_by_norm", self.select_by_norm)
        _fields.whole("k_aux", self.k_aux, 0, self.m, "m")
        _fields.choice("dtype", self.dtype, tuple(DTYPES))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> SparseCoderConfig:
        """From plain values. An unknown or missing field is an error."""
        if not isinstance(values, dict):
            raise TypeError(f"the configuration must be an object, got {type(values).__name__}")
        _fields.known("the configuration", values, [f.name for f in dataclasses.fields(cls)])
        for name in ("d", "m", "k"):
            if name not in values:
                raise ValueError(f"the configuration lacks the field {name!r}")
        return cls(**values)
