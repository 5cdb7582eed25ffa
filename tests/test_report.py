# SPDX-License-Identifier: Apache-2.0
"""The HTML report: complete, honest about missing parts, safe against hostile tokens, and alive in a real browser."""

from __future__ import annotations

import copy
import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="the report needs fusae[report]")
pytest.importorskip("matplotlib", reason="the report needs fusae[report]")

from fusae.eval.report import RunDirError, write_report  # noqa: E402
from fusae.eval.report_numbers import big, duration, percent, sig, size  # noqa: E402
from fusae.testing.sample_run import HOSTILE, K, M, contents, write_run  # noqa: E402

CURVES = ("fvu", "loss", "l0", "dead", "lr", "throughput", "wait")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("whole") / "run", contents()))


@pytest.fixture(scope="module")
def source(page) -> str:
    return page.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """(tag, attributes) of every element, as a parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


# ---- a complete run --------------------------------------------------------------------------------------------------


def test_default_and_given_path(tmp_path, page):
    assert page.name == "report.html" and page.parent.name == "run"
    run = write_run(tmp_path / "run", contents())
    out = tmp_path / "elsewhere.html"
    assert write_report(str(run), str(out)) == out and out.is_file() and not (run / "report.html").exists()


def test_every_figure_with_labelled_axes_and_a_caption(source):
    figures = dict(
        re.findall(r'<figure>(?:(?!</figure>).)*?data-figure="(\w+)"((?:(?!</figure>).)*)</figure>', source, re.S)
    )
    assert set(figures) == {*CURVES, "density", "bench0", "bench1"}
    for name, body in figures.items():
        assert re.search(r"<figcaption>[^<]{20,}</figcaption>", body), name
        label = {"density": "log₁₀ density", "bench0": "milliseconds", "bench1": "milliseconds"}.get(
            name, "training tokens"
        )
        assert label in body, name
    for title in ("held out 0.247", "AuxK loss", "k = 4", "learning rate (× 10⁻³)"):
        assert title in source


def test_key_figures_and_tables(source):
    text = html.unescape(re.sub(r"<[^>]+>", " ", source)).replace("\u202f", " ")
    text = re.sub(r"\s+", " ", text)
    wanted = """
        tiny-lm | model.layers.1 | a book | 1,638,400 | FVU 0.247 | Loss recovered 94.0 % | L0 3.97
        Dead latents 2 3.12 % of 64 | Original 3.000 | Patched 3.300 +0.300 | Mean-ablated 8.000 +5.000
        plain torch 51.0 52.5 55.0 5.25 not measured | fusae 9.50 10.0 11.0 1.00 3.00 MiB | coder.k 4
        fusae 0.0.test | torch 2.13.0 | n 4,096, d 16, m 64, k 4, float32 | max 7.25
        KL, patched 0.310 | KL recovered 93.7 % | Length ratio 0.9510 | Relative bias 0.9870 | norm outliers 3
        nearest 41 0.51 , 9 0.25 | activations, 0 to 7.25 | rarer than 1 in 100,000 0
    """
    phrases = [phrase.strip() for phrase in re.split(r"[|\n]", wanted) if phrase.strip()]
    assert len(phrases) == 26 and [phrase for phrase in phrases if phrase not in text] == []


def test_parts_of_longer_runs(tmp_path):
    """k annealed, gradients clipped, rows dropped, an FVU of a batch without variance; no head, and why."""
    files = contents()
    for i, row in enumerate(files["metrics.jsonl"]):
        row |= {"k": max(K, 20 - i), "grad_norm": 0.5 + i, "dropped": 7 * i, "fvu": None if i == 3 else 0.3}
    del files["eval.json"]["loss"], files["eval.json"]["kl"]
    files["eval.json"]["no_loss"] = "BertModel is no causal language model"
    source = write_report(write_run(tmp_path / "run", files)).read_text(encoding="utf-8")
    for name in (*CURVES, "grad"):
        assert f'data-figure="{name}"' in source
    l0 = re.search(r'data-figure="l0".*?</svg>', source, re.S).group(0)
    assert ">k<" in l0 and ">L0<" in l0 and "k = 4" not in l0
    assert "Rows left out as not finite" in source and ">273<" in source
    assert "No language-model loss:</strong> BertModel is no causal language model." in source


def test_the_activation_histogram(source):
    path = re.search(r'aria-label="activations of latent 3, 0 to 2.88".*? d="([^"]*)"', source).group(1)
    bars = re.findall(r"M([\d.]+) 40v-([\d.]+)", path)
    assert [float(x) for x, _ in bars] == pytest.approx([200 * i / 23 for i in (20, 21, 22)], abs=0.06)
    assert [float(h) for _, h in bars] == pytest.approx([40, 40 * 2 / 3, 40 / 3], abs=0.06)
    assert '<a href="#latent-41">41</a>' in source and 'href="#latent-9"' not in source


def test_latents_of_layers_are_named_by_their_layer(tmp_path, source):
    assert "its latent" not in source
    files = contents()
    files["features.json"][1]["layer"] = {"index": 2, "module": "model.layers.7.mlp:in <b>", "latent": 9}
    text = write_report(write_run(tmp_path / "run", files)).read_text(encoding="utf-8")
    latent = text[text.index('id="latent-41"') :]
    assert "<span>layer 2</span> model.layers.7.mlp:in &lt;b&gt; <small>its latent 9</small>" in latent
    assert text.count("its latent") == 1
    files["features.json"][1]["layer"] = {"index": 2, "latent": 9}
    with pytest.raises(RunDirError, match=r"features.json: field '\[1\].layer.module' is missing"):
        write_report(write_run(tmp_path / "other", files))


def test_two_hundred_latents_stay_small(tmp_path):
    files = contents()
    one = files["features.json"][0]
    words = [f" word{i}" for i in range(33)]
    one["passages"] = [{"tokens": words, "values": [i / 3 for i in range(33)], "peak": 32}] * 8
    files["features.json"] = [one | {"latent": i} for i in range(200)]
    assert write_report(write_run(tmp_path / "run", files)).stat().st_size < 20e6


def test_is_self_contained_and_without_clashing_ids(source):
    for tag, attrs in Elements(source).found:
        assert tag not in {"link", "img", "iframe", "object", "embed"}
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#"), attrs
    assert not re.search(r"url\((?!#)|@import|@font-face", source)
    ids = re.findall(r'\sid="([^"]*)"', source)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', source))
    assert {a or b for a, b in used} <= set(ids)


def test_figures_take_their_colours_from_the_page(source):
    for svg in re.findall(r"<svg.*?</svg>", source, re.S):
        assert not re.search(r"#[0-9a-fA-F]{6}\b", svg)
        assert "var(--" in svg and "font-family" not in svg


def test_tokens_are_shaded_by_share_of_the_maximum(source):
    river = re.search(r'<span class="t on peak" style="--a:1" title="7.25 [^"]*"> river</span>', source)
    rose = re.search(r'<span class="t on" style="--a:0.483" title="3.50 [^"]*"> rose</span>', source)
    assert river and rose
    assert '<span class="t" title="0">The</span>' in source
    assert (
        source.count('<s class="nl">\n</s>') == 2
        and '<s class="tab">\t</s>' in source
        and '<s class="sp">    </s>' in source
    )
    assert "logit effects not computed" in source  # latent 41 has none


def test_hostile_tokens_stay_text(source):
    elements = Elements(source).found
    assert [tag for tag, _ in elements].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in elements for name in attrs)
    assert html.escape(HOSTILE[0], quote=False) in source.replace("&#34;", '"')
    assert "{{ 7 * 7 }}" in source and ">49<" not in source
    assert "&amp;lt;" in source
    assert "\x00" not in source and "\u2400" in source and "\u241b" in source
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", source)


def test_the_same_run_gives_the_same_bytes(tmp_path, page):
    again = write_report(write_run(tmp_path / "run", contents()))
    assert again.read_bytes() == page.read_bytes()


# ---- missing and malformed parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing", [{"eval.json"}, {"features.json"}, {"bench.json"}, {"eval.json", "features.json", "bench.json"}]
)
def test_a_missing_part_is_named(tmp_path, missing):
    files = {k: v for k, v in contents().items() if k not in missing}
    source = write_report(write_run(tmp_path / "run", files)).read_text(encoding="utf-8")
    for name in ("eval.json", "features.json"):
        assert (f"{name} is missing from this run directory" in source) == (name in missing)
    # A run without a benchmark is a whole run.
    assert ("Incomplete run" in source) == bool(missing - {"bench.json"}) and "bench.json" not in source
    assert ("The measured training step" in source) == ("bench.json" not in missing)
    assert all(f'data-figure="{name}"' in source for name in CURVES)
    if "eval.json" in missing:
        assert "last training batches" in source and "not measured" in source


@pytest.mark.parametrize("field", ["loss", "source", "dropped"])
def test_optional_fields_of_eval(tmp_path, field):
    files = contents()
    del files["eval.json"][field]
    source = write_report(write_run(tmp_path / "run", files)).read_text(encoding="utf-8")
    assert ("eval.json holds no field “loss”" in source) == (field == "loss")
    assert "tiny-lm" in source


def change(files: dict, path: list, value) -> None:
    target = files
    for key in path[:-1]:
        target = target[key]
    if value is KeyError:
        del target[path[-1]]
    else:
        target[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["eval.json", "fvu"], KeyError, "eval.json: field 'fvu' is missing"),
        (["eval.json", "loss", "patched"], "low", "eval.json: field 'loss.patched' must be a number, got \"low\""),
        (["eval.json", "density", 5], None, "eval.json: field 'density[5]' must be a number, got null"),
        (["eval.json", "density"], [0.1], "eval.json: field 'density' must hold one share per latent (64), got 1"),
        (["eval.json", "dead_latents"], True, "eval.json: field 'dead_latents' must be a whole number >= 0, got true"),
        (["eval.json"], [], "eval.json: the top level must be an object, got []"),
        (["metrics.jsonl", 3, "lr"], KeyError, "metrics.jsonl line 4: field 'lr' is missing"),
        (["metrics.jsonl", 0, "dead"], -1, "metrics.jsonl line 1: field 'dead' must be a whole number >= 0, got -1"),
        (["metrics.jsonl"], [], "metrics.jsonl must hold at least one logged step"),
        (
            ["features.json", 0, "passages", 1, "values"],
            [1.0],
            "features.json: field '[0].passages[1].values' must hold one",
        ),
        (
            ["features.json", 0, "passages", 1, "peak"],
            3,
            "features.json: field '[0].passages[1].peak' must be a position in 0..2",
        ),
        (
            ["features.json", 1, "passages", 0, "tokens", 2],
            7,
            "field '[1].passages[0].tokens[2]' must be a string, got 7",
        ),
        (["features.json", 0, "nearest", 0, "cosine"], "near", "field '[0].nearest[0].cosine' must be a number"),
        (["features.json", 0, "histogram", "counts", 2], -1, "field '[0].histogram.counts[2]' must be a whole number"),
        (["eval.json", "dropped", "special"], "no", "eval.json: field 'dropped.special' must be a whole number >= 0"),
        (["eval.json", "kl", "patched"], KeyError, "eval.json: field 'kl.patched' is missing"),
        (["metrics.jsonl", 2, "wait"], "long", "metrics.jsonl line 3: field 'wait' must be a number"),
        (["bench.json", "rows", 1, "p50_ms"], KeyError, "bench.json: field 'rows[1].p50_ms' is missing"),
        (["config.json"], "text", "config.json: the top level must be an object"),
    ],
)
def test_a_malformed_file_names_file_and_field(tmp_path, path, value, message):
    files = copy.deepcopy(contents())
    change(files, path, value)
    with pytest.raises(RunDirError, match=re.escape(message)):
        write_report(write_run(tmp_path / "run", files))
    assert not (tmp_path / "run" / "report.html").exists()


def test_truncated_files(tmp_path):
    run = write_run(tmp_path / "run", contents())
    whole = (run / "eval.json").read_bytes()
    (run / "eval.json").write_bytes(whole[:100])
    with pytest.raises(RunDirError, match="eval.json is not valid JSON"):
        write_report(run)
    (run / "eval.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RunDirError, match="eval.json must be UTF-8 text, got byte 0"):
        write_report(run)
    (run / "eval.json").write_bytes(whole)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 9')
    with pytest.raises(RunDirError, match="metrics.jsonl line 41 is not valid JSON"):
        write_report(run)


def test_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run_dir must be the directory"):
        write_report(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        write_report(tmp_path)
    run = write_run(tmp_path / "run", contents())
    with pytest.raises(FileNotFoundError, match="out must lie in an existing folder"):
        write_report(run, tmp_path / "no" / "report.html")


def test_degenerate_runs_still_make_a_page(tmp_path):
    files = contents()
    files["metrics.jsonl"] = [files["metrics.jsonl"][0] | {"loss": math.nan, "fvu": math.inf, "lr": 0.0}]
    files["eval.json"] |= {"density": [0.0] * M, "dead_latents": M, "l0": 0.0, "fvu": math.nan}
    files["eval.json"]["loss"] |= {"original": 3.0, "mean_ablated": 3.0, "loss_recovered": math.nan}
    files["features.json"] = []
    files["bench.json"] = {"rows": []}
    files["config.json"] = {}
    source = write_report(write_run(tmp_path / "run", files)).read_text(encoding="utf-8")
    for wanted in (
        "no latent fired",
        "features.json lists no latents",
        "bench.json lists no rows",
        "NaN",
        "not recorded",
        "config.json holds no field “versions”",
    ):
        assert wanted in source, wanted


# fmt: off
@pytest.mark.parametrize(("function", "value", "text"), [
    (sig, 0.23812, "0.238"), (sig, 1492.7, "1,493"), (sig, 0.0000123, "1.23e−5"), (sig, 0, "0"), (sig, 9.999, "10.0"),
    (sig, math.nan, "NaN"), (sig, -math.inf, "−∞"), (big, 4_915_200, "4.92 M"), (big, 14472.3, "14,472"),
    (percent, 0.0173, "1.73 %"), (percent, 0.00012, "0.012 %"), (size, 1.31 * 2**30, "1.31 GiB"),
    (duration, 336.4, "5 min 36 s"), (duration, 7322, "2 h 2 min"), (duration, 0.2, "0 s"),
])
# fmt: on
def test_numbers(function, value, text):
    assert function(value).replace("\u202f", " ") == text
