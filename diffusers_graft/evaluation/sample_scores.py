"""Scores of drawn samples: all metrics read every picture once, and share the features of one extractor."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..core.progress import hide_bar
from ..errors import GraftError
from ..injection.install import original_running
from ..training.distributed import gather_values, is_main_process, process_state, wait_for_all
from ..training.identity import digest
from .metrics.base import FeatureMetric, PictureMetric, SampleMetric
from .metrics.extractors import run_extractor, select_output
from .metrics.frechet_distance import RunningStatistics
from .metrics.prediction_error import require_teacher
from .metrics.reference import require_absent, write_images
from .protocol import describe_computation, describe_metric
from .sampling import (
    SampleFolder,
    Sampling,
    check_conditions,
    describe_sampling,
    draw_samples,
    model_of,
    open_folder,
)

TEACHER = "teacher"


def score_samples(
    pipeline: Any,
    conditions: Sequence[Any],
    metrics: Sequence[SampleMetric],
    sampling: Sampling,
    *,
    seed: int,
    output: str | Path | None,
    save_npz: str | Path | None,
    progress: bool,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Draw samples, measure them, and return values and protocol; `dg.evaluate` says what raises."""
    model: Any = model_of(pipeline)
    check_conditions(pipeline, conditions, sampling)
    repeated = [condition for condition in conditions for _ in range(sampling.samples_per_condition)]
    for number, metric in enumerate(metrics):
        name = type(metric).__name__
        if name in [type(other).__name__ for other in metrics[:number]]:
            raise GraftError(f"{name} is given twice, and both values would have one name. Evaluate by each alone.")
        metric.check(repeated)
    needs_teacher = any(metric.needs_teacher for metric in metrics)
    if needs_teacher:
        require_teacher(model)
    if save_npz is not None and is_main_process():
        require_absent(save_npz)
    protocol = {
        "samples": len(repeated),
        "conditions": digest(list(conditions)),
        "seed": seed,
        **describe_sampling(pipeline, sampling),
        **describe_computation(model),
    }
    for metric in metrics:
        protocol |= describe_metric(metric)
    # Metrics do not change pictures, so that others may measure the same folder later.
    drawn_by = {name: value for name, value in protocol.items() if "." not in name}
    with _folder(output) as path:
        folder = open_folder(
            path,
            conditions,
            sampling.samples_per_condition,
            {**drawn_by, "weights": digest(model.state_dict())},
        )

        def check(images: torch.Tensor, first: Sequence[Any]) -> None:
            _check_first(metrics, images)

        draw_samples(pipeline, folder, sampling, seed=seed, progress=progress, check=check)
        # Drawn after all of the student's, as exchanging the parts for every batch would be slower.
        teacher_folder = None
        if needs_teacher:
            with original_running(model):
                record = {**drawn_by, "weights": digest(model.state_dict())}
                teacher_folder = open_folder(path / TEACHER, conditions, sampling.samples_per_condition, record)
                draw_samples(pipeline, teacher_folder, sampling, seed=seed, progress=progress)
        if save_npz is not None and is_main_process():
            batches = folder.batches(sampling.batch_size)
            write_images(save_npz, (folder.read(indices) for indices in batches), len(folder))
        wait_for_all()
        values = measure_folder(folder, metrics, teacher_folder, batch_size=sampling.batch_size, progress=progress)
    return values, protocol


@contextlib.contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    """Give the folder of samples, one that goes with the block where none was named."""
    if output is not None:
        yield Path(output)
        return
    # Each process would make a folder of its own, and find the pictures of no other.
    if process_state().num_processes > 1:
        raise GraftError("Several processes draw into one folder: name it, by output=...")
    with tempfile.TemporaryDirectory(prefix="samples-") as folder:
        yield Path(folder)


