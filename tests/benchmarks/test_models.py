"""The forward benchmark and its stored table."""

import pytest

from benchmarks import models
from benchmarks.__main__ import main
from diffusers_graft.errors import GraftError
from diffusers_graft.evaluation.benchmark import benchmark

from ..models import tiny_dit


def test_the_forward_benchmark_is_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "SHAPE", {**models.SHAPE, "attention_head_dim": 8, "num_layers": 1})
    path = tmp_path / "tables" / "forward.md"
    assert main(["models", "--operators", "identity", "--sizes", "4", "--rounds", "2", "--output", str(path)]) == 0
    assert capsys.readouterr().out.strip() in path.read_text()
    with pytest.raises(GraftError, match="hold no patch of 2 x 2"):
        benchmark(tiny_dit(), {}, [1], rounds=2, progress=False)
