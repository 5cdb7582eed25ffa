# SPDX-License-Identifier: Apache-2.0
"""The configurations in which gathers, sums by latent and the optimiser are compiled ahead of time: see `aot`."""

from __future__ import annotations

from .adam_rows import adam_tile
from .aot import Job
from .decode_loss import NESTED
from .dense import WORDS
from .entries import BLOCK, gather_tile
from .sums import LONG, SHORT

_ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
_I32 = (
    "n", "m", "width", "storage", "groups", "d", "blocks", "segments", "chunk", "count",
    "stride", "stride_source", "stride_weight", "stride_target", "stride_row", "stride_col",
)  # fmt: skip
_FLOATS = (
    "bandwidth", "decay", "l2", "rise", "beta2", "add2", "step_size", "root_correction2", "eps",
)  # fmt: skip
_POINTERS = {
    "indices": "*i32", "offsets": "*i64", "prefixes": "*i32", "weights": "*fp32", "sse": "*fp32", "dots": "*fp32",
    "scale": "*fp32", "row": "*i32", "coef": "*fp32", "order": "*i64", "latents": "*i64", "slots": "*i64",
    "begin": "*i64", "begins": "*i64", "end": "*i64", "parts": "*fp32", "keys": "*i32", "coef_out": "*fp32",
    "bits": "*i32",
    "counts": "*i32", "ends": "*i64", "grad_pre": "*fp32", "jumps": "*fp32", "state": "*u8", "grad_l0": "*fp32",
    "threshold": "*fp32", "exp_avg": "*fp32", "exp_avg_sq": "*fp32", "rows": "*i64",
}  # fmt: skip
_STORED = (
    "values", "weight", "bias", "out", "source", "target", "residual", "mixed", "f", "grad_values", "param", "grad",
)  # fmt: skip
_ALIGNED = ("d", "stride", "stride_source", "stride_weight", "stride_target", "stride_row")


def _types(name: str, **others: str) -> dict[str, str]:
    types = {**_POINTERS, **dict.fromkeys(_I32, "i32"), **dict.fromkeys(_FLOATS, "fp32")}
    return {**types, **dict.fromkeys(_STORED, f"*{name}"), **others}


def _job(label: str, module: str, kernel: str, types: dict[str, str], constants: dict, **options) -> Job:
    """`constants` may hold num_warps, and names arguments that are None."""
    constants = dict(constants)
    warps = constants.pop("num_warps", 4)
    return Job(label, module, kernel, types, constants, **{"aligned": _ALIGNED, "warps": warps, **options})


def _gathers() -> list[Job]:
    """All hot but one: ptxas keeps 8 bytes of the float16 loss with dots on the stack of sm_80."""
    found = []
    for name, item in _ITEM.items():
        tile, types = gather_tile(4096, item).sizes, _types(name)
        fixed = {"RAGGED": False, "offsets": None}
        found += [
            _job(f"decode-{name}", "decode", "decode_kernel", types, {**fixed, "BIAS": True, **tile}),
            _job(f"decode-{name}-ragged", "decode", "decode_kernel", types, {"RAGGED": True, "BIAS": True, **tile}),
            _job(f"decode-{name}-d64", "decode", "decode_kernel", types,
                 {**fixed, "BIAS": True, **gather_tile(64, item).sizes}),
            _job(f"decode-{name}-odd", "decode", "decode_kernel", types, {**fixed, "BIAS": True, **tile}, aligned=()),
            _job(f"dots-{name}", "decode", "dots_kernel", types,
                 {**fixed, "prefixes": None, "GROUPED": False, "BY_RANK": False, **tile}),
            _job(f"dots-{name}-nested", "decode", "dots_kernel", types,
                 {"RAGGED": True, "GROUPED": True, "BY_RANK": False, **tile}),
            _job(f"join_dots-{name}", "decode", "join_dots_kernel", types,
                 {"RAGGED": True, "SCALED": True, "B": BLOCK}),
        ]  # fmt: skip
        for nested in (False, True):
            sizes = gather_tile(4096, item, *NESTED).sizes if nested else tile
            given = {} if nested else {"order": None, "begins": None, "weights": None}
            for dots in (False, True):
                found.append(
                    _job(f"decode_loss-{name}{'-nested' * nested}{'-dots' * dots}", "decode_loss", "decode_loss_kernel",
                         types, {**fixed, **given, "GROUPED": nested, "BIAS": True, "MIXED": nested, "DOTS": dots,
                                 **sizes}, hot=(name, nested, dots) != ("fp16", False, True)))  # fmt: skip
    return found


