"""Batches of training data: shuffled, counted and read over and over, in an order that a resumed run can take up again.

A batch is a dict. With a `sample` (latents [B, C, ...]) the rest are conditioning arguments under the model's own
names, and a noise scheduler noises the sample afresh each time. Without, or with a `timestep`, it is a set of model
arguments used as it is, with the `target` of stage two among them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import TrainingError

Batch = Mapping[str, Any]


class ShuffledBatches:
    """Endless batches of a map-style dataset (torch's, or of the `datasets` library), shuffled anew each epoch.

    Order depends on `seed` alone, so a run that is resumed reads no sample of those it has had.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, *, workers: int = 0):
        self.dataset, self.batch_size, self.seed, self.workers, self._start = dataset, batch_size, seed, workers, 0
        if batch_size < 1 or not len(dataset):
            raise TrainingError(
                f"A batch has one sample or more; got batches of {batch_size} out of {len(dataset)} samples."
            )

    def start_at(self, batch: int) -> None:
        """Begin the next reading at the batch of this number."""
        self._start = batch

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size or 1

    def __iter__(self) -> Iterator[Batch]:
        own = torch.Generator().manual_seed(
            self.seed
        )  # of workers' seeds, which would be drawn from torch's generator
        yield from DataLoader(
            self.dataset, batch_sampler=self._indices(self._start), num_workers=self.workers, generator=own
        )

    def _indices(self, start: int) -> Iterator[list[int]]:
        full = len(self)
        epoch, skipped = divmod(start, full)
        while True:
            order = torch.randperm(
                len(self.dataset), generator=torch.Generator().manual_seed(self.seed + epoch)
            ).tolist()
            chunks = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(full)]
            yield from chunks[skipped:]
            epoch, skipped = epoch + 1, 0


def make_batches(
    dataset: Dataset | Iterable, batch_size: int | None, seed: int = 0, *, workers: int = 0
) -> Iterable[Batch]:
    """Batches of single samples of a map-style dataset; a list or any other iterable holds batches, passed on as they
    come.

    Raises `TrainingError` for single samples without a `batch_size`.
    """
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, list | tuple | Mapping | IterableDataset):
        return dataset
    if batch_size is None:
        raise TrainingError(
            "Stages take batches, this holds single samples: pass a DataLoader of it, or use a GraftTrainer."
        )
    return ShuffledBatches(dataset, batch_size, seed, workers=workers)


class BatchStream:
    """Batches one after the other, over and over, by number.

    Attributes:
        position: batches taken so far.
    """

    def __init__(self, batches: Iterable[Batch]):
        self.batches, self.position, self._next = make_batches(batches, None), 0, repeat_batches(batches)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._next)
        self.position += 1
        return batch

    @property
    def epoch(self) -> float | None:
        """How often the batches were read, a fraction within an epoch; None where their number is not known."""
        return self.position / len(self.batches) if isinstance(self.batches, Sized) else None

    def peek(self) -> Batch:
        """The next batch, not yet taken."""
        batch = next(self._next)
        self._next = itertools.chain([batch], self._next)
        return batch

    def seek(self, position: int) -> None:
        """Go on to a later batch: at once where the batches have `start_at`, else by reading those before it."""
        if hasattr(self.batches, "start_at"):
            self.batches.start_at(position)
            self._next, self.position = repeat_batches(self.batches), position
        while self.position < position:
            next(self)


def read_first(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The first batches, fewer where there are fewer. Raises `TrainingError` where there is none."""
    if not (found := list(itertools.islice(make_batches(batches, None), count))):
        raise TrainingError("There are no held-out batches: give some, or None.")
    return found


def repeat_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches over and over. An iterator that ends is an error, since it cannot be started again."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty or iter(batches) is batches:
            raise TrainingError(
                "The batches ran out before the last step. Pass a dataset or list, which can be read again, an endless "
                "iterator, or ask for fewer steps."
            )
