# SPDX-License-Identifier: Apache-2.0
"""Edits of a `fusae.hook` and its gradients, against the same done densely."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusae
from fusae.testing.coders import KINDS, D, M, coder_of
from fusae.testing.dense_hook import (
    ALL,
    CTX,
    MASK,
    PLAIN,
    B,
    Model,
    N,
    batch,
    dense_codes,
    dense_edit,
    densely,
    rows_of,
    written,
)

# --- edits ----------------------------------------------------------------------------------------------------------

ROWS = torch.linspace(-2, 2, N * 2, dtype=torch.float64).reshape(B, CTX, 2)
EDITS = {  # one or several: (latents, options)
    "set": [([3, 11], {"value": 1.25})],
    "set to 0": [([3, 11], {"value": 0.0})],
    "set, in another order": [([11, 3], {"value": torch.tensor([1.0, -2.0])})],
    "set in every row": [([11, 3], {"value": ROWS})],
    "set in every row of a context": [([3, 11], {"value": ROWS[0]})],
    "scale": [(ALL, {"scale": -0.5})],
    "scale by latent": [(ALL, {"scale": torch.linspace(-1, 2, M)})],
    "scale in every row": [(range(2), {"scale": ROWS}), (range(2, M), {"scale": 0.3})],
    "scale and add": [([3, 0], {"scale": 2.0, "add": torch.tensor([0.5, -0.5])})],
    "add": [(7, {"add": 1.0})],
    "clamp from below": [(ALL, {"low": 0.1})],
    "clamp from above": [(ALL, {"high": 0.3})],
    "clamp below 0": [([1, 2], {"high": -0.3})],
    "clamp both": [(range(6), {"low": torch.full((6,), 0.2), "high": 0.4})],
    "all of it": [(ALL, {"scale": 3.0, "add": -0.2, "low": 0.1, "high": 0.9})],
    "one after the other": [
        ([3, 4], {"value": 2.0}), ([4, 5], {"scale": 0.5}), ([5, 3], {"add": 1.0}), (ALL, {"high": 1.2})
    ],
    "dense": [(ALL, {"add": torch.linspace(-1, 1, M)})],
}  # fmt: skip


@pytest.mark.parametrize("mode", ("error", "replace"))
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("grad", (False, True), ids=("no_grad", "grad"))
def test_edits(name, kind, mode, grad):
    model, coder, x = Model(), coder_of(kind), batch()

    def change(f):
        for latents, options in EDITS[name]:
            f = dense_edit(f, latents, options)
        return f

    with torch.set_grad_enabled(grad), fusae.hook(model, "site", coder, mode) as h:
        for latents, options in EDITS[name]:
            h.edit(latents, **options)
        out = model(x)
        edited = h.edited
        h.clear()
        again = model(x)
    with densely(model.site, coder, mode, change) as seen:
        torch.testing.assert_close(out, model(x))
    f = seen["f"].detach()
    assert torch.equal(h.codes.to_dense().reshape(N, M), f)  # before edits
    torch.testing.assert_close(edited.to_dense(), change(f))
    assert edited.is_ragged and bool((edited.values != 0).all())
    pairs = edited.row_ids() * M + edited.indices
    assert bool((pairs.diff() > 0).all())  # distinct, ascending
    assert not torch.allclose(out, again)


@pytest.mark.parametrize("kind", PLAIN)
def test_ablate(kind):
    model, coder, x = Model(), coder_of(kind), batch()
    with fusae.hook(model, "site", coder, "replace") as h:
        h.ablate(ALL)
        torch.testing.assert_close(model(x), model.outer(torch.tanh(coder.b_dec.expand(B, CTX, D))))
        assert h.edited.values.numel() == 0


def columns(*wanted):
    return torch.isin(torch.arange(CTX), torch.tensor(wanted)).expand(B, CTX)


POSITIONS = {
    "int": (2, columns(2)),
    "last": (-1, columns(4)),
    "list": ([0, 3, -2], columns(0, 3)),
    "range": (range(1, 3), columns(1, 2)),
    "tensor": (torch.tensor([1, 4]), columns(1, 4)),
    "of each": (torch.tensor([[0, -1], [1, 1]]), torch.stack([columns(0, 4)[0], columns(1)[0]])),
    "slice": (slice(1, 4), columns(1, 2, 3)),
    "step": (slice(1, None, 2), columns(1, 3)),
    "from the end": (slice(-2, None), columns(3, 4)),
    "up to the end": (slice(None, -2), columns(0, 1, 2)),
    "mask": (MASK, MASK),
    "mask of columns": (MASK[0], MASK[:1].expand(B, CTX)),
    "nothing": ([], columns()),
    "beyond": (99, columns()),
}


@pytest.mark.parametrize("mode", ("error", "replace"))
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("name", POSITIONS)
def test_positions(name, kind, mode):
    """Of edits that switch latents on, and of those that do not."""
    model, coder, x = Model(), coder_of(kind), batch()
    positions, rows = POSITIONS[name]

    def change(f):
        return dense_edit(dense_edit(f, [3, 11], {"add": 2.0}, rows), ALL, {"scale": 0.5}, rows)

    with torch.no_grad(), fusae.hook(model, "site", coder, mode) as h:
        h.edit([3, 11], add=2.0, positions=positions).edit(ALL, scale=0.5, positions=positions)
        out = model(x)
    with torch.no_grad(), densely(model.site, coder, mode, change):
        torch.testing.assert_close(out, model(x))
    if mode == "error":  # what is not edited is untouched
        assert torch.equal(out[~rows], model(x)[~rows])


@pytest.mark.parametrize("shape", ((7, D), (D,), (2, 3, 4, D)), ids=str)
@pytest.mark.parametrize("kind", PLAIN)
def test_other_leading_shapes(shape, kind):
    """Positions count the last but one dimension, the second of more than three."""
    model, coder = Model(), coder_of(kind)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad(), fusae.hook(model, "site", coder, "replace") as h:
        h.edit(3, value=5.0, positions=0)
        out = model(x)
        f = dense_codes(coder, h.input)
        lead = shape[:-1]
        rows = torch.zeros(lead, dtype=torch.bool)
        rows[(slice(None),) * (len(lead) > 1) + ((0,) if lead else ())] = True
        new = written(coder, dense_edit(f, 3, {"value": 5.0}, rows), h.input)
        torch.testing.assert_close(out, model.outer(torch.tanh(new)))
        assert h.codes.is_ragged or h.codes.batch_shape == lead


def test_no_rows():
    for kind in PLAIN:
        model, coder = Model(), coder_of(kind)
        for mode in ("error", "replace"):
            with fusae.hook(model, "site", coder, mode) as h:
                h.edit([1, 2], add=1.0).edit(ALL, scale=2.0, positions=[0])
                assert model(batch()[:0]).shape == (0, CTX, D)
                assert h.error.shape == (0, CTX, D) and h.edited.values.shape == (0,)


class Sizes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, Tensor):
                self.largest = max(self.largest, part.numel())
        return out


@pytest.mark.parametrize("kind", PLAIN)
def test_a_matrix_of_all_latents_never_exists(kind):
    m = 600
    coder = coder_of({**KINDS[kind][0], "k_aux": 0}, m=m, dtype="float32").requires_grad_(False)
    if kind == "relu":
        coder.b_enc.sub_(2.0)  # few are active
    model = Model().float().requires_grad_(False)
    x = torch.randn(B, 150, D, generator=torch.Generator().manual_seed(0))
    with fusae.hook(model, "site", coder, requires_grad=True) as h:
        h.edit([1, 2], add=1.0).ablate(range(m // 2)).edit(range(m), scale=2.0)
        with Sizes() as sizes:
            loss = model(x).sum()
            loss.backward()
    assert h.codes.values.grad is not None and 0 < sizes.largest < B * 150 * m / 4


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", (False, True), ids=("error", "error held"))
@pytest.mark.parametrize("mode", ("error", "replace"))
@pytest.mark.parametrize("kind", PLAIN)
def test_gradients(kind, mode, detach):
    model, coder = Model(), coder_of(kind)
    weights = torch.randn(B, CTX, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    others = [latent for latent in range(M) if latent not in (3, 11)]
    some = [coder.W_enc, coder.W_dec, coder.b_dec]

    def tensors():
        by_row = (
            torch.linspace(0.5, 1, N, dtype=torch.float64)
            .reshape(B, CTX, 1)
            .expand(-1, -1, len(others))
            .clone()
            .requires_grad_()
        )
        return torch.zeros(2, dtype=torch.float64, requires_grad=True), by_row, batch().requires_grad_()

    def change(f, add, scale):
        f = dense_edit(f, [3, 11], {"add": add}, MASK)
        return dense_edit(f, others, {"scale": scale})

    add, scale, x = tensors()
    with fusae.hook(model, "site", coder, mode, detach_error=detach) as h:
        h.edit([3, 11], add=add, positions=MASK).edit(others, scale=scale)
        loss = (model(x) * weights).sum()
        ours = torch.autograd.grad(loss, [add, scale, x, h.input, h.codes.values, *some])
    add, scale, x = tensors()
    with densely(model.site, coder, mode, lambda f: change(f, add, scale), detach) as seen:
        held = model.site.register_forward_hook(lambda _m, _a, out: seen.setdefault("input", out), prepend=True)
        loss = (model(x) * weights).sum()
        held.remove()
    wanted = torch.autograd.grad(loss, [add, scale, x, seen["input"], seen["f"], *some])
    names = ["add", "scale", "x", "input", "codes", "W_enc", "W_dec", "b_dec"]
    for name, got, want in zip(names, ours, wanted, strict=True):
        if name == "codes":
            got, want = got.flatten(), want[rows_of(h.codes), h.codes.indices.flatten().long()]
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")
        assert want.abs().max() > 0, name


@pytest.mark.parametrize("kind", PLAIN)
def test_the_gradient_without_edits_is_that_of_the_model(kind):
    model, coder, x = Model(), coder_of(kind), batch().requires_grad_()
    (plain,) = torch.autograd.grad(model(x).square().sum(), x)
    with fusae.hook(model, "site", coder) as h:
        loss = model(x).square().sum()
        ours, error, codes = torch.autograd.grad(loss, [x, h.error, h.codes.values], retain_graph=True)
        (site,) = torch.autograd.grad(loss, h.input)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(error, site)
    dots = (error.reshape(N, D)[rows_of(h.codes)] * coder.W_dec[h.codes.indices.flatten().long()]).sum(-1)
    torch.testing.assert_close(codes.flatten(), dots)


def test_requires_grad_in_a_frozen_model():
    model, coder, x = Model().requires_grad_(False), coder_of("topk").requires_grad_(False), batch()
    with fusae.hook(model, "site", coder) as h:
        assert not model(x).requires_grad
    for detach in (False, True):
        with fusae.hook(model, "site", coder, requires_grad=True, detach_error=detach) as h:
            model(x).square().sum().backward()
        assert h.codes.values.grad.shape == (B, CTX, 4) and h.error.grad.abs().sum() > 0
        with torch.no_grad(), fusae.hook(model, "site", coder, requires_grad=True) as h:
            assert not model(x).requires_grad


def test_an_offset_that_is_0_has_a_gradient_and_changes_nothing():
    """As sparse fine-tuning starts."""
    model, coder, x = Model(), coder_of("topk"), batch()
    offsets = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    with fusae.hook(model, "site", coder) as h:
        h.edit(ALL, add=offsets)
        out = model(x)
        assert torch.equal(out, Model()(x))
        out.square().sum().backward()
    assert bool((offsets.grad != 0).all())
