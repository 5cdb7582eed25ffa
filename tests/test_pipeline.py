# SPDX-License-Identifier: Apache-2.0
"""Runs from text to report on tiny models: whole, stopped and resumed in every stage, evaluated again."""

import dataclasses
import json
import os
import signal
import warnings

import pytest
import torch

from fusae import cli
from fusae.nn import SparseCoder
from fusae.pipeline import DataConfig, Pipeline, PipelineError, evaluate, load_coder, stages
from fusae.train import TrainConfig, Trainer

pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
pytest.importorskip("tokenizers", reason="the extra 'lm' is not installed")
pytest.importorskip("jinja2", reason="the extra 'report' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")

from fusae.testing import tiny_lm  # noqa: E402

TRAIN = TrainConfig(m=96, k=6, batch_size=128, lr=3e-3, log_every=5, checkpoint_every=7, device="cpu")
RESULTS = ("eval.json", "features.json")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_lm.save(folder / "lm", tiny_lm.llama())
    tiny_lm.write_text(folder / "text.jsonl", 16)
    return folder


@pytest.fixture(scope="module")
def data(files):
    return DataConfig(
        model=str(files / "lm"), module="model.layers.1", text=str(files / "text.jsonl"), held_out=0.25, features=12,
        passages=3, cache=str(files / "cache"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    torch.set_num_threads(2)  # as in every test: the model's own matrix products depend on it
    out = tmp_path_factory.mktemp("finished") / "run"
    Pipeline(TRAIN, data, out, show=False).run()
    return out


@pytest.fixture
def no_figures(monkeypatch):
    """The report is the slow stage; where a test is about others a page stands in."""

    def write_report(out):
        (out / "report.html").write_text("a page")
        return out / "report.html"

    monkeypatch.setattr(stages, "write_report", write_report)


def read(out, name):
    return json.loads((out / name).read_text(encoding="utf-8"))


def assert_same_run(a, b):
    one, other = SparseCoder.load(a / "coder").state_dict(), SparseCoder.load(b / "coder").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for name in RESULTS:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def run(capsys, *arguments):
    """(exit status, stdout, stderr)"""
    status = 0
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        status = stop.code or 0
    out = capsys.readouterr()
    return status, out.out, out.err


def test_a_whole_run(finished, data):
    evaluation, about = read(finished, "eval.json"), read(finished, "config.json")
    assert 0 < evaluation["fvu"] < 0.9 and evaluation["latents"] == len(evaluation["density"]) == 96
    loss = evaluation["loss"]  # of a random model, which ablation may as well improve
    gap = loss["mean_ablated"] - loss["original"]
    assert loss["loss_recovered"] == pytest.approx((loss["mean_ablated"] - loss["patched"]) / gap)
    assert 0 < evaluation["kl"]["kl_recovered"] < 1
    assert evaluation["dropped"]["first_positions"] > 0 == evaluation["dropped"]["norm_outliers"]
    assert evaluation["source"]["module"] == "model.layers.1" and evaluation["source"]["text"] == "text.jsonl"
    assert DataConfig.from_dict(about["pipeline"]["data"]) == data and about["train"]["m"] == 96
    assert set(about["pipeline"]["stage_seconds"]) == set(Pipeline.stages) - {"report"}
    assert about["versions"]["transformers"]
    features = read(finished, "features.json")
    assert len(features) == 12
    for feature in features:
        assert feature["density"] == evaluation["density"][feature["latent"]] > 0
        assert feature["promoted"] and len(feature["nearest"]) == 5 and sum(feature["histogram"]["counts"])
        assert 1 <= len(feature["passages"]) <= 3
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "text.jsonl" in page and "KL recovered" in page and page.count('<article class="latent"') == 12


def test_held_out_text_is_not_trained_on(finished, data):
    inputs = stages.load_inputs(data)
    train, held = list(inputs.train), list(inputs.held_out)
    assert len(train) + len(held) == 16 and not set(train) & set(held) and held
    passages = ["".join(p["tokens"]) for f in read(finished, "features.json") for p in f["passages"]]
    assert all(any(p.replace("<|endoftext|>", "") in text for text in train) for p in passages)
    rows = read(finished, "config.json")["data"]["rows"]
    # One row a byte, but for the first of each chunk (position 1; position 0 is no text) and what is too short.
    assert 0.9 * sum(map(len, train)) < rows < sum(map(len, train))


def test_the_command_does_it_without_a_warning(files, tmp_path, capsys):
    """Everything from a file; the numbers are those of the table that `fusae eval` prints afterwards."""
    (tmp_path / "run.toml").write_text(
        f'out = "{tmp_path / "run"}"\nm = 96\nk = 6\nbatch_size = 128\nepochs = 2\nlr = 3e-3\ndevice = "cpu"\n[data]\n'
        f'model = "{files / "lm"}"\nmodule = ["model.layers.1"]\ntext = "{files / "text.jsonl"}"\nheld_out = 0.25\n'
        f'features = 3\ncache = "{files / "cache"}"\n'
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # nobody is shown these
        status, out, err = run(capsys, "train", tmp_path / "run.toml", "--passages", "2")
    assert status == 0 and out.strip() == str(tmp_path / "run" / "report.html") and "arning" not in err
    for number, name in enumerate(Pipeline.stages, 1):
        assert f"{number}/6 {name}" in err and f"{name} took" in err
    before = read(tmp_path / "run", "eval.json")
    assert read(tmp_path / "run", "config.json")["pipeline"]["data"]["passages"] == 2
    status, out, err = run(capsys, "eval", tmp_path / "run", "--quiet", "--device", "cpu")
    assert status == 0 and read(tmp_path / "run", "eval.json") == before
    assert f"{before['fvu']:.4f}" in out and f"{before['kl']['kl_recovered']:.4f}" in out
    status, _, err = run(capsys, "train", "--resume", tmp_path / "run")
    assert status == 1 and "is finished; `fusae eval" in err and err.count("\n") == 1


def test_eval_of_other_text_and_another_place(finished, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    other = tiny_lm.write_text(tmp_path / "other.jsonl", 6, seed=9)
    length = sum(len(json.loads(line)["text"]) for line in other.read_text().splitlines())
    before = (finished / "eval.json").read_bytes()

    def measured(*arguments):
        out = tmp_path / "eval.json"
        status, said, err = run(
            capsys, "eval", finished, "--out", out, "--quiet", "--device", "cpu", *arguments
        )  # fmt: skip
        return (status, said + err, json.loads(out.read_text()) if status == 0 else None)

    status, said, evaluation = measured("--text", other)
    assert status == 0 and 0.9 * length < evaluation["tokens"] < length  # all of it, not a twentieth
    assert evaluation["source"]["text"] == "other.jsonl" and f"{evaluation['tokens']:,}" in said
    _, _, few = measured("--tokens", "200", "--loss-tokens", "100")
    assert 200 <= few["tokens"] < 200 + 127 and 100 <= few["loss"]["tokens"] + 1 < 100 + 128
    _, _, elsewhere = measured("--module", "model.layers.0")
    assert elsewhere["source"]["module"] == "model.layers.0" and elsewhere["fvu"] > read(finished, "eval.json")["fvu"]
    assert "tokens must be at most" in measured("--tokens", "100000000")[1]
    assert "no submodule 'model.layers.7'" in measured("--module", "model.layers.7")[1]
    assert "rows must have width 32, as the coder was trained on, got 257" in measured("--module", "lm_head")[1]
    assert (finished / "eval.json").read_bytes() == before


# ---- stopped and resumed ---------------------------------------------------------------------------------------------


def interrupt_in(monkeypatch, owner, name, at=1):
    """Ctrl-C in the `at`-th call of a function."""
    plain, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    "owner, name, at",
    [
        (stages, "load_inputs", 1),
        (stages.hooks, "run_to", 4),
        (stages, "Trainer", 1),
        (evaluate, "measure", 1),
        (evaluate, "loss_recovered", 1),
        (evaluate, "top_passages", 1),
        (stages, "write_report", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_stage_goes_on(finished, data, tmp_path, no_figures, capsys, owner, name, at):
    out, cache = tmp_path / "run", str(tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in(patch, owner, name, at)
        with pytest.raises(KeyboardInterrupt):
            Pipeline(TRAIN, dataclasses.replace(data, cache=cache), out, show=False).run()
    assert not (out / "report.html").exists()
    status, said, err = run(capsys, "train", "--resume", out, "--quiet")
    assert (status, said.strip(), err) == (0, str(out / "report.html"), "")
    assert_same_run(finished, out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ctx", "64"], "ctx is 64, the run to resume has 128; start a new run to change it"),
        (["--module", "model.layers.0"], "module is 'model.layers.0', the run to resume has 'model.layers.1'"),
        (["--k", "5"], "k is 5, the run to resume has 6; start a new run to change it"),
        (["--data", "rows.npy"], "data is rows.npy, but the run in"),
    ],
)
def test_a_resumed_run_is_the_same_run(data, tmp_path, capsys, arguments, message):
    Pipeline(TRAIN, data, tmp_path / "run", show=False)  # claimed, and stopped before the first stage
    status, _, err = run(capsys, "train", "--resume", tmp_path / "run", "--quiet", *arguments)
    assert status == 1 and message in err and err.count("\n") == 1
    with pytest.raises(FileExistsError, match=r"holds a run \(pipeline.json\); resume it, overwrite it, or take"):
        Pipeline(TRAIN, data, tmp_path / "run", show=False)
    (tmp_path / "run" / "pipeline.json").write_text('{"train": {"m": 8}}')
    status, _, err = run(capsys, "train", "--resume", tmp_path / "run", "--quiet")
    assert status == 1 and "pipeline.json is damaged" in err


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("module", "model.layers.9", "stage 'text' failed: ValueError: module: LlamaForCausalLM has no submodule"),
        ("text", "EMPTY", "holds no text"),
        ("text", "ONE", "none of its documents fell into the held-out part (held_out = 0.25 of them"),
        ("column", "body", "column: line 1 of"),
        ("train_tokens", 10**7, "train_tokens must be at most"),
        ("held_out_tokens", 10**7, "held_out_tokens must be at most"),
        ("ctx", 256, "chunks are 256 tokens long, LlamaForCausalLM has 128 positions"),
        ("separator", "[SEP]", "separator: '[SEP]' is no token"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_before_the_model_reads(data, tmp_path, field, value, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("all in one document " * 50)
    value = {"EMPTY": str(tmp_path / "empty.txt"), "ONE": str(tmp_path / "one.txt")}.get(value, value)
    with pytest.raises(PipelineError) as caught:
        Pipeline(TRAIN, dataclasses.replace(data, **{field: value}), tmp_path / "run", show=False).run()
    assert "stage 'text' failed" in str(caught.value) and message in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("store", ["float16", "stream"])
def test_a_stopped_training_goes_on_to_the_same_bits(finished, data, tmp_path, no_figures, capsys, store, number):
    data, whole = dataclasses.replace(data, store=store, buffer_rows=512), finished
    if store == "stream":
        whole = tmp_path / "whole"
        Pipeline(TRAIN, data, whole, show=False).run()
    plain = Trainer.train_step

    def stopped(trainer, x):
        if trainer.step == 9:
            os.kill(os.getpid(), number)
        return plain(trainer, x)

    arguments = ["train", "--out", tmp_path / "run", "--quiet"]
    for config in (TRAIN, data):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value not in (None, field.default):
                flag = field.name.replace("_", "-")
                arguments += [f"--{flag}" if value else f"--no-{flag}"] if value in (True, False) else [
                    f"--{flag}", value
                ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        status, _, err = run(capsys, *arguments)
    assert status == 130 and f"To go on: fusae train --resume {tmp_path / 'run'}" in err
    assert (tmp_path / "run" / "checkpoint.safetensors").exists() and not (tmp_path / "run" / "eval.json").exists()
    assert run(capsys, "train", "--resume", tmp_path / "run", "--quiet", "--log-every", "1")[0] == 0
    assert_same_run(whole, tmp_path / "run")


def test_sigterm_outside_of_training_is_an_interruption(data, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "load_inputs", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(TRAIN, data, tmp_path / "run", show=False).run()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failing_stage_is_named_and_what_is_done_is_kept(data, tmp_path, monkeypatch, no_figures, capsys):
    def fail(*_args, **_kwargs):
        raise RuntimeError("out of paper")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "loss_recovered", fail)
        with pytest.raises(PipelineError, match="stage 'evaluation' failed: RuntimeError: out of paper"):
            Pipeline(TRAIN, data, tmp_path / "run", show=False).run()
        status, _, err = run(capsys, "train", "--resume", tmp_path / "run", "--quiet")
        assert status == 1 and err.startswith("error: stage 'evaluation' failed: RuntimeError: out of paper\n")
        assert f"To go on: fusae train --resume {tmp_path / 'run'}" in err
    monkeypatch.setattr(stages, "Trainer", lambda *_, **__: pytest.fail("trained again"))
    Pipeline(None, None, tmp_path / "run", resume=True, show=False).run()
    assert read(tmp_path / "run", "eval.json")["loss"]


# ---- kinds of runs ---------------------------------------------------------------------------------------------------


def test_a_stream_measures_what_a_store_does(finished, data, tmp_path, no_figures):
    """The same rows, but for the rounding of the store; nothing is written beside the run."""
    cache = tmp_path / "cache"
    Pipeline(
        TRAIN, dataclasses.replace(data, store="stream", cache=str(cache)), tmp_path / "run", show=False
    ).run()  # fmt: skip
    assert not cache.exists()
    stored, streamed = read(finished, "eval.json"), read(tmp_path / "run", "eval.json")
    assert streamed["tokens"] == stored["tokens"] and streamed["dropped"] == stored["dropped"]
    assert streamed["loss"]["original"] == pytest.approx(stored["loss"]["original"], rel=1e-6)
    assert streamed["fvu"] == pytest.approx(stored["fvu"], rel=0.2)  # rows come in another order
    assert read(tmp_path / "run", "config.json")["train"]["tokens"] == read(finished, "config.json")["train"]["tokens"]


def test_an_encoder_has_no_loss(files, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    tiny_lm.save(tmp_path / "lm", tiny_lm.bert())
    config = dataclasses.replace(data, model=str(tmp_path / "lm"), module="encoder.layer.1")
    Pipeline(TRAIN, config, tmp_path / "run", show=False).run()
    evaluation = read(tmp_path / "run", "eval.json")
    assert "loss" not in evaluation and "kl" not in evaluation and 0 < evaluation["fvu"] < 1
    assert evaluation["no_loss"] == "BertModel is no causal language model"
    assert "promoted" not in read(tmp_path / "run", "features.json")[0]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "BertModel is no causal language model" in page and "logit effects not computed" in page
    _, out, _ = run(capsys, "eval", tmp_path / "run", "--quiet", "--device", "cpu")
    assert "not measured: BertModel is no causal language model" in out


def test_several_sites(data, tmp_path, no_figures):
    config = dataclasses.replace(data, module=["model.layers.0", "model.layers.1.mlp:in"])
    Pipeline(TRAIN, config, tmp_path / "run", show=False).run()
    evaluation = read(tmp_path / "run", "eval.json")
    assert SparseCoder.load(tmp_path / "run" / "coder").config.d == 2 * tiny_lm.D
    assert evaluation["source"]["module"] == "model.layers.0, model.layers.1.mlp:in"
    assert 0 < evaluation["kl"]["kl_recovered"] < 1
    assert "promoted" not in read(tmp_path / "run", "features.json")[0]  # no one direct path to the logits


def test_a_transcoder_is_measured_on_its_target(data, tmp_path, no_figures):
    config = dataclasses.replace(data, module=["model.layers.1.mlp:in", "model.layers.1.mlp"])
    train = dataclasses.replace(TRAIN, architecture="transcoder")
    Pipeline(train, config, tmp_path / "run", show=False).run()
    evaluation = read(tmp_path / "run", "eval.json")
    coder = load_coder(tmp_path / "run")[0]
    x, y = held_out_rows(config).split([tiny_lm.D, tiny_lm.D], 1)
    with torch.no_grad():
        error = (coder(x) - y).double().square().sum() / (y - y.mean(0)).double().square().sum()
    assert evaluation["fvu"] == pytest.approx(float(error), rel=1e-3)
    assert 0 < evaluation["kl"]["kl_recovered"] < 1
    assert "promoted" in read(tmp_path / "run", "features.json")[0]


@pytest.mark.parametrize("fields", [
    {"form": "batch_topk"}, {"form": "jumprelu", "sparsity": 1e-2}, {"form": "gated"},
    {"architecture": "skip_transcoder"}, {"architecture": "crosscoder", "form": "matryoshka"},
    {"architecture": "transcoder", "store": "stream"},
    {"architecture": "cross_layer"}, {"architecture": "cross_layer", "form": "jumprelu"},
], ids=str)  # fmt: skip
def test_dictionaries_of_every_kind_are_measured(data, tmp_path, no_figures, fields):
    sites = {
        "skip_transcoder": ["model.layers.1.mlp:in", "model.layers.1.mlp"],
        "crosscoder": ["model.layers.0", "model.layers.1"],
        "cross_layer": [f"model.layers.{i}.mlp{side}" for side in (":in", "") for i in (0, 1)],
    }
    sites["transcoder"] = sites["skip_transcoder"]
    fields = dict(fields)
    config = dataclasses.replace(
        data, module=sites.get(fields.get("architecture"), "model.layers.1"), features=3,
        store=fields.pop("store", "float16"),
    )  # fmt: skip
    Pipeline(dataclasses.replace(TRAIN, **fields), config, tmp_path / "run", show=False).run()
    evaluation = read(tmp_path / "run", "eval.json")
    layers = 2 if fields.get("architecture") == "cross_layer" else 1
    assert evaluation["latents"] == len(evaluation["density"]) == layers * TRAIN.m
    assert 0 < evaluation["fvu"] < 2 and evaluation["l0"] > 0
    assert evaluation["l0"] == pytest.approx(sum(evaluation["density"]), rel=1e-6)
    assert evaluation["loss"]["tokens"] > 0 and evaluation["kl"]["patched"] > 0
    features = read(tmp_path / "run", "features.json")
    assert len(features) == 3
    for feature in features:
        if layers == 1:
            assert "layer" not in feature and feature["nearest"]
            continue
        layer = feature["layer"]
        assert layer["index"] * TRAIN.m + layer["latent"] == feature["latent"] and layer["latent"] < TRAIN.m
        assert layer["module"] == f"model.layers.{layer['index']}.mlp:in" and "nearest" not in feature


def held_out_rows(config):
    """As they are before they are stored."""
    inputs = stages.load_inputs(config)
    chunks = inputs.chunks(config, "held_out", 100_000, show=False)
    return torch.cat(list(evaluate.stored_or_live(
        inputs, dataclasses.replace(config, store="stream"), chunks, "", ""
    )))  # fmt: skip


def test_the_cache_is_used_by_other_runs(finished, data, tmp_path, monkeypatch, no_figures):
    calls = []
    plain = stages.hooks.run_to
    monkeypatch.setattr(stages.hooks, "run_to", lambda *args: calls.append(len(args[2])) or plain(*args))
    Pipeline(dataclasses.replace(TRAIN, seed=1, epochs=1), data, tmp_path / "run", show=False).run()
    assert calls == [1]  # one chunk, to see the width
    assert len(os.listdir(data.cache)) >= 2
    Pipeline(TRAIN, dataclasses.replace(data, module="model.layers.0"), tmp_path / "other", show=False).run()
    assert len(calls) > 3


def test_tokens_that_are_asked_for(data, tmp_path, no_figures):
    config = dataclasses.replace(
        data, train_tokens=1500, held_out_tokens=300, loss_tokens=100, tails=False, features=0
    )  # fmt: skip
    Pipeline(TRAIN, config, tmp_path / "run", show=False).run()
    evaluation = read(tmp_path / "run", "eval.json")
    assert 1500 <= read(tmp_path / "run", "config.json")["data"]["rows"] < 1500 + 126
    assert 300 <= evaluation["tokens"] < 300 + 126 and evaluation["loss"]["tokens"] == 127
    assert read(tmp_path / "run", "features.json") == []
