# SPDX-License-Identifier: Apache-2.0
"""benchmarks/parity*.py: the recipes of other libraries on fusae against plain torch (and against the libraries, where
they are installed), and the order of the data."""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

from fusae.testing import losses
from fusae.testing.known import known_dictionary

RECIPES = (
    *(f"dictionary_learning-{form}" for form in ("topk", "batch-topk", "matryoshka", "jumprelu", "relu", "gated")),
    *(f"saelens-{form}" for form in ("topk", "batch-topk", "matryoshka", "jumprelu", "jumprelu-tanh")),
)
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@functools.cache
def script(name):
    """A script of benchmarks/, which is no package, as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def settings(**changes):
    # Few, large steps on rows far from the origin: latents die within them.
    plain = script("parity_base").Settings(
        d=12, m=48, k=3, steps=50, batch_size=64, lr=0.02, warmup_steps=5, decay_start=30, dead_steps=4, aux=0.5,
        dtype="float64",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def some_data(offset=3.0):
    rows, truth = known_dictionary(1_500, 12, 24, 3, offset=offset)
    rows = rows.double()
    return script("parity").Data(rows[:1_000], rows[1_000:], truth.double())


# --- the recipes, stated densely in plain torch ---------------------------------------------------------------------


class Plain:
    """A dense top-k coder under ``torch.optim.Adam``, with clipping to norm 1."""

    clip, beta1 = True, 0.9

    def __init__(self, settings, start):
        self.s, self.done, self.dead = settings, 0, 0
        self.p = {name: weight.clone().requires_grad_() for name, weight in start.items()}
        self.optimizer = torch.optim.Adam(self.p.values(), betas=(self.beta1, 0.999))
        self.unused = torch.zeros(settings.m, dtype=torch.int64)

    def pre(self, x):
        return (x - self.p["b_dec"]) @ self.p["W_enc"].T + self.p["b_enc"]

    def kept(self, values, scores, k):
        return values * torch.zeros_like(values).scatter(1, scores.topk(k, 1).indices, 1.0)

    def update(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        W = self.p["W_dec"]
        if self.unit:
            along = torch.nn.functional.normalize(W.detach(), dim=1)
            W.grad -= (W.grad * along).sum(1, keepdim=True) * along
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.p.values(), 1.0)
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.optimizer.step()
        if self.unit:
            W.data = torch.nn.functional.normalize(W.data, dim=1)
        if "threshold" in self.p:
            self.p["threshold"].data.clamp_(min=0)
        self.done += 1
        return float(loss.detach())

    @property
    def fall(self):
        return min(1.0, (self.s.steps - self.done) / (self.s.steps - self.s.decay_start))


class PlainDictionaryLearning(Plain):
    unit = True

    @property
    def lr(self):
        return self.s.lr * min(self.done / self.s.warmup_steps, self.fall)

    def chosen(self, x):
        """Codes, and which latents have fired."""
        latents = self.pre(x).topk(self.s.k, 1).indices.unique()
        return self.kept(self.pre(x).relu(), self.pre(x), self.s.k), latents

    def loss(self, codes, x):
        return (x - codes @ self.p["W_dec"] - self.p["b_dec"]).square().sum(1).mean()

    def step(self, x):
        s, positive = self.s, self.pre(x).relu()
        codes, fired = self.chosen(x)
        error = x - codes @ self.p["W_dec"] - self.p["b_dec"]
        self.unused += len(x)
        self.unused[fired] = 0
        dead = self.unused >= s.dead_steps * s.batch_size
        self.dead = int(dead.sum())
        loss = self.loss(codes, x)
        if self.dead:
            residual = error.detach()
            scores = self.pre(x).masked_fill(~dead, -torch.inf)
            second = self.kept(positive, scores, min(s.k_aux, self.dead)) @ self.p["W_dec"]
            spread = (residual - residual.mean(0)).square().sum(1).mean()
            loss = loss + s.aux * (residual - second).square().sum(1).mean() / spread
        return self.update(loss)


class PlainBatch(PlainDictionaryLearning):
    def chosen(self, x):
        positive = self.pre(x).relu()
        codes = self.kept(positive.reshape(1, -1), positive.reshape(1, -1), self.s.k * len(x)).reshape(positive.shape)
        return codes, (codes > 0).any(0).nonzero()[:, 0]


class PlainMatryoshka(PlainBatch):
    def loss(self, codes, x):
        first = [codes * (torch.arange(self.s.m) < width) for width in self.s.prefixes]
        return sum(super(PlainMatryoshka, self).loss(part, x) / 3 for part in first) / 3


class PlainSAELens(Plain):
    unit = False

    @property
    def lr(self):
        return self.s.lr * min((self.done + 1) / self.s.warmup_steps, self.fall)

    def step(self, x):
        s, pre = self.s, self.pre(x)
        scores = pre * self.p["W_dec"].detach().norm(dim=1)
        codes = self.chosen(pre.relu(), scores)
        error = codes @ self.p["W_dec"] + self.p["b_dec"] - x
        dead = self.unused > s.dead_steps
        self.dead = int(dead.sum())
        loss = error.square().sum(1).mean() + self.inner(codes, x)
        if self.dead:
            second = self.kept(pre, scores.masked_fill(~dead, -torch.inf), min(s.k_aux, self.dead))
            share = min(1.0, self.dead / s.k_aux)
            loss = loss + s.aux * share * (second @ self.p["W_dec"] + error.detach()).square().sum(1).mean()
        self.unused += 1
        self.unused[(codes != 0).any(0)] = 0
        return self.update(loss)

    def chosen(self, values, scores):
        return self.kept(values, scores, self.s.k)

    def inner(self, codes, x):
        return 0.0


class PlainSAELensBatch(PlainSAELens):
    def chosen(self, values, scores):
        flat = self.kept(values.reshape(1, -1), scores.reshape(1, -1), self.s.k * len(values))
        return flat.reshape(values.shape)


class PlainSAELensMatryoshka(PlainSAELensBatch):
    def inner(self, codes, x):
        first = [codes * (torch.arange(self.s.m) < width) for width in self.s.prefixes[:-1]]
        return sum((x - part @ self.p["W_dec"] - self.p["b_dec"]).square().sum(1).mean() for part in first)


class PlainSparsity(Plain):
    """The recipes with a sparsity term; dictionary_learning's learning rates."""

    unit = True

    @property
    def lr(self):
        return self.s.lr * min(self.done / self.s.warmup_steps, self.fall)

    def step(self, x):
        codes, charge = self.coded(x)
        error = x - codes @ self.p["W_dec"] - self.p["b_dec"]
        share = min(1.0, self.done / self.s.warmup_steps)
        return self.update(error.square().sum(1).mean() + share * self.s.sparsity * charge + self.beside(x))

    def beside(self, x):
        return 0.0


