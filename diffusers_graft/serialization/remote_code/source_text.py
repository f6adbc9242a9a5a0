"""The source of an operator alone: its class, and the lines of its module that it needs.

A person may write an operator in a script or a notebook, whose other lines are nobody's business: they are not run
again by whoever loads the operator, and not shared. Names are followed from the class through the top level of the
module; a module where that cannot be decided by reading is refused.
"""

from __future__ import annotations

import ast
import builtins
import linecache
import symtable
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from types import ModuleType
from typing import Any

from ...errors import FileError
from ...operators import Operator

# Packages that whoever has this library has, too.
AVAILABLE = ("diffusers_graft", "torch", "diffusers", "einops", "numpy", "safetensors", "huggingface_hub")
_ALWAYS_THERE = {*dir(builtins), "__name__", "__doc__", "__file__"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)


def source_of(operator: type[Operator], *, may_need_packages: bool = False) -> str:
    """Return the source of a module that defines an operator and nothing that the operator does not need.

    Args:
        may_need_packages: it may import installed packages, which `packages_of` then names.

    Raises `FileError` where the operator cannot be separated from its module, or needs another file.
    """
    return _Module(operator, may_need_packages).extract()


def packages_of(source: str) -> dict[str, str]:
    """Return name and version of the packages that a source imports, beside those that whoever has this library has.

    Those imported inside a `try` are left out: the source can do without them.
    """
    names: set[str] = set()
    for node in _unguarded_imports(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
        else:
            names |= {alias.name.partition(".")[0] for alias in node.names}
    installed = packages_distributions()
    packages = {}
    for name in sorted(names - {*AVAILABLE, *sys.stdlib_module_names}):
        package = next(iter(installed.get(name, [])), name)
        packages[package] = version(package)
    return packages


class _Module:
    """The module that an operator was written in."""

    def __init__(self, operator: type[Operator], may_need_packages: bool):
        self.operator = operator
        self.may_need_packages = may_need_packages
        self.text = _text_of(operator)
        self.tree = ast.parse(self.text)
        self.globals = vars(sys.modules[operator.__module__])
        self.bound: dict[str, list[ast.stmt]] = {}
        for statement in self.tree.body:
            for name in _bound_by(statement):
                self.bound.setdefault(name, []).append(statement)

    def extract(self) -> str:
        """Return the lines of the operator and of everything that it needs, in the order of the module."""
        needed: dict[str, str] = {}  # what binds a name, in the order in which they are found
        waiting = [self.operator.__name__]
        while waiting:
            name = waiting.pop()
            if name in needed or (name in _ALWAYS_THERE and name not in self.bound):
                continue
            needed[name] = self._binding(name)
            waiting += sorted(_globals_read(needed[name]))
        self._refuse_changes(set(needed))
        lines = dict.fromkeys(needed[name] for name in sorted(needed, key=self._place))
        head = f'"""The operator {self.operator.name}, and what it needs of the module that it was written in."""\n\n'
        if any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in self.tree.body):
            head += "from __future__ import annotations\n\n"
        return head + "\n\n".join(lines) + "\n"

    def _place(self, name: str) -> tuple[int, str]:
        """Return where a name is bound; those of other texts come first."""
        statements = self.bound.get(name)
        return (statements[0].lineno if statements else 0, name)

    def _binding(self, name: str) -> str:
        """Return the statement that binds a name at the top level of the module."""
        statements = self.bound.get(name, [])
        if not statements:
            return self._import_of_value(name)
        if len(statements) > 1 and not all(isinstance(statement, _IMPORTS) for statement in statements):
            raise self._refusal(f"{name} is bound {len(statements)} times")
        statement = statements[0]
        if isinstance(statement, _IMPORTS):
            self._require_available(statement)
            (alias,) = [alias for alias in statement.names if (alias.asname or alias.name.split(".")[0]) == name][:1]
            return ast.unparse(_with_names(statement, alias))
        if not isinstance(statement, (*_DEFINITIONS, ast.Assign, ast.AnnAssign)) and not _is_guarded(statement):
            raise self._refusal(f"{name} is bound inside a block (line {statement.lineno})")
        for node in _unguarded_imports(statement):
            self._require_available(node)
        return self._segment(statement)

    def _segment(self, statement: ast.stmt) -> str:
        decorators = getattr(statement, "decorator_list", [])
        if not decorators:
            return ast.get_source_segment(self.text, statement) or ast.unparse(statement)
        first = decorators[0].lineno
        return "\n".join(self.text.splitlines()[first - 1 : statement.end_lineno])

    def _require_available(self, node: ast.Import | ast.ImportFrom) -> None:
        """Raise `FileError` for an import that whoever loads the operator may not have."""
        level = getattr(node, "level", 0)
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            package = name.split(".")[0]
            if self.may_need_packages and not level and package in packages_distributions():
                continue
            if level or not (package in AVAILABLE or package in sys.stdlib_module_names):
                raise self._refusal(f"it imports {'.' * level}{name}, which does not come along")
        if any(alias.name == "*" for alias in node.names):
            raise self._refusal(f"it imports all names of {names[0]}")

    def _import_of_value(self, name: str) -> str:
        """Return an import for a name that the text does not bind, as one of an earlier cell of a notebook."""
        if name not in self.globals:
            raise self._refusal(f"{name} is not defined in it")
        value = self.globals[name]
        if isinstance(value, ModuleType):
            line = f"import {value.__name__} as {name}"
        else:
            home = getattr(value, "__module__", None)
            line = f"from {home} import {getattr(value, '__qualname__', name)} as {name}"
            if home is None or not hasattr(sys.modules.get(home), str(getattr(value, "__qualname__", ""))):
                raise self._refusal(f"{name} is defined outside its text")
        for node in _unguarded_imports(ast.parse(line)):
            self._require_available(node)
        return line

    def _refuse_changes(self, needed: set[str]) -> None:
        """Raise `FileError` where a line at the top level changes what a needed name is bound to."""
        for statement in self.tree.body:
            for name in sorted(_changed_by(statement) & needed):
                if not isinstance(self.bound.get(name, [None])[0], _IMPORTS):
                    raise self._refusal(f"{name} is changed by line {statement.lineno}")

    def _refusal(self, reason: str) -> FileError:
        operator = self.operator
        return FileError(
            f"The operator {operator.name!r} cannot be shared by itself: in {operator.__module__}, {reason}. Put it "
            "into a file of its own, with all that it needs; or save without self_contained and name the package to "
            "install."
        )


