"""The quick start; the paper's pattern on the testbed, marked long."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.operators import parse_operator
from diffusers_graft.testbed import quickstart as qs

ROOT = Path(__file__).parents[2]

TINY = qs.Budget(
    distill=dg.DistillConfig(steps=3, lr=1e-3),
    finetune=dg.FinetuneConfig(steps=2, lr=1e-4),
    samples=60,
    sampling_steps=2,
    batch_size=4,
)


def test_the_quick_start_at_tiny_size(tmp_path):
    lines = []
    run = qs.quickstart("neighborhood", "self_attention[1::2]", tmp_path, budget=TINY, say=lines.append)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "graft_config.json",
        "graft_model.safetensors",
        "README.md",
        "samples.png",
        "locality.png",
        "training.jsonl",
        "analysis.json",
        "benchmark.json",
        "report.html",
    }
    sections = re.findall('<section id="(.*?)"', (tmp_path / "report.html").read_text())
    assert sections == ["edits", "samples", "quality", "cost", "training", "analysis", "protocol"]
    report = "\n".join(lines)
    for words in (
        "random start",
        "after stage one",
        "after stage two",
        "original",
        "Frechet distance",
        "MFLOPs",
        "bit-equal",
    ):
        assert words in report
    card = (tmp_path / "README.md").read_text()
    assert "neighborhood(kernel=3, dilation=1)" in card
    assert f"{run.scores['original']['denoising_loss']:.4g}" in card
    assert json.loads((tmp_path / "graft_config.json").read_text())["plan"]["model_class"] == "DiTTransformer2DModel"


@pytest.mark.parametrize(
    ("rules", "stages"),
    [
        ({"block[1]": "remove"}, ["start", "after stage two"]),
        ({"self_attention[1]": "neighborhood"}, ["start", "distill", "after stage one", "after stage two"]),
    ],
)
def test_what_has_nothing_to_learn_goes_on_to_stage_two(rules, stages, monkeypatch):
    told, model = [], testbed.load()
    monkeypatch.setattr(qs.Run, "measure", lambda run, name: told.append(name))
    monkeypatch.setattr(qs.Run, "distill", lambda run, graft: told.append("distill"))
    monkeypatch.setattr(qs.Run, "finetune", lambda run: None)
    qs.Run(model, TINY).stages(dg.plan_graft(model, rules))
    assert told == stages
    assert model.graft is not None


@functools.cache
def stages(operator, sites, start="warm"):
    """Denoising losses of one graft on its way, with the quick start's budget: name of the stage to loss."""
    model = testbed.load()
    run = qs.Run(model, qs.Budget(samples=10, sampling_steps=1))
    plan = dg.plan_graft(model, {sites: parse_operator(operator)})
    run.measure("original")
    run.stages(plan if start == "warm" else qs.random_start(plan))
    return {name: scores["denoising_loss"] for name, scores in run.scores.items()}


HALF, ALL = "self_attention[50%]", "self_attention[:]"


@pytest.mark.long
class TestThePapersPattern:
    """Wide margins on the held-out denoising loss, as excess over the original's."""

    def excess(self, stage, *arguments):
        losses = stages(*arguments)
        return losses[stage] - losses["original"]

    def test_a_random_start_is_far_worse_than_stage_one(self):
        assert self.excess("start", "self_attention", HALF, "random") > 5 * self.excess(
            "after stage one", "self_attention", HALF, "random"
        )

    def test_stage_two_comes_closer(self):
        assert self.excess("after stage two", "hyena_x", HALF) < self.excess("after stage one", "hyena_x", HALF)

    def test_half_comes_close_to_the_original(self):
        losses = stages("neighborhood", HALF)
        assert losses["after stage two"] < 1.1 * losses["original"]

    def test_all_is_worse_than_half(self):
        assert self.excess("after stage two", "hyena_x", ALL) > 1.5 * self.excess("after stage two", "hyena_x", HALF)

    def test_a_self_graft_recovers(self):
        losses = stages("self_attention", HALF, "random")
        assert losses["after stage two"] < 1.1 * losses["original"]

    def test_a_warm_neighborhood_after_stage_one_alone_beats_a_random_hyena_after_both(self):
        one = stages("neighborhood", HALF)["after stage one"]
        assert one < stages("hyena_x", HALF, "random")["after stage two"]


def test_the_reload_check_can_fail(tmp_path):
    model = testbed.load()
    model.set_graft({"self_attention[0]": "neighborhood"})
    model.save_graft(tmp_path)
    qs._check_reload(model, tmp_path)
    with torch.no_grad():
        model.proj_out_1.bias.add_(1e-6)
    with pytest.raises(dg.GraftError, match="other outputs"):
        qs._check_reload(model, tmp_path)
