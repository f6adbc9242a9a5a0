"""The table of half the depth."""

from pathlib import Path

import pytest

from benchmarks.depth import QUICK, RULES, RUNS, Budget, bench_depth, describe_recipe, steps_of
from benchmarks.depth_report import report_of
from benchmarks.rows import read_rows
from diffusers_graft.errors import GraftError
from diffusers_graft.testbed import quickstart
from diffusers_graft.training.finetune.config import FinetuneConfig

STORED = Path(__file__).parents[2] / "examples" / "benchmarks" / "depth"


def test_others_get_the_compute_of_the_pairs_in_steps_at_their_price():
    prices = {"pairs: stage one": 0.5, "pairs: stage two": 0.25, "removed: stage two": 0.1}
    budget = Budget(stage_one=100, stage_two=200)
    assert steps_of("both at once", "pairs", budget, prices) == 400
    assert steps_of("both at once", "removed", budget, prices) == 1000
    assert steps_of("stage two", "removed", budget, prices) == 200


def test_both_stages_are_the_quick_starts_and_a_model_from_scratch_has_no_teacher(monkeypatch):
    recipe = quickstart.Budget(finetune=FinetuneConfig(steps=7, lr=3e-5, denoising=0.5, distill_output=2.0))
    monkeypatch.setattr(quickstart, "Budget", lambda: recipe)
    found = Budget().finetune(50, seed=3)
    assert (found.steps, found.lr, found.denoising, found.distill_output, found.seed) == (50, 3e-5, 0.5, 2.0, 3)
    scratch = Budget().finetune(50, pretrained=False)
    assert (scratch.lr, scratch.denoising, scratch.distill_output) == (3e-5, 1.0, 0.0)
    assert Budget().distill(9).schedule == recipe.distill.schedule


def test_rates_that_the_model_decides_are_numbers_in_the_report():
    assert "learning rates 0.0005 and 0.00313 (Muon, cosine)" in describe_recipe(Budget())


def test_the_stored_report_is_what_its_rows_say(tmp_path):
    head, *rows = read_rows(STORED / "depth.jsonl")
    assert report_of(head, rows, RULES, tmp_path) == (STORED / "depth.md").read_text(encoding="utf-8")
    assert (tmp_path / "depth.png").stat().st_size > 10_000


@pytest.mark.long
def test_the_table_of_half_the_depth_goes_on_where_it_stopped(tmp_path):
    report = bench_depth(tmp_path, QUICK, say=[].append)
    assert all(name in report for run in RUNS for name in run.rows.values())
    rows = (tmp_path / "depth.jsonl").read_text().splitlines()
    (tmp_path / "depth.jsonl").write_text("\n".join(rows[:4]) + "\n")  # killed between the two stages of the pairs
    assert bench_depth(tmp_path, QUICK, say=[].append) == report
    with pytest.raises(GraftError, match="another budget"):
        bench_depth(tmp_path, Budget(seeds=1), say=[].append)