class PlainReLU(PlainSparsity):
    unit = False

    def coded(self, x):
        codes = self.pre(x).relu()
        return codes, (codes * self.p["W_dec"].norm(dim=1)).sum(1).mean()


class PlainGated(PlainSparsity):
    clip, beta1 = False, 0.0

    def coded(self, x):
        gate, p = self.pre(x), self.p
        codes = (gate > 0) * (p["r_mag"].exp() * (gate - p["b_enc"]) + p["b_mag"]).relu()
        return codes, gate.relu().sum(1).mean()

    def beside(self, x):
        frozen = self.pre(x).relu() @ self.p["W_dec"].detach() + self.p["b_dec"].detach()
        return (x - frozen).square().sum(1).mean()


class PlainJumpReLU(PlainSparsity):
    beta1 = 0.0

    def coded(self, x):
        p, threshold, window = x @ self.p["W_enc"].T + self.p["b_enc"], self.p["threshold"], self.s.bandwidth
        codes = losses.Jump.apply(p, threshold, window, False)
        l0 = losses.Step.apply(codes.detach(), threshold, window, False)  # of the codes, as the library does it
        return codes, (l0.sum(1).mean() / self.s.k - 1).square()


class PlainSAELensJumpReLU(PlainSparsity):
    unit = False

    @property
    def lr(self):
        return self.s.lr * min((self.done + 1) / self.s.warmup_steps, self.fall)

    def coded(self, x):
        p, threshold, window = self.pre(x), self.p["threshold"], self.s.bandwidth
        return losses.Jump.apply(p, threshold, window, False), losses.Step.apply(p, threshold, window, False).sum(
            1
        ).mean()


class PlainSAELensTanh(PlainSAELensJumpReLU):
    def coded(self, x):
        codes = losses.Jump.apply(self.pre(x), self.p["threshold"], self.s.bandwidth, True)
        norms = self.p["W_dec"].norm(dim=1)
        self.idle = self.unused > self.s.dead_steps
        self.unused = torch.where((codes != 0).any(0), 0, self.unused + 1)
        return codes, torch.tanh(4 * codes * norms).sum(1).mean()

    def beside(self, x):
        self.dead = int(self.idle.sum())
        below = (self.p["threshold"] - self.pre(x)).relu() * self.p["W_dec"].norm(dim=1)
        return self.s.aux * below[:, self.idle].sum(1).mean()


