# SPDX-License-Identifier: Apache-2.0
"""Sites of tiny random models against plain hooks, batches of chunks that differ in length, and what is refused."""

import collections
import types

import numpy as np
import pytest
import torch
from torch import nn

from fusae.data import TokenChunks, hooks

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
VOCABULARY, D = 64, 32


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4,
        )
    )  # fmt: skip


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=D, n_layer=3, n_head=4, n_positions=64, initializer_range=0.4,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def neox():
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, initializer_range=0.4, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def opt():
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=D, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=D, init_std=0.4, pad_token_id=1,
        )
    )  # fmt: skip


def bert(kind="Bert"):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=66 if kind == "Roberta" else 64, initializer_range=0.4,
    )  # fmt: skip
    return getattr(transformers, f"{kind}Model")(config)


def roberta():
    return bert("Roberta")


MODELS = {
    llama: ("model.layers.1", "model.layers.1.mlp:in", "model.layers.0.self_attn"),
    gpt2: ("transformer.h.1", "transformer.h.1.mlp:in", "transformer.h.0.attn"),
    neox: ("gpt_neox.layers.1", "gpt_neox.layers.1.mlp:in", "gpt_neox.layers.0.attention"),
    opt: ("model.decoder.layers.1", "model.decoder.layers.1.fc1:in", "model.decoder.layers.0.self_attn"),
    bert: ("encoder.layer.1", "encoder.layer.1.intermediate:in", "encoder.layer.0.attention"),
    roberta: ("encoder.layer.1", "encoder.layer.1.intermediate:in", "encoder.layer.0.attention"),
}


@pytest.fixture(scope="module")
def model():
    return made(llama)


def made(make):
    torch.manual_seed(0)
    return make().eval()


def ids_like(batch, ctx, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(2, VOCABULARY, (batch, ctx)))


def plainly(model, name, ids):
    """What a site holds, by a hook around a whole forward pass."""
    seen = []
    module = model.get_submodule(name.removesuffix(":in"))
    if name.endswith(":in"):
        handle = module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        model(ids)
    handle.remove()
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return hidden.reshape(*ids.shape, -1).clone()  # OPT flattens [batch, ctx, d] around its two linear maps


def run(model, names, ids, mask=None):
    with hooks.evaluating(model):
        return hooks.run_to(model, hooks.Sites.find(model, names), ids, mask)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_sites_equal_plain_hooks_and_stand_side_by_side(make):
    model, names, ids = made(make), MODELS[make], ids_like(3, 10)
    expected = [plainly(model, name, ids) for name in names]
    for name, rows in zip(names, expected, strict=True):
        torch.testing.assert_close(run(model, name, ids), rows, rtol=1e-5, atol=1e-6)
    for order in ([0, 1, 2], [2, 0, 1]):
        together = run(model, [names[i] for i in order], ids)
        torch.testing.assert_close(together, torch.cat([expected[i] for i in order], -1), rtol=1e-5, atol=1e-6)
    # Two names of one module: they differ, and neither hides the other.
    both = run(model, [names[0], f"{names[0]}:in"], ids)
    torch.testing.assert_close(both[..., :D], expected[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(both[..., :D], both[..., D:])


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_padded_batch_equals_each_chunk_alone(make):
    model, names, lengths = made(make), MODELS[make], [12, 5, 9]
    ids = ids_like(3, 12)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    ids[~mask] = 1
    together = run(model, list(names), ids, mask)
    for i, length in enumerate(lengths):
        alone = run(model, list(names), ids[i : i + 1, :length])
        torch.testing.assert_close(together[i : i + 1, :length], alone, rtol=1e-4, atol=1e-5)
    if make in (bert, roberta):  # these look ahead: without the mask, padding is seen
        assert not torch.allclose(run(model, list(names), ids)[1, :5], together[1, :5], atol=1e-3)


def test_one_pass_that_ends_at_the_last_site(model):
    calls = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args, i=i: calls.append(i))
        for i, layer in enumerate(model.model.layers)
    ]
    handles.append(model.lm_head.register_forward_pre_hook(lambda m, args: calls.append("head")))
    sites = hooks.Sites.find(model, ["model.layers.1.mlp:in", "model.layers.0"])
    assert len(sites) == 2 and sites.widths is None
    with hooks.evaluating(model):
        assert hooks.run_to(model, sites, ids_like(2, 6)).shape == (2, 6, 2 * D)
    for handle in handles:
        handle.remove()
    assert calls == [0, 1]
    assert sites.widths == (D, D) and sites.described == [
        {"module": "model.layers.1.mlp", "side": "in", "width": D},
        {"module": "model.layers.0", "side": "out", "width": D},
    ]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_widths_may_differ_and_any_kind_of_output_counts(model):
    sites = hooks.Sites.find(model, ["model.layers.0.mlp.gate_proj", "model", "model.layers.2.mlp.down_proj:in"])
    ids = ids_like(2, 6)
    with hooks.evaluating(model):
        rows = hooks.run_to(model, sites, ids)
    assert sites.widths == (48, D, 48) and rows.shape == (2, 6, 96 + D)
    torch.testing.assert_close(rows[..., 48 : 48 + D], model.model(ids).last_hidden_state.detach())