def _sums() -> list[Job]:
    found = []
    for name, item in _ITEM.items():
        short, long = (gather_tile(4096, item, *shape).sizes for shape in (SHORT, LONG))
        types, parts = _types(name), _types(name, out="*fp32")
        for dots in (False, True):
            flags, tag = {"SUM": True, "DOTS": dots}, f"{name}{'-dots' * dots}"
            found += [
                _job(f"sums-{tag}", "sums", "sums_kernel", types,
                     {**flags, "latents": None, "slots": None, "LISTED": False, "SLOTTED": False, "WHOLE": True,
                      "SCALED": dots, **short}),
                _job(f"sums-{tag}-rows", "sums", "sums_kernel", types,
                     {**flags, "LISTED": True, "SLOTTED": True, "WHOLE": True, "SCALED": dots, **short}),
                _job(f"sums-{tag}-chunks", "sums", "sums_kernel", parts,
                     {**flags, "slots": None, "LISTED": True, "SLOTTED": False, "WHOLE": False, "SCALED": False,
                      **long}),
            ]  # fmt: skip
        by_value = _types(name, coef=f"*{name}")
        found += [
            _job(f"join-{name}", "sums", "join_kernel", types, {"SCALED": True, **long}),
            _job(f"coef_sums-{name}", "sums", "coef_sums_kernel", types,
                 {"slots": None, "SLOTTED": False, "WHOLE": True, "N": 32, "E": 16}),
            _job(f"keys-{name}", "sums", "keys_kernel", by_value, {"RAGGED": True, "ZEROS": False, "B": BLOCK}),
            _job(f"entries-{name}", "sums", "entries_kernel", by_value,
                 {"RAGGED": True, "GROUPED": True, "BY_RANK": True, "B": BLOCK}),
        ]  # fmt: skip
    return found


def _rows() -> list[Job]:
    found = []
    for name in _ITEM:
        types = _types(name, slots="*i32")
        for d in (768, 2304, 4096, 8192, 16384):
            for whole in (False, True):
                if whole or d == 4096:
                    found.append(
                        _job(f"adam_rows-{name}-{d}{'-unit' * whole}", "adam_rows", "adam_rows_kernel", types,
                             {"rows": None, "slots": None, "MASKED": False, "SLOTTED": False, "PROJECT": whole,
                              "RENORMALISE": whole, **adam_tile(d, whole)}))  # fmt: skip
        found.append(
            _job(f"adam_rows-{name}-sparse", "adam_rows", "adam_rows_kernel", types,
                 {"rows": None, "MASKED": False, "SLOTTED": True, "PROJECT": True, "RENORMALISE": True,
                  **adam_tile(4096, True)}))  # fmt: skip
    return found


def _dense() -> list[Job]:
    types, tile = _types("bf16"), {"stride_col": 1, "N": 4, "W": WORDS}
    aligned = ("m", "stride_row")
    return [
        _job("nonzero_bits", "dense", "nonzero_bits_kernel", types, tile, aligned=aligned),
        _job("nonzero_take", "dense", "nonzero_take_kernel", types, tile, aligned=aligned),
        _job("scatter", "dense", "scatter_kernel", types, {"RAGGED": True, "B": BLOCK}),
        _job("threshold_gradients", "dense", "threshold_gradients_kernel", types,
             {"VALUES": True, "L0": True, "THROUGH": True, "B": BLOCK}),
        _job("group_keys", "decode_loss", "group_keys_kernel", types, {"RAGGED": True, "BY_RANK": False, "B": BLOCK}),
    ]  # fmt: skip


JOBS = _gathers() + _sums() + _rows() + _dense()
