# SPDX-License-Identifier: Apache-2.0
"""SAELens' inference SAEs and transcoders on fusae: equal to themselves, whatever is done to them."""

import copy

import pytest
import torch

import fusae
from fusae.integrations import SwapError
from fusae.testing.compare import assert_equal, assert_grads, assert_within_budget

pytest.importorskip("sae_lens", reason="sae-lens is not installed (the extra [integrations])")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from sae_lens import saes  # noqa: E402
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper  # noqa: E402
from saelens_made import INFERENCE, TRAINING, D, M, Ran, data, fill, make, pair, twin  # noqa: E402

NAMES = list(INFERENCE)
DIFFERENTIABLE = ["standard", "jumprelu", "topk by norm", "abstopk", "gated", "jumprelu skip transcoder"]


def _gradients(sae, x, of, weight):
    x = x.clone().to(sae.W_enc.dtype).requires_grad_()
    names, parameters = zip(*sae.named_parameters(), strict=True)
    y = of(sae, x)
    loss = (y * weight.to(y.dtype)).sum()
    return dict(zip(("x", *names), torch.autograd.grad(loss, (x, *parameters), allow_unused=True), strict=True))


def _compare_gradients(fast, tool, x, of):
    weight = torch.randn(of(tool, x).shape, generator=torch.Generator().manual_seed(7))
    oracle = twin(tool, torch.float64)
    ours, theirs, true = (_gradients(sae, x, of, weight) for sae in (fast, tool, oracle))
    for name, wanted in theirs.items():
        assert (ours[name] is None) == (wanted is None), name
        if wanted is not None:
            assert_grads(ours[name], wanted, true[name], name)


@pytest.mark.parametrize("name", NAMES)
def test_encode_decode_and_forward(name):
    fast, tool = pair(make(INFERENCE, name))
    oracle, x = twin(tool, torch.float64), data()
    with Ran() as ran:
        f, y = fast.encode(x), fast(x)
    assert {"encode_topk_fwd", "encode_threshold_fwd"} & ran.fused and "decode_fwd" in ran.fused
    assert not {"aten::topk", "aten::addmm"} & ran.ops
    wanted = tool.encode(x)
    assert 0 < (wanted != 0).float().mean() < 0.06
    assert type(f) is torch.Tensor and torch.equal(f != 0, wanted != 0)
    assert_within_budget(f, wanted, oracle.encode(x.double()), "encode")
    assert_within_budget(y, tool(x), oracle(x.double()), "forward")
    assert_within_budget(fast.decode(wanted), tool.decode(wanted), oracle.decode(wanted.double()), "decode")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["forward", "encode", "steps"])
def test_gradients(name, way):
    fast, tool = pair(make(INFERENCE, name))
    ways = {
        "forward": lambda sae, x: sae(x),
        "encode": lambda sae, x: sae.encode(x),
        "steps": lambda sae, x: sae.decode(1.5 * sae.encode(x)),
    }
    _compare_gradients(fast, tool, data(), ways[way])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_latents_that_are_off_get_their_gradient(name):
    fast, tool = pair(make(INFERENCE, name))
    grads = []
    for sae in (fast, tool):
        f = sae.encode(data()).detach().requires_grad_()
        grads.append(torch.autograd.grad(sae.decode(f).square().sum(), f)[0])
    assert (grads[0] != 0).all()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(NAMES),
    shape=st.sampled_from([(), (1,), (0,), (5,), (80,), (2, 3), (2, 0, 3), (2, 2, 2, 3), (1, 70)]),
    norm=st.sampled_from(["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"]),
    apply_b_dec=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    layout=st.sampled_from(["row-major", "latent-major", "strided"]),
    mode=st.sampled_from(["grad", "no_grad", "inference"]),
    seed=st.integers(0, 3),
)
def test_configurations(name, shape, norm, apply_b_dec, dtype, layout, mode, seed):
    options = {"normalize_activations": norm}
    if "transcoder" not in name:
        options["apply_b_dec_to_input"] = apply_b_dec
    tool = fill(make(INFERENCE, name, **options), seed).to(dtype)
    if layout == "latent-major":
        tool.W_enc.data = tool.W_enc.data.T.contiguous().T
    elif layout == "strided":
        tool.W_dec.data = torch.stack([tool.W_dec.data, tool.W_dec.data], 1)[:, 0]
    fast, tool = pair(tool)
    x = data(shape=shape, seed=seed).to(dtype)
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with context():
        f, wanted = fast.encode(x), tool.encode(x)
        y, z = fast.decode(wanted), tool.decode(wanted)
        assert f.shape == wanted.shape and f.dtype == wanted.dtype and y.shape == z.shape and y.dtype == z.dtype
        # An entry may be chosen or not where it is within rounding of its threshold, or of the k-th.
        eps = torch.finfo(dtype).eps * 40
        both = (f != 0) & (wanted != 0)
        close = 0.06 * both.sum() + 2 if dtype.itemsize == 2 else 0
        assert int(((f != 0) != (wanted != 0)).sum()) <= close
        torch.testing.assert_close(f[both], wanted[both], rtol=eps, atol=eps)
        torch.testing.assert_close(y, z, rtol=eps, atol=eps * float(z.abs().max() if z.numel() else 0))
        fast(x)