def _text_of(operator: type[Operator]) -> str:
    """Return the text of the file or the notebook's cell that an operator is defined in."""
    codes = [getattr(value, "__code__", None) for value in vars(operator).values()]
    files = [code.co_filename for code in codes if code is not None]
    # A class without methods is in its module's file, if at all.
    files.append(getattr(sys.modules.get(operator.__module__), "__file__", None) or "")
    for file in files:
        text = "".join(linecache.getlines(file))
        if f"class {operator.__name__}" in text:
            return text
    raise FileError(
        f"The source of the operator {operator.name!r} is not at hand: it was defined in {operator.__module__}, "
        "without a file. Put it into a file of its own, or save without self_contained."
    )


def _bound_by(statement: ast.stmt) -> set[str]:
    """Return the names that a statement at the top level binds."""
    if isinstance(statement, _DEFINITIONS):
        return {statement.name}
    names: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, _IMPORTS):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, _DEFINITIONS):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _changed_by(statement: ast.stmt) -> set[str]:
    """Return the names whose values a statement changes in place: by an operator, an item, an attribute, a method."""
    if isinstance(statement, _DEFINITIONS):
        return set()
    names: set[str] = set()
    for node in ast.walk(statement):
        root: Any = None
        if isinstance(node, ast.AugAssign):
            root = node.target
        elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            root = node
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            root = node.value.func
            if isinstance(root, ast.Name):
                continue  # a plain call changes no name
        while isinstance(root, ast.Subscript | ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name):
            names.add(root.id)
    return names


def _is_guarded(statement: ast.stmt) -> bool:
    """Return whether a block does nothing but import, with constants in place of what is missing."""
    if not isinstance(statement, ast.Try | ast.If):
        return False
    inner = [node for node in ast.walk(statement) if isinstance(node, ast.stmt) and node is not statement]
    return all(isinstance(node, (*_IMPORTS, ast.Pass)) or _is_constant(node) for node in inner)


def _is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)


def _unguarded_imports(statement: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports in a statement, but for those inside a `try` that may fail."""
    if isinstance(statement, ast.Try):
        return
    for node in ast.iter_child_nodes(statement):
        if isinstance(node, _IMPORTS):
            yield node
        else:
            yield from _unguarded_imports(node)


def _with_names(statement: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    if isinstance(statement, ast.ImportFrom):
        return ast.ImportFrom(statement.module, [alias], statement.level)
    return ast.Import([alias])


def _globals_read(text: str) -> set[str]:
    """Return the names that a text reads from the top level of its module."""
    names: set[str] = set()
    waiting = [symtable.symtable(text, "<operator>", "exec")]
    top = waiting[0]
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (table is top or symbol.is_global()):
                names.add(symbol.get_name())
    return names
