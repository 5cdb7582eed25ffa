# SPDX-License-Identifier: Apache-2.0
"""Read a run directory for the report, and say precisely what is wrong with it where something is."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPTIONAL_FILES = {
    "eval.json": "the held-out measures (FVU, L0, dead latents, densities, language-model loss)",
    "features.json": "the latents and their passages",
}

NUMBER, COUNT, TEXT = "a number", "a whole number >= 0", "a string"
_TESTS = {
    NUMBER: lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    COUNT: lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
    TEXT: lambda v: isinstance(v, str),
}

# A key that ends in "?" may be absent or null; the key `str` stands for any. These four are the whole of what the
# report relies on.
METRICS_ROW = {
    "step": COUNT,
    "tokens": COUNT,
    "seconds": NUMBER,
    "loss": NUMBER,
    "fvu?": NUMBER,
    "l0": NUMBER,
    "dead": COUNT,
    "aux_loss?": NUMBER,
    "lr": NUMBER,
    "tokens_per_s": NUMBER,
    "k?": COUNT,
    "grad_norm?": NUMBER,
    "wait?": NUMBER,
    "dropped?": COUNT,
}
EVAL = {
    "tokens": COUNT,
    "fvu": NUMBER,
    "explained_variance": NUMBER,
    "l0": NUMBER,
    "dead_latents": COUNT,
    "latents": COUNT,
    "cosine?": NUMBER,
    "l2_ratio?": NUMBER,
    "relative_bias?": NUMBER,
    "density": [NUMBER],
    "loss?": {
        "original": NUMBER, "patched": NUMBER, "mean_ablated": NUMBER, "loss_recovered?": NUMBER, "tokens": COUNT,
    },
    "kl?": {"patched": NUMBER, "mean_ablated": NUMBER, "kl_recovered?": NUMBER},
    "no_loss?": TEXT,
    "dropped?": {str: COUNT},
    "source?": {"model": TEXT, "module": TEXT, "text": TEXT, "passages?": TEXT, "effects?": TEXT},
}  # fmt: skip
FEATURES = [
    {
        "latent": COUNT,
        "density": NUMBER,
        "max_value": NUMBER,
        "promoted?": [TEXT],
        "suppressed?": [TEXT],
        "promoted_values?": [NUMBER],
        "suppressed_values?": [NUMBER],
        "nearest?": [{"latent": COUNT, "cosine": NUMBER}],
        "layer?": {"index": COUNT, "module": TEXT, "latent": COUNT},
        "histogram?": {"width": NUMBER, "counts": [COUNT]},
        "passages": [{"tokens": [TEXT], "values": [NUMBER], "peak": COUNT}],
    }
]
BENCH = {
    "rows": [
        {
            "op": TEXT,
            "name": TEXT,
            "shape": {"n?": COUNT, "d?": COUNT, "m?": COUNT, "k?": COUNT},
            "dtype": TEXT,
            "p20_ms": NUMBER,
            "p50_ms": NUMBER,
            "p80_ms": NUMBER,
            "peak_bytes?": NUMBER,
        }
    ]
}


class RunDirError(ValueError):
    """A file of a run directory does not hold what the schema asks for; the message names file and field."""


@dataclass(frozen=True)
class RunData:
    """What a run directory holds. `evaluation`, `features`, `bench` are None where their file is missing."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    features: list[dict[str, Any]] | None
    bench: dict[str, Any] | None

    @property
    def missing(self) -> list[tuple[str, str]]:
        """(file name, what it would have held) for each optional file that is not there. bench.json is none of them:
        a run is complete without a benchmark."""
        parts = (self.evaluation, self.features)
        return [item for item, part in zip(OPTIONAL_FILES.items(), parts, strict=True) if part is None]


