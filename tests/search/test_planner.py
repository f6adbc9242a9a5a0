"""Plans under a budget: the knapsack against brute force, and what a survey measures against measuring it by hand."""

import itertools
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

import diffusers_graft as dg
from benchmarks.planner import Spending, bench_planner
from diffusers_graft import testbed
from diffusers_graft.core.sites import Site
from diffusers_graft.errors import (
    FileError,
    GraftError,
    MismatchError,
    OperatorError,
    RuleError,
    StateError,
    TrainingError,
    UnknownNameError,
)
from diffusers_graft.evaluation.benchmark import Timing
from diffusers_graft.evaluation.cost import count_flops, count_parameters
from diffusers_graft.planning.plan import Edit
from diffusers_graft.search.planner import MEASURES, Choice, Survey
from diffusers_graft.search.survey import Exam
from diffusers_graft.testbed.sampling import scheduler
from diffusers_graft.training.noised_batch import Noising

from ..inspection.models import inputs_of, tiny
from ..models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit, tiny_pixart

CANDIDATES = {
    "self_attention[:2]": ["neighborhood", "self_attention"],
    "feed_forward[1:]": ["linear_mlp", "mlp(expansion=2)"],
}
TAUGHT = dg.DistillConfig(steps=3, lr=1e-3, progress=False)


@pytest.fixture(scope="module")
def surveyed():
    model = tiny_dit()
    found = dg.survey(
        model,
        CANDIDATES,
        batches(2),
        batches=batches(3),
        config=TAUGHT,
        noise_scheduler=SCHEDULER,
        rounds=2,
        progress=False,
    )
    return model, found


def choice(block, operator, harm, saved):
    """In the feed-forward of a block, or in place of the block."""
    whole = "block" in operator
    kind, path = ("block", f"blocks.{block}") if whole else ("feed_forward", f"blocks.{block}.ff")
    sizes = {"blocks": 1, "streams": 1} if whole else {"hidden": 32, "activation": "gelu"}
    site = Site(kind=kind, index=block, path=path, width=8, **sizes)
    return Choice(Edit(site, dg.operators.get(operator).Config()), harm, dict(zip(MEASURES, saved, strict=True)))


@st.composite
def surveys(draw):
    shares = st.tuples(*[st.integers(-3, 12).map(lambda percent: percent / 100)] * len(MEASURES))
    harm = st.one_of(st.just(0.0), st.floats(0, 10))
    counts = draw(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=4))
    names = [
        (block, name) for block, (parts, _) in enumerate(counts) for name in ("linear_mlp", "mlp", "mix_ffn")[:parts]
    ]
    names += [(block, "linear_block") for block, (_, whole) in enumerate(counts) if whole]
    return Survey("Some", tuple(choice(block, name, draw(harm), draw(shares)) for block, name in names))


def designs_of(survey):
    """Every design there is, by trying all: one choice a site at most, and none within a block that is taken whole."""
    by_site = [list(own) for _, own in itertools.groupby(survey.choices, key=lambda one: one.edit.site)]
    for design in itertools.product(*([None, *own] for own in by_site)):
        taken = [one for one in design if one]
        paths = [one.edit.site.path for one in taken]
        if not any(inner.startswith(f"{outer}.") for inner in paths for outer in paths):
            yield taken


@given(surveys(), st.integers(50, 99).map(lambda percent: percent / 100), st.sampled_from(MEASURES))
def test_the_plan_is_the_best_there_is(survey, budget, measure):
    within = [
        sum(one.harm for one in design)
        for design in designs_of(survey)
        if sum(round(100 * one.saved[measure]) for one in design) >= round(100 * (1 - budget))
    ]
    if not within:
        with pytest.raises(GraftError, match="is the least") as refusal:
            survey.plan(**{measure: budget})
        least = float(re.search(r"choices (\S+) is", str(refusal.value))[1])
        assert budget < least <= 1
        if least < 1:
            survey.plan(**{measure: least})
        return
    plan = survey.plan(**{measure: budget})
    assert [choice.edit for choice in survey.choices if choice.edit in plan.edits] == list(plan.edits)
    assert plan.edits in [tuple(one.edit for one in design) for design in designs_of(survey)]
    told = survey.predicted(plan)
    assert told[measure] <= budget + 1e-9
    assert told["harm"] == pytest.approx(min(within))
    front = survey.front(measure)
    assert front[0][1] == 0
    assert front == sorted(front, reverse=True)
    assert [harm for _, harm in front] == sorted({harm for _, harm in front})
    assert min(harm for share, harm in front if share <= budget + 1e-9) == pytest.approx(min(within))


