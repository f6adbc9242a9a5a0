"""Recipes at equal seconds on the testbed, and the control of each: `python -m benchmarks ablate`.

A recipe is an entry of `benchmarks/recipes_tried.py`. Its measure is the denoising loss on held-out samples, as a
ratio to the original's on the same draw; beside it stands the original itself, given the same stage two.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_graft.cli.verbs import say
from diffusers_graft.errors import GraftError

from .equal_seconds import Arm, Protocol, Trial, settings_of
from .output import format_rows, format_spread
from .recipes_tried import ALL, HALF, LEAST_HARM, PAPER, Recipe, choose_recipes
from .subjects import LETTERS, load_subject

# (what is replaced, its keys, multiple of today's seconds, most that the ratio to the original may be)
TARGETS = (
    ("Half of the attention", (HALF, LEAST_HARM), 1, 1.05),
    ("Half of the attention", (HALF, LEAST_HARM), 2, 1.02),
    ("All attention", (ALL,), 4, 1.05),
)
# Parts of the paper's seconds within which its recipe is to be matched.
PARTS = (10, 30)


def ablate(
    recipes: Sequence[Recipe],
    output: Path,
    *,
    seeds: int = 3,
    times: Sequence[float] | None = None,
    model: str = LETTERS,
    protocol: Protocol | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: bool = True,
) -> str:
    """Run what has not been run yet, and return the report; `output` gets `recipes.jsonl` and `recipes.md`.

    Raises `GraftError` for no seeds or seconds, and where the rows there are of something else.
    """
    arms = list_arms(recipes, seeds, times)
    trial = Trial(load_subject(model), output / "recipes.jsonl", protocol)
    trial.run(arms, say=say, progress=progress)
    return report(output, say=say)


def report(output: Path, *, say: Callable[[str], None] = lambda text: None) -> str:
    """Write the report on the rows there are, and return it. Raises `FileError` where there are none."""
    text = write_report(Trial.read(output / "recipes.jsonl"))
    (output / "recipes.md").write_text(text, encoding="utf-8")
    say(text)
    return text


def list_arms(recipes: Iterable[Recipe], seeds: int, times: Sequence[float] | None = None) -> list[Arm]:
    """Return all runs, seed by seed, so that an interrupted table is a complete one of fewer seeds.

    Raises `GraftError` for no seeds or seconds.
    """
    if type(seeds) is not int or seeds < 1:
        raise GraftError(f"An ablation counts its seeds from 1; got {seeds}.")
    if times is not None and not all(count > 0 for count in times):
        raise GraftError(f"Times are multiples of today's seconds, above zero; got {list(times)}.")
    recipes = list(recipes)
    return [
        Arm(recipe=recipe, times=count, seed=seed)
        for seed in range(seeds)
        for recipe in recipes
        for count in times or recipe.times
    ]


def write_report(trial: Trial) -> str:
    """Return the report on the rows there are."""
    original = trial.head["original"]
    measures = [name for name in original if name != "denoising_loss"]
    heading = ["recipe", "times", "steps", "ratio", "control", "loss", *(name.replace("_", " ") for name in measures)]
    groups = group_runs(trial)
    entries = []
    for (name, times), rows in sorted(groups.items(), key=lambda item: (item[0][1], mean_ratio(trial, item[1]))):
        losses = [row["scores"]["denoising_loss"] for row in rows]
        others = [format_spread([row["scores"][measure] for row in rows], 3) for measure in measures]
        steps = " + ".join(map(str, rows[0]["steps"]))
        ratio = format_spread(ratios_of(trial, rows), 3)
        entries.append([name, f"{times:.2g}", steps, ratio, _control(trial, rows), format_spread(losses, 4), *others])
    first = ["original", "", "", "1", "", f"{original['denoising_loss']:.4f}"]
    entries.append([*first, *(f"{original[name]:.3f}" for name in measures)])
    words = {name: describe(rows[0]["settings"]) for (name, _), rows in groups.items()}
    seeds = len({row["seed"] for row in trial.rows})
    return (
        f"# Recipes at equal seconds\n\n{_facts(trial)}\n\n```\n{format_rows([heading, *entries])}\n```\n\n"
        f"Mean +- standard deviation over up to {seeds} seeds. {verdict(trial, groups)}\n\n"
        "What differs from today's recipe:\n\n"
        + "".join(f"- {name}: {settings}\n" for name, settings in words.items())
    )


def group_runs(trial: Trial) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Return the rows of runs by recipe and seconds."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in trial.rows:
        if "recipe" in row:
            groups.setdefault((row["recipe"], row["times"]), []).append(row)
    return groups


def ratios_of(trial: Trial, rows: Iterable[dict[str, Any]]) -> list[float]:
    """Return denoising losses over the original's on the same draw."""
    original = trial.head["original"]["denoising_loss"]
    return [row["scores"]["denoising_loss"] / original for row in rows]


def mean_ratio(trial: Trial, rows: Iterable[dict[str, Any]]) -> float:
    """Return the mean over seeds of the ratio to the original's loss."""
    return statistics.mean(ratios_of(trial, rows))


