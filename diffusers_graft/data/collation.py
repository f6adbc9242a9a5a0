"""Batches of a dataset as people have it: single samples or batches, by index or in order, with columns to spare."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch.utils.data import default_collate

from ..errors import GraftError, TrainingError
from ..inspection import example_inputs
from ..inspection.families import argument_names
from ..training.batches import Batch, Collate, Sample, SequentialBatches, ShuffledBatches, is_map_style
from .encoding import is_picture
from .streams import Stream, StreamBatches, is_stream

logger = logging.getLogger(__name__)


class BatchMaker:
    """Maker of batches from datasets of single samples or of batches.

    Args:
        model: that takes the batches.
        seed: of the order of datasets that are read by index.
        workers: processes that read a dataset.
        collate: makes a batch of a list of single samples; torch's `default_collate` unless given.
        drop_columns: drop what the model does not take, with one warning.
    """

    def __init__(
        self,
        model: ModelMixin,
        *,
        seed: int = 0,
        workers: int = 0,
        collate: Collate | None = None,
        drop_columns: bool = True,
    ):
        self.model = model
        self.seed = seed
        self.workers = workers
        self.collate = collate
        self.columns = ColumnFilter(model, is_active=drop_columns)

    def make_batches(self, dataset: Any, batch_size: int, *, is_endless: bool = True) -> Iterable[Batch]:
        """Return batches of a dataset.

        Args:
            dataset: a map-style dataset or a list of single samples, which is shuffled anew every epoch; a `Stream`,
                or a streamed data set of `datasets`; any other iterable of single samples, in its own order; or an
                iterable of batches, passed on as they come.
            batch_size: of single samples, those of all processes together.
            is_endless: False reads a stream once, for an evaluation.

        Raises `TrainingError` for an empty dataset, for pictures without a function that encodes them, and for batches
            that processes cannot divide evenly.
        """
        if is_map_style(dataset):
            return self._shuffle(dataset, batch_size)
        stream = None
        if isinstance(dataset, Stream) or is_stream(dataset):
            stream = dataset if isinstance(dataset, Stream) else Stream(dataset)
            dataset = stream.dataset
        first, dataset = _peek(dataset)
        if first is None or not holds_single_sample(self.model, first):
            return FilteredBatches(dataset, self.columns) if self.columns.is_active else dataset
        if isinstance(dataset, list | tuple):
            return self._shuffle(dataset, batch_size)
        self._require_collatable(first)
        if stream is not None and is_endless:
            return StreamBatches(stream, batch_size, self.join)
        return SequentialBatches(dataset, batch_size, workers=self.workers, collate=self.join)

    def join(self, samples: list[Sample]) -> Batch:
        """Make a batch of single samples."""
        if self.collate is not None:
            return self.columns.drop(self.collate(samples))
        # Before they are joined: torch's collating refuses columns that hold None.
        return default_collate([self.columns.drop(sample) for sample in samples])

    def _shuffle(self, dataset: Any, batch_size: int) -> ShuffledBatches:
        batches = ShuffledBatches(dataset, batch_size, self.seed, workers=self.workers, collate=self.join)
        self._require_collatable(dataset[0])
        return batches

    def _require_collatable(self, sample: Sample) -> None:
        if self.collate is None and isinstance(sample, Mapping) and any(map(is_picture, sample.values())):
            raise TrainingError(
                "The dataset holds pictures, and a model takes latents: pass "
                "data_collator=dg.data.SampleEncoder(pipe, size=...) to encode them as they are read, or encode them "
                "once with dg.data.encode."
            )


class ColumnFilter:
    """Filter that drops what a model does not take from samples and batches, with one warning.

    Args:
        is_active: False lets everything pass.
    """

    def __init__(self, model: ModelMixin, *, is_active: bool = True):
        names = argument_names(type(model))
        self.names = {*names, "sample", "target"}
        self.model_name = type(model).__name__
        # A model that takes any keyword argument may need every column.
        self.is_active = is_active and "kwargs" not in names
        self._has_warned = False

    def drop(self, batch: Batch) -> Batch:
        """Return a sample or a batch without what the model does not take."""
        if not self.is_active or not isinstance(batch, Mapping):
            return batch
        unused = [name for name in batch if name not in self.names]
        if unused and not self._has_warned:
            self._has_warned = True
            logger.warning("%s does not take %s: dropped from the data.", self.model_name, ", ".join(map(str, unused)))
        return {name: value for name, value in batch.items() if name in self.names}


class FilteredBatches:
    """Batches of an iterable, each without what the model does not take."""

    def __init__(self, batches: Iterable[Batch], columns: ColumnFilter):
        self.batches = batches
        self.columns = columns

    def __iter__(self) -> Iterator[Batch]:
        return map(self.columns.drop, self.batches)


def holds_single_sample(model: ModelMixin, item: Any) -> bool:
    """Return whether an item of a dataset is one sample, and not a batch of them."""
    if not isinstance(item, Mapping):
        return False
    if any(map(is_picture, item.values())):
        return True
    noisy_name = argument_names(type(model))[0]
    sample = item.get("sample", item.get(noisy_name))
    if not isinstance(sample, torch.Tensor):
        return False
    # The type of the container says nothing, and neither do the sizes of latents alone.
    prompt = item.get("encoder_hidden_states")
    if isinstance(prompt, torch.Tensor):
        return prompt.ndim == 2  # [tokens, width] of one sample, whatever the family
    axes = _count_axes(model, noisy_name)
    if axes is not None:
        return sample.ndim == axes - 1
    return any(value.ndim == 0 for value in item.values() if isinstance(value, torch.Tensor))


def holds_pictures(dataset: Any) -> bool:
    """Return whether the samples of a dataset hold pictures of PIL; an iterator is not read for that."""
    if isinstance(dataset, Iterator):
        return False
    if isinstance(dataset, Stream):
        dataset = dataset.dataset
    first = dataset[0] if is_map_style(dataset) else next(iter(dataset), None)
    return isinstance(first, Mapping) and any(map(is_picture, first.values()))


def _count_axes(model: ModelMixin, noisy_name: str) -> int | None:
    """Return the number of axes of a batch of noised samples, None where it is not known."""
    try:
        noisy = example_inputs(model)[noisy_name]
    except (GraftError, KeyError):
        return None
    return noisy.ndim


def _peek(dataset: Iterable) -> tuple[Any, Iterable]:
    """Return the first item of an iterable, None where there is none, and the iterable from its beginning."""
    items = iter(dataset)
    first = next(items, None)
    if items is not dataset:
        return first, dataset
    # An iterator cannot be read again, so its first item is put back.
    return first, itertools.chain([first], items)
