# SPDX-License-Identifier: Apache-2.0
"""circuit-tracer's cross-layer transcoders and whole attribution graphs, with fusae and without."""

import copy

import pytest
import torch

import fusae
from fusae.testing.compare import assert_equal, assert_within_budget

pytest.importorskip("circuit_tracer", reason="circuit-tracer is not installed (from source, see docs/integrations.md)")
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK  # noqa: E402
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt  # noqa: E402
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet  # noqa: E402

from fusae.integrations import _attribution  # noqa: E402
from fusae.integrations import circuit_tracer as adapter  # noqa: E402

N, D, M, LAYERS = 40, 16, 192, 3


@pytest.fixture(params=["fused", "blocks"])
def route(request, monkeypatch):
    """Both ways to make codes, whatever is faster here."""
    monkeypatch.setattr(adapter, "fuses", lambda x, n: request.param == "fused")
    monkeypatch.setattr(adapter, "mostly_zero", lambda f: True)
    return request.param


def _clt(kind, dtype=torch.float32, skip=False):
    coder = CrossLayerTranscoder(LAYERS, M, D, kind, skip_connection=skip, lazy_decoder=False, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in coder.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 4)
        coder.b_enc -= 1.2
        if kind == "jump_relu":
            coder.activation_function.threshold.abs_()
    return coder


def _inputs(n=N, dtype=torch.float32):
    return torch.randn(LAYERS, n, D, generator=torch.Generator().manual_seed(9)).to(dtype)


def _three(theirs):
    """Accelerated, untouched, in float64."""
    return fusae.accelerate(copy.deepcopy(theirs)), theirs, copy.deepcopy(theirs).double()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["relu", "jump_relu"])
def test_cross_layer_equal_to_the_tool(kind, dtype, skip, route):
    coders, x = _three(_clt(kind, dtype, skip)), _inputs(dtype=dtype)
    with torch.no_grad():
        acts = [c.encode(x.to(c.dtype)) for c in coders]
        assert_within_budget(*acts, "encode")
        assert_within_budget(*(c.encode_layer(x[None, 1].to(c.dtype), 1) for c in coders), "encode_layer")
        pre = [c.encode_layer(x[1].to(c.dtype), 1, apply_activation_function=False) for c in coders]
        assert_equal(*pre[:2])
        for given in (lambda f: f, lambda f: f.to_sparse()):
            decoded = [c.decode(given(acts[1].to(c.dtype)), x.to(c.dtype)) for c in coders]
            assert_within_budget(*decoded, "decode")
        if not skip:  # with a skip connection the tool's own forward fails
            assert_within_budget(*(c(x.to(c.dtype)) for c in coders), "forward")
        ours, theirs, oracle = (c.compute_attribution_components(x.to(c.dtype), slice(0, 2)) for c in coders)
    assert list(ours) == list(theirs) and ours["activation_matrix"].is_coalesced()
    dense = [parts["activation_matrix"].to_dense() for parts in (ours, theirs, oracle)]
    assert_within_budget(*dense, "activations")
    assert_within_budget(*(parts["reconstruction"] for parts in (ours, theirs, oracle)), "reconstruction")
    if dtype == torch.float32:
        assert_equal(ours["activation_matrix"].indices(), theirs["activation_matrix"].indices())
        for name in ("encoder_vecs", "encoder_to_decoder_map", "decoder_locations"):
            assert_equal(ours[name], theirs[name], name)
        assert_within_budget(*(parts["decoder_vecs"] for parts in (ours, theirs, oracle)), "decoder_vecs")


def test_cross_layer_from_a_file(tmp_path, route):
    theirs = _clt("jump_relu")
    theirs.to_safetensors(str(tmp_path))
    lazy = load_clt(str(tmp_path), dtype=torch.float32, lazy_encoder=True, lazy_decoder=True)
    assert fusae.accelerate(lazy) is lazy and lazy.W_dec is None
    with torch.no_grad():
        for call in (lambda c: c(_inputs()), lambda c: c.compute_attribution_components(_inputs())["decoder_vecs"]):
            torch.testing.assert_close(call(lazy), call(theirs))


def test_cross_layer_weights_of_any_strides(route):
    """As the tool's loader of Gemma Scope 2 leaves them."""
    theirs = _clt("jump_relu")
    for layer, W in enumerate(theirs.W_dec):
        whole = torch.randn(M, LAYERS, D)
        whole[:, layer:] = W.data
        W.data = whole[:, layer:]
    coders = _three(theirs.requires_grad_(False))
    assert not coders[1].W_dec[1].is_contiguous()
    assert_within_budget(*(c(_inputs(dtype=c.dtype)) for c in coders))


