# SPDX-License-Identifier: Apache-2.0
"""Loss recovered and logit effects on tiny random models, against plain hook runs."""

import math

import numpy as np
import pytest
import torch

from fusae.data import TokenChunks
from fusae.eval import LossMetrics, logit_effects, loss_recovered

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the extra 'lm' is not installed")
MODULE, D, VOCABULARY = "model.layers.1", 32, 64


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=D, n_layer=3, n_head=4, n_positions=64, initializer_range=0.4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def chunks():
    return np.random.default_rng(0).integers(0, VOCABULARY, (10, 16)).astype(np.uint16)


def hooked_loss(model, chunks, module, change):
    """Cross-entropy with a forward hook that rewrites the module's output; one plain pass."""

    def hook(_module, _args, output):
        hidden = change((output[0] if isinstance(output, tuple) else output).clone())
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.get_submodule(module).register_forward_hook(hook)
    ids = torch.from_numpy(chunks.astype(np.int64))
    with torch.no_grad():
        logits = model(ids).logits
    handle.remove()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()))


def run(model, reconstruct, chunks, mean=None, module=MODULE, **options):
    mean = torch.full((D,), 0.1) if mean is None else mean
    result = loss_recovered(model, module, reconstruct, chunks, mean, **{"batch_size": 4, "progress": False, **options})
    return {**result["loss"], "kl": result["kl"], "passed_through": result["passed_through"]}


def passed(first_positions, **others):
    return {"first_positions": first_positions, "special": 0, "nonfinite": 0, "norm_outliers": 0, **others}


def test_identity_gives_the_original_loss(model, chunks):
    result = run(model, lambda x: x, chunks)
    assert result["patched"] == result["original"] and result["loss_recovered"] == 1.0
    assert result["original"] == pytest.approx(hooked_loss(model, chunks, MODULE, lambda h: h), rel=1e-6)
    assert result["tokens"] == 10 * 15
    assert result["passed_through"] == passed(20)


def test_the_mean_gives_the_mean_ablated_loss(model, chunks):
    mean = torch.linspace(-1, 1, D)
    result = run(model, lambda x: mean.expand_as(x), chunks, mean)
    assert result["patched"] == result["mean_ablated"] != result["original"]
    assert result["loss_recovered"] == 0.0


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("skip", [0, 2])
def test_patching_equals_plain_hook_runs(make, skip, chunks):
    """Also the blocks that are not computed again: GPT-2 blocks may return tuples, Llama's return tensors."""
    model = make()
    module = MODULE if make is llama else "transformer.h.1"
    mean = torch.linspace(-1, 1, D)

    def patched(hidden):
        hidden[:, skip:] = hidden[:, skip:] * 0.5 + 0.2
        return hidden

    def ablated(hidden):
        hidden[:, skip:] = mean
        return hidden

    result = run(model, lambda x: x * 0.5 + 0.2, chunks, mean, module=module, skip_positions=skip, outlier_factor=None)
    expected = {
        "original": hooked_loss(model, chunks, module, lambda h: h),
        "patched": hooked_loss(model, chunks, module, patched),
        "mean_ablated": hooked_loss(model, chunks, module, ablated),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-5), name
    assert len({round(value, 3) for value in expected.values()}) == 3
    share = (expected["mean_ablated"] - expected["patched"]) / (expected["mean_ablated"] - expected["original"])
    assert result["loss_recovered"] == pytest.approx(share, rel=1e-3)
    assert result["passed_through"]["first_positions"] == 10 * skip


@pytest.mark.parametrize("module", ["model.layers.1.mlp", "model.norm", "model.layers.0"])
def test_any_module_can_be_patched(model, chunks, module):
    result = run(model, lambda x: x * 0.5, chunks, module=module, skip_positions=0, outlier_factor=None)
    assert result["patched"] == pytest.approx(hooked_loss(model, chunks, module, lambda h: h * 0.5), rel=1e-5)


def rewritten(output, change):
    return (change(output[0].clone()), *output[1:]) if isinstance(output, tuple) else change(output.clone())


