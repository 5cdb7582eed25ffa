# SPDX-License-Identifier: Apache-2.0
"""`fusae.nn.SparseCoder` against the dense formula in float64, and what belongs to it."""

import pytest
import torch

from fusae import SparseCodes
from fusae.nn import DeadLatents, SparseCoder, SparseCoderConfig, geometric_median, unit_rows_

N, D, M, K, K_AUX = 11, 6, 20, 4, 5


def make(seed=0, sparse_grad=False, bias=1.2, **fields):
    """A coder away from its tied start, with biases that leave some rows with fewer than k positives."""
    fields = {"d": D, "m": M, "k": K, "k_aux": K_AUX, "dtype": "float64"} | fields
    coder = SparseCoder(SparseCoderConfig(**fields), seed=seed, sparse_grad=sparse_grad)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for param in coder.parameters():
            param += 0.5 * torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        coder.b_enc -= bias
    return coder


def rows(n=N, seed=1, dtype=torch.float64):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_codes(coder, x, k, mask=None):
    """Dense ``[n, m]`` codes by the textbook: all pre-activations, top-k, ReLU."""
    config = coder.config
    pre = (x - coder.b_dec) @ coder.W_enc.T + coder.b_enc
    score = pre.abs() if config.select == "abs" else pre
    if config.select_by_norm:
        score = score * coder.W_dec.norm(dim=1)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
        k = min(k, int(mask.sum()))
    chosen = torch.zeros_like(pre).scatter(1, score.topk(k, dim=1).indices, 1.0)
    return (pre.relu() if config.activation == "relu" else pre) * chosen


def dense_loss(coder, x, dead, coefficient, variance=None):
    x_hat = dense_codes(coder, x, coder.config.k) @ coder.W_dec + coder.b_dec
    if variance is None:
        variance = (x - x.mean(0)).square().sum(1).mean()
    mse = (x - x_hat).square().sum(1).mean() / variance
    if dead is None or not dead.any():
        return mse, mse.new_zeros(())
    residual = (x - x_hat).detach()
    aux_hat = dense_codes(coder, x, coder.config.k_aux, dead) @ coder.W_dec
    spread = (residual - residual.mean(0)).square().sum(1).mean()
    aux = (residual - aux_hat).square().sum(1).mean() / spread
    return mse + coefficient * aux, aux


def gradients(loss, coder, *others):
    grads = torch.autograd.grad(loss, [*coder.parameters(), *others])
    return [g.to_dense() for g in grads]


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"k": 1}, {"k": M, "k_aux": M}, {"select_by_norm": True}, {"activation": "none"},
     {"activation": "none", "select": "abs"}],
    ids=str,
)  # fmt: skip
def test_codes_and_all_gradients_equal_the_dense_formula(fields, sparse_grad):
    coder, x = make(sparse_grad=sparse_grad, **fields), rows().requires_grad_()
    weight = rows(seed=5)
    codes = coder.encode(x)
    expected = dense_codes(coder, x, coder.config.k)
    torch.testing.assert_close(codes.to_dense(), expected)
    x_hat = coder(x)
    torch.testing.assert_close(x_hat, expected @ coder.W_dec + coder.b_dec)
    ours = gradients((x_hat * weight).sum(), coder, x)
    theirs = gradients(((expected @ coder.W_dec + coder.b_dec) * weight).sum(), coder, x)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    if coder.config.activation == "relu" and coder.config.k > 1:
        assert (codes.l0 < coder.config.k).any(), "the case should have rows with fewer than k positives"


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("dead", ["none given", "some", "fewer than k_aux", "all", "empty"])
def test_loss_and_its_gradients_equal_the_written_out_loss(dead, sparse_grad):
    coder, x = make(sparse_grad=sparse_grad), rows()
    masks = {
        "none given": None,
        "some": torch.arange(M) % 3 == 0,
        "fewer than k_aux": torch.arange(M) < 2,
        "all": torch.ones(M, dtype=torch.bool),
        "empty": torch.zeros(M, dtype=torch.bool),
    }
    mask = masks[dead]
    result = coder.loss(x, mask, aux_coefficient=0.25)
    expected, aux = dense_loss(coder, x, mask, 0.25)
    torch.testing.assert_close(result.loss, expected)
    if mask is None:
        assert result.aux is None
    else:
        torch.testing.assert_close(result.aux, aux.detach())
    for mine, other in zip(gradients(result.loss, coder), gradients(expected, coder), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.sse, (x - coder(x)).square().sum().detach())
    torch.testing.assert_close(result.reconstruction, coder(x).detach())
    assert torch.equal(result.codes.to_dense(), coder.encode(x).to_dense())


