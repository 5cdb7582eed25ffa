# SPDX-License-Identifier: Apache-2.0
"""`fusae.hook` on language models: padding on either side, generation with a cache, checkpoints, torch.compile."""

from __future__ import annotations

import pytest
import torch

import fusae
from fusae.nn import SparseCoder, SparseCoderConfig

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
pytest.importorskip("tokenizers", reason="the extra 'lm' is not installed")

from fusae.testing import tiny_lm  # noqa: E402

D, M = tiny_lm.D, 160
NAME = "model.layers.1"
KINDS = {"topk": {}, "relu": {"select": "relu"}}
MODES = ("error", "replace")
EDIT = {"latents": [3, 17], "value": 40.0}


@pytest.fixture(scope="module")
def llama():
    return tiny_lm.llama(2).requires_grad_(False)


def coder_of(kind="topk", dtype="float32"):
    coder = SparseCoder(SparseCoderConfig(d=D, m=M, k=4, dtype=dtype, **KINDS[kind])).eval()
    with torch.no_grad():
        coder.b_enc.sub_(0.2)
    return coder.requires_grad_(False)


def ids_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 257, (1, length), generator=generator) for length in lengths]


def padded(parts, side):
    """(ids, mask) ``[batch, longest]``."""
    longest = max(part.shape[1] for part in parts)
    pads = [(longest - p.shape[1], 0) if side == "left" else (0, longest - p.shape[1]) for p in parts]
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(part, where) for part, where in zip(parts, pads, strict=True)]),
        torch.cat([pad(torch.ones_like(part), where) for part, where in zip(parts, pads, strict=True)]),
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_without_edits(llama, kind, dtype):
    model, (ids,) = tiny_lm.llama(2).to(dtype), ids_of(12)
    plain = model(ids).logits
    with fusae.hook(model, NAME, coder_of(kind)) as h:
        assert torch.equal(model(ids).logits, plain)
    assert h.codes.is_ragged or h.codes.batch_shape == (1, 12)
    assert h.input.shape == (1, 12, D) and h.input.dtype == dtype


POSITIONS = {"all": None, "first": 0, "last": -1, "from the third": slice(2, None), "the last two": slice(-2, None)}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_is_each_sequence_alone(llama, kind, side, positions):
    parts, coder = ids_of(9, 4, 6), coder_of(kind)
    ids, mask = padded(parts, side)
    for mode in MODES:
        with fusae.hook(llama, NAME, coder, mode) as h:
            h.edit(**EDIT, positions=POSITIONS[positions]).edit(range(M), scale=1.5, positions=POSITIONS[positions])
            together, codes = llama(ids, attention_mask=mask).logits, h.codes.to_dense().reshape(*ids.shape, M)
            edited = h.edited.to_dense().reshape(*ids.shape, M)
            for row, part in enumerate(parts):
                alone = llama(part).logits[0]
                torch.testing.assert_close(together[row][mask[row] > 0], alone, atol=2e-4, rtol=1e-3)
                own = h.edited.to_dense().reshape(-1, M)
                torch.testing.assert_close(edited[row][mask[row] > 0], own, atol=2e-4, rtol=1e-3)
        assert not codes[mask == 0].any() and not edited[mask == 0].any()


@pytest.mark.parametrize("side", ("left", "right"))
def test_padding_stays_as_it_is(llama, side):
    ids, mask = padded(ids_of(7, 3), side)
    for mode in MODES:
        got = []
        with fusae.hook(llama, NAME, coder_of("relu"), mode) as h:
            h.edit(**EDIT)
            handle = llama.get_submodule(NAME).register_forward_hook(lambda _m, _a, out, got=got: got.append(out))
            llama(input_ids=ids, attention_mask=mask)
            handle.remove()
        same = (got[0] == h.input).all(-1)
        assert bool(same[mask == 0].all()) and not bool(same[mask == 1].any())


def test_padding_gets_no_gradient_through_the_codes(llama):
    ids, mask = padded(ids_of(7, 3), "left")
    with fusae.hook(llama, NAME, coder_of(), "replace", requires_grad=True) as h:
        llama(ids, attention_mask=mask).logits[:, -1].sum().backward()
    assert not h.codes.values[mask == 0].any() and h.codes.values.grad[mask == 1].abs().sum() > 0


# --- generation -----------------------------------------------------------------------------------------------------

STEPS = 6


