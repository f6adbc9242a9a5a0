"""Recipes from YAML and options, checked key by key, and back."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from .._version import __version__
from ..core.storage import read_text, write_text
from ..errors import FileError, GraftError, UnknownNameError
from ..training.finetune.config import resolve_annotations
from .schema import Recipe

RECIPE = "recipe.yaml"

# A recipe is checked by the annotations of our classes.
resolve_annotations()


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a YAML file, or its content as a mapping.
        overrides: options such as `["--finetune.steps", "500"]`, each over the key of its name.

    Raises `FileError` for a file that is no YAML, `UnknownNameError` for a key that no recipe has, and `GraftError`
    for a value that its key does not take.
    """
    where = "The recipe"
    data: Any = source
    if not isinstance(source, Mapping):
        where = str(source)
        data = _read_yaml(Path(source))
    values = _expand(_override(_copy(data), overrides))
    _check_keys(values, Recipe)
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        raise GraftError(f"{where}: {_explain(error)}") from error
    except GraftError as error:
        raise type(error)(f"{where}: {error}") from error


def dump_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML, with every key but those that are empty unless given."""
    text = yaml.safe_dump(_to_plain(recipe), sort_keys=False, allow_unicode=True, width=100)
    return f"# diffusers-graft {__version__}: diffusers-graft train {RECIPE}\n{text}"


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """Write `recipe.yaml` into a folder. Raises `FileError` where that fails."""
    try:
        write_text(folder / RECIPE, dump_recipe(recipe))
    except yaml.YAMLError as error:
        raise GraftError(f"The recipe holds a value that YAML does not: {error}. Write it as text.") from error


def list_keys(cls: type = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield name, type with default, and meaning of every key of a recipe."""
    meanings = _read_meanings(cls)
    hints = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        nested = _find_dataclass(hints[one.name])
        name = f"{prefix}{one.name}"
        yield name, _describe_type(one, nested), meanings.get(one.name, "")
        # peft documents its own settings
        if nested is not None and _is_ours(nested):
            yield from list_keys(nested, f"{name}.")


def _read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises `FileError` for anything else."""
    try:
        data = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise FileError(f"{path} is no YAML: {reason}") from error
    if not isinstance(data, dict):
        raise FileError(f"{path} holds no recipe: its keys are {', '.join(_names_of(Recipe))}.")
    return data


def _copy(value: Any) -> Any:
    """Return nested mappings as dicts of their own."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return value


def _override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set the keys that options name. Raises `GraftError` for what is no option, or one without a value."""
    waiting = list(overrides)
    while waiting:
        option = waiting.pop(0)
        name, equals, text = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not name:
            raise GraftError(f"{option!r} is no option: keys of a recipe are set as in --finetune.steps 500.")
        if not equals:
            if not waiting:
                raise GraftError(f"--{name} has no value: keys of a recipe are set as in --finetune.steps 500.")
            text = waiting.pop(0)
        *sections, key = name.replace("-", "_").split(".")
        place = values
        for section in sections:
            inner = place.get(section)
            if not isinstance(inner, dict):
                # A name alone stands for the section, as in `model: testbed:letters`.
                inner = {} if inner is None else {"name": inner}
                place[section] = inner
            place = inner
        place[key] = _read_value(text)
    return values


def _read_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        # Rules as text may look like broken YAML.
        return text


def _expand(values: dict[str, Any]) -> dict[str, Any]:
    """Write out what may be written short: the name of a model, and one seed for everything."""
    if isinstance(values.get("model"), str):
        values["model"] = {"name": values["model"]}
    # A stage that is not mentioned runs, under the seed of the recipe as well.
    for name in ("distill", "finetune", "evaluate"):
        section = values.setdefault(name, {})
        if isinstance(section, dict) and "seed" in values:
            section.setdefault("seed", values["seed"])
    return values


def _check_keys(values: Mapping[str, Any], cls: type, prefix: str = "") -> None:
    """Raise `UnknownNameError` for a key that a section does not have."""
    names = _names_of(cls)
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in names:
            where = f" of {prefix[:-1]}" if prefix else ""
            raise UnknownNameError(f"key{where} in a recipe", key, names)
        nested = _find_dataclass(hints[key])
        if nested is not None and isinstance(value, Mapping):
            _check_keys(value, nested, f"{prefix}{key}.")


def _names_of(cls: type) -> list[str]:
    return [one.name for one in dataclasses.fields(cls)]


def _find_dataclass(hint: Any) -> type | None:
    """Return the dataclass that a key takes, None where it takes other values."""
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _explain(error: ValidationError) -> str:
    """Return the first fault in one line: the key, what it takes, what it was given."""
    first = error.errors()[0]
    # Names of the types that were tried come after the key.
    parts = [str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int)]
    key = ".".join(parts)
    if first["type"] == "missing":
        return f"the key {key} is missing."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{key}: {message[:1].lower()}{message[1:]}; got {first['input']!r}."


def _to_plain(value: Any) -> Any:
    """Return nested settings as dicts and lists, without keys that are empty as they are by default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        is_ours = _is_ours(type(value))
        for one in dataclasses.fields(value):
            given = getattr(value, one.name)
            # peft's settings are many, and some of their values are of its own classes.
            default = _default_of(one) if is_ours else getattr(type(value)(), one.name)
            is_empty = default is None or default in ({}, ())
            if given != default or (is_ours and not is_empty):
                plain[one.name] = _to_plain(given)
        return plain
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    return value


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith(__name__.partition(".")[0])


def _default_of(one: dataclasses.Field) -> Any:
    if one.default_factory is not dataclasses.MISSING:
        return one.default_factory()
    return one.default


def _describe_type(one: dataclasses.Field, nested: type | None) -> str:
    kind = re.sub(r"\b(?:\w+\.)+", "", str(one.type))
    if nested is not None:
        kind = "section"
    default = _default_of(one)
    if default is dataclasses.MISSING:
        return f"{kind}, required"
    if nested is not None:
        return kind
    return f"{kind}, {default!r}"


def _read_meanings(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say about each attribute."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = (inspect.getdoc(base) or "").partition("Attributes:\n")
        for names, words in re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            meaning = " ".join(words.split())
            meanings |= dict.fromkeys(names.split(", "), meaning)
    return meanings
