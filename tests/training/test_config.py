"""What both stages can be told about steps: optimisers, schedules, clipping, averages, noise; each by what it does."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import SchedulerType

import diffusers_graft as dg
from diffusers_graft.errors import StateError, TrainingError
from diffusers_graft.training.config import TrainingConfig, list_optimizers
from diffusers_graft.training.distill import replay_buffer as ring
from diffusers_graft.training.noised_batch import Noising
from diffusers_graft.training.optimizer import StageOptimizer

from ..models import SCHEDULER, batches, tiny_dit
from .test_options import HYENA, calls_of, teach

STEPS, WARMUP = 20, 5
MATRICES_ALONE, WITHOUT_DECAY = {"Muon"}, {"Rprop"}  # what torch says of them


def settle(model, data=None, **settings):
    more = {name: settings.pop(name) for name in ("callbacks",) if name in settings}
    config = dg.FinetuneConfig(**{"steps": 3, "lr": 1e-3, "progress": False, **settings})
    return dg.finetune(model, data or batches(), config, noise_scheduler=SCHEDULER, **more)


def grafted():
    model = tiny_dit()
    model.set_graft({"self_attention[1::2]": HYENA})
    return model


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def prepared(size=8):
    """Model arguments with a target: nothing is drawn."""
    noised = Noising(scheduler=SCHEDULER, drop_labels=False)(
        tiny_dit(), batches(1, size=size)[0], torch.Generator().manual_seed(0)
    )
    return {**noised.inputs, "target": noised.target}


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimiser_of_torch_takes_steps(name):
    weight = torch.nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = StageOptimizer(
        [weight], TrainingConfig(optimizer=name, lr=1e-2, schedule="constant", max_grad_norm=1e9)
    )
    for _ in range(5):
        optimizer.backward(weight.square().sum())
        optimizer.clip_gradients()
        optimizer.step()
    assert weight.square().sum() < 4 * 4 * 2.0**2
    if name in MATRICES_ALONE:
        with pytest.raises(TrainingError, match="does not take these settings"):
            StageOptimizer([torch.nn.Parameter(torch.ones(4))], TrainingConfig(optimizer=name))
    if name in WITHOUT_DECAY:
        with pytest.raises(TrainingError, match="weight_decay"):
            StageOptimizer([weight], TrainingConfig(optimizer=name, weight_decay=0.1))


def test_weight_decay_reaches_the_optimiser():
    sizes = [weights_of(model).norm() for decay in (0.0, 10.0) if settle(model := grafted(), weight_decay=decay)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("schedule", [kind.value for kind in SchedulerType])
def test_every_schedule_of_diffusers(schedule):
    settings = {"piecewise_constant": {"step_rules": f"1:{STEPS // 2},0.1"}}.get(schedule, {})
    factor = TrainingConfig(steps=STEPS, warmup=WARMUP, schedule=schedule, schedule_args=settings).lr_factors()
    factors = [factor(step) for step in range(STEPS)]
    assert min(factors) > 0  # the first and the last step move something
    assert max(factors) == pytest.approx(1)
    if schedule not in ("constant", "piecewise_constant"):
        assert factors[: WARMUP - 1] == pytest.approx([(step + 1) / WARMUP for step in range(WARMUP - 1)])
    assert (factors[-1] < 0.5) == (schedule not in ("constant", "constant_with_warmup"))


def test_every_step_has_the_learning_rate_of_its_place():
    weight, lengths = torch.nn.Parameter(torch.zeros(1)), []
    config = TrainingConfig(steps=STEPS, optimizer="SGD", lr=0.1, schedule="linear", warmup=WARMUP)
    optimizer = StageOptimizer([weight], config)
    for _ in range(STEPS):
        before, weight.grad = weight.item(), torch.ones(1)
        optimizer.step()
        lengths.append(before - weight.item())
    assert lengths == pytest.approx([0.1 * config.lr_factors()(step) for step in range(STEPS)], rel=1e-3)


def test_gradients_are_clipped_to_their_norm():
    """A step of plain descent is as long as the clipped gradient."""
    model = grafted()
    before = weights_of(model)
    settle(model, steps=1, optimizer="SGD", lr=1.0, schedule="constant", max_grad_norm=1e-2)
    assert (weights_of(model) - before).norm().item() == pytest.approx(1e-2, rel=1e-3)


def test_accumulated_batches_of_stage_two_are_one_larger_batch():
    whole = prepared()
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(0, 4), slice(4, 8))]
    results = []
    for data, accumulate in (([whole], 1), (halves, 2)):
        model = grafted()
        settle(model, data, accumulate=accumulate, optimizer="SGD", lr=0.1, schedule="constant")
        results.append(weights_of(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_average_is_the_one_of_every_steps_weights():
    class Watcher:
        seen = []

        def on_step_end(self, args, state, control, **_):
            self.seen.append(weights_of(model))

    model, decay = grafted(), 0.3
    expected = weights_of(model)
    settle(model, steps=6, ema_decay=decay, callbacks=[watcher := Watcher()])
    for done, weights in enumerate(watcher.seen, 1):
        # diffusers' EMAModel: the first step is copied, then shares grow while there is little to average.
        now = min(decay, done / (done + 9)) if done > 1 else 0.0
        expected = now * expected + (1 - now) * weights
    torch.testing.assert_close(weights_of(model), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights_of(model), watcher.seen[-1])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_of_stage_two_keeps_weights_and_stays_close(precision):
    losses = {kind: settle(grafted(), steps=8, precision=kind) for kind in ("no", precision)}
    assert losses[precision] != losses["no"]
    assert losses[precision] == pytest.approx(losses["no"], rel=0.05)
    model = grafted()
    settle(model, precision=precision)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "forwards"), [({}, 1), ({"distill_output": 1.0}, 2), ({"distill_features": 1.0}, 2)], ids=str
)
def test_teachers_of_stage_two_are_off_unless_asked_and_cost_a_forward(settings, forwards):
    model = grafted()
    counts = calls_of(model)
    settle(model, steps=3, **settings)
    assert counts[0] == 3 * forwards


def test_noise_is_drawn_anew_at_every_step():
    model, seen = tiny_dit(), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    data = [{"sample": torch.zeros(8, 1, 8, 8), "class_labels": torch.zeros(8, dtype=torch.long)}]
    teach({"self_attention[0]": HYENA}, model, data, steps=12)
    for name in ("hidden_states", "timestep"):
        rows = torch.stack([inputs[name].flatten() for inputs in seen]).double()
        assert len(rows.unique(dim=0)) == 12
    labels = torch.cat([inputs["class_labels"] for inputs in seen])
    assert set(labels.tolist()) == {0, 5}  # 5 is no label


@pytest.mark.parametrize(
    ("scheduler", "timesteps", "uniform"),
    [
        (DDPMScheduler(), "auto", True),
        (DDPMScheduler(), "logit_normal", False),
        (FlowMatchEulerDiscreteScheduler(), "auto", False),
        (FlowMatchEulerDiscreteScheduler(), "uniform", True),
    ],
    ids=["ddpm", "ddpm logit-normal", "flow", "flow uniform"],
)
def test_timesteps_are_spread_as_the_scheduler_has_it(scheduler, timesteps, uniform):
    """How many lie in the middle half: 0.5 of a uniform draw, P(|z| < ln 3) = 0.73 of a logit-normal one."""
    sample = torch.zeros(4000, 1, 1, 1)
    noised = Noising(scheduler=scheduler, timesteps=timesteps)(
        tiny_dit(), {"sample": sample}, torch.Generator().manual_seed(0)
    )
    share = noised.inputs["timestep"].double() / 1000
    expected = 0.5 if uniform else torch.special.erf(torch.tensor(3.0).log() / 2**0.5).item()
    assert ((share > 0.25) & (share < 0.75)).double().mean().item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("free", [10**9, 200_000])
def test_the_ring_takes_half_of_what_is_free_unless_told(free, monkeypatch):
    """Sites learn together where there is room, and in groups, each with its own passes of the teacher, where there is
    not.
    """
    pages = {"SC_AVPHYS_PAGES": free, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(ring.os, "sysconf", pages.get)
    assert ring.usable_memory(torch.device("cpu")) == free // 2
    model = tiny_dit()
    counts = calls_of(model)
    one_call = 2 * 8 * 16 * 16 * 4  # input and output of 8 samples of 16 tokens of width 16, in float32
    together = min(4, free // 2 // (4 * one_call))
    _, _, reports = teach({"self_attention[:]": HYENA}, model, steps=8, reuse=2, ring=4)
    assert all(len(report.losses) == 8 for report in reports.values())
    assert counts[0] == 1 + 4 * (4 // together)


def test_a_system_that_does_not_tell_its_memory_asks_for_a_limit(monkeypatch):
    def unknown(name):
        raise ValueError(name)

    monkeypatch.setattr(ring.os, "sysconf", unknown)
    with pytest.raises(TrainingError, match=r"set DistillConfig\.memory"):
        teach({"self_attention[0]": HYENA}, reuse=2)
    teach({"self_attention[0]": HYENA}, reuse=2, memory=10**6)


def test_a_warm_up_that_takes_all_steps_is_told(caplog):
    settle(grafted(), steps=2, warmup=1)
    assert not caplog.records
    settle(grafted(), steps=2, warmup=2)
    assert "A warm-up of 2 steps out of 2: the learning rate stays below 0.001" in caplog.text


def test_bars_are_for_terminals(capfd):
    settle(grafted(), steps=2, progress=True)
    assert not capfd.readouterr().err


def test_the_average_moves_in_shares_that_bfloat16_cannot_hold():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = StageOptimizer([weight], TrainingConfig(), ema_decay=0.999)
    optimizer.average.optimization_step = 10**6
    optimizer.set_weights([torch.full_like(weight, 1.25)])
    for _ in range(100):
        optimizer.step()
    assert optimizer.average.shadow_params[0].mean().item() == pytest.approx(1.25 - 0.25 * 0.999**100, rel=1e-4)


def test_a_plan_is_no_graft_and_settings_of_another_verb_are_refused():
    model = tiny_dit()
    plan = dg.plan_graft(model, {"self_attention[0]": "hyena_x"})
    for verb in (dg.distill, dg.closed_form):
        with pytest.raises(StateError, match="dg.build_graft"):
            verb(model, plan, batches(1), noise_scheduler=SCHEDULER)
    graft = dg.build_graft(model, plan)
    for verb, given in ((dg.distill, (model, graft)), (dg.closed_form, (model, graft)), (dg.finetune, (model,))):
        with pytest.raises(TrainingError, match="The settings here are a dg"):
            verb(*given, batches(1), {"steps": 1}, noise_scheduler=SCHEDULER)
