"""Every operator, found by its file name here or through the entry point group `diffusers_graft.operators`."""
from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from importlib.metadata import entry_points
from typing import Any

from ..errors import OperatorError, UnknownNameError
from .base import (
    AttentionOperator,
    BlockOperator,
    BlockPairOperator,
    FeedForwardOperator,
    LinearPair,
    Mixer,
    Operator,
    OperatorConfig,
    Projections,
)

__all__ = [
    "AttentionOperator", "BlockOperator", "BlockPairOperator", "FeedForwardOperator", "LinearPair", "Mixer", "Operator",
    "OperatorConfig", "Projections", "available", "configure", "get",
]  # fmt: skip

_GROUP = "diffusers_graft.operators"
_NOT_OPERATORS = ("base", "conformance")


def _built_in() -> set[str]:
    names = {module.name for module in pkgutil.iter_modules(__path__)}
    return {name for name in names if name not in _NOT_OPERATORS and not name.startswith("_")}


def _plugins() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=_GROUP)}


def available() -> tuple[str, ...]:
    """Names of all operators, without importing any of them."""
    return tuple(sorted(_built_in() | set(_plugins())))


def get(name: str) -> type[Operator]:
    """The operator class of that name. Raises `UnknownNameError` with the nearest name."""
    if name in _built_in():
        return _only_operator_in(importlib.import_module(f"{__name__}.{name}"))
    plugins = _plugins()
    if name not in plugins:
        raise UnknownNameError("operator", name, available())
    operator = plugins[name].load()
    operator = operator if isinstance(operator, type) else _only_operator_in(operator)
    if operator.name != name:
        raise OperatorError(f"Entry point {name!r} leads to the operator {operator.name!r}: name its file {name}.py.")
    return operator


def configure(spec: str | OperatorConfig | dict[str, Any]) -> OperatorConfig:
    """A config from a name, a config, or a dict `{"operator": name, **settings}`.

    Raises `UnknownNameError` for an unknown operator or setting, `OperatorError` for a value it refuses.
    """
    if isinstance(spec, OperatorConfig):
        return spec
    if isinstance(spec, str):
        return get(spec).Config()
    if not isinstance(spec, dict) or "operator" not in spec:
        raise OperatorError(f'An operator is a name, a Config, or a dict with the key "operator"; got {spec!r}.')
    return _configured(get(spec["operator"]), spec)


def _configured(operator: type[Operator], spec: dict[str, Any]) -> OperatorConfig:
    """The config that `OperatorConfig.to_dict` wrote, for an operator that need not be registered."""
    settings = {name: value for name, value in spec.items() if name != "operator"}
    names = {field.name for field in dataclasses.fields(operator.Config)}
    for name in settings:
        if name not in names:
            raise UnknownNameError(f"setting of {operator.name}", name, names)
    return operator.Config(**{name: _frozen(value) for name, value in settings.items()})


def _frozen(value: Any) -> Any:
    """JSON has no tuples; frozen configs have no lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _only_operator_in(module) -> type[Operator]:
    found = [
        item for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Operator) and item.__module__ == module.__name__
    ]  # fmt: skip
    if len(found) != 1:
        raise OperatorError(f"{module.__name__} defines {len(found)} operators; a file defines exactly one.")
    return found[0]


def __getattr__(name: str) -> type[Operator]:
    """`operators.HyenaX` is `operators.get("hyena_x")`."""
    file_name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    if name[:1].isupper() and file_name in available():
        return get(file_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
