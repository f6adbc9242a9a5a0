"""Files: written so that a killed process leaves the old ones or the new ones, and read only where they are regular.

A write takes two steps. `write_text` and `write_tensors` put bytes on the disk; `replace_file`, `replace_files` and
`create_folder` put what was written in its place, when all of it is there. `pack` and `unpack` carry nested values
with tensors in them through a safetensors file and JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import FileError

_DISK_ERRORS = (OSError, SafetensorError, UnicodeEncodeError)

_TEMPORARY = ".saving-"
_DECIDED = ".saved"
_STALE = ".stale"
_ONE_DAY = 86_400

_LARGEST_TEXT = 32 * 2**20
# Reading it recurses, and so does what reads it afterwards.
_DEEPEST_JSON = 64
# An item of JSON takes 60 to 150 bytes of memory, and may take only 2 in the file.
_MOST_JSON_ITEMS = 500_000
_LARGEST_JSON_INTEGER = 2**64
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@contextlib.contextmanager
def open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Raises `FileError` for one that is missing, and for a folder, pipe, socket or device, without waiting for it.
    """
    path = Path(path)
    try:
        # Opening a pipe waits for its writer unless asked not to.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileError(f"There is no {path.name} in {path.parent.absolute()}.") from error
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {error}.") from error
    # Asked of what was opened: what lies at the path may change meanwhile.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{path} is not a regular file, and nothing else is read. Put the file itself there.")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def require_regular(path: str | Path) -> None:
    """Raise `FileError` unless `path` is a regular file that can be read."""
    with open_regular(path):
        pass


def sha256_of(path: str | Path) -> str:
    """Return the digest of a file, which may be larger than memory. Raises `FileError` as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]  # a file is one


def read_bytes(path: str | Path, *, limit: int = _LARGEST_TEXT) -> bytes:
    """Read a file of at most `limit` bytes. Raises `FileError` for a larger one, or one that is not regular."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FileError(f"{path} has more than {limit:,} bytes, which no such file has.")
    return data


def read_text(path: str | Path, *, limit: int = _LARGEST_TEXT, errors: str = "strict") -> str:
    """Read UTF-8 text of at most `limit` bytes.

    Args:
        errors: as in `bytes.decode`, what to do about bytes that are no text.

    Raises `FileError` for a file that is missing, larger, not regular, or no text.
    """
    try:
        return read_bytes(path, limit=limit).decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is damaged: it is not text ({error}).") from error


