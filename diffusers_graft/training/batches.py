"""Batches of training data: shuffled, counted, read over and over, in an order that a resumed run takes up again.

A batch is a dict. With a `sample` (latents [B, C, ...]) the rest are conditioning arguments under the names of the
model, and a noise scheduler noises the sample afresh each time. Without, or with a `timestep`, it is a set of model
arguments used as it is, with the `target` of stage two among them.

Batches that are given whole are read by every process, which then takes its part of each. Where batches are made of
single samples, each process reads its own samples of a batch alone: with `n` processes, every `n`-th one (`Share`).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from ..errors import TrainingError
from .distributed import process_state

Batch = Mapping[str, Any]
Sample = Mapping[str, Any]
Collate = Callable[[list[Any]], Batch]


class Share(dict):
    """Part of a batch that this process has read alone: samples r, r + n, r + 2 n, ... for process r of n."""


def own_part(samples: Any) -> Any:
    """Return this process's part of a whole batch, a sequence or a tensor: every n-th sample of n processes."""
    state = process_state()
    return samples[state.process_index :: state.num_processes]


def make_share(samples: list[Any], collate: Collate) -> Batch:
    """Make this process's batch of its samples; it is whole where there is one process."""
    batch = collate(samples)
    return batch if process_state().num_processes == 1 else Share(batch)


def require_divisible(batch_size: int) -> None:
    """Raise `TrainingError` for batches that processes cannot divide evenly."""
    count = process_state().num_processes
    if batch_size % count:
        raise TrainingError(f"A batch of {batch_size} samples cannot be divided evenly among {count} processes.")


@dataclass(frozen=True)
class Shared:
    """Conditioning that is the same for all samples, such as a number of frames; put into batches as it is."""

    value: Any


@dataclass(frozen=True)
class Row:
    """Conditioning of one sample that is no row of a tensor's first axis.

    Attributes:
        value: of the sample.
        axis: of a tensor along which the values of a batch are joined; None makes them a list.
    """

    value: Any
    axis: int | None = None


def _collate_shared(values: Sequence[Shared], *, collate_fn_map: Any = None) -> Shared:
    return values[0]


def _collate_rows(values: Sequence[Row], *, collate_fn_map: Any = None) -> Any:
    items = [one.value for one in values]
    axis = values[0].axis
    if axis is None:
        return items
    return torch.cat(items, dim=axis)


# The way that torch documents to extend its collating, so that any DataLoader makes the batches that models take.
default_collate_fn_map[Shared] = _collate_shared
default_collate_fn_map[Row] = _collate_rows


