# SPDX-License-Identifier: Apache-2.0
"""What must hold of every dictionary, whatever its weights: symmetries, counts, exact folding and files, and no NaN.

Matching pursuit (that its residual never grows) is not here: no coder of fusae encodes by a loop.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusae import decode, encode_batch_topk, encode_threshold, encode_topk
from fusae.eval.metrics import ReconstructionMetrics
from fusae.nn import DeadLatents, Moment, SparseCoder
from fusae.optim import Adam
from fusae.testing.coders import CROSSCODER, KINDS, SHAPES, K, M, coder_of, gradients, rows_of

few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**20)

of_kinds = pytest.mark.parametrize("kind", KINDS)


def clone_with(coder, change):
    """A copy of which the weights are changed: ``change(name, value)`` gives the new value."""
    other = copy.deepcopy(coder)
    with torch.no_grad():
        for name, value in other.state_dict().items():
            value.copy_(change(name, value.clone()))
    return other


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
        coder.W_dec[3] = 0  # a latent without a direction
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
        counted = torch.arange(M) != (M if by_norm else 3)  # without norms in the selection it goes on as it was
        wanted = here.encode(x).to_dense() * norms
        torch.testing.assert_close(there.encode(x).to_dense()[:, counted], wanted[:, counted])


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


# I9: a dictionary in shards.


@few
@given(seed=seeds, cuts=st.lists(st.integers(1, 59), max_size=5), k=st.integers(1, 60), norms=st.booleans())
def test_latents_can_be_split_over_shards(seed, cuts, k, norms):
    """Every shard selects by itself, and the selections are merged, the larger score and then the lower latent first.
    Small integers: most scores are tied."""
    n, d, m = 7, 5, 60
    generator = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((n, d), (m, d), (m,)))
    scale = torch.randint(1, 4, (m,), generator=generator).float() if norms else torch.ones(m)
    edges = [0, *sorted(set(cuts)), m]
    shards = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]

    def merged(parts, count):
        """The `count` best of dense ``[n, width]`` parts by score, of all rows together or of each one."""
        dense = torch.cat(parts, 1)
        score = (dense * scale).reshape(1, -1) if count == n * k else dense * scale
        best = score.sort(dim=1, descending=True, stable=True).indices[:, :count]
        return torch.zeros_like(score).scatter(1, best, dense.reshape(score.shape).gather(1, best)).reshape(n, m)

    def of(encode, shard, most):
        width = shard.stop - shard.start
        found = encode(x, W[shard], b[shard], min(most, width), norms=scale[shard])
        return (found[0] if isinstance(found, tuple) else found).to_dense()

    top = [of(encode_topk, shard, k) for shard in shards]
    assert torch.equal(merged(top, k), of(encode_topk, slice(0, m), k))
    # In one row of a batch top-k all n k may be of one shard.
    batch = [of(encode_batch_topk, shard, n * k) for shard in shards]
    assert torch.equal(merged(batch, n * k), of(encode_batch_topk, slice(0, m), k))
    above = [encode_threshold(x, W[shard], b[shard], 1.0, norms=scale[shard]).to_dense() for shard in shards]
    assert torch.equal(torch.cat(above, 1), encode_threshold(x, W, b, 1.0, norms=scale).to_dense())


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


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@few
@given(seed=seeds)
def test_what_is_projected_is_across_the_rows_and_stays_as_it_is(sparse, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(6, 5, generator=generator, dtype=torch.float64), dim=1)
    grad = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    across = grad - (grad * rows).sum(1, keepdim=True) * rows

    def moments(grad, project=True):
        rows_now = rows.clone().requires_grad_()
        rows_now.grad = grad.to_sparse(1) if sparse else grad.clone()
        optimizer = Adam([{"params": [rows_now], "project": project, "renormalise": project}], lr=0.1)
        optimizer.step()
        return optimizer.state[rows_now]["exp_avg"] / 0.1, rows_now.detach()

    (once, moved), (twice, same), (plain, _) = moments(grad), moments(across), moments(across, project=False)
    torch.testing.assert_close((once * rows).sum(1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(once, plain)
    torch.testing.assert_close(twice, once)
    torch.testing.assert_close(same, moved)
    along, still = moments(3.0 * rows)
    assert along.abs().max() < 1e-14 and (still - rows).abs().max() < 1e-6


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


@pytest.mark.parametrize("shape", SHAPES)
@of_kinds
def test_a_batch_of_nothing(kind, shape):
    coder, nothing = coder_of(kind, **SHAPES[shape]), rows_of(0)
    for c in in_both_modes(coder):
        assert c(nothing).shape == (0, c.config.output_width) and c.encode(nothing).to_dense().shape == (0, M)
    with pytest.raises(ValueError, match="x must have at least one row"):
        KINDS[kind][1](coder, nothing, rows_of(0, d=c.config.output_width), Moment())
