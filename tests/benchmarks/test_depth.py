"""The table of half the depth."""

import shutil
from pathlib import Path

import pytest

from benchmarks.depth import RUNS, Budget, bench_depth, steps_of
from diffusers_graft.errors import GraftError

STORED = Path(__file__).parents[2] / "examples" / "benchmarks" / "depth"


def test_others_get_the_compute_of_the_pairs_in_steps_at_their_price():
    prices = {"pairs: stage one": 0.5, "pairs: stage two": 0.25, "removed: stage two": 0.1}
    budget = Budget(stage_one=100, stage_two=200)
    assert steps_of("both at once", "pairs", budget, prices) == 400
    assert steps_of("both at once", "removed", budget, prices) == 1000
    assert steps_of("stage two", "removed", budget, prices) == 200


def test_the_stored_report_is_what_its_rows_say(tmp_path):
    shutil.copy(STORED / "depth.jsonl", tmp_path)
    assert bench_depth(tmp_path, say=[].append) == (STORED / "depth.md").read_text(encoding="utf-8")
    assert (tmp_path / "depth.png").stat().st_size > 10_000


@pytest.mark.long
def test_the_table_of_half_the_depth_goes_on_where_it_stopped(tmp_path):
    budget = Budget(stage_one=1, stage_two=1, batch_size=2, samples=30, sampling_steps=1, rounds=2, seeds=1)
    report = bench_depth(tmp_path, budget, say=[].append)
    assert all(name in report for run in RUNS for name in run.rows.values())
    rows = (tmp_path / "depth.jsonl").read_text().splitlines()
    (tmp_path / "depth.jsonl").write_text("\n".join(rows[:4]) + "\n")  # killed between the two stages of the pairs
    assert bench_depth(tmp_path, budget, say=[].append) == report
    with pytest.raises(GraftError, match="another budget"):
        bench_depth(tmp_path, Budget(seeds=1), say=[].append)
