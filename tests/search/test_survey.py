"""What a survey measures, against measuring it by hand."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.errors import (
    GraftError,
    OperatorError,
    RuleError,
    StateError,
    TrainingError,
    UnknownNameError,
)
from diffusers_graft.evaluation.benchmark import Timing, with_graft
from diffusers_graft.evaluation.cost import count_flops, count_parameters
from diffusers_graft.inspection import predict as predict_inputs
from diffusers_graft.search.judge import HarmJudge
from diffusers_graft.search.planner import Survey
from diffusers_graft.testbed.sampling import scheduler
from diffusers_graft.training.noised_batch import Noising

from ..inspection.models import inputs_of, tiny
from ..models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit, tiny_pixart
from .conftest import CANDIDATES, TAUGHT

ROOT = Path(__file__).parents[2]


def test_a_plan_replaces_a_block_or_some_of_its_parts():
    model = tiny_dit()
    found = dg.survey(
        model,
        {**CANDIDATES, "block[1:3]": ["linear_block", "remove"]},
        batches(1),
        batches=batches(3),
        config=TAUGHT,
        noise_scheduler=SCHEDULER,
        rounds=2,
        progress=False,
    )
    assert [one.edit.site.address for one in found.choices][-4:] == ["block[1]"] * 2 + ["block[2]"] * 2
    whole = count_parameters(model)
    plans = [found.plan(parameters=share) for share in (0.95, 0.8, 0.62)]
    assert {edit.site.kind for plan in plans for edit in plan.edits} >= {"feed_forward", "block"}
    for plan in plans:
        model.set_graft(found.graft(model, plan))
        assert count_parameters(model) / whole == pytest.approx(found.predicted(plan)["parameters"])
        assert torch.isfinite(predict(model)).all()
        model.unset_graft()


def test_a_survey_leaves_the_model_as_it_was():
    model = tiny_dit()
    before, answer, state = tensors_of(model), predict(model), torch.get_rng_state()
    dg.survey(model, CANDIDATES, batches(1), noise_scheduler=SCHEDULER, rounds=2, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_tensors(model, before)
    assert model.graft is None
    assert torch.equal(predict(model), answer)


def test_every_candidate_is_tried_at_every_site(surveyed):
    _, found = surveyed
    tried = [(one.edit.site.address, one.edit.config.owner.name) for one in found.choices]
    assert tried == [
        ("self_attention[0]", "neighborhood"),
        ("self_attention[0]", "self_attention"),
        ("self_attention[1]", "neighborhood"),
        ("self_attention[1]", "self_attention"),
        ("feed_forward[1]", "linear_mlp"),
        ("feed_forward[1]", "mlp"),
        ("feed_forward[2]", "linear_mlp"),
        ("feed_forward[2]", "mlp"),
        ("feed_forward[3]", "linear_mlp"),
        ("feed_forward[3]", "mlp"),
    ]
    assert (found.protocol["samples"], found.protocol["stage one"]["steps"]) == (16, 3)
    assert all(text in str(found) for text in ("feed_forward[3]", "linear_mlp()", "latency"))


def test_what_a_plan_saves_is_what_is_counted(surveyed):
    model, found = surveyed
    plan = dg.plan_graft(model, {"self_attention[0]": "neighborhood", "feed_forward[1,3]": "linear_mlp"})
    inputs = {
        "hidden_states": torch.randn(8, 1, 8, 8),
        "timestep": torch.zeros(8, dtype=torch.long),
        "class_labels": torch.zeros(8, dtype=torch.long),
    }
    whole = count_flops(model, inputs), count_parameters(model)
    model.set_graft(found.graft(model, plan))
    left = count_flops(model, inputs) / whole[0], count_parameters(model) / whole[1]
    model.unset_graft()
    told = found.predicted(plan)
    assert (told["flops"], told["parameters"]) == (pytest.approx(left[0]), pytest.approx(left[1]))


@torch.no_grad()
def test_harm_is_how_far_the_answer_moves():
    model, rules = tiny_dit(), {"feed_forward[2]": "linear_mlp", "self_attention[1]": "self_attention"}
    flow = FlowMatchEulerDiscreteScheduler()
    found = dg.survey(
        model,
        {site: [operator] for site, operator in rules.items()},
        batches(2),
        noise_scheduler=flow,
        rounds=2,
        progress=False,
    )
    noising, generator = (
        Noising(scheduler=flow, timesteps="uniform", drop_labels=False),
        torch.Generator().manual_seed(0),
    )
    inputs = [noising(model, batch, generator).inputs for batch in batches(2)]
    before = torch.cat([model(**one).sample for one in inputs])
    model.set_graft({"feed_forward[2]": "linear_mlp"})
    moved = torch.cat([model(**one).sample for one in inputs]) - before
    attention, feed_forward = (one.harm for one in found.choices)
    assert attention == 0  # it starts as what it replaces
    assert feed_forward == pytest.approx((moved.square().sum() / before.square().sum()).item(), rel=1e-5)


def test_a_survey_predicts_what_parts_do_together_from_each_alone(surveyed):
    model, found = surveyed
    plan = dg.plan_graft(model, {"feed_forward[1:]": "linear_mlp"})
    moves = []
    for edit in plan.edits:
        single = found.graft(model, dg.GraftPlan(plan.model_class, (edit,)))
        moved = []
        with with_graft(model, single), torch.no_grad():
            for inputs, answer in zip(found.judge.inputs, found.judge.answers, strict=True):
                moved.append((predict_inputs(model, inputs) - answer).flatten())
        moves.append(torch.cat(moved))
    square = torch.cat(found.judge.answers).square().sum()
    together = sum(moves).square().sum() / square
    alone = sum(move.square().sum() for move in moves) / square
    assert abs(together - alone) > 0.05 * alone  # adding up would be off
    assert found.predicted(plan)["harm"] == pytest.approx(together.item(), abs=0.03 * alone.item())


def test_a_corrected_survey_predicts_what_was_measured(surveyed, monkeypatch):
    model, found = surveyed
    timed = [Timing("original", 1.0, 1.0, 1.0, 1.0), Timing("plan", 0.9, 0.9, 0.9, 0.9)]
    monkeypatch.setattr("diffusers_graft.search.planner.compare", lambda *arguments, **settings: timed)
    slow = tuple(replace(one, saved={**one.saved, "latency": 0.05}) for one in found.choices)
    found = replace(found, choices=slow)
    plan = dg.plan_graft(model, {"feed_forward[1:]": "linear_mlp"})
    measured = found.measure(model, plan)
    assert measured["flops"] == pytest.approx(found.predicted(plan)["flops"])
    corrected = found.correct(model, plan)
    assert corrected.predicted(plan) == pytest.approx(measured)
    # three choices were to save 0.15 of the time and save 0.1, so two of them no longer do
    assert (len(found.plan(latency=0.91).edits), len(corrected.plan(latency=0.91).edits)) == (2, 3)


def test_a_plan_is_measured_with_its_rivals(surveyed, monkeypatch):
    model, found = surveyed
    harm = found.judge.harm
    judged = []

    def watched(model, graft):
        judged.append((harm(model, graft), graft.plan))
        return judged[-1][0]

    monkeypatch.setattr(found.judge, "harm", watched)
    plan = found.plan(parameters=0.9, model=model, trials=5)
    assert len(judged) == len({plan for _, plan in judged}) == 5
    assert judged[0][1] == found.plan(parameters=0.9)
    assert plan == min(judged, key=lambda one: one[0])[1]
    assert all(found.predicted(one)["parameters"] <= 0.9 for _, one in judged)
    with pytest.raises(GraftError, match="1 trial or more"):
        found.plan(parameters=0.9, model=model, trials=0)
    with pytest.raises(StateError, match="cannot measure plans"):
        replace(found, grafts=(), judge=None).plan(parameters=0.9, model=model)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"flops": 0.3}, "No plan leaves 0.3 of the flops"),
        ({"latency": 0.01}, "No plan leaves 0.01 of the latency"),
        ({"flops": 2}, "between 0 and 1"),
        ({"time": 0.5}, "latency"),
        ({}, "one budget"),
    ],
)
def test_a_budget_that_no_candidates_meet_is_told_before_stage_one(budget, said):
    with pytest.raises(GraftError, match=said):
        dg.survey(
            tiny_dit(2),
            {"self_attention[:]": ["neighborhood"]},
            batches(1),
            batches=Dying(0),
            config=TAUGHT,
            noise_scheduler=SCHEDULER,
            rounds=2,
            budget=budget,
        )


def test_judging_keeps_no_graph_for_gradients():
    assert not any(answer.requires_grad for answer in HarmJudge(tiny_dit(2), batches(1), SCHEDULER, 0).answers)


def test_stage_one_comes_before_the_judgement(surveyed):
    model, found = surveyed
    untaught = dg.survey(model, CANDIDATES, batches(2), noise_scheduler=SCHEDULER, rounds=2, progress=False)
    both = list(zip(found.choices, untaught.choices, strict=True))
    assert all(one.harm != other.harm for one, other in both if other.harm)
    assert sum(other.harm == 0 for _, other in both) == 2  # self-grafts have nothing to learn


@pytest.mark.parametrize(("bias", "said"), [(0.0, "nothing but zeros"), (torch.nan, "NaN"), (torch.inf, "infinity")])
def test_a_model_that_answers_nothing_cannot_be_judged(bias, said):
    model = tiny_dit(2)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.constant_(model.proj_out_2.bias, bias)
    with pytest.raises(TrainingError, match=said):
        dg.survey(model, {"self_attention[:]": ["identity"]}, batches(1), noise_scheduler=SCHEDULER)


@pytest.mark.parametrize(
    ("candidates", "settings", "error", "said"),
    [
        ({}, {}, RuleError, "by rule key"),
        ({"self_attention[:]": "hyena_x"}, {}, RuleError, "list of operators"),
        ({"self_attention[:]": []}, {}, RuleError, "list of operators"),
        ({"block_pair[0]": ["parallel"]}, {}, RuleError, "several"),
        ({"block_run[0:2]": ["remove"]}, {}, RuleError, "several"),
        ({"self_attention[:]": ["nope"]}, {}, UnknownNameError, "nope"),
        ({"self_attention[:]": ["hyena_x", "hyena_x()"]}, {}, RuleError, r"self_attention\[0\] .* is named 2 times"),
        ({"block[:]": ["remove"], "block[0]": ["linear_block"]}, {}, RuleError, "Two rules claim"),
        ({"self_attention[:]": ["identity"]}, {"batches": []}, TrainingError, "config="),
        ({"self_attention[:]": ["identity"]}, {"config": TAUGHT}, TrainingError, "batches="),
        ({"self_attention[:]": ["identity"]}, {"held_out": []}, TrainingError, "no held-out batches"),
        (
            {"self_attention[:]": ["identity"]},
            {"held_out": [{"sample": torch.zeros(2, 1, 8, 8)}]},
            TrainingError,
            "needs class_labels",
        ),
        ({}, {"rounds": 1}, GraftError, "2 rounds"),
    ],
)
def test_a_survey_of_nonsense(candidates, settings, error, said):
    with pytest.raises(error, match=said):
        dg.survey(tiny_dit(2), candidates, **{"held_out": batches(1), "noise_scheduler": SCHEDULER, **settings})


def test_a_survey_starts_from_the_original():
    model = tiny_dit(2)
    model.set_graft({"self_attention[0]": "identity"})
    with pytest.raises(StateError, match="starts from the original"):
        dg.survey(model, {"self_attention[:]": ["identity"]}, batches(1), noise_scheduler=SCHEDULER)


class Dying:
    """Batches that end in an interruption after so many."""

    def __init__(self, count):
        self.left = count

    def __iter__(self):
        for batch in batches(3):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


def test_a_survey_goes_on_where_it_was_killed(tmp_path):
    def harms(expansion=2, **more):
        candidates = {
            "self_attention[0]": ["neighborhood", "self_attention"],
            "feed_forward[1]": ["linear_mlp", f"mlp(expansion={expansion})"],
        }
        config = dg.DistillConfig(steps=4, lr=1e-3, warmup=0, save_every=2, progress=False)
        settings = {
            "config": config,
            "noise_scheduler": SCHEDULER,
            "rounds": 2,
            "progress": False,
            "batches": batches(3),
        }
        return [one.harm for one in dg.survey(tiny_dit(), candidates, batches(1), **{**settings, **more}).choices]

    with pytest.raises(KeyboardInterrupt):
        harms(batches=Dying(7), output_dir=tmp_path)
    assert list((tmp_path / "candidates-1" / ".checkpoints").iterdir())  # within the second candidates
    with pytest.raises(StateError, match=r": plan\.edits\.1\.expansion was 2 and is 1\."):
        harms(expansion=1, batches=Dying(99), output_dir=tmp_path, resume=True)
    assert harms(batches=Dying(99), output_dir=tmp_path, resume=True) == harms()


class Broken(dg.operators.Mixer):
    """Answers that are not finite."""

    name = "broken"

    def forward(self, query, key, value, context):
        return value / 0

    def flops(self, tokens):
        return 0


def test_parts_that_break_are_left_out(caplog):
    candidates = {"self_attention[0]": [Broken.Config(), "identity"], "feed_forward[0]": ["linear_mlp"]}
    with caplog.at_level(logging.WARNING):
        found = dg.survey(tiny_dit(2), candidates, batches(1), noise_scheduler=SCHEDULER, rounds=2, progress=False)
    assert [one.edit.config.owner.name for one in found.choices] == ["identity", "linear_mlp"]
    (told,) = caplog.messages
    assert told.startswith("self_attention[0]")
    assert "broken" in told


def test_models_with_prompts_are_surveyed():
    model = tiny_pixart(2)
    prompted = {"encoder_hidden_states": torch.randn(2, 5, 10), "sample": torch.randn(2, 4, 8, 8)}
    found = dg.survey(
        model,
        {"cross_attention[:]": ["linear_attention"], "feed_forward[0]": ["linear_mlp"]},
        [prompted],
        noise_scheduler=SCHEDULER,
        rounds=2,
        progress=False,
    )
    assert [one.edit.site.address for one in found.choices] == [
        "cross_attention[0]",
        "feed_forward[0]",
        "cross_attention[1]",
    ]
    assert all(one.harm > 0 for one in found.choices)


@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel", "ZImageTransformer2DModel"]
)
def test_other_families_are_surveyed_on_the_arguments_they_take(name):
    model = tiny(name)
    kinds = {site.kind for site in dg.find_sites(model)} & {"self_attention", "joint_attention"}
    candidates = {f"{kind}[0]": ["identity", "linear_attention"] for kind in kinds} | {"block[1]": ["remove"]}
    found = dg.survey(model, candidates, [inputs_of(name)], rounds=2, progress=False)
    assert len(found.choices) == 2 * len(kinds) + 1
    assert all(one.harm > 0 for one in found.choices)
    whole = count_flops(model, inputs_of(name))
    plan = found.plan(flops=(1 + found.front("flops")[-1][0]) / 2)
    model.set_graft(found.graft(model, plan))
    assert count_flops(model, inputs_of(name)) / whole == pytest.approx(found.predicted(plan)["flops"])


def test_parts_on_the_image_and_on_the_prompt_are_timed_separately(monkeypatch):
    name, worn = "FluxTransformer2DModel", []
    model = tiny(name)

    def tenth(contenders, *, rounds, around):
        for name in contenders:
            with around(name):
                worn.append(len(model.graft.plan.edits) if model.graft else 0)
        return [Timing(name, 1.0, 1.0 if name == "original" else 0.9, 0.9, 0.9) for name in contenders]

    monkeypatch.setattr("diffusers_graft.search.survey.compare", tenth)
    candidates = {"feed_forward[:]": ["linear_mlp"], "block[:]": ["remove"]}
    found = dg.survey(model, candidates, [inputs_of(name)], rounds=2, progress=False)
    assert worn == [0, 2, 2, 2, 2]
    assert [one.edit.site.path for one in found.choices if one.edit.site.index == 1] == [
        "transformer_blocks.0.ff_context",
        "transformer_blocks.1",
    ]
    assert [one.saved["latency"] for one in found.choices] == [
        pytest.approx(0.1 / 2)
    ] * 8  # by pairs: on images, on prompts, double, single


def test_a_candidate_that_cannot_run_is_named_with_its_site():
    name = "SD3Transformer2DModel"
    model = tiny(name)
    with pytest.raises(
        OperatorError,
        match=r"feed_forward\[1\] at transformer_blocks\.0\.ff_context: mix_ffn.* cannot run: .* 5 tokens",
    ):
        dg.survey(model, {"feed_forward[:]": ["linear_mlp", "mix_ffn"]}, [inputs_of(name)], rounds=2, progress=False)
    assert model.graft is None


def test_the_readmes_survey_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    example = next(block for block in blocks if "dg.survey(" in block)
    monkeypatch.chdir(tmp_path)
    scope = {"dg": dg, "testbed": testbed, "scheduler": scheduler, "batches": testbed.letter_batches(4, seed=0)}
    exec(example.replace("steps=100", "steps=1, warmup=0").replace("letter_batches(100", "letter_batches(4"), scope)
    assert scope["model"].graft.plan == scope["plan"] == Survey.load("survey.json").plan(flops=0.8)
