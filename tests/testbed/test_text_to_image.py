"""The text-to-image run of the examples at its smallest, one row and one seed; marked long."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "text_to_image.py"


@pytest.mark.long
def test_one_row_from_drawn_pairs_to_the_table_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, str(SCRIPT), "--brief", "--output", str(tmp_path), "--seeds", "0", "--rows"]
    rows = ["removed", "neighborhood, interleaved"]
    subprocess.run([*command, *rows], check=True)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["original", *rows]
    folder = tmp_path / "rows" / "neighborhood_interleaved-0"
    values = json.loads((folder / "values.json").read_text(encoding="utf-8"))
    assert {"seen.score", "held_out.score", "denoising_loss", "distance_to_original", "ratio_256_high"} <= set(values)
    assert (folder / "pictures.png").exists()
    before = (folder / "values.json").stat().st_mtime_ns
    again = subprocess.run([*command, *rows], check=True, capture_output=True, text=True)
    assert again.stdout == table
    assert (folder / "values.json").stat().st_mtime_ns == before


def test_the_rows_of_the_example_are_those_of_the_paper_and_ours():
    example = runpy.run_path(str(SCRIPT))
    assert example["UNTRAINED"] == ("original", "removed")
    assert sum(name.startswith("hyena_x, random start") for name in example["RULES"]) == 2
    assert any(name.endswith("all layers") for name in example["RULES"])
    with pytest.raises(SystemExit):
        example["main"](["--rows", "no such row"])