def test_a_narrower_aux_selection_only_has_less_padding():
    coder, x, dead = make(), rows(), torch.arange(M) < 2
    full, narrow = coder.loss(x, dead), coder.loss(x, dead, k_aux=2)
    torch.testing.assert_close(full.loss, narrow.loss)
    for mine, other in zip(gradients(full.loss, coder), gradients(narrow.loss, coder), strict=True):
        torch.testing.assert_close(mine, other)
    assert coder.encode(x, dead, 2)[1].values.shape == (N, 2)


def test_loss_divides_by_the_given_variance():
    coder, x = make(), rows()
    expected, _ = dense_loss(coder, x, None, 0.0, variance=2.5)
    torch.testing.assert_close(coder.loss(x, variance=2.5).loss, expected)
    torch.testing.assert_close(coder.loss(x.reshape(1, N, D), variance=2.5).loss, expected)


@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan"), float("inf"), True, "1"])
def test_loss_refuses_a_variance_that_cannot_divide(variance):
    with pytest.raises((ValueError, TypeError), match="variance must be"):
        make().loss(rows(), variance=variance)


@pytest.mark.parametrize("dead", [False, True])
def test_loss_does_not_depend_on_the_number_of_threads(dead):
    """Whole numbers in the encoder: its product is exact, so that the sums of the loss are under test."""
    coder = SparseCoder(SparseCoderConfig(d=96, m=64, k=4, k_aux=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        coder.W_enc.copy_(torch.randint(-2, 3, coder.W_enc.shape, generator=generator))
    x = torch.randint(-9, 10, (4096, 96), generator=generator).float()
    mask, before, results = torch.arange(64) % 2 == 0, torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            out = coder.loss(x, mask if dead else None)
            results.append([out.loss.item(), out.mse.item(), out.sse.item(), out.aux.item() if dead else 0.0])
    finally:
        torch.set_num_threads(before)
    assert all(result == results[0] for result in results), results


def test_auxk_alone_reaches_the_encoder_of_dead_latents_only():
    coder, x = make(), rows()
    dead = torch.zeros(M, dtype=torch.bool)
    fired = (coder.encode(x).to_dense() != 0).any(0)
    dead[(~fired).nonzero()[:3, 0]] = True
    assert dead.any(), "the case should have latents that do not fire"
    with torch.no_grad():
        coder.b_enc[dead] -= 5.0  # far from firing in the main selection
        coder.b_enc[dead.nonzero()[0]] += 6.0
    plain = gradients(coder.loss(x).loss, coder)[0]
    with_aux = gradients(coder.loss(x, dead).loss, coder)[0]
    moved = (with_aux - plain).abs().amax(1) > 1e-9
    assert moved.any() and not moved[~dead].any()


def test_a_perfect_reconstruction_gives_no_nan():
    coder = make(k=M, activation="none", k_aux=2, bias=0.0)
    with torch.no_grad():
        for param in coder.parameters():
            param.zero_()
    x = torch.zeros(N, D, dtype=torch.float64)
    result = coder.loss(x, torch.ones(M, dtype=torch.bool))
    assert result.loss == 0 and result.aux == 0
    assert all(torch.isfinite(g).all() for g in gradients(result.loss, coder))


def test_leading_dimensions():
    coder, x = make(), rows(12)
    assert torch.equal(coder(x.reshape(3, 4, D)).reshape(12, D), coder(x))
    assert coder(x[:0]).shape == (0, D)
    with pytest.raises(ValueError, match="x must have at least one row"):
        coder.loss(x[:0])


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(sparse_grad):
    coder, x = make(dtype="float32", sparse_grad=sparse_grad), rows(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert coder.encode(x).dtype == torch.bfloat16
        result = coder.loss(x, torch.arange(M) < 3)
    result.loss.backward()
    assert coder.W_dec.grad.is_sparse == coder.W_enc.grad.is_sparse == sparse_grad
    mine, plain = coder.W_enc.grad.to_dense(), make(dtype="float32")
    assert mine.dtype == torch.float32
    plain.loss(x, torch.arange(M) < 3).loss.backward()
    cosine = torch.nn.functional.cosine_similarity(mine.flatten(), plain.W_enc.grad.flatten(), dim=0)
    assert cosine > 0.95


def test_compiles_as_one_graph():
    coder, x = make(dtype="float32"), rows(dtype=torch.float32)
    compiled = torch.compile(coder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), coder(x))
    ours = gradients(compiled(x).sum(), coder)
    for mine, other in zip(ours, gradients(coder(x).sum(), coder), strict=True):
        torch.testing.assert_close(mine, other)


def test_tied_start():
    config = SparseCoderConfig(d=D, m=5000, k=K)
    coder, same, other = SparseCoder(config), SparseCoder(config), SparseCoder(config, seed=1)
    assert torch.equal(coder.W_enc, coder.W_dec) and torch.equal(coder.W_dec, same.W_dec)
    assert not torch.equal(coder.W_dec, other.W_dec)
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(5000))
    assert coder.b_enc.count_nonzero() == coder.b_dec.count_nonzero() == 0
    assert coder.W_dec.mean(0).abs().max() < 0.05
    assert coder.W_enc.data_ptr() != coder.W_dec.data_ptr()


def test_unit_rows_leave_zero_rows():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]])
    assert torch.equal(unit_rows_(weight), torch.tensor([[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]]))
    coder = make().normalise_decoder_()
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(M, dtype=torch.float64))


