# SPDX-License-Identifier: Apache-2.0
"""What the README shows runs as it stands."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fusae
from fusae.cli import app
from fusae.testing import tiny_lm

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_example():
    code, *_ = blocks("python")
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    codes, y = scope["codes"], scope["y"]
    assert codes.values.shape == codes.indices.shape == (4096, 32) and y.shape == (4096, 576)
    pre = scope["x"][:8] @ scope["W_enc"].T
    torch.testing.assert_close(codes.values[:8], pre.topk(32).values.relu(), rtol=1e-5, atol=1e-5)


def test_hook_example():
    pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
    _, code, *_ = blocks("python")
    model, ids = tiny_lm.llama(layers=12), torch.arange(1, 9)[None]
    plain = model(ids).logits
    coder = fusae.nn.SparseCoder(fusae.nn.SparseCoderConfig(d=tiny_lm.D, m=64, k=4))
    scope = {"fusae": fusae, "model": model, "coder": coder, "ids": ids}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["h"].codes.values.shape == (1, 8, 4)
    assert not scope["logits"].equal(plain) and model(ids).logits.equal(plain)


def test_accelerate_example(monkeypatch):
    """With a stand-in for the tool, which the tests of tests/integrations have in earnest."""
    _, _, code, _ = blocks("python")
    trainer, asked = object(), []
    for name in ("accelerate", "explain", "restore"):
        assert callable(getattr(fusae, name))
        monkeypatch.setattr(fusae, name, lambda model, name=name: asked.append((name, model)))
    exec(compile(code, "README.md", "exec"), {"fusae": fusae, "trainer": trainer})
    assert asked == [("accelerate", trainer), ("explain", trainer), ("restore", trainer)]


def test_formats_example(tmp_path, monkeypatch):
    _, _, _, code = blocks("python")
    monkeypatch.chdir(tmp_path)
    Path("gemma-scope").mkdir()
    m, d = 12, 6
    shapes = {"W_enc": (d, m), "W_dec": (m, d), "b_enc": m, "b_dec": d, "threshold": m}
    np.savez("gemma-scope/params.npz", **{name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()})
    exec(compile(code, "README.md", "exec"), {"fusae": fusae})
    assert fusae.load("mine").W_enc.shape == (m, d)


def test_commands(tmp_path, monkeypatch):
    """The `fusae` lines, with a small dictionary in place of the large one and a small model under its name."""
    pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
    pytest.importorskip("jinja2", reason="the extra 'report' is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_lm.save(tmp_path / "SmolLM2-135M", tiny_lm.llama(layers=12))
    tiny_lm.write_text(tmp_path / "documents.jsonl")
    np.save("activations.npy", np.random.default_rng(0).standard_normal((512, 16), dtype=np.float32))
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines() if line.startswith("fusae ")]
    assert len(lines) >= 2
    for line in lines:
        arguments = shlex.split(line.replace("32768", "64").replace("--k 32", "--k 4"))[1:]
        arguments += ["--batch-size", "128"] if arguments[0] == "train" else []
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (line, result.output)
    assert Path("runs/mine/report.html").stat().st_size > 10_000
