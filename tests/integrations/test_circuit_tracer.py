# SPDX-License-Identifier: Apache-2.0
"""circuit-tracer's per-layer transcoders on fusae: equal to the untouched tool."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fusae
from fusae.testing.compare import assert_equal, assert_grads, assert_within_budget

pytest.importorskip("circuit_tracer", reason="circuit-tracer is not installed (from source, see docs/integrations.md)")
from circuit_tracer.transcoder import activation_functions as functions  # noqa: E402
from circuit_tracer.transcoder import single_layer_transcoder as tool  # noqa: E402
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet  # noqa: E402

from fusae.integrations import circuit_tracer as adapter  # noqa: E402

N, D, M, LAYERS = 40, 16, 192, 3
KINDS = ["relu", "jumprelu", "topk"]


def _activation(kind, dtype=torch.float32):
    if kind == "relu":
        return F.relu
    if kind == "topk":
        return functions.TopK(5)
    threshold = 0.5 + torch.rand(M, generator=torch.Generator().manual_seed(3))
    return functions.JumpReLU(threshold.to(dtype), 0.1)


def _transcoder(kind, dtype=torch.float32, skip=False, layer=0):
    coder = SingleLayerTranscoder(D, M, _activation(kind, dtype), layer, skip_connection=skip, dtype=dtype)
    g = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", *(("W_skip",) if skip else ())):
            p = getattr(coder, name)
            p.copy_(torch.randn(p.shape, generator=g) / 4)
        coder.b_enc -= 1.2  # few latents are active
    return coder


def _set(kind, **options):
    coders = {i: _transcoder(kind, layer=i, **options) for i in range(LAYERS)}
    return TranscoderSet(coders, feature_input_hook="mlp.hook_in", feature_output_hook="mlp.hook_out")


def _inputs(dtype=torch.float32, n=N):
    return torch.randn(LAYERS, n, D, generator=torch.Generator().manual_seed(9)).to(dtype)


def _double(module):
    return copy.deepcopy(module).double()


@pytest.fixture(params=["fused", "blocks"])
def route(request, monkeypatch):
    """Both ways to make codes, whatever is faster here."""
    monkeypatch.setattr(adapter, "fuses", lambda x, n: request.param == "fused")
    return request.param


def _same_parts(actual, tools, oracle):
    assert list(actual) == list(tools)
    found, wanted = actual["activation_matrix"], tools["activation_matrix"]
    assert found.is_coalesced() and found.layout == torch.sparse_coo and found.shape == wanted.shape
    assert_within_budget(found.to_dense(), wanted.to_dense(), oracle["activation_matrix"].to_dense(), "activations")
    assert_within_budget(actual["reconstruction"], tools["reconstruction"], oracle["reconstruction"], "reconstruction")
    if wanted.dtype != torch.float32:  # the same latents, but for those within a rounding of their threshold
        return
    assert_equal(found.indices(), wanted.indices())
    for name in ("encoder_vecs", "encoder_to_decoder_map", "decoder_locations"):
        assert_equal(actual[name], tools[name], name)
    assert_within_budget(actual["decoder_vecs"], tools["decoder_vecs"], oracle["decoder_vecs"], "decoder_vecs")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_tool(kind, dtype, skip, route):
    theirs = _set(kind, dtype=dtype, skip=skip)
    ours, oracle, x = fusae.accelerate(copy.deepcopy(theirs)), _double(theirs), _inputs(dtype)
    with torch.no_grad():
        for zero in (slice(0, 1), slice(0, 4), slice(0, 0)):
            parts = [c.compute_attribution_components(x.to(c[0].dtype), zero) for c in (ours, theirs, oracle)]
            _same_parts(*parts)
        acts = [c.encode(x.to(c[0].dtype)) for c in (ours, theirs, oracle)]
        assert_within_budget(*acts, "encode")
        wanted = [c.decode(acts[1].to(c[0].dtype), x.to(c[0].dtype)) for c in (ours, theirs, oracle)]
        assert_within_budget(*wanted, "decode")
        assert_within_budget(*(c[1](x[1].to(c[1].dtype)) for c in (ours, theirs, oracle)), "forward")
        pre = ours.encode_layer(x[0], 0, apply_activation_function=False)
        assert_equal(pre, theirs.encode_layer(x[0], 0, apply_activation_function=False))


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_encode_and_decode_sparse(kind, route):
    theirs = _transcoder(kind, skip=True)
    ours, x = fusae.accelerate(copy.deepcopy(theirs)), _inputs()[0]
    with torch.no_grad():
        (a, rows), (b, wanted) = ours.encode_sparse(x), theirs.encode_sparse(x)
        assert a.is_coalesced() and a.indices().dtype == torch.int64 and a.shape == b.shape
        assert_equal(a.indices(), b.indices())
        assert_equal(rows, wanted)
        for one, other in zip(ours.decode_sparse(b, x), theirs.decode_sparse(b, x), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_positions(n, route):
    """The only position is zeroed: no latent is active at all."""
    theirs = _set("jumprelu")
    ours, x = fusae.accelerate(copy.deepcopy(theirs)), _inputs(n=2)[:, :n]
    with torch.no_grad():
        _same_parts(*(c.compute_attribution_components(x) for c in (ours, theirs, theirs)))


class _Largest(TorchDispatchMode):
    """The most elements that any op returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                self.size = max(self.size, t.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_activations(kind, route):
    n, sizes = 400, []
    for fast in (False, True):
        coders = _set(kind)
        for c in coders:
            c.b_enc.data -= 1.5
            c.activation_function = functions.TopK(1) if kind == "topk" else c.activation_function
        with torch.no_grad(), _Largest() as largest:
            (fusae.accelerate(coders) if fast else coders).compute_attribution_components(_inputs(n=n))
        sizes.append(largest.size)
    assert sizes[0] == n * M and sizes[1] < n * M / 2


def test_decode_has_the_gradients_of_the_dense_product():
    """Those of latents that are off as well, and of edited activations."""
    theirs = _transcoder("jumprelu")
    ours, oracle, x = fusae.accelerate(copy.deepcopy(theirs)), _double(theirs), _inputs()[0]
    out = []
    for coder in (ours, theirs, oracle):
        acts = coder.encode(x.to(coder.dtype)).detach()
        acts[3, 7], acts[4, :] = -2.5, 0  # a latent that was off; all of a row
        acts.requires_grad_()
        y = coder.decode(acts)
        y.square().sum().backward()
        out.append((y, acts.grad, coder.W_dec.grad, coder.b_dec.grad[None]))
    assert out[0][1].count_nonzero() > 0.9 * N * M
    for parts in zip(*out, strict=True):
        assert_grads(*parts)


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_gradient_is_wanted_the_tools_encoder_runs(kind, route):
    theirs = _transcoder(kind)
    ours, x = fusae.accelerate(copy.deepcopy(theirs)), _inputs()[0].requires_grad_()
    for one, other in ((ours, theirs),):
        a, b = (torch.autograd.grad(c.encode(x).square().sum(), (x, c.W_enc, c.b_enc)) for c in (one, other))
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    if kind == "jumprelu":
        grads = [torch.autograd.grad(c.encode(x).sum(), c.activation_function.threshold) for c in (ours, theirs)]
        assert torch.equal(*(g[0] for g in grads)) and grads[0][0].any()
    with torch.no_grad():
        assert_within_budget(ours.encode(x), theirs.encode(x), _double(theirs).encode(x.double()))


def test_transforms_are_the_tools(route):
    theirs = _transcoder("relu").requires_grad_(False)
    ours, x = fusae.accelerate(copy.deepcopy(theirs)), _inputs(n=3)[0]
    assert torch.equal(torch.func.jacrev(ours)(x), torch.func.jacrev(theirs)(x))
    for one, other in zip(*(torch.func.jvp(c, (x,), (x,)) for c in (ours, theirs)), strict=True):
        assert torch.equal(one, other)


def test_a_watched_activation_function_runs(route):
    theirs = _transcoder("jumprelu").requires_grad_(False)
    ours, x, seen = fusae.accelerate(copy.deepcopy(theirs)), _inputs()[0], []
    handle = ours.activation_function.register_forward_hook(lambda m, args, out: seen.append(args[0]) or out * 2)
    for method in ("encode", "encode_sparse"):
        getattr(ours, method)(x)
    assert len(seen) == 2
    assert_equal(seen[0], theirs.encode(x, apply_activation_function=False))
    assert_equal(ours.encode(x), theirs.encode(x) * 2)
    handle.remove()
    ours.activation_function = torch.nn.Tanh()
    assert_equal(ours.encode(x), torch.tanh(seen[0]))


def test_autocast_is_the_tools(route):
    theirs = _transcoder("jumprelu").requires_grad_(False)
    ours, x = fusae.accelerate(copy.deepcopy(theirs)), _inputs()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        acts, wanted = ours.encode(x), theirs.encode(x)
        assert_equal(acts, wanted)
        y, target = ours.decode(wanted.float()), theirs.decode(wanted.float())
    assert y.dtype == target.dtype == torch.float32
    torch.testing.assert_close(y, target, atol=2e-2, rtol=2e-2)


def test_weights_may_change_at_any_time(route):
    theirs = _set("jumprelu").requires_grad_(False)
    ours, x = fusae.accelerate(copy.deepcopy(theirs)), _inputs()

    def scaled(c):
        c.W_dec.data.mul_(2), c.W_enc.data.mul_(1.5)

    def replaced(c):
        c.W_enc, c.W_dec = (torch.nn.Parameter(W.flip(0), requires_grad=False) for W in (c.W_enc, c.W_dec))

    def sliced(c):
        for name in ("W_enc", "W_dec", "b_enc"):
            setattr(c, name, torch.nn.Parameter(getattr(c, name)[: M // 2].clone(), requires_grad=False))
        c.activation_function.threshold = torch.nn.Parameter(c.activation_function.threshold[: M // 2])
        c.activation_function.requires_grad_(False)

    def lower(c):
        c.to(torch.bfloat16).to(torch.float32)

    for change in (scaled, replaced, lower, sliced):
        for coders in (ours, theirs):
            for c in coders:
                change(c)
        _same_parts(*(c.compute_attribution_components(x) for c in (ours, theirs, _double(theirs))))
        assert_within_budget(*(c(x[0].to(c.dtype)) for c in (ours[0], theirs[0], _double(theirs[0]))))


def test_checkpoints_and_copies(tmp_path):
    theirs = _set("jumprelu")
    ours = fusae.accelerate(copy.deepcopy(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.to_safetensors(str(tmp_path))
    loaded = tool.load_transcoder_set(
        {i: str(tmp_path / f"layer_{i}.safetensors") for i in range(LAYERS)}, "scan", "a", "b"
    )
    assert type(loaded) is TranscoderSet
    for one, other in zip(loaded, theirs, strict=True):
        assert torch.equal(one.W_enc, other.W_enc) and torch.equal(one.b_dec, other.b_dec)
    twin = copy.deepcopy(ours)
    assert type(twin[0]) is type(ours[0]) and twin[0].W_enc is not ours[0].W_enc
    assert type(fusae.restore(twin)) is TranscoderSet and type(twin[0]) is SingleLayerTranscoder


@pytest.mark.parametrize("lazy", [(True, True), (True, False), (False, True)])
def test_lazy_weights(lazy, tmp_path, route, monkeypatch):
    theirs = _set("jumprelu", skip=True)
    theirs.to_safetensors(str(tmp_path))
    paths = {i: str(tmp_path / f"layer_{i}.safetensors") for i in range(LAYERS)}
    ours = tool.load_transcoder_set(paths, "scan", "a", "b", lazy_encoder=lazy[0], lazy_decoder=lazy[1])
    fusae.accelerate(ours)
    x = _inputs()
    reads = []
    read = SingleLayerTranscoder._get_decoder_vectors
    monkeypatch.setattr(
        SingleLayerTranscoder, "_get_decoder_vectors", lambda c, ids=None: reads.append(ids) or read(c, ids)
    )
    with torch.no_grad():
        parts = ours.compute_attribution_components(x)
        if lazy[1]:
            assert len(reads) == LAYERS and all(len(ids) == len(ids.unique()) for ids in reads)
        _same_parts(parts, *(c.compute_attribution_components(x.to(c[0].dtype)) for c in (theirs, _double(theirs))))
        acts = theirs.encode(x)
        decoded = (c.decode(acts.to(c[0].dtype), x.to(c[0].dtype)) for c in (ours, theirs, _double(theirs)))
        assert_within_budget(*decoded)


def test_inference_mode_and_any_leading_dimensions(route):
    theirs = _transcoder("jumprelu")
    ours = fusae.accelerate(copy.deepcopy(theirs))
    with torch.inference_mode():
        for shape in ((D,), (1, D), (0, D), (2, 5, D)):
            x = torch.randn(shape)
            torch.testing.assert_close(ours.encode(x), theirs.encode(x))
            torch.testing.assert_close(ours(x), theirs(x))


def test_what_fails_in_the_tool_fails_as_well(route):
    theirs = _transcoder("relu", skip=True).requires_grad_(False)
    ours = fusae.accelerate(copy.deepcopy(theirs))
    x, acts = _inputs()[0], torch.zeros(2, M)
    calls = (
        lambda c: c.encode(x[:, 1:]),
        lambda c: c.encode_sparse(_inputs()),
        lambda c: c.decode(acts),
        lambda c: c.decode(acts.double(), x[:2]),
        lambda c: c.decode(acts[:, 1:], x[:2]),
        lambda c: c.decode_sparse(acts.to_sparse()),
    )
    for call in calls:
        errors = []
        for coder in (ours, theirs):
            with pytest.raises((RuntimeError, ValueError, AssertionError)) as error:
                call(coder)
            errors.append(error.type)
        assert issubclass(errors[0], errors[1]) or errors[1] is RuntimeError


def test_what_is_left_alone_and_why():
    with pytest.raises(fusae.integrations.SwapError, match="must be ReLU, JumpReLU or TopK, got <built-in"):
        fusae.accelerate(SingleLayerTranscoder(D, M, torch.tanh, 0))
    lines = fusae.explain(fusae.accelerate(_set("jumprelu"))).splitlines()
    assert lines[0] == "(model): TranscoderSet on fusae: compute_attribution_components (gradients 'correct')"
    assert len(lines) == 1 + LAYERS and all("encode, decode, encode_sparse, decode_sparse" in s for s in lines[1:])


def test_a_set_with_a_stranger_asks_every_transcoder():
    class Own(SingleLayerTranscoder):
        def encode_sparse(self, input_acts, zero_positions=slice(0, 1)):
            return super().encode_sparse(input_acts * 0 + 1, zero_positions)

    coders = _set("relu")
    coders.transcoders[1].__class__ = Own
    theirs = copy.deepcopy(coders)
    fusae.accelerate(coders)
    assert type(coders[1]) is Own and type(coders[0]) is not SingleLayerTranscoder
    with torch.no_grad():
        _same_parts(*(c.compute_attribution_components(_inputs()) for c in (coders, theirs, theirs)))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device_is_left_to_the_tool(kind):
    coder, x = fusae.accelerate(_transcoder(kind).to("meta")), torch.empty(N, D, device="meta")
    assert coder.encode(x).shape == (N, M) and coder.decode(coder.encode(x)).shape == (N, D)
