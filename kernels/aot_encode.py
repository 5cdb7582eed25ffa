# SPDX-License-Identifier: Apache-2.0
"""The configurations in which the selections and encoders are compiled ahead of time: see `aot`."""

from __future__ import annotations

import torch

from .aot import Job
from .encode_plan import default_tiles

_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MMA = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
_I32 = ("n", "m", "d", "k", "size", "step", "rank", "units", "most", "first")
_I64 = ("sxn", "sxd", "swm", "swd", "stride_n", "stride_m", "stride")
_POINTERS = {
    "keys_ptr": "*i64", "aux_keys_ptr": "*i64", "side_ptr": "*fp32", "aux_side_ptr": "*fp32", "value_ptr": "*fp32",
    "aux_value_ptr": "*fp32", "index_ptr": "*i32", "aux_index_ptr": "*i32", "count_ptr": "*i32",
    "tally_ptr": "*i32", "aux_tally_ptr": "*i32", "bound_ptr": "*i64", "failed_ptr": "*i32", "list_ptr": "*i32",
    "mask_ptr": "*u8", "norms_ptr": "*fp32", "scores_ptr": "*fp32", "fill_ptr": "*i32", "indices_ptr": "*i32",
    "limit_ptr": "*i32", "above_ptr": "*i32", "entry_ptr": "*i64", "place_ptr": "*i64", "state_ptr": "*u8",
    "pivot_ptr": "*i32", "equal_ptr": "*i32", "quota_ptr": "*i32", "smallest_ptr": "*i32", "prefix_ptr": "*i32",
    "bins_ptr": "*i64", "needed_ptr": "*i32", "key_ptr": "*i32", "row_ptr": "*i32", "total_ptr": "*i32",
    "order_ptr": "*i32", "cap": "i32", "total": "i32", "capacity": "i32", "half": "fp32",
}  # fmt: skip


def _types(name: str, tma: tuple[int, int, int] | None = None) -> dict[str, str]:
    """Types of all arguments. A unit stride is a constant where the launch specialises on 1."""
    types = {**_POINTERS, **dict.fromkeys(_I32, "i32"), **dict.fromkeys(_I64, "i32")}
    types |= {p: f"*{name}" for p in ("x_ptr", "w_ptr", "b_ptr", "values_ptr", "pre_ptr")}
    if tma is not None:
        BM, BN, BK = tma
        types |= {"x_ptr": f"tensordesc<{name}[{BM}, {BK}]>", "w_ptr": f"tensordesc<{name}[{BN}, {BK}]>"}
    return types


def _ragged(name: str, tma: tuple[int, int, int] | None = None) -> dict[str, str]:
    return {**_types(name, tma), "limit_ptr": "*fp32"}


_ALIGNED = ("sxn", "swm", "d", "m")
_UNIT = {"sxd": 1, "swd": 1}


