# SPDX-License-Identifier: Apache-2.0
"""What training losses do beside their value and gradients: thresholds, defaults, starting points, errors."""

import copy

import pytest
import torch

from fusae.nn import (
    Moment,
    SparseCoder,
    SparseCoderConfig,
    init_firing_rate_,
    init_thresholds_,
    init_uniform_encoder_,
)
from fusae.nn.objectives import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from fusae.nn.objectives.base import decode_together
from fusae.testing import losses as dense
from fusae.testing.coders import D, K, M, coder_of, dead_of, gradients, rows_of

TOP = {"k_aux": 5}
BATCH = {"k_aux": 5, "select": "batch_topk"}
JUMP = {"select": "threshold"}


def test_multi_topk_reaches_latents_that_are_not_among_the_k():
    coder = coder_of(TOP)
    x = rows_of()
    unused = ~(coder.encode(x).to_dense() != 0).any(0)
    plain, multi = (
        gradients(TopK(0.0, w)(coder, x, None, Moment()).loss, coder, x.requires_grad_()) for w in (0.0, 1.0)
    )
    assert unused.any() and not plain["W_enc"][unused].any() and multi["W_enc"][unused].any()


def test_batch_topk_keeps_a_running_threshold():
    coder = coder_of(BATCH)
    wanted = 0.0
    for step in range(30):
        x = rows_of(seed=step)
        smallest = coder.select(x)[1]
        BatchTopK(threshold_decay=0.9)(coder, x, None, Moment(step=step))
        decay = min(0.9, step / (step + 10))
        wanted = decay * wanted + (1 - decay) * smallest.item()
        assert coder.threshold.item() == pytest.approx(wanted, rel=1e-12)
    x = rows_of(200, 99)
    p = dense.pre_of(coder, x)
    torch.testing.assert_close(coder.eval().encode(x).to_dense(), p * (p > coder.threshold))
    assert abs(coder.encode(x).l0.double().mean().item() - K) < 1
    before = coder.threshold.clone()
    BatchTopK()(coder, x, None, Moment(step=30))  # in eval mode: nothing is learnt from it
    assert torch.equal(coder.threshold, before)
    coder.train()
    BatchTopK()(coder, x[:0].new_zeros(2, D) + coder.b_dec.detach(), None, Moment(step=30))  # nothing is positive
    assert torch.equal(coder.threshold, before)


def test_matryoshka_keeps_it_too():
    one, other = coder_of(BATCH), coder_of(BATCH)
    x = rows_of()
    BatchTopK(threshold_decay=0.5)(one, x, None, Moment(step=20))
    Matryoshka((5, M), threshold_decay=0.5)(other, x, None, Moment(step=20))
    assert one.threshold == other.threshold > 0


def test_thresholds_are_clamped():
    coder = coder_of(JUMP)
    with torch.no_grad():
        coder.threshold[:5] = -1.0
    after = coder.clamp_().threshold
    assert not after[:5].any() and (after[5:] > 0).all()
    for fields in ({"select": "relu"}, BATCH, TOP):
        before = coder_of(fields)
        assert all(map(torch.equal, before.state_dict().values(), copy.deepcopy(before).clamp_().state_dict().values()))


def test_jumprelu_defaults_by_penalty():
    coder = coder_of(JUMP)
    x = rows_of()
    for penalty, sparsity in (("l0", 1e-3), ("l0_squared", 1e-3), ("l0_mean_squared", 1.0), ("tanh", 10 / D)):
        scale = 4 * D**0.5 if penalty == "tanh" else None
        named = JumpReLU(penalty, sparsity, 0.5, tanh_scale=scale)(coder, x, None, Moment())
        assert torch.equal(JumpReLU(penalty, bandwidth=0.5)(coder, x, None, Moment()).loss, named.loss)