def hooked_logits(model, ids, changes, mask=None):
    """Logits with the outputs, or inputs, of some modules rewritten: ``{site: function}``; one plain pass."""
    handles = []
    for site, change in changes.items():
        module = model.get_submodule(site.removesuffix(":in"))
        if site.endswith(":in"):
            handles.append(module.register_forward_pre_hook(lambda _m, args, f=change: (f(args[0].clone()), *args[1:])))
        else:
            handles.append(module.register_forward_hook(lambda _m, _a, out, f=change: rewritten(out, f)))
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits.double()
    for handle in handles:
        handle.remove()
    return logits


def divergence(original, other, counted):
    p, q = original[:, :-1].log_softmax(-1), other[:, :-1].log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1)[counted].mean())


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("place", ["1:in", "1.mlp:in", "1"])
def test_kl_and_sites_that_are_inputs(make, place, chunks):
    model = make()
    site = ("model.layers." if make is llama else "transformer.h.") + place
    mean = torch.linspace(-1, 1, D)
    ids = torch.from_numpy(chunks.astype(np.int64))

    def halve(hidden):
        hidden[:, 2:] = hidden[:, 2:] * 0.5
        return hidden

    def ablate(hidden):
        hidden[:, 2:] = mean
        return hidden

    result = run(model, lambda x: x * 0.5, chunks, mean, module=site, outlier_factor=None)
    everywhere = torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
    original = hooked_logits(model, ids, {})
    for name, change in (("patched", halve), ("mean_ablated", ablate)):
        logits = hooked_logits(model, ids, {site: change})
        assert result["kl"][name] == pytest.approx(divergence(original, logits, everywhere), rel=1e-4)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert result[name] == pytest.approx(float(loss), rel=1e-5)
    assert result["kl"]["kl_recovered"] == 1 - result["kl"]["patched"] / result["kl"]["mean_ablated"] < 1


def test_several_sites_are_given_their_part(model, chunks):
    sites = ["model.layers.0.mlp", "model.layers.2.mlp:in"]
    ids = torch.from_numpy(chunks.astype(np.int64))
    scale = torch.cat([torch.full((D,), 0.5), torch.full((D,), -2.0)])
    seen = []

    def reconstruct(x):
        seen.append(x)
        return x * scale

    result = run(model, reconstruct, chunks, torch.zeros(2 * D), module=sites, skip_positions=0, outlier_factor=None)
    rows = {}
    original = hooked_logits(model, ids, {site: lambda h, site=site: rows.setdefault(site, h) for site in sites})
    torch.testing.assert_close(torch.cat(seen), torch.cat([rows[site].flatten(0, 1) for site in sites], -1))
    # Each site's rows are those of the original pass, also behind the first one.
    changes = {sites[0]: lambda h: h * 0.5, sites[1]: lambda h: rows[sites[1]] * -2.0}
    logits = hooked_logits(model, ids, changes)
    everywhere = torch.ones(10, 15, dtype=torch.bool)
    assert result["kl"]["patched"] == pytest.approx(divergence(original, logits, everywhere), rel=1e-4)


def test_the_input_of_a_transcoder_keeps_its_value(model, chunks):
    sites, scale = ["model.layers.1.mlp:in", "model.layers.1.mlp"], torch.rand(D, D)
    mean = torch.linspace(-1, 1, D)
    ids = torch.from_numpy(chunks.astype(np.int64))
    options = {"module": sites, "skip_positions": 0, "outlier_factor": None, "keep": D}
    result = run(model, lambda x: x[:, :D] @ scale, chunks, mean, **options)
    seen = {}
    original = hooked_logits(model, ids, {sites[0]: lambda h: seen.setdefault("x", h)})
    everywhere = torch.ones(10, 15, dtype=torch.bool)
    for name, value in (("patched", seen["x"] @ scale), ("mean_ablated", mean.expand(10, 16, D))):
        logits = hooked_logits(model, ids, {sites[1]: lambda h, value=value: value})
        assert result["kl"][name] == pytest.approx(divergence(original, logits, everywhere), rel=1e-4), name
    with pytest.raises(ValueError, match=r"mean must have shape \[32\], got \[64\]"):
        run(model, lambda x: x, chunks, torch.zeros(2 * D), **options)


