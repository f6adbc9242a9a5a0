"""Identity of a run: everything that decides its weights, so that a checkpoint is continued by the same run alone.

Tensors and samples are recognized by digests of their values. Of a large tensor only evenly spaced values are
read: another base model or data set differs in nearly all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sized
from typing import Any, cast

import torch
from diffusers import ModelMixin
from torch.utils.data import RandomSampler, SequentialSampler

from ..errors import TrainingError
from ..injection.graft import Graft, base_tensors
from .batches import Batch, BatchStream, PlacedBatches, SequentialBatches, ShuffledBatches, read_first
from .config import TrainingConfig
from .noised_batch import Noising
from .random_state import seeded

# Data that cannot be read twice may be random by design, so a difference there is reported and does not stop a run.
UNVERIFIED = "unverified"

_MOST_VALUES = 4096
_DIGEST_LENGTH = 12
# Training batches that held-out ones are compared with.
_MOST_COMPARED = 64


def describe_run(
    stage: str,
    config: TrainingConfig,
    graft: Graft,
    model: ModelMixin,
    noising: Noising,
    stream: BatchStream,
    held_out: Iterable[Batch] | None,
) -> dict[str, Any]:
    """Return everything that decides the weights of a run, JSON-able.

    Args:
        stage: `"one"` or `"two"`.
        model: with or without its graft; the weights of the base model are described.
        stream: at its first batch, which is read and not used up.
    """
    null_prompt = None
    if noising.null_prompt is not None:
        null_prompt = digest(noising.null_prompt)
    data, unverified = _describe_data(stream)
    if held_out is not None:
        unverified["held-out batches"] = digest(list(held_out))
    return {
        "stage": stage,
        "config": config.identity(),
        "plan": graft.plan.to_dict(),
        "base model": digest(base_tensors(model)),
        "noise scheduler": _describe_scheduler(noising.scheduler),
        "null prompt": null_prompt,
        "data": data,
        UNVERIFIED: unverified,
    }


def read_held_out(held_out: Iterable[Batch] | None, count: int, stream: BatchStream) -> list[Batch] | None:
    """Return the first held-out batches, None without any.

    Raises `TrainingError` where there is none to read, and where they are training data: of the same dataset, or among
    the first batches of the stream.
    """
    if held_out is None:
        return None
    found = read_first(held_out, count)
    first = [stream.peek()]
    if isinstance(stream.batches, list | tuple):
        first = stream.batches[:_MOST_COMPARED]
    if _read_same_dataset(held_out, stream.batches) or not set(map(digest, found)).isdisjoint(map(digest, first)):
        raise TrainingError(
            "The held-out batches are training data, on which a model looks better than it is: hold others out, or "
            "give none."
        )
    return found


def _read_same_dataset(*sources: Any) -> bool:
    """Return whether two sources of batches read one dataset, both of them all of it."""
    datasets = [getattr(source, "dataset", None) for source in sources]
    if datasets[0] is None or datasets[0] is not datasets[1]:
        return False
    # Other samplers may choose a part, each another one.
    samplers = [getattr(source, "sampler", None) for source in sources]
    return all(isinstance(sampler, RandomSampler | SequentialSampler | None) for sampler in samplers)


def find_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return in words how two identities differ, by the dotted name of what differs."""
    before = flatten(saved)
    after = flatten(now)
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return {name: f"{name} was {before.get(name)!r} and is {after.get(name)!r}" for name in names}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted names, those of lists under numbers."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def digest(value: Any) -> str:
    """Return a short digest of nested tensors, numbers and texts; objects of other kinds count by their type."""
    hasher = hashlib.sha256()
    _update(hasher, value)
    return hasher.hexdigest()[:_DIGEST_LENGTH]


def _update(hasher: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        hasher.update(f"{value.dtype} {tuple(value.shape)}".encode())
        # Quantised weights are subclasses whose values cannot be read so, and meta tensors have none.
        if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta:
            flat = value.detach().reshape(-1)
            chosen = flat[:: max(1, len(flat) // _MOST_VALUES)].contiguous().cpu()
            hasher.update(chosen.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        # A grafted model lists the same tensors in another order.
        for name, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            hasher.update(f"{name}:".encode())
            _update(hasher, item)
    elif isinstance(value, list | tuple):
        hasher.update(f"[{len(value)}]".encode())
        for item in value:
            _update(hasher, item)
    elif value is None or isinstance(value, bool | int | float | str):
        hasher.update(repr(value).encode())
    else:
        hasher.update(type(value).__name__.encode())


def _describe_scheduler(scheduler: Any) -> dict[str, Any] | None:
    """Return class and settings of a scheduler, without the places and versions that it came from."""
    if scheduler is None:
        return None
    settings = {name: str(value) for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"class": type(scheduler).__name__, **settings}


def _describe_data(stream: BatchStream) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is known of the training data for certain, and what may be another at every reading."""
    batches = stream.batches
    if isinstance(batches, ShuffledBatches):
        facts: dict[str, Any] = {"samples": len(cast(Sized, batches.dataset))}
        facts |= {"batch size": batches.batch_size, "seed": batches.seed}
        first = 0
        middle = facts["samples"] // 2
        last = facts["samples"] - 1
        # A dataset may draw its augmentations from torch's generator.
        with seeded(0, torch.device("cpu")):
            start = digest(batches.dataset[first])
            rest = digest([batches.dataset[middle], batches.dataset[last]])
            is_fixed = digest(batches.dataset[first]) == start
        # Other generators give another sample at every reading, which no digest can recognize.
        if is_fixed:
            facts["content"] = f"{start} {rest}"
        return facts, {}
    if isinstance(batches, list | tuple) and batches:
        content = digest([batches[0], batches[len(batches) // 2], batches[-1]])
        return {"batches": len(batches), "content": content}, {}
    first = stream.peek()
    if not isinstance(batches, PlacedBatches | SequentialBatches):
        return {}, {"first batch": digest(first)}
    # The first process reads the first sample, whatever their number; what else it reads depends on that.
    sample = {name: value[:1] for name, value in first.items() if isinstance(value, torch.Tensor)}
    facts = batches.describe() if isinstance(batches, PlacedBatches) else {"batch size": batches.batch_size}
    return facts, {"first sample": digest(sample)}
