"""Stored measurements of plans under a budget, and how they are continued."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import diffusers_graft as dg
from benchmarks.placement import gated, learn_placement
from benchmarks.planner import QUICK, Spending, bench_planner, describe_spending
from benchmarks.planner_report import SEARCHES, report_of
from benchmarks.rows import read_rows
from diffusers_graft.errors import (
    GraftError,
)
from diffusers_graft.evaluation.benchmark import with_graft
from diffusers_graft.evaluation.plots import draw_front
from diffusers_graft.testbed.sampling import scheduler

from ..models import batches, predict, same_tensors, tensors_of, tiny_dit

ROOT = Path(__file__).parents[2]


STORED = ROOT / "examples" / "benchmarks" / "planner"


def test_the_stored_report_is_what_its_rows_say(tmp_path):
    rows = read_rows(STORED / "planner.jsonl")
    assert report_of(rows, tmp_path) == (STORED / "planner.md").read_text(encoding="utf-8")
    assert (tmp_path / "planner.png").stat().st_size > 10_000


def test_rates_that_the_model_decides_are_numbers_in_the_report():
    assert "learning rate 0.00104, cosine" in describe_spending(Spending())


def test_the_picture_shows_every_search(tmp_path, monkeypatch):
    shown = []

    def note(figure, path, **settings):
        shown.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())

    monkeypatch.setattr(Figure, "savefig", note)
    designs = {name: [(0.5, 0.1)] for name in SEARCHES}
    draw_front(tmp_path / "planner.png", [[(0.5, 0.1)]], designs, measure="FLOPs")
    assert shown == ["predicted, best plans", *(f"measured, {name}" for name in SEARCHES)]


def test_a_report_compares_searches_by_seed_and_counts_a_plan_found_twice_once(tmp_path):
    head = {"facts": "Facts.", "spending": {"flops": [0.6]}, "latency": []}
    row = {"budget": 0.6, "edits": 2, "flops": 0.6, "before": 0.3, "predicted": 0.02, "searched": 5}
    rows = [head]
    for seed in (0, 1):
        rows.append({"seed": seed, "original": 0.2, "front": [[1.0, 0.0], [0.6, 0.01]]})
        for name, total, harm, after in (
            ("additive", 0.01, 0.02, 0.25),
            ("planned", 0.01, 0.02, 0.25),
            ("chance", 0.03, 0.06, 0.2),
        ):
            rows.append({**row, "seed": seed, "name": name, "sum": total, "harm": harm, "after": after + seed / 100})
    text = report_of(rows, tmp_path)
    assert "least harm: additive 2, planned 2; the least loss after stage two: chance 2." in text
    assert "sum of its parts', median and range: additive 2.00 (2.00 to 2.00)" in text
    assert "puts 4 of 4 pairs" in text
    assert "0.2050 +- 0.0071" in text


@pytest.mark.long
def test_an_interrupted_measurement_is_continued(tmp_path):
    spending = dataclasses.replace(QUICK, stage_one=1, stage_two=1, trials=1, judged=8)
    report = bench_planner(tmp_path, spending, say=[].append)
    assert all(name in report for name in (*SEARCHES, "60% of the FLOPs"))
    rows = (tmp_path / "planner.jsonl").read_text().splitlines()
    (tmp_path / "planner.jsonl").write_text("\n".join([*rows[:-1], rows[-1][:100]]))  # killed within a row
    assert bench_planner(tmp_path, spending, say=[].append) == report
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    with pytest.raises(GraftError, match="another spending"):
        bench_planner(tmp_path, Spending(stage_one=9), say=[].append)


def test_gates_choose_what_harms_least_within_the_budget():
    model = tiny_dit()
    before = tensors_of(model)
    candidates = {"feed_forward[:]": ["linear_mlp", "mlp(expansion=3)"]}
    found = dg.survey(model, candidates, batches(1), noise_scheduler=scheduler(), rounds=2, progress=False)
    plan = learn_placement(model, found, itertools.cycle(batches(2)), 0.93, 3, 0)
    assert found.predicted(plan)["flops"] <= 0.93
    assert same_tensors(model, before)
    assert model.graft is None
    assert not model._forward_pre_hooks
    with gated(model, found) as gates, torch.no_grad():
        for gate in gates:
            gate.logits[:] = torch.tensor([-50.0, -50.0, 50.0])
        mixed = predict(model)
    widest = {edit.site.address: edit.config for edit in (gate.edits[1] for gate in gates)}
    graft = found.graft(model, dg.plan_graft(model, widest))
    with with_graft(model, graft):
        assert torch.allclose(mixed, predict(model), atol=1e-6)
