# SPDX-License-Identifier: Apache-2.0
"""Other libraries, where they are installed: their training steps, OpenAI's decoder. Nothing of them is copied here.

Each library contributes its own module and its own reconstruction loss, without auxiliary terms; weights start from the
same inputs, and the optimiser is ``torch.optim.Adam(fused=True)`` for all. What their trainers add around it (gradient
clipping, projection, renormalisation, schedules, logging) is left out: fusae's contender does none of it either.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from fusae.testing import bench_compiled
from fusae.testing.bench_calls import CALLS
from fusae.testing.workloads import LR, Build, Call, Inputs, prime, select, squared_error, train_step, train_torch

#: contender -> the module to import, and the name on PyPI
LIBRARIES = {
    "sparsify": ("sparsify", "eai-sparsify"),
    "SAELens": ("sae_lens", "sae-lens"),
    "dictionary_learning": ("dictionary_learning", "dictionary-learning"),
    "OpenAI kernels": ("sparse_autoencoder", "git+https://github.com/openai/sparse_autoencoder"),
}
COMPILED = "torch.compile"


def _step(inputs: Inputs, module: torch.nn.Module, weights: dict[str, Tensor], loss_of: Callable) -> Call:
    """Copy `weights` into the parameters of those names, and train `module` with Adam."""
    parameters = dict(module.named_parameters())
    if set(parameters) != set(weights):
        raise RuntimeError(
            f"{type(module).__module__} has parameters {sorted(parameters)}, this adapter knows {sorted(weights)}: "
            "another version of the library?"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    optimizer = torch.optim.Adam(parameters.values(), lr=LR, fused=True)
    prime(optimizer)
    return train_step(inputs, loss_of, optimizer)


def _sparsify(inputs: Inputs, k: int, backend: str) -> Call:
    from sparsify import SparseCoder, SparseCoderConfig

    m, d = inputs.W_enc.shape
    config = SparseCoderConfig(num_latents=m, k=k, normalize_decoder=False)
    coder = SparseCoder(d, config, device=inputs.W_enc.device, dtype=inputs.W_enc.dtype)
    weights = {
        "encoder.weight": inputs.W_enc, "encoder.bias": inputs.b_enc, "W_dec": inputs.W_dec, "b_dec": inputs.b_dec,
    }  # fmt: skip
    return _step(inputs, coder, weights, lambda x: coder(x).fvu)


def _saelens(inputs: Inputs, k: int, backend: str) -> Call:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    def known(cls: type, **options: object) -> dict[str, object]:
        """Of these options, those that this version of the library has."""
        fields = {field.name for field in dataclasses.fields(cls)}
        return {name: value for name, value in options.items() if name in fields}

    m, d = inputs.W_enc.shape
    dtype = str(inputs.W_enc.dtype).removeprefix("torch.")
    plain = known(TopKTrainingSAEConfig, rescale_acts_by_decoder_norm=False, use_sparse_activations=False)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(
        d_in=d, d_sae=m, k=k, device=str(inputs.W_enc.device), dtype=dtype, apply_b_dec_to_input=True, **plain,
    ))  # fmt: skip
    rest = known(TrainStepInput, is_logging_step=False)

    def loss_of(x: Tensor) -> Tensor:
        step = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, **rest)
        return sae.training_forward_pass(step).loss

    weights = {"W_enc": inputs.W_enc.T, "b_enc": inputs.b_enc, "W_dec": inputs.W_dec, "b_dec": inputs.b_dec}
    return _step(inputs, sae, weights, loss_of)


def _dictionary_learning(inputs: Inputs, k: int, backend: str) -> Call:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    m, d = inputs.W_enc.shape
    coder = AutoEncoderTopK(d, m, k).to(inputs.W_enc)
    weights = {
        "encoder.weight": inputs.W_enc, "encoder.bias": inputs.b_enc, "decoder.weight": inputs.W_dec.T,
        "b_dec": inputs.b_dec,
    }  # fmt: skip
    return _step(inputs, coder, weights, lambda x: squared_error(coder(x), x))


def _openai_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """OpenAI's Triton kernels (Gao et al. 2024), which take the decoder as ``[d, m]``, here a view."""
    from sparse_autoencoder.kernels import TritonDecoderAutograd

    return TritonDecoderAutograd.apply(indices.long(), values, W_dec.T) + b_dec


def _openai_codes(codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return _openai_decode(codes.values, codes.indices, W_dec, b_dec)


def _openai_forward(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Tensor:
    values, indices = select(x, W_enc, b_enc - W_enc @ b_dec, k)
    return _openai_decode(values, indices, W_dec, b_dec)


_BUILDERS: dict[str, dict[str, Build]] = {
    "train_step": {
        "sparsify": _sparsify, "SAELens": _saelens, "dictionary_learning": _dictionary_learning,
        "OpenAI kernels": train_torch(_openai_forward),
    },
    "decode": {"OpenAI kernels": CALLS["decode"](_openai_codes)},
    "decode_bwd": {"OpenAI kernels": CALLS["decode_bwd"](_openai_codes)},
}  # fmt: skip


def missing(op: str | None = None) -> dict[str, str]:
    """Contenders (of `op`) that cannot run here, and why."""
    found = {
        name: f"not installed (pip install {package})"
        for name, (module, package) in LIBRARIES.items()
        if importlib.util.find_spec(module) is None
    }
    if "OpenAI kernels" not in found and not torch.cuda.is_available():
        found["OpenAI kernels"] = "needs an NVIDIA GPU"
    if (reason := bench_compiled.missing()) is not None:
        found[COMPILED] = reason
    taking_part = None if op is None else {*_BUILDERS.get(op, ()), *bench_compiled.CONTENDERS.get(op, ())}
    return {name: why for name, why in found.items() if taking_part is None or name in taking_part}


#: as `fusae.testing.workloads.CONTENDERS`, with what is installed
CONTENDERS: dict[str, dict[str, Build]] = {
    op: {
        name: build
        for table in (bench_compiled.CONTENDERS, _BUILDERS)
        for name, build in table.get(op, {}).items()
        if name not in missing()
    }
    for op in {**bench_compiled.CONTENDERS, **_BUILDERS}
}
