# SPDX-License-Identifier: Apache-2.0
"""Collecting activations of a tiny random Llama, the files they lie in, and batches of them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fusae.data import Activations, TokenChunks, collect, weights_sha256

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
MODULE = "model.layers.0"
NOTHING = dict.fromkeys(("padding", "first_positions", "special", "nonfinite", "norm_outliers"), 0)


def tiny_model(layers=3, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def chunks():
    return np.random.default_rng(0).integers(0, 64, (20, 16)).astype(np.uint16)


def plain_hook_run(model, chunks, module=MODULE):
    seen = []
    handle = model.get_submodule(module).register_forward_hook(lambda m, a, output: seen.append(output))
    with torch.no_grad():
        model(torch.from_numpy(chunks.astype(np.int64)))
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def run(model, chunks, path, **options):
    return collect(
        model, chunks, options.pop("module", MODULE), path, **{"batch_size": 4, "progress": False, **options}
    )


@pytest.mark.parametrize("module", [MODULE, "model.layers.2", "model.layers.1.mlp", "model.norm"])
def test_equals_a_plain_hook_run(model, chunks, tmp_path, module):
    acts = run(model, chunks, tmp_path / "a", module=module, skip_positions=1, outlier_factor=None, dtype="float32")
    expected = plain_hook_run(model, chunks, module)[:, 1:].reshape(-1, 32)
    torch.testing.assert_close(acts.take(slice(None)), expected, rtol=1e-5, atol=1e-6)
    grid = [(c, p) for c in range(20) for p in range(1, 16)]
    assert acts.positions.tolist() == [list(pair) for pair in grid]
    assert acts.shape == (300, 32) and acts.dropped == NOTHING | {"first_positions": 20}
    torch.testing.assert_close(acts.mean(), expected.double().mean(0), rtol=1e-6, atol=1e-7)
    run(model, chunks, tmp_path / "half", module=module, skip_positions=1, outlier_factor=None)
    stored = np.load(tmp_path / "half" / "rows-00000.npy")
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, acts.take(slice(None)).numpy().astype(np.float16))


def test_later_blocks_do_not_run(model, chunks, tmp_path):
    calls = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args, i=i: calls.append(i))
        for i, layer in enumerate(model.model.layers)
    ]
    handles.append(model.lm_head.register_forward_pre_hook(lambda m, args: calls.append("head")))
    run(model, chunks, tmp_path / "a", module="model.layers.1")
    for handle in handles:
        handle.remove()
    assert set(calls) == {0, 1} and len(calls) == 2 * 5


def test_sinks_are_dropped_and_counted(model, chunks, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 200.0  # every token 7 becomes an outlier
    acts = run(model, chunks, tmp_path / "a", skip_positions=2)
    sinks = chunks[:, 2:] == 7
    assert sinks.sum() > 0
    assert acts.dropped == NOTHING | {"first_positions": 40, "norm_outliers": int(sinks.sum())}
    assert len(acts) == sinks.size - sinks.sum()
    where = np.asarray(acts.positions)
    assert (where[:, 1] >= 2).all() and not (chunks[where[:, 0], where[:, 1]] == 7).any()
    first = plain_hook_run(model, chunks[:4])[:, 2:].norm(dim=-1).median()
    assert acts.norm_limit == pytest.approx(10 * float(first), rel=1e-5)


class _Interrupt(torch.nn.Module):
    """A model that is interrupted at its `at`-th forward pass."""

    def __init__(self, inner, at):
        super().__init__()
        self.inner, self.at, self.calls = inner, at, 0

    def forward(self, ids):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.inner(ids)


def test_interrupted_and_resumed_equals_uninterrupted(model, chunks, tmp_path):
    module = f"inner.{MODULE}"
    whole = run(_Interrupt(model, 0), chunks, tmp_path / "whole", module=module)
    with pytest.raises(KeyboardInterrupt):
        run(_Interrupt(model, 3), chunks, tmp_path / "part", module=module)
    meta = json.loads((tmp_path / "part" / "activations.json").read_text())
    assert not meta["complete"] and meta["rows"] == 8 * 14
    assert (meta["cursor"]["batches"], meta["cursor"]["chunks"]) == (2, 8)
    with pytest.raises(ValueError, match="unfinished .8 of 20 chunks."):
        Activations(tmp_path / "part")
    with open(tmp_path / "part" / "rows-00000.npy.part", "ab") as file:
        file.write(b"left over by a run that was killed" * 1000)  # more than what is still to come
    rest = _Interrupt(model, 0)
    run(rest, chunks, tmp_path / "part", module=module)
    assert rest.calls == 3  # 12 of 20 chunks were left
    names = ["activations.json", "positions-00000.npy", "rows-00000.npy"]
    assert sorted(file.name for file in (tmp_path / "part").iterdir()) == names
    for name in names:
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert Activations(tmp_path / "part").dropped == whole.dropped


def test_interrupted_before_the_first_batch_starts_anew(model, chunks, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(_Interrupt(model, 1), chunks, tmp_path / "a", module=f"inner.{MODULE}")
    assert len(run(_Interrupt(model, 0), chunks, tmp_path / "a", module=f"inner.{MODULE}")) == 20 * 14


def test_reused_for_the_same_inputs_only(model, chunks, tmp_path):
    run(model, chunks, tmp_path / "a")
    never = tiny_model()
    never.forward = None  # a forward pass would fail
    assert len(run(never, chunks.astype(np.int64), tmp_path / "a", batch_size=7)) == 20 * 14
    special = dataclasses.replace(TokenChunks.of(chunks), special=(7,))
    assert len(run(never, special, tmp_path / "a", drop_special=False)) == 20 * 14
    other_chunks = chunks.copy()
    other_chunks[3, 3] ^= 1
    other_model = tiny_model()
    with torch.no_grad():
        other_model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    for changed, says in (
        ({"chunks": other_chunks}, "chunks_sha256"),
        ({"chunks": chunks[:19]}, "chunks 20 .now 19."),
        ({"model": other_model}, "model_sha256"),
        ({"module": "model.layers.1"}, "module 'model.layers.0' .now 'model.layers.1'."),
        ({"skip_positions": 1}, "skip_positions 2 .now 1."),
        ({"outlier_factor": 5.0}, "outlier_factor"),
        ({"dtype": "float32"}, "dtype"),
        ({"chunks": special}, r"special .. .now .7.."),
    ):
        arguments = {"model": model, "chunks": chunks, "path": tmp_path / "a", **changed}
        with pytest.raises(ValueError, match=f"other inputs: .*{says}"):
            run(**arguments)
    replaced = run(model, chunks[:19], tmp_path / "a", overwrite=True)
    assert len(replaced) == 19 * 14


def test_bad_arguments(model, chunks, tmp_path):
    for options, error, says in (
        ({"module": "model.layer.0"}, ValueError, "no submodule 'model.layer.0'; close: .*model.layers.0"),
        ({"module": "model.rotary_emb"}, ValueError, "must hold hidden states"),
        ({"chunks": chunks.astype(np.float32)}, TypeError, "integer array of token ids"),
        ({"chunks": chunks[0]}, ValueError, "shape .chunks, ctx."),
        ({"chunks": chunks + 60}, ValueError, "vocabulary has 64"),
        ({"skip_positions": 16}, ValueError, "skip_positions must lie in 0..15"),
        ({"outlier_factor": float("nan")}, ValueError, "outlier_factor"),
        ({"dtype": "float64"}, ValueError, "dtype must be one of 'float32', .* got 'float64'"),
        ({"shard_rows": 0}, ValueError, "shard_rows must be an integer of at least 1, or None, got 0"),
        ({"nonfinite": "keep"}, ValueError, "nonfinite must be 'stop' or 'drop', got 'keep'"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ):
        arguments = {"model": model, "chunks": chunks, "path": tmp_path / "a", **options}
        with pytest.raises(error, match=says):
            run(**arguments)


def test_values_beyond_float16(chunks, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"does not fit float16 .65504.; pass dtype='bfloat16' or 'float32'"):
        run(model, chunks, tmp_path / "a")
    for dtype in ("bfloat16", "float32", "int8"):
        assert run(model, chunks, tmp_path / dtype, dtype=dtype).take(slice(None)).isfinite().all()


def test_weights_sha256_sees_any_change_and_shared_weights():
    model = tiny_model()
    before = weights_sha256(model)
    assert weights_sha256(tiny_model()) == before
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1e-6
    assert weights_sha256(model) != before
    assert weights_sha256(tiny_model().to(torch.bfloat16)) != before


def test_training_mode_is_put_back(model, chunks, tmp_path):
    model = tiny_model().train()
    model.model.norm.eval()
    run(model, chunks, tmp_path / "a")
    assert model.training and model.model.layers[0].mlp.training and not model.model.norm.training


@pytest.fixture
def acts(model, chunks, tmp_path):
    return run(model, chunks, tmp_path / "acts")


def test_batches_are_a_permutation_and_repeat_for_a_seed(acts):
    batches = list(acts.batches(64, seed=3, epochs=2))
    assert [tuple(b.shape) for b in batches] == [(64, 32)] * 8 and batches[0].dtype == torch.float32
    same = list(acts.batches(64, seed=3, epochs=2))
    assert all(torch.equal(a, b) for a, b in zip(batches, same, strict=True))
    assert not torch.equal(batches[0], batches[4])  # a new order each epoch
    assert not torch.equal(batches[0], next(acts.batches(64, seed=4)))
    epoch = torch.cat(list(acts.batches(64, seed=3, drop_last=False)))
    assert epoch.shape == (280, 32)
    everything = acts.take(slice(None))
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, everything.tolist()))
    ordered = torch.cat(list(acts.batches(64, shuffle=False, drop_last=False)))
    assert torch.equal(ordered, everything)
    assert len(acts.batches(64, epochs=3)) == 12 and len(acts.batches(64, drop_last=False)) == 5


@pytest.mark.parametrize("done", [0, 2, 4, 5, 8])
def test_batches_resume_from_a_state(acts, done):
    first = acts.batches(64, seed=1, epochs=2)
    for _ in range(done):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    second = acts.batches(64, seed=1, epochs=2)
    second.load_state_dict(state)
    rest, again = list(first), list(second)
    assert len(rest) == 8 - done
    assert all(torch.equal(a, b) for a, b in zip(rest, again, strict=True))


def test_batches_refuse_what_cannot_be(acts, model, chunks, tmp_path):
    with pytest.raises(ValueError, match="batch_size 281 exceeds the 280 rows"):
        acts.batches(281)
    with pytest.raises(ValueError, match="batch_size must be"):
        acts.batches(0)
    with pytest.raises(TypeError, match="no length"):
        len(acts.batches(64, epochs=None))
    state = acts.batches(64, seed=1).state_dict()
    for name, other in (("seed", acts.batches(64, seed=2)), ("batch_size", acts.batches(32, seed=1))):
        with pytest.raises(ValueError, match=f"state: {name}"):
            other.load_state_dict(state)
    elsewhere = run(model, chunks, tmp_path / "other", module="model.layers.1").batches(64, seed=1)
    with pytest.raises(ValueError, match="state: sha256"):
        elsewhere.load_state_dict(state)
    with pytest.raises(ValueError, match="is no place"):
        acts.batches(64, seed=1).load_state_dict({**state, "batch": 5})


def test_take(acts):
    index = np.array([5, 3, 270])
    assert torch.equal(acts.take(index), acts.take(slice(None))[torch.from_numpy(index)])