def test_cross_layer_gradients_are_the_tools(route):
    ours, theirs, _ = _three(_clt("relu"))
    grads = []
    for c in (ours, theirs):
        x = _inputs().requires_grad_()
        c(x).square().sum().backward()
        grads.append((x.grad, c.W_enc.grad, *(W.grad for W in c.W_dec)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_nothing_active_at_the_last_position(route):
    """The tool then gives fewer positions; so it does here."""
    x = _inputs()
    ours, theirs, _ = _three(_clt("relu"))
    with torch.no_grad():
        features = theirs.encode(x)
        features[:, -3:] = 0
        assert ours.decode(features).shape == theirs.decode(features).shape == (LAYERS, N - 3, D)
        with pytest.raises(ValueError, match="non-empty list"):
            theirs.compute_attribution_components(x, slice(0, N))
        with pytest.raises(ValueError, match="non-empty list"):
            ours.compute_attribution_components(x, slice(0, N))


@pytest.mark.parametrize("ordered", [True, False])
def test_position_scores(ordered):
    g = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 7, (60,), generator=g)
    locations = torch.stack([torch.randint(0, 2, (60,), generator=g), positions])
    if ordered:  # as of per-layer transcoders
        order = (locations[0] * 7 + positions).argsort()
        locations = locations[:, order]
    vectors, grads = torch.randn(60, D, generator=g), torch.randn(5, 7, D, generator=g)
    seen = 0
    for layer in range(3):
        entries, counts = _attribution._entries(locations, layer)
        wanted = (locations[0] == layer).nonzero().squeeze(1)
        if not counts:
            assert wanted.numel() == 0
            continue
        assert isinstance(entries, slice) == ordered
        chosen = torch.arange(60)[entries]
        assert torch.equal(chosen.sort().values, wanted)
        scores = _attribution.position_scores(grads, vectors[entries], counts)
        exact = torch.einsum("bpd,pd->pb", grads[:, locations[1, chosen]].double(), vectors[chosen].double())
        assert_within_budget(scores, exact.float(), exact)
        seen += len(chosen)
    assert seen == 60


@pytest.fixture
def tokenizer(monkeypatch):
    """A tokenizer of this process, for the model that is made of random weights."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")

    def from_pretrained(name="made-up", **options):
        words = tokenizers.models.WordLevel({f"w{i}": i for i in range(16)}, unk_token="w1")
        special = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "w0")
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), **special)
        made.init_kwargs["name_or_path"] = name
        return made

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)


def _model(dictionary):
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from transformer_lens import HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=LAYERS, d_model=D, n_ctx=32, d_head=8, n_heads=2, d_mlp=32, act_fn="gelu", d_vocab=16, seed=0,
        model_name="made-up", normalization_type="RMS", tokenizer_name="gpt2", device="cpu", gated_mlp=True,
        positional_embedding_type="rotary", rotary_dim=8, final_rms=True, default_prepend_bos=False,
    )  # fmt: skip
    model = TransformerLensReplacementModel.from_config(config, dictionary)
    g = torch.Generator().manual_seed(4)
    parts = {id(p) for p in model.transcoders.parameters()}
    for p in model.parameters():
        if id(p) not in parts:
            p.data.copy_(torch.rand(p.shape, generator=g) - 0.5)
    return model


def _dictionary(kind):
    if kind.startswith("clt"):
        clt = _clt(kind.removeprefix("clt "))
        clt.b_enc.data += float(kind == "clt jump_relu")
        clt.feature_input_hook, clt.feature_output_hook = "mlp.hook_in", "mlp.hook_out"
        return clt
    coders = {}
    for layer in range(LAYERS):
        act = {"relu": torch.relu, "topk": TopK(4), "jumprelu": JumpReLU(torch.full((M,), 0.5), 0.1)}[kind]
        coder = SingleLayerTranscoder(D, M, act, layer, skip_connection=kind == "topk", dtype=torch.float32)
        for p in coder.parameters():
            if p.ndim > 0 and p is not getattr(act, "threshold", None):
                p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(layer)) / 4)
        coder.b_enc.data -= float(kind != "jumprelu")  # few latents are active
        coders[layer] = coder
    return TranscoderSet(coders, feature_input_hook="mlp.hook_in", feature_output_hook="mlp.hook_out")


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "clt relu", "clt jump_relu"])
def test_attribution_graphs_and_interventions(kind, route, tokenizer, monkeypatch):
    from circuit_tracer.attribution.attribute import attribute

    model, tokens = _model(_dictionary(kind)), torch.tensor([0, 3, 4, 3, 2, 5, 3, 8])
    kept = model.state_dict().keys()

    def results():
        graph = attribute(tokens, model, batch_size=64, verbose=False)
        layer, position, latent = graph.active_features[len(graph.active_features) // 2].tolist()
        logits, acts = model.feature_intervention(tokens, [(layer, position, latent, 3.0)])
        sparse = model.get_activations(tokens, sparse=True)[1]
        return graph, logits, acts.to_dense(), sparse.to_dense()

    untouched, calls = results(), []
    scores = _attribution.position_scores
    monkeypatch.setattr(_attribution, "position_scores", lambda *args: calls.append(args) or scores(*args))
    assert fusae.accelerate(model) is model and model.state_dict().keys() == kept
    ours = results()
    assert calls and "TransformerLensReplacementModel on fusae: setup_attribution" in fusae.explain(model)
    assert_equal(ours[0].active_features, untouched[0].active_features)
    a, b = ours[0].adjacency_matrix, untouched[0].adjacency_matrix
    assert a.count_nonzero() > 100
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    for one, other in zip(ours[1:], untouched[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    fusae.restore(model)
    assert_equal(results()[0].adjacency_matrix, b)
