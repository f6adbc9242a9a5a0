"""Training sets on disk: a folder of safetensors shards, `dataset.json`, and what all samples share.

Every shard depends on its number and the seed alone and is put in place when it is complete, so the same call finishes
what an interrupted one began.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..core.progress import hide_bar
from ..core.storage import (
    nest,
    open_tensors,
    pack,
    read_header,
    read_json,
    read_tensors,
    replace_file,
    unpack,
    write_json,
    write_tensors,
)
from ..errors import FileError, StateError, TrainingError
from ..training.batches import Row, Shared

FACTS = "dataset.json"
SHARED = "shared.safetensors"
# Between name and number of a tensor that is one row: rows of different sizes cannot be one tensor.
_ROW = "#"


class Shards(Dataset):
    """Samples of a folder of shards, each `{"sample": latents, **conditioning}`, read from disk one by one.

    Any `torch.utils.data.DataLoader` makes batches of them; conditioning that all samples share is not repeated there.

    Raises `FileError` for a folder that is no such set, or not finished.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.facts = read_json(self.folder / FACTS)
            spans = _split(self.facts["samples"], self.facts["shard_size"])
        except (FileError, LookupError, TypeError) as error:
            raise FileError(
                f"There is no training set in {folder}: from_pipeline and encode of dg.data make one."
            ) from error
        self._starts = [span.start for span in spans]
        self._paths = [_path_of(self.folder, span) for span in spans]
        missing = [path.name for path in self._paths if not path.exists()]
        if missing:
            raise FileError(f"{folder} is not finished: {missing[0]} is missing. Repeat the call that began it.")
        self._common = _Common(self.folder)

    def __len__(self) -> int:
        return self.facts["samples"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        shard = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[shard]
        try:
            # Opened anew for every sample: open files cannot be handed to the workers of a DataLoader.
            with open_tensors(self._paths[shard]) as file:
                values = {}
                for name in file.keys():  # noqa: SIM118
                    column, is_row, number = name.partition(_ROW)
                    if not is_row:
                        values[column] = file.get_slice(name)[row]
                    elif int(number) == row:
                        values[column] = file.get_tensor(name)
        except (FileError, ValueError) as error:
            raise FileError(
                f"{self._paths[shard]} is damaged ({error}). Delete it and run the call that made it."
            ) from error
        return nest(self._common.complete(values))


class _Common:
    """Values that all samples of a set share, and the layout of the others.

    Attributes:
        shared: conditioning that is the same for all samples, by dotted name.
        rows: axis along which a batch joins the values of a name, None for lists; see `Row`.
        constants: values in `rows` that are the same for every sample.
        lists: names of lists of tensors, each of which has a row for every sample.
    """

    def __init__(self, folder: Path):
        self.path = folder / SHARED
        self.shared: dict[str, Any] = {}
        self.rows: dict[str, int | None] = {}
        self.constants: dict[str, Any] = {}
        self.lists: dict[str, int] = {}
        if self.path.exists():
            try:
                content = unpack(json.loads(read_header(self.path)["content"]), read_tensors(self.path))
                self.shared = content["shared"]
                self.rows = content["rows"]
                self.constants = content["constants"]
                self.lists = content["lists"]
            except (LookupError, ValueError, TypeError) as error:
                raise FileError(f"{self.path} is damaged ({error}). Make the set again in another folder.") from error

    def complete(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values of one sample with those that all samples share."""
        values |= self.constants
        for name, axis in self.rows.items():
            values[name] = Row(values[name], axis)
        for name, length in self.lists.items():
            values[name] = [values.pop(f"{name}.{number}") for number in range(length)]
        return values | {name: Shared(value) for name, value in self.shared.items()}

    def separate(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """Return the values that differ from sample to sample, and remember the others.

        Raises `TrainingError` where it is not the same as in earlier batches.
        """
        columns: dict[str, torch.Tensor | list[torch.Tensor]] = {}
        for name, value in batch.items():
            if isinstance(value, Shared):
                self._remember(self.shared, name, value.value)
            elif isinstance(value, list) and isinstance(value[0], torch.Tensor):
                self.lists[name] = len(value)
                columns |= {f"{name}.{number}": tensor.cpu() for number, tensor in enumerate(value)}
            elif isinstance(value, list):
                self.rows[name] = value[0].axis
                if all(isinstance(row.value, torch.Tensor) for row in value):
                    columns[name] = [row.value.cpu() for row in value]
                else:
                    # Sizes of images, for example, which are stored once for a set.
                    for row in value:
                        self._remember(self.constants, name, row.value)
            else:
                columns[name] = value.cpu()
        return columns

    def write(self) -> None:
        """Write the file, where there is something to write. Raises `FileError` where that fails."""
        if not any(self._content().values()):
            return
        content, tensors = pack(self._content())
        with replace_file(self.path) as temporary:
            write_tensors(temporary, tensors, {"content": json.dumps(content)})

    def _content(self) -> dict[str, Any]:
        return {"shared": self.shared, "rows": self.rows, "constants": self.constants, "lists": self.lists}

    def _remember(self, values: dict[str, Any], name: str, value: Any) -> None:
        if name not in values:
            values[name] = value
        elif not _is_same(values[name], value):
            raise TrainingError(
                f"The conditioning {name} has no row for each sample, and differs from one call of the pipeline to "
                "the next. Make sets of one size, or make the batches yourself, as dicts of a sample and conditioning."
            )


def write_shards(
    folder: Path,
    samples: int,
    shard_size: int,
    made: Mapping[str, Any],
    make: Callable[[range], Iterator[Mapping[str, Any]]],
    *,
    progress: bool,
) -> Shards:
    """Make the shards of a set that are not there yet.

    Args:
        samples: their number.
        made: settings that decide the samples, JSON-able; a folder with a set of other settings is refused.
        make: yields batches of the samples of these numbers: tensors [B, ...], lists of them, lists of `Row`, or
            `Shared` values.
        progress: show a bar on a terminal.

    Raises:
        FileError: a folder or a shard that cannot be written.
        StateError: the folder holds a set made with other settings.
        TrainingError: shared conditioning that differs from batch to batch.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder} cannot be written ({error}). Give a folder.") from error
    # Through JSON, so that it can be compared with what the file gives back.
    facts = {"samples": samples, "shard_size": shard_size, **json.loads(json.dumps(made))}
    if any(folder.glob("samples-*.safetensors")):
        _require_same_settings(folder, facts)
    else:
        # Left by a call that wrote no shard, perhaps with other settings.
        (folder / SHARED).unlink(missing_ok=True)
    write_json(folder / FACTS, facts)
    common = _Common(folder)
    with tqdm(total=samples, desc="training set", unit="sample", disable=hide_bar(progress)) as bar:
        for span in _split(samples, shard_size):
            if _path_of(folder, span).exists():
                bar.update(len(span))
                continue
            batches = []
            for batch in make(span):
                batches.append(common.separate(_flatten(batch)))
                bar.update(len(batch["sample"]))
            # Before the first shard: samples of a shard cannot be read without it.
            common.write()
            with replace_file(_path_of(folder, span)) as temporary:
                write_tensors(temporary, _join(batches))
    return Shards(folder)


def _require_same_settings(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise `StateError` where the folder holds a set made with other settings; its number of samples may differ."""
    there = read_json(folder / FACTS)
    differing = [name for name in facts if name != "samples" and there.get(name) != facts[name]]
    if differing:
        raise StateError(
            f"{folder} holds a set made with other settings ({', '.join(differing)}). Give another folder."
        )


def _join(batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the tensors of a shard: columns of all batches, and rows under numbered names."""
    tensors: dict[str, torch.Tensor] = {}
    for name, first in batches[0].items():
        if isinstance(first, list):
            rows = itertools.chain.from_iterable(batch[name] for batch in batches)
            tensors |= {f"{name}{_ROW}{number}": row for number, row in enumerate(rows)}
        else:
            tensors[name] = torch.cat([batch[name] for batch in batches]).contiguous()
    return tensors


def _split(samples: int, size: int) -> list[range]:
    return [range(first, min(first + size, samples)) for first in range(0, samples, size)]


def _path_of(folder: Path, span: range) -> Path:
    return folder / f"samples-{span.start:08d}-{span.stop:08d}.safetensors"


def _flatten(batch: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dicts under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two nested values are equal, tensors in them too."""
    structure, tensors = pack(one)
    other_structure, other_tensors = pack(other)
    if structure != other_structure:
        return False
    return all(torch.equal(tensor.cpu(), other_tensors[name].cpu()) for name, tensor in tensors.items())
