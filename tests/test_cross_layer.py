# SPDX-License-Identifier: Apache-2.0
"""Cross-layer transcoders: the module, its losses against plain torch, files, folding, and training."""

import dataclasses
import json

import pytest
import torch

from fusae import SparseCodes, codes_from_dense
from fusae.formats import FormatError
from fusae.nn import (
    CrossLayerConfig,
    CrossLayerTranscoder,
    DeadLatents,
    Moment,
    SparseCoder,
    SparseCoderConfig,
    init_thresholds_,
    join_codes,
    load,
    split_codes,
)
from fusae.nn.objectives import BatchTopK, CrossLayer, JumpReLU, Matryoshka, ReLU, TopK
from fusae.testing import losses as dense
from fusae.testing.compare import assert_grads, assert_within_budget

L, D, OUT, M, K, N = 3, 6, 5, 16, 4, 11
WIDE = 0.8  # of a window: some entries of most rows are in it
TOP = {"k_aux": 5}
JOINT = TOP | {"select": "batch_topk", "joint": True}

# Name: fields of the transcoder, the form of its loss.
FORMS = {
    "topk": (TOP, TopK(0.25)),
    "topk by norm": (TOP | {"select_by_norm": True}, TopK()),
    "topk skip": (TOP | {"skip": True}, TopK()),
    "topk of 1": (TOP | {"k": 1}, TopK()),
    "batch_topk": (TOP | {"select": "batch_topk"}, BatchTopK(0.25)),
    "batch_topk by norm, skip": (TOP | {"select": "batch_topk", "select_by_norm": True, "skip": True}, BatchTopK()),
    "joint": (JOINT, BatchTopK(0.25)),
    "joint by norm, skip": (JOINT | {"select_by_norm": True, "skip": True}, BatchTopK()),
    "joint of 1": (JOINT | {"k": 1}, BatchTopK()),
    "joint of many": (JOINT | {"k": 12}, BatchTopK()),  # more than m from all layers
    "relu": ({"select": "relu"}, ReLU(0.3)),
    "relu plain L1": ({"select": "relu"}, ReLU(0.3, by_norm=False)),
    "jumprelu l0": ({"select": "threshold"}, JumpReLU("l0", 0.1, WIDE)),
    "jumprelu l0_squared": ({"select": "threshold"}, JumpReLU("l0_squared", 0.1, WIDE)),
    "jumprelu tanh": ({"select": "threshold", "skip": True}, JumpReLU("tanh", 0.3, WIDE, True, 1.5, 0.2)),
    "jumprelu anthropic": ({"select": "threshold"}, JumpReLU.anthropic(OUT)),
}


def coder_of(fields, layers=L, seed=0, sparse_grad=False, **more):
    """A transcoder away from its start, with biases below 0: a row of zeros has no positive latent."""
    config = CrossLayerConfig(
        **({"layers": layers, "d": D, "d_out": OUT, "m": M, "k": K, "dtype": "float64"} | fields | more)
    )
    coder = CrossLayerTranscoder(config, seed=seed, sparse_grad=sparse_grad)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.5 * noise).to(parameter.dtype)
            if name.endswith("b_enc"):
                parameter.copy_(-0.1 - parameter.abs())
            if name.endswith("threshold"):
                parameter.abs_()
    return coder


