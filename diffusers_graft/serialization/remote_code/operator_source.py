"""Operators whose source lies in a repository: anybody may read it; it runs only where the caller trusts a commit."""

from __future__ import annotations

import hashlib
import linecache
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ... import operators
from ...core.storage import read_bytes
from ...errors import FileError
from ...operators import Operator
from ...operators.registry import names_in, register
from ...planning.plan import GraftPlan
from ..download import file_in

_PACKAGE = Path(__file__).parents[2]
_HASH = "_graft_source_sha256"
_TEXT = "_graft_source"
_LARGEST_SOURCE = 2**20


def sources(plan: GraftPlan) -> dict[str, str]:
    """Return file name and source of every operator of a plan.

    Raises `FileError` for an operator that cannot be separated from the script it was written in, or that needs a file
    which does not come along.
    """
    return {file_of(cls.name): source_text(cls) for cls in plan.operators()}


def file_of(name: str) -> str:
    """Return the name of the file that holds the source of an operator."""
    return f"graft_operator_{name}.py"


def source_text(operator: type[Operator], *, may_need_packages: bool = False) -> str:
    """Return the source of one operator: of ours its file, of one that came as code what came, else its extract."""
    if is_ours(operator):
        return (_PACKAGE / "operators" / f"{operator.name}.py").read_text(encoding="utf-8")
    loaded = getattr(sys.modules.get(operator.__module__), _TEXT, None)
    if loaded is not None:
        return loaded
    from .source_text import source_of  # not among the modules that a self-contained model carries

    return source_of(operator, may_need_packages=may_need_packages)


def is_ours(operator: type[Operator]) -> bool:
    """Return whether an operator comes with this library."""
    is_here = operator.__module__ == f"{operators.__name__}.{operator.name}"
    return is_here and (_PACKAGE / "operators" / f"{operator.name}.py").is_file()


def describe_code(files: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return what a description says of sources: file and SHA-256 by operator."""
    described = {}
    for file, text in files.items():
        name = file.removeprefix("graft_operator_").removesuffix(".py")
        described[name] = {"file": file, "sha256": _digest(text.encode())}
    return described


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_pinned(source: str | Path, revision: str | None) -> bool:
    """Return whether what is loaded cannot change: a folder of this machine, or one commit of a repository."""
    return Path(source).is_dir() or bool(re.fullmatch(r"[0-9a-f]{40}", revision or ""))


def register_trusted(config: dict[str, Any], folder: Path, *, trust: bool, pinned: bool) -> None:
    """Run and register the operators of a description that only its source can give.

    Raises `FileError` unless that is trusted and pinned, and the source is the one that was saved.
    """
    code = config.get("code") or {}
    # Operators that are installed, or known to this process already, are never taken from a repository.
    here = set(operators.available())
    for name in sorted(names_in(config["plan"].get("edits")) & code.keys()):
        if name not in here:
            if not (trust and pinned):
                raise FileError(_refusal(name, folder, trust=trust, pinned=pinned))
            register(run_operator(name, code[name], folder))
        elif hash_of(name) not in (None, code[name]["sha256"]):
            raise FileError(f"Another operator {name!r} is loaded already. Load this one in a new process.")


def hash_of(name: str) -> str | None:
    """Return the hash of an operator that came as code into this process, before."""
    return getattr(sys.modules.get(f"{operators.__name__}.{name}"), _HASH, None)


def _refusal(name: str, folder: Path, *, trust: bool, pinned: bool) -> str:
    return (
        f"{folder} brings the operator {name!r} as code that would run on this machine. Read {file_of(name)} first; "
        f"to run it pass {missing_permission(trust=trust, pinned=pinned)}."
    )


def missing_permission(*, trust: bool, pinned: bool) -> str:
    """Return in words the arguments that running code from a repository still needs."""
    missing = []
    if not trust:
        missing.append("trust_remote_code=True")
    if not pinned:
        missing.append("revision=, the full id of a commit")
    return " and ".join(missing)


def run_operator(name: str, row: dict[str, str], folder: Path) -> type[Operator]:
    """Run the source of an operator. Raises `FileError` where it is not the very text that the description names."""
    if not name.isidentifier():
        raise FileError(f"The code of the operator {name!r} in {folder} is not described as ours is.")
    path = file_in(folder, row["file"])
    # People are told to read the file of this name before they trust it.
    if row["file"] != file_of(name):
        raise FileError(f"{folder} names {row['file']} as the source of {name!r}, and not {file_of(name)}.")
    data = b""
    if path.exists():
        data = read_bytes(path, limit=_LARGEST_SOURCE)
    # Read once: what is hashed here is what runs.
    if _digest(data) != row["sha256"]:
        raise FileError(f"{path} is missing, or not the source that was saved. Download it again.")
    module = _run(f"{operators.__name__}.{name}", path, data)
    found = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    found = [item for item in found if issubclass(item, Operator)]
    # A class that another one of the file inherits from has the same name.
    found = [item for item in found if not any(item in other.__mro__[1:] for other in found)]
    if len(found) != 1 or found[0].name != name:
        raise FileError(f"{path} defines {[item.name for item in found]}, not the one operator {name!r}.")
    return found[0]


def _run(name: str, path: Path, data: bytes) -> ModuleType:
    """Run source as a module: the very bytes that were hashed, never what a cache holds in their place."""
    known = sys.modules.get(name)
    if known is not None:
        if vars(known).get(_HASH) != _digest(data):
            short = name.rpartition(".")[2]
            raise FileError(f"Another operator {short!r} is loaded already. Load this one in a new process.")
        return known
    module = ModuleType(name)
    module.__file__ = str(path)
    module.__package__ = operators.__name__
    # Before it runs, since a dataclass looks its module up.
    sys.modules[name] = module
    try:
        text = data.decode("utf-8")
        vars(module).update({_HASH: _digest(data), _TEXT: text})
        # So that tracebacks and inspect show the text that runs.
        linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
        exec(compile(text, str(path), "exec", dont_inherit=True), vars(module))
    except Exception as error:
        del sys.modules[name]
        raise FileError(f"{path} does not run: {error!r}") from error
    return module
