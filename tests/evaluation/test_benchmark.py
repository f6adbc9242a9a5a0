"""Timing in turns, what grafts cost, and peak memory."""

import json
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from diffusers_graft.errors import FileError, GraftError, StateError, UnknownNameError
from diffusers_graft.evaluation.attention_backends import find_fastest, using_backend
from diffusers_graft.evaluation.benchmark import PeakMemory, benchmark, compare
from diffusers_graft.evaluation.costs import Benchmark, find_break_even
from diffusers_graft.inspection import example_inputs

from ..data.pipelines import pixart_pipeline
from ..inspection.models import inputs_of, tiny
from ..models import predict, tiny_dit


def test_compare_takes_turns_and_gives_ratios():
    calls = []
    rows = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4)
    assert "".join(calls) == "ab" * 5
    assert [row.name for row in rows] == ["a", "b"]
    assert rows[0].ratio == rows[0].low == rows[0].high == 1
    assert rows[1].low <= rows[1].ratio <= rows[1].high


def test_time_around_a_run_does_not_count(monkeypatch):
    """By a clock that stands still but where it is moved."""
    clock = [0.0]
    entered = []

    @contextmanager
    def slowly(name):
        entered.append(name)
        clock[0] += 100
        yield
        clock[0] += 100

    def run():
        clock[0] += 3

    monkeypatch.setattr("diffusers_graft.evaluation.timing.now", lambda: clock[0])
    (row,) = compare({"a": run}, rounds=2, around=slowly)
    assert entered == ["a"] * 3
    assert row.seconds == 3


def test_ratios_are_those_of_one_round_on_the_clock_that_is_given():
    clock = [0.0]
    durations = {"a": iter((9, 1, 2, 4)), "b": iter((9, 2, 2, 12))}  # the first round warms up

    def make_run(name):
        def run():
            clock[0] += next(durations[name])

        return run

    _, row = compare({name: make_run(name) for name in durations}, rounds=3, clock=lambda: clock[0])
    assert (row.seconds, row.ratio, row.low, row.high) == (2, 2, 1.5, 2.5)


def test_latency_of_grafts_leaves_the_model_alone():
    model = tiny_dit()
    before = predict(model)
    rows = benchmark(model, {"hyena_x": {"self_attention[:]": "hyena_x"}}, [8, 16], rounds=3, progress=False)
    assert [(row["tokens"], row["name"]) for row in rows] == [
        (16, "original"),
        (16, "hyena_x"),
        (64, "original"),
        (64, "hyena_x"),
    ]
    assert model.graft is None
    assert torch.equal(predict(model), before)


def test_depth_operations_and_time_are_measured_separately():
    model = tiny_dit()
    rows = benchmark(
        model,
        {"pairs": "block_pair[:]=parallel(merge='sum')", "removed": "block[1::2]=remove"},
        [8],
        rounds=2,
        progress=False,
    )
    original, pairs, removed = rows
    assert [row["depth"] for row in rows] == [4, 2, 2]
    assert pairs["flops"] == original["flops"] > removed["flops"]
    assert pairs["parameters"] == original["parameters"] > removed["parameters"]
    assert all(row["milliseconds"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "rounds", "words"),
    [("original", 2, "Give these rules another name"), ("grafted", 1, "2 rounds or more; got 1")],
)
def test_benchmarks_that_would_say_nothing_are_refused(name, rounds, words):
    with pytest.raises(GraftError, match=words):
        benchmark(tiny_dit(), {name: "self_attention[0]=hyena_x"}, [8], rounds=rounds, progress=False)


def test_peak_memory_counts_what_is_alive():
    with PeakMemory() as memory:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(500)
        kept.add_(1)
    assert memory.peak == 4 * 1500


def test_a_benchmark_starts_from_the_original():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    with pytest.raises(StateError, match="unset_graft"):
        benchmark(model, {}, [8], rounds=2, progress=False)


