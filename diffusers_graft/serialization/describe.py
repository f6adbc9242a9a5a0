"""The description of a graft: its plan, the base it was made on, how it was trained, and with which versions."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from .._version import __version__
from ..injection.graft import Graft, base_tensors
from .config_file import FORMAT, ORIGIN
from .license import license_of
from .lora import describe_adapters
from .tensors import Tensors, fingerprint

LOADED_FROM = "_graft_loaded_from"  # the attribute of a model that holds its `LoadedFrom`


@dataclass(frozen=True)
class LoadedFrom:
    """The arguments of the `from_pretrained` that loaded a model.

    Attributes:
        source: as it was given, which the model's configuration repeats.
        folder: the source as an absolute path, None where it is a repository.
        subfolder: that was given.
    """

    source: str
    folder: str | None
    subfolder: str | None


def describe_graft(model: ModelMixin, graft: Graft, base: Tensors) -> dict[str, Any]:
    """Return what `graft_config.json` of a graft folder holds; the save adds its checksum and its files.

    Args:
        base: `base_tensors` of the model, which a save gathers once.
    """
    return {
        "format": FORMAT,
        "versions": versions(),
        "base": _base(model, graft, base),
        "plan": graft.plan.to_dict(),
        "layers": _count_layers(graft),
        "lora": describe_adapters(model, graft),
        "compressed": {},
        "checksum": "",
        "history": graft.history,
        "scores": {},
        "about": {},
    }


def _count_layers(graft: Graft) -> dict[str, int]:
    """Return the number of sites of each kind, so that the edits can be drawn without the model."""
    # pairs are the blocks once more
    return dict(Counter(site.kind for site in graft.sites if site.kind != "block_pair"))


def describe_model(model: ModelMixin, graft: Graft) -> dict[str, Any]:
    """Return what `config.json` says of a full model; the save adds its checksum and its files."""
    origin = vars(model).get(ORIGIN, {})
    base = origin.get("base") if graft.is_standalone else _base(model, graft, base_tensors(model))
    return {
        "format": FORMAT,
        "versions": versions(),
        "base": base,
        "plan": graft.plan.to_dict(),
        "settings": origin.get("settings") or [],
        "scores": origin.get("scores") or {},
        "about": origin.get("about") or {},
        "imported": origin.get("imported"),
        "lora": describe_adapters(model, graft),
        "checksum": "",
        "buffers": _other_buffers(model),
        "history": graft.history,
    }


def _other_buffers(model: ModelMixin) -> dict[str, str]:
    """Return the dtypes of the buffers that are not saved with the weights, by name."""
    weights = model.state_dict()
    dtypes = {}
    for name, buffer in model.named_buffers():
        if name not in weights and buffer.is_floating_point():
            dtypes[name] = str(buffer.dtype).removeprefix("torch.")
    return dtypes


def describe_base(model: ModelMixin, base: Tensors, replaced: Iterable[str]) -> dict[str, Any]:
    """Return which model a graft was made on: its name and commit, and fingerprints of it and of replaced parts."""
    parts = {}
    for path in replaced:
        parts[path] = fingerprint({name: t for name, t in base.items() if name.startswith(f"{path}.")})
    name = hub_name(model)
    return {
        "model_class": type(model).__name__,
        "name_or_path": name,
        "revision": _commit(name, model),
        "subfolder": None if name is None else _subfolder(model),
        "fingerprint": fingerprint(base),
        "parts": parts,
    }


def _base(model: ModelMixin, graft: Graft, base: Tensors) -> dict[str, Any]:
    described = describe_base(model, base, graft.originals)
    return {
        **described,
        "float16_fingerprint": fingerprint(base, through=torch.float16),
        "license": license_of(_loaded_from(model), described["name_or_path"], described["revision"]),
    }


def hub_name(model: ModelMixin) -> str | None:
    """Return the repository that the base came from; None for a folder of this machine."""
    name = _loaded_from(model)
    cached = _in_cache(name)
    if cached:
        return cached[0]
    if name.count("/") == 1 and not os.path.isabs(name) and not os.path.exists(name):
        return name
    return None


def _loaded_from(model: ModelMixin) -> str:
    name = str(model.config.get("_name_or_path") or "")
    note = vars(model).get(LOADED_FROM)
    # A relative folder looks like a repository once the process works elsewhere.
    if note is not None and note.source == name and note.folder is not None:
        return note.folder
    return name


def _subfolder(model: ModelMixin) -> str | None:
    """Return the subfolder of its repository that a model was loaded from, as far as it is known."""
    note = vars(model).get(LOADED_FROM)
    if note is not None and note.source == str(model.config.get("_name_or_path") or "") and note.subfolder:
        return note.subfolder
    path = _in_cache(_loaded_from(model))
    return path[2] if path else None


def _in_cache(name: str) -> tuple[str, str, str | None] | None:
    """Return repository, commit and subfolder of a path into the Hub's cache."""
    if not os.path.isabs(name):
        return None
    for part in Path(name).parents:
        if part.name == "snapshots" and part.parent.name.startswith("models--"):
            repository = part.parent.name.removeprefix("models--").replace("--", "/")
            commit, *subfolders = Path(name).relative_to(part).parts
            return repository, commit, "/".join(subfolders) or None
    return None


def _commit(name: str | None, model: ModelMixin) -> str | None:
    """Return the commit that the base's configuration was read from, where the cache knows it."""
    if name is None:
        return None
    cached = _in_cache(_loaded_from(model))
    if cached:
        return cached[1]
    # A base that is loaded by its name has its configuration there, a pipeline's in a subfolder.
    for file in ("config.json", "transformer/config.json"):
        try:
            found = try_to_load_from_cache(name, file, cache_dir=constants.HF_HUB_CACHE)
        except HFValidationError:
            return None
        cached = _in_cache(found) if isinstance(found, str) else None
        if cached:
            return cached[1]
    return None


def versions() -> dict[str, str]:
    """Return the versions that a graft was made with."""
    return {
        "diffusers_graft": __version__,
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "safetensors": version("safetensors"),
        "python": platform.python_version(),
    }