def batch_of(layers=L, n=N, seed=1):
    """Inputs ``[n, L, d]`` and targets ``[n, L, d_out]``; row 3 has negative pre-activations only."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, layers, w, generator=generator, dtype=torch.float64) for w in (D, OUT))
    x[3:4] = 0.0
    return x, y


def dead_of(kind, latents=L * M):
    some = torch.rand(latents, generator=torch.Generator().manual_seed(5)) < 0.4
    some[:M] = False  # none in layer 0
    return {"none given": None, "none": torch.zeros_like(some), "some": some, "all": torch.ones_like(some)}[kind]


def gradients(loss, coder, x):
    named = {"x": x, **dict(coder.named_parameters())}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad.to_dense()
        for (name, value), grad in zip(named.items(), grads, strict=True)
    }


def compare(name, sparse_grad=False, pick=lambda x: x, layers=L, **moment):
    fields, form = FORMS[name]
    coder = coder_of(fields, layers, sparse_grad=sparse_grad)
    x, y = (pick(t) for t in batch_of(layers))
    x.requires_grad_()
    moment = Moment(**moment)
    result = CrossLayer(form)(coder, x, y, moment)
    wanted = dense.cross_layer(coder, x, y, moment, form)
    torch.testing.assert_close(result.loss, wanted, rtol=1e-10, atol=1e-12)
    ours, theirs = gradients(result.loss, coder, x), gradients(wanted, coder, x)
    for key, grad in ours.items():
        error = (grad - theirs[key]).norm() / theirs[key].norm().clamp_min(1e-300)
        assert error < 1e-10 or (not grad.any() and not theirs[key].any()), (key, float(error))
    return result, coder, ours


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dead", ["none given", "some", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_all_gradients(form, dead, sparse_grad):
    _, _, grads = compare(form, sparse_grad, dead=dead_of(dead), ramp=0.7)
    moved = {name for name, grad in grads.items() if grad.any()}
    assert moved == set(grads), f"no gradient in the case: {set(grads) - moved}"


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("rows", ["one", "one without positives", "all alike", "all negative", "given variance"])
@pytest.mark.parametrize("form", ["topk", "batch_topk", "joint", "relu", "jumprelu l0", "jumprelu tanh"])
def test_odd_batches(form, rows, sparse_grad):
    pick = {
        "one": lambda x: x[:1],
        "one without positives": lambda x: x[3:4],
        "all alike": lambda x: x[5].expand(11, -1, -1).clone(),
        "all negative": lambda x: x[3].expand(5, -1, -1).clone(),
        "given variance": lambda x: x,
    }[rows]
    variance = [2.5, 0.5, 1.0] if rows == "given variance" else None
    result, _, grads = compare(form, sparse_grad, pick, dead=dead_of("some"), variance=variance)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    if "negative" in rows:
        assert not result.codes.values.any()


def test_one_variance_for_all_layers_and_no_dead_latents():
    fields, form = FORMS["topk"]
    coder, (x, y) = coder_of(fields), batch_of()
    losses = [CrossLayer(form)(coder, x, y, Moment(variance=v)).loss for v in (2.0, [2.0] * 3, torch.full((3,), 2.0))]
    assert losses[0] == losses[1] == losses[2]
    empty = CrossLayer(form)(coder, x, y, Moment(dead_of("none"), variance=2.0))
    assert empty.aux == 0
    torch.testing.assert_close(empty.loss, losses[0])


@pytest.mark.parametrize("form", FORMS)
def test_one_layer_is_a_transcoder(form):
    fields, objective = FORMS[form]
    ours = coder_of(fields, 1)
    shape = ours.config.source(0)
    theirs = SparseCoder(SparseCoderConfig(**(shape.to_dict() | {"skip": ours.config.skip})), seed=None)
    names = {name.removeprefix("sources.0."): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(names | {"b_dec": ours.b_dec.detach()[0]})
    x, y = batch_of(1)
    dead = dead_of("all", M)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        (codes,) = ours.encode(x)
        wanted = theirs.encode(x[:, 0])
        assert torch.equal(codes.to_dense(), wanted.to_dense())
        assert torch.equal(ours(x)[:, 0], theirs(x[:, 0])) and torch.equal(ours(x[:, 0]), theirs(x[:, 0]))
    ours.train(), theirs.train()
    for moment in (Moment(ramp=0.5, step=3), Moment(dead, variance=3.0)):
        one, other = CrossLayer(objective)(ours, x, y, moment), objective(theirs, x[:, 0], y[:, 0], moment)
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-13, atol=0)
        mine, yours = gradients(one.loss, ours, x.requires_grad_()), gradients(other.loss, theirs, x)
        for name, grad in yours.items():
            got = mine["b_dec"][0] if name == "b_dec" else mine.get(name, mine.get(f"sources.0.{name}"))
            torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-13)
        if "threshold" in theirs.state_dict():
            assert torch.equal(ours.sources[0].threshold, theirs.threshold)
    fresh = CrossLayerTranscoder(ours.config, seed=4), SparseCoder(theirs.config, seed=4)
    assert torch.equal(fresh[0].sources[0].W_enc, fresh[1].W_enc)
    assert torch.equal(fresh[0].sources[0].W_dec, fresh[1].W_dec) and not fresh[0].b_dec.any()


@pytest.mark.parametrize("form", FORMS)
def test_what_a_loss_reports(form):
    fields, objective = FORMS[form]
    coder, (x, y) = coder_of(fields), batch_of()
    result = CrossLayer(objective)(coder, x.reshape(N, -1), y.reshape(N, -1), Moment(dead_of("some"), ramp=0.5))
    f = result.codes.to_dense()
    assert f.shape == (N, L * M) and result.reconstruction.shape == (N, L * OUT)
    y_hat = coder.decode([codes_from_dense(part.contiguous()) for part in f.split(M, 1)], x).detach()
    torch.testing.assert_close(result.reconstruction, y_hat.reshape(N, -1))
    torch.testing.assert_close(result.sse, (y - y_hat).square().sum())
    errors = [dense.error(y[:, t], y_hat[:, t], Moment()) for t in range(L)]
    torch.testing.assert_close(result.mse, sum(errors))
    for t, error in enumerate(errors):
        torch.testing.assert_close(result.terms[f"mse_layer_{t}"], error)
    assert (result.aux is not None) == (coder.config.k_aux > 0)
    counter = DeadLatents(L * M, 5)
    counter.update(result.codes)
    assert torch.equal(counter.tokens_since_fired, torch.where((f != 0).any(0), 0, N))
    for name, value in [("mse", result.mse), ("sse", result.sse), *result.terms.items()]:
        assert value.ndim == 0 and not value.requires_grad, name
    assert not result.codes.values.requires_grad and not result.reconstruction.requires_grad


def test_layouts_and_leading_dimensions():
    coder, (x, _) = coder_of({"skip": True}), batch_of(n=6)
    y = coder(x)
    assert y.shape == (6, L, OUT)
    torch.testing.assert_close(coder(x.reshape(6, -1)), y.reshape(6, -1), rtol=0, atol=0)
    torch.testing.assert_close(coder(x.reshape(2, 3, L, D)), y.reshape(2, 3, L, OUT), rtol=0, atol=0)
    torch.testing.assert_close(coder(x[0]), y[0])
    codes = coder.encode(x.reshape(2, 3, L, D))
    assert [part.shape for part in codes] == [(2, 3, M)] * L and coder.decode(codes, x).shape == (2, 3, L, OUT)
    ragged = coder_of({"select": "relu"})
    assert ragged(x.reshape(2, 3, L, D)).shape == (2, 3, L, OUT) and ragged(x[:0]).shape == (0, L, OUT)
    codes, aux = coder_of(TOP).encode(x, dead_of("some"), 2)
    assert [part.values.shape for part in aux] == [(6, 2)] * L and not aux[0].values.any() and len(codes) == L


def test_a_latent_writes_to_its_own_layer_and_to_later_ones():
    coder, (x, _) = coder_of({}), batch_of(n=5)
    before = coder(x)
    for s in range(L):
        moved = x.clone()
        moved[:, s] += 1.0
        same = (coder(moved) == before).all(-1).all(0)
        assert same.tolist() == [t < s for t in range(L)]
    norms = coder.decoder_norms().view(L, M)
    torch.testing.assert_close(norms[1], coder.sources[1].W_dec.detach().view(M, 2, OUT).norm(dim=2).sum(1))


@pytest.mark.parametrize("kind", ["fixed", "ragged", "loose"])
def test_joined_codes(kind):
    generator = torch.Generator().manual_seed(0)
    sizes, rows = (5, 8, 3), []
    for m in sizes:
        x = torch.randn(4, m, generator=generator, dtype=torch.float64).relu()
        x[2] = 0
        rows.append(x)
    parts = [codes_from_dense(x) for x in rows]
    if kind == "loose":  # storage behind the entries in use, which may hold anything
        parts = [
            SparseCodes(
                torch.cat([p.values, torch.ones(2).double()]), torch.cat([p.indices, p.indices[:2]]), p.m, p.offsets
            )
            for p in parts
        ]
    if kind == "fixed":
        parts = [SparseCodes(v, i.int(), x.shape[1]) for x in rows for v, i in [x.topk(x.shape[1])]]
    for part in parts:
        part.values.requires_grad_()
    joined = join_codes(parts)
    assert joined.m == 16
    torch.testing.assert_close(joined.to_dense(), torch.cat(rows, 1), rtol=0, atol=0)
    weight = torch.randn(4, 16, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((joined.to_dense() * weight).sum(), [part.values for part in parts])
    wanted = torch.autograd.grad(
        (torch.cat([p.to_dense() for p in parts], 1) * weight).sum(), [part.values for part in parts]
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    for part, before in zip(split_codes(joined, sizes), rows, strict=True):
        assert part.is_ragged and torch.equal(part.to_dense(), before) and torch.equal(part.l0, (before != 0).sum(1))
    with pytest.raises(ValueError, match="codes must be over 15 latents, got 16"):
        split_codes(joined, [5, 10])
    for other in (
        parts[0][:2],
        parts[0].to_ragged() if kind == "fixed" else SparseCodes(rows[0][:, :2], torch.tensor([[0, 1]] * 4).int(), 5),
    ):
        with pytest.raises(ValueError, match="parts must be codes of the same rows, all ragged or none, got"):
            join_codes([*parts, other])


@pytest.mark.parametrize("select", ["topk", "relu"])
def test_joined_codes_decode(select):
    coder, (x, _) = coder_of({"select": select, "skip": True}), batch_of()
    codes = coder.encode(x)
    torch.testing.assert_close(coder.decode(join_codes(codes), x), coder.decode(codes, x))


@pytest.mark.parametrize("select", ["topk", "batch_topk", "relu", "threshold"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files(tmp_path, select, dtype):
    coder = coder_of({"select": select, "skip": True, "dtype": dtype})
    x = batch_of()[0].to(coder.config.torch_dtype)
    coder.save(tmp_path)
    for loaded in (load(tmp_path), CrossLayerTranscoder.load(tmp_path)):
        assert type(loaded) is CrossLayerTranscoder and loaded.config == coder.config and not loaded.training
        assert loaded.state_dict().keys() == coder.state_dict().keys()
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in coder.state_dict().items())
        assert torch.equal(loaded(x), coder.eval()(x))


def test_damaged_and_foreign_files(tmp_path):
    coder_of({}).save(tmp_path / "ours")
    SparseCoder(SparseCoderConfig(4, 8, 2)).save(tmp_path / "coder")
    assert type(load(tmp_path / "coder")) is SparseCoder
    with pytest.raises(FormatError, match="field 'format' must be 'fusae.SparseCoder', got 'fusae.CrossLayer"):
        SparseCoder.load(tmp_path / "ours")
    with pytest.raises(FormatError, match="field 'format' must be 'fusae.CrossLayerTranscoder', got 'fusae.Sparse"):
        CrossLayerTranscoder.load(tmp_path / "coder")
    with pytest.raises(FileNotFoundError, match="coder.json is not there"):
        load(tmp_path)
    path = tmp_path / "ours" / "coder.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"format": "other"}))
    with pytest.raises(FormatError, match="must be 'fusae.SparseCoder' or 'fusae.CrossLayerTranscoder', got 'other'"):
        load(tmp_path / "ours")
    path.write_text(json.dumps(about | {"config": about["config"] | {"m": 0}}))
    with pytest.raises(FormatError, match="coder.json: field 'config': m must be between 1"):
        load(tmp_path / "ours")
    path.write_text(json.dumps(about))
    weights = tmp_path / "ours" / "coder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(FormatError, match="is damaged: its sha256"):
        load(tmp_path / "ours")


@pytest.mark.parametrize("select", ["topk", "batch_topk", "relu", "threshold"])
def test_folding_of_scale_and_centre(select):
    by_norm = select in ("topk", "batch_topk")
    coder, (x, _) = coder_of({"select": select, "skip": True, "select_by_norm": by_norm}).eval(), batch_of()
    if select == "batch_topk":
        for source in coder.sources:
            source.threshold.fill_(0.5)
    scale, out_scale = [0.5, 2.0, 3.0], [1.5, 0.25, 1.0]
    centre, out_centre = torch.randn(L, D).double(), torch.randn(L, OUT).double()
    with torch.no_grad():
        inner = (x - centre) * torch.tensor(scale).double()[:, None]
        wanted = coder(inner) / torch.tensor(out_scale).double()[:, None] + out_centre
        codes = [part.to_dense() for part in coder.encode(inner)]
        if by_norm:
            with pytest.raises(ValueError, match="select_by_norm: call fold_norms_"):
                coder.fold_input_(scale)
            coder.fold_norms_()
            torch.testing.assert_close(coder.decoder_norms(), torch.ones(L * M).double())
            assert not coder.config.select_by_norm and not coder.sources[1].config.select_by_norm
        coder.fold_input_(scale, centre.flatten(), out_scale, out_centre.flatten())
        torch.testing.assert_close(coder(x), wanted)
        for part, before in zip(coder.encode(x), codes, strict=True):
            assert torch.equal(part.to_dense() != 0, before != 0), "the same latents are active"


def test_starts():
    coder = CrossLayerTranscoder(CrossLayerConfig(L, D, M, K, "threshold", d_out=OUT, skip=True), seed=3)
    for source in coder.sources:
        torch.testing.assert_close(source.W_dec.norm(dim=1), torch.ones(M))
        torch.testing.assert_close(source.W_enc.norm(dim=1), torch.ones(M))
        init_thresholds_(source, 0.1)
    assert not torch.equal(coder.sources[0].W_enc, coder.sources[1].W_enc)
    assert not coder.W_skip.any() and not coder.b_dec.any()
    coder.init_uniform_(1)
    for source in coder.sources:
        for weight, bound in ((source.W_enc, M**-0.5), (source.W_dec, (L * OUT) ** -0.5)):
            assert 0.9 * bound < weight.abs().max() <= bound
        assert not source.threshold.any()
    y = torch.randn(20, L * OUT) + 3
    coder.init_b_dec_(y, "mean")
    torch.testing.assert_close(coder.b_dec.flatten(), y.mean(0))
    assert (coder.init_b_dec_(y).b_dec.flatten() - y.mean(0)).norm() < 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CrossLayerConfig(0, D, M, K), "layers must be at least 1, got 0"),
        (lambda: CrossLayerConfig(L, D, M, M + 1), "k must be between 1 and m = 16, got 17"),
        (lambda: CrossLayerConfig(L, D, M, K, "abs"), "select must be one of 'topk', 'batch_topk', .* got 'abs'"),
        (lambda: CrossLayerConfig(L, D, M, K, "relu", k_aux=2), "k_aux must be 0 with select 'relu'"),
        (lambda: CrossLayerConfig(2**16, D, 2**16, K), "layers times m must be between 1 and 2147483647"),
        (lambda: CrossLayerConfig.from_dict({"layers": 2, "d": 3, "m": 4}), "lacks the field 'k'"),
        (lambda: CrossLayerTranscoder(SparseCoderConfig(4, 8, 2)), "config must be a fusae.nn.CrossLayerConfig"),
        (lambda: coder_of({})(torch.zeros(2, D).double()), r"must have shape \[..., 3, 6\] or \[n, 18\], .* \[2, 6\]"),
        (lambda: coder_of({})(torch.zeros(2, L, D)), "x must have the dtype of the parameters, torch.float64"),
        (lambda: coder_of({}).decode([]), "codes must be 3, one for each layer, got 0"),
        (lambda: coder_of(TOP).encode(batch_of()[0], dead_of("all", M)), r"have shape \[48\], those of all layers"),
        (lambda: coder_of({}).fold_input_([1.0]), "scale must be 3 numbers, one for each layer, got 1"),
        (lambda: CrossLayer(Matryoshka((M,))), "form must be an objective of TopK, BatchTopK, ReLU, JumpReLU, got Mat"),
        (lambda: CrossLayer(TopK(multi_topk=0.1)), "form must be without multi_topk and prefixes"),
        (lambda: CrossLayer(JumpReLU("tanh")), "must have sparsity and tanh_scale with penalty 'tanh'"),
        (lambda: CrossLayer(ReLU())(coder_of({}), *batch_of(), Moment()), "objective ReLU needs a coder with"),
        (lambda: CrossLayer()(coder_of({}), batch_of()[0], None, Moment()), "target must be given"),
        (lambda: CrossLayer()(coder_of({}), *batch_of(), Moment(variance=[1.0])), "variance must be one for each of 3"),
    ],
)  # fmt: skip
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("form", ["topk", "batch_topk", "joint", "jumprelu tanh"])
def test_autocast(form, sparse_grad):
    fields, objective = FORMS[form]
    coder = coder_of(fields, sparse_grad=sparse_grad, dtype="float32")
    x, y = (t.float() for t in batch_of(n=64))
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = CrossLayer(objective)(coder, x.requires_grad_(), y, Moment(dead_of("some"), variance=3.0)).loss
        assert loss.dtype == torch.float32
        results.append((loss, gradients(loss, coder, x)))
    (loss, ours), (wanted, theirs) = results
    torch.testing.assert_close(loss, wanted, rtol=0.02, atol=0)
    for name, grad in ours.items():
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), theirs[name].flatten(), dim=0)
        assert grad.dtype == torch.float32 and cosine > 0.95, (name, cosine)


def as_dtype(coder, dtype):
    other = CrossLayerTranscoder(dataclasses.replace(coder.config, dtype=dtype), sparse_grad=coder.sparse_grad)
    other.load_state_dict(coder.state_dict())
    return other


@pytest.mark.parametrize("form", FORMS)
def test_float32_within_its_budget(form):
    fields, objective = FORMS[form]
    coder = as_dtype(coder_of(fields), "float32")
    exact, moment, results = as_dtype(coder, "float64"), Moment(dead_of("some"), variance=[3.0, 1.0, 2.0]), []
    for c, loss in ((coder, CrossLayer(objective)), (coder, None), (exact, None)):
        x, y = (t.to(c.config.torch_dtype) for t in batch_of())
        x.requires_grad_()
        value = dense.cross_layer(c, x, y, moment, objective) if loss is None else loss(c, x, y, moment).loss
        results.append((value, gradients(value, c, x)))
    (loss, ours), (loss_32, plain), (loss_64, oracle) = results
    assert_within_budget(loss[None], loss_32[None], loss_64[None], "loss")
    for name in ours:
        assert_grads(ours[name], plain[name], oracle[name], f"gradient of {name}")


@pytest.mark.parametrize("form", ["topk skip", "joint by norm, skip", "relu"])
def test_parameters_in_16_bits(form):
    fields, objective = FORMS[form]
    coder = as_dtype(coder_of(fields), "bfloat16")
    x, y = (t.bfloat16() for t in batch_of(n=64))
    moment = Moment(dead_of("some"), variance=3.0)
    result = CrossLayer(objective)(coder, x, y, moment)
    result.loss.backward()
    wanted = CrossLayer(objective)(as_dtype(coder, "float64"), x.double(), y.double(), moment)
    assert result.loss.dtype == torch.float32 and result.reconstruction.dtype == torch.bfloat16
    torch.testing.assert_close(result.loss.double(), wanted.loss, rtol=0.02, atol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in coder.parameters())