def read_run(run_dir: str | Path) -> RunData:
    """Read and check every file of a run directory that the report shows.

    Raises:
        FileNotFoundError: `run_dir`, its config.json or its metrics.jsonl is not there.
        RunDirError: a file is not JSON or breaks the schema.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise FileNotFoundError(f"run_dir must be the directory of a run, got {str(path)!r}: no such directory")
    for name in ("config.json", "metrics.jsonl"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no {name}: is it the directory that the training run wrote?")
    config = _load(path / "config.json")
    if not isinstance(config, dict):
        raise _wrong("config.json", "", "an object", config)
    return RunData(path, config, _metrics(path / "metrics.jsonl"), _evaluation(path), _features(path), _bench(path))


def find(config: dict[str, Any], *names: str) -> Any:
    """The first plain value under one of `names` anywhere in a nested config, outer levels first; None if absent."""
    level = [config]
    while level:
        for name in names:
            for mapping in level:
                if name in mapping and not isinstance(mapping[name], (dict, list)) and mapping[name] is not None:
                    return mapping[name]
        level = [v for mapping in level for v in mapping.values() if isinstance(v, dict)]
    return None


def _metrics(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"metrics.jsonl line {number}"
        row = _parse(line, where)
        _check(row, METRICS_ROW, where)
        rows.append(row)
    if not rows:
        raise RunDirError("metrics.jsonl must hold at least one logged step, got none: train first")
    return rows


def _evaluation(path: Path) -> dict[str, Any] | None:
    value = _optional(path, "eval.json", EVAL)
    if value is not None and len(value["density"]) != value["latents"]:
        raise RunDirError(
            f"eval.json: field 'density' must hold one share per latent ({value['latents']}), "
            f"got {len(value['density'])}; evaluate the run again"
        )
    return value


def _features(path: Path) -> list[dict[str, Any]] | None:
    value = _optional(path, "features.json", FEATURES)
    for i, latent in enumerate(value or ()):
        for j, passage in enumerate(latent["passages"]):
            at, tokens = f"[{i}].passages[{j}]", len(passage["tokens"])
            if len(passage["values"]) != tokens:
                raise RunDirError(
                    f"features.json: field '{at}.values' must hold one value per token ({tokens}), "
                    f"got {len(passage['values'])}"
                )
            if passage["peak"] >= tokens:
                raise RunDirError(
                    f"features.json: field '{at}.peak' must be a position in 0..{tokens - 1}, got {passage['peak']}"
                )
    return value


def _bench(path: Path) -> dict[str, Any] | None:
    return _optional(path, "bench.json", BENCH)


def _optional(path: Path, name: str, spec: Any) -> Any:
    if not (path / name).is_file():
        return None
    value = _load(path / name)
    _check(value, spec, name)
    return value


def _load(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunDirError(f"{file.name} must be UTF-8 text, got byte {error.start} that is not") from error
    return _parse(text, file.name)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RunDirError(f"{where} is not valid JSON: {error} (was its writing cut short?)") from error


def _check(value: Any, spec: Any, where: str, field: str = "") -> None:
    """Raise RunDirError unless `value` has the form of `spec`: a dict of fields, a one-item list, or a kind."""
    if isinstance(spec, dict):
        if not isinstance(value, dict):
            raise _wrong(where, field, "an object", value)
        if str in spec:
            spec = dict.fromkeys(value, spec[str])
        for key, inner in spec.items():
            name = key.rstrip("?")
            if key.endswith("?") and value.get(name) is None:
                continue
            full = f"{field}.{name}" if field else name
            if name not in value:
                has = ", ".join(map(repr, value)) or "nothing"
                raise RunDirError(f"{where}: field '{full}' is missing; there is: {has}")
            _check(value[name], inner, where, full)
    elif isinstance(spec, list):
        if not isinstance(value, list):
            raise _wrong(where, field, "a list", value)
        for i, item in enumerate(value):
            _check(item, spec[0], where, f"{field}[{i}]")
    elif not _TESTS[spec](value):
        raise _wrong(where, field, spec, value)


def _wrong(where: str, field: str, wanted: str, got: Any) -> RunDirError:
    shown = re.sub(r"\s+", " ", json.dumps(got))
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    subject = f"field '{field}'" if field else "the top level"
    return RunDirError(f"{where}: {subject} must be {wanted}, got {shown}")
