"""The ablation: equal compute, rows that are kept, a report that says what it measured."""

import json

import pytest

import diffusers_graft as dg
from benchmarks import ablate as ab
from benchmarks.__main__ import main

TINY = ab.Ablation(steps=4, seeds=1, samples=20, sampling_steps=1, rounds=2, more=2, batch_size=4)


def test_the_ablation_at_tiny_size_and_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(
        ab, "_measure", lambda model, ablation: dict.fromkeys(ab.MEASURES, float(model.graft is not None))
    )
    lines = []
    report = ab.ablate(TINY, tmp_path, say=lines.append)
    assert lines == [report]
    assert (tmp_path / "ablation.md").read_text() == report
    assert not capfd.readouterr().err  # bars are for terminals
    head, *rows = map(json.loads, (tmp_path / "ablation.jsonl").read_text().splitlines())
    assert len(rows) == 13
    for start in ab.STARTS:
        assert start in report
    assert "At least as good in every seed" in report
    assert "What stage one buys" in report
    cut = "\n".join((tmp_path / "ablation.jsonl").read_text().splitlines()[:-1]) + "\n"
    (tmp_path / "ablation.jsonl").write_text(cut)
    ran = []
    real = ab._run
    monkeypatch.setattr(ab, "_run", lambda arm, *rest: (ran.append(arm), real(arm, *rest))[1])
    ab.ablate(TINY, tmp_path, progress=False)
    assert ran == [ab.Arm("hyena_x", "random", "both", 0, 2)]
    with pytest.raises(dg.GraftError, match="another ablation"):
        ab.ablate(ab.Ablation(), tmp_path)
    assert main(["ablate", "--output", str(tmp_path)]) == 2


def test_blocks_have_a_comparison_of_their_own(tmp_path, capfd):
    folder = tmp_path / "ablation"
    assert main(["ablate", "--operator", "parallel", "--sites", "block_pair[:]", "--output", str(folder)]) == 2
    assert "bench-depth compares blocks" in capfd.readouterr().err
    assert not folder.exists()


def test_a_closed_form_that_costs_more_than_an_arm_leaves_no_steps():
    seconds = {
        f"neighborhood: {name}": price
        for name, price in (("stage one", 1.0), ("stage two", 1.0), ("closed form", 9.0))
    }
    arm = ab.Arm("neighborhood", "warm + closed form", "both", 0)
    assert ab.steps_of(arm, ab.Ablation(steps=1), seconds) == (0, 0)


def test_the_papers_recipe_is_that_of_the_same_sites():
    ablation = ab.Ablation(operator="mlp", sites="feed_forward[:]")
    paper = list(ab._arms(ablation))[-1]
    _, graft = ab._start(paper, ablation)
    assert {seat.graft.name for seat in graft.seats.values()} == {paper.operator} == {"hyena_mlp"}
    assert ab.Ablation().papers_operator == "hyena_x"


def test_arms_cost_the_same():
    names = ("stage one", "stage two", "closed form")
    seconds = {
        f"{operator}: {name}": price
        for operator in ("neighborhood", "hyena_x")
        for name, price in zip(names, (0.25, 0.5, 2.0), strict=True)
    }
    ablation = ab.Ablation(steps=100)
    for start in ab.STARTS:
        for training in ab.TRAININGS[1:]:
            one, two = ab.steps_of(ab.Arm("neighborhood", start, training, 0), ablation, seconds)
            spent = 0.25 * one + 0.5 * two + (2.0 if "closed" in start else 0)
            assert spent == pytest.approx(50, abs=0.5)
    one, two = ab.steps_of(ab.Arm("hyena_x", "random", "both", 0, 10), ablation, seconds)
    assert 0.25 * one + 0.5 * two == pytest.approx(500, abs=0.5)
