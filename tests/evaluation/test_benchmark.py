"""Timing in turns, what grafts cost, and peak memory."""

from contextlib import contextmanager

import pytest
import torch

from diffusers_graft.errors import GraftError, StateError
from diffusers_graft.evaluation.benchmark import PeakMemory, benchmark, compare

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

    monkeypatch.setattr("diffusers_graft.evaluation.benchmark._now", lambda: clock[0])
    (row,) = compare({"a": run}, rounds=2, around=slowly)
    assert entered == ["a"] * 3
    assert row.seconds == 3


def test_ratios_are_those_of_one_round(monkeypatch):
    clock = [0.0]
    durations = {"a": iter((9, 1, 2, 4)), "b": iter((9, 2, 2, 12))}  # the first round warms up

    def make_run(name):
        def run():
            clock[0] += next(durations[name])

        return run

    monkeypatch.setattr("diffusers_graft.evaluation.benchmark._now", lambda: clock[0])
    _, row = compare({name: make_run(name) for name in durations}, rounds=3)
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
