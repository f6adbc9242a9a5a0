"""Stored measurements of plans under a budget, and how they are continued."""

import shutil
from pathlib import Path

import pytest

from benchmarks.planner import Spending, bench_planner
from diffusers_graft.errors import (
    GraftError,
)

ROOT = Path(__file__).parents[2]


STORED = ROOT / "examples" / "benchmarks" / "planner"


def test_the_stored_report_is_what_its_rows_say(tmp_path):
    shutil.copy(STORED / "planner.jsonl", tmp_path)
    assert bench_planner(tmp_path, say=[].append) == (STORED / "planner.md").read_text(encoding="utf-8")
    assert (tmp_path / "planner.png").stat().st_size > 10_000


@pytest.mark.long
def test_an_interrupted_measurement_is_continued(tmp_path):
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