def test_blocks_are_taken_whole_or_left_to_their_parts():
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


def test_judging_keeps_no_graph_for_gradients():
    assert not any(answer.requires_grad for answer in Exam(tiny_dit(2), batches(1), SCHEDULER, 0).answers)


def test_stage_one_comes_before_the_judgement(surveyed):
    model, found = surveyed
    untaught = dg.survey(model, CANDIDATES, batches(2), noise_scheduler=SCHEDULER, rounds=2, progress=False)
    both = list(zip(found.choices, untaught.choices, strict=True))
    assert all(one.harm != other.harm for one, other in both if other.harm)
    assert sum(other.harm == 0 for _, other in both) == 2  # self-grafts have nothing to learn


def test_parts_come_as_they_were_judged(surveyed):
    model, found = surveyed
    plan = dg.plan_graft(model, {"self_attention[0]": "neighborhood", "feed_forward[2]": "mlp(expansion=2)"})
    graft = found.graft(model, plan)
    for edit in plan.edits:
        judged = next(one for one in found.grafts if edit in one.plan.edits)
        own, copied = judged.tensors_of(edit.site.path), graft.tensors_of(edit.site.path)
        assert len(own) == len(copied) > 0
        assert all(torch.equal(own[name], copied[name]) for name in own)
        assert all(own[name].data_ptr() != copied[name].data_ptr() for name in own)
    told = [[row["site"] for row in stage["sites"]] for stage in graft.history]
    assert told == [["self_attention[0]"], ["feed_forward[2]"]]
    model.set_graft(graft)
    assert not torch.equal(predict(model), predict(tiny_dit()))
    model.unset_graft()


def test_parts_go_with_the_weights_they_learned_from(surveyed):
    model, found = surveyed
    plan = dg.plan_graft(model, {"feed_forward[2]": "mlp(expansion=2)"})
    twin = tiny_dit()
    twin.set_graft(found.graft(twin, plan))
    other = tiny_dit()
    torch.nn.init.ones_(other.transformer_blocks[2].ff.net[2].bias)
    with pytest.raises(MismatchError, match=r"transformer_blocks\.2\.ff has other weights"):
        found.graft(other, plan)


def test_a_survey_is_kept_and_solved_again(surveyed, tmp_path):
    model, found = surveyed
    found.save(tmp_path / "survey.json")
    again = Survey.load(tmp_path / "survey.json")
    assert again == found
    plan = again.plan(parameters=0.95)
    assert plan.edits == found.plan(parameters=0.95).edits != ()
    plan.check(model)
    with pytest.raises(StateError, match="holds no parts"):
        again.graft(model, plan)


def test_a_save_that_fails_leaves_what_is_there(surveyed, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    surveyed[1].save(tmp_path / "survey.json")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        surveyed[1].save(tmp_path / "survey.json")
    monkeypatch.undo()
    with pytest.raises(FileError, match="cannot be written"):
        surveyed[1].save(tmp_path / "survey.json" / "inside a file")
    assert Survey.load(tmp_path / "survey.json") == surveyed[1]
    assert [path.name for path in tmp_path.iterdir()] == ["survey.json"]


@pytest.mark.parametrize(("bias", "said"), [(0.0, "nothing but zeros"), (torch.nan, "NaN"), (torch.inf, "infinity")])
def test_a_model_that_answers_nothing_cannot_be_judged(bias, said):
    model = tiny_dit(2)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.constant_(model.proj_out_2.bias, bias)
    with pytest.raises(TrainingError, match=said):
        dg.survey(model, {"self_attention[:]": ["identity"]}, batches(1), noise_scheduler=SCHEDULER)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "is no survey"),
        ("{}", "is no survey"),
        ("no json", "is not JSON"),
        (None, "There is no survey"),
        ('{"format": 1, "model_class": "A", "edits": []}', "KeyError"),
        ('{"format": 1, "model_class": "A", "edits": [], "scores": [1], "protocol": {}}', "longer"),
    ],
)
def test_a_file_that_is_no_survey(tmp_path, text, said):
    if text is not None:
        (tmp_path / "survey.json").write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=said):
        Survey.load(tmp_path / "survey.json")


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        (r'"harm": [\d.e-]+', '"harm": NaN'),
        (r'"flops": [\d.e-]+', '"flops": Infinity'),
        ('"linear_mlp"', '"of a newer version"'),
        ('"format": 1', '"format": 9'),
    ],
)
def test_a_survey_that_is_damaged(surveyed, tmp_path, there, instead):
    surveyed[1].save(tmp_path / "survey.json")
    text, count = re.subn(there, instead, (tmp_path / "survey.json").read_text(encoding="utf-8"))
    (tmp_path / "survey.json").write_text(text, encoding="utf-8")
    assert count
    with pytest.raises(FileError, match=r"survey\.json is no survey"):
        Survey.load(tmp_path / "survey.json")


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({}, "one budget"),
        ({"flops": 0.9, "latency": 0.9}, "one budget"),
        ({"flops": 0}, "between 0 and 1"),
        ({"flops": 1}, "between 0 and 1"),
        ({"flops": "half"}, "between 0 and 1"),
        ({"parameters": 0.01}, "is the least"),
    ],
)
def test_a_budget_that_is_none(surveyed, budget, said):
    with pytest.raises(GraftError, match=said):
        surveyed[1].plan(**budget)


