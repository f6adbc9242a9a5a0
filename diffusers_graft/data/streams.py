"""Streams of samples that every process reads a part of, and that a resumed run goes on with where it was."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import default_collate

from ..errors import TrainingError
from ..training.batches import Batch, Collate, PlacedBatches, Sample, make_share, require_divisible
from ..training.distributed import process_state


class Stream:
    """Streamed data set of the `datasets` library, for a `GraftTrainer`.

    Its shards are dealt out to lanes, each of which is read by itself, over and over; sample j is the next one of lane
    j modulo their number. Processes share out the lanes, so each reads its own part of the data, and the order of the
    samples is the same however many processes there are.

    Args:
        dataset: a `datasets.IterableDataset`, as `load_dataset(..., streaming=True)` gives it.
        lanes: shards that are open at a time; as many as there are shards at most. Reading is shared out evenly where
            this is a multiple of the number of processes; otherwise some read samples that they do not need.
        shuffle: samples of a lane that are read at a time and shuffled. Unlike `dataset.shuffle`, whose buffer is lost
            when a run is stopped, so that its samples are read again from the first one.
        seed: of the shuffling.

    Raises `TrainingError` for another data set, or less than one lane.
    """

    def __init__(self, dataset: Any, *, lanes: int = 8, shuffle: int = 1, seed: int = 0):
        if not is_stream(dataset):
            raise TrainingError(
                "A Stream is made of a data set that load_dataset(..., streaming=True) of `datasets` gives; got "
                f"{type(dataset).__name__}. Pass others to the trainer as they are."
            )
        if lanes < 1 or shuffle < 1:
            raise TrainingError(f"A stream has one lane and reads one sample, or more; got {lanes}, {shuffle}.")
        self.dataset = dataset
        self.lanes = min(lanes, dataset.num_shards)
        self.shuffle = shuffle
        self.seed = seed

    def make_lane(self, number: int) -> _Lane:
        """Return a lane at its start."""
        # Every n-th shard rather than the first ones: sorted data would come in order.
        part = self.dataset.shard(self.lanes, number, contiguous=False)
        return _Lane(part, self.shuffle, self.seed + number)


def is_stream(dataset: Any) -> bool:
    """Return whether a data set is a stream of the `datasets` library, which need not be installed."""
    return all(hasattr(dataset, name) for name in ("shard", "num_shards", "state_dict", "load_state_dict", "__iter__"))


class StreamBatches(PlacedBatches):
    """Batches of a stream: endless, each process reading its own samples.

    Args:
        batch_size: samples of a batch, of all processes together.
        collate: makes a batch of a list of samples.

    Raises `TrainingError` for a batch that cannot be divided evenly.
    """

    def __init__(self, stream: Stream, batch_size: int, collate: Collate = default_collate):
        require_divisible(batch_size)
        self.stream = stream
        self.batch_size = batch_size
        self.collate = collate
        self.position = 0
        processes = process_state()
        # Sample j is of lane j % lanes and for process j % processes: the lanes that ever give this process one.
        step = math.gcd(stream.lanes, processes.num_processes)
        own = range(processes.process_index % step, stream.lanes, step)
        self.lanes = {number: stream.make_lane(number) for number in own}

    def __iter__(self) -> Iterator[Batch]:
        processes = process_state()
        while True:
            samples = []
            for _ in range(self.batch_size):
                lane = self.lanes.get(self.position % self.stream.lanes)
                if lane is not None:
                    sample = next(lane)
                    if self.position % processes.num_processes == processes.process_index:
                        samples.append(sample)
                self.position += 1
            yield make_share(samples, self.collate)

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.position, "lanes": {str(number): lane.place() for number, lane in self.lanes.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["samples"]
        for number, lane in self.lanes.items():
            lane.go_to(state["lanes"][str(number)])

    def describe(self) -> dict[str, Any]:
        stream = self.stream
        return {
            "lanes": stream.lanes,
            "shuffle": stream.shuffle,
            "seed": stream.seed,
            "batch size": self.batch_size,
        }


class _Lane:
    """Part of a stream, read over and over."""

    def __init__(self, part: Any, shuffle: int, seed: int):
        self.part = part
        self.shuffle = shuffle
        self.seed = seed
        # A block is read and shuffled at a time; this is where the one that is given out began.
        self.start: dict[str, Any] = {"epoch": 0, "read": 0, "part": None}
        self.block: list[Sample] = []
        self.given = 0
        self._open(epoch=0)

    def __next__(self) -> Sample:
        if self.given == len(self.block):
            self._read_block()
        self.given += 1
        return self.block[self.given - 1]

    def place(self) -> dict[str, Any]:
        """Return where this lane is, JSON-able."""
        return {**self.start, "given": self.given}

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Go to a place that `place` returned."""
        skipped = place["read"]
        if place["part"] is not None:
            self.part.load_state_dict(place["part"])
            skipped = 0
        self._open(place["epoch"])
        self.read = place["read"]
        for _ in itertools.islice(self.samples, skipped):
            pass
        self.block = []
        self.given = 0
        if place["given"]:
            self._read_block()
            self.given = place["given"]

    def _open(self, epoch: int) -> None:
        """Begin an epoch."""
        self.epoch = epoch
        self.read = 0
        # It shuffles its shards by the epoch, where it was asked to.
        self.part.set_epoch(epoch)
        self.samples = iter(self.part)

    def _read_block(self) -> None:
        block = self._read_samples()
        if not block:
            self._open(self.epoch + 1)
            block = self._read_samples()
        if not block:
            raise TrainingError("A lane of the stream holds no sample. Look at the shards of the data set.")
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch + self.read)
        order = torch.randperm(len(block), generator=generator).tolist()
        self.block = [block[number] for number in order]
        self.given = 0

    def _read_samples(self) -> list[Sample]:
        """Return the next samples of the epoch, none at its end."""
        self.start = {"epoch": self.epoch, "read": self.read, "part": None}
        if self.read and not _has_buffer(self.part):
            self.start["part"] = self.part.state_dict()
        block = list(itertools.islice(self.samples, self.shuffle))
        self.read += len(block)
        return block


def _has_buffer(part: Any) -> bool:
    """Return whether a stream shuffles in a buffer, whose samples its state leaves out."""
    inner: Any = getattr(part, "_ex_iterable", None)
    while inner is not None:
        if "Buffer" in type(inner).__name__:
            return True
        inner = getattr(inner, "ex_iterable", None)
    return False
