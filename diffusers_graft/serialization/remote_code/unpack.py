"""How a self-contained model is read: the last lines of its `graft_code.py`, below the modules it carries.

A library that is installed reads it; where there is none, the modules carried here are unpacked into a temporary
folder.
"""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from diffusers import ModelMixin

# The name of the package that the modules make up, and their text by path; filled in what is saved.
PACKAGE = ""
MODULES: dict[str, str] = {}


class GraftedModel(ModelMixin):
    """What `config.json` and `model_index.json` name; loading gives a model of diffusers' own class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> ModelMixin:
        """The grafted model of a folder or Hub repository, asked for as any model of diffusers."""
        library = _reader()
        model = library.load_as_diffusers(pretrained_model_name_or_path, {**kwargs, "trust_remote_code": True})
        if library.__name__.startswith(PACKAGE):
            vars(model)["save_pretrained"] = _refuse_saving
        return model


def _reader() -> ModuleType:
    name = "diffusers_graft"
    if importlib.util.find_spec(name) is None:
        name = PACKAGE
        if importlib.util.find_spec(name) is None:
            sys.path.append(_unpacked())
            importlib.invalidate_caches()
    return importlib.import_module(f"{name}.serialization.load_model")


def _unpacked() -> str:
    folder = tempfile.mkdtemp(prefix=f"{PACKAGE}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path, text in MODULES.items():
        file = Path(folder, PACKAGE, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def _refuse_saving(*args, **kwargs) -> None:
    raise RuntimeError(
        "This grafted model was read by the code that came with it, which cannot write. Copy its folder as it is, or "
        "pip install diffusers-graft and load it again."
    )