@pytest.mark.parametrize("name", ["topk by norm", "jumprelu", "gated", "transcoder"])
def test_autocast(name):
    fast, tool = pair(make(INFERENCE, name))
    x = data()
    with torch.autocast("cpu", torch.bfloat16):
        f, wanted, y, z = fast.encode(x), tool.encode(x), fast(x), tool(x)
        fast(x).sum().backward()
    assert f.dtype == wanted.dtype and y.dtype == z.dtype
    both = (f != 0) & (wanted != 0)
    assert ((f != 0) != (wanted != 0)).sum() <= 0.03 * both.sum()
    torch.testing.assert_close(f[both], wanted[both], rtol=0.03, atol=0.03)
    same = ((f != 0) == (wanted != 0)).all(-1)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(y[same], z[same], rtol=0.05, atol=0.05)
    assert fast.W_enc.grad.dtype == torch.float32


def test_hook_z_comes_and_goes_by_heads():
    fast, tool = pair(make(INFERENCE, "topk", reshape_activations="hook_z"))
    x = data().reshape(8, 9, 4, D // 4)
    torch.testing.assert_close(fast(x), tool(x))
    assert fast(x).shape == x.shape and fast.encode(x).shape == (8, 9, M)


POINTS = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output"]


@pytest.mark.parametrize("name", ["standard", "jumprelu", "topk by norm", "gated"])
@pytest.mark.parametrize("point", POINTS)
def test_hooks_run_once_on_what_the_tool_gives_them(name, point):
    fast, tool = pair(make(INFERENCE, name, normalize_activations="layer_norm"))
    x, seen = data(), []
    for sae in (fast, tool):
        got = []
        sae.add_hook(point, lambda value, hook, got=got: got.append(value))
        seen.append((sae(x), got))
    (y, ours), (z, theirs) = seen
    assert len(ours) == len(theirs) == 1
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(y, z)


@pytest.mark.parametrize("name", NAMES)
def test_run_with_cache(name):
    fast, tool = pair(make(INFERENCE, name))
    (y, ours), (z, theirs) = (sae.run_with_cache(data()) for sae in (fast, tool))
    assert list(ours) == list(theirs)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key])
    torch.testing.assert_close(y, z)


@pytest.mark.parametrize("name", ["standard", "jumprelu", "topk by norm", "gated", "jumprelu transcoder"])
def test_steering_in_place_on_latents_that_are_off(name):
    fast, tool = pair(make(INFERENCE, name))

    def steer(f, hook):
        f[..., 3] = -2.0
        f[..., 4:9] += 1.0
        f[0] = 0.0

    x = data()
    torch.testing.assert_close(
        *(sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", steer)]) for sae in (fast, tool))
    )
    torch.testing.assert_close(fast(x), tool(x))  # the hook is gone


def test_backward_hooks_see_dense_gradients():
    seen = []
    for sae in pair(make(INFERENCE, "jumprelu")):
        got = []
        sae.hook_sae_acts_post.add_hook(lambda g, hook, got=got: got.append(g), dir="bwd")
        sae(data().requires_grad_()).square().sum().backward()
        seen.append(got[0][0] if isinstance(got[0], tuple) else got[0])
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    assert (seen[0] != 0).all()


@pytest.mark.parametrize("name", ["standard", "topk", "gated"])
def test_error_term(name):
    fast, tool = pair(make(INFERENCE, name))
    x = data()
    for sae in (fast, tool):
        sae._use_error_term = True
    torch.testing.assert_close(fast(x), x, rtol=1e-5, atol=1e-5)

    def ablate(f, hook):
        f[:] = 0

    out = [sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", ablate)]) for sae in (fast, tool)]
    torch.testing.assert_close(*out)
    for wrapped in (_SAEWrapper(sae, use_error_term=True) for sae in (fast, tool)):
        torch.testing.assert_close(wrapped(x), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["jumprelu", "topk by norm", "gated"])
def test_weights_may_change_at_any_time(name):
    fast, tool = pair(make(INFERENCE, name))
    x = data()
    fast(x)
    for sae in (fast, tool):
        sae.W_enc.data.mul_(1.1)
        sae.W_dec.data *= 0.7
        if name != "topk by norm":
            sae.fold_W_dec_norm()
    torch.testing.assert_close(fast(x), tool(x))
    for sae in (fast, tool):  # as sae-dashboard masks features
        keep = torch.arange(0, M, 3)
        for key, p in list(sae.named_parameters()):
            if p.shape == (M,) or key in ("W_enc", "W_dec"):
                part = p.data[:, keep] if key == "W_enc" else p.data[keep]
                setattr(sae, key, torch.nn.Parameter(part))
    assert fast.encode(x).shape == (len(x), len(keep))
    torch.testing.assert_close(fast(x), tool(x))


@pytest.mark.parametrize("name", NAMES)
def test_state_and_files_are_the_tools(name, tmp_path):
    fast, tool = pair(make(INFERENCE, name))
    assert list(fast.state_dict()) == list(tool.state_dict())
    fast.save_model(tmp_path)
    cls = INFERENCE[name][0]
    loaded = cls.load_from_disk(tmp_path)
    assert type(loaded) is cls
    for key, value in tool.state_dict().items():
        assert_equal(loaded.state_dict()[key], value, key)
    assert fusae.accelerate(loaded) is loaded
    torch.testing.assert_close(loaded(data()), tool(data()))
    other = copy.deepcopy(fast)
    assert type(other) is type(fast) and other.W_enc is not fast.W_enc
    assert torch.equal(other(data()), fast(data()))
    assert type(fusae.restore(fast)) is cls and torch.equal(fast(data()), tool(data()))


def test_to_another_dtype_and_wrong_dtypes():
    fast, tool = pair(make(INFERENCE, "topk"))
    assert fast.to(torch.bfloat16).encode(data()).dtype == torch.bfloat16
    fast, tool = pair(make(INFERENCE, "topk"))
    messages = []
    for sae in (fast, tool):
        with pytest.raises(RuntimeError) as error:
            sae.half()(data())
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("k", [M + 1, 0])
def test_k_out_of_range_is_the_tools_to_answer(k):
    fast, tool = pair(make(INFERENCE, "topk", k=k))
    outcomes = []
    for sae in (fast, tool):
        try:
            outcomes.append(sae(data()))
        except RuntimeError as error:
            outcomes.append(str(error))
    if k:
        assert outcomes[0] == outcomes[1]
    else:
        torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("name", ["jumprelu", "topk by norm"])
def test_transforms_and_forward_derivatives_run_the_tools_code(name):
    fast, tool = pair(make(INFERENCE, name))
    x, v = data(3), data(3, seed=9)
    jacobians = [torch.func.jacrev(lambda t, s=sae: s(t).sum(0))(x) for sae in (fast, tool)]
    torch.testing.assert_close(*jacobians)
    torch.testing.assert_close(*(torch.func.jvp(sae.forward, (x,), (v,))[1] for sae in (fast, tool)))
    torch.testing.assert_close(*(torch.func.vmap(sae.encode)(x[:, None]) for sae in (fast, tool)))


@pytest.mark.parametrize("name", ["jumprelu", "topk by norm"])
def test_compile_fullgraph(name):
    fast, tool = pair(make(INFERENCE, name))
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data()), tool(data()))