def _check_first(metrics: Sequence[SampleMetric], images: torch.Tensor) -> None:
    """Run every extractor on the first pictures, so that what does not fit shows before all others are drawn."""
    for metric in metrics:
        if isinstance(metric, FeatureMetric):
            extractor = metric.open_extractor()
            outputs = run_extractor(extractor, images)
            # Shapes and finiteness of features, and their width beside the reference.
            metric.check_features(select_output(outputs, metric.output, extractor, len(images)))


@torch.no_grad()
def measure_folder(
    folder: SampleFolder,
    metrics: Iterable[SampleMetric],
    teacher_folder: SampleFolder | None = None,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, float]:
    """Measure pictures that are there, every process its share, and return values by name.

    Args:
        teacher_folder: the teacher's pictures for the same conditions and seeds, where a metric needs them.

    Raises `FileError` for a picture that is missing or damaged.
    """
    metrics = list(metrics)
    of_features = [metric for metric in metrics if isinstance(metric, FeatureMetric)]
    of_pictures = [metric for metric in metrics if isinstance(metric, PictureMetric)]
    table = _FeatureTable(of_features)
    numbers: list[list[tuple[Sequence[int], dict[str, torch.Tensor]]]] = [[] for _ in of_pictures]
    state = process_state()
    batches = list(folder.batches(batch_size))[state.process_index :: state.num_processes]
    for indices in tqdm(batches, desc="measuring", unit="batch", leave=False, disable=hide_bar(progress)):
        pictures = folder.read(indices)
        table.update(indices, pictures)
        conditions = [folder.conditions[index] for index in indices]
        teacher_pictures = None if teacher_folder is None else teacher_folder.read(indices)
        for metric, seen in zip(of_pictures, numbers, strict=True):
            seen.append((indices, metric.measure(pictures, conditions, teacher_pictures)))
    # Every process computes the same values, which is simpler than sending them.
    values: dict[str, float] = {}
    for metric in of_features:
        values |= metric.compute(table.gather(metric))
    for metric, seen in zip(of_pictures, numbers, strict=True):
        values |= metric.summarize(_in_order(seen), folder.conditions)
    return values


def _in_order(seen: Sequence[tuple[Sequence[int], dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Return numbers of all samples in their order, from the batches of all processes."""
    shares = gather_values(list(seen))
    gathered = sorted((batch for share in shares for batch in share), key=lambda batch: batch[0][0])
    names = gathered[0][1]
    return {name: torch.cat([numbers[name] for _, numbers in gathered]) for name in names}


class _FeatureTable:
    """Features of all samples, for each extractor and output that some metric needs.

    Where statistics are all that is needed, no features are kept.
    """

    def __init__(self, metrics: Sequence[FeatureMetric]):
        self.extractors: dict[nn.Module, set[str]] = {}
        self.running: dict[tuple[nn.Module, str], RunningStatistics] = {}
        self.kept: dict[tuple[nn.Module, str], list[tuple[Sequence[int], dict[str, torch.Tensor]]]] = {}
        for metric in metrics:
            extractor = metric.open_extractor()
            self.extractors.setdefault(extractor, set()).add(metric.output)
            place = (extractor, metric.output)
            if metric.takes_statistics:
                self.running[place] = RunningStatistics()
            else:
                self.kept[place] = []

    def update(self, indices: Sequence[int], pictures: torch.Tensor) -> None:
        for extractor, outputs in self.extractors.items():
            # Once for all metrics: the network is what takes time.
            found = run_extractor(extractor, pictures)
            for output in outputs:
                place = (extractor, output)
                features = select_output(found, output, extractor, len(pictures))
                if place in self.running:
                    self.running[place].update(features)
                if place in self.kept:
                    self.kept[place].append((indices, {output: features}))

    def gather(self, metric: FeatureMetric) -> Any:
        """Return what a metric computes from, of all processes."""
        place = (metric.open_extractor(), metric.output)
        if not metric.takes_statistics:
            return _in_order(self.kept[place])[metric.output]
        total = RunningStatistics()
        for running in gather_values(self.running[place]):
            total.merge(running)
        return total.result()