def _gemms() -> list[Job]:
    found = []
    for arch in (80, 90, 100):
        for name, dtype in _NAMES.items():
            t = default_tiles(dtype, 4096, (arch // 10, 0))
            want = {} if name == "fp32" else {arch: _MMA[arch]}
            common = {"NORMS": False, "MAGNITUDE": False, "SIDE": False, "BIAS": True, "PRECISION": "ieee",
                      "BM": t.BM, "BN": t.BN, "BK": t.BK, "GROUP": t.group, **_UNIT}  # fmt: skip
            options = {"warps": t.warps, "stages": t.stages, "archs": (arch,), "want": want, "aligned": _ALIGNED}
            tma = arch >= 90 and name != "fp32"
            where = f"{name}-sm{arch}"
            found += [
                Job(f"sample-{where}", "encode_tile", "sample_scores", _types(name),
                    {**common, "EVEN": True, "KEYS": False},
                    **options),
                Job(f"gate-{where}", "encode_topk", "gate", _types(name, (t.BM, t.BN, t.BK) if tma else None),
                    {**common, "TMA": tma, "AUX": False, "EVEN": True, "CAP": 2048, "AUX_CAP": 2048,
                     "PARTS": t.parts}, **options),
                Job(f"gate-aux-{where}", "encode_topk", "gate", _types(name, (t.BM, t.BN, t.BK) if tma else None),
                    {**common, "TMA": tma, "AUX": True, "EVEN": True, "CAP": 2048, "AUX_CAP": 4096,
                     "PARTS": t.parts}, **{**options, "hot": False}),  # spills, but not between the products of sm_90
                Job(f"sample-keys-{where}", "encode_tile", "sample_scores", {**_types(name), "scores_ptr": "*i32"},
                    {**common, "EVEN": True, "KEYS": True}, **options),
                *(Job(f"gate_batch{'-norms-aux' * rich}-{where}", "encode_batch_topk", "gate_batch",
                      _types(name, (t.BM, t.BN, t.BK) if tma and not rich else None),
                      {**common, "TMA": tma and not rich, "NORMS": rich, "AUX": rich, "EVEN": not rich,
                       "AUX_CAP": 4096 if rich else 16, "PARTS": t.parts},
                      **{**options, "hot": not rich and where != "fp32-sm80"})  # 16 bytes of stack there
                  for rich in ((False, True) if name == "bf16" else (False,))),
                Job(f"repair_scan-{where}", "encode_repair", "repair_scan", _types(name),
                    {**common, "MASK": False, "EVEN": False, "CAP": 512, "CUT": 16}, **{**options, "hot": False}),
            ]  # fmt: skip
            if name == "bf16":
                plain = {key: value for key, value in common.items() if key not in ("SIDE", "GROUP")}
                ragged = {**plain, "SPLITS": 8}
                loose = {**options, "hot": False}  # where a buffer or a fast path did not do
                found += [
                    Job(f"gate_ragged-{where}", "encode_ragged", "gate_ragged",
                        _ragged(name, (t.BM, t.BN, t.BK) if tma else None),
                        {**ragged, "TMA": tma, "WINDOW": False, "CAP": 128, "EVEN": True, "GROUP": t.group,
                         "PARTS": t.parts}, **options),
                    Job(f"gate_ragged-window-{where}", "encode_ragged", "gate_ragged", _ragged(name),
                        {**ragged, "TMA": False, "WINDOW": True, "CAP": 128, "EVEN": False, "GROUP": t.group,
                         "PARTS": t.parts}, **loose),
                    Job(f"scan_ragged-window-{where}", "encode_ragged", "scan_ragged", _ragged(name),
                        {**ragged, "BATCH": False, "RELU": False, "WRITE": True, "WINDOW": True, "CAP": 128,
                         "EVEN": True}, **loose),
                    Job(f"scan_ragged-batch-{where}", "encode_ragged", "scan_ragged", _ragged(name),
                        {**ragged, "BATCH": True, "RELU": True, "WRITE": True, "WINDOW": False, "CAP": 16,
                         "EVEN": True}, **loose),
                    *(Job(f"count_{what}-{where}", "encode_ragged", "count_scores", _types(name),
                          {**ragged, "SHIFT": shift, "BITS": bits, "EQUAL": what == "equal", "EVEN": True,
                           "BLOCKS": bits <= 8 and arch < 100, "GROUP": t.group, "PARTS": t.parts}, **loose)
                      for what, shift, bits in (("scores", 16, 8), ("last", 0, 16), ("equal", 0, 1))),
                ]  # fmt: skip
                found += [
                    Job(f"gate-norms-aux-{where}", "encode_topk", "gate", _types(name),
                        {**common, "NORMS": True, "SIDE": True, "TMA": False, "AUX": True, "EVEN": False, "CAP": 2048,
                         "AUX_CAP": 4096, "PARTS": t.parts}, **{**options, "hot": False}),
                ]  # fmt: skip
    return found


def _selections() -> list[Job]:
    flags = {"BIAS": True, "NORMS": False, "MASK": False, "MAGNITUDE": False}
    bf16, fp32 = _types("bf16"), _types("fp32")
    return [
        Job("scan_rows-bf16-k64", "select", "scan_rows", bf16,
            {**flags, "BIAS": False, "FRESH": True, "SIDE": True, "ROWS": 1, "BLOCK": 2048, "CAP": 128, "stride_m": 1},
            aligned=("m", "stride_n"), warps=8),
        Job("scan_rows-fp32-k512-later", "select", "scan_rows", {**fp32, "b_ptr": "*bf16"},
            {**flags, "FRESH": False, "SIDE": False, "ROWS": 1, "BLOCK": 2048, "CAP": 1024, "stride_m": 1},
            aligned=("m", "stride_n"), warps=8),
        Job("scan_rows-k4096", "select", "scan_rows", {**fp32, "b_ptr": "*bf16"},
            {**flags, "NORMS": True, "MASK": True, "FRESH": False, "SIDE": True, "ROWS": 1, "BLOCK": 2048, "CAP": 8192,
             "stride_m": 1}, aligned=("m", "stride_n"), warps=16, hot=False),  # spills a little; k is seldom so large
        Job("scan_rows-narrow", "select", "scan_rows", bf16,
            {**flags, "BIAS": False, "FRESH": True, "SIDE": True, "ROWS": 16, "BLOCK": 64, "CAP": 16, "stride_m": 1},
            warps=4),
        Job("make_keys", "select", "make_keys", {**fp32, "b_ptr": "*bf16"},
            {**flags, "SIDE": True, "ROWS": 1, "BLOCK": 2048, "stride_m": 1}, aligned=("m",), warps=4),
        Job("emit_rows-k64", "select", "emit_rows", bf16,
            {"COUNT": True, "SIDE": False, "FILL": False, "RELU": True, "SORTED": False, "ROWS": 16, "BLOCK": 64,
             "CHUNK": 4}, aligned=("stride",)),
        Job("emit_rows-k512-fill", "select", "emit_rows", bf16,
            {"COUNT": True, "SIDE": True, "FILL": True, "RELU": True, "SORTED": False, "ROWS": 2, "BLOCK": 512,
             "CHUNK": 4}, aligned=("stride",)),
        Job("emit_rows-sorted", "select", "emit_rows", bf16,
            {"COUNT": False, "SIDE": True, "FILL": False, "RELU": False, "SORTED": True, "ROWS": 1, "BLOCK": 1024,
             "CHUNK": 4}),
        Job("row_bounds-4096", "encode_topk", "row_bounds", bf16, {"MASK": False, "ROWS": 1, "BLOCK": 4096},
            aligned=("size",), warps=16),
        Job("row_bounds-16384", "encode_topk", "row_bounds", bf16, {"MASK": True, "ROWS": 1, "BLOCK": 16384},
            aligned=("size",), warps=16),
        Job("certify-2048", "encode_topk", "certify", bf16, {"LIMIT": False, "SIDE": False, "ROWS": 1, "CAP": 2048},
            warps=8),
        Job("certify-4096-side", "encode_topk", "certify", bf16, {"LIMIT": True, "SIDE": True, "ROWS": 1, "CAP": 4096},
            warps=16),
        Job("certify-8192", "encode_topk", "certify", bf16, {"LIMIT": True, "SIDE": False, "ROWS": 1, "CAP": 8192},
            warps=16),
        Job("batch_bounds", "encode_batch_topk", "batch_bounds", {**bf16, "row_ptr": "*i64"},
            {"RELU": True, "BM": 128, "BLOCK": 1024}),
        Job("batch_places", "encode_batch_topk", "batch_places", bf16, {"BLOCK": 1024}, aligned=("m",)),
        Job("write_ragged", "encode_ragged", "write_ragged", {**bf16, "limit_ptr": "*fp32"},
            {"WINDOW": False, "CAP": 128, "UNITS": 4, "CHUNK": 4}),
        Job("write_ragged-window", "encode_ragged", "write_ragged", {**bf16, "limit_ptr": "*fp32"},
            {"WINDOW": True, "CAP": 128, "UNITS": 4, "CHUNK": 4}, hot=False),  # 8 bytes of stack on sm_90
        Job("repair_merge-k64", "encode_repair", "repair_merge", bf16,
            {"SIDE": False, "FILL": False, "RELU": True, "BM": 128, "CAP": 512, "SPLITS": 32, "K": 64, "CHUNK": 64},
            warps=8, hot=False),
    ]  # fmt: skip


JOBS = _gemms() + _selections()