def test_nan_reaches_the_output_and_infinity_is_ordinary():
    for name in ("topk", "jumprelu", "standard"):
        fast, tool = pair(make(INFERENCE, name))
        x = data()
        x[3, 2] = torch.nan
        x[5, 1] = torch.inf
        f = fast.encode(x)
        assert f[3].isnan().any() and not f[[0, 1, 2, 4]].isnan().any()
        torch.testing.assert_close(f[6:], tool.encode(x)[6:])


def test_many_active_latents_run_the_tools_dense_product():
    sae = make(INFERENCE, "jumprelu")
    sae.threshold.data.fill_(-1.0)
    fast, tool = pair(sae)
    with Ran() as ran:
        f = fast.encode(data())
    assert not ran.fused
    assert torch.equal(f, tool.encode(data()))


@pytest.mark.parametrize("name", NAMES)
def test_meta_device_is_left_to_the_tool(name):
    sae = fusae.accelerate(make(INFERENCE, name).to("meta"))
    assert sae.encode(torch.empty(4, D, device="meta")).shape == (4, M)


def test_what_is_left_alone_and_why():
    pursuit = saes.MatchingPursuitSAE(saes.MatchingPursuitSAEConfig(d_in=D, d_sae=M))
    with pytest.raises(SwapError, match="matching pursuit chooses its latents one after the other"):
        fusae.accelerate(pursuit)
    temporal = saes.TemporalSAE(saes.TemporalSAEConfig(d_in=64, d_sae=512))
    assert "attends over the sequence" in fusae.explain(temporal)

    class Own(saes.TopKSAE):
        def encode(self, x):
            return super().encode(x) * 2

    own = Own(saes.TopKSAEConfig(d_in=D, d_sae=M, k=3))
    assert "Own overrides encode" in fusae.explain(own)
    model = torch.nn.ModuleDict({"a": make(INFERENCE, "topk"), "b": pursuit})
    fusae.accelerate(model)
    assert [line.split(":")[0] for line in fusae.explain(model).splitlines()] == ["a", "b"]


def test_every_class_of_the_tool_is_decided():
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    ours = {entry[0] for table in (INFERENCE, TRAINING) for entry in table.values()}
    known = {cls for table in (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY) for cls, _ in table.values()}
    left = {"MatchingPursuitSAE", "MatchingPursuitTrainingSAE", "TemporalSAE"}
    assert {cls.__name__ for cls in known - ours if cls.__module__.startswith("sae_lens")} == left
