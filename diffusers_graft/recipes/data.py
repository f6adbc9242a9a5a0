"""Training data and held-out batches of a recipe."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset, default_collate

from .. import data
from ..errors import FileError, GraftError, TrainingError
from ..training.batches import Batch, Collate, is_map_style
from ..training.distributed import is_main_process, wait_for_all
from .schema import DataSettings, EvaluateSettings, Recipe, SampleSettings, SyntheticData
from .sources import Source

DATA = "data"


@dataclass
class Data:
    """What a run trains and evaluates on.

    Attributes:
        train: for `GraftTrainer`.
        held_out: batches that are never trained on.
        collate: makes a batch of samples of `train`; None where those are joined as they are.
        null_prompt: conditioning of no prompt, where prompts are dropped.
    """

    train: Iterable[Any]
    held_out: list[Batch]
    collate: Collate | None = None
    null_prompt: Mapping[str, torch.Tensor] | None = None


class TestbedBatches:
    """Endless batches of a testbed, the same at every reading."""

    __test__ = False  # pytest takes the name for that of a test

    def __init__(self, source: Source, settings: DataSettings, seed: int):
        self.source = source
        self.settings = settings
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        assert self.source.batches is not None
        return self.source.batches(self.settings.batch_size, self.seed)


def list_conditions(
    settings: SyntheticData | SampleSettings | EvaluateSettings, where: str
) -> tuple[str, ...] | tuple[int, ...]:
    """Return the prompts or the labels of a section.

    Args:
        where: the section, for messages.

    Raises `GraftError` for both or neither, and `FileError` for a file without prompts.
    """
    if (settings.prompts is None) == (settings.labels is None):
        raise GraftError(f"{where} needs {where}.prompts or {where}.labels, and not both.")
    # A file of prompts is read now, so that an empty one is told before a model is loaded.
    conditions: tuple[Any, ...]
    if isinstance(settings.labels, int):
        conditions = tuple(range(settings.labels))
    elif settings.labels is not None:
        conditions = settings.labels
    elif isinstance(settings.prompts, str):
        conditions = tuple(data.read_prompts(settings.prompts))
    else:
        assert settings.prompts is not None
        conditions = settings.prompts
    if not conditions:
        raise GraftError(f"{where} lists nothing to draw: give one prompt or label, or more.")
    return conditions


def require_data(recipe: Recipe) -> None:
    """Raise an error for data that cannot be there, before anything is loaded."""
    settings = recipe.data
    is_testbed = recipe.model.name.startswith("testbed:")
    # A testbed draws its own; of other models nobody knows what they were trained on.
    if not settings.sources and not is_testbed:
        raise GraftError(
            f"{recipe.model.name} has no data of its own: name them as data.synthetic, data.folder, data.dataset, "
            "data.webdataset or data.latents."
        )
    if settings.synthetic is not None:
        list_conditions(settings.synthetic, "data.synthetic")
        # Before they are drawn, which may take hours.
        _require_rest(settings.synthetic.samples, settings.held_out)
    if recipe.samples is not None:
        list_conditions(recipe.samples, "samples")
    for path in (settings.latents, settings.folder and settings.folder.path):
        if path is not None and not Path(path).is_dir():
            raise FileError(f"There is no folder {path}, where the recipe has its data.")


def make_data(recipe: Recipe, source: Source) -> Data:
    """Open the data of a recipe, and draw them first where they are synthetic.

    Raises `TrainingError` for fewer samples than are held out, and what the readers of `dg.data` raise.
    """
    settings = recipe.data
    arguments: Mapping[str, Any] = {}
    if settings.synthetic is not None:
        arguments = settings.synthetic.arguments
    # Of the same length as the prompts, which the same arguments decide.
    null_prompt = source.null_prompt(**arguments)
    if not settings.sources:
        if source.held_out is None:
            raise TrainingError(f"{recipe.model.name} has no data of its own: name a source of data.")
        held_out = source.held_out(settings.held_out, settings.batch_size)
        return Data(TestbedBatches(source, settings, recipe.seed), held_out, null_prompt=null_prompt)
    dataset, collate = _open(recipe, source)
    train, held_out = _split(dataset, settings, collate)
    return Data(train, held_out, collate, null_prompt)


def _open(recipe: Recipe, source: Source) -> tuple[Any, Collate | None]:
    """Return the samples of the one source of data, and what makes batches of pictures."""
    settings = recipe.data
    if settings.latents is not None:
        return data.Shards(settings.latents), None
    if settings.synthetic is not None:
        return _draw(settings.synthetic, recipe, source), None
    if settings.folder is not None:
        return data.PictureFolder(settings.folder.path), source.encoder(settings.folder.size)
    if settings.dataset is not None:
        hub = settings.dataset
        opened = data.open_dataset(hub.name, split=hub.split, streaming=hub.streaming, **hub.arguments)
        return opened, source.encoder(hub.size, image=hub.image, caption=hub.caption, label=hub.label)
    assert settings.webdataset is not None
    urls = settings.webdataset.urls
    opened = data.open_shards(urls if isinstance(urls, str) else list(urls))
    return opened, source.encoder(settings.webdataset.size)


def _draw(settings: SyntheticData, recipe: Recipe, source: Source) -> data.Shards:
    """Let the model's pipeline draw the training set, or go on where that was stopped."""
    if source.pipeline is None:
        raise TrainingError(
            f"{recipe.model.name} is a transformer alone, and a pipeline draws synthetic data: name the pipeline as "
            "the model, or another source of data."
        )
    conditions = list_conditions(settings, "data.synthetic")
    # Beside the run, since a set that was begun is finished by the same recipe.
    folder = Path(recipe.output) / DATA
    # One process draws: several would write the same files.
    if is_main_process():
        data.from_pipeline(
            source.pipeline, conditions, settings.samples, folder, seed=recipe.seed, **settings.arguments
        )
    wait_for_all()
    return data.Shards(folder)


def _split(dataset: Any, settings: DataSettings, collate: Collate | None) -> tuple[Any, list[Batch]]:
    """Set samples aside for evaluation: the last ones by index, or the first ones of a stream."""
    count = settings.held_out
    # The end of a stream is not known, and its beginning is there first.
    if not is_map_style(dataset):
        train = dataset.skip(count)
        return train, _join(dataset.take(count), settings.batch_size, collate)
    _require_rest(len(dataset), count)
    numbers = range(len(dataset))
    train = Subset(dataset, numbers[:-count])
    held_out = Subset(dataset, numbers[-count:])
    return train, _join((held_out[number] for number in range(count)), settings.batch_size, collate)


def _require_rest(samples: int, held_out: int) -> None:
    if samples <= held_out:
        raise TrainingError(f"Of {samples} samples data.held_out={held_out} leaves none to train on. Hold fewer out.")


def _join(samples: Iterable[Any], batch_size: int, collate: Collate | None) -> list[Batch]:
    make = collate or default_collate
    return [make(chunk) for chunk in _chunks(samples, batch_size)]


def _chunks(samples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    waiting = iter(samples)
    chunk = list(itertools.islice(waiting, size))
    while chunk:
        yield chunk
        chunk = list(itertools.islice(waiting, size))
