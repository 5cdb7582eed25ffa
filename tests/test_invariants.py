# SPDX-License-Identifier: Apache-2.0
"""What must hold of every dictionary, whatever its weights: symmetries, special cases of each other, and no NaN."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusae import decode
from fusae.eval.metrics import ReconstructionMetrics
from fusae.nn import DeadLatents, Moment, SparseCoder, SparseCoderConfig
from fusae.nn.objectives import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from fusae.optim import Adam

D, M, K = 6, 20, 4
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**20)

# Every kind of coder: its configuration, and the loss that trains it.
KINDS = {
    "topk": ({"k_aux": 5}, TopK(multi_topk=0.125)),
    "topk by norm": ({"k_aux": 5, "select_by_norm": True}, TopK()),
    "hierarchical": ({"k_aux": 5}, HierarchicalTopK()),
    "abs": ({"k_aux": 5, "select": "abs", "activation": "none"}, TopK()),
    "group_max": ({"k_aux": 5, "select": "group_max"}, TopK()),
    "batch_topk": ({"k_aux": 5, "select": "batch_topk"}, BatchTopK()),
    "batch_topk by norm": ({"k_aux": 5, "select": "batch_topk", "select_by_norm": True}, BatchTopK()),
    "matryoshka": ({"k_aux": 5, "select": "batch_topk"}, Matryoshka((5, 11, M))),
    "relu": ({"select": "relu"}, ReLU()),
    "gated": ({"select": "relu", "gated": True}, Gated()),
    "jumprelu": ({"select": "threshold"}, JumpReLU("l0", 0.1, 0.5, preact_coefficient=0.1)),
    "jumprelu tanh": ({"select": "threshold"}, JumpReLU("tanh", 0.1, 0.5, True, 2.0, 0.1)),
    "jumprelu nested": ({"select": "threshold"}, JumpReLU("l0_squared", 0.1, 0.5, prefixes=(5, M))),
}
CROSSCODER = {"sites": (2, 4), "pre_bias": False}
of_kinds = pytest.mark.parametrize("kind", KINDS)


def coder_of(kind_or_fields, seed=0, sparse_grad=False, **more):
    """A coder of random weights and thresholds."""
    fields = KINDS[kind_or_fields][0] if isinstance(kind_or_fields, str) else kind_or_fields
    config = SparseCoderConfig(**{"d": D, "m": M, "k": K, "dtype": "float64"} | fields | more)
    coder = SparseCoder(config, seed=seed, sparse_grad=sparse_grad)
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for name, value in coder.state_dict().items():
            noise = 0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value += (noise.abs() if name in ("threshold", "b_mag") else noise).to(value.dtype)
    return coder


def rows_of(n=13, seed=1, d=D):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clone_with(coder, change):
    """A copy of which the weights are changed: ``change(name, value)`` gives the new value."""
    other = copy.deepcopy(coder)
    with torch.no_grad():
        for name, value in other.state_dict().items():
            value.copy_(change(name, value.clone()))
    return other


def gradients(loss, coder):
    loss.backward()
    return {name: p.grad.to_dense() for name, p in coder.named_parameters() if p.grad is not None}


def in_both_modes(coder):
    """In training, and (a batch top-k with its threshold) in use."""
    yield coder.train()
    yield coder.eval()
    coder.train()


# I1, I2, I3, I4: symmetries.


@of_kinds
@few
@given(seed=seeds)
def test_latents_can_be_permuted(kind, seed):
    fields, objective = KINDS[kind]
    coder, x = coder_of(kind, seed), rows_of(seed=seed)
    parts = {
        "group_max": range(0, M + 1, M // K),  # within their groups
        "matryoshka": (0, 5, 11, M),  # within the nested dictionaries
        "jumprelu nested": (0, 5, M),
    }.get(kind, (0, M))
    generator = torch.Generator().manual_seed(seed)
    order = [a + torch.randperm(b - a, generator=generator) for a, b in zip(parts, parts[1:], strict=False)]
    order = torch.cat(order)
    of_latents = set(coder.config.parameters()) - {"b_dec"}
    moved = clone_with(coder, lambda name, value: value[order] if name in of_latents else value)
    for here, there in zip(in_both_modes(coder), in_both_modes(moved), strict=True):
        assert torch.equal(there.encode(x).to_dense() != 0, (here.encode(x).to_dense() != 0)[:, order])
        torch.testing.assert_close(there(x), here(x))
    dead = torch.arange(M) % 3 == 0
    one, other = objective(coder, x, None, Moment(dead)), objective(moved, x, None, Moment(dead[order]))
    torch.testing.assert_close(one.loss, other.loss)
    theirs = gradients(other.loss, moved)
    for name, grad in gradients(one.loss, coder).items():
        torch.testing.assert_close(theirs[name], grad[order] if name in of_latents else grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu", "topk by norm", "batch_topk by norm"])
@few
@given(seed=seeds)
def test_what_the_encoder_gains_the_decoder_can_lose(kind, seed):
    """Latents scaled one by one, and the decoder rows by the inverse."""
    coder, x = coder_of(kind, seed), rows_of(seed=seed)
    scale = torch.exp(torch.randn(M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))

    def change(name, value):
        if name in ("W_enc", "b_enc", "b_mag") or (name == "threshold" and value.ndim):
            return value * scale.view(-1, *[1] * (value.ndim - 1))
        return value / scale[:, None] if name == "W_dec" else value

    other = clone_with(coder, change)
    for here, there in zip(in_both_modes(coder), in_both_modes(other), strict=True):
        torch.testing.assert_close(there.encode(x).to_dense(), here.encode(x).to_dense() * scale)
        torch.testing.assert_close(there(x), here(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sites", [False, True], ids=["one site", "crosscoder"])
@pytest.mark.parametrize("by_norm", [False, True], ids=["", "by norm"])
@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu", "topk", "batch_topk"])
def test_folded_norms_change_nothing(kind, by_norm, sites):
    coder, x = coder_of(kind, select_by_norm=by_norm, **(CROSSCODER if sites else {})), rows_of()
    with torch.no_grad():
        coder.W_dec[3] = 0  # a latent without a direction stays as it is
    if kind in ("topk", "batch_topk") and not by_norm:
        with pytest.raises(ValueError, match="norms can be folded where selection goes by norm or by a threshold"):
            coder.fold_norms_()
        return
    folded = copy.deepcopy(coder).fold_norms_()
    norms = coder.decoder_norms()
    assert norms[3] == 0 and not folded.config.select_by_norm
    wanted = torch.ones(M, dtype=torch.float64)
    wanted[3] = 0
    torch.testing.assert_close(folded.decoder_norms(), wanted)
    for here, there in zip(in_both_modes(coder), in_both_modes(folded), strict=True):
        torch.testing.assert_close(there(x), here(x), rtol=1e-12, atol=1e-12)
        others = torch.arange(M) != 3  # of norm 0, it is never selected by norm
        torch.testing.assert_close(
            there.encode(x).to_dense()[:, others], (here.encode(x).to_dense() * norms)[:, others]
        )


SHAPES = {
    "autoencoder": {},
    "without pre_bias": {"pre_bias": False},
    "transcoder": {"d_out": 5, "pre_bias": False},
    "skip transcoder": {"d_out": 5, "pre_bias": False, "skip": True},
    "crosscoder": CROSSCODER,
}


@pytest.mark.parametrize("shape", SHAPES)
@of_kinds
def test_folded_input_is_exact(kind, shape):
    """``folded(x) = trained(scale (x - centre)) / out_scale + out_centre``, the same latents, thresholds included."""
    coder, x = coder_of(kind, **SHAPES[shape]), rows_of()
    width, centre, scale = coder.config.output_width, rows_of(1, 5)[0], 0.3
    into = {"scale": scale, "centre": centre}
    if "transcoder" in shape:
        into |= {"out_scale": 1.7, "out_centre": rows_of(1, 6, width)[0]}
    folded = copy.deepcopy(coder).fold_input_(**into)
    out_scale = into.get("out_scale", scale)
    for trained, plain in zip(in_both_modes(coder), in_both_modes(folded), strict=True):
        wanted = trained.encode(scale * (x - centre)).to_dense() / out_scale
        torch.testing.assert_close(plain.encode(x).to_dense(), wanted)
        assert (wanted != 0).any()
        wanted = trained(scale * (x - centre)) / out_scale + into.get("out_centre", centre)
        torch.testing.assert_close(plain(x), wanted)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["topk", "batch_topk", "relu", "gated", "jumprelu"])
def test_folded_columns_are_exact(kind, skip):
    coder, x = coder_of(kind, skip=skip, **CROSSCODER), rows_of()
    scale, centre = rows_of(1, 8)[0].abs() + 0.1, rows_of(1, 9)[0]
    folded = copy.deepcopy(coder).fold_columns_(scale, centre)
    for trained, plain in zip(in_both_modes(coder), in_both_modes(folded), strict=True):
        inside = scale * (x - centre)
        torch.testing.assert_close(plain.encode(x).to_dense(), trained.encode(inside).to_dense())
        torch.testing.assert_close(plain(x), trained(inside) / scale + centre)


@of_kinds
@few
@given(seed=seeds)
def test_a_shift_of_rows_and_of_b_dec_cancels(kind, seed):
    fields, objective = KINDS[kind]
    coder, x, shift = coder_of(kind, seed), rows_of(seed=seed), 3 * rows_of(1, seed + 1)[0]
    moved = clone_with(coder, lambda name, value: value + shift if name == "b_dec" else value)
    for here, there in zip(in_both_modes(coder), in_both_modes(moved), strict=True):
        torch.testing.assert_close(there.encode(x + shift).to_dense(), here.encode(x).to_dense())
        torch.testing.assert_close(there(x + shift), here(x) + shift)
    dead = torch.arange(M) % 3 == 0
    losses = objective(coder, x, None, Moment(dead)).loss, objective(moved, x + shift, None, Moment(dead)).loss
    torch.testing.assert_close(*losses)


# I5: how many.


@few
@given(seed=seeds, n=st.integers(1, 30), k=st.integers(1, M), shift=st.floats(-2, 1))
def test_how_many_latents_are_active(seed, n, k, shift):
    x = rows_of(n, seed)
    top, batch = coder_of({}, seed, k=k), coder_of({"select": "batch_topk"}, seed, k=k)
    with torch.no_grad():
        top.b_enc += shift
        batch.b_enc += shift
    pre = (x - top.b_dec) @ top.W_enc.T + top.b_enc
    positive = (pre > 0).sum(1)
    assert torch.equal(top.encode(x).l0, positive.clamp(max=k))
    codes = batch.encode(x)
    assert codes.l0.sum() == min(n * k, positive.sum()) and (codes.l0 <= positive).all()
    smallest = batch.select(x)[1]
    assert torch.isinf(smallest) if positive.sum() == 0 else smallest == codes.values[codes.values > 0].min()


@of_kinds
@few
@given(seed=seeds)
def test_the_order_of_rows_does_not_matter(kind, seed):
    fields, objective = KINDS[kind]
    coder, x = coder_of(kind, seed), rows_of(seed=seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for c in in_both_modes(coder):
        torch.testing.assert_close(c.encode(x[order]).to_dense(), c.encode(x).to_dense()[order])
    one, other = copy.deepcopy(coder), copy.deepcopy(coder)
    moment = Moment(torch.arange(M) % 3 == 0)
    losses = objective(one, x, None, moment).loss, objective(other, x[order], None, moment).loss
    torch.testing.assert_close(*losses)
    theirs = gradients(losses[1], other)
    for name, grad in gradients(losses[0], one).items():
        torch.testing.assert_close(theirs[name], grad, rtol=1e-8, atol=1e-10)


# I7, I8, I10: steps, decoding, parts of a batch.


@pytest.mark.parametrize("unit", [True, False], ids=["unit decoder", "free decoder"])
@of_kinds
def test_a_step_with_sparse_gradients_is_one_with_dense_gradients(kind, unit):
    """Also where a matrix gets its gradient from several places; decoder rows stay of unit norm."""
    fields, objective = KINDS[kind]
    coders = [coder_of(kind, sparse_grad=sparse) for sparse in (False, True)]
    for coder in coders:
        if unit:
            coder.normalise_decoder_()
        matrix = {"params": [coder.W_dec], "project": unit, "renormalise": unit}
        rest = [p for name, p in coder.named_parameters() if name != "W_dec"]
        optimizer = Adam([matrix, {"params": rest}], lr=0.01)
        for step in range(3):
            loss = objective(coder, rows_of(seed=step), None, Moment(torch.arange(M) % 3 == 0, step=step)).loss
            loss.backward()
            if unit and step == 0:
                grad, w = coder.W_dec.grad.to_dense(), coder.W_dec.detach()
                along = (grad * w).sum(1, keepdim=True) * w
                expected = torch.sqrt(
                    sum(p.grad.to_dense().square().sum() for p in rest) + (grad - along).square().sum()
                )
                torch.testing.assert_close(optimizer.clip_grad_norm_(1e9), expected)
            optimizer.step()
            optimizer.zero_grad()
        if unit:
            torch.testing.assert_close(coder.decoder_norms(), torch.ones(M, dtype=torch.float64), rtol=0, atol=1e-6)
    for (name, one), other in zip(coders[0].named_parameters(), coders[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@of_kinds
@few
@given(seed=seeds)
def test_decoding_is_the_dense_product_and_its_transpose_collects(kind, seed):
    coder, x, y = coder_of(kind, seed), rows_of(seed=seed), rows_of(seed=seed + 1)
    codes = coder.encode(x).detach()
    decoded = decode(codes, coder.W_dec)
    torch.testing.assert_close(decoded, codes.to_dense() @ coder.W_dec)
    torch.testing.assert_close((decoded * y).sum(), (codes.to_dense() * (y @ coder.W_dec.T)).sum())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith(("batch", "matry"))])
def test_a_batch_in_two_halves(kind):
    """Of a loss whose rows are independent of each other, gradients can be accumulated over parts of a batch."""
    fields, objective = KINDS[kind]
    coder, x = coder_of(kind), rows_of(16)
    dead = None if coder.config.k_aux else torch.arange(M) % 3 == 0  # AuxK divides by the variance of a batch
    moment = Moment(dead, variance=2.0)
    whole = objective(coder, x, None, moment)
    parts = [objective(coder, half, None, moment) for half in x.chunk(2)]
    torch.testing.assert_close(whole.loss, sum(part.loss for part in parts) / 2)
    torch.testing.assert_close(whole.sse, sum(part.sse for part in parts))
    once = gradients(whole.loss, coder)
    coder.zero_grad()
    for name, grad in gradients(sum(part.loss for part in parts) / 2, coder).items():
        torch.testing.assert_close(grad, once[name])


# I11: special cases of each other.


def assert_same(one, other, x, objectives, dead=None, y=None, rename=lambda name: name):
    """The same outputs, losses and gradients of two coders."""
    for here, there in zip(in_both_modes(one), in_both_modes(other), strict=True):
        torch.testing.assert_close(here(x), there(x))
        torch.testing.assert_close(here.encode(x).to_dense(), there.encode(x).to_dense())
    losses = [f(c, x, y, Moment(dead, step=50)).loss for f, c in zip(objectives, (one, other), strict=True)]
    torch.testing.assert_close(*losses)
    mine, theirs = (gradients(loss, c) for loss, c in zip(losses, (one, other), strict=True))
    shared = mine.keys() & theirs.keys()
    assert {"W_enc", "b_enc", "W_dec", "b_dec"} <= shared
    for name in shared:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-8, atol=1e-10)


def remade(coder, **fields):
    """The same weights under another configuration."""
    config = dataclasses.replace(coder.config, **fields)
    other = SparseCoder(config, sparse_grad=coder.sparse_grad)
    known = other.state_dict().keys()
    other.load_state_dict({name: value for name, value in coder.state_dict().items() if name in known}, strict=False)
    return other


@pytest.mark.parametrize("dead", [None, torch.arange(M) % 3 == 0], ids=["", "dead"])
def test_matryoshka_of_one_dictionary_is_batch_topk(dead):
    coder = coder_of("batch_topk")
    other = copy.deepcopy(coder)
    assert_same(coder, other, rows_of(), (BatchTopK(), Matryoshka((M,))), dead)
    assert coder.threshold == other.threshold


def test_hierarchical_of_one_rank_is_topk():
    coder = coder_of("topk")
    assert_same(coder, copy.deepcopy(coder), rows_of(), (TopK(), HierarchicalTopK((K,))), torch.arange(M) % 3 == 0)


def test_jumprelu_of_one_dictionary_is_jumprelu():
    coder = coder_of("jumprelu")
    pair = JumpReLU("l0", 0.1, 0.5), JumpReLU("l0", 0.1, 0.5, prefixes=(M,))
    assert_same(coder, copy.deepcopy(coder), rows_of(), pair)


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "relu", "gated", "jumprelu"])
def test_a_skip_connection_of_zero_is_a_transcoder(kind):
    objective, x, y = KINDS[kind][1], rows_of(), rows_of(seed=4, d=5)
    skip = coder_of(kind, d_out=5, pre_bias=False, skip=True)
    with torch.no_grad():
        skip.W_skip.zero_()
    dead = torch.arange(M) % 3 == 0
    assert_same(skip, remade(skip, skip=False), x, (objective, objective), dead, y)


@pytest.mark.parametrize("kind", ["topk by norm", "batch_topk by norm", "relu", "jumprelu tanh"])
def test_a_crosscoder_of_one_site_is_an_autoencoder(kind):
    objective, coder = KINDS[kind][1], coder_of(kind)
    assert_same(coder, remade(coder, sites=(D,)), rows_of(), (objective, objective), torch.arange(M) % 3 == 0)


def test_a_crosscoder_is_an_autoencoder_of_joined_rows():
    """Without norms in the selection, the parts of a row do not matter."""
    coder = coder_of("batch_topk", **CROSSCODER)
    assert_same(coder, remade(coder, sites=None), rows_of(), (BatchTopK(), BatchTopK()), torch.arange(M) % 3 == 0)


def test_jumprelu_with_thresholds_of_zero_is_relu():
    jump = coder_of("jumprelu")
    with torch.no_grad():
        jump.threshold.zero_()
    objectives = JumpReLU("l0", 0.0, 1e-9), ReLU(0.0)
    assert_same(jump, remade(jump, select="relu"), rows_of(), objectives)


def test_gates_of_the_magnitudes_are_relu():
    gated = coder_of("gated")
    with torch.no_grad():
        gated.r_mag.zero_()
        gated.b_mag.copy_(gated.b_enc)
    plain, x = remade(gated, gated=False), rows_of()
    torch.testing.assert_close(gated.encode(x).to_dense(), plain.encode(x).to_dense())
    torch.testing.assert_close(gated(x), plain(x))


def test_one_group_is_the_best_latent():
    dead = torch.arange(M) % 3 == 0
    one = coder_of("topk", k=1)
    assert_same(one, remade(one, select="group_max"), rows_of(), (TopK(), TopK()), dead)


def test_topk_of_all_is_relu():
    coder = coder_of({"k": M})
    assert_same(coder, remade(coder, select="relu"), rows_of(), (TopK(), ReLU(0.0)))


def test_batch_topk_of_all_is_relu():
    coder, x = coder_of({"k": M, "select": "batch_topk"}), rows_of()
    torch.testing.assert_close(coder(x), remade(coder, select="relu")(x))


def test_a_batch_of_one_row_is_topk():
    batch, x = coder_of("batch_topk"), rows_of(1)
    top = remade(batch, select="topk")
    torch.testing.assert_close(batch.encode(x).to_dense(), top.encode(x).to_dense())
    torch.testing.assert_close(batch(x), top(x))


def test_abs_of_what_is_not_negative_is_topk():
    coder = coder_of({"select": "abs", "activation": "none"}, pre_bias=False)
    with torch.no_grad():
        coder.W_enc.abs_()
        coder.b_enc.abs_()
    other = remade(coder, select="topk", activation="relu")
    assert_same(coder, other, rows_of().abs(), (TopK(), TopK()))


def test_moments_without_dead_latents_are_moments_without_aux():
    coder, x = coder_of("topk"), rows_of()
    none = torch.zeros(M, dtype=torch.bool)
    torch.testing.assert_close(TopK()(coder, x, None, Moment(none)).loss, TopK()(coder, x, None, Moment()).loss)


# I12, I13: counters and metrics.


@few
@given(seed=seeds, parts=st.integers(1, 5))
def test_dead_latents_do_not_depend_on_the_order_within_a_batch(seed, parts):
    coder, counters = coder_of("batch_topk", seed), [DeadLatents(M, 50) for _ in range(3)]
    for part in range(parts):
        x = rows_of(17, seed + part)
        codes = coder.encode(x)
        shuffled = codes[torch.randperm(17, generator=torch.Generator().manual_seed(part))]
        dense = codes.to_dense()
        for counter, what in zip(counters, (codes, shuffled, type(codes).from_dense(dense)), strict=True):
            counter.update(what)
    assert all(torch.equal(c.tokens_since_fired, counters[0].tokens_since_fired) for c in counters)


def test_dead_latents_of_workers_merge_by_the_least():
    """Two workers see a half of every batch each: a latent has fired as lately as at the one where it fired last."""
    coder, whole = coder_of("topk", m=300, k=2, k_aux=0), DeadLatents(300, 50)
    halves = [DeadLatents(300, 50), DeadLatents(300, 50)]
    for step in range(6):
        x = rows_of(10, step)
        whole.update(coder.encode(x))
        for half, part in zip(halves, x.chunk(2), strict=True):
            half.update(coder.encode(part))
    merged = torch.minimum(*(half.tokens_since_fired for half in halves)) * 2  # each counts half of the tokens
    assert torch.equal(merged, whole.tokens_since_fired) and merged.max() == 60 and merged.min() == 0


@few
@given(seed=seeds, cut=st.lists(st.integers(1, 59), max_size=4), offset=st.sampled_from([0.0, 1e3]))
def test_metrics_of_parts_merge_to_those_of_the_whole(seed, cut, offset):
    coder, x = coder_of("jumprelu", seed), rows_of(60, seed) + offset
    codes, y = coder.encode(x).detach(), coder(x).detach()
    whole = ReconstructionMetrics(M).update(x, y, codes).result()
    merged = ReconstructionMetrics(M)
    edges = [0, *sorted(set(cut)), 60]
    for start, stop in zip(edges, edges[1:], strict=False):
        part = slice(start, stop)
        merged.merge(ReconstructionMetrics(M).update(x[part], y[part], codes[part]))
    found = merged.result()
    direct = (x - y).square().sum() / (x - x.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(whole["fvu"], rel=1e-9) == pytest.approx(float(direct), rel=1e-9)
    assert found["l0"] == whole["l0"] and found["dead_latents"] == whole["dead_latents"]


# I14, I15: files, and inputs out of the ordinary.


@pytest.mark.parametrize("shape", SHAPES)
@of_kinds
def test_what_is_loaded_is_what_was_saved(kind, shape, tmp_path):
    coder, x = coder_of(kind, **SHAPES[shape]).eval(), rows_of()
    loaded = SparseCoder.load(coder.save(tmp_path / "coder"))
    assert loaded.config == coder.config and not loaded.training
    assert loaded.state_dict().keys() == coder.state_dict().keys()
    assert all(map(torch.equal, loaded.state_dict().values(), coder.state_dict().values()))
    assert torch.equal(loaded(x), coder(x))
    assert torch.equal(loaded.encode(x).to_dense(), coder.encode(x).to_dense())


@pytest.mark.parametrize("rows", ["zeros", "one huge row", "tiny", "huge", "one row of zeros"])
@pytest.mark.parametrize("dead", ["none", "all"])
@of_kinds
def test_no_nan(kind, dead, rows):
    fields, objective = KINDS[kind]
    for start in ("fresh", "random", "zero"):
        coder = coder_of(kind, dtype="float32")
        if start == "fresh":
            coder.tied_init_()
        with torch.no_grad():
            for value in coder.state_dict().values():
                value.mul_(0 if start == "zero" else 1)
        x = rows_of().float()
        x = {
            "zeros": torch.zeros_like(x),
            "one huge row": torch.cat([x, 1e6 * x[:1]]),
            "tiny": 1e-12 * x,
            "huge": 1e6 * x,
            "one row of zeros": torch.zeros_like(x[:1]),
        }[rows]
        mask = torch.full((M,), dead == "all")
        result = objective(coder, x, None, Moment(mask))
        for name, value in {
            "loss": result.loss,
            "mse": result.mse,
            **result.terms,
            **gradients(result.loss, coder),
        }.items():
            assert torch.isfinite(value).all(), (start, name)
        for c in in_both_modes(coder):
            assert torch.isfinite(c(x)).all() and torch.isfinite(c.threshold if hasattr(c, "threshold") else x).all()


@of_kinds
def test_a_batch_of_nothing(kind):
    coder, nothing = coder_of(kind), rows_of(0)
    for c in in_both_modes(coder):
        assert c(nothing).shape == (0, D) and c.encode(nothing).to_dense().shape == (0, M)
    with pytest.raises(ValueError, match="x must have at least one row"):
        KINDS[kind][1](coder, nothing, None, Moment())
