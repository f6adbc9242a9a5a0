"""`dg.report`: one HTML file with everything that a run left in its folder, which opens from disk."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import jinja2

from ..core.storage import read_text, replace_file, write_text
from ..errors import GraftError, MissingDependencyError
from .edits import describe_edits
from .run_folder import GRAFT, RunFolder, explained
from .samples import describe_samples
from .sections import (
    describe_analysis,
    describe_costs,
    describe_protocols,
    describe_scores,
    describe_survey,
    describe_training,
    key_figures,
)

logger = logging.getLogger(__name__)

REPORT = "report.html"
_RECIPE = "recipe.yaml"


def report(folder: str | Path) -> Path:
    """Write `report.html` beside what a run left: its edits, samples, curves, quality, cost, search and protocol.

    A section is drawn where its file is there: `graft_config.json` or `plan.json`, `training.jsonl`, `samples/`,
    `scores.json`, `benchmark.json`, `survey.json`, `analysis.json`, `recipe.yaml`. Pictures are inside the file.

    Args:
        folder: output folder of a `GraftTrainer`, of `dg.survey`, of the quick start or of a recipe.

    Returns the path of the report.

    Raises:
        FileError: a folder that is missing, empty or of something else; a file in it that is damaged.
        MissingDependencyError: matplotlib or Pillow is not installed.
    """
    run = RunFolder(folder)
    page = _template().render(_contents(run))
    path = run.path / REPORT
    with replace_file(path) as temporary:
        write_text(temporary, page, errors="replace")
    return path


def try_report(folder: str | Path) -> Path | None:
    """Write the report of a run that ends: what goes wrong is logged, since no run may fail over a picture."""
    try:
        return report(folder)
    except MissingDependencyError as error:
        logger.info("No report was written to %s: %s", folder, error)
    except GraftError as error:
        logger.warning("No report was written to %s: %s", folder, error)
    # pictures come from other libraries, which fail in ways of their own
    except Exception as error:
        logger.warning("No report was written to %s: %s: %s", folder, type(error).__name__, error)
    return None


def _contents(run: RunFolder) -> dict[str, Any]:
    """Return the values of the page's template."""
    edits = describe_edits(run)
    recipe = run.find(_RECIPE)
    text = None
    if recipe is not None:
        text = read_text(recipe)
    with explained(run, GRAFT):
        model_class = str(run.plan.get("model_class") or run.description.get("model_class") or "")
        base = run.description.get("base") or {}
        versions = dict(run.description.get("versions") or {})
        return {
            "title": _title(model_class, edits),
            "base": base.get("name_or_path"),
            "folder": run.path.resolve().name,
            "figures": key_figures(run, edits),
            "edits": edits,
            "samples": describe_samples(run),
            "scores": describe_scores(run),
            "costs": describe_costs(run),
            "survey": describe_survey(run),
            "training": describe_training(run),
            "analysis": describe_analysis(run),
            "protocols": describe_protocols(run),
            "recipe": text,
            "versions": versions,
        }


def _title(model_class: str, edits: dict[str, Any] | None) -> str:
    name = model_class or "A run"
    if edits is None:
        return name
    # settings are in the table below
    operators = dict.fromkeys(row["operator"].partition("(")[0] for row in edits["operators"])
    return f"{name} with {' and '.join(operators)}"


@functools.cache
def _template() -> jinja2.Template:
    # escaped, since a folder may come from a stranger; strict, since an empty place would pass unseen
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))