def test_noise_modes_and_batches_have_rows_of_their_own(monkeypatch, tmp_path):
    # What torch compiles is tested with the operators, and takes its time.
    model = tiny_dit(num_layers=1)
    monkeypatch.setattr(torch, "compile", lambda compiled: partial(compiled))
    found = benchmark(
        model,
        {"itself": None, "identity": "self_attention[:]=identity"},
        [4],
        batch_sizes=(1, 3),
        compiled=(False, True),
        rounds=2,
        progress=False,
    )
    assert [(row["batch_size"], row["compiled"]) for row in found[::3]] == [
        (1, False),
        (1, True),
        (3, False),
        (3, True),
    ]
    original, itself, identity = found[6:9]
    assert (itself["flops"], itself["peak_memory"]) == (original["flops"], original["peak_memory"])
    assert identity["flops"] < original["flops"]
    assert original["throughput"] == pytest.approx(3000 / original["milliseconds"])
    assert original["milliseconds_low"] <= original["milliseconds"] <= original["milliseconds_high"]
    # A list, as cards and JSON take it, that knows more.
    assert json.loads(json.dumps(found)) == found
    assert found.protocol["attention_backends"]["4 tokens x 3"]["native"].endswith("ms")
    found.save(tmp_path / "benchmark.json")
    loaded = Benchmark.load(tmp_path / "benchmark.json")
    assert loaded == found
    assert str(loaded) == str(found)
    assert "<table>" in found._repr_html_()
    (tmp_path / "benchmark.json").write_text('{"rows": []}')
    with pytest.raises(FileError, match="not a benchmark"):
        Benchmark.load(tmp_path / "benchmark.json")


def row(tokens, ratio, low, high, name="graft"):
    return {"tokens": tokens, "name": name, "ratio": ratio, "low": low, "high": high}


def test_break_even_lies_where_the_ratio_crosses_one():
    """Halfway between the sizes on a logarithmic axis, where the ratio is as far above 1 as below."""
    rows = [row(64, 0.9, 0.8, 1.2), row(256, 1.1, 0.9, 1.3), row(1024, 0.9, 0.8, 1.1), row(4096, 0.5, 0.4, 0.6)]
    rows += [row(64, 1, 1, 1, "original")]
    (found,) = find_break_even(rows, native_tokens=300)
    assert found.tokens == pytest.approx(512)
    assert found.low == 64
    assert 1024 < found.high < 4096
    assert "breaks even at 512 tokens" in str(found)
    assert found.warning == "graft costs time at the model's native size, 300 tokens."
    assert find_break_even(rows, native_tokens=600)[0].warning is None
    (never,) = find_break_even([row(64, 1.2, 1.1, 1.3), row(256, 1, 0.9, 1.1)], native_tokens=64)
    assert never.tokens is None
    assert "slower up to 256" in str(never)
    assert never.warning
    (always,) = find_break_even([row(64, 0.8, 0.7, 0.9)], native_tokens=16)
    assert always.at_most
    assert "faster at every size" in str(always)
    assert always.warning is None


def test_the_fastest_backend_that_works_is_the_baseline(monkeypatch):
    """By a clock that runs slowly for all but one of them, and a backend whose answer is another."""
    model = tiny("FluxTransformer2DModel")
    inputs = inputs_of("FluxTransformer2DModel")
    processors = {module.processor for module in model.modules() if hasattr(module, "processor")}
    active = _AttentionBackendRegistry._active_backend
    clock = [0.0]
    used = []

    @contextmanager
    def counted(model, name):
        with using_backend(model, name):
            used.append(name)
            clock[0] += 100
            yield
            clock[0] += 100

    def slow(module, args, output):
        clock[0] += 1 if used[-1] == "_native_math" else 2

    model.register_forward_hook(slow)
    monkeypatch.setattr("diffusers_graft.evaluation.timing.now", lambda: clock[0])
    monkeypatch.setattr("diffusers_graft.evaluation.attention_backends.using_backend", counted)
    with torch.no_grad():
        name, outcomes = find_fastest(model, inputs, ["_native_flash", "_native_math", "sage"])
    assert name == "_native_math"
    assert "not usable" in outcomes["sage"]
    assert outcomes["_native_math"] == "1e+03 ms"
    assert all(processor._attention_backend is None for processor in processors)
    assert _AttentionBackendRegistry._active_backend is active


