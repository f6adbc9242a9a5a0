"""Models for people without this package: the code that reads them, in one file beside their weights.

diffusers runs `graft_code.py` where `trust_remote_code=True` allows: `config.json` names it as `auto_map` for
`AutoModel`, `model_index.json` as the transformer's class for pipelines. It is one file because diffusers fetches one:
of a pipeline's component it downloads the file that is named, and no others. It must not look as if it imported its
neighbours either, since diffusers copies whatever lines like `from .x import y` name; the modules inside are therefore
written line by line as strings.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ..._version import __version__
from ...planning.plan import GraftPlan
from .. import load_model as full
from . import unpack as unpacking
from .operator_source import owners

_ROOT = Path(__file__).parents[2]
_NAME = _ROOT.name
_STEM, _CLASS = "graft_code", unpacking.GraftedModel.__name__
FILE = f"{_STEM}.py"
CODE = (_STEM, _CLASS)  # as `model_index.json` names it
AUTO_MAP = {"AutoModel": ".".join(CODE)}


def library_file(plan: GraftPlan) -> str:
    """The text of `graft_code.py`: what of this library reads models, and the operators of a plan, wherever they are
    from.
    """
    classes = owners(plan)
    foreign = {
        f"operators/{cls.name}.py": inspect.getsource(sys.modules[cls.__module__])
        for cls in classes
        if not (_ROOT / "operators" / f"{cls.name}.py").is_file()
    }
    own = [f"operators/{cls.name}.py" for cls in classes if f"operators/{cls.name}.py" not in foreign]
    paths = _needed([Path(full.__file__).relative_to(_ROOT).as_posix(), *own], foreign)
    texts = {path: foreign.get(path) or (_ROOT / path).read_text(encoding="utf-8") for path in paths}
    texts["__init__.py"] = f'"""What reads a model that diffusers-graft {__version__} saved: a part of it."""\n'
    package = f"{_NAME}_{hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]}"
    for path in foreign:  # ours import each other by their places, others import us by name
        texts[path] = re.sub(rf"\b{_NAME}\b", package, texts[path])
    source = inspect.getsource(unpacking)
    source = source.replace('PACKAGE = ""\n', f"PACKAGE = {package!r}\n", 1)
    return source.replace(" = {}\n", f" = {{\n{_as_strings(texts)}}}\n", 1)


def _as_strings(texts: dict[str, str]) -> str:
    entries = []
    for path, text in sorted(texts.items()):
        lines = "\n".join(f"        {line!r}" for line in text.splitlines(keepends=True))
        entries.append(f"    {path!r}: (\n{lines}\n    ),\n")
    return "".join(entries)


def _needed(paths: list[str], foreign: dict[str, str]) -> list[str]:
    """Modules of this package that these import, and those import, in no order; the packages they lie in too."""
    waiting, found = [*paths, *foreign], {}
    while waiting:
        path = waiting.pop()
        if path not in found:
            tree = ast.parse(foreign.get(path) or (_ROOT / path).read_text(encoding="utf-8"))
            found[path] = None
            waiting += [target for name in _imported(tree, path) for target in _files(name)]
            waiting += [f"{parent.as_posix()}/__init__.py" for parent in list(Path(path).parents)[:-1]]
    return sorted(found)


def _imported(tree: ast.AST, path: str) -> Iterator[str]:
    """Dotted names inside this package of everything that a module imports from it."""
    here = [_NAME, *Path(path).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            if base[0] == _NAME:
                yield from (".".join([*base[1:], alias.name]) for alias in node.names)


def _files(name: str) -> list[str]:
    """The file of a module, or of the module that defines the name."""
    for part in (name, name.rpartition(".")[0]):
        path = part.replace(".", "/")
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            if part and (_ROOT / candidate).is_file():
                return [candidate]
    return []