@pytest.mark.parametrize(
    ("name", "plain", "changes"),
    [
        ("dictionary_learning-topk", PlainDictionaryLearning, {}),
        ("dictionary_learning-batch-topk", PlainBatch, {}),
        ("dictionary_learning-matryoshka", PlainMatryoshka, {}),
        ("saelens-topk", PlainSAELens, {"m": 32, "lr": 0.01, "dead_steps": 6}),
        ("saelens-batch-topk", PlainSAELensBatch, {"m": 32, "lr": 0.01, "dead_steps": 6}),
        ("saelens-matryoshka", PlainSAELensMatryoshka, {"m": 32, "lr": 0.01, "dead_steps": 6}),
    ],
)
def test_a_recipe_on_fusae_is_the_recipe(name, plain, changes):
    parity = script("parity")
    s, data = settings(**changes), some_data()
    rows = torch.nn.functional.normalize(torch.randn(s.m, s.d, dtype=torch.float64), dim=1)
    rows *= 1.0 if plain.unit else 0.1
    start = {"W_enc": rows, "b_enc": torch.zeros(s.m).double(), "W_dec": rows, "b_dec": data.train[0]}
    pair = parity.RECIPES[name].own["fusae"](s, start), plain(s, start)
    dead = []
    for x in parity.batches(data.train, s, seed=1):
        assert pair[0].lr == pytest.approx(pair[1].lr, rel=1e-12, abs=1e-15)
        losses = [contender.step(x) for contender in pair]
        assert losses[0] == pytest.approx(losses[1], rel=1e-8)
        assert pair[0].dead == pair[1].dead
        dead.append(pair[0].dead)
    for name, weight in pair[1].p.items():
        torch.testing.assert_close(getattr(pair[0].coder, name).data, weight.data, rtol=1e-7, atol=1e-9)
    # The runs had steps with no dead latent, with fewer than the AuxK term takes, and with more.
    assert min(dead) == 0 and any(0 < count <= s.k_aux for count in dead) and max(dead) > s.k_aux, dead


@pytest.mark.parametrize(
    ("name", "plain", "changes"),
    [
        ("dictionary_learning-relu", PlainReLU, {}),
        ("dictionary_learning-gated", PlainGated, {}),
        ("dictionary_learning-jumprelu", PlainJumpReLU, {}),
        ("dictionary_learning-jumprelu", PlainJumpReLU, {"bandwidth": 0.5}),  # reaches down to the zeros
        ("saelens-jumprelu", PlainSAELensJumpReLU, {}),
        ("saelens-jumprelu-tanh", PlainSAELensTanh, {"aux": 0.5, "dead_steps": 2, "sparsity": 1.0}),
    ],
)
def test_recipes_with_a_sparsity_term(name, plain, changes):
    parity = script("parity")
    recipe, data = parity.RECIPES[name], some_data()
    s = settings(**{**recipe.fields, **changes})
    rows = torch.nn.functional.normalize(torch.randn(s.m, s.d, dtype=torch.float64), dim=1)
    start = recipe.start(s, rows, data.train[:1])
    own = recipe.own["fusae"](s, start)
    more = [name for name in ("r_mag", "b_mag", "threshold") if hasattr(own.coder, name)]
    statement = plain(s, {**start, **{name: getattr(own.coder, name).detach() for name in more}})
    dead = 0
    for x in parity.batches(data.train, s, seed=1):
        assert own.lr == pytest.approx(statement.lr, rel=1e-12, abs=1e-15)
        assert own.step(x) == pytest.approx(statement.step(x), rel=1e-8)
        dead += statement.dead
        assert statement.dead in (0, own.dead)
    for name, weight in statement.p.items():
        torch.testing.assert_close(getattr(own.coder, name).data, weight.data, rtol=1e-7, atol=1e-9)
    assert plain is not PlainSAELensTanh or dead > 0


