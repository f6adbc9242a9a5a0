"""The table of mixers on a testbed: the same seconds for all, and the best one at equal latency."""

import itertools
import re
import shutil
from pathlib import Path

import pytest

import diffusers_graft as dg
from benchmarks import mixers
from benchmarks.__main__ import main
from benchmarks.ablate import group_runs, mean_ratio
from benchmarks.equal_seconds import Protocol, Trial
from benchmarks.subjects import Letters, Quality
from diffusers_graft import operators
from diffusers_graft.testbed import letter_batches

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = Protocol(quality=Quality(held_out=10, samples=10, steps=1), probe=1, rounds=2, unit=(1, 1), controls=False)


def test_the_table_names_the_best_at_equal_latency_and_goes_on(tmp_path, monkeypatch):
    losses = {"identity": 0.3, "hyena_x": 0.25, "self_attention": 0.2}

    def measure(self, model, quality):
        seats = [] if model.graft is None else list(model.graft.seats.values())
        return {"denoising_loss": 0.2 if not seats else losses[seats[0].graft.name] + 0.001 * len(seats)}

    def benchmark(model, rules, sizes, **settings):
        speeds = {"identity": 0.5, "hyena_x": 0.6, "self_attention": 1.0}
        for name in rules:
            ratio = speeds[name.split()[0]] + 0.1 * name.endswith("half")
            yield {"name": name, "tokens": 4096, "ratio": ratio, "low": ratio, "high": ratio}

    monkeypatch.setattr(Letters, "measure", measure)
    monkeypatch.setattr(Letters, "batches", lambda self, size, seed, steps=None: letter_batches(2, seed, steps=steps))
    monkeypatch.setattr(mixers, "benchmark", benchmark)
    settings = {"times": 1, "seeds": 1, "protocol": TINY}
    mixers.bench_mixers(["identity"], tmp_path, **settings)
    report = mixers.bench_mixers(["hyena_x", "self_attention"], tmp_path, **settings)
    assert report == (tmp_path / "mixers.md").read_text()
    order = [line.split("  ")[0] for line in report.split("```")[1].splitlines()[3:]]
    # By the loss: half is better than all, and what was run first is still there.
    assert order[0] == "self_attention in half"
    assert order[-2:] == ["identity in all", "original"]
    best = report[report.index("The best at equal latency") :]
    assert "from the fastest up: identity in all (0.50" in best
    # As slow as all of Hyena-X, and worse: not named.
    assert "identity in half" not in best
    assert "hyena_x in all (0.60 of the latency, 1.290 of the loss)" in best
    rows = (tmp_path / "mixers.jsonl").read_text()
    assert mixers.bench_mixers(["hyena_x"], tmp_path, **settings) == report
    assert (tmp_path / "mixers.jsonl").read_text() == rows


@pytest.mark.parametrize("stored", sorted(EXAMPLES.rglob("mixers.jsonl")), ids=str)
def test_stored_reports_are_what_their_rows_say(stored, tmp_path):
    shutil.copy(stored, tmp_path)
    assert mixers.report(tmp_path) == stored.with_suffix(".md").read_text(encoding="utf-8")


def test_every_mixer_of_images_is_in_the_table(capsys, tmp_path):
    known = {operators.parse_operator(name).owner.name for name in mixers.MIXERS}
    named = {name for name in operators.available() if "self_attention" in operators.get(name).kinds}
    assert named - known == {"radial"}
    assert list(mixers.TIMED_FROM_16) == list(mixers.TIMED)
    for spec in (*mixers.TIMED.values(), *mixers.TIMED_FROM_16.values()):
        operators.parse_operator(spec)
    assert main(["mixers", "--mixers", "hyena", "--output", str(tmp_path / "a")]) == 2
    assert "hyena_x" in capsys.readouterr().err
    with pytest.raises(dg.GraftError, match="seeds from 1"):
        mixers.bench_mixers(["hyena_x"], tmp_path / "a", seeds=0)
    assert not (tmp_path / "a").exists()


def test_choices_between_sources_are_two_settings_of_one_operator():
    assert set(mixers.TIMED) <= {*mixers.MIXERS, *itertools.chain(*mixers.CHOICES.values())}
    for here, elsewhere in mixers.CHOICES.values():
        first = operators.parse_operator(here)
        second = operators.parse_operator(elsewhere)
        assert first.owner is second.owner
        assert first != second


def test_the_guide_says_what_the_choices_gave():
    """In the order of the choices: the loss of what is the default, and of what is not, in half and in all."""
    trial = Trial.read(EXAMPLES / "benchmarks" / "choices" / "mixers.jsonl")
    groups = {name: mean_ratio(trial, rows) for (name, _), rows in group_runs(trial).items()}
    guide = (EXAMPLES.parent / "docs" / "guides" / "operators.md").read_text(encoding="utf-8")
    said = re.findall(r"\| (\d\.\d{3}, \d\.\d{3}) \|.*\| (\d\.\d{3}, \d\.\d{3}) \|", guide)
    measured = [
        tuple(", ".join(f"{groups[f'{mixer} in {share}']:.3f}" for share in ("half", "all")) for mixer in answers)
        for answers in mixers.CHOICES.values()
    ]
    assert said == measured
