"""The reader of a self-contained model: the last lines of its `graft_code.py`, below the modules it carries.

An installed library reads the model; where there is none, the modules carried here are unpacked into a temporary
folder. Either way the model is loaded through the library's public `load_pretrained`.
"""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusers import ModelMixin

# The name of the package that the modules make up, and their text by path; filled in when a model is saved.
PACKAGE = ""
MODULES: dict[str, str] = {}

FETCHING = ("cache_dir", "force_download", "token", "local_files_only", "revision", "subfolder")
_LOADING = ("dtype", "torch_dtype", "variant", "low_cpu_mem_usage", "device_map", "quantization_config")


class GraftedModel(ModelMixin):
    """The class that `config.json` and `model_index.json` name; loading gives a model of diffusers' class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> ModelMixin:
        """Load the grafted model of a folder or Hub repository, with the arguments of any model of diffusers."""
        library = _library()
        arguments = loading_arguments({**kwargs, "trust_remote_code": True})
        model = library.load_pretrained(pretrained_model_name_or_path, **arguments)
        # diffusers' own save would write a grafted model as a plain one.
        if library.__name__ == PACKAGE:
            vars(model)["save_pretrained"] = _refuse_saving
        return model


def loading_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of diffusers' `from_pretrained` that decide what is loaded; others only tune how."""
    names = (*FETCHING, *_LOADING, "trust_remote_code")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def _library() -> ModuleType:
    name = "diffusers_graft"
    if importlib.util.find_spec(name) is None:
        name = PACKAGE
        if importlib.util.find_spec(name) is None:
            # At the end, so that nothing in it hides a module that is installed.
            sys.path.append(_unpacked())
            importlib.invalidate_caches()
    return importlib.import_module(name)


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
