"""Operators whose source lies in a repository: read by everybody, run for those alone who say so, at a commit they
name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ... import operators
from ...errors import FileError
from ...operators import Operator, OperatorConfig
from ...planning.plan import GraftPlan
from ..atomic_folder import inside, settle

_HASH = "_graft_source_sha256"


def sources(plan: GraftPlan) -> dict[str, str]:
    """File name and source of every operator of a plan."""
    return {f"graft_operator_{cls.name}.py": inspect.getsource(sys.modules[cls.__module__]) for cls in owners(plan)}


def owners(plan: GraftPlan) -> list[type[Operator]]:
    """The operators of a plan, and those that they are made of, as a hybrid is, by name."""
    waiting, found = [edit.config for edit in plan.edits], {}
    while waiting:
        config = waiting.pop()
        found[config.owner.name] = config.owner
        waiting += [value for value in vars(config).values() if isinstance(value, OperatorConfig)]
    return [found[name] for name in sorted(found)]


def describe_code(files: dict[str, str]) -> dict[str, dict[str, str]]:
    """What a description says of them: file and SHA-256 by operator."""
    return {
        name.removeprefix("graft_operator_").removesuffix(".py"): {"file": name, "sha256": _digest(text.encode())}
        for name, text in files.items()
    }


def unnamed_sources(folder: Path, *besides: str, also: str = "") -> list[str]:
    """Operators' source in a folder that no description there names.

    Args:
        besides: files of descriptions that are about to be replaced.
        also: text of descriptions in it that stay.
    """
    settle(folder)
    paths = [folder / "config.json", *folder.glob("graft_config*.json")]
    told = [
        path.read_text(encoding="utf-8", errors="replace")
        for path in paths
        if path.name not in besides and path.is_file()
    ]
    return [
        path.name
        for path in folder.glob("graft_operator_*.py")
        if not any(path.name in text for text in (also, *told))
    ]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_pinned(source: str | Path, revision: str | None) -> bool:
    """Whether what is loaded cannot change: a folder of this machine, or one commit of a repository."""
    return Path(source).is_dir() or bool(re.fullmatch(r"[0-9a-f]{40}", revision or ""))


def trusted(config: dict[str, Any], folder: Path, *, trust: bool, pinned: bool) -> dict[str, type[Operator]]:
    """The operators of a description that only its own source can give, by name.

    Raises `FileError` unless that is trusted and pinned, and the source is the one that was saved.
    """
    asked = _operators_in(config["plan"].get("edits"))
    code = config.get("code") if isinstance(config.get("code"), dict) else {}
    classes = {}
    for name in sorted(name for name in asked & code.keys() if name not in operators.available()):
        if not (trust and pinned):
            missing = [] if trust else ["trust_remote_code=True"]
            missing += [] if pinned else ["revision=, the full id of a commit"]
            raise FileError(
                f"{folder} brings the operator {name!r} as code that would run on this machine. Read graft_operator_{name}.py "
                f"first; to run it pass {' and '.join(missing)}."
            )
        classes[name] = _operator(name, code[name], folder)
    return classes


def _operators_in(edits: Any) -> set[str]:
    """Names of the operators of a plan that was read, and of those that they are made of."""
    within = edits.values() if isinstance(edits, dict) else edits if isinstance(edits, list) else ()
    own = {str(edits["operator"])} if isinstance(edits, dict) and "operator" in edits else set()
    return own.union(*map(_operators_in, within))


def _operator(name: str, row: Any, folder: Path) -> type[Operator]:
    if not name.isidentifier() or not isinstance(row, dict):
        raise FileError(f"The code of the operator {name!r} in {folder} is not described as ours is.")
    path = inside(folder, row.get("file"))
    if not path.is_file() or _digest(path.read_bytes()) != row.get("sha256"):
        raise FileError(f"{path} is missing, or not the source that was saved. Download it again.")
    module = _imported(f"{operators.__name__}.{name}", path, row["sha256"])
    found = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    found = [item for item in found if issubclass(item, Operator)]
    if len(found) != 1 or found[0].name != name:
        raise FileError(f"{path} defines {[item.name for item in found]}, not the one operator {name!r}.")
    return found[0]


def _imported(name: str, path: Path, sha256: str) -> ModuleType:
    known = sys.modules.get(name)
    if known is not None and vars(known).get(_HASH) != sha256:
        raise FileError(
            f"Another operator {name.rpartition('.')[2]!r} is loaded already. Load this one in a new process."
        )
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    vars(module)[_HASH] = sha256
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise FileError(f"{path} does not run: {error!r}") from error
    return module