class ShuffledBatches:
    """Endless batches of a map-style dataset (torch's, or of the `datasets` library), shuffled anew each epoch.

    The order depends on `seed` alone, so a run that is resumed reads no sample of those it has had.

    Args:
        batch_size: samples of a batch, of all processes together.
        workers: processes that read the dataset.
        collate: makes a batch of a list of samples; `default_collate` unless given.

    Raises `TrainingError` for an empty dataset, or batches of no sample.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int, *, workers: int = 0, collate: Collate | None = None):
        if batch_size < 1 or not len(dataset):
            raise TrainingError(
                f"A batch has one sample or more; got batches of {batch_size} out of {len(dataset)} samples."
            )
        require_divisible(batch_size)
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        self.collate = collate or default_collate
        self._start = 0

    def start_at(self, batch: int) -> None:
        """Begin the next reading at the batch of this number."""
        self._start = batch

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size or 1

    def __iter__(self) -> Iterator[Batch]:
        # Seeds of workers, which would otherwise be drawn from torch's global generator.
        generator = torch.Generator().manual_seed(self.seed)
        yield from DataLoader(
            self.dataset,
            batch_sampler=self._indices(self._start),
            num_workers=self.workers,
            collate_fn=self._collate,
            generator=generator,
        )

    def _collate(self, samples: list[Any]) -> Batch:
        return make_share(samples, self.collate)

    def _indices(self, start: int) -> Iterator[list[int]]:
        # From the number of a batch alone, so that seeking reads nothing.
        epoch, skipped = divmod(start, len(self))
        while True:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.dataset), generator=generator).tolist()
            for first in range(skipped, len(self)):
                yield own_part(order[first * self.batch_size : (first + 1) * self.batch_size])
            epoch += 1
            skipped = 0


class SequentialBatches:
    """Batches of an iterable of single samples, in the order it gives; what is left over at its end is dropped.

    Streams of the `datasets` library, which shuffle by epoch (`set_epoch`), are read in another order every time.

    Args:
        batch_size: samples of a batch, of all processes together.
        workers: processes that read a torch `IterableDataset`, which has to divide its samples among them itself.
        collate: makes a batch of a list of samples; `default_collate` unless given.

    Attributes:
        is_skipping: batches are passed over, so none is made of the samples.
    """

    def __init__(
        self, samples: Iterable[Sample], batch_size: int, *, workers: int = 0, collate: Collate | None = None
    ):
        if batch_size < 1:
            raise TrainingError(f"A batch has one sample or more; got batches of {batch_size}.")
        require_divisible(batch_size)
        self.samples = samples
        self.batch_size = batch_size
        self.workers = workers
        self.collate = collate or default_collate
        self.is_skipping = False
        self._epoch = 0

    def __iter__(self) -> Iterator[Batch]:
        set_epoch = getattr(self.samples, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._epoch)
        self._epoch += 1
        # A DataLoader would give a seed to a dataset without workers, too, from torch's global generator.
        if isinstance(self.samples, IterableDataset) and self.workers:
            yield from DataLoader(
                self.samples,
                batch_size=self.batch_size,
                drop_last=True,
                num_workers=self.workers,
                collate_fn=self._collate,
                generator=torch.Generator().manual_seed(0),
            )
            return
        samples = iter(self.samples)
        while True:
            chunk = list(itertools.islice(samples, self.batch_size))
            # A smaller batch could not be shared evenly by several processes.
            if len(chunk) < self.batch_size:
                return
            yield {} if self.is_skipping else self._collate(chunk)

    def _collate(self, samples: list[Sample]) -> Batch:
        return make_share(own_part(samples), self.collate)


def make_batches(dataset: Any, batch_size: int | None, seed: int = 0, *, workers: int = 0) -> Iterable[Batch]:
    """Return batches of a map-style dataset of single samples; other iterables hold batches and are returned as is.

    Raises `TrainingError` for single samples without a `batch_size`.
    """
    if not is_map_style(dataset):
        return dataset
    if batch_size is None:
        raise TrainingError(
            "Stages take batches, this holds single samples: pass a DataLoader of it, or use a GraftTrainer."
        )
    return ShuffledBatches(dataset, batch_size, seed, workers=workers)


def is_map_style(dataset: Any) -> bool:
    """Return whether a dataset is read by index, sample by sample."""
    # Lists hold batches here, by a convention that is older than the trainer.
    if isinstance(dataset, list | tuple | Mapping | IterableDataset):
        return False
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


class PlacedBatches(ABC):
    """Endless batches that know where they are in their data, so that a resumed run goes on there at once."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end, from where they are."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return where this process is in its part of the data, JSON-able; dicts of all processes are united."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place that `state_dict` returned, on as many processes as there are now."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what decides the order of the samples, JSON-able."""


class BatchStream:
    """Batches one after the other, over and over, counted.

    Attributes:
        position: batches read so far.
    """

    def __init__(self, batches: Iterable[Batch]):
        self.batches = make_batches(batches, None)
        self.position = 0
        self._place = self._read_place()
        # Batches that were looked at, each with the place after it.
        self._peeked: list[tuple[Batch, dict[str, Any]]] = []
        self._next = repeat_batches(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, self._place = self._peeked.pop() if self._peeked else self._read()
        self.position += 1
        return batch

    @property
    def epoch(self) -> float | None:
        """Number of times the batches were read, a fraction within an epoch; None where their number is not known."""
        return self.position / len(self.batches) if isinstance(self.batches, Sized) else None

    def peek(self) -> Batch:
        """Return the next batch without counting it as read."""
        if not self._peeked:
            self._peeked.append(self._read())
        return self._peeked[0][0]

    def state_dict(self) -> dict[str, Any]:
        """Return where this process is, for `load_state_dict`."""
        return {"position": self.position, **self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream was, at once where the batches know places, else by reading those before it."""
        if not isinstance(self.batches, PlacedBatches):
            self.seek(state["position"])
            return
        self.batches.load_state_dict(state)
        self._restart(state["position"])

    def seek(self, position: int) -> None:
        """Go on to a later batch: at once where the batches have `start_at`, else by reading those before it."""
        start_at = getattr(self.batches, "start_at", None)
        if start_at is not None:
            start_at(position)
            self._restart(position)
        if isinstance(self.batches, SequentialBatches):
            # The samples are read, and not encoded.
            self.batches.is_skipping = True
        while self.position < position:
            next(self)
        if isinstance(self.batches, SequentialBatches):
            self.batches.is_skipping = False

    def _restart(self, position: int) -> None:
        self._next = repeat_batches(self.batches)
        self._peeked = []
        self._place = self._read_place()
        self.position = position

    def _read(self) -> tuple[Batch, dict[str, Any]]:
        batch = next(self._next)
        return batch, self._read_place()

    def _read_place(self) -> dict[str, Any]:
        # Of others, the number of batches says it all.
        return self.batches.state_dict() if isinstance(self.batches, PlacedBatches) else {}


def merge_places(places: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return where a stream is in the data, from what the `state_dict` of every process says of its own part."""
    merged = dict(places[0])
    for place in places[1:]:
        for name, value in place.items():
            if isinstance(value, Mapping):
                merged[name] = {**merged[name], **value}
    return merged


def read_first(batches: Iterable[Batch], count: int) -> list[Batch]:
    """Return the first batches, fewer where there are fewer. Raises `TrainingError` where there is none."""
    found = list(itertools.islice(make_batches(batches, None), count))
    if not found:
        raise TrainingError("There are no held-out batches: give some, or None.")
    return found


def repeat_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches over and over. Raises `TrainingError` where they end and cannot be read again."""
    while True:
        is_empty = True
        for batch in batches:
            is_empty = False
            yield batch
        # An iterator gives itself when asked for one, and is used up.
        if is_empty or iter(batches) is batches:
            raise TrainingError(
                "The batches ran out before the last step. Pass a dataset or list, which can be read again, an "
                "endless iterator, or ask for fewer steps."
            )