def test_tokens_that_are_ruled_out_add_nothing():
    logits = torch.tensor([[[0.0, 1.0, -math.inf], [0.0, 0.0, -math.inf]]])
    other = torch.tensor([[[1.0, 0.0, -math.inf], [0.0, 0.0, -math.inf]]])
    ids, counted = torch.tensor([[0, 1]]), torch.ones(1, 1, dtype=torch.bool)
    metrics = LossMetrics()
    for name, value in zip(LossMetrics.NAMES, (logits, other, logits), strict=True):
        metrics.update(name, value, logits, ids, counted)
    p = torch.tensor([0.0, 1.0]).softmax(0)
    assert metrics.result()["kl"]["patched"] == pytest.approx(float(p[1] - p[0]), rel=1e-6)


def test_padding_and_special_tokens_do_not_count(model, chunks):
    lengths = np.array([16, 3, 9, 16, 2, 7, 16, 5, 16, 11], dtype=np.int32)
    ids = chunks.copy()
    ids[:, 0] = 63
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = 62
    ids[2, 4] = 63  # a special token within a chunk
    padded = TokenChunks(ids, lengths, pad_id=62, special=(62, 63))
    result = run(model, lambda x: x * 0.5, padded, skip_positions=1, outlier_factor=None, drop_special=True)
    # The 63s that are there by chance besides position 0 and that one.
    inner = [(r, c) for r in range(10) for c in range(1, lengths[r]) if ids[r, c] in (62, 63)]
    assert result["passed_through"] == passed(10, special=len(inner))
    assert result["tokens"] == lengths.sum() - 10 - len(inner)

    total = dict.fromkeys(("original", "patched", "kl"), 0.0)
    for row, length in zip(ids, lengths, strict=True):
        one = torch.from_numpy(row[None, :length].astype(np.int64))
        special = torch.isin(one[0], torch.tensor([62, 63]))

        def halve(hidden, special=special):
            hidden[:, ~special] *= 0.5
            return hidden

        original, patched = hooked_logits(model, one, {}), hooked_logits(model, one, {MODULE: halve})
        counted = ~special[None, 1:]
        for name, logits in (("original", original), ("patched", patched)):
            total[name] += float(
                torch.nn.functional.cross_entropy(logits[:, :-1][counted], one[:, 1:][counted], reduction="sum")
            )
        if counted.any():
            total["kl"] += divergence(original, patched, counted) * int(counted.sum())
    for name in ("original", "patched"):
        assert result[name] == pytest.approx(total[name] / result["tokens"], rel=1e-5), name
    assert result["kl"]["patched"] == pytest.approx(total["kl"] / result["tokens"], rel=1e-4)


def test_loss_metrics_merge():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (4, 6), generator=g)
    logits = {name: torch.randn(4, 6, 9, generator=g) for name in LossMetrics.NAMES}
    counted = torch.rand(4, 5, generator=g) > 0.3

    def of(rows):
        metrics = LossMetrics()
        for name, value in logits.items():
            metrics.update(name, value[rows], logits["original"][rows], ids[rows], counted[rows])
        return metrics

    whole, merged = of(slice(0, 4)).result(), of(slice(0, 1)).merge(of(slice(1, 4))).result()
    assert whole["loss"] == pytest.approx(merged["loss"], rel=1e-12) and whole["loss"]["tokens"] == int(counted.sum())
    assert whole["kl"] == pytest.approx(merged["kl"], rel=1e-12)
    with pytest.raises(ValueError, match="no prediction was counted"):
        LossMetrics().result()


def test_an_encoder_has_no_loss(chunks):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    for kind in (transformers.BertModel, transformers.BertForMaskedLM):
        model = kind(config).eval()
        with pytest.raises(ValueError, match=f"model: {kind.__name__} is no causal language model, so there is no los"):
            run(model, lambda x: x, chunks, module="encoder.layer.0")


