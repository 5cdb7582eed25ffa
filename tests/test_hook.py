# SPDX-License-Identifier: Apache-2.0
"""`fusae.hook` on plain modules: modes, forms of outputs, what is attached and what stays behind, errors."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn

import fusae
from fusae.nn import CrossLayerConfig, CrossLayerTranscoder
from fusae.testing.coders import KINDS, D, M, coder_of
from fusae.testing.dense_hook import (
    ALL,
    CTX,
    MASK,
    PLAIN,
    B,
    Model,
    N,
    Site,
    batch,
    dense_codes,
    densely,
    hooks_of,
    written,
)

# --- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ("read", "error", "replace"))
@pytest.mark.parametrize("grad", (False, True), ids=("no_grad", "grad"))
def test_without_edits(kind, mode, grad):
    model, x, coder = Model(), batch(), coder_of(kind).eval()
    plain = model(x)
    site = model.site(model.inner(x))
    with torch.set_grad_enabled(grad), fusae.hook(model, "site", coder, mode) as h:
        out = model(x)
    if mode == "replace":
        torch.testing.assert_close(out, model.outer(torch.tanh(coder(site))))
    else:
        assert torch.equal(out, plain)
    assert torch.equal(h.input, site)
    assert torch.equal(h.codes.to_dense().reshape(N, M), dense_codes(coder, site))
    assert h.codes.is_ragged or h.codes.batch_shape == (B, CTX)
    torch.testing.assert_close(h.reconstruction, coder(site))
    torch.testing.assert_close(h.error, site - coder(site))
    assert h.edited is h.codes
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("fields", ({"d_out": 5, "skip": True}, {"d_out": 5}, {"d_out": D}), ids=("skip", "wide", "d"))
@pytest.mark.parametrize("mode", ("error", "replace"))
def test_transcoder(fields, mode):
    """From the input of a module to its output; where `d_out` is d, "through" is the default all the same."""
    out = fields["d_out"]
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, out), nn.Linear(out, 3)).double()
    coder, x = coder_of(fields | {"pre_bias": False}), batch()
    middle = model[0](x)
    with fusae.hook(model, "1", coder, mode) as h:
        assert h.part == "through"
        plain = model(x)
        h.edit([2, 7], add=1.5)
        edited = model(x)
    f = dense_codes(coder, middle)
    change = torch.zeros(M, dtype=torch.float64).index_fill(0, torch.tensor([2, 7]), 1.5)
    error = model[1](middle) - written(coder, f, middle) if mode == "error" else 0.0
    torch.testing.assert_close(edited, model[2](written(coder, f + change, middle) + error))
    torch.testing.assert_close(h.error, model[1](middle) - written(coder, f, middle))
    assert torch.equal(h.input, middle)
    if mode == "error":
        assert torch.equal(plain, model(x))


def test_a_transcoder_can_be_read_at_an_input():
    model, coder = Model(), coder_of({"d_out": 5, "pre_bias": False})
    with fusae.hook(model, "site", coder, "read", part="input") as h:
        model(batch())
    assert torch.equal(h.codes.to_dense().reshape(N, M), dense_codes(coder, model.inner(batch())))
    with pytest.raises(ValueError, match="part must be 'through' for a transcoder"):
        fusae.hook(model, "site", coder, part="output")


@pytest.mark.parametrize("call", ("positional", "keyword"))
def test_input(call):
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.site = Site()

        def forward(self, x):
            return self.site(x, scale=2.0) if call == "positional" else self.site(scale=2.0, hidden_states=x)

    model, coder, x = Caller(), coder_of("topk"), batch()
    with fusae.hook(model, "site", coder, "replace", part="input") as h:
        torch.testing.assert_close(model(x), model.site.map(coder(x)) * 2.0)
    assert torch.equal(h.input, x)


Pair = collections.namedtuple("Pair", ["hidden", "other"])
WRAPS = {
    "tuple": (lambda x: (x, "cache"), lambda y: y[0]),
    "list": (lambda x: [x, None], lambda y: y[0]),
    "named tuple": (lambda x: Pair(x, 1), lambda y: y.hidden),
    "mapping": (lambda x: collections.OrderedDict(last_hidden_state=x, more=2), lambda y: y["last_hidden_state"]),
    "joined rows": (lambda x: x.reshape(-1, D), lambda y: y.reshape(B, CTX, D)),
}


@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.parametrize("mode", ("error", "replace"))
def test_outputs_of_every_form(kind, mode):
    wrap, first = WRAPS[kind]
    model, coder, x = Model(wrap, first), coder_of("topk"), batch()
    got = []
    with fusae.hook(model, "site", coder, mode) as h:
        h.edit(4, add=2.0)
        model.site.register_forward_hook(lambda _m, _a, output: got.append(output))
        out = model(x)
    assert type(got[0]) is type(wrap(x))
    with densely(model.site.map, coder, mode, lambda f: f + 2.0 * (torch.arange(M) == 4)):
        torch.testing.assert_close(out, model(x))


def test_what_changes_in_place_later():
    """Neither what is read nor what the error is made of."""
    model, coder, x = Model(), coder_of("topk").requires_grad_(False), batch()
    model.first = lambda y: y.mul_(0.0)
    with torch.no_grad(), fusae.hook(model, "site", coder) as h:
        model(x)
    site = model.site(model.inner(x))
    assert torch.equal(h.input, site)
    torch.testing.assert_close(h.error, site - coder(site))


# --- what is attached -----------------------------------------------------------------------------------------------


def test_nothing_stays_behind():
    model, coder, x = Model(), coder_of("topk"), batch()
    types = [type(m) for m in model.modules()]
    h = fusae.hook(model, model.site, coder)
    assert h.name == "site" and hooks_of(model) == 3 and isinstance(model.site, Site)
    h.remove()
    h.remove()
    with pytest.raises(RuntimeError, match="inside"), fusae.hook(model, "site", coder):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="as wide as the coder"), fusae.hook(model, "site", coder):
        model.site.forward = lambda *_: torch.zeros(3, 4)
        model(x)
    del model.site.forward
    assert hooks_of(model) == 0 and [type(m) for m in model.modules()] == types
    with pytest.raises(RuntimeError, match="was removed"), h:
        pass


def test_several_at_once_and_on_one_module():
    """One after the other on one module; removed in any order."""
    model, x = Model(), batch()
    a, b, c = (coder_of(kind, seed) for kind, seed in (("topk", 0), ("relu", 1), ("topk", 2)))
    first = fusae.hook(model, "site", a)
    second = fusae.hook(model, "site", b, "replace")
    third = fusae.hook(model, "inner", c, "replace")
    out = model(x)
    hidden = c(model.inner.forward(x))
    torch.testing.assert_close(third.reconstruction, hidden)
    site = model.site.forward(hidden)
    assert torch.equal(first.input, site) and torch.equal(second.input, site)
    torch.testing.assert_close(out, model.outer(torch.tanh(b(site))))
    first.remove()
    torch.testing.assert_close(model(x), out)
    third.remove()
    second.remove()
    assert hooks_of(model) == 0 and type(model) is Model and type(model.site) is Site


def test_the_model_called_within_its_own_forward():
    """By a hook of the user: the outer pass goes on with its own batch."""
    model, coder, x = Model(), coder_of("topk"), batch()
    inner = []

    def again(*_):
        if not inner:
            inner.append(None)
            inner[0] = model(x[:1])

    handle = model.inner.register_forward_hook(again)
    with fusae.hook(model, "site", coder) as h:
        h.edit(3, add=1.0, positions=-1)
        out = model(x)
        assert h.input.shape[0] == B
        handle.remove()
        torch.testing.assert_close(inner[0], model(x[:1]))
        torch.testing.assert_close(out, model(x))
    assert not h._calls


def test_an_exception_in_the_model_leaves_no_call_open():
    model, coder = Model(), coder_of("topk")
    with fusae.hook(model, "site", coder) as h:
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, D + 1, dtype=torch.float64))
        assert not h._calls
        model(batch())


def test_the_model_itself():
    model, coder, x = Model(), coder_of("topk"), batch()
    with fusae.hook(model, model, coder, "replace"):
        out = model(x)
    torch.testing.assert_close(out, coder(model(x)))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_hidden_states_of_another_dtype(kind, dtype):
    """Codes are in the coder's dtype, the model goes on in its own, rounded once."""
    model, coder, x = Model().to(dtype), coder_of(kind, dtype="float32"), batch().to(dtype)
    with torch.no_grad(), fusae.hook(model, "site", coder) as h:
        assert torch.equal(model(x), Model().to(dtype)(x))
        assert h.codes.dtype == torch.float32 and h.input.dtype == dtype and h.error.dtype == torch.float32
        h.edit(3, value=2.0)
        out = []
        model.site.register_forward_hook(lambda _m, _a, y: out.append(y))
        model(x)
        change = written(coder, h.edited.to_dense() - h.codes.to_dense().reshape(N, M), h.input.float()) - coder.b_dec
        torch.testing.assert_close(out[0], (h.input + change).to(dtype))


