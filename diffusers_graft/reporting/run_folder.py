"""The files of a run's output folder: which are there, and what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.storage import read_json
from ..errors import FileError, GraftError
from ..training.metrics_log import METRICS_LOG, read_metrics

GRAFT = "graft_config.json"
PLAN = "plan.json"
SCORES = "scores.json"
BENCHMARK = "benchmark.json"
ANALYSIS = "analysis.json"
SURVEY = "survey.json"
SAMPLES = "samples"
SAMPLE_GRID = "samples.png"
# A graft lies in the folder itself, or apart from what else a run leaves.
_GRAFT_FOLDERS = (".", "graft")
_SHOWN = (GRAFT, PLAN, SCORES, BENCHMARK, ANALYSIS, SURVEY, METRICS_LOG, SAMPLES, SAMPLE_GRID)


class RunFolder:
    """The output folder of a run, read file by file as a report asks.

    Args:
        path: the folder.

    Raises `FileError` for a folder that is missing, or holds nothing that a report shows.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileError(f"There is no folder {self.path}: give the output folder of a run.")
        if not any(self.find(name) for name in _SHOWN):
            raise FileError(
                f"{self.path} is not the output folder of a run: it holds none of {', '.join(_SHOWN)}. Give the "
                "folder that GraftTrainer, dg.survey or the quick start wrote."
            )

    def find(self, name: str) -> Path | None:
        """Return the path of a file or folder of the run, None where it is not there."""
        for folder in _GRAFT_FOLDERS:
            path = self.path / folder / name
            if path.exists():
                return path
        return None

    def read(self, name: str) -> dict[str, Any]:
        """Return what a JSON file holds, nothing without it. Raises `FileError` for one that cannot be read."""
        path = self.find(name)
        if path is None:
            return {}
        return read_json(path)

    @cached_property
    def description(self) -> dict[str, Any]:
        """The description of the graft, or nothing."""
        return self.read(GRAFT)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The plan, that of the graft if there is one."""
        if self.description:
            return self.description.get("plan") or {}
        return self.read(PLAN)

    @cached_property
    def scores(self) -> dict[str, Any]:
        """Scores by state of the model."""
        return self.read(SCORES) or self.description.get("scores") or {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of the training's log."""
        path = self.find(METRICS_LOG)
        if path is None:
            return []
        return read_metrics(path.parent)


@contextmanager
def explained(run: RunFolder, name: str) -> Iterator[None]:
    """Turn a failure over what a file holds into a `FileError` that names the file."""
    try:
        yield
    except GraftError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        path = run.find(name) or run.path / name
        raise FileError(
            f"{path} is damaged, or was not written by a run: {type(error).__name__} over {error}. "
            "Remove it to report on the rest, or write it again."
        ) from error
