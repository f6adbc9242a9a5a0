"""Every operator, found by its file name here or through the entry point group `diffusers_graft.operators`."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import re
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import OperatorError, RuleError, UnknownNameError
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
    "AttentionOperator",
    "BlockOperator",
    "BlockPairOperator",
    "FeedForwardOperator",
    "LinearPair",
    "Mixer",
    "Operator",
    "OperatorConfig",
    "Projections",
    "available",
    "configure",
    "get",
    "parse_operator",
]

_GROUP = "diffusers_graft.operators"
_NOT_OPERATORS = ("base", "conformance")


def _built_in() -> set[str]:
    names = {module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg}
    return {name for name in names if name not in _NOT_OPERATORS and not name.startswith("_")}


def _plugins() -> dict[str, EntryPoint]:
    points = {point.name: point for point in entry_points(group=_GROUP)}
    for name in sorted(points.keys() & _built_in()):
        warnings.warn(
            f"{_told(points.pop(name))} is not used: an operator here has that name. Give it another.", stacklevel=3
        )
    return points


def _told(point: EntryPoint) -> str:
    package = f" of the package {point.dist.name}" if point.dist else ""
    return f"The operator {point.name!r}{package} (entry point {point.value})"


def available() -> tuple[str, ...]:
    """Names of all operators, without importing any of them."""
    return tuple(sorted(_built_in() | set(_plugins())))


def get(name: str) -> type[Operator]:
    """The operator class of that name.

    Raises `UnknownNameError` with the nearest name, `OperatorError` for another package's that cannot be imported or
    is no operator of that name.
    """
    if name in _built_in():
        return _only_operator_in(importlib.import_module(f"{__name__}.{name}"))
    plugins = _plugins()
    if name not in plugins:
        raise UnknownNameError("operator", name, available())
    try:
        operator = plugins[name].load()
    except Exception as error:  # whatever the other package raises as it is imported
        words = f"{_told(plugins[name])} cannot be imported: {type(error).__name__}: {error}. Mend or uninstall its package."
        raise OperatorError(words) from error
    operator = operator if isinstance(operator, type) else _only_operator_in(operator)
    if operator.name != name:
        raise OperatorError(f"Entry point {name!r} leads to the operator {operator.name!r}: name its file {name}.py.")
    return operator


def configure(spec: str | OperatorConfig | dict[str, Any]) -> OperatorConfig:
    """A config from a name, a text such as `"hyena_x(kernel_size=4)"`, a config, or a dict `{"operator": name,
    **settings}`.

    Raises `UnknownNameError` for an unknown operator or setting, `OperatorError` for a value it refuses, `RuleError`
    for text that cannot be read.
    """
    if isinstance(spec, OperatorConfig):
        return spec
    if isinstance(spec, str):
        return parse_operator(spec) if "(" in spec else get(spec).Config()
    if not isinstance(spec, dict) or not isinstance(spec.get("operator"), str):
        raise OperatorError(
            f'An operator is a name, a Config, or a dict with its name under "operator"; got {spec!r}.'
        )
    return _configured(get(spec["operator"]), spec)


def parse_operator(text: str) -> OperatorConfig:
    """A config from `name` or `name(setting=value, ...)`, values being literals, words or operators. Raises as
    `configure`.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("settings are written name=value")
        settings = {keyword.arg: _value(keyword.value) for keyword in call.keywords}
        if None in settings or len(settings) < len(call.keywords):
            raise ValueError("settings are written name=value, each once")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise RuleError(
            f'{text!r} is not an operator: {error}. Write "hyena_x" or "hyena_x(kernel_size=4)".'
        ) from error
    get(call.func.id)
    return configure({"operator": call.func.id, **settings})


def _value(node: ast.expr) -> Any:
    return ast.unparse(node) if isinstance(node, ast.Call | ast.Name) else ast.literal_eval(node)


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
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Operator) and item.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise OperatorError(f"{module.__name__} defines {len(found)} operators; a file defines exactly one.")
    return found[0]


def __getattr__(name: str) -> type[Operator]:
    """`operators.HyenaX` is `operators.get("hyena_x")`."""
    file_name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    if name[:1].isupper() and file_name in available():
        return get(file_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
