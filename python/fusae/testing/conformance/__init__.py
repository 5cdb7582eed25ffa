# SPDX-License-Identifier: Apache-2.0
"""`check_forward` and `check_backward`: does a target agree with the truth on a case? If not: ``AssertionError``.

One file per family of ops, as for the cases.
"""

from __future__ import annotations

import torch

from ... import _dispatch
from ..cases import Case
from ..targets import Target
from .adam import adam_forward
from .decode import decode_backward, decode_forward
from .dense import codes_from_dense_backward, codes_from_dense_forward
from .encode import encode_backward, encode_forward, topk_backward, topk_forward
from .loss import decode_loss_backward, decode_loss_forward
from .ragged import batch_topk_backward, batch_topk_forward, threshold_backward, threshold_forward

_FORWARD = {
    "topk": topk_forward,
    "encode_topk": encode_forward,
    "encode_threshold": threshold_forward,
    "encode_batch_topk": batch_topk_forward,
    "decode": decode_forward,
    "decode_loss": decode_loss_forward,
    "codes_from_dense": codes_from_dense_forward,
    "adam_rows_": adam_forward,
}
_BACKWARD = {
    "topk": topk_backward,
    "encode_topk": encode_backward,
    "encode_threshold": threshold_backward,
    "encode_batch_topk": batch_topk_backward,
    "decode": decode_backward,
    "decode_loss": decode_loss_backward,
    "codes_from_dense": codes_from_dense_backward,
}


def accepts(case: Case, target: Target, dtype: torch.dtype) -> bool:
    """False if the target refuses float64 for this case, with a reason that says so. It may refuse nothing else."""
    if dtype != torch.float64:
        return True
    with target.active():
        try:
            case.call(case.inputs(dtype, device=target.device))
        except _dispatch.BackendError as error:
            if "float64" not in str(error):
                raise AssertionError(f"{target} refuses {case} in float64 without naming the dtype: {error}") from error
            return False
    return True


def check_forward(case: Case, target: Target, dtype: torch.dtype, seed: int = 0) -> None:
    """Run the public op on the target and compare with the reference in that dtype and with float64."""
    inputs = case.inputs(dtype, seed, target.device)
    with target.active():
        result = case.call(inputs)
    if result is None:  # an in-place op: what it was given is the result, the same seed gives the inputs back
        inputs, result = case.inputs(dtype, seed, target.device), inputs
    _FORWARD[case.op](case, inputs, result)


def check_backward(case: Case, target: Target, dtype: torch.dtype, seed: int = 0) -> None:
    """Gradients of the public op on the target, dense and row-sparse, against float64 autograd."""
    inputs = case.inputs(dtype, seed, target.device)
    _BACKWARD[case.op](case, inputs, target, torch.Generator().manual_seed(seed + 1))