def test_geometric_median():
    x = rows(500)
    x[:40] += 1000.0
    median = geometric_median(x, tolerance=1e-9)
    # Where the sum of distances is least, the unit vectors to the rows cancel.
    pull = torch.nn.functional.normalize(x - median, dim=1).sum(0)
    assert pull.norm() < 1e-3
    assert (median - x[40:].mean(0)).norm() < 0.5 < (x.mean(0) - x[40:].mean(0)).norm()
    scaled = geometric_median(3 * x + 7, tolerance=1e-9)
    torch.testing.assert_close(scaled, 3 * median + 7, rtol=1e-6, atol=1e-6)
    line = torch.tensor([[0.0], [1.0], [10.0]])  # the median of three points on a line is the middle one
    assert abs(geometric_median(line, max_iterations=500, tolerance=1e-7) - 1.0) < 1e-2
    assert torch.equal(geometric_median(torch.full((4, 3), 2.5)), torch.full((3,), 2.5))
    assert geometric_median(rows(dtype=torch.bfloat16)).dtype == torch.float32
    x[3, 1], x[9, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="got 2 of 500 rows with NaN or infinite values"):
        geometric_median(x)
    with pytest.raises(ValueError, match=r"got \[0, 6\]"):
        geometric_median(x[:0])


def test_geometric_median_does_not_depend_on_the_number_of_threads():
    x, before, found = rows(70_000, dtype=torch.float32), torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.add(tuple(geometric_median(x).tolist()))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_init_b_dec():
    coder, x = make(), rows() + 3
    assert torch.equal(coder.init_b_dec_(x).b_dec, geometric_median(x))
    assert torch.equal(coder.init_b_dec_(x, "mean").b_dec, x.mean(0))
    with pytest.raises(ValueError, match="method must be one of"):
        coder.init_b_dec_(x, "median")
    with pytest.raises(ValueError, match=r"x must have shape \[n, 6\]"):
        coder.init_b_dec_(x[:, :3])


