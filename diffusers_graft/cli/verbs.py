"""The verbs of the command line, one thin function each; their options are in diffusers_graft_cli.py."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from ..core.storage import read_json, read_text
from ..core.tables import Table
from ..errors import FileError, GraftError
from ..evaluation.operator_costs import list_operators
from ..inspection import find_sites
from ..operators import available, get, parse_operator
from ..operators.conformance.case import ConformanceError
from ..operators.conformance.suite import check_operator
from ..recipes.dry_run import estimate
from ..recipes.operator_files import load_operator, write_skeleton
from ..recipes.reading import list_keys, load_recipe
from ..recipes.reproduce import reproduce as run_tables
from ..recipes.run import ANALYSIS, BENCHMARK, PLAN, SCORES, SURVEY, analyze_recipe, resolve_plan, run_recipe
from ..recipes.schema import Recipe
from ..recipes.sources import load_model
from ..reporting.report import report as write_report
from ..search.planner import Survey
from ..serialization.paper_checkpoints import import_upstream
from ..serialization.pull import pull_graft
from ..serialization.upload import push_graft
from ..testbed import quickstart as letters

Arguments = argparse.Namespace


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run(verb: Callable[[Arguments], None], arguments: Arguments, *, program: str) -> int:
    """Run a verb and return its exit status, each failure with a line on stderr.

    2 is a refusal, 1 an operator that does not pass its checks, 130 an interruption.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("diffusers_graft").setLevel(logging.INFO)
    try:
        # Lines of the log and a bar would otherwise write over each other.
        with logging_redirect_tqdm():
            verb(arguments)
    except ConformanceError as error:
        sys.stderr.write(f"{program}: {_one_line(error)}\n")
        return 1
    # OSError: an output that cannot be written
    except (GraftError, OSError) as error:
        sys.stderr.write(f"{program}: {_one_line(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(
            f"\n{program}: interrupted. What was saved before is unchanged, and a run started again goes on from it.\n"
        )
        return 130
    return 0


def _one_line(error: Exception) -> str:
    # Messages of other libraries, quoted in ours, may have several.
    return " ".join(str(error).split())


def _say_json(value: Any) -> None:
    say(json.dumps(value, indent=2))


def quickstart(arguments: Arguments) -> None:
    """Graft the testbed model end to end."""
    operator = parse_operator(arguments.operator)
    letters.quickstart(operator, arguments.sites, arguments.output, seed=arguments.seed, say=say)


def train(arguments: Arguments) -> None:
    """Run a recipe."""
    # Types and defaults are those of the library, so they cannot be in the help, which imports nothing.
    if arguments.keys:
        say(Table(list(list_keys())).to_text(width=80))
        return
    _run_recipe(arguments, "share")


def distill(arguments: Arguments) -> None:
    """Run a recipe up to stage one."""
    _run_recipe(arguments, "distill")


def finetune(arguments: Arguments) -> None:
    """Run a recipe up to stage two."""
    _run_recipe(arguments, "finetune")


def evaluate(arguments: Arguments) -> None:
    """Run a recipe up to its scores."""
    _run_recipe(arguments, "evaluate", SCORES)


def benchmark(arguments: Arguments) -> None:
    """Run a recipe up to its benchmark."""
    recipe = _read_recipe(arguments)
    # Asked for by name, a benchmark runs also where the recipe has none.
    if recipe.benchmark is None:
        arguments.overrides = [*arguments.overrides, "--benchmark", "{}"]
    _run_recipe(arguments, "benchmark", BENCHMARK)


def _read_recipe(arguments: Arguments) -> Recipe:
    if arguments.recipe is None:
        raise FileError(f"Name a recipe: diffusers-graft {arguments.verb} recipe.yaml.")
    return load_recipe(arguments.recipe, arguments.overrides)


def _run_recipe(arguments: Arguments, last: str, result: str = SCORES) -> None:
    """Run a recipe up to a stage, or print what that will take; as JSON, print the file of its result."""
    recipe = _read_recipe(arguments)
    if arguments.dry_run:
        costs = estimate(recipe, devices=arguments.devices)
        if arguments.json:
            _say_json(asdict(costs))
        else:
            say(str(costs))
        return
    # Programs read one JSON value and nothing beside it.
    tell = (lambda text: None) if arguments.json else say
    folder = run_recipe(recipe, last=last, say=tell)
    if arguments.json:
        _say_json(read_json(folder / result) if (folder / result).exists() else {"output": str(folder)})


def search(arguments: Arguments) -> None:
    """Survey and solve, or solve a saved survey for another budget."""
    # A saved survey is solved anew in a moment, and needs no model.
    if arguments.recipe is not None and arguments.recipe.suffix == ".json":
        found = Survey.load(arguments.recipe)
        plan = found.plan(**_read_budget(arguments.overrides))
    else:
        recipe = _read_recipe(arguments)
        if recipe.search is None:
            raise GraftError(
                f"{arguments.recipe} has no search: name its candidates and a budget, such as flops: 0.8."
            )
        folder = run_recipe(recipe, last="plan", say=lambda text: None)
        plan = resolve_plan(load_model(recipe.model.name), str(folder / PLAN))
        found = Survey.load(folder / SURVEY)
    if arguments.save is not None:
        plan.save(arguments.save)
    predicted = found.predicted(plan)
    if arguments.json:
        _say_json({"plan": plan.to_dict(), "predicted": predicted})
        return
    shares = "  ".join(f"{measure} {share:.3g}" for measure, share in predicted.items())
    say(f"{found}\n\n{plan}\n\n{shares}")