def read_json(path: str | Path, *, limit: int = _LARGEST_TEXT) -> dict[str, Any]:
    """Read a JSON object. Raises `FileError` as `read_text` and `parse_json`."""
    return parse_json(read_text(path, limit=limit), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        where: the place of the text, for messages.

    Raises `FileError` for text that is no JSON object, too long, nested too deep, of more items than fit the memory
    that a text of its length may take, with numbers that are not finite, or with characters that no file can hold.
    """
    if len(text) > _LARGEST_TEXT:
        raise FileError(f"{where} holds {len(text):,} characters; a description has at most {_LARGEST_TEXT:,}.")
    # Counted before anything is built. Commas within texts count too, which costs nothing but room.
    items = text.count(",") + text.count("[") + text.count("{")
    if items > _MOST_JSON_ITEMS:
        raise FileError(f"{where} holds {items:,} items; a description has at most {_MOST_JSON_ITEMS:,}.")
    try:
        data = json.loads(text, parse_constant=_refuse_number, parse_float=_finite_float, parse_int=_bounded_integer)
        is_deep = _depth(data) > _DEEPEST_JSON
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        is_deep = True
    except ValueError as error:
        raise FileError(f"{where} is damaged: it is not JSON ({error}).") from error
    if is_deep:
        raise FileError(f"{where} is nested deeper than {_DEEPEST_JSON} levels; nothing of ours is.")
    if not isinstance(data, dict):
        raise FileError(f"{where} is damaged: it holds no JSON object.")
    return data


def _refuse_number(text: str) -> None:
    raise ValueError(f"{text[:40]} is not a finite number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _refuse_number(text)
    return number


def _bounded_integer(text: str) -> int:
    number = int(text)
    if abs(number) > _LARGEST_JSON_INTEGER:
        raise ValueError(f"{text[:40]} is larger than any number that is written here")
    return number


def _depth(data: Any) -> int:
    children: Iterable[Any] = ()
    if isinstance(data, dict):
        children = data.values()
    elif isinstance(data, list):
        children = data
    return 1 + max(map(_depth, children), default=0)


@contextlib.contextmanager
def open_tensors(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file, as `safetensors.safe_open` gives it.

    Raises `FileError` for one that is missing or damaged, and for what goes wrong while it is read inside the block.
    """
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise FileError(f"{path} is damaged ({error}). Download or save it again.") from error


def read_header(path: str | Path) -> dict[str, str]:
    """Read the metadata of a safetensors file. Raises `FileError` for one that is missing or damaged."""
    with open_tensors(path) as file:
        return file.metadata() or {}


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file, onto the CPU. Raises `FileError` for one that is missing or damaged."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write text, on the disk when this returns."""
    with path.open("w", encoding="utf-8", errors=errors) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def append_text(path: str | Path, text: str) -> None:
    """Add text to a file, which is made where there is none. Raises `FileError` where it cannot be written."""
    path = Path(path)
    with _explained(f"{path} cannot be written"):
        # Opening a pipe for writing waits for its reader.
        _require_replaceable(path)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, on the disk when this returns.

    Args:
        tensors: on any device; those that share memory are stored once for every name.
        header: texts for the file's metadata.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in separate_memory(tensors).items()}
    save_file(ready, path, metadata={"format": "pt", **(header or {})})
    _flush(path)
    # safetensors writes files that nobody but their owner can read.
    path.chmod(0o644)


def separate_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share memory with an earlier one, since safetensors refuses such."""
    seen: set[int] = set()
    separate: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            tensor = tensor.clone()
        separate[name] = tensor
        seen.add(place)
    return separate


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Replace a JSON file. Raises `FileError` where it cannot be written; what was there before is then unchanged."""
    path = Path(path)
    try:
        text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise FileError(f"{path} cannot be written: JSON has no numbers that are not finite ({error}).") from error
    with replace_file(path) as temporary:
        write_text(temporary, text)


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Give a file to write to, which takes the place of `path` when the block ends.

    Raises `FileError` where it cannot be written, or where `path` is not a regular file; what was there before is then
    unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _explained(f"{path} cannot be written", "What was there before is unchanged."):
            _require_replaceable(path)
            # A pipe may wait under this name, which opening would follow.
            temporary.unlink(missing_ok=True)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def create_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `path` when the block ends.

    Raises `FileError` where it cannot be written, or where `path` is there already.
    """
    path = Path(path)
    temporary = waiting_folder(path)
    try:
        with _explained(f"{path} cannot be written"):
            if path.exists():
                raise FileError(f"{path} is there already. Give another folder, or move that one away.")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            _flush_folder(temporary)
            temporary.rename(path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def waiting_folder(path: Path) -> Path:
    """Return the folder that `create_folder` gives to write into, for processes that write there together."""
    return path.with_name(f"{_TEMPORARY}{path.name}")


@contextlib.contextmanager
def replace_files(folder: str | Path, *, stale: Iterable[str] = ()) -> Iterator[Path]:
    """Give a folder to write into, whose files take their places in `folder` together when the block ends.

    One rename decides. A process killed before it leaves the old files; one killed after it leaves the new files
    waiting in `.saved`, and `finish_save`, which every reader calls, puts them in place.

    Args:
        stale: names of files that go when the new ones come, unless they are among these.

    Raises `FileError` where something cannot be written, and where a file would take the place of something that is
    no regular file; what the folder held is then unchanged.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file. Give a folder.")
    with _explained(f"{folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        finish_save(folder)
        _remove_abandoned(folder)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder))
    try:
        with _explained(f"{folder} could not be written", "What was saved there before is unchanged."):
            yield temporary
            names = {path.name for path in temporary.iterdir()}
            for name in sorted(names):
                _require_replaceable(folder / name)
            write_text(temporary / _STALE, "\n".join(sorted(set(stale) - names)))
            _flush_folder(temporary)
            temporary.rename(folder / _DECIDED)
            _flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    finish_save(folder)