@pytest.mark.parametrize("fields", [{}, {"activation": "none", "select": "abs"}, {"select_by_norm": True}], ids=str)
def test_folded_input_scale_is_exact(fields):
    scale, x = 0.03, rows()
    trained, folded = make(**fields), make(**fields).fold_input_(scale)
    ours, theirs = folded.encode(x), trained.encode(scale * x)
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.values, theirs.values / scale)
    torch.testing.assert_close(folded(x), trained(scale * x) / scale)
    with pytest.raises(ValueError, match="scale must be greater than 0"):
        folded.fold_input_(0.0)


def test_dead_latents_count_tokens_exactly():
    coder, dead = make(), DeadLatents(M, window=40)
    with torch.no_grad():
        coder.b_enc[7] = -100.0  # never fires
    last = torch.zeros(M, dtype=torch.int64)
    for step in range(6):
        codes = coder.encode(rows(9 + step, seed=step))
        assert (codes.values == 0).any(), "the case should have padding, which does not fire"
        dead.update(codes if step % 2 else codes.to_ragged())
        fired = (codes.to_dense() != 0).any(0)
        last = torch.where(fired, 0, last + 9 + step)
        assert torch.equal(dead.tokens_since_fired, last)
        assert torch.equal(dead.mask(), last >= 40)
    assert dead.mask().any() and not dead.mask().all()
    with pytest.raises(ValueError, match="codes must be over 20 latents, got 7"):
        dead.update(SparseCodes(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), 7))


def test_dead_latents_ignore_unused_storage_of_ragged_codes():
    dead = DeadLatents(5, window=2)
    values = torch.tensor([1.0, 2.0, 9.0, 9.0])
    indices = torch.tensor([4, 1, 2, 123456789], dtype=torch.int32)
    dead.update(SparseCodes(values, indices, 5, torch.tensor([0, 1, 2])))
    assert dead.tokens_since_fired.tolist() == [2, 0, 2, 2, 0]


def test_signed_values_count_as_fired():
    dead = DeadLatents(3, window=1)
    dead.update(SparseCodes(torch.tensor([[-1.0, 0.0]]), torch.tensor([[2, 0]], dtype=torch.int32), 3))
    assert dead.tokens_since_fired.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"k": 21}, "k must be between 1 and m = 20, got 21"),
        ({"k": 0}, "k must be between 1 and m = 20, got 0"),
        ({"k_aux": 21}, "k_aux must be between 0 and m = 20, got 21"),
        ({"d": 0}, "d must be at least 1, got 0"),
        ({"m": float("nan")}, "m must be a whole number, got float nan"),
        ({"d": float("inf")}, "d must be a whole number, got float inf"),
        ({"k": True}, "k must be a whole number, got bool True"),
        ({"dtype": "int8"}, "dtype must be one of 'float32'"),
        ({"activation": "gelu"}, "activation must be one of 'relu', 'none', got 'gelu'"),
        ({"select": "abs"}, "activation must be 'none' with select 'abs'"),
        ({"select_by_norm": 1}, "select_by_norm must be true or false, got int 1"),
    ],
)
def test_bad_configuration(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SparseCoderConfig(**({"d": D, "m": M, "k": K} | fields))


def test_configuration_from_plain_values():
    config = SparseCoderConfig(d=D, m=M, k=K, k_aux=3)
    assert SparseCoderConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="no field 'activations'; did you mean 'activation'?"):
        SparseCoderConfig.from_dict({**config.to_dict(), "activations": "relu"})
    with pytest.raises(ValueError, match="lacks the field 'm'"):
        SparseCoderConfig.from_dict({"d": 1, "k": 1})


def test_bad_input():
    coder = make()
    with pytest.raises(ValueError, match=r"x must have shape \[..., 6\], the coder's d, got \[3, 1\]"):
        coder(torch.zeros(3, 1, dtype=torch.float64))
    with pytest.raises(TypeError, match="x must have the dtype of the parameters, torch.float64, got torch.float32"):
        coder(torch.zeros(3, D))
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got list"):
        coder([[0.0] * D])
    with pytest.raises(ValueError, match="config.k_aux is 0"):
        make(k_aux=0).encode(rows(), torch.ones(M, dtype=torch.bool))
    with pytest.raises(TypeError, match="config must be a fusae.nn.SparseCoderConfig, got dict"):
        SparseCoder({"d": 3})