def _read_budget(overrides: list[str]) -> dict[str, Any]:
    """Return the budget that options name, such as `--search.flops 0.8`."""
    budget = {}
    for name, share in zip(overrides[::2], overrides[1::2], strict=False):
        measure = name.removeprefix("--").removeprefix("search.")
        if measure not in ("latency", "flops", "parameters"):
            raise GraftError(f"{name} is no budget: give --search.latency, --search.flops or --search.parameters.")
        try:
            budget[measure] = float(share)
        except ValueError as error:
            raise GraftError(f"{name} is a share of the original's, such as 0.8; got {share!r}.") from error
    return budget


def operators(arguments: Arguments) -> None:
    """List every operator with its cost at a shape."""
    if arguments.json:
        rows = [get(name) for name in available()]
        _say_json([{"name": one.name, "kinds": one.kinds, "start": one.start, "paper": one.paper} for one in rows])
        return
    list_operators(tokens=arguments.tokens, width=arguments.width, heads=arguments.heads, say=say)


def sites(arguments: Arguments) -> None:
    """List the sites of a model: a folder, a repository, or a testbed."""
    found = find_sites(load_model(arguments.model, subfolder=arguments.subfolder, revision=arguments.revision))
    if arguments.json:
        _say_json([site.to_dict() for site in found])
    else:
        say(str(found))


def plan(arguments: Arguments) -> None:
    """Resolve rules against a model, and print or save the plan."""
    model = load_model(arguments.model, subfolder=arguments.subfolder, revision=arguments.revision)
    resolved = resolve_plan(model, arguments.rules)
    if arguments.save is not None:
        resolved.save(arguments.save)
    if arguments.json:
        _say_json(resolved.to_dict())
    else:
        say(str(resolved))


def card(arguments: Arguments) -> None:
    """Print the card of a saved graft."""
    say(read_text(arguments.folder / "README.md"))


def push(arguments: Arguments) -> None:
    """Push a saved graft to the Hub."""
    settings = {} if arguments.revision is None else {"revision": arguments.revision}
    say(push_graft(arguments.folder, arguments.repository, private=arguments.private, **settings))


def pull(arguments: Arguments) -> None:
    """Download a graft from the Hub into a folder."""
    pull_graft(arguments.repository, arguments.folder, revision=arguments.revision)
    say(f"{arguments.folder} holds {arguments.repository}: model.load_graft({str(arguments.folder)!r}) installs it.")


def import_(arguments: Arguments) -> None:
    """Save a checkpoint of the paper as a grafted model."""
    model = import_upstream(arguments.source, weights=arguments.weights, license=arguments.license)
    model.save_pretrained(arguments.folder)
    say(f"{arguments.folder} holds a grafted model: dg.load_pretrained({str(arguments.folder)!r}) loads it.")


def check(arguments: Arguments) -> None:
    """Run the conformance suite on an operator, by name or in a file."""
    if arguments.operator.endswith(".py"):
        operator = load_operator(Path(arguments.operator))
        config = operator.Config()
    else:
        config = parse_operator(arguments.operator)
    report = check_operator(config)
    if arguments.json:
        _say_json({"operator": config.to_dict(), "passed": report.passed})
    else:
        say(str(report))


def new_operator(arguments: Arguments) -> None:
    """Write the skeleton of an operator."""
    path = write_skeleton(arguments.name, arguments.kind, Path())
    say(f"{path} is an operator that passes its checks: diffusers-graft check {path}")


def reproduce(arguments: Arguments) -> None:
    """Run the paper's tables at the scale of the letters."""
    run_tables(arguments.output, tables=arguments.tables, seeds=arguments.seeds, say=say)


def analyze(arguments: Arguments) -> None:
    """Measure a recipe's model for the choice of sites."""
    recipe = _read_recipe(arguments)
    analysis = analyze_recipe(recipe)
    if arguments.json:
        _say_json(read_json(Path(recipe.output) / ANALYSIS))
    else:
        say(str(analysis))


def report(arguments: Arguments) -> None:
    """Write the report of a run's folder."""
    say(str(write_report(arguments.folder)))


# By the name on the command line, where `import` and a hyphen may stand.
VERBS: dict[str, Callable[[Arguments], None]] = {
    "analyze": analyze,
    "benchmark": benchmark,
    "card": card,
    "check": check,
    "distill": distill,
    "evaluate": evaluate,
    "finetune": finetune,
    "import": import_,
    "new-operator": new_operator,
    "operators": operators,
    "plan": plan,
    "pull": pull,
    "push": push,
    "quickstart": quickstart,
    "report": report,
    "reproduce": reproduce,
    "search": search,
    "sites": sites,
    "train": train,
}
