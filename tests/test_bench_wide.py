# SPDX-License-Identifier: Apache-2.0
"""benchmarks/wide.py: what it measures and writes. Nothing here looks at speed."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy
import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@pytest.fixture(scope="module")
def wide():
    spec = importlib.util.spec_from_file_location("benchmarks_wide", ROOT / "benchmarks" / "wide.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_results_of_all_commands_become_a_page(wide, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(wide, "child", lambda arguments: wide.measure(**arguments))
    monkeypatch.setattr(wide, "OPTIMISER_BAR", 0.0)
    monkeypatch.setattr(wide, "QUALITY_BAR", 1e9)
    monkeypatch.setattr(wide, "BARS", dict.fromkeys(wide.BARS, 1e9))
    numpy.save(tmp_path / "rows.npy", numpy.random.default_rng(0).normal(size=(640, 12)).astype("float32"))
    out, page = tmp_path / "wide.json", tmp_path / "wide.md"
    page.write_text(f"before\n{wide.START}\nold\n{wide.END}\nafter\n")
    small = ["--threads", threads, "--out", out]
    shape = ["--d", 12, "--k", 3, "--n", 32, "--rounds", 1]
    commands = [
        ["train", "--m", 128, *shape],
        ["growth", *shape, "--first", 6, "--last", 7],
        ["optimiser", "--m", 512, "--d", 12, "--k", 3, "--n", 8, "--rounds", 1],
        ["quality", tmp_path / "rows.npy", "--m", 32, "--k", 3, "--n", 32, "--tokens", 256, "--seeds", 1],
    ]
    for command in commands:
        done = CliRunner().invoke(wide.app, [str(a) for a in (*command, *small)])
        assert done.exit_code == 0, (command, done.output, done.exception)
        assert "MISSED" not in done.output
    found = json.loads(out.read_text())
    assert set(found) == {"train", "growth", "optimiser", "quality"}
    assert set(found["train"]["peak"]) == {"init", "train", "checkpoint", "resume", "last step and save", "load"}
    assert [r["m"] for r in found["growth"]["results"]] == [64, 128]
    assert CliRunner().invoke(wide.app, ["page", str(out), "--page", str(page)]).exit_code == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{wide.END}\nafter\n") and "old" not in text
    assert text.count("commit ") == 4 and (tmp_path / "wide.svg").exists()


def test_a_missed_bar_is_said_and_fails(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(wide, "OPTIMISER_BAR", 1e9)
    arguments = ["optimiser", "--m", "64", "--d", "4", "--k", "2", "--n", "4", "--rounds", "1", "--threads",
                 str(torch.get_num_threads()), "--out", str(tmp_path / "x.json")]  # fmt: skip
    done = CliRunner().invoke(wide.app, arguments)
    assert done.exit_code == 1 and "MISSED" in done.output and (tmp_path / "x.json").exists()


def test_the_page_in_the_docs_has_its_marks(wide):
    text = (ROOT / "docs" / "wide.md").read_text(encoding="utf-8")
    assert text.count(wide.START) == text.count(wide.END) == 1