def test_anthropic_recipe_is_the_published_one_at_another_scale():
    """On rows of √d times the size, with everything that is in units of activations scaled, the published numbers."""
    unit, big = coder_of(JUMP), coder_of(JUMP)
    with torch.no_grad():
        for name in ("b_enc", "b_dec", "threshold"):
            getattr(big, name).mul_(D**0.5)
    x = rows_of()
    dead = dead_of("some")
    published = JumpReLU("tanh", 10.0, 2.0, True, 4.0, 3e-6)
    loss = JumpReLU.anthropic(D)(unit, x, None, Moment(dead, variance=1.0)).loss
    theirs = published(big, D**0.5 * x, None, Moment(dead, variance=1.0)).loss
    torch.testing.assert_close(D * loss, theirs)
    ours, wanted = (gradients(at, c, x.requires_grad_()) for at, c in ((loss, unit), (theirs, big)))
    torch.testing.assert_close(D * ours["W_enc"], wanted["W_enc"])
    torch.testing.assert_close(D**0.5 * ours["threshold"], wanted["threshold"])


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_what_draws_dead_latents_back_leaves_the_live_ones_alone(sparse_grad):
    """Also one whose pre-activation is out of range."""
    coder, dead, x = coder_of(JUMP, sparse_grad=sparse_grad), dead_of("some"), 5 + rows_of().abs()
    with torch.no_grad():
        coder.W_enc[int((~dead).nonzero()[0])] = -1e308  # -Inf, in every row
    loss = JumpReLU(bandwidth=0.1, preact_coefficient=0.25)(coder, x, None, Moment(dead, variance=1.0))
    assert torch.isfinite(loss.terms["preact"])
    for name, grad in gradients(loss.loss, coder).items():
        assert torch.isfinite(grad).all(), name


def test_equal_centres_need_not_be_the_same_tensor():
    centre, x = rows_of(1)[0], rows_of()
    coder = coder_of({"pre_bias": True})
    folded = copy.deepcopy(coder).fold_input_(2.0, centre, 2.0, centre.clone())
    torch.testing.assert_close(folded(x), coder(2.0 * (x - centre)) / 2.0 + centre)
    for other in (centre + 1, torch.zeros(D)):
        with pytest.raises(ValueError, match="must be the same on both sides"):
            coder.fold_input_(2.0, centre, 2.0, other)


def test_ragged_codes_before_others_cannot_be_decoded_together():
    coder, x = coder_of(TOP), rows_of()
    codes = coder.encode(x)
    with pytest.raises(ValueError, match="only the last of several codes may be ragged"):
        decode_together(coder, [codes.to_ragged(), codes])


