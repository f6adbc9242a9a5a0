"""The table of which half of the self-attentions to replace."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.ordering import CONTROL, SELECTIONS, Budget, bench_ordering, report_of
from benchmarks.rows import read_rows
from diffusers_graft.errors import GraftError

STORED = Path(__file__).parents[2] / "examples" / "benchmarks" / "ordering"


def test_the_stored_report_is_what_its_rows_say(tmp_path):
    rows = read_rows(STORED / "ordering.jsonl")
    budget = Budget(**rows[0]["budget"])
    assert report_of(budget, rows) == (STORED / "ordering.md").read_text(encoding="utf-8")
    shutil.copy(STORED / "ordering.jsonl", tmp_path)
    with pytest.raises(GraftError, match="another budget"):
        bench_ordering(tmp_path, Budget(seeds=1), say=[].append)


def rows_of(losses):
    """Rows of one seed, with these losses after stage two."""
    scores = {"denoising_loss": 0.2, "frechet_distance": 1.0, "accuracy": 1.0}
    rows = [{"torch": "2", "original": scores}]
    for name, loss in zip((*SELECTIONS, CONTROL), losses, strict=True):
        after = {**scores, "denoising_loss": loss, "frechet_distance": -loss}
        row = {"seed": 0, "selection": name, "sites": [0, 1], "locality": [0.5, 0.7], "before": after, "after": after}
        rows.append(row)
    return rows


def test_the_report_says_whether_the_papers_order_was_found():
    found = report_of(Budget(), rows_of([0.21, 0.22, 0.23, 0.24, 0.20]))
    assert "By denoising loss the paper's order" in found
    assert "is found in 1 of 1 seeds" in found
    assert "seed 0: deep < low-local < top-local < interleaved" in found  # by distance, all the other way
    assert "is found in 0 of 1 seeds" in found
    other = report_of(Budget(), rows_of([0.21, 0.23, 0.22, 0.24, 0.20]))
    assert "interleaved < top-local in 1, top-local < low-local in 0, low-local < deep in 1" in other


@pytest.mark.long
def test_the_table_goes_on_where_it_stopped(tmp_path):
    budget = Budget(
        stage_one=1, stage_two=1, batch_size=2, analysed=2, held_out=10, samples=26, sampling_steps=1, seeds=1
    )
    report = bench_ordering(tmp_path, budget, say=[].append)
    lines = (tmp_path / "ordering.jsonl").read_text().splitlines()
    assert [json.loads(line)["selection"] for line in lines[1:]] == [*SELECTIONS, CONTROL]
    (tmp_path / "ordering.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert bench_ordering(tmp_path, budget, say=[].append) == report
