# SPDX-License-Identifier: Apache-2.0
"""A coder trained by several processes takes the steps that one process takes."""

import pytest
import torch

from fusae import encode_batch_topk, encode_topk
from fusae.testing.ranks import B, D, K, M, config, data, losses, spawn
from fusae.train import Trainer

SHORT = {"tokens": B * 30}
# (processes, fields): what is to be trained.
TOGETHER = {
    "topk": (2, {"clip_norm": 0.3}),
    "topk, 4": (4, {}),
    "topk, 2 x 2": (4, {"shard_latents": 2}),
    "batch_topk": (2, {"form": "batch_topk"}),
    "batch_topk, 2 x 2": (4, {"form": "batch_topk", "shard_latents": 2}),
    "batch_topk, rows": (2, {"form": "batch_topk", "shard_latents": 1}),
    "matryoshka": (2, {"form": "matryoshka", "prefixes": "10,40", **SHORT}),
    "multi_topk": (2, {"multi_topk": 0.125, "ema": 0.99, **SHORT}),
    "abs": (2, {"form": "abs", **SHORT}),
    "group_max": (2, {"form": "group_max", **SHORT}),
    "relu": (2, {"form": "relu", **SHORT}),
    "jumprelu": (2, {"form": "jumprelu", "penalty": "tanh", **SHORT}),
    "by norm, lazy": (2, {"select_by_norm": True, "unit_decoder": False, "optimizer": "lazy", "beta1": 0.0, **SHORT}),
}
SIZES = (2, 4)


def _steps(cases):
    """Losses, and the latents selected in the first step, of this rank's."""
    from fusae.train.sharded import ShardedTrainer

    found = {}
    for name, given in cases.items():
        trainer = ShardedTrainer(config(**given), data(), None, show=False)
        first = trainer.train_step(trainer.feed.next())
        codes = first.codes.to_dense() != 0
        rest = losses(trainer, trainer.config.steps - 1)
        trainer.check_alike()
        found[name] = [(float(first.loss.detach()), 0.0), *rest], codes, int(trainer._dead_count())
        weights = sum(t.numel() for t in (trainer.coder.W_enc, trainer.coder.W_dec))
        assert weights * trainer.mesh.latents == 2 * M * D
    return found


@pytest.fixture(scope="module")
def together():
    found = {}
    for size in SIZES:
        ranks = spawn(size, _steps, {name: given for name, (n, given) in TOGETHER.items() if n == size})
        for name in ranks[0]:
            found[name] = [rank[name] for rank in ranks]
    return found


@pytest.mark.parametrize("name", list(TOGETHER))
def test_losses_and_first_selection_are_those_of_one_process(together, name):
    size, given = TOGETHER[name]
    ranks = together[name]
    alone = Trainer(config(**{k: v for k, v in given.items() if k != "shard_latents"}), data(), None, show=False)
    first = alone.train_step(alone.feed.next())
    wanted = [(float(first.loss.detach()), 0.0), *losses(alone, alone.config.steps - 1)]
    latents = given.get("shard_latents", size)
    assert torch.equal(torch.cat([codes for _, codes, _ in ranks[:latents]], 1), first.codes.to_dense() != 0)
    for step, budget in ((1, 1e-6), (10, 1e-5), (len(wanted), 1e-4)):
        for rank in ranks:
            assert rank[0][step - 1] == pytest.approx(wanted[step - 1], rel=budget, abs=1e-9), step
    assert {dead for _, _, dead in ranks} == {int(alone._dead_count())}
    assert all(rank[0] == ranks[0][0] for rank in ranks)  # to the last bit


def test_some_of_these_runs_had_dead_latents(together):
    assert sum(any(aux for _, aux in ranks[0][0]) for ranks in together.values()) >= 4


# ---- ties and skew -------------------------------------------------------------------------------------------------


def _hard_inputs(kind):
    """Pre-activations that are small whole numbers, exact in any order of summation: full of ties."""
    n, generator = 12, torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (n, D), generator=generator).float()
    W = torch.randint(-1, 2, (M, D), generator=generator).float()
    b = torch.zeros(M)
    if kind == "equal":
        W[:] = 1
    elif kind == "one rank":  # all winners
        b[: M // 4] = 100
    elif kind == "one row":
        x[:-1] = 0
    elif kind == "negative":
        b[:] = -1000
        b[M // 2] = 1000
    elif kind == "nan":
        x[3, 2] = torch.nan
    return x, W, b


KINDS = ("whole numbers", "equal", "one rank", "one row", "negative", "nan")


def _selections(grids):
    from fusae.nn import SparseCoder, SparseCoderConfig
    from fusae.train.sharded import Mesh, ShardedCoder

    found = {}
    for latents in grids:
        mesh = Mesh(latents, torch.device("cpu"), 60.0)
        m = M // latents
        own = slice(mesh.latent_rank * m, (mesh.latent_rank + 1) * m)
        for kind in KINDS:
            x, W, b = _hard_inputs(kind)
            for select in ("topk", "batch_topk"):
                parts = SparseCoderConfig(D, m, K, select=select, k_aux=min(6, m))
                coder = ShardedCoder(SparseCoder(parts, seed=0), mesh, M)
                with torch.no_grad():
                    coder.W_enc.copy_(W[own])
                    coder.b_enc.copy_(b[own])
                    coder.b_dec.zero_()
                dead = (torch.arange(M) % 3 == 0)[own]
                codes, smallest, aux = coder.select(x, torch.cat([dead, torch.ones(1, dtype=torch.bool)]), 6)
                dense = [part.detach().to_dense() for part in (codes, aux)]
                found[latents, kind, select] = *dense, None if smallest is None else float(smallest)
    return found


@pytest.fixture(scope="module")
def selections():
    return spawn(4, _selections, (1, 2, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latents", [1, 2, 4])
def test_ties_skew_and_nan_are_selected_as_by_one_process(selections, latents, kind):
    x, W, b = _hard_inputs(kind)
    options = {"aux_mask": torch.arange(M) % 3 == 0, "k_aux": 6}
    codes, aux = encode_topk(x, W, b, K, **options)
    whole, smallest, aux_of_batch = encode_batch_topk(x, W, b, K, **options)
    for select, wanted in (("topk", (codes, aux)), ("batch_topk", (whole, aux_of_batch))):
        ranks = [rank[latents, kind, select] for rank in selections[:latents]]
        for part, one in enumerate(wanted):
            got = torch.cat([rank[part] for rank in ranks], 1)
            assert torch.equal(got.nan_to_num(1e9), one.to_dense().nan_to_num(1e9)), (select, part)
        if select == "batch_topk":
            assert {rank[2] for rank in ranks} == {float(smallest)}
