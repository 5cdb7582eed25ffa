# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about one training run."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from statistics import median
from typing import Any

from .report_data import RunData, RunDirError, find, read_run
from .report_numbers import big, count, duration, milliseconds, percent, sig, size

__all__ = ["RunDirError", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run as one HTML file that needs no network and opens from disk.

    Reads config.json and metrics.jsonl, and eval.json, features.json and bench.json where they exist; the page says
    where one of the first two is missing. Losses are in nats per token, times in milliseconds, densities are shares of
    held-out tokens.

    Args:
        run_dir: the directory that training and evaluation wrote.
        out: the file to write; `run_dir/report.html` if None.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: `run_dir`, its config.json, its metrics.jsonl or the folder of `out` does not exist.
        RunDirError: a file is malformed; the message names the file and the field.
        ImportError: jinja2 or matplotlib is not installed.
    """
    run = read_run(run_dir)
    out = run.path / "report.html" if out is None else Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out must lie in an existing folder, got {str(out)!r}: create {out.parent} first")
    # A token may hold half of a surrogate pair, which UTF-8 cannot carry.
    out.write_bytes(re.sub("[\ud800-\udfff]", "\ufffd", render(run)).encode("utf-8"))
    return out


def render(run: RunData) -> str:
    """The page as text."""
    try:
        import matplotlib  # noqa: F401  (the figures need it; said here, before any of the page is made)
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(f"a report needs jinja2 and matplotlib ({error}): pip install 'fusae[report]'") from error

    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    env.filters |= {"count": count, "sig": sig, "ms": milliseconds, "big": big, "bytes": size, "pct": percent}
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return env.get_template("report.html").render(
        script=script,
        script_hash=digest,
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        missing=dict(run.missing),
        measured=run.bench is not None,
        facts=_facts(run),
        tiles=_tiles(run),
        curves=_curves(run),
        lm=_lm(run),
        density=_density(run),
        latents=[_latent(f) for f in run.features or ()],
        shown={f["latent"] for f in run.features or ()},
        bench=_bench(run),
        config=_flatten({k: v for k, v in run.config.items() if k != "versions"}),
        versions=_flatten(run.config["versions"]) if isinstance(run.config.get("versions"), dict) else [],
        evaluation=run.evaluation,
        has_features=run.features is not None,
    )


# ---- parts of the page -----------------------------------------------------------------------------------------------


def _facts(run: RunData) -> dict[str, Any]:
    source = (run.evaluation or {}).get("source") or {}
    config, last = run.config, run.metrics[-1]
    rows = find(config, "rows")
    return {
        "model": source.get("model") or find(config, "model"),
        "module": source.get("module") or find(config, "module", "hook_name", "layer"),
        "text": source.get("text") or find(config, "text", "dataset", "corpus"),
        "passages": source.get("passages"),
        "effects": source.get("effects"),
        "m": (run.evaluation or {}).get("latents") or find(config, "m", "latents", "n_latents", "d_sae"),
        "k": find(config, "k"),
        "d": find(config, "d", "d_in", "width", "d_model"),
        "tokens": last["tokens"],
        "passes": last["tokens"] / rows if isinstance(rows, int) and 0 < rows < last["tokens"] else None,
        "rows": rows,
        "steps": last["step"],
        "time": duration(last["seconds"]),
        "dropped": last.get("dropped") or 0,
    }


def _tiles(run: RunData) -> list[dict[str, str]]:
    """The five key figures; without eval.json the training batches stand in, and the tile says so."""
    rows, ev = run.metrics, run.evaluation
    tail = rows[-max(1, len(rows) // 10) :]
    m = _facts(run)["m"]
    stand_in = "last training batches"
    fvu = ev["fvu"] if ev else median([r["fvu"] for r in tail if r.get("fvu") is not None] or [math.nan])
    l0 = ev["l0"] if ev else median(r["l0"] for r in tail)
    dead = ev["dead_latents"] if ev else rows[-1]["dead"]
    loss = ev and ev.get("loss")
    where = f"held out, {big(ev['tokens'])} tokens" if ev else stand_in
    return [
        {"name": "FVU", "value": sig(fvu), "note": where, "title": "fraction of variance unexplained"},
        {
            "name": "Loss recovered",
            "value": percent(_or_nan(loss.get("loss_recovered"))) if loss else "–",
            "note": f"{big(loss['tokens'])} tokens" if loss else "not measured",
            "title": "share of the loss gap between mean-ablated and original that the reconstruction closes",
        },
        {
            "name": "L0",
            "value": sig(l0),
            "note": "active latents a token" if ev else stand_in,
            "title": "mean number of active latents a token",
        },
        {
            "name": "Dead latents",
            "value": count(dead),
            "note": f"{percent(dead / m)} of {count(m)}" if m else where,
            "title": "latents that never fired on the held-out tokens" if ev else "dead latents at the last step",
        },
        {
            "name": "Tokens / s",
            "value": big(median(r["tokens_per_s"] for r in rows)),
            "note": "training, median",
            "title": "training throughput, median over the logged steps",
        },
    ]


def _curves(run: RunData) -> list[dict[str, Any]]:
    from .report_figures import curve, learning_rate

    rows = run.metrics
    names = ("tokens", "loss", "fvu", "l0", "dead", "lr", "tokens_per_s", "k", "grad_norm", "wait")
    column = {name: [_or_nan(row.get(name)) for row in rows] for name in names}
    tokens = column["tokens"]
    k = _facts(run)["k"]
    annealed = len({value for value in column["k"] if not math.isnan(value)}) > 1
    held_out = run.evaluation and (run.evaluation["fvu"], f"held out {sig(run.evaluation['fvu'])}")
    aux = [_or_nan(row.get("aux_loss")) for row in rows]
    second = None if all(map(math.isnan, aux)) else ("loss", "AuxK loss", aux)
    panels = [
        {
            "title": "FVU",
            "svg": curve(
                "fvu",
                "FVU against training tokens",
                tokens,
                column["fvu"],
                "FVU (fraction)",
                smooth=True,
                reference=held_out or None,
            ),
            "caption": "Fraction of variance unexplained of each batch (thin) and its running median (bold)"
            + ("; dashed: held out." if held_out else "."),
        },
        {
            "title": "Loss",
            "svg": curve(
                "loss",
                "Loss against training tokens",
                tokens,
                column["loss"],
                "training loss",
                smooth=True,
                second=second,
            ),
            "caption": "The training objective as logged"
            + (", with its AuxK term." if second else "; no AuxK term was logged."),
        },
        {
            "title": "L0",
            "svg": curve(
                "l0",
                "L0 against training tokens",
                tokens,
                column["l0"],
                "active latents a token",
                zero=True,
                reference=(k, f"k = {k}") if isinstance(k, int) and not annealed else None,
                second=("L0", "k", column["k"]) if annealed else None,
            ),
            "caption": "Mean number of active latents a token; it falls below k where fewer are positive.",
        },
        {
            "title": "Dead latents",
            "svg": curve("dead", "Dead latents against training tokens", tokens, column["dead"], "latents", zero=True),
            "caption": "Latents that have not fired for the dead-latent window of the configuration.",
        },
        {
            "title": "Learning rate",
            "svg": learning_rate(tokens, column["lr"]),
            "caption": "The schedule as applied at each logged step.",
        },
        {
            "title": "Throughput",
            "svg": curve(
                "throughput",
                "Tokens per second against training tokens",
                tokens,
                column["tokens_per_s"],
                "tokens / s",
                smooth=True,
                zero=True,
            ),
            "caption": "Training tokens per second at each logged step (thin) and its running median (bold).",
        },
    ]
    if not all(map(math.isnan, column["wait"])):
        svg = curve(
            "wait", "Share of the time spent waiting for data", tokens, [100 * v for v in column["wait"]],
            "% of the time", smooth=True, zero=True,
        )  # fmt: skip
        panels.append({"title": "Waiting for data", "svg": svg, "caption": "Share of the time without a batch ready."})
    if not all(map(math.isnan, column["grad_norm"])):
        svg = curve("grad", "Gradient norm against training tokens", tokens, column["grad_norm"], "norm", smooth=True)
        caption = "Joint norm of all gradients before clipping, mean since the last logged step."
        panels.append({"title": "Gradient norm", "svg": svg, "caption": caption})
    return panels


def _or_nan(value: Any) -> float:
    return math.nan if value is None else value


def _lm(run: RunData) -> dict[str, Any] | None:
    loss = run.evaluation and run.evaluation.get("loss")
    if not loss:
        return None
    names = [
        ("original", "Original", "The language model as it is."),
        ("patched", "Patched", "The module’s activations replaced by the dictionary’s reconstruction of them."),
        ("mean_ablated", "Mean-ablated", "The module’s activations replaced by their mean over tokens."),
    ]
    gap = loss["mean_ablated"] - loss["original"]
    rows = [
        {
            "key": key,
            "name": name,
            "loss": loss[key],
            "meaning": meaning,
            "delta": loss[key] - loss["original"],
            "perplexity": math.exp(loss[key]) if loss[key] < 700 else math.inf,
            "at": min(1.0, max(0.0, (loss[key] - loss["original"]) / gap)) if gap > 0 else None,
        }
        for key, name, meaning in names
    ]
    return {
        "rows": rows,
        "recovered": _or_nan(loss.get("loss_recovered")),
        "kl": _kl(run),
        "tokens": loss["tokens"],
        "scale": gap > 0,
        "sinks": bool(loss.get("passed_through") or run.evaluation.get("dropped")),
    }


def _kl(run: RunData) -> dict[str, Any] | None:
    kl = run.evaluation.get("kl")
    return kl and kl | {"kl_recovered": _or_nan(kl.get("kl_recovered"))}


def _density(run: RunData) -> dict[str, Any] | None:
    if run.evaluation is None:
        return None
    from .report_figures import density_histogram

    ev = run.evaluation
    m, density = ev["latents"], sorted(ev["density"])
    live = [v for v in density if v > 0]
    quantile = (lambda q: live[min(len(live) - 1, int(q * len(live)))]) if live else None
    table = [("never active", count(m - len(live)), percent((m - len(live)) / m) if m else "–")]
    if live:
        over = sum(v > 0.1 for v in live)
        table += [
            (f"{name} of the live", f"{quantile(q):.2g}", f"1 in {count(1 / quantile(q))}")
            for name, q in (("10th percentile", 0.1), ("median", 0.5), ("90th percentile", 0.9))
        ]
        table += [
            ("densest", f"{live[-1]:.2g}", f"1 in {sig(1 / live[-1], 2)}"),
            ("active on over 10 %", count(over), percent(over / m)),
        ]
        rare = sum(v < 1e-5 for v in live)
        table.append(("rarer than 1 in 100,000", count(rare), percent(rare / m)))
    shown = [f["density"] for f in run.features or ()]
    return {
        "svg": density_histogram(density, ev["l0"] / m if m else 0, shown),
        "table": table,
        "tokens": ev["tokens"],
        "shown": bool(shown),
    }


def _latent(feature: dict[str, Any]) -> dict[str, Any]:
    from .report_figures import activation_bars
    from .report_tokens import chips, passage

    top = feature["max_value"]
    passages = [
        {"peak": sig(p["values"][p["peak"]]), "html": passage(p["tokens"], p["values"], p["peak"], top)}
        for p in feature["passages"]
    ]
    return {
        "index": feature["latent"],
        "layer": feature.get("layer"),
        "density": feature["density"],
        "max": top,
        "passages": passages,
        "promoted": chips(feature.get("promoted") or ()),
        "suppressed": chips(feature.get("suppressed") or ()),
        "nearest": feature.get("nearest") or (),
        "histogram": activation_bars(feature["latent"], **feature["histogram"]) if feature.get("histogram") else None,
        "logits": feature.get("promoted") is not None or feature.get("suppressed") is not None,
    }


def _bench(run: RunData) -> list[dict[str, Any]]:
    """One chart and table for each (op, shape, dtype), the training step first; ratios are to its fusae row."""
    from .report_figures import bars

    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in (run.bench or {"rows": []})["rows"]:
        shape = ", ".join(f"{key} {count(row['shape'][key])}" for key in "ndmk" if row["shape"].get(key) is not None)
        groups.setdefault((row["op"] != "train_step", row["op"], shape, row["dtype"]), []).append(row)
    result = []
    for number, ((_, op, shape, dtype), rows) in enumerate(sorted(groups.items(), key=lambda g: g[0][0])):
        base = next((r for r in rows if r["name"].lower() == "fusae"), None) or next(
            (r for r in rows if r["name"].lower().startswith("fusae")), None
        )
        table = [
            {
                "name": r["name"],
                "p20": r["p20_ms"],
                "p50": r["p50_ms"],
                "p80": r["p80_ms"],
                "ours": r is base,
                "ratio": r["p50_ms"] / base["p50_ms"] if base and base["p50_ms"] > 0 else None,
                "peak": r.get("peak_bytes"),
            }
            for r in rows
        ]
        drawn = [
            (
                r["name"],
                r["p20"],
                r["p50"],
                r["p80"],
                f"{milliseconds(r['p50'])} ms" + (f" · {sig(r['ratio'], 2)}×" if r["ratio"] and not r["ours"] else ""),
                r["ours"],
            )
            for r in table
        ]
        title = "Training step" if op == "train_step" else op
        result.append(
            {
                "title": title,
                "shape": shape,
                "dtype": dtype,
                "rows": table,
                "base": base and base["name"],
                "svg": bars(f"bench{number}", f"{title}: milliseconds, median", drawn),
            }
        )
    return result


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested config → (dotted name, value as JSON) in the file's order."""
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flatten(inner, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
