"""Settings of both stages."""

import pytest
from diffusers.optimization import SchedulerType

import diffusers_graft as dg
from diffusers_graft.errors import StateError, TrainingError, UnknownNameError
from diffusers_graft.training.config import TrainingConfig
from diffusers_graft.training.noised_batch import Noising

from ..models import SCHEDULER, batches, tiny_dit
from .runs import RANDOM, build


def test_unknown_settings_of_both_stages_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'huber'"):
        dg.DistillConfig(loss="hubert")
    with pytest.raises(TrainingError, match="at least one step"):
        dg.DistillConfig(steps=0)
    with pytest.raises(UnknownNameError, match="set of weights"):
        dg.FinetuneConfig(train="everything")
    with pytest.raises(UnknownNameError, match="timesteps"):
        Noising(timesteps="sometimes")


def test_every_verb_has_default_settings():
    model, graft = build({"self_attention[0]": RANDOM})
    for verb in (dg.distill, dg.closed_form):
        with pytest.raises(TrainingError, match="ran out"):
            verb(model, graft, [], noise_scheduler=SCHEDULER)
    model.set_graft(graft)
    with pytest.raises(TrainingError, match="ran out"):
        dg.finetune(model, [], noise_scheduler=SCHEDULER)


STEPS, WARMUP = 20, 5


@pytest.mark.parametrize("schedule", [kind.value for kind in SchedulerType])
def test_every_schedule_of_diffusers_moves_the_first_and_the_last_step(schedule):
    settings = {"piecewise_constant": {"step_rules": f"1:{STEPS // 2},0.1"}}.get(schedule, {})
    factor = TrainingConfig(steps=STEPS, warmup=WARMUP, schedule=schedule, schedule_args=settings).lr_factors()
    factors = [factor(step) for step in range(STEPS)]
    assert min(factors) > 0  # the first and the last step move something
    assert max(factors) == pytest.approx(1)
    if schedule not in ("constant", "piecewise_constant"):
        assert factors[: WARMUP - 1] == pytest.approx([(step + 1) / WARMUP for step in range(WARMUP - 1)])
    assert (factors[-1] < 0.5) == (schedule not in ("constant", "constant_with_warmup"))


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
