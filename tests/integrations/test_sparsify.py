# SPDX-License-Identifier: Apache-2.0
"""sparsify's `SparseCoder` on fusae: equal to itself, and to the loss it states."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusae
from fusae.testing.compare import assert_grads, assert_within_budget

pytest.importorskip("sparsify", reason="eai-sparsify is not installed (the extra [integrations])")
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

N, D, M, K = 24, 16, 64, 4
COMBINATIONS = [(t, s, m) for t in (False, True) for s in (False, True) for m in (False, True)]
LOSSES = ("fvu", "auxk_loss", "multi_topk_fvu")


def _coder(transcode=False, skip=False, multi=False, activation="topk", bias=0.0, dtype=torch.float32):
    config = SparseCoderConfig(
        num_latents=M, k=K, activation=activation, transcode=transcode, skip_connection=skip, multi_topk=multi
    )
    coder = SparseCoder(D, config, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in coder.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 4)
        coder.encoder.bias += bias
    return coder


def _data(transcode=False, n=N):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(n, D, generator=g)
    y = torch.randn(n, D, generator=g) if transcode else None
    return x, y, torch.rand(M, generator=g) < 0.4


def _loss(out):
    """Every loss, and the outputs besides, as end-to-end training uses them."""
    return out.fvu + 0.3 * out.auxk_loss + 0.2 * out.multi_topk_fvu + 0.1 * out.sae_out.square().sum()


def _dense(coder, x, y, dead_mask):
    """What sparsify's losses say, in plain torch: (losses, reconstruction)."""
    y = x if y is None else y
    k, cfg = coder.cfg.k, coder.cfg
    pre = torch.nn.functional.linear(
        x if cfg.transcode else x - coder.b_dec, coder.encoder.weight, coder.encoder.bias
    ).relu()

    def chosen(scores, k):
        values, indices = scores.topk(k)
        return torch.zeros_like(pre).scatter(1, indices, values)

    if cfg.activation == "groupmax":
        f = torch.zeros_like(pre).unflatten(1, (k, -1))
        values, indices = pre.unflatten(1, (k, -1)).max(-1, keepdim=True)
        f = f.scatter(-1, indices, values).flatten(1)
    else:
        f = chosen(pre, k)
    skip = x @ coder.W_skip.T if cfg.skip_connection else 0
    sae_out = f @ coder.W_dec + coder.b_dec + skip
    e, variance = y - sae_out, (y - y.mean(0)).square().sum()
    losses = [e.square().sum() / variance, y.new_tensor(0.0), y.new_tensor(0.0)]
    if dead_mask is not None and (dead := int(dead_mask.sum())):
        k_aux = min(D // 2, dead)
        aux = chosen(torch.where(dead_mask, pre, -torch.inf), k_aux)
        losses[1] = min(dead / (D // 2), 1.0) * (aux @ coder.W_dec - e.detach()).square().sum() / variance
    if cfg.multi_topk:
        sae_out = chosen(pre, 4 * k) @ coder.W_dec + coder.b_dec  # and this is the one that the tool returns
        losses[2] = (sae_out - y).square().sum() / variance
    return losses, sae_out


def _gradients(coder, x, loss):
    names = [*(name for name, _ in coder.named_parameters()), "x"]
    inputs = [*coder.parameters(), x]
    return dict(zip(names, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True))


def _compare(ours, reference, oracle, grads, what):
    for name, a, r, o in zip(LOSSES, ours, reference, oracle, strict=True):
        assert_within_budget(a, r, o, f"{what} {name}")
    for name in grads[0]:
        parts = [g[name] for g in grads]
        assert all((p is None) == (parts[1] is None) for p in parts), name
        if parts[0] is not None:
            assert_grads(*(p if p.ndim > 1 else p[:, None] for p in parts), f"{what} gradient of {name}")


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_gradients_tool_equals_the_untouched_tool(combination, activation, dead):
    x, y, mask = _data(combination[0])
    results = []
    for fast, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        coder = _coder(*combination, activation, bias=1.0).to(dtype)
        if fast:
            fusae.accelerate(coder, gradients="tool")
        xx = x.to(dtype).requires_grad_()
        out = coder(xx, None if y is None else y.to(dtype), dead_mask=mask if dead else None)
        results.append((out, _gradients(coder, xx, _loss(out))))
    outs, grads = zip(*results, strict=True)
    _compare(*([getattr(out, name) for name in LOSSES] for out in outs), grads, "tool")
    assert_within_budget(*(out.sae_out for out in outs), "sae_out")
    for out in outs:
        assert out.latent_indices.dtype == torch.int64
    ours, theirs = (
        torch.zeros(N, M).scatter(1, out.latent_indices, out.latent_acts.float()) for out in (outs[0], outs[1])
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("bias", [1.0, -1.5])  # -1.5: rows with fewer than k positive pre-activations
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_gradients_correct_equal_the_stated_loss(combination, bias, activation, dead):
    x, y, mask = _data(combination[0])
    results = []
    for fast, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        coder = _coder(*combination, activation, bias).to(dtype)
        xx, yy = x.to(dtype).requires_grad_(), None if y is None else y.to(dtype)
        dead_mask = mask if dead else None
        if fast:
            out = fusae.accelerate(coder)(xx, yy, dead_mask=dead_mask)
            losses, sae_out = [getattr(out, name) for name in LOSSES], out.sae_out
        else:
            losses, sae_out = _dense(coder, xx, yy, dead_mask)
        loss = losses[0] + 0.3 * losses[1] + 0.2 * losses[2] + 0.1 * sae_out.square().sum()
        results.append((losses, _gradients(coder, xx, loss)))
    losses, grads = zip(*results, strict=True)
    _compare(*losses, grads, "correct")
    if dead:  # what the tool loses: the dead latents' encoder rows learn
        assert (grads[2]["encoder.weight"][mask] != 0).any()


def test_gradients_tool_keep_the_defects(monkeypatch):
    """Latents selected at 0 get a gradient; which ones torch.topk takes is not defined, so it is given ours."""
    x, _, mask = _data()
    ours, theirs = fusae.accelerate(_coder(bias=-1.5), gradients="tool"), _coder(bias=-1.5)
    out = ours(x)
    assert (out.latent_acts == 0).any() and (out.latent_acts >= 0).all()
    selected = out.latent_indices
    monkeypatch.setattr(torch, "topk", lambda pre, k, **_: (pre.gather(1, selected), selected))
    wanted = theirs(x)
    monkeypatch.undo()
    out.fvu.backward()
    wanted.fvu.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)
    correct = fusae.accelerate(_coder(bias=-1.5))
    correct(x).fvu.backward()
    assert (correct.encoder.bias.grad - theirs.encoder.bias.grad).abs().max() > 1e-3

    for gradients, wanted in (("tool", False), ("correct", True)):
        coder = fusae.accelerate(_coder(bias=1.0), gradients=gradients)
        coder(x, dead_mask=mask).auxk_loss.backward()
        assert bool(coder.encoder.weight.grad is not None and coder.encoder.weight.grad.any()) is wanted


class _Largest(TorchDispatchMode):
    """The most elements that any op returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.numel())
        return out


@pytest.mark.parametrize("gradients", ["correct", "tool"])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_no_dense_activations(gradients, activation):
    """n m is more than m d and n d: an op that returns as much holds dense activations."""
    x, _, mask = _data(n=400)
    sizes = []
    for fast in (False, True):
        coder = _coder(multi=True, activation=activation)
        if fast:
            fusae.accelerate(coder, gradients)
        with _Largest() as largest:
            _loss(coder(x, dead_mask=mask)).backward()
            with torch.no_grad():
                _ = coder.encode(x).top_acts
            _ = coder.requires_grad_(False).encode(x).top_acts
        sizes.append(largest.size)
    assert sizes[0] == 400 * M and sizes[1] < 400 * M


@pytest.mark.parametrize("shape", [(2, 3, D), (1, D), (0, D), (D,)])
def test_any_leading_dimensions(shape):
    coder = fusae.accelerate(_coder(multi=True))
    x = torch.randn(shape)
    out, flat = coder(x), coder(x.reshape(-1, D))
    assert out.sae_out.shape == x.shape and out.latent_acts.shape == (*shape[:-1], 4 * K)
    torch.testing.assert_close(out.sae_out.reshape(-1, D), flat.sae_out)
    torch.testing.assert_close(out.fvu, flat.fvu, equal_nan=True)
    encoded = coder.encode(x)
    assert encoded.top_indices.shape == (*shape[:-1], K) and encoded.pre_acts.shape == (*shape[:-1], M)
    torch.testing.assert_close(coder.decode(encoded.top_acts, encoded.top_indices), out_of_k(coder, x))


def out_of_k(coder, x):
    f = torch.zeros(*x.shape[:-1], M)
    encoded = coder.encode(x)
    return f.scatter(-1, encoded.top_indices, encoded.top_acts) @ coder.W_dec + coder.b_dec


def test_any_strides():
    coder, plain = fusae.accelerate(_coder()), fusae.accelerate(_coder())
    x = torch.randn(D, N).T
    for c, data in ((coder, x), (plain, x.contiguous())):
        c(data).sae_out.sum().backward()  # a gradient of stride 0
    for a, b in zip(coder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    coder.encoder.weight.data = coder.encoder.weight.data.T.contiguous().T
    torch.testing.assert_close(coder(x).fvu, plain(x).fvu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_tools_dtypes(dtype):
    x, _, mask = _data()
    outs = []
    for coder in (_coder(multi=True), fusae.accelerate(_coder(multi=True))):
        with torch.autocast("cpu", dtype):
            out = coder(x, dead_mask=mask)
        out.fvu.backward()
        outs.append((out, coder.encoder.weight.grad))
    (theirs, grad), (ours, our_grad) = outs
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    torch.testing.assert_close(ours.fvu, theirs.fvu, rtol=0.02, atol=0.02)
    assert torch.nn.functional.cosine_similarity(grad.flatten(), our_grad.flatten(), dim=0) > 0.99


def test_weights_may_change_at_any_time():
    coder, twin = fusae.accelerate(_coder()), _coder()
    x = torch.randn(N, D)

    def same():
        torch.testing.assert_close(coder(x).sae_out, twin(x).sae_out)

    same()
    for c in (coder, twin):
        c.encoder.weight.data *= 1.5
        c.W_dec.data.mul_(0.5)
    same()
    for c in (coder, twin):
        c.W_dec = torch.nn.Parameter(c.W_dec.data.flip(0))
    same()
    for c in (coder, twin):  # half of the latents
        c.encoder.weight = torch.nn.Parameter(c.encoder.weight.data[: M // 2])
        c.encoder.bias = torch.nn.Parameter(c.encoder.bias.data[: M // 2])
        c.W_dec = torch.nn.Parameter(c.W_dec.data[: M // 2])
        c.cfg.k = 7
    same()
    assert coder.encode(x).top_acts.shape == (N, 7)
    coder.double(), twin.double()
    x = x.double()
    same()


def test_checkpoints_and_copies(tmp_path):
    coder, x = fusae.accelerate(_coder()), torch.randn(N, D)
    assert list(coder.state_dict()) == list(_coder().state_dict())
    coder.save_to_disk(tmp_path)
    loaded = SparseCoder.load_from_disk(tmp_path)
    assert type(loaded) is SparseCoder
    torch.testing.assert_close(loaded(x).sae_out, coder(x).sae_out)
    twin = copy.deepcopy(coder)
    twin.W_dec.data.zero_()
    assert type(twin) is type(coder) and coder.W_dec.any()
    assert type(fusae.restore(coder)) is SparseCoder


@pytest.mark.parametrize("transcode", [False, True])
def test_pre_acts_are_made_on_demand(transcode):
    coder, x = fusae.accelerate(_coder(transcode)), torch.randn(N, D)
    wanted = _coder(transcode).encode(x)
    with torch.no_grad():
        out = coder.encode(x)
        a, i, pre = coder.encode(x)
        late = coder.encode(x)
        edited = coder.encode(x)
    x.zero_()  # the caller's own
    for got in (out.pre_acts, pre, late[2], late[-1], tuple(late)[2], late[1:][1], edited._replace(top_acts=a)[2]):
        torch.testing.assert_close(got, wanted.pre_acts)
    assert len(out) == 3 and torch.equal(late[0], a) and torch.equal(late[1], i) and type(i) is torch.Tensor
    with torch.no_grad():
        out = coder.encode(x)
        coder.encoder.weight.mul_(2)
    with pytest.raises(RuntimeError, match="pre_acts must be read before encoder.weight or encoder.bias are edited"):
        _ = out.pre_acts


def test_pre_acts_in_a_graph():
    x = torch.randn(N, D)
    correct, tool = fusae.accelerate(_coder(bias=1.0)), fusae.accelerate(_coder(bias=1.0), "tool")
    correct.encode(x).pre_acts.sum().backward()
    assert (correct.encoder.bias.grad > 0).all()
    assert not tool.encode(x).pre_acts.requires_grad  # the tool gives them a graph without a gradient


def test_inference_mode_and_compile():
    coder, x = fusae.accelerate(_coder(multi=True)), torch.randn(N, D)
    with torch.inference_mode():
        out = coder(x)
        assert coder.encode(x).pre_acts.shape == (N, M)
    compiled = torch.compile(coder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).sae_out, out.sae_out.clone())
    compiled(x).fvu.backward()
    grad, coder.encoder.weight.grad = coder.encoder.weight.grad, None
    coder(x).fvu.backward()
    torch.testing.assert_close(grad, coder.encoder.weight.grad)
    encode = torch.compile(coder.encode, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for a, b in zip(encode(x), coder.encode(x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change, call",
    [
        ({"k": M + 1}, lambda c, x: c(x)),
        ({"k": M // 2, "multi_topk": True}, lambda c, x: c(x)),
        ({"activation": "groupmax", "k": 5}, lambda c, x: c(x)),
        ({"activation": "other"}, lambda c, x: c.encode(x)),
        ({}, lambda c, x: c(x[:, 1:])),
        ({}, lambda c, x: torch.func.vmap(lambda row: c.encode(row[None]).top_acts)(x)),
        ({}, lambda c, x: c.decode(torch.ones(1, 2), torch.tensor([[0, M]]))),
    ],
)
def test_what_fails_in_the_tool_fails_as_well(change, call):
    results = []
    for coder in (_coder(), fusae.accelerate(_coder())):
        for name, value in change.items():
            setattr(coder.cfg, name, value)
        try:
            results.append(call(coder, torch.randn(N, D)))
        except Exception as error:
            results.append(type(error))
    assert all(isinstance(r, type) for r in results), results


def test_a_coder_without_a_decoder():
    coder = SparseCoder(D, SparseCoderConfig(num_latents=M, k=K), decoder=False)
    fusae.accelerate(coder)
    assert coder.encode(torch.randn(3, D)).top_acts.shape == (3, K)
    with pytest.raises(AssertionError, match="Decoder weight was not initialized"):
        coder(torch.randn(3, D))


def test_the_decoder_rows():
    coder, twin = fusae.accelerate(_coder()), _coder()
    for c in (coder, twin):
        c.W_dec.grad = torch.randn(M, D, generator=torch.Generator().manual_seed(0))
        c.set_decoder_norm_to_unit_norm()
        c.remove_gradient_parallel_to_decoder_directions()
    torch.testing.assert_close(coder.W_dec, twin.W_dec)
    torch.testing.assert_close(coder.W_dec.grad, twin.W_dec.grad)
    assert (coder.W_dec.grad * coder.W_dec).sum(1).abs().max() < 1e-5


def test_explain():
    coder = fusae.accelerate(_coder())
    lines = fusae.explain(coder).splitlines()
    assert lines[0].startswith("(model): SparseCoder on fusae: encode, decode, forward")
    assert len(lines) == 3 and all("unlike the tool" in line for line in lines[1:])


@pytest.mark.parametrize("transcode", [False, True])
def test_meta_device_is_left_to_the_tool(transcode):
    coder, x = fusae.accelerate(_coder(transcode).to("meta")), torch.empty(N, D, device="meta")
    assert coder.encode(x).top_acts.shape == (N, K) and coder(x).sae_out.shape == (N, D)


@pytest.mark.parametrize("wrong", [torch.zeros(N, D).double(), torch.zeros(N, D).long(), torch.zeros(N, D - 1)])
def test_inputs_of_the_wrong_dtype_or_width_raise_what_the_tool_raises(wrong):
    tool = _coder(transcode=True)
    fast = fusae.accelerate(copy.deepcopy(tool))
    for call in ("encode", "forward"):
        with pytest.raises(RuntimeError) as wanted:
            getattr(tool, call)(wrong)
        with pytest.raises(RuntimeError) as found:
            getattr(fast, call)(wrong)
        assert str(found.value) == str(wanted.value)