def test_outliers_pass_through_and_are_counted(chunks):
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 1000.0
    sinks = chunks[:, 2:] == 7
    seen = []

    def reconstruct(x):
        seen.append(x.norm(dim=1).max().item())
        return torch.zeros_like(x)

    result = run(model, reconstruct, chunks)
    assert result["passed_through"]["norm_outliers"] == sinks.sum() > 0
    limit = 3.0 * max(seen)
    assert run(model, reconstruct, chunks, norm_limit=limit)["passed_through"] == result["passed_through"]
    everything = run(model, reconstruct, chunks, outlier_factor=None)
    assert everything["passed_through"]["norm_outliers"] == 0 and max(seen) > limit


def test_blocks_before_the_module_run_once(model, chunks):
    calls = {name: 0 for name in ("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp")}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
        for name in calls
    ]
    run(model, lambda x: x, chunks, batch_size=10)
    for handle in handles:
        handle.remove()
    assert list(calls.values()) == [1, 1, 3]


def test_the_model_is_left_as_it_was(model, chunks):
    model = llama().train()

    def fail(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, fail, chunks)
    run(model, lambda x: x * 0.0, chunks)
    assert model.training and all(m.training for m in model.modules())
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in model.modules())


def test_no_effect_is_nan(model, chunks):
    result = run(model, lambda x: x, chunks[:1, :2], skip_positions=1, outlier_factor=None)
    # one prediction, made at position 0, which is passed through: ablation changes nothing
    assert result["original"] == result["mean_ablated"] and math.isnan(result["loss_recovered"])


def test_errors(model, chunks):
    for options, error, says in (
        ({"module": "model.layers.9"}, ValueError, "no submodule 'model.layers.9'"),
        ({"mean": torch.zeros(D + 1)}, ValueError, "mean must have shape .32."),
        ({"reconstruct": lambda x: x[:, :3]}, ValueError, "reconstruct must return a tensor of the shape it got"),
        ({"reconstruct": lambda x: x * math.nan}, ValueError, "reconstruct returned NaN"),
        ({"chunks": chunks[:, :1], "skip_positions": 0}, ValueError, "at least 2 positions"),
        ({"chunks": chunks.tolist()}, TypeError, "chunks must be an integer array"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ):
        arguments = {"model": model, "reconstruct": lambda x: x, "chunks": chunks, **options}
        with pytest.raises(error, match=says):
            run(**arguments)


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    tok.decoder = tokenizers.decoders.ByteLevel()
    return tok


@pytest.mark.parametrize("make", [llama, gpt2])
def test_logit_effects(make, tokenizer):
    model = make()
    norm = model.model.norm if make is llama else model.transformer.ln_f
    with torch.no_grad():
        norm.weight.uniform_(-1.0, 2.0)
    rows = torch.randn(3, D)
    effects = logit_effects(model, tokenizer, rows, top=5)
    centred = rows if make is llama else rows - rows.mean(1, keepdim=True)
    logits = (centred * norm.weight) @ model.lm_head.weight.T
    text = [tokenizer.decode([i]) for i in range(VOCABULARY)]
    for effect, logit in zip(effects, logits, strict=True):
        order = logit.argsort(descending=True).tolist()
        for name, tokens in (("promoted", order[:5]), ("suppressed", order[: -5 - 1 : -1])):
            assert effect[name] == [text[i] for i in tokens]
            torch.testing.assert_close(torch.tensor(effect[f"{name}_values"]), logit[tokens])
        assert len(effect) == 4
    others = torch.randn(40, D) + 0.5
    centred_others = others if make is llama else others - others.mean(1, keepdim=True)
    usual = (centred_others * norm.weight) @ model.lm_head.weight.T
    effects = logit_effects(model, tokenizer, rows, top=5, background=others)
    unusual = (logits - usual.mean(0)) / usual.std(0, correction=0)
    assert [e["promoted"] for e in effects] == [[text[i] for i in row.topk(5).indices] for row in unusual]
    assert [e["suppressed"] for e in effects] == [[text[i] for i in (-row).topk(5).indices] for row in unusual]
    assert (unusual.argsort(1) != logits.argsort(1)).any()
    with pytest.raises(ValueError, match="decoder_rows must have shape .r, 32."):
        logit_effects(model, tokenizer, rows.T)
    with pytest.raises(ValueError, match="background must have shape .m, 32."):
        logit_effects(model, tokenizer, rows, background=rows.T)