def _control(trial: Trial, rows: Sequence[dict[str, Any]]) -> str:
    """Return the ratio of the original after the same stage two."""
    controls = [trial.find(row["control"]) for row in rows if row["control"] is not None]
    found = [row for row in controls if row is not None]
    return format_spread(ratios_of(trial, found), 3) if found else "-"


def _facts(trial: Trial) -> str:
    quality = trial.head["quality"]
    steps = trial.head["unit"]
    return (
        f"`python -m benchmarks ablate`: {trial.subject.name}. `times` are multiples of the seconds that today's "
        f"{steps[0]} + {steps[1]} steps cost, {trial.unit_seconds:.0f} s of one core here; steps are of stage one and "
        "stage two by turns, as many as the seconds buy at prices measured in turns. The ratio is that of the "
        f"denoising loss on {quality['held_out']} held-out samples to the original's on the same draw; the control is "
        f"the original after the same stage two. Pictures are {quality['samples']} of {quality['steps']} steps "
        f"(torch {trial.head['torch']})."
    )


def verdict(trial: Trial, groups: dict[tuple[str, float], list[dict[str, Any]]]) -> str:
    """Return in words which targets are met, and at what share of its seconds the paper's recipe is matched."""
    sentences = []
    for words, keys, times, bound in TARGETS:
        candidates = {
            key: rows
            for key, rows in groups.items()
            if key[1] <= times and rows[0]["settings"].get("sites", HALF) in keys and _replaces_softmax(rows[0])
        }
        if candidates:
            best = min(candidates, key=lambda key: mean_ratio(trial, candidates[key]))
            ratio = mean_ratio(trial, candidates[best])
            outcome = "met" if ratio <= bound else "not met"
            sentences.append(
                f"{words} within {times} times today's seconds: {best[0]} ends at {ratio:.3f} of the original's loss, "
                f"seeds: {len(candidates[best])} (wanted: {bound}, {outcome})."
            )
    sentences += _against_paper(trial, groups)
    return " ".join(sentences)


def _replaces_softmax(row: dict[str, Any]) -> bool:
    """Return whether no head of the chosen sites keeps its softmax, as in a hybrid."""
    return not row["settings"].get("operator", "").startswith(("hybrid", "self_attention"))


def _against_paper(trial: Trial, groups: dict[tuple[str, float], list[dict[str, Any]]]) -> list[str]:
    """Return in words how the best recipes at a tenth and at a thirtieth of its seconds stand beside the paper's."""
    sentences = []
    papers = {times: rows for (name, times), rows in groups.items() if name == PAPER.name}
    for times, paper in papers.items():
        sentences.append(f"The paper's recipe at {times:.2g} ends at {mean_ratio(trial, paper):.3f}.")
        for parts in PARTS:
            # Times are rounded in rows.
            most = times / parts + 1e-4
            others = {key: rows for key, rows in groups.items() if key[0] != PAPER.name and key[1] <= most}
            if others:
                best = min(others, key=lambda key: mean_ratio(trial, others[key]))
                ratios = ratios_of(trial, others[best])
                is_matched = max(ratios) <= min(ratios_of(trial, paper))
                sentences.append(
                    f"Within a {parts}th of those seconds {best[0]} ends at {statistics.mean(ratios):.3f}, "
                    f"{'at least as good in every seed' if is_matched else 'not as good in every seed'}."
                )
    return sentences


def describe(settings: Mapping[str, Any]) -> str:
    """Return what differs from today's recipe, as `settings_of` gives it, in one line."""
    parts = [f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if name not in ("one", "two")]
    for stage in ("one", "two"):
        words = ", ".join(f"{name} {value}" for name, value in settings[stage].items())
        if words:
            parts.append(f"stage {stage} with {words}")
    return "; ".join(parts) or "nothing"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="recipes to run; all unless given")
    parser.add_argument("--list", action="store_true", help="print the recipes, and run nothing")
    parser.add_argument(
        "--report", action="store_true", help="write the report on the rows there are, and run nothing"
    )
    parser.add_argument(
        "--times", type=float, nargs="+", help="multiples of today's seconds; those of each recipe unless given"
    )
    parser.add_argument("--seeds", type=int, default=3, help="that every recipe is run with")
    parser.add_argument("--model", default=LETTERS, help="testbed:letters, testbed:scenes, or a folder of pretrain's")
    parser.add_argument(
        "--without-controls", action="store_true", help="leave out the original after the same stage two"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("ablation"), help="folder; rows that are there are not run again"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    recipes = choose_recipes(arguments.recipes)
    if arguments.list:
        for recipe in recipes:
            times = ", ".join(f"{count:.2g}" for count in recipe.times)
            say(f"{recipe.name}: {describe(settings_of(recipe))}; times {times}")
        return
    if arguments.report:
        report(arguments.output, say=say)
        return
    ablate(
        recipes,
        arguments.output,
        seeds=arguments.seeds,
        times=arguments.times,
        model=arguments.model,
        protocol=Protocol(controls=not arguments.without_controls),
        say=say,
    )
