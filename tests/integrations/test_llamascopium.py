# SPDX-License-Identifier: Apache-2.0
"""llamascopium's dictionaries on fusae: equal to the untouched tool."""

import copy

import pytest
import torch

import fusae
from fusae.testing.compare import assert_equal, assert_grads, assert_within_budget

pytest.importorskip("llamascopium", reason="llamascopium is not installed (see docs/integrations.md)")
from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder  # noqa: E402
from llamascopium.models.crosscoder import Crosscoder, CrosscoderConfig  # noqa: E402
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder  # noqa: E402

from fusae.integrations import llamascopium as adapter  # noqa: E402

N, D, M, K = 40, 16, 192, 5
ACTS = ["relu", "jumprelu", "topk", "batchtopk"]


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Fused also where the tool's own is faster."""
    monkeypatch.setattr(adapter, "fuses", lambda x, n: True)
    monkeypatch.setattr(adapter, "mostly_zero", lambda f: True)


def _fill(model, shift=-1.2):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 4)
            if name == "b_E":
                p += shift  # few latents are active
    return model


def _sae(act="topk", dtype=torch.float32, by_norm=True, **options):
    config = SAEConfig(
        hook_point_in="in", hook_point_out="out", d_model=D, expansion_factor=M / D, act_fn=act, top_k=K,
        sparsity_include_decoder_norm=by_norm, device="cpu", dtype=dtype, **options,
    )  # fmt: skip
    return _fill(SparseAutoEncoder(config))


def _x(*shape, dtype=torch.float32, seed=2):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _double(model):
    twin = copy.deepcopy(model).double()
    if hasattr(twin.activation_function, "dtype"):
        twin.activation_function.dtype = torch.float64
    return twin


def _three(theirs):
    """Accelerated, untouched, in float64."""
    return fusae.accelerate(copy.deepcopy(theirs)), theirs, _double(theirs)


def _budget(coders, method, x):
    assert_within_budget(*(getattr(c, method)(x.to(c.W_E.dtype)) for c in coders), method)


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTS)
def test_sae_equal_to_the_tool(act, dtype, by_norm, monkeypatch):
    coders, calls = _three(_sae(act, dtype, by_norm)), []
    dense = adapter.dense_of
    monkeypatch.setattr(adapter, "dense_of", lambda *args: calls.append(args) or dense(*args))
    with torch.no_grad():
        for shape in ((N,), (4, 10)):
            x = _x(*shape, dtype=dtype)
            _budget(coders, "encode", x)
            f = coders[1].encode(x)
            assert 0 < f.count_nonzero() < f.numel() / 6
            f[0] = 0
            f[..., 1, 3] = -2  # steered
            _budget(coders, "decode", f)
            _budget(coders, "forward", x)
    assert len(calls) == 4


def test_current_k_counts():
    ours, theirs, _ = _three(_sae("topk"))
    with torch.no_grad():
        for k in (1, 9, K):
            ours.set_current_k(k)
            theirs.set_current_k(k)  # the original: a copy of the tool's model asks the original for its k
            f = ours.encode(_x(N))
            assert ((f != 0).sum(-1) <= k).all() and f.count_nonzero() > 0
            torch.testing.assert_close(f, theirs.encode(_x(N)))


@pytest.mark.parametrize("act", ACTS)
def test_training_loss_and_gradients_equal_the_tools(act):
    """Dense pre-activations are asked for: the tool's encoder; the decoder is ours."""
    theirs = _sae(act)
    ours, oracle = fusae.accelerate(copy.deepcopy(theirs)), _double(theirs)
    results = []
    for coder in (ours, theirs, oracle):
        dtype = coder.W_E.dtype
        batch = {"in": _x(N, dtype=dtype), "out": _x(N, dtype=dtype, seed=3), "tokens": torch.zeros(N)}
        out = coder.compute_loss(batch, sparsity_loss_type="tanh", l1_coefficient=0.01)
        out["loss"].backward()
        grads = {name: p.grad for name, p in coder.named_parameters()}
        results.append((out["loss"].detach(), out["hidden_pre"].detach(), grads))
    assert_within_budget(*(r[0][None] for r in results), "loss")
    assert_equal(results[0][1], results[1][1])
    for name in results[0][2]:
        ours, tools, true = (r[2][name] for r in results)
        assert_grads(*(g.reshape(len(g), -1) for g in (ours, tools, true)), name)


def test_gradients_of_latents_that_are_off():
    coders, out = _three(_sae("topk")), []
    for coder in coders:
        f = coders[1].encode(_x(N)).detach().to(coder.W_E.dtype).requires_grad_()
        coder.decode(f).square().sum().backward()
        out.append(f.grad)
    assert out[0].count_nonzero() > 0.9 * N * M
    assert_grads(*out)


def test_hooks_see_what_they_see_in_the_tool():
    ours, theirs, _ = _three(_sae("jumprelu").requires_grad_(False))
    seen = {id(c): {} for c in (ours, theirs)}

    def double(value, hook):
        return value * 2

    for coder in (ours, theirs):
        for name in ("hook_feature_acts", "hook_reconstructed"):
            point, store = getattr(coder, name), seen[id(coder)]
            point.add_hook(lambda value, hook, store=store, name=name: store.update({name: value.clone()}))
            point.add_hook(double)
    torch.testing.assert_close(ours(_x(N)), theirs(_x(N)))
    for name, value in seen[id(theirs)].items():
        torch.testing.assert_close(seen[id(ours)][name], value)
    for coder in (ours, theirs):
        coder.hook_hidden_pre.add_hook(double)
    assert_equal(ours.encode(_x(N)), theirs.encode(_x(N)))  # the tool's own