@pytest.mark.parametrize("name", RECIPES)
def test_the_library_itself(name):
    parity = script("parity")
    recipe = parity.RECIPES[name]
    module = {"dictionary-learning": "dictionary_learning", "sae-lens": "sae_lens"}[recipe.package]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install as benchmarks/parity.py says")
    s = settings(aux=recipe.aux or 0.5, **recipe.fields)
    measured = parity.compare(recipe, some_data(), s, seed=0)
    peer, own = measured["peer"], measured["fusae"]
    assert peer["dead_in_training"] == own["dead_in_training"]
    assert own["dead_in_training"] > 0 or not recipe.aux
    assert own["loss"]["1"] == pytest.approx(peer["loss"]["1"], rel=1e-12)
    # The library divides by norm + 1e-6 where it projects.
    assert own["loss"]["10"] == pytest.approx(peer["loss"]["10"], rel=1e-6)
    assert own["fvu"] == pytest.approx(peer["fvu"], rel=1e-4) and own["mcc_to_peer"] > 0.9999
    if "fusae Trainer" in measured:
        assert measured["fusae Trainer"]["loss"]["1"] == pytest.approx(peer["loss"]["1"], rel=1e-12)


def test_the_library_beside_itself_starts_a_rounding_away():
    parity = script("parity")
    recipe = parity.RECIPES["saelens-topk"]
    rows = {"W_enc": torch.randn(40, 6), "b_enc": torch.zeros(40)}
    moved = parity.nudged(rows, 0)
    step = (moved["W_enc"] - rows["W_enc"]) / rows["W_enc"].abs()
    assert 0.3 < float((step != 0).float().mean()) < 0.7 and 0 < step.max() < 2e-7 and step.min() == 0
    assert all(torch.equal(a, b) for a, b in zip(parity.nudged(rows, 0).values(), moved.values(), strict=True))
    starts = []

    def build(settings, start):
        starts.append({name: value.clone() for name, value in start.items()})
        return recipe.own["fusae"](settings, start)

    recipe = dataclasses.replace(recipe, peer=build)
    measured = parity.compare(recipe, some_data(), settings(steps=12, decay_start=8), seed=0, twin=True)
    assert list(measured) == ["peer", "fusae", parity.TWIN] and measured["fusae"]["mcc_to_peer"] == 1.0
    assert measured[parity.TWIN]["loss"]["10"] == pytest.approx(measured["peer"]["loss"]["10"], rel=1e-9)
    assert not torch.equal(starts[0]["W_enc"], starts[1]["W_enc"])
    few = settings(steps=3, decay_start=2, warmup_steps=1)
    assert parity.TWIN not in parity.compare(recipe, some_data(), few, seed=0)


# --- data -----------------------------------------------------------------------------------------------------------


def test_all_recipes_are_under_test():
    assert sorted(RECIPES) == sorted(script("parity").RECIPES)


def test_every_pass_gives_whole_batches_of_a_new_order():
    parity = script("parity")
    rows = torch.arange(100.0)[:, None]
    s = dataclasses.replace(settings(), batch_size=30, steps=7)
    given = list(parity.batches(rows, s, seed=3))
    assert [len(x) for x in given] == [30] * 7
    passes = [torch.cat(given[i : i + 3]).flatten().tolist() for i in (0, 3)]
    assert all(len(set(p)) == 90 for p in passes) and passes[0] != passes[1]
    again, other = (list(parity.batches(rows, s, seed=seed)) for seed in (3, 4))
    assert all(map(torch.equal, given, again)) and not torch.equal(given[0], other[0])


def test_rows_with_a_known_dictionary():
    rows, directions = known_dictionary(20_000, 16, 40, 2, offset=4.0)
    assert rows.shape == (20_000, 16) and directions.shape == (40, 16)
    assert torch.equal(known_dictionary(9_000, 16, 40, 2, offset=4.0)[0], rows[:9_000])
    rows = rows.double()
    mean, spread = rows.mean(0), rows.var(0, correction=0).sum().sqrt()
    plain, same = known_dictionary(20_000, 16, 40, 2)
    assert torch.equal(same, directions)
    assert float((mean - plain.double().mean(0)).norm() / spread) == pytest.approx(4.0, rel=0.01)
    pairs = torch.stack([directions[[i, j]] for i, j in itertools.combinations(range(40), 2)]).double()  # [pairs, 2, d]
    for row in plain[:5].double():
        codes = torch.linalg.lstsq(pairs.mT, row.expand(len(pairs), -1)[:, :, None]).solution[..., 0]
        exact = ((pairs.mT @ codes[:, :, None])[..., 0] - row).norm(dim=1) < 1e-5
        assert exact.sum() == 1 and ((codes[exact] >= 0.5 - 1e-5) & (codes[exact] <= 1.5 + 1e-5)).all()