def test_16_bit_coders():
    for kind in PLAIN:
        model, coder, x = Model().bfloat16(), coder_of(kind, dtype="bfloat16"), batch().bfloat16()
        plain = model(x)
        with fusae.hook(model, "site", coder) as h:
            offset = torch.zeros(2, requires_grad=True)
            h.edit([1, 2], add=offset)
            out = model(x)
            assert torch.equal(out, plain)
            out.float().sum().backward()
        assert offset.grad.abs().max() > 0 and h.codes.dtype == torch.bfloat16


def test_autocast():
    model, coder, x = Model().float(), coder_of("topk", dtype="float32"), batch().float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with fusae.hook(model, "site", coder) as h:
            assert torch.equal(model(x), plain)
            h.edit(3, value=2.0)
            assert not torch.equal(model(x), plain)
            assert h.codes.dtype == torch.bfloat16
        with fusae.hook(model, "site", coder, "replace"):
            assert torch.isfinite(model(x)).all()


# --- errors ---------------------------------------------------------------------------------------------------------


def test_bad_arguments():
    model, coder = Model(), coder_of("topk")
    hook = fusae.hook
    cross = CrossLayerTranscoder(CrossLayerConfig(layers=2, d=D, m=M, k=4))
    for error, text, call in [
        (TypeError, "model must be a torch.nn.Module, got int", lambda: hook(3, "site", coder)),
        (ValueError, "no submodule 'sight'; close: site", lambda: hook(model, "sight", coder)),
        (ValueError, "part='input'", lambda: hook(model, "site:in", coder)),
        (ValueError, "is no submodule of the Model", lambda: hook(model, nn.Linear(2, 2), coder)),
        (TypeError, "module must be a name or a torch.nn.Module, got int", lambda: hook(model, 3, coder)),
        (TypeError, "coder must be a fusae.nn.SparseCoder, got Linear", lambda: hook(model, "site", nn.Linear(2, 2))),
        (TypeError, "it holds several: choose one", lambda: hook(model, "site", {"a": coder})),
        (ValueError, "a cross-layer transcoder reads", lambda: hook(model, "site", cross)),
        (ValueError, "a crosscoder's rows are joined from 2 modules", lambda: hook(
            model, "site", coder_of({"sites": (2, 4), "pre_bias": False}))),
        (ValueError, "mode must be one of 'read', 'error', 'replace', got 'x'", lambda: hook(
            model, "site", coder, "x")),
        (ValueError, "part must be one of", lambda: hook(model, "site", coder, part="x")),
        (TypeError, "detach_error must be true or false", lambda: hook(model, "site", coder, detach_error=1)),
    ]:  # fmt: skip
        with pytest.raises(error, match=text):
            call()
    assert hooks_of(model) == 0 and type(model) is Model