def test_calls_that_the_tool_serves():
    ours, theirs, _ = _three(_sae("relu").requires_grad_(False))
    x = _x(6)
    assert_equal(torch.func.jacrev(ours.encode)(x[0]), torch.func.jacrev(theirs.encode)(x[0]))
    for a, b in zip(ours.encode(x, return_hidden_pre=True), theirs.encode(x, return_hidden_pre=True), strict=True):
        assert_equal(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = theirs.encode(x)
        assert_equal(ours.encode(x), f)
        y, wanted = ours.decode(f), theirs.decode(f)
        assert y.dtype == wanted.dtype
        torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)
    ours.activation_function = torch.tanh
    assert_equal(ours.encode(x), torch.tanh(theirs.encode(x, return_hidden_pre=True)[1] * theirs.decoder_norm())
                 / theirs.decoder_norm())  # fmt: skip
    with pytest.raises(RuntimeError):
        ours.encode(x[:, 1:])


def test_weights_may_change_at_any_time():
    ours, theirs, _ = _three(_sae("jumprelu").requires_grad_(False))
    with torch.inference_mode():
        for change in (
            lambda c: c.W_E.data.mul_(1.5),
            lambda c: setattr(c, "W_D", torch.nn.Parameter(c.W_D.flip(0), requires_grad=False)),
            lambda c: c.transform_to_unit_decoder_norm(),
            lambda c: c.activation_function.log_jumprelu_threshold.data.sub_(0.5),
        ):
            for coder in (ours, theirs):
                change(coder)
            torch.testing.assert_close(ours.encode(_x(N)), theirs.encode(_x(N)))
            torch.testing.assert_close(ours(_x(N)), theirs(_x(N)))


def test_checkpoints_and_copies(tmp_path):
    theirs = _sae("jumprelu")
    ours = fusae.accelerate(copy.deepcopy(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.save_checkpoint(tmp_path / "sae_weights.safetensors")
    import safetensors.torch

    saved = safetensors.torch.load_file(tmp_path / "sae_weights.safetensors")
    fresh = SparseAutoEncoder(theirs.cfg)
    fresh.load_full_state_dict(saved)
    assert type(fresh) is SparseAutoEncoder
    assert_equal(fresh.encode(_x(N)), theirs.encode(_x(N)))
    assert type(fusae.restore(copy.deepcopy(ours))) is SparseAutoEncoder


@pytest.mark.parametrize("act", ACTS)
def test_crosscoder_equal_to_the_tool(act):
    config = CrosscoderConfig(
        hook_points=["a", "b", "c"], d_model=D, expansion_factor=M / D, act_fn=act, top_k=K, device="cpu",
        dtype=torch.float32,
    )  # fmt: skip
    if act == "batchtopk":
        with torch.no_grad():  # four dimensions are beyond the tool's own batch top-k
            coders = _three(_fill(Crosscoder(config), -0.6))
            f = torch.zeros(N, 3, M)
            f[:, :, 5] = 1
            _budget(coders, "decode", f)
        return
    coders, results = _three(_fill(Crosscoder(config), -0.6)), []
    for coder in coders:
        dtype = coder.W_E.dtype
        f, pre = coder.encode(_x(N, 3, dtype=dtype), return_hidden_pre=True)
        y = coder.decode(f)
        y.square().sum().backward()
        results.append((f, pre, y, [p.grad for p in coder.parameters()]))
    assert 0 < results[1][0].count_nonzero() < results[1][0].numel() / 6
    for i, what in enumerate(("encode", "hidden_pre", "decode")):
        assert_within_budget(*(r[i].detach() for r in results), what)
    for grads in zip(*(r[3] for r in results), strict=True):
        if grads[1] is None:
            assert grads[0] is None
        else:
            assert_grads(*(g.reshape(len(g), -1) for g in grads))


def test_cross_layer_decoder_equal_to_the_tool():
    config = CLTConfig(
        hook_points_in=["a", "b", "c"], hook_points_out=["d", "e", "f"], d_model=D, expansion_factor=M / D,
        act_fn="topk", top_k=K, device="cpu", dtype=torch.float32,
    )  # fmt: skip
    coders, results = _three(_fill(CrossLayerTranscoder(config))), []
    for coder in coders:
        f = coder.encode(_x(N, 3, dtype=coder.W_E.dtype))
        y = coder.decode(f)
        y.square().sum().backward()
        results.append((y, [p.grad for p in coder.parameters()]))
    assert_within_budget(*(r[0].detach() for r in results))
    for grads in zip(*(r[1] for r in results), strict=True):
        if grads[1] is None:
            assert grads[0] is None
        else:
            assert_grads(*(g.reshape(len(g), -1) for g in grads))


def test_what_is_left_alone_and_why():
    with pytest.raises(fusae.integrations.SwapError, match="use_glu_encoder gates every pre-activation"):
        fusae.accelerate(_sae(use_glu_encoder=True))
    assert "SparseAutoEncoder on fusae: encode, decode" in fusae.explain(fusae.accelerate(_sae()))
