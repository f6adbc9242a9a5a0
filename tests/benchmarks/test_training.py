"""The benchmark of stage one, and the bounds it is held to."""

import pytest

from benchmarks import training as bench
from benchmarks.__main__ import main

from ..models import tiny_dit


def test_memory_of_stage_one_stays_below_one_sites_activations():
    model = tiny_dit(num_layers=6, num_attention_heads=4, attention_head_dim=16)
    for rules in bench.CASES.values():
        inputs = bench.example_inputs(model, batch_size=16)
        graft = bench.build_graft(model, bench.plan_graft(model, rules))
        calls = bench._calls(model, graft, inputs)
        bench._stage_one(model, graft, inputs, 1)
        measured, allowed = bench.memory(model, graft, inputs, calls)
        assert measured <= allowed, rules


def test_the_tables_have_what_they_promise():
    text = bench.cost_table(tiny_dit(), {"all": "self_attention[:]=hyena_x"}, rounds=2, steps=1)
    for words in ("bound, ms", "ratio", "quartiles", "one site, MB"):
        assert words in text
    assert bench.reuse_table(2).count("\n") == 5


@pytest.mark.parametrize("verb", ["models", "operators", "training", "loading"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(verb, tmp_path, capsys):
    assert main([verb, "--output", str(tmp_path)]) == 2
    assert "Give another --output" in capsys.readouterr().err


@pytest.mark.long
def test_stage_one_costs_at_most_a_tenth_more_than_its_bound():
    """The lower quartile, since other work on the machine only ever adds time."""
    model = bench.DiTTransformer2DModel(**bench.SHAPE).eval()
    text = bench.cost_table(model, bench.CASES, rounds=9)
    lows = [float(line.split(" to ")[0].split()[-1]) for line in text.splitlines()[2:]]
    assert max(lows) <= 1.10, text
