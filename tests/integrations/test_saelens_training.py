# SPDX-License-Identifier: Apache-2.0
"""SAELens' training SAEs and its trainer with fusae under them, beside themselves without."""

import copy

import pytest
import torch

import fusae
from fusae.testing.compare import assert_grads, assert_within_budget

pytest.importorskip("sae_lens", reason="sae-lens is not installed (the extra [integrations])")
from sae_lens import saes  # noqa: E402
from sae_lens.saes.sae import TrainingSAE  # noqa: E402
from saelens_made import TRAINING, D, K, M, Ran, data, make, pair, some_dead, step_input, trainer, twin  # noqa: E402

from fusae.integrations._later import Activations, Later  # noqa: E402

NAMES = list(TRAINING)
STEPS = 60


def _step(sae, x, dead, wanted=None):
    x = x.clone().requires_grad_()
    out = sae.training_forward_pass(step_input(x, dead))
    names, parameters = zip(*sae.named_parameters(), strict=True)
    grads = torch.autograd.grad(out.loss, (x, *parameters), allow_unused=True)
    return out, dict(zip(("x", *names), grads, strict=True))


@pytest.mark.parametrize("dead", [None, 0.3, 0.01, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_and_its_gradients(name, dead):
    if name == "topk, coo" and dead:
        pytest.skip("the tool itself cannot: its auxiliary loss is dense, its hidden_pre too, and COO has no backward")
    fast, tool = pair(make(TRAINING, name))
    mask = None if dead is None else some_dead(dead)
    oracle, x = twin(tool, torch.float64), data()
    with Ran() as ran:
        ours, grads = _step(fast, x, mask)
    assert {"encode_topk_fwd", "encode_threshold_fwd", "encode_batch_topk_fwd"} & ran.fused
    theirs, wanted = _step(tool, x, mask)
    true, exact = _step(oracle, x.double(), mask)
    assert list(ours.losses) == list(theirs.losses) and list(ours.metrics) == list(theirs.metrics)
    for key in theirs.losses:
        assert_within_budget(ours.losses[key].detach(), theirs.losses[key], true.losses[key], key)
    assert_within_budget(ours.loss, theirs.loss, true.loss, "loss")
    assert_within_budget(ours.sae_out.detach(), theirs.sae_out, true.sae_out, "sae_out")
    for key, gradient in wanted.items():
        assert (grads[key] is None) == (gradient is None), key
        if gradient is not None:
            assert_grads(grads[key], gradient, exact[key], key)
    acts = theirs.feature_acts
    assert ours.feature_acts.shape == acts.shape and ours.feature_acts.is_sparse == acts.is_sparse
    assert_within_budget(ours.feature_acts.to_dense().detach(), acts.to_dense(), true.feature_acts.to_dense(), "acts")
    assert_within_budget(torch.clone(ours.hidden_pre).detach(), theirs.hidden_pre, true.hidden_pre, "hidden_pre")
    for key, buffer in tool.named_buffers():
        torch.testing.assert_close(getattr(fast, key), buffer, rtol=1e-6, atol=0)


def test_no_dense_activations_in_a_step():
    """No tensor of [n, m] elements is made in a step of the TopK family, forward, backward and in the trainer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    self.elements = max(self.elements, t.numel())
            return out

    n = 6 * D
    for name in ("topk", "topk, coo", "abstopk", "batchtopk", "matryoshka", "standard", "jumprelu", "gated"):
        t = trainer(make(TRAINING, name), n=n, window=1)
        fusae.accelerate(t)
        for i in range(4):
            with Largest() as largest:
                out = t.step(data(n, seed=i))
            assert largest.elements <= n * M // 2, name
            assert isinstance(out.hidden_pre, Later) and isinstance(out.feature_acts, Activations)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ["sae", "trainer"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "topk, coo"])
def test_a_run_of_the_tools_trainer(name, how, autocast):
    if autocast and name not in ("topk", "batchtopk", "jumprelu"):
        pytest.skip("one of each family under autocast")
    runs = [trainer(make(TRAINING, name), autocast=autocast) for _ in range(2)]
    fusae.accelerate(runs[0].sae if how == "sae" else runs[0])
    every = data(600) + 0.5 * data(600, seed=3)[:, :1]
    for i in range(STEPS if not autocast else 10):
        x = every[torch.randint(600, (72,), generator=torch.Generator().manual_seed(i))]
        ours, theirs = (t.step(x) for t in runs)
        for key, value in theirs.losses.items():
            if autocast and key == "pre_act_loss":  # of so many latents as are dead
                continue
            torch.testing.assert_close(
                ours.losses[key].detach(), value.detach(), rtol=3e-2 if autocast else 1e-4, atol=1e-5, msg=f"{i} {key}"
            )
    if autocast:
        return
    assert int(runs[0].dead_neurons.sum()) == int(runs[1].dead_neurons.sum())
    torch.testing.assert_close(runs[0].act_freq_scores, runs[1].act_freq_scores)
    logs = [t.build_train_step_log_dict(o, 72) for t, o in ((runs[0], ours), (runs[1], theirs))]
    assert list(logs[0]) == list(logs[1])
    for key, value in logs[1].items():
        assert logs[0][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_sparse_activations_train_where_the_tool_cannot():
    """`use_sparse_activations` beside the default `rescale_acts_by_decoder_norm`: the tool's backward pass raises."""
    t = trainer(make(TRAINING, "topk", use_sparse_activations=True))
    fusae.accelerate(t.sae)
    reference = trainer(make(TRAINING, "topk"))
    for i in range(8):
        ours, theirs = t.step(data(seed=i)), reference.step(data(seed=i))
        torch.testing.assert_close(ours.loss.detach(), theirs.loss.detach(), rtol=1e-5, atol=0)
        assert ours.feature_acts.is_sparse and ours.feature_acts.layout == torch.sparse_coo
    acts = ours.feature_acts.coalesce()
    assert acts.indices().shape[0] == 2 and acts.values().shape[0] == 72 * K


@pytest.mark.parametrize("name", NAMES)
def test_encode_decode_and_forward(name):
    fast, tool = pair(make(TRAINING, name))
    x, oracle = data(), twin(tool, torch.float64)
    with torch.no_grad():
        f, wanted = fast.encode(x), tool.encode(x)
        assert f.is_sparse == wanted.is_sparse and type(f) is torch.Tensor
        assert_within_budget(f.to_dense(), wanted.to_dense(), oracle.encode(x.double()).to_dense(), "encode")
        assert_within_budget(fast(x), tool(x), oracle(x.double()), "forward")
        torch.testing.assert_close(fast.decode(wanted), tool.decode(wanted))
        for ours, theirs in zip(fast.encode_with_hidden_pre(x), tool.encode_with_hidden_pre(x), strict=True):
            torch.testing.assert_close(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("point", ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka", "standard", "jumprelu", "gated"])
def test_hooks_may_edit_a_step(name, point):
    fast, tool = pair(make(TRAINING, name))
    outs = []
    for sae in (fast, tool):
        sae.add_hook(point, lambda value, hook: value * 0.9)
        outs.append(_step(sae, data(), some_dead()))
    torch.testing.assert_close(outs[0][0].loss, outs[1][0].loss)
    for key, value in outs[1][1].items():
        torch.testing.assert_close(outs[0][1][key], value, rtol=1e-3, atol=1e-3, msg=key)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "standard", "jumprelu", "gated"])
def test_normalised_inputs(name, norm):
    fast, tool = pair(make(TRAINING, name, normalize_activations=norm))
    ours, theirs = (_step(sae, data() * 3, None) for sae in (fast, tool))
    torch.testing.assert_close(ours[0].loss, theirs[0].loss)
    for key, value in theirs[1].items():
        torch.testing.assert_close(ours[1][key], value, rtol=1e-3, atol=1e-3, msg=key)
    if "topk" in name:
        for sae in (fast, tool):
            with pytest.raises(ValueError, match="does not support activation normalization"):
                sae.training_forward_pass(step_input(data(), some_dead()))


def test_what_the_step_hands_out_is_as_good_as_a_tensor():
    fast, tool = pair(make(TRAINING, "topk"))
    ours, theirs = (sae.training_forward_pass(step_input(data())).feature_acts for sae in (fast, tool))
    assert isinstance(ours, torch.Tensor) and ours.shape == (72, M) and ours.dtype == torch.float32 and len(ours) == 72
    for use in (
        lambda f: f.bool().float().sum(-2), lambda f: (f > 0).sum(dim=-1), lambda f: f.sum(0), lambda f: f.sum(-1),
    ):  # fmt: skip
        with Ran() as ran:
            result = use(ours)
        assert "aten::index_copy_" not in ran.ops
        torch.testing.assert_close(result, use(theirs))
    copied = copy.deepcopy(ours.detach())
    for use in (
        lambda f: f @ torch.ones(M), lambda f: f[3], lambda f: torch.cat([f, f]), lambda f: f.detach().numpy().sum(),
        lambda f: torch.linalg.norm(f, dim=1), lambda f: f.max(), lambda f: f.view(8, 9, M).mean((0, 1)),
    ):  # fmt: skip
        torch.testing.assert_close(use(ours), use(theirs))
    torch.testing.assert_close(copied, theirs.detach())
    with torch.no_grad():
        ours[:, 5] = 7.0
    assert ours[0, 5] == 7.0 and ours.sum(0)[5] == 7.0 * 72
    assert not ours.detach_().requires_grad


def test_gradients_by_what_was_not_in_the_graph_are_refused():
    fast, _ = pair(make(TRAINING, "topk"))
    out = fast.training_forward_pass(step_input(data()))
    with pytest.raises(RuntimeError, match="A hook on hook_sae_acts_post"):
        torch.autograd.grad(out.loss, out.feature_acts)
    with pytest.raises(RuntimeError, match="was not part of the graph"):
        out.feature_acts.retain_grad()

    class Twice(torch.autograd.Function):
        forward = staticmethod(lambda ctx, f: 2 * f)
        backward = staticmethod(lambda ctx, grad: 2 * grad)

    with pytest.raises(RuntimeError, match="was not part of the graph"):
        Twice.apply(out.feature_acts).sum().backward()
    Twice.apply(out.feature_acts.clone()).sum().backward()
    assert fast.W_enc.grad.any()
    fast, _ = pair(make(TRAINING, "matryoshka"))
    out = fast.training_forward_pass(step_input(data()))
    with pytest.raises(RuntimeError, match="only their sum `loss` has gradients"):
        out.losses["mse_loss"].backward()


@pytest.mark.parametrize("name", ["topk", "jumprelu", "gated"])
def test_stale_pre_activations_are_refused(name):
    fast, tool = pair(make(TRAINING, name))
    kept = fast.training_forward_pass(step_input(data())).hidden_pre
    torch.testing.assert_close(torch.clone(kept), tool.training_forward_pass(step_input(data())).hidden_pre)
    stale = fast.training_forward_pass(step_input(data())).hidden_pre
    fast.W_enc.data += 1e-3
    with pytest.raises(RuntimeError, match="weights or inputs have changed since the step"):
        stale.sum()


def test_a_fraction_of_a_latent_and_other_losses_run_the_tools_code():
    fast, tool = pair(make(TRAINING, "batchtopk", k=K + 0.5))
    with Ran() as ran:
        ours, _ = _step(fast, data(), some_dead())
    assert not {op for op in ran.fused if op.startswith("encode")}
    torch.testing.assert_close(ours.loss, _step(tool, data(), some_dead())[0].loss)
    fast, tool = pair(make(TRAINING, "matryoshka"))
    for sae in (fast, tool):
        sae.mse_loss_fn = torch.nn.L1Loss(reduction="none")
    torch.testing.assert_close(_step(fast, data(), None)[0].loss, _step(tool, data(), None)[0].loss)


def test_a_users_own_step_is_left_alone():
    class Own(saes.TopKTrainingSAE):
        def calculate_aux_loss(self, **given):
            return {"own": given["hidden_pre"].abs().mean()}

    own = Own(saes.TopKTrainingSAEConfig(d_in=D, d_sae=M, k=K))
    assert "Own overrides calculate_aux_loss" in fusae.explain(own)


@pytest.mark.parametrize("name", ["topk", "jumprelu"])
def test_compile_runs_the_tools_code(name):
    fast, tool = pair(make(TRAINING, name))
    for sae in (fast, tool):
        sae.training_forward_pass = torch.compile(sae.training_forward_pass, fullgraph=True, backend="aot_eager")
    dead = None
    torch.testing.assert_close(_step(fast, data(), dead)[0].loss, _step(tool, data(), dead)[0].loss)


@pytest.mark.parametrize("name", NAMES)
def test_files_of_an_accelerated_run_open_in_the_tool(name, tmp_path):
    runs = [trainer(make(TRAINING, name)) for _ in range(2)]
    fusae.accelerate(runs[0])
    for t in runs:
        if name != "topk, coo":
            for i in range(3):
                t.step(data(seed=i))
        folder = tmp_path / ("ours" if t is runs[0] else "theirs")
        t.sae.save_model(folder / "training")
        t.sae.save_inference_model(folder / "inference")
        t.activation_scaler.scaling_factor = 1.0
        t.save_trainer_state(folder)
    assert list(runs[0].sae.state_dict()) == list(runs[1].sae.state_dict())
    for kind, cls in (("training", TrainingSAE), ("inference", saes.SAE)):
        ours, theirs = (cls.load_from_disk(tmp_path / who / kind) for who in ("ours", "theirs"))
        assert type(ours) is type(theirs) and ours.W_enc.is_contiguous()
        for (key, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert key == other
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # The tool goes on from our state, and we from the tool's, as if nobody had changed sides.
    if name == "topk, coo":
        return
    losses = []
    for who, fast in (("ours", False), ("theirs", True), ("theirs", False), ("ours", True)):
        t = trainer(TrainingSAE.load_from_disk(tmp_path / who / "training"))
        if fast:
            fusae.accelerate(t)
        t.load_trainer_state(tmp_path / who)
        losses.append([float(t.step(data(seed=7 + i)).loss) for i in range(6)])
        group = t.optimizer.param_groups[0]
        assert (group["fused"], group["foreach"]) == ((True, False) if fast else (None, None))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_a_trainer_goes_back_to_what_it_was():
    t, reference = trainer(make(TRAINING, "topk")), trainer(make(TRAINING, "topk"))
    for i in range(9):
        if i == 3:
            fusae.accelerate(t)
            assert t.sae.W_enc.T.is_contiguous()
            assert "SAETrainer on fusae" in fusae.explain(t) and "sae: TopKTrainingSAE on fusae" in fusae.explain(t)
        elif i == 6:
            fusae.restore(t)
            assert t.sae.W_enc.is_contiguous() and type(t.sae) is saes.TopKTrainingSAE
            assert t.optimizer.param_groups[0]["fused"] is None and not t.optimizer._optimizer_state_dict_post_hooks
        ours, theirs = t.step(data(seed=i)), reference.step(data(seed=i))
        torch.testing.assert_close(ours.loss.detach(), theirs.loss.detach(), rtol=1e-5, atol=0)
    for a, b in zip(t.sae.parameters(), reference.sae.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_users_choice_of_optimiser_is_kept():
    t = trainer(make(TRAINING, "topk"))
    t.optimizer = torch.optim.Adam(t.sae.parameters(), lr=1e-3, foreach=True)
    fusae.accelerate(t)
    t.step(data())
    assert t.optimizer.param_groups[0]["foreach"] is True and t.optimizer.param_groups[0]["fused"] is None
    t = trainer(make(TRAINING, "topk"))
    t.optimizer = torch.optim.SGD(t.sae.parameters(), lr=1e-3)
    fusae.accelerate(t)
    assert "its optimiser is SGD, not Adam" in fusae.explain(t) and t.sae.W_enc.is_contiguous()


def test_weights_of_16_bits():
    for name in ("topk", "batchtopk", "jumprelu"):
        fast, tool = pair(make(TRAINING, name).to(torch.bfloat16))
        x = data().bfloat16()
        ours, theirs = (sae.training_forward_pass(step_input(x, some_dead())) for sae in (fast, tool))
        assert ours.loss.dtype == theirs.loss.dtype
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=0.03, atol=0.03)
        ours.loss.backward()
        assert fast.W_enc.grad.dtype == torch.bfloat16 and fast.W_enc.grad.shape == tool.W_enc.shape


def test_no_dead_and_no_rows():
    for name in ("topk", "batchtopk", "matryoshka", "jumprelu"):
        fast, tool = pair(make(TRAINING, name))
        ours, theirs = (sae.encode(data(0)) for sae in (fast, tool))
        assert ours.shape == theirs.shape == (0, M)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_no_rows(name):
    fast, tool = pair(make(TRAINING, name))
    ours, theirs = (sae.training_forward_pass(step_input(data(0))) for sae in (fast, tool))
    assert ours.sae_out.shape == theirs.sae_out.shape == (0, D) and ours.feature_acts.shape == (0, M)
    assert list(ours.losses) == list(theirs.losses)
