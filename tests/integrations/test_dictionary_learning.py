# SPDX-License-Identifier: Apache-2.0
"""Every dictionary of dictionary_learning on fusae: equal to itself, whatever is done to it."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusae
from fusae.integrations import SwapError
from fusae.testing.compare import assert_grads, assert_within_budget

pytest.importorskip("dictionary_learning", reason="dictionary_learning is not installed (the extra [integrations])")
from dictionary_learning.dictionary import (  # noqa: E402
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    IdentityDict,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402

N, D, M, K = 40, 16, 96, 3
MAKE = {
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, M, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, M, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, M, K, [16, 30, 50]),
    "Matryoshka of two groups": lambda: MatryoshkaBatchTopKSAE(D, M, K, [16, 30, 50]),
    "AutoEncoder": lambda: AutoEncoder(D, M),
    "AutoEncoderNew": lambda: AutoEncoderNew(D, M),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D, M),
    "JumpRelu with a pre-bias": lambda: JumpReluAutoEncoder(D, M),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(D, M),
}
# How each is asked to encode beside the plain way.
WAYS = {
    "AutoEncoderTopK": [{"use_threshold": True}, {"return_topk": True}, {"return_topk": True, "use_threshold": True}],
    "BatchTopKSAE": [
        {"use_threshold": False},
        {"return_active": True},
        {"return_active": True, "use_threshold": False},
    ],
    "MatryoshkaBatchTopKSAE": [{"use_threshold": False}, {"return_active": True}],
    "Matryoshka of two groups": [{"use_threshold": False}],
    "JumpReluAutoEncoder": [{"output_pre_jump": True}],
    "GatedAutoEncoder": [{"return_gate": True}, {"normalize_decoder": True}],
}


def _dictionary(name, sparse=True):
    """With every parameter random; `sparse`: about a twentieth of the latents is active."""
    dictionary = MAKE[name]()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in dictionary.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 4)
            if key in ("encoder.bias", "b_enc", "gate_bias") and sparse:
                p -= 1.9
            if key == "threshold":
                p.copy_(torch.rand(p.shape, generator=g) / 2 - 0.05)
    if "Batch" in name or name == "AutoEncoderTopK" or "groups" in name:
        dictionary.threshold.fill_(0.3)
    if "groups" in name:
        dictionary.active_groups = 2
    if "pre-bias" in name:
        dictionary.apply_b_dec_to_input = True
    return dictionary


def _x(n=N, dtype=torch.float32):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(params=list(MAKE))
def name(request):
    return request.param


def _three(name, sparse=True, gradients="correct"):
    """(on fusae, untouched, untouched in float64)"""
    made = [_dictionary(name, sparse) for _ in range(3)]
    return fusae.accelerate(made[0], gradients), made[1], made[2].double()


def _gradients(dictionary, x, loss):
    inputs = dict(dictionary.named_parameters(), x=x)
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return dict(zip(inputs, grads, strict=True))


def _same(outs, grads, what):
    for i, parts in enumerate(zip(*outs, strict=True)):
        if parts[0].is_floating_point():
            assert_within_budget(*parts, f"{what} output {i}")
        else:
            assert torch.equal(parts[0], parts[1])
    for key in grads[0]:
        parts = [g[key] for g in grads]
        if parts[1] is None:
            assert parts[0] is None or not parts[0].any(), key
        else:
            assert_grads(*(p if p.ndim > 1 else p[:, None] for p in parts), f"{what} gradient of {key}")


@pytest.mark.parametrize("gradients", ["correct", "tool"])
@pytest.mark.parametrize("sparse", [True, False])
def test_forward_and_gradients(name, sparse, gradients):
    outs, grads = [], []
    for dictionary in _three(name, sparse, gradients):
        x = _x(dtype=next(dictionary.parameters()).dtype).requires_grad_()
        y = dictionary(x)
        outs.append((y,))
        grads.append(_gradients(dictionary, x, (y - x).square().sum() + y.sin().sum()))
    _same(outs, grads, name)


@pytest.mark.parametrize("sparse", [True, False])
def test_features_and_their_graph(name, sparse):
    outs, grads = [], []
    for dictionary in _three(name, sparse):
        x = _x(dtype=next(dictionary.parameters()).dtype).requires_grad_()
        y, f = dictionary(x, output_features=True)
        outs.append((y, f))
        g = torch.Generator().manual_seed(2)
        loss = (y - x).square().sum() + (f * torch.randn(f.shape, generator=g)).sum()
        grads.append(_gradients(dictionary, x, loss))
    _same(outs, grads, name)


@pytest.mark.parametrize("sparse", [True, False])
def test_encode_every_way(name, sparse):
    for way in ({}, *WAYS.get(name, [])):
        outs, grads = [], []
        for dictionary in _three(name, sparse):
            x = _x(dtype=next(dictionary.parameters()).dtype).requires_grad_()
            out = dictionary.encode(x, **way)
            out = out if isinstance(out, tuple) else (out,)
            if way.get("return_topk"):  # in no order
                order = out[2].argsort(1)
                out = (out[0], out[1].gather(1, order), out[2].gather(1, order), out[3])
            outs.append(out)
            g = torch.Generator().manual_seed(2)
            loss = (out[0] * torch.randn(out[0].shape, generator=g)).sum()
            grads.append(_gradients(dictionary, x, loss))
        _same(outs, grads, f"{name} {way}")


def test_steering_in_place_and_gradients_of_what_is_off(name):
    dictionary, plain, exact = _three(name)
    outs, grads = [], []
    for one in (dictionary, plain, exact):
        x = _x(dtype=next(one.parameters()).dtype)
        f = one.encode(x).detach()
        f[:, 7] += 3.0
        f[3, 11] = -2.0
        f[:, 20] = 0.0
        f.requires_grad_()
        y = one.decode(f)
        outs.append((y,))
        grads.append(_gradients(one, f, y.square().sum()))
    _same(outs, grads, name)
    assert (grads[0]["x"][:, 20] != 0).all()


@pytest.mark.parametrize("shape", [(2, 3, D), (D,), (0, D), (1, D)])
def test_leading_dimensions(name, shape):
    dictionary, plain, _ = _three(name)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    try:
        wanted = plain(x), plain.encode(x)
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error)):
            dictionary(x)
        return
    torch.testing.assert_close(dictionary(x), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.encode(x), wanted[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.decode(wanted[1]), wanted[0], rtol=1e-5, atol=1e-5)


class _Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.size = max(self.size, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_forward_holds_no_dense_activations(name):
    sizes = []
    for dictionary in _three(name)[:2]:
        x = _x(500)
        with _Largest() as largest:
            dictionary(x).square().sum().backward()
        sizes.append(largest.size)
    assert sizes[1] >= 500 * M > 2 * sizes[0]


def test_weights_may_change_at_any_time(name):
    dictionary, plain, _ = _three(name)
    x = _x()

    def same(x=x):
        torch.testing.assert_close(dictionary(x), plain(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dictionary.encode(x), plain.encode(x), rtol=1e-5, atol=1e-5)

    same()
    for one in (dictionary, plain):
        for p in one.parameters():
            p.data *= 1.1
        one.scale_biases(0.9) if hasattr(one, "scale_biases") else None
    same()
    for one in (dictionary, plain):
        holder, key = (one.decoder, "weight") if hasattr(one, "decoder") else (one, "W_dec")
        setattr(holder, key, torch.nn.Parameter(getattr(holder, key).data.flip(0).contiguous()))
    same()
    state = {key: torch.randn_like(v) if v.ndim == 2 else v for key, v in plain.state_dict().items()}
    dictionary.load_state_dict(state), plain.load_state_dict(state)
    same()
    dictionary.load_state_dict(copy.deepcopy(state), assign=True)
    same()
    dictionary.double(), plain.double()
    same(x.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_tools_dtypes(name, dtype):
    dictionary, plain, _ = _three(name)
    with torch.autocast("cpu", dtype):
        ours, theirs = dictionary(_x()), plain(_x())
        f = dictionary.encode(_x())
        assert f.dtype == plain.encode(_x()).dtype
        assert dictionary.decode(f).dtype == plain.decode(f).dtype
    assert ours.dtype == theirs.dtype
    ours.square().sum().backward(), theirs.square().sum().backward()
    for a, b in zip(dictionary.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad.any():
            assert a.grad.dtype == b.grad.dtype
            assert torch.nn.functional.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.98


def test_low_precision_weights(name):
    dictionary, plain, _ = _three(name)
    dictionary.bfloat16(), plain.bfloat16()
    x = _x(dtype=torch.bfloat16)
    ours, theirs = dictionary(x), plain(x)
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).float().norm() <= 0.05 * theirs.float().norm()


def test_copies_checkpoints_and_back(name):
    dictionary, plain, _ = _three(name)
    assert list(dictionary.state_dict()) == list(plain.state_dict())
    for a, b in zip(dictionary.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    file = io.BytesIO()
    torch.save(dictionary.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(dictionary)
    next(twin.parameters()).data.zero_()
    assert type(twin) is type(dictionary) and next(dictionary.parameters()).any()
    tool = type(plain)
    assert type(fusae.restore(dictionary)) is tool
    assert all(p.is_contiguous() for key, p in dictionary.named_parameters() if key == "decoder.weight")
    torch.testing.assert_close(dictionary(_x()), plain(_x()))


def test_hooks_on_the_linear_layers_still_see_everything():
    for name in ("AutoEncoderTopK", "BatchTopKSAE", "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder"):
        dictionary = _three(name)[0]
        seen = []
        for part in (dictionary.encoder, dictionary.decoder):
            part.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.shape))
        dictionary(_x())
        assert seen == [(N, M), (N, D)], name


def test_transforms_run_the_tools_code(name):
    dictionary, plain, _ = _three(name)
    x = _x(4)
    if "groups" not in name:  # writes in place
        jacobians = [torch.func.jacrev(one)(x) for one in (dictionary, plain)]
        torch.testing.assert_close(*jacobians, rtol=1e-4, atol=1e-5)
        tangents = [torch.func.jvp(one, (x,), (torch.ones_like(x),))[1] for one in (dictionary, plain)]
        torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-5)


def test_compile_and_inference_mode(name):
    dictionary, plain, _ = _three(name)
    x = _x()
    with torch.inference_mode():
        torch.testing.assert_close(dictionary(x), plain(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(dictionary, backend="eager")
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)


def test_meta_and_strides(name):
    dictionary, plain, _ = _three(name)
    x = _x().T.contiguous().T
    torch.testing.assert_close(dictionary(x), plain(x), rtol=1e-5, atol=1e-5)
    dictionary(x).sum().backward(), plain(x).sum().backward()  # a gradient of stride 0
    for a, b in zip(dictionary.parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    on_meta = fusae.accelerate(_dictionary(name).to("meta"))
    if "Batch" not in name and "groups" not in name and name != "AutoEncoderTopK":  # these read k or the threshold
        assert on_meta(x.to("meta")).shape == x.shape


def test_nan_and_inf_come_through(name):
    dictionary, plain, _ = _three(name)
    x = _x()
    x[0, 0], x[1, 0] = torch.nan, torch.inf
    ours, theirs = dictionary(x), plain(x)
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    if "Batch" not in name and "groups" not in name:
        torch.testing.assert_close(ours[2:], theirs[2:], rtol=1e-5, atol=1e-5)


def test_ghost_mode_and_normalised_features():
    dictionary, plain, _ = _three("AutoEncoder")
    mask = torch.ones(M)
    for a, b in zip(dictionary(_x(), ghost_mask=mask), plain(_x(), ghost_mask=mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    dictionary, plain, _ = _three("GatedAutoEncoder")
    for a, b in zip(dictionary(_x(), True, True), plain(_x(), True, True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    f = plain.encode(_x(), normalize_decoder=True)
    torch.testing.assert_close(dictionary.decode(f, normalize_decoder=True), plain.decode(f, normalize_decoder=True))


def test_what_cannot_be_accelerated_says_so():
    with pytest.raises(SwapError, match="IdentityDict left as it is: it computes nothing"):
        fusae.accelerate(IdentityDict(4))

    class Mine(AutoEncoder):
        def encode(self, x):
            return x

    with pytest.raises(SwapError, match="Mine overrides encode"):
        fusae.accelerate(Mine(2, 4))


def test_loading_through_an_accelerated_class(tmp_path):
    plain = _dictionary("BatchTopKSAE")
    torch.save(plain.state_dict(), tmp_path / "ae.pt")
    loaded = fusae.accelerate(BatchTopKSAE).from_pretrained(tmp_path / "ae.pt")
    assert fusae.explain(loaded) == ("(model): BatchTopKSAE on fusae: encode, decode, forward (gradients 'correct')")
    torch.testing.assert_close(loaded(_x()), plain(_x()), rtol=1e-5, atol=1e-5)