def finish_save(folder: str | Path) -> None:
    """Put the files of a save in place that was interrupted after it was decided."""
    folder = Path(folder)
    decided = folder / _DECIDED
    if decided.is_symlink() or not decided.is_dir():
        return
    try:
        stale: list[str] = []
        # It may be gone, where another reader is putting the same files in place.
        if (decided / _STALE).exists():
            stale = read_text(decided / _STALE).split("\n")
        for path in sorted(decided.iterdir()):
            if path.name != _STALE:
                os.replace(path, folder / path.name)
        # The folder may come from somebody else, so its list of names must not reach other folders.
        for name in filter(is_plain_name, stale):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(decided)
    except FileNotFoundError:
        return  # another reader was faster
    except OSError as error:
        raise FileError(f"{decided} holds a save that was interrupted and cannot be finished: {error}") from error


@contextlib.contextmanager
def _explained(failure: str, advice: str = "") -> Iterator[None]:
    """Turn errors of the disk inside the block into a `FileError` of these words."""
    try:
        yield
    except FileError:
        raise
    except _DISK_ERRORS as error:
        raise FileError(f"{failure}: {error}. {advice}".rstrip()) from error


def is_plain_name(name: str) -> bool:
    """Return whether a name is that of a file in its folder: no path, nothing hidden."""
    if not name or name.startswith(".") or name != Path(name).name:
        return False
    return "\\" not in name and "\0" not in name


def _require_replaceable(path: Path) -> None:
    """Raise `FileError` where something is at `path` that is not a regular file; a link is followed."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise FileError(f"{path} is not a regular file, and nothing else is written over. Move it away.")


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes left that were killed before their decision."""
    for temporary in folder.glob(f"{_TEMPORARY}*"):
        # A younger one may belong to a process that is still writing.
        if temporary.stat().st_mtime < time.time() - _ONE_DAY:
            shutil.rmtree(temporary, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    """Bring the files of a folder onto the disk, then the entries of the folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    """Bring the content of a file, or the entries of a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack(value: Any, name: str = "") -> tuple[Any, dict[str, torch.Tensor]]:
    """Split a nested value into JSON and tensors.

    Args:
        value: dicts, lists and tuples of tensors, texts, numbers, booleans and None.
        name: prefix of the tensors' names, which are their places: `inputs.timestep`, `state.0.exp_avg`.

    Raises `FileError` for an item of another type.

    >>> pack({"sample": torch.zeros(2), "size": (8, 8)})
    ({'dict': [['sample', {'tensor': 'sample'}], ['size', {'tuple': [8, 8]}]]}, {'sample': tensor([0., 0.])})
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _pack(value, name, tensors)
    return structure, tensors


def _pack(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # Two places may share a name, since keys may hold dots.
        while not name or name in tensors:
            name = f"{name}_"
        tensors[name] = value.detach()
        return {"tensor": name}
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping):
        # As pairs, since keys of JSON are texts.
        return {"dict": [[key, _pack(item, f"{prefix}{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{prefix}{number}", tensors) for number, item in enumerate(value)]
        # JSON has lists alone, and some models take a tuple for nothing else.
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FileError(f"A value of type {type(value).__name__} cannot be stored.")


def unpack(structure: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Put a value together again from what `pack` returned.

    Raises `ValueError`, `LookupError` or `TypeError` for a structure that `pack` did not make.
    """
    if isinstance(structure, list):
        return [unpack(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    # Checkpoints and proofs of the first versions say "items" and "list".
    if kind in ("dict", "items"):
        return {key: unpack(item, tensors) for key, item in content}
    if kind in ("tuple", "list"):
        items = [unpack(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    raise ValueError(f"{kind!r} is not a kind of value")


def nest(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Put tensors under dotted names, as `pack` names them, into nested dicts.

    >>> nest({"sample": 1, "added.size": 2})
    {'sample': 1, 'added': {'size': 2}}
    """
    nested: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *outer, last = name.split(".")
        place = nested
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = tensor
    return nested
