"""The noise of the benchmark, against its stored table."""

from pathlib import Path

import pytest

from benchmarks import noise
from diffusers_graft.errors import FileError
from diffusers_graft.evaluation.costs import Benchmark, find_break_even

STORED = Path(__file__).parents[2] / "examples" / "benchmarks" / "forward-cpu.md"


def test_the_stored_table_agrees_with_itself_and_not_with_another(monkeypatch, tmp_path):
    rows = noise.read_table(STORED)
    assert len(rows) == 16
    assert rows[-1] == {"tokens": 4096, "name": "hyena_x", "ratio": 0.44, "low": 0.42, "high": 0.50}
    measured = [{"backend": "native", "milliseconds": 5.0, **row} for row in rows]
    again = {"tokens": 64, "name": noise.ITSELF, "backend": "native", "milliseconds": 5.0}
    measured.append({**again, "ratio": 1.02, "low": 0.9, "high": 1.1})
    slower = [{**row, "ratio": 1.2, "low": 1.1, "high": 1.3} for row in measured[:-1]]
    texts = []
    for found in (measured, [*slower, {**measured[-1], "ratio": 1.04}]):
        value = Benchmark(found, break_even=find_break_even(found))
        monkeypatch.setattr(noise, "benchmark", lambda *_, value=value, **__: value)
        noise.bench_noise(tmp_path / "noise.md", STORED, sizes=[16], rounds=2, say=texts.append)
    assert "Within 1.00 +- 0.03 at every size: yes (the farthest is 0.020 away)" in texts[0]
    assert "at every size: no" in texts[1]
    assert texts[0].count("yes") == 5
    assert texts[1].count("above 4096") == 8
    assert "yes" not in texts[1]
    assert texts[1] in (tmp_path / "noise.md").read_text()


def test_a_file_without_such_a_table_is_refused(tmp_path):
    (tmp_path / "other.md").write_text("64 original 4 0.94 16.0 1.00")
    with pytest.raises(FileError, match="no rows of `make bench`"):
        noise.read_table(tmp_path / "other.md")