def generated(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": STEPS, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(ids, attention_mask=mask, **options)


PLACES = (None, 0, -1, 8, [2, 9, 11], slice(5, None), slice(8, 11), slice(None, None, 3))


@pytest.mark.parametrize("positions", PLACES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_generation_with_a_cache_is_generation_without(llama, mode, positions):
    """Positions count from the start of each sequence through all steps. -1 is the newest token in every pass."""
    ids, mask = padded(ids_of(8, 5), "left")
    with fusae.hook(llama, NAME, coder_of(), mode) as h:
        h.edit(**EDIT, positions=positions)
        fast = generated(llama, ids, mask)
        assert h.input.shape[:2] == (2, 1)
        if positions == -1:  # without a cache each pass would edit its newest alone, with one each stays edited
            found = ids
            for step in range(STEPS):
                h.clear()
                seen = torch.nn.functional.pad(mask, (0, step), value=1)
                newest = torch.zeros_like(seen, dtype=torch.bool)
                newest[:, ids.shape[1] - 1 :] = True
                h.edit(**EDIT, positions=newest)
                logits = llama(found, attention_mask=seen, use_cache=False).logits
                found = torch.cat([found, logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(fast, found)
        else:
            assert torch.equal(fast, generated(llama, ids, mask, use_cache=False))
    if mode == "error" and positions is None:
        assert not torch.equal(fast, generated(llama, ids, mask))


def test_masks_of_the_prompt_leave_what_is_generated(llama):
    (ids,) = ids_of(8)
    chosen = torch.zeros(1, 8, dtype=torch.bool)
    chosen[0, 3:] = True
    with fusae.hook(llama, NAME, coder_of()) as h:
        h.edit(**EDIT, positions=chosen)
        by_mask = generated(llama, ids)
        h.clear().edit(**EDIT, positions=slice(3, 8))
        assert torch.equal(generated(llama, ids), by_mask)
        with pytest.raises(ValueError, match=r"positions must be a mask of shape \[2, 8\].*repeats the batch"):
            h.clear().edit(**EDIT, positions=chosen.repeat(3, 1))
            generated(llama, ids.repeat(2, 1))


def test_a_cache_without_a_mask(llama):
    """Positions go on from the length of the cache."""
    (ids,) = ids_of(8)
    with fusae.hook(llama, NAME, coder_of()) as h:
        h.edit(**EDIT, positions=6)
        whole = llama(ids).logits
        first = llama(ids[:, :5], use_cache=True)
        second = llama(ids[:, 5:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, whole[:, 5:], atol=2e-5, rtol=1e-4)
        assert h.edited.to_dense()[1, 3] == 40.0 and h.edited.l0[0] <= 4
        with pytest.raises(ValueError, match="past_key_values: a list does not say how long it is"):
            llama(ids, past_key_values=[1])


# --- other models ---------------------------------------------------------------------------------------------------


def test_several_layers_and_an_mlp(llama):
    (ids,) = ids_of(6)
    plain = llama(ids).logits
    names = ["model.layers.0", "model.layers.1.mlp", "model.layers.0.self_attn", "model.norm"]
    hooks = [fusae.hook(llama, name, coder_of()) for name in names]
    assert torch.equal(llama(ids).logits, plain)
    hooks[1].ablate(range(M))
    assert not torch.equal(llama(ids).logits, plain)
    for h in hooks:
        h.remove()
    assert torch.equal(llama(ids).logits, plain) and type(llama) is transformers.LlamaForCausalLM


def test_an_encoder():
    model, coder = tiny_lm.bert(), coder_of()
    ids, mask = padded(ids_of(7, 4), "right")
    with torch.no_grad(), fusae.hook(model, "encoder.layer.0", coder) as h:
        plain = model(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(plain, model(ids, attention_mask=mask).last_hidden_state)
        assert not h.codes.values[mask == 0].any()


def test_an_encoder_decoder_wants_one_half():
    config = transformers.T5Config(vocab_size=64, d_model=D, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="has two sequences; pass the half"):
        fusae.hook(model, "encoder.block.0", coder_of())


def test_gradient_checkpointing():
    """A block that is computed again in the backward pass sees the batch of the forward pass."""
    ids, mask = padded(ids_of(7, 3), "left")
    offset, grads = torch.zeros(2, requires_grad=True), []
    for checkpointing in (False, True):
        model = tiny_lm.llama(2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with fusae.hook(model, NAME, coder_of()) as h:
            h.edit([3, 17], add=offset, positions=[1, -1])
            model(ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
            grads.append((offset.grad.clone(), model.model.layers[0].mlp.up_proj.weight.grad))
        offset.grad = None
    torch.testing.assert_close(grads[1], grads[0])


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(llama, kind, backend):
    """Attached before or after the model was compiled; detached, the model is the plain one again."""
    torch.compiler.reset()
    compiled, coder = torch.compile(llama, backend=backend, fullgraph=True), coder_of(kind)
    ids, mask = padded(ids_of(7, 3), "left")
    close = {"atol": 2e-5, "rtol": 1e-4}
    with torch.no_grad():
        plain = compiled(ids, attention_mask=mask).logits
        with fusae.hook(compiled, NAME, coder) as h:
            without = compiled(ids, attention_mask=mask).logits
            codes = h.codes.to_dense()
            h.edit(**EDIT, positions=[1, -1]).edit(range(M), scale=1.5)
            edited = compiled(ids, attention_mask=mask).logits
            torch.testing.assert_close(edited, llama(ids, attention_mask=mask).logits, **close)
            torch.testing.assert_close(codes, h.codes.to_dense(), **close)
        torch.testing.assert_close(without, plain, **close)
        assert (edited - plain).abs().max() > 0.01
        assert torch.equal(compiled(ids, attention_mask=mask).logits, plain)
    torch.compiler.reset()


def test_compiled_gradients(llama):
    """They reach the edits (backend aot_eager traces the backward pass as one)."""
    torch.compiler.reset()
    (ids,), grads = ids_of(6), []
    for model in (llama, torch.compile(llama, backend="aot_eager")):
        offset = torch.zeros(2, requires_grad=True)
        with fusae.hook(model, NAME, coder_of()) as h:
            h.edit([3, 17], add=offset)
            model(ids).logits.square().mean().backward()
        grads.append(offset.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=2e-5, rtol=1e-4)
    torch.compiler.reset()


def test_compiled_generation(llama):
    torch.compiler.reset()
    (ids,) = ids_of(6)
    model = tiny_lm.llama(2).requires_grad_(False)
    with fusae.hook(model, NAME, coder_of()) as h:
        h.edit(**EDIT, positions=slice(3, None))
        wanted = generated(model, ids)
        model.forward = torch.compile(model.forward, backend="eager")
        assert torch.equal(generated(model, ids), wanted)
    torch.compiler.reset()
