"""The one door by which operators come in, and the configs that rules and saved plans name.

An operator of this library is found by its file name, one of another package through the entry point group
`diffusers_graft.operators`, one of a script, a notebook or a trusted repository after `register`, one that lies on
the Hub by itself through `get("user/name")`. Whichever way it came, `get` knows it by its name from then on.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import logging
import pkgutil
import re
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, packages_distributions, version
from types import ModuleType
from typing import Any, TypeVar

from ..errors import OperatorError, RuleError, UnknownNameError
from .base import Operator, OperatorConfig

logger = logging.getLogger(__name__)

OperatorClass = TypeVar("OperatorClass", bound=type[Operator])

_OPERATORS = __name__.rpartition(".")[0]
_LIBRARY = __name__.partition(".")[0]
_GROUP = "diffusers_graft.operators"
_NO_OPERATORS = ("base", "registry")
_PACKAGE_NAME = re.compile(r"[A-Za-z0-9]([\w.+-]{0,98}[A-Za-z0-9])?")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

_registered: dict[str, type[Operator]] = {}
_repositories: dict[str, dict[str, str]] = {}  # the repository and the commit of operators that came from the Hub
_readers: list[Callable[..., type[Operator]]] = []


def register(operator: OperatorClass) -> OperatorClass:
    """Make an operator known by its name, so that rules, plans and saved grafts can name it. A class decorator.

    The name is the class attribute `name`, by default that of the file, and in a script or notebook that of the class
    (`TokenRoll` becomes `token_roll`). A class may be defined anew, as when the cell of a notebook runs again.

    Raises `OperatorError` for what is not an operator, and for a name that another operator has.

    >>> from diffusers_graft.operators import Mixer
    >>> @register
    ... class TokenRoll(Mixer):
    ...     name = "token_roll"
    >>> get("token_roll")
    <class 'diffusers_graft.operators.registry.TokenRoll'>
    """
    if not (isinstance(operator, type) and issubclass(operator, Operator)):
        raise OperatorError(f"{operator!r} is not an operator: derive a class from Mixer, or another of the bases.")
    name = operator.name
    if not name.isidentifier():
        raise OperatorError(f"The name of an operator is a word such as token_roll; {operator.__name__} has {name!r}.")
    known = _registered.get(name)
    is_new_version = known is not None and _identity(known) == _identity(operator)
    if not is_new_version and _is_used(name, operator):
        raise OperatorError(f"There is another operator {name!r}. Give {operator.__name__} another name.")
    _registered[name] = operator
    return operator


def _identity(operator: type[Operator]) -> tuple[str, str]:
    return operator.__module__, operator.__qualname__


def _is_used(name: str, operator: type[Operator]) -> bool:
    if name in _registered:
        return True
    # A trusted repository brings its operators as modules of this package.
    return name in _file_names() and operator.__module__ != f"{_OPERATORS}.{name}"


def _file_names() -> set[str]:
    package = importlib.import_module(_OPERATORS)
    names = {module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg}
    return {name for name in names if name not in _NO_OPERATORS and not name.startswith("_")}


def _entry_points() -> dict[str, EntryPoint]:
    points = {point.name: point for point in entry_points(group=_GROUP)}
    for name in sorted(points.keys() & _file_names()):
        hidden = _describe(points.pop(name))
        warnings.warn(f"{hidden} is not used: an operator here has that name. Give it another.", stacklevel=3)
    return points


def _describe(point: EntryPoint) -> str:
    words = f"The operator {point.name!r}"
    if point.dist:
        words = f"{words} of the package {point.dist.name}"
    return f"{words} (entry point {point.value})"


def available() -> tuple[str, ...]:
    """Return the names of all operators, without importing any of them."""
    return tuple(sorted({*_file_names(), *_entry_points(), *_registered}))


def get(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> type[Operator]:
    """Return the operator class of a name, or that of a Hub repository, which is known by its name from then on.

    Args:
        name: of an operator; or a repository `user/name`, or a folder, that `dg.hub.push_operator` filled.
        revision: of a repository, the full id of a commit.
        trust_remote_code: run the code of the repository. Read it first.

    Raises `UnknownNameError` with the nearest name, `OperatorError` for one of another package that cannot be
    imported or that is not an operator of that name, and `FileError` for a repository that is not trusted, not pinned,
    or holds no operator.
    """
    if "/" in name and _readers:
        return _readers[0](name, revision=revision, trust_remote_code=trust_remote_code)
    if revision is not None or trust_remote_code:
        raise OperatorError(f"revision and trust_remote_code are for a repository user/name; {name!r} is a name.")
    if name in _registered:
        return _registered[name]
    if name in _file_names():
        return register(_only_operator_in(importlib.import_module(f"{_OPERATORS}.{name}")))
    points = _entry_points()
    if name not in points:
        raise UnknownNameError("operator", name, available())
    try:
        loaded = points[name].load()
    except Exception as error:  # whatever the other package raises as it is imported
        raise OperatorError(
            f"{_describe(points[name])} cannot be imported: {type(error).__name__}: {error}. "
            "Mend or uninstall its package."
        ) from error
    # An entry point leads to a module or right to the class.
    operator = loaded if isinstance(loaded, type) else _only_operator_in(loaded)
    if operator.name != name:
        raise OperatorError(f"Entry point {name!r} leads to the operator {operator.name!r}: name its file {name}.py.")
    # A plugin may have registered its class itself, as it was imported.
    return register(operator)


def _only_operator_in(module: ModuleType) -> type[Operator]:
    found = []
    for item in vars(module).values():
        if isinstance(item, type) and issubclass(item, Operator) and item.__module__ == module.__name__:
            found.append(item)
    if len(found) != 1:
        raise OperatorError(f"{module.__name__} defines {len(found)} operators; a file defines exactly one.")
    return found[0]


def read_repositories_with(reader: Callable[..., Any]) -> None:
    """Let `get` read repositories: what downloads stands on a floor above this one."""
    _readers[:] = [reader]


def note_repository(operator: type[Operator], repository: str, revision: str) -> None:
    """Remember the commit that an operator came from, which grafts then name."""
    _repositories[operator.name] = {"repository": repository, "revision": revision}


def package_of(operator: type[Operator]) -> dict[str, str] | None:
    """Return what brings an operator: `name` and `version` of a package, or `repository` and `revision` on the Hub.

    None for this library and for scripts.
    """
    if _registered.get(operator.name) is operator and operator.name in _repositories:
        return _repositories[operator.name]
    top = operator.__module__.partition(".")[0]
    if top == _LIBRARY:
        return None
    # Entry points are asked first: finding a package by its modules reads the file list of every package.
    names = [point.dist.name for point in entry_points(group=_GROUP, name=operator.name) if point.dist]
    names += packages_distributions().get(top, [])
    for name in names:
        try:
            return {"name": name, "version": version(name)}
        except PackageNotFoundError:
            continue
    return None


def require_available(names: set[str], packages: Any = None) -> None:
    """Raise `UnknownNameError` for the first operator that is not there, naming the package that brings it.

    A package of another version than the one that was saved is logged as a warning.

    Args:
        packages: `package_of` by operator's name, as a saved plan has it; it may come from an untrusted file.
    """
    known = available()
    if not isinstance(packages, Mapping):
        packages = {}
    for name in sorted(names):
        if name not in known:
            raise UnknownNameError("operator", name, known, advice=_advice(packages.get(name)))
        _warn_of_another_version(name, _requirement(packages.get(name)))


def _warn_of_another_version(name: str, saved: list[str] | None) -> None:
    if saved is None:
        return
    for point in entry_points(group=_GROUP, name=name):
        if point.dist and [point.dist.name, point.dist.version] != saved:
            logger.warning(
                f"The operator {name!r} was saved with {saved[0]} {saved[1]}; here it comes from {point.dist.name} "
                f'{point.dist.version}. Where outputs differ: pip install "{saved[0]}=={saved[1]}"'
            )


def _requirement(package: Any) -> list[str] | None:
    """Return name and version of a package as a saved plan has them, None for anything else."""
    if not isinstance(package, Mapping):
        return None
    values: list[str] = []
    for value in (package.get("name"), package.get("version")):
        # Untrusted text that is repeated in advice may be a name and nothing more.
        if not isinstance(value, str) or not _PACKAGE_NAME.fullmatch(value):
            return None
        values.append(value)
    return values


def _advice(package: Any) -> str:
    required = _requirement(package)
    if required:
        name, number = required
        return (
            f"It was saved with the package {name} {number}, which is not installed here. If you trust that package: "
            f'pip install "{name}=={number}"'
        )
    if isinstance(package, Mapping):
        repository = str(package.get("repository"))
        revision = str(package.get("revision"))
        if _REPOSITORY.fullmatch(repository) and re.fullmatch(r"[0-9a-f]{40}", revision):
            return (
                f'It came from the Hub. Read its code there, then: dg.operators.get("{repository}", '
                f'revision="{revision}", trust_remote_code=True)'
            )
    return "An operator written in a script or a notebook is known after @dg.operators.register."


def names_in(spec: Any) -> set[str]:
    """Return the names of the operators in a saved plan or config, those within others included."""
    names: set[str] = set()
    children: Any = ()
    if isinstance(spec, Mapping):
        if "operator" in spec:
            names.add(str(spec["operator"]))
        children = spec.values()
    elif isinstance(spec, list | tuple):
        children = spec
    return names.union(*map(names_in, children))


def configure(spec: str | OperatorConfig | Mapping[str, Any]) -> OperatorConfig:
    """Return a config for a name, a text such as `"hyena_x(kernel_size=4)"`, a config, or a dict.

    A dict is what `OperatorConfig.to_dict` wrote: `{"operator": name, **settings}`.

    Raises `UnknownNameError` for an unknown operator or setting, `OperatorError` for a value that it refuses, and
    `RuleError` for text that cannot be read.
    """
    if isinstance(spec, OperatorConfig):
        return spec
    if isinstance(spec, str) and "(" in spec:
        return parse_operator(spec)
    if isinstance(spec, str):
        # Names are read as they are, so that one which is no word is an unknown name and no fault of syntax.
        return get(spec).Config()
    if not isinstance(spec, Mapping) or not isinstance(spec.get("operator"), str):
        raise OperatorError(
            f'An operator is a name, a Config, or a dict with its name under "operator"; got {spec!r}.'
        )
    return configure_class(get(spec["operator"]), spec)


def configure_class(operator: type[Operator], spec: Mapping[str, Any]) -> OperatorConfig:
    """Return the config that `OperatorConfig.to_dict` wrote, for an operator that need not be registered."""
    settings = {name: value for name, value in spec.items() if name != "operator"}
    names = {field.name for field in dataclasses.fields(operator.Config)}
    for name in settings:
        if name not in names:
            raise UnknownNameError(f"setting of {operator.name}", name, names)
    return operator.Config(**{name: _freeze(value) for name, value in settings.items()})


def _freeze(value: Any) -> Any:
    """Return tuples for lists, which JSON has in their place."""
    if not isinstance(value, list):
        return value
    return tuple(map(_freeze, value))


def parse_operator(text: str) -> OperatorConfig:
    """Return the config of `name` or `name(setting=value, ...)`; values are literals, words or operators.

    Raises as `configure`.
    """
    try:
        name, settings = _parse_call(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise RuleError(
            f'{text!r} is not an operator: {error}. Write "hyena_x" or "hyena_x(kernel_size=4)".'
        ) from error
    return configure({"operator": name, **settings})


def _parse_call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("settings are written name=value")
    settings: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in settings or keyword.arg == "operator":
            raise ValueError("settings are written name=value, each once")
        settings[keyword.arg] = _parse_value(keyword.value)
    return node.func.id, settings


def _parse_value(node: ast.expr) -> Any:
    # Words and operators go without quotes, as in hybrid(first=hyena_x(kernel_size=4)).
    if isinstance(node, ast.Call | ast.Name):
        return ast.unparse(node)
    return ast.literal_eval(node)
