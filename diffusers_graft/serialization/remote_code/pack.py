"""Models for people without this package: the code that reads them, in one file beside their weights.

diffusers runs `graft_code.py` where `trust_remote_code=True` allows: `config.json` names it as `auto_map` for
`AutoModel`, `model_index.json` as the transformer's class for pipelines. It is one file because diffusers fetches one:
of a pipeline's component it downloads the file that is named, and no others. It must not look as if it imported its
neighbours either, since diffusers copies the files that lines like `from .x import y` name; the modules inside are
therefore written line by line as strings.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

from ..._version import __version__
from ...planning.plan import GraftPlan
from . import unpack
from .operator_source import is_ours, source_text

_ROOT = Path(__file__).parents[2]
_NAME = _ROOT.name
_STEM = "graft_code"
_READER = "serialization/load_model.py"
_SHAPES = "core/shapes.py"
FILE = f"{_STEM}.py"
CODE = (_STEM, unpack.GraftedModel.__name__)  # as `model_index.json` names it
AUTO_MAP = {"AutoModel": ".".join(CODE)}


def library_file(plan: GraftPlan) -> str:
    """Return the text of `graft_code.py`: the modules that read models, and the operators of a plan.

    Raises `FileError` for an operator of somebody else that cannot be shared by itself.
    """
    ours = []
    foreign = {}
    for operator in plan.operators():
        path = f"operators/{operator.name}.py"
        if is_ours(operator):
            ours.append(path)
        else:
            foreign[path] = source_text(operator)
    paths = _needed([_READER, *ours], foreign)
    texts = {path: foreign.get(path) or (_ROOT / path).read_text(encoding="utf-8") for path in paths}
    # The reader calls the package as it calls the library.
    texts["__init__.py"] = (
        f'"""The modules of diffusers-graft {__version__} that read a saved model."""\n\n'
        "from .serialization.load_model import load_pretrained as load_pretrained\n"
    )
    texts[_SHAPES] = _without_shapes(texts[_SHAPES])
    # Models of several versions may be read in one process: each set of modules has a name of its own.
    package = f"{_NAME}_{hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]}"
    for path in foreign:  # ours import each other by their places, others import us by name
        texts[path] = re.sub(rf"\b{_NAME}\b", package, texts[path])
    source = inspect.getsource(unpack)
    source = source.replace('PACKAGE = ""\n', f"PACKAGE = {package!r}\n", 1)
    return source.replace(" = {}\n", f" = {{\n{_as_strings(texts)}}}\n", 1)


def _without_shapes(text: str) -> str:
    """Return the module that names shapes of tensors without jaxtyping, which a reader need not have."""
    targets = [node.target for node in ast.parse(text).body if isinstance(node, ast.AnnAssign)]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    lines = [
        '"""Shapes of tensors, unchecked."""',
        "",
        "from torch import Tensor",
        "",
        *(f"{name} = Tensor" for name in names),
    ]
    return "\n".join(lines) + "\n"


def _as_strings(texts: dict[str, str]) -> str:
    entries = []
    for path, text in sorted(texts.items()):
        lines = "\n".join(f"        {line!r}" for line in text.splitlines(keepends=True))
        entries.append(f"    {path!r}: (\n{lines}\n    ),\n")
    return "".join(entries)


def _needed(paths: list[str], foreign: dict[str, str]) -> list[str]:
    """Return modules of this package that these import, directly or through others, and the packages around them."""
    waiting = [*paths, *foreign]
    found: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        tree = ast.parse(foreign.get(path) or (_ROOT / path).read_text(encoding="utf-8"))
        for name in _imported(tree, path):
            waiting += _files(name)
        waiting += [f"{parent.as_posix()}/__init__.py" for parent in list(Path(path).parents)[:-1]]
    return sorted(found)


def _imported(tree: ast.AST, path: str) -> Iterator[str]:
    """Yield the dotted names inside this package that a module imports from it."""
    here = [_NAME, *Path(path).parent.parts]
    for node in ast.walk(tree):
        # The modules of this package are never imported by plain `import`.
        if not isinstance(node, ast.ImportFrom):
            continue
        base = here[: len(here) - node.level + 1] if node.level else []
        base = [*base, *(node.module or "").split(".")] if node.module else base
        if base[0] == _NAME:
            yield from (".".join([*base[1:], alias.name]) for alias in node.names)


def _files(name: str) -> list[str]:
    """Return the file of a module, or of the module that defines the name."""
    for part in (name, name.rpartition(".")[0]):
        path = part.replace(".", "/")
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            if part and (_ROOT / candidate).is_file():
                return [candidate]
    return []
