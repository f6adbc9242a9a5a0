"""Entries of a description: the kind of each is checked when it is read, since cards and later saves rely on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import FileError

# Entries that a full model repeats when it is loaded and saved again.
CARRIED = ("base", "settings", "scores", "imported", "about")

NUMBER = (int, float)


@dataclass(frozen=True)
class ListOf:
    """A list, all of one kind."""

    kind: Any


@dataclass(frozen=True)
class DictOf:
    """A dict of any keys, all values of one kind."""

    kind: Any


@dataclass(frozen=True)
class Record:
    """A dict with entries of known kinds; entries of other names may hold anything.

    Attributes:
        required, optional: kinds by name; an optional entry may also be None.
    """

    required: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)


_SCORES = DictOf(Record({"values": DictOf((int, float, str))}, {"protocol": dict}))
# Rows that cards show; what else the stages of training note may be of any kind.
_SITE_ROW = Record(
    {"site": str, "first_loss": NUMBER, "last_loss": NUMBER, "relative_error": NUMBER},
    {"held_out_loss": NUMBER, "held_out_error": NUMBER},
)
_HISTORY = ListOf(
    Record(
        optional={
            "stage": str,
            "steps": int,
            "samples": int,
            "seconds": NUMBER,
            "first_loss": NUMBER,
            "last_loss": NUMBER,
            "held_out_loss": NUMBER,
            "hardware": str,
            "sites": ListOf(_SITE_ROW),
        }
    )
)
_SPEED_ROW = Record(
    {"tokens": int, "name": str, "milliseconds": NUMBER, "ratio": NUMBER, "low": NUMBER, "high": NUMBER}
)
_ABOUT = Record(
    optional={
        "license": str,
        "license_name": str,
        "license_link": str,
        "datasets": ListOf(str),
        "sample_prompts": ListOf(str),
        "pipeline_tag": str,
        "speed": ListOf(_SPEED_ROW),
        "limits": str,
        "hardware": str,
    }
)
_BASE = Record(
    optional={
        "model_class": str,
        "name_or_path": str,
        "revision": str,
        "subfolder": str,
        "fingerprint": str,
        "float16_fingerprint": str,
        "parts": DictOf(str),
        "license": DictOf(str),
    }
)
_COMMON = {"format": int, "versions": DictOf(str), "plan": dict, "history": _HISTORY}
_CODE = DictOf(Record({"file": str, "sha256": str}))
_COMPRESSED = DictOf(Record({"method": str}, {"error": NUMBER, "bytes_before": int, "bytes_after": int}))
_GRAFT = Record(
    {**_COMMON, "base": _BASE, "checksum": str, "compressed": _COMPRESSED, "scores": _SCORES, "about": _ABOUT},
    {"files": ListOf(str), "code": _CODE, "lora": dict, "layers": DictOf(int)},
)
_FULL_MODEL = Record(
    _COMMON,
    {
        "base": _BASE,
        "checksum": str,
        "scores": _SCORES,
        "about": _ABOUT,
        "imported": Record({"from": str, "weights": str}, {"license": str}),
        "settings": list,
        "files": ListOf(str),
        "code": _CODE,
        "lora": dict,
        "model": str,
        "buffers": DictOf(str),
    },
)


def check_description(config: Any, where: str, *, is_full_model: bool) -> None:
    """Raise `FileError` for an entry that is missing or of another kind than a save of ours writes."""
    kind = _GRAFT
    if is_full_model:
        kind = _FULL_MODEL
    _check(config, kind, where, "description")


def _check(value: Any, kind: Any, where: str, name: str) -> None:
    if isinstance(kind, Record):
        _require(value, dict, where, name)
        for key, inner in kind.required.items():
            _check(value.get(key), inner, where, key)
        # An entry that came later is missing in older saves, and some are None where there is nothing to say.
        for key, inner in kind.optional.items():
            if value.get(key) is not None:
                _check(value[key], inner, where, key)
    elif isinstance(kind, ListOf):
        _require(value, list, where, name)
        for item in value:
            _check(item, kind.kind, where, f"entry of {name}")
    elif isinstance(kind, DictOf):
        _require(value, dict, where, name)
        for key, item in value.items():
            _check(item, kind.kind, where, f"{name}.{key}"[:80])
    else:
        _require(value, kind, where, name)


def _require(value: Any, kind: type | tuple[type, ...], where: str, name: str) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # True is an int to Python, and none to whoever reads a description.
    if isinstance(value, kinds) and not isinstance(value, bool):
        return
    expected = " or ".join(one.__name__ for one in kinds)
    raise FileError(f"{where} is damaged: its {name} is {type(value).__name__}, not {expected}.")