class Changing(nn.Module):
    """Works in place between two modules, and has one whose tokens stand in a row [batch · ctx, d]."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(16, 4), nn.Identity(), nn.Identity()
        self.flat, self.never = nn.Linear(4, 3), nn.Identity()

    def forward(self, ids):
        hidden = self.first(self.embed(ids) * 1.0)
        hidden += 1.0
        return self.flat(self.second(hidden).flatten(0, 1)).view(*hidden.shape[:2], 3)


def test_later_changes_in_place_are_not_seen():
    model, ids = Changing(), ids_like(2, 3) % 16
    rows = run(model, ["first", "second", "flat"], ids)
    torch.testing.assert_close(rows[..., :4], model.embed(ids).detach())
    torch.testing.assert_close(rows[..., 4:8], model.embed(ids).detach() + 1)
    torch.testing.assert_close(rows[..., 8:], model(ids).detach())


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("model.layer.1", "no submodule 'model.layer.1'; close: .*model.layers.1"),
        ("model.layers.1:input", "no submodule 'model.layers.1:input'"),
        ("model.layers.9:in", "no submodule 'model.layers.9'"),
        ([], "one or several different sites"),
        (["model.norm", "model.norm"], "one or several different sites"),
        ([3], "one or several different sites"),
    ],
)
def test_names_that_are_no_sites(model, names, says):
    with pytest.raises(ValueError, match=says):
        hooks.Sites.find(model, names)


def test_sites_without_hidden_states(model):
    ids = ids_like(2, 3)
    with pytest.raises(ValueError, match="'model.rotary_emb': its output must hold hidden states .* here .2, 3, d."):
        run(model, "model.rotary_emb", ids)
    with pytest.raises(ValueError, match="'model.embed_tokens:in': its input must hold .* torch.int64"):
        run(model, "model.embed_tokens:in", ids)
    with pytest.raises(ValueError, match="never took no part in the forward pass of Changing"):
        run(Changing(), ["first", "never"], ids % 16)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_models_without_a_mask_take_chunks_of_one_length():
    model, ids = Changing(), np.arange(24).reshape(3, 8) % 16
    with pytest.raises(ValueError, match="forward of Changing takes no attention_mask; .*tails=False"):
        run(model, "first", torch.from_numpy(ids), torch.ones(3, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="differ in length, but the forward of Changing takes no attention_mask"):
        hooks.check_chunks(TokenChunks(ids, np.array([8, 8, 3])), model)
    short = hooks.check_chunks(TokenChunks(ids, np.array([5, 5, 5])), model)
    cut, mask = hooks.batch_of(short, np.array([0, 2]), torch.device("cpu"))
    assert mask is None and cut.tolist() == ids[[0, 2], :5].tolist()


def test_check_chunks(model):
    ids = np.arange(60).reshape(4, 15)
    padded = TokenChunks(ids, np.array([15, 3, 9, 1]))
    assert hooks.check_chunks(padded, model) is padded
    for form in (ids, torch.from_numpy(ids)):
        chunks = hooks.check_chunks(form, model)
        assert chunks.lengths.tolist() == [15] * 4 and chunks.ids.tolist() == ids.tolist()
    with pytest.raises(ValueError, match="ids 0 to 64, the model's vocabulary has 64"):
        hooks.check_chunks(np.arange(65).reshape(5, 13), model)
    with pytest.raises(ValueError, match="chunks hold ids -1 to 58"):
        hooks.check_chunks(ids - 1, model)
    with pytest.raises(TypeError, match="integer array of token ids .* got dtype float64"):
        hooks.check_chunks(ids * 1.0, model)
    with pytest.raises(TypeError, match="got list"):
        hooks.check_chunks([[1, 2]], model)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_chunks_longer_than_the_models_positions_are_refused(make):
    model = made(make)
    assert hooks.positions_of(model) == 64
    longest = hooks.check_chunks(ids_like(1, 64).numpy(), model)
    run(model, MODELS[make][0], torch.from_numpy(longest.ids))
    with pytest.raises(ValueError, match="chunks are 65 tokens long, .* has 64 positions"):
        hooks.check_chunks(ids_like(1, 65).numpy(), model)
    # What counts is the longest chunk, not the room beside it.
    hooks.check_chunks(TokenChunks(ids_like(2, 80).numpy(), np.array([64, 7])), model)


def test_batch_of_cuts_to_the_longest():
    ids = np.arange(1, 25, dtype=np.uint16).reshape(3, 8)
    chunks = TokenChunks(ids, np.array([8, 2, 4]))
    cut, mask = hooks.batch_of(chunks, np.array([1, 2]), torch.device("cpu"))
    assert cut.dtype == torch.int64 and cut.tolist() == ids[1:, :4].tolist()
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    cut, mask = hooks.batch_of(chunks, slice(0, 1), torch.device("cpu"))
    assert mask is None and cut.tolist() == ids[:1].tolist()


def test_special_tokens():
    ids = torch.tensor([[0, 5, 7], [7, 2, 0]])
    assert hooks.is_special(ids, (0, 7)).tolist() == [[True, False, True], [True, False, True]]
    assert not hooks.is_special(ids, ()).any()


def test_with_hidden_puts_back_every_form():
    old, new = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert hooks.with_hidden(old, new) is not old and hooks.with_hidden(old, new).equal(new)
    changed = hooks.with_hidden((old, "rest"), new)
    assert changed[0].equal(new) and changed[1] == "rest"
    named = hooks.with_hidden(collections.namedtuple("Output", "hidden rest")(old, "rest"), new)
    assert named.hidden.equal(new) and named.rest == "rest" and hooks.with_hidden([old, 1], new)[1] == 1
    flat = hooks.with_hidden(torch.zeros(6, 4), new)
    assert flat.shape == (6, 4) and flat.eq(1).all()
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=old)
    assert hooks.with_hidden(output, new).last_hidden_state.equal(new) and output.last_hidden_state.equal(old)


def test_limits_of_a_model_of_text_and_more_are_those_of_its_text_part():
    model = Changing()
    text = types.SimpleNamespace(vocab_size=16, max_position_embeddings=8)
    model.config = types.SimpleNamespace(get_text_config=lambda: text)
    hooks.check_chunks(np.full((2, 8), 15), model)
    with pytest.raises(ValueError, match="the model's vocabulary has 16"):
        hooks.check_chunks(np.full((2, 8), 16), model)
    with pytest.raises(ValueError, match="Changing has 8 positions"):
        hooks.check_chunks(np.full((2, 9), 15), model)