def test_bad_edits():
    model, coder = Model(), coder_of("topk")
    with fusae.hook(model, "site", coder) as h:
        for error, text, latents, options in [
            (ValueError, "edit needs one of value, scale, add, low, high", 3, {}),
            (ValueError, "value sets a latent, so that add would", 3, {"value": 1.0, "add": 1.0}),
            (ValueError, "low must be at most high, got 2.0 and 1.0", 3, {"low": 2, "high": 1}),
            (ValueError, "latents must be between 0 and 19, got 20", 20, {"add": 1}),
            (ValueError, "latents must lie in 0..19, got -1 to 4", torch.tensor([4, -1]), {"add": 1}),
            (ValueError, "latents must be different", [3, 3], {"add": 1}),
            (ValueError, "at least one latent", [], {"add": 1}),
            (TypeError, "latents must be an int, a list", "3", {"add": 1}),
            (TypeError, "latents must be whole numbers, got a tensor of torch.bool", ALL > 3, {"add": 1}),
            (ValueError, r"add must have shape \[..., 2\], one for each", [1, 2], {"add": torch.ones(3)}),
            (TypeError, "scale must be a number or a tensor, got str", 3, {"scale": "2"}),
            (TypeError, "positions must be an int", 3, {"add": 1, "positions": 1.5}),
            (TypeError, "got a tensor of torch.float32", 3, {"add": 1, "positions": torch.ones(2)}),
            (ValueError, "step of at least 1", 3, {"add": 1, "positions": slice(None, None, -1)}),
            (ValueError, "one or two dimensions", 3, {"add": 1, "positions": MASK[None]}),
        ]:  # fmt: skip
            with pytest.raises(error, match=text):
                h.edit(latents, **options)
        assert len(h._edits) == 0
        for text, options in [
            (r"positions must be a mask of shape \[2, 5\]", {"add": 1, "positions": MASK[:, :3]}),
            ("a row for each of the 2 sequences, got 3", {"add": 1, "positions": torch.zeros(3, 1, dtype=torch.int64)}),
            (r"broadcast to \[2, 5, 1\]", {"add": torch.ones(3, 5, 1)}),
            (r"broadcast to \[2, 5, 1\]", {"scale": torch.ones(4, 1)}),
        ]:
            h.clear().edit(3, **options)
            with pytest.raises(ValueError, match=text):
                model(batch())
    with fusae.hook(model, "site", coder, "read") as h, pytest.raises(ValueError, match="mode is 'read'"):
        h.ablate(3)


def test_bad_states():
    model, coder = Model(), coder_of("batch_topk")
    with fusae.hook(model, "site", coder) as h:
        with pytest.raises(RuntimeError, match="no forward pass has come through 'site' yet"):
            h.codes  # noqa: B018
        with pytest.raises(ValueError, match=r"call coder.eval\(\)"):
            model(batch())
    narrow = nn.Sequential(nn.Linear(D, 3), nn.Linear(3, 3)).double()
    with fusae.hook(narrow, "0", coder.eval()):
        with pytest.raises(ValueError, match=r"hidden states \[..., 6\], as wide as the coder; got \[2, 5, 3\]"):
            narrow(batch())
