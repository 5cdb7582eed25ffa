# SPDX-License-Identifier: Apache-2.0
"""Kinds of dictionaries that are special cases of each other: the same outputs, losses and gradients."""

import copy
import dataclasses

import pytest
import torch

from fusae.nn import Moment, SparseCoder
from fusae.nn.objectives import BatchTopK, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from fusae.testing.coders import CROSSCODER, KINDS, D, K, M, coder_of, gradients, rows_of


def in_both_modes(coder):
    """In training, and (a batch top-k with its threshold) in use."""
    yield coder.train()
    yield coder.eval()
    coder.train()


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
