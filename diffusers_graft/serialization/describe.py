"""What `graft_config.json` says of a graft: its plan, the base it was made on, what was done to it, and with what."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
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
from .tensors import fingerprint


def describe(model: ModelMixin, graft: Graft, total: str) -> dict[str, Any]:
    """What `graft_config.json` holds."""
    return {
        "format": FORMAT,
        "versions": versions(),
        "base": _base(model, graft),
        "plan": graft.plan.to_dict(),
        "lora": describe_adapters(model, graft),
        "compressed": {},
        "checksum": total,
        "history": graft.history,
        "scores": {},
        "about": {},
    }


def describe_whole(model: ModelMixin, graft: Graft, total: str) -> dict[str, Any]:
    """What `graft_config.json` holds beside a whole model."""
    origin = vars(model).get(ORIGIN, {})
    base = origin.get("base") if graft.is_standalone else _base(model, graft)
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
        "checksum": total,
        "buffers": _other_buffers(model),
        "history": graft.history,
    }


def _other_buffers(model: ModelMixin) -> dict[str, str]:
    """Dtypes of the buffers that are not saved with the weights, by name."""
    weights = model.state_dict()
    own = {
        name: buffer for name, buffer in model.named_buffers() if name not in weights and buffer.is_floating_point()
    }
    return {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in own.items()}


def describe_base(model: ModelMixin, replaced: Iterable[str]) -> dict[str, Any]:
    """Which model a graft was made on: its name and commit, its weights, and those of each part that is replaced."""
    tensors, name = base_tensors(model), hub_name(model)
    parts = {path: fingerprint({k: t for k, t in tensors.items() if k.startswith(f"{path}.")}) for path in replaced}
    return {
        "model_class": type(model).__name__,
        "name_or_path": name,
        "revision": _commit(name, model),
        "fingerprint": fingerprint(tensors),
        "parts": parts,
    }


def _base(model: ModelMixin, graft: Graft) -> dict[str, Any]:
    base, in_half = describe_base(model, graft.originals), fingerprint(base_tensors(model), through=torch.float16)
    license = license_of(_loaded_from(model), base["name_or_path"], base["revision"])
    return {**base, "float16_fingerprint": in_half, "license": license}


def hub_name(model: ModelMixin) -> str | None:
    """Where the base came from, unless that is a folder of this machine."""
    name = _loaded_from(model)
    if path := _in_cache(name):
        return path[0]
    return name if name.count("/") == 1 and not os.path.exists(name) and not os.path.isabs(name) else None


def _loaded_from(model: ModelMixin) -> str:
    return str(model.config.get("_name_or_path") or "")


def _in_cache(name: str) -> tuple[str, str] | None:
    """Repository and commit of a path into the Hub's cache."""
    for part in Path(name).parents if os.path.isabs(name) else ():
        if part.name == "snapshots" and part.parent.name.startswith("models--"):
            return part.parent.name.removeprefix("models--").replace("--", "/"), Path(name).relative_to(part).parts[0]
    return None


def _commit(name: str | None, model: ModelMixin) -> str | None:
    """The commit that the base's configuration was read from, where the cache knows it."""
    if name is None:
        return None
    if path := _in_cache(_loaded_from(model)):
        return path[1]
    for file in ("config.json", "transformer/config.json"):
        try:
            found = try_to_load_from_cache(name, file, cache_dir=constants.HF_HUB_CACHE)
        except HFValidationError:
            return None
        if isinstance(found, str) and (path := _in_cache(found)):
            return path[1]
    return None


def versions() -> dict[str, str]:
    """What the graft was made with."""
    return {
        "diffusers_graft": __version__,
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "safetensors": version("safetensors"),
        "python": platform.python_version(),
    }