def test_what_was_not_surveyed(surveyed):
    model, found = surveyed
    other = dg.plan_graft(model, {"self_attention[3]": "neighborhood"})
    with pytest.raises(GraftError, match=r"did not try self_attention\[3\]"):
        found.predicted(other)
    with pytest.raises(GraftError, match="did not try"):
        found.graft(model, other)
    with pytest.raises(UnknownNameError, match="latency"):
        found.front("time")


@pytest.mark.parametrize(
    ("candidates", "settings", "error", "said"),
    [
        ({}, {}, RuleError, "by rule key"),
        ({"self_attention[:]": "hyena_x"}, {}, RuleError, "list of operators"),
        ({"self_attention[:]": []}, {}, RuleError, "list of operators"),
        ({"block_pair[0]": ["parallel"]}, {}, RuleError, "several"),
        ({"block_run[0:2]": ["remove"]}, {}, RuleError, "several"),
        ({"self_attention[:]": ["nope"]}, {}, UnknownNameError, "nope"),
        ({"self_attention[:]": ["hyena_x", "hyena_x()"]}, {}, RuleError, r"self_attention\[0\] .* stands 2 times"),
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
        harms(expansion=1, output_dir=tmp_path, resume=True)
    assert harms(output_dir=tmp_path, resume=True) == harms()


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
def test_other_families_are_surveyed_on_their_own_arguments(name):
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


def test_parts_on_the_image_and_on_the_prompt_are_timed_apart(monkeypatch):
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


def test_a_candidate_that_cannot_run_is_told_with_its_site():
    name = "SD3Transformer2DModel"
    model = tiny(name)
    with pytest.raises(
        OperatorError,
        match=r"feed_forward\[1\] at transformer_blocks\.0\.ff_context: mix_ffn.* cannot run: .* 5 tokens",
    ):
        dg.survey(model, {"feed_forward[:]": ["linear_mlp", "mix_ffn"]}, [inputs_of(name)], rounds=2, progress=False)
    assert model.graft is None


ROOT = Path(__file__).parents[2]
STORED = ROOT / "examples" / "benchmarks" / "planner"


def test_the_readmes_survey_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    example = next(block for block in blocks if "dg.survey(" in block)
    monkeypatch.chdir(tmp_path)
    scope = {"dg": dg, "testbed": testbed, "scheduler": scheduler, "batches": testbed.letter_batches(4, seed=0)}
    exec(example.replace("steps=100", "steps=1, warmup=0").replace("letter_batches(100", "letter_batches(4"), scope)
    assert scope["model"].graft.plan == scope["plan"] == Survey.load("survey.json").plan(flops=0.8)


def test_the_stored_report_is_what_its_rows_say(tmp_path):
    shutil.copy(STORED / "planner.jsonl", tmp_path)
    assert bench_planner(tmp_path, say=[].append) == (STORED / "planner.md").read_text(encoding="utf-8")
    assert (tmp_path / "planner.png").stat().st_size > 10_000


@pytest.mark.long
def test_the_bench_goes_on_where_it_stopped(tmp_path):
    spending = Spending(flops=(0.8,), stage_one=1, stage_two=1, batch_size=2, seeds=2, judged=1, samples=20, rounds=2)
    report = bench_planner(tmp_path, spending, say=[].append)
    assert all(name in report for name in ("planned", "linear_mlp()", "chance", "80% of the FLOPs"))
    head, first, second = (tmp_path / "planner.jsonl").read_text().splitlines()
    (tmp_path / "planner.jsonl").write_text(f"{head}\n{first}\n{second[:100]}")  # killed within a row
    bench_planner(tmp_path, spending, say=[].append)
    assert (tmp_path / "planner.jsonl").read_text().splitlines()[1] == first
    assert len((tmp_path / "planner.jsonl").read_text().splitlines()) == 3
    with pytest.raises(GraftError, match="another spending"):
        bench_planner(tmp_path, Spending(seeds=1), say=[].append)