def test_a_backend_that_computes_something_else_is_no_baseline(monkeypatch):
    model = tiny_dit(num_layers=1)
    chosen = []

    @contextmanager
    def doubled(model, name):
        chosen.append(name)
        handle = model.pos_embed.register_forward_hook(lambda m, a, out: out * (1 + (chosen[-1] == "_native_math")))
        yield
        handle.remove()

    monkeypatch.setattr("diffusers_graft.evaluation.attention_backends.using_backend", doubled)
    with torch.no_grad():
        name, outcomes = find_fastest(model, example_inputs(model), ["_native_math", "xformers"])
    assert name == "native"
    assert "differs from torch's own attention" in outcomes["_native_math"]
    # No processor of this model knows diffusers' setting.
    assert "xformers" not in outcomes


def test_a_pipeline_is_timed_part_by_part():
    pipeline = pixart_pipeline()
    arguments = {
        "prompt": ["a"],
        "num_inference_steps": 2,
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
    }
    model = pipeline.transformer
    found = benchmark(
        model,
        {"identity": "self_attention[:]=identity"},
        [8],
        rounds=2,
        pipeline=pipeline,
        pipeline_arguments=arguments,
        progress=False,
    )
    assert [part["name"] for part in found.pipeline] == ["original", "identity"]
    for part in found.pipeline:
        assert part["transformer"] > 0
        assert part["autoencoder"] > 0
        assert part["scheduler_and_rest"] > 0
        assert part["text_encoder"] == 0  # the prompt was encoded before
    assert "Pipeline, identity" in str(found)
    assert "decode" not in vars(pipeline.vae)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_shape_without_weights_is_measured(tmp_path):
    model = tiny_dit(num_layers=1)
    model.save_config(tmp_path)
    found = benchmark(
        tmp_path, {"hyena_x": "self_attention[0]=hyena_x"}, [8], rounds=2, dtype=torch.bfloat16, progress=False
    )
    assert found[0]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found.protocol["dtype"] == "torch.bfloat16"
    (tmp_path / "config.json").write_text('{"_class_name": "Path"}')
    with pytest.raises(FileError, match="describes no model of diffusers"):
        benchmark(tmp_path / "config.json", {}, [8], progress=False)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"sizes": []}, GraftError, "sizes as a list of int"),
        ({"sizes": [8.0]}, GraftError, "sizes as a list of int"),
        ({"batch_sizes": (0,)}, GraftError, "1 sample or more"),
        ({"compiled": (1,)}, GraftError, "modes as a list of bool"),
        ({"backends": ("flash5",)}, UnknownNameError, "attention backend"),
        ({"sizes": [8, 1]}, GraftError, "hold no patch"),
        ({"pipeline": "pixart"}, GraftError, "is a DiffusionPipeline"),
        ({"model": torch.nn.Linear(1, 1)}, GraftError, "diffusers model"),
        ({"model": "nowhere"}, FileError, "no nowhere"),
    ],
)
def test_benchmarks_of_nothing_are_refused_before_anything_runs(settings, error, words, monkeypatch):
    monkeypatch.setattr("diffusers_graft.evaluation.benchmark.find_fastest", lambda *_: pytest.fail("it ran"))
    with pytest.raises(error, match=words):
        benchmark(**{"model": tiny_dit(num_layers=1), "rules": {}, "sizes": [8], "progress": False, **settings})


def test_a_pipeline_runs_the_model_that_is_measured():
    pipeline = pixart_pipeline()
    with pytest.raises(GraftError, match="another model object"):
        benchmark(tiny_dit(num_layers=1), {}, [8], pipeline=pipeline, progress=False)
    with pytest.raises(GraftError, match="arguments of its call"):
        benchmark(pipeline.transformer, {}, [8], pipeline=pipeline, progress=False)