def test_starting_points_of_jumprelu():
    coder = SparseCoder(SparseCoderConfig(D, 5000, 4, select="threshold", dtype="float64"))
    init_uniform_encoder_(init_thresholds_(coder, 0.1 / D**0.5), seed=3)
    bound = D**-0.5
    assert coder.W_enc.abs().max() <= bound and coder.W_enc.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    x = torch.randn(1000, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    init_firing_rate_(coder, x, 0.02)
    fired = (coder.encode(x).to_dense() > 0).sum(0)
    assert (fired == 20).all()
    plain = init_firing_rate_(
        SparseCoder(SparseCoderConfig(D, 30, 4, select="relu", pre_bias=False, dtype="float64")), x, 0.5
    )
    assert ((plain.encode(x).to_dense() > 0).sum(0) == 500).all()
    for select in ("threshold", "relu"):
        normed = coder_of({"select": select, "select_by_norm": True})
        with torch.no_grad():
            normed.W_dec[3] = 0  # whose score is 0 whatever its bias
        fired = (init_firing_rate_(normed, x, 0.1).encode(x).to_dense() > 0).sum(0)
        assert (fired[torch.arange(M) != 3] == 100).all()
    with pytest.raises(ValueError, match="rate must be between 1 / 1000 and 1 - 1 / 1000"):
        init_firing_rate_(coder, x, 1e-4)
    with pytest.raises(ValueError, match="coder must have select 'threshold', got 'topk'"):
        init_thresholds_(coder_of(TOP), 0.1)


def test_terms():
    coder = coder_of(BATCH)
    x = rows_of()
    result = Matryoshka((3, 8, M))(coder, x, None, Moment())
    assert set(result.terms) == {"mse_3", "mse_8"}
    torch.testing.assert_close(result.loss.detach(), result.mse + sum(result.terms.values()))
    coder = coder_of(JUMP)
    result = JumpReLU(sparsity=0.5, preact_coefficient=0.25)(coder, x, None, Moment(dead_of("some"), ramp=0.5))
    wanted = result.mse + 0.5 * 0.5 * result.terms["sparsity"] + 0.25 * result.terms["preact"]
    torch.testing.assert_close(result.loss.detach(), wanted)
    torch.testing.assert_close(result.terms["sparsity"], result.codes.l0.double().mean())


@pytest.mark.parametrize(
    "objective, fields, message",
    [
        (TopK(), BATCH, "TopK needs a coder with select 'topk' or 'abs' or 'group_max', got 'batch_topk'"),
        (TopK(multi_topk=0.1), {"select": "group_max"}, "TopK needs a coder with select 'topk' or 'abs'"),
        (BatchTopK(), TOP, "BatchTopK needs a coder with select 'batch_topk', got 'topk'"),
        (ReLU(), JUMP, "ReLU needs a coder with select 'relu', got 'threshold'"),
        (ReLU(), {"select": "relu", "gated": True}, "ReLU needs a coder that is not gated"),
        (Gated(), {"select": "relu"}, "Gated needs a coder that is gated"),
        (JumpReLU(), {"select": "relu"}, "JumpReLU needs a coder with select 'threshold'"),
        (JumpReLU(), JUMP | {"select_by_norm": True}, "without select_by_norm; call coder.fold_norms_"),
        (Matryoshka((5, M)), JUMP, "Matryoshka needs a coder with select 'batch_topk' or"),
        (Matryoshka((5, 10)), BATCH, "prefixes must ascend and end with m = 20"),
        (HierarchicalTopK(), BATCH, "HierarchicalTopK needs a coder with select 'topk' or 'abs'"),
        (HierarchicalTopK((1, 3)), TOP, r"ranks must end with the coder's k = 4, got \[1, 3\]"),
    ],
)
def test_a_coder_that_does_not_fit(objective, fields, message):
    coder = coder_of(fields)
    with pytest.raises(ValueError, match=message):
        objective(coder, rows_of(), None, Moment())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TopK(-1.0), "aux_coefficient must be at least 0"),
        (lambda: TopK(multi_topk="1"), "multi_topk must be a plain number"),
        (lambda: BatchTopK(threshold_decay=1.0), "threshold_decay must be at least 0 and less than 1"),
        (lambda: ReLU(float("nan")), "sparsity must be at least 0"),
        (lambda: ReLU(by_norm=1), "by_norm must be true or false"),
        (lambda: JumpReLU("l1"), "penalty must be one of 'l0', 'l0_squared'"),
        (lambda: JumpReLU(bandwidth=0.0), "bandwidth must be greater than 0"),
        (lambda: JumpReLU(weights=(1.0,)), "weights are of prefixes, which were not given"),
        (lambda: Matryoshka(()), "prefixes must be a tuple of ascending whole numbers"),
        (lambda: Matryoshka((4, 4)), r"prefixes must ascend, got \[4, 4\]"),
        (lambda: Matryoshka((0, 4)), "prefixes must be at least 1, got 0"),
        (lambda: Matryoshka((2, 4), (1.0,)), "weights must be 2 numbers"),
        (lambda: HierarchicalTopK((3, 1)), "ranks must ascend"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"select": "best"}, "select must be one of 'topk', 'abs', 'group_max', 'batch_topk', 'relu', 'threshold'"),
        ({"gated": True}, r"select must be 'relu' with gated \(gates are open above 0\), got 'topk'"),
        ({"select": "relu", "k_aux": 3}, r"k_aux must be 0 with select 'relu' \(which has no AuxK\), got 3"),
        ({"select": "threshold", "activation": "none"}, "activation must be 'relu' with select 'threshold'"),
        ({"select": "group_max", "k": 3}, "k must divide m = 20 with select 'group_max'"),
        ({"sites": (2, 3)}, "sites must add up to the width of the output, 6, got"),
        ({"sites": (6, 0)}, "sites must be at least 1, got 0"),
        ({"d_out": 5}, "pre_bias must be false where d_out differs from d"),
        ({"skip": 1}, "skip must be true or false"),
    ],
)
def test_a_configuration_that_cannot_be(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SparseCoderConfig(**({"d": D, "m": M, "k": K} | fields))


def test_only_what_is_trained_is_a_parameter():
    names = {form: set(coder_of(form).config.parameters()) for form in ("relu", "gated", "jumprelu", "topk")}
    weights = {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert names["relu"] == names["topk"] == weights
    assert names["gated"] == weights | {"r_mag", "b_mag"} and names["jumprelu"] == weights | {"threshold"}
    assert dict(coder_of(BATCH).named_buffers()).keys() == {"threshold"}
