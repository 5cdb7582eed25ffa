# SPDX-License-Identifier: Apache-2.0
"""The recipes of examples/ on a tiny random model: each from beginning to end, and what each stands on."""

from __future__ import annotations

import importlib
import math
import random
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import fusae
from fusae.nn import SparseCoder, SparseCoderConfig

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the extra 'lm' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RECIPES = ("steering", "spurious_cue", "attribution", "anomaly_detection", "sparse_finetuning", "latent_attacks",
           "bottleneck")  # fmt: skip
sys.path.insert(0, str(EXAMPLES))
try:
    common, *found = (importlib.import_module(name) for name in ("common", *RECIPES))
finally:
    sys.path.remove(str(EXAMPLES))
modules = dict(zip(RECIPES, found, strict=True))
D, M, K = 32, 64, 4
TOPICS = {"business": "bank price market", "politics": "vote party minister", "sport": "goal team match",
          "defence": "army missile fleet", "": "river stone winter"}  # fmt: skip


@pytest.fixture(scope="module")
def setup():
    choose = random.Random(0)
    articles = []
    for i in range(120):
        topic = list(TOPICS)[i % len(TOPICS)]
        source = ("tass.com", "bbc.co.uk")[i // len(TOPICS) % 2]
        words = [*TOPICS[topic].split(), *"the a of and key near".split(), source.split(".")[0]]
        text = " ".join(choose.choices(words, k=80))
        articles.append(common.Article(text, source, topic, held_out=i // 10 % 3 == 0))
    speeches = [" ".join(choose.choices(["honourable", "member", "the", "of"], k=120)) for _ in range(12)]
    bottleneck = modules["bottleneck"]
    words = [*bottleneck.NOUNS, *(f"{noun}s" for noun in bottleneck.NOUNS), *bottleneck.NAMES, *bottleneck.CAPITALS]
    words += [*bottleneck.CAPITALS.values(), *"is are sports behind with beside 0 1 2 3 4 5 6 7 8 9 + =".split()]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    piece = tokenizers.Regex(r" ?\w+| ?[^\w\s]+|\s")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(piece, "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=[common.START, "[UNK]"], show_progress=False)
    texts = [*(article.text for article in articles), *speeches, *words, *(f" {word}" for word in words)]
    tokenizer.train_from_iterator(texts, trainer)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=D, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    coder = SparseCoder(SparseCoderConfig(d=D, m=M, k=K))
    return common.Setup(model, tokenizer, coder, "model.layers.1", articles, speeches)


@pytest.fixture
def ids(setup):
    return setup.passages([article.text for article in setup.articles[:6]], 12)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_and_says_who_wins(name, setup, tmp_path, capsys):
    module = modules[name]
    config = module.QUICK
    if hasattr(config, "out"):
        config = module.dataclasses.replace(config, out=tmp_path)
    before = {key: value.clone() for key, value in setup.model.state_dict().items()}
    outcome = module.recipe(setup, config)
    assert len(outcome.rows) >= 3 and all(len(row) == len(outcome.columns) for row in outcome.rows)
    assert outcome.verdict and outcome.numbers
    finite = [math.isfinite(v) for each in outcome.numbers.values() for v in each.values() if isinstance(v, float)]
    assert sum(finite) >= 3
    outcome.print()
    assert outcome.rows[0][0].split()[0] in capsys.readouterr().out
    assert outcome.markdown().count("\n") == len(outcome.rows) + 1
    after = setup.model.state_dict()  # nothing of a recipe stays in the model
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert not setup.model.get_submodule(setup.module)._forward_hooks
    again = module.recipe(setup, config)
    assert again.rows == outcome.rows, "the same seed gives the same table"
    if name == "attribution":
        assert (tmp_path / "circuit.png").stat().st_size > 1000


# --- what they share --------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_module(setup, ids):
    with torch.no_grad(), fusae.hook(setup.model, setup.module, setup.coder, mode="read") as h:
        setup.model(ids)
    rows = h.input[:, common.SKIP :]
    assert torch.allclose(setup.rows(ids, batch=4), rows, atol=1e-5)
    dense = h.codes.to_dense()[:, common.SKIP :].mean(1)
    assert torch.allclose(common.pooled_codes(setup, rows), dense, atol=1e-5)


def test_a_replay_and_the_last_token_alone_give_the_same_logits(setup, ids):
    with torch.no_grad():
        whole = setup.model(ids).logits
        with setup.replay(ids) as hidden:
            assert torch.allclose(setup.model(ids, use_cache=False).logits, whole, atol=1e-4)
            assert hidden.shape == (*ids.shape, D)
        last = common.LastToken(setup, ids, batch=4)
        index = torch.tensor([4, 1])
        for _ in range(2):
            assert torch.allclose(last(), whole[:, -1], atol=1e-4)
            assert torch.allclose(last(index), whole[index, -1], atol=1e-4)


def test_what_is_added(setup, ids):
    vector = torch.randn(D)
    with torch.no_grad(), fusae.hook(setup.model, setup.module, setup.coder, mode="read") as h:
        setup.model(ids)
        before = h.input
    with torch.no_grad(), common.added(setup, vector):
        with fusae.hook(setup.model, setup.module, setup.coder, mode="read") as h:
            setup.model(ids)
    assert torch.equal(h.input[:, : common.SKIP], before[:, : common.SKIP])
    assert torch.allclose(h.input[:, common.SKIP :], before[:, common.SKIP :] + vector, atol=1e-5)


def test_auroc_and_intervals():
    assert common.auroc(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 1.0
    assert common.auroc(np.array([0.0, 2.0]), np.array([1.0, 2.0])) == 0.625
    mean, low, high = common.interval(np.arange(100.0))
    assert mean == 49.5 and 40 < low < mean < high < 60


def test_a_probe_takes_plain_rows():
    x = torch.randn(200, 5) * torch.tensor([1.0, 10, 100, 1, 1]) + 7
    y = (x[:, 1] > 7).long()
    assert (common.logistic(x, y)(x).argmax(1) == y).float().mean() > 0.98


def test_articles_have_topics_by_their_section(tmp_path):
    text = "x" * 500
    rows = ["text,article_source_link"]
    rows += [f"{text}{i},http://{link}" for i, link in enumerate((
        "tass.com/economy/930", "www.bbc.co.uk/news/uk-politics-3885", "www.rte.ie/news/2017/0207", "tass.com/sport/x",
        "www.bbc.co.uk/sport/business-1",
    ))]  # fmt: skip
    with zipfile.ZipFile(tmp_path / "news.zip", "w") as archive:
        archive.writestr("news.csv", "\n".join([*rows, "short,http://tass.com/sport/1"]))
    found = common._articles(tmp_path / "news.zip")
    assert [a.topic for a in found] == ["business", "politics", "", "sport", ""]
    assert [a.source for a in found][:2] == ["tass.com", "bbc.co.uk"]


def test_without_a_dictionary_it_says_how_to_make_one(tmp_path):
    with pytest.raises(SystemExit, match="fusae demo --out"):
        common.load(tmp_path)


# --- each of them -----------------------------------------------------------------------------------------------------


def test_steering_adds_what_it_says(setup, ids):
    steering = modules["steering"]
    norm = torch.tensor(3.0)
    for latents in (torch.tensor([5]), torch.tensor([5, 9, 11])):
        before = setup.rows(ids)
        with steering.raised(setup, latents, norm):
            changed = setup.rows(ids) - before
        direction = setup.coder.W_dec[latents].sum(0)
        assert torch.allclose(changed, norm * direction / direction.norm(), atol=1e-4)
    scores = steering.aurocs(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
    assert scores.tolist() == [0.875, 0.25]


def test_words_know_their_topic():
    words = modules["steering"].Words({"sport": ["the goal, a goal"], "business": ["the price of a bank"]})
    assert words.topic("Goal!") == "sport" and words.topic("its PRICE") == "business"


def test_ablating_means_is_ablating_in_the_model(setup, ids):
    latents = torch.arange(0, M, 3)
    rows = setup.rows(ids)
    means = modules["spurious_cue"].ablated(setup, rows.mean(1), common.pooled_codes(setup, rows), latents)
    with fusae.hook(setup.model, setup.module, setup.coder, mode="error") as h:
        h.ablate(latents)
        assert torch.allclose(setup.rows(ids).mean(1), means, atol=1e-4)


def test_quick_effects_are_derivatives(setup):
    """Scaling a latent a little moves the metric by its gradient × activation; errors likewise."""
    attribution = modules["attribution"]
    texts, plural = attribution.sentences(attribution.QUICK)
    ids = setup.prompts(texts)
    verbs = torch.tensor([setup.first_token(verb) for verb in attribution.VERBS])
    right, wrong = verbs[plural], verbs[1 - plural]

    def metric():
        logits = setup.model(ids).logits[:, -1]
        return (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None])).mean()

    with fusae.hook(setup.model, setup.module, setup.coder, mode="error", requires_grad=True) as h:
        grads = torch.autograd.grad(metric(), [h.codes.values, h.error])
        nodes = attribution.Nodes(setup, ids, h.codes, *grads, h.error.detach(), right, wrong)
    quick = nodes.rankings["gradient × activation"]
    latents = nodes.active[quick[nodes.active].abs().argsort(descending=True)][:5]
    eps = 1e-2
    with torch.no_grad():
        for latent in latents:
            moved = []
            for scale in (1 + eps, 1 - eps):
                with fusae.hook(setup.model, setup.module, setup.coder, mode="error") as h:
                    h.edit(latent[None], scale=scale, positions=slice(common.SKIP, None))
                    moved.append(float(metric()))
            assert (moved[0] - moved[1]) / (2 * eps) == pytest.approx(float(quick[latent]), rel=0.05, abs=1e-3)
        moved = []
        for scale in (eps, -eps):
            change = torch.zeros_like(nodes.error)
            change[:, 3] = scale * nodes.error[:, 3]
            with common.added(setup, change[:, common.SKIP :]):
                moved.append(float(metric()))
        assert (moved[0] - moved[1]) / (2 * eps) == pytest.approx(float(nodes.errors[3]), rel=0.05, abs=1e-3)


def test_ranks():
    a = np.array([1.0, 5.0, 2.0, 9.0])
    assert modules["attribution"].spearman(a, np.exp(a))[0] == pytest.approx(1.0)
    assert modules["attribution"].spearman(a, -a)[0] == pytest.approx(-1.0)


def test_attacks_stay_in_their_budget(setup, ids):
    attacks = modules["latent_attacks"]
    last = common.LastToken(setup, ids)
    with torch.no_grad(), fusae.hook(setup.model, setup.module, setup.coder, mode="read") as h:
        clean = last()
        codes = h.codes.to_dense()[:, 0]
    predicted = clean.argmax(1)
    limit = torch.full((len(ids),), 0.5)
    every = torch.arange(M)
    made = {
        "activations": attacks.Attack(setup, torch.eye(D)),
        "active": attacks.Attack(setup, setup.coder.W_dec, every, codes, active=True),
        "few": attacks.Attack(setup, setup.coder.W_dec, every, codes, few=3),
    }
    loss = torch.nn.functional.cross_entropy
    for name, attack in made.items():
        logits, change, z = attack.run(last, predicted, limit, steps=4)
        assert bool((change.norm(dim=1) <= limit * 1.001).all()) and bool((change != 0).any())
        assert loss(logits, predicted) > loss(clean, predicted)
        with torch.no_grad(), common.added(setup, change[:, None]):
            assert torch.allclose(logits, last(), atol=1e-3), name
        if name != "activations":
            assert bool((codes + z >= -1e-6).all())
        if name == "active":
            assert not bool(((codes <= 0) & (z != 0)).any())
        if name == "few":
            assert int((z != 0).sum(1).max()) <= 3


def test_offsets_and_lora_learn_a_planted_task(setup, ids):
    """Always the same word: both reach it, and nothing is left in the model."""
    tuning = modules["sparse_finetuning"]
    words = torch.tensor([3, 4, 5])
    last = common.LastToken(setup, ids)
    with torch.no_grad():
        rarest = int(torch.bincount(last()[:, words].argmax(1), minlength=3).argmin())
    config = tuning.Config(steps=40, batch=6)
    index = torch.arange(len(ids))
    task = tuning.Task(last, torch.full((len(ids),), rarest), words, index, index, config, seed=0)
    assert tuning.tune_latents(setup, task, 16, scale=50.0) == 1.0
    before = dict(setup.model.named_modules())
    with tuning.lora(setup, rank=2, seed=0) as weights:
        assert len(weights) == 2 * 2  # one later block: queries and values, two factors each
        untrained = last()
        assert task.tune(tuning.contextlib.nullcontext, weights, 0.1) > 0.5
    assert dict(setup.model.named_modules()) == before
    assert torch.allclose(last(), untrained, atol=1e-4)


def test_a_perfect_dictionary_keeps_everything(setup):
    """Both signs of every dimension, all of them active."""
    bottleneck = modules["bottleneck"]
    coder = SparseCoder(SparseCoderConfig(d=D, m=2 * D, k=2 * D))
    with torch.no_grad():
        coder.W_enc.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        coder.W_dec.copy_(coder.W_enc)
    perfect = common.Setup(setup.model, setup.tokenizer, coder, setup.module, setup.articles, setup.speeches)
    numbers = bottleneck.recipe(perfect, bottleneck.QUICK).numbers
    for task, row in numbers.items():
        assert row["dictionary"] == pytest.approx(row["the model itself"], abs=1e-4), task
        assert row["every token"] == pytest.approx(row["the model itself"], abs=1e-4), task
    assert any(row["mean"] != row["the model itself"] for row in numbers.values())


def test_scores_that_separate_have_auroc_one():
    anomaly = modules["anomaly_detection"]
    low, high = np.random.default_rng(0).random((2, 20))
    drawn = anomaly.drawn({"perplexity": low, "same": low}, {"perplexity": high + 1, "same": low})
    assert bool((drawn["perplexity"] == 1.0).all())
    assert drawn["same"][0] == 0.5 and drawn["same"].std() > 0
