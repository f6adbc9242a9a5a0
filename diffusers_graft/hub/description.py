"""What `graft_config.json` says: written, read back, and brought up to date where an older version wrote it."""
from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from .._version import __version__
from ..errors import FileError
from ..graft import Graft, base_tensors
from ..operators import Operator, _configured
from ..plan import Edit, GraftPlan
from ..site import Site
from .adapters import describe_adapters
from .files import checksum, digest, fingerprint, parse_json, read_header, read_json, read_tensors

FORMAT = 2
KEY = "graft_config"
CARRIED = ("base", "settings", "scores", "imported", "about")  # by a model that is saved whole, loaded, and saved again
_ORIGIN = "_graft_origin"
_KINDS = {"format": int, "versions": dict, "base": dict, "plan": dict, "checksum": str, "history": list,
          "compressed": dict, "scores": dict, "about": dict}  # fmt: skip


def names(variant: str | None = None) -> tuple[str, str, str]:
    """The files of a graft: its description, its weights, its proof."""
    suffix = f".{variant}" if variant else ""
    return f"graft_config{suffix}.json", f"graft_model{suffix}.safetensors", f"graft_proof{suffix}.safetensors"


CONFIG, WEIGHTS, PROOF = names()


def describe(model: ModelMixin, graft: Graft, total: str) -> dict[str, Any]:
    """What `graft_config.json` holds."""
    return {
        "format": FORMAT,
        "versions": versions(),
        "base": describe_base(model, graft.originals),
        "plan": graft.plan.to_dict(),
        "lora": describe_adapters(model, graft),
        "compressed": {},
        "checksum": total,
        "history": graft.history,
        "scores": {},
        "about": {},
    }


def describe_whole(model: ModelMixin, graft: Graft) -> dict[str, Any]:
    """What `graft_config.json` holds beside a whole model."""
    origin = vars(model).get(_ORIGIN, {})
    base = origin.get("base") if graft.standalone else describe_base(model, graft.originals)
    return {"format": FORMAT, "versions": versions(), "base": base, "plan": graft.plan.to_dict(),
            "settings": origin.get("settings") or [], "scores": origin.get("scores") or {}, "about": origin.get("about") or {},
            "imported": origin.get("imported"),
            "checksum": checksum(model.state_dict()), "buffers": _other_buffers(model), "history": graft.history}  # fmt: skip


def as_whole(model: ModelMixin, graft: Graft, **carried: Any) -> None:
    """Note that a model stands without the base it was made on, and what its description carries on."""
    graft.standalone = True
    vars(model)[_ORIGIN] = {name: carried.get(name) for name in CARRIED}


def _other_buffers(model: ModelMixin) -> dict[str, str]:
    """Dtypes of the buffers that are not saved with the weights, by name."""
    weights = model.state_dict()
    own = {name: buffer for name, buffer in model.named_buffers() if name not in weights and buffer.is_floating_point()}
    return {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in own.items()}


def describe_base(model: ModelMixin, replaced: Iterable[str]) -> dict[str, Any]:
    """Which model a graft was made on: its name and commit, its weights, and those of each part that is replaced."""
    tensors, name = base_tensors(model), hub_name(model)
    parts = {path: fingerprint({k: t for k, t in tensors.items() if k.startswith(f"{path}.")}) for path in replaced}
    return {"model_class": type(model).__name__, "name_or_path": name, "revision": _commit(name, model),
            "fingerprint": fingerprint(tensors), "parts": parts}  # fmt: skip


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
    return {"diffusers_graft": __version__, "torch": str(torch.__version__), "diffusers": diffusers.__version__,
            "safetensors": version("safetensors"), "python": platform.python_version()}  # fmt: skip


def to_text(config: dict[str, Any]) -> str:
    """As it stands in the file and in the header of the weights."""
    return json.dumps(config, indent=2, allow_nan=False)


def read_description(folder: Path, variant: str | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Description and tensors of a saved graft, of the present format. Raises `FileError` for anything unsound."""
    config_name, weights_name, _ = names(variant)
    path = folder / weights_name
    text = read_header(path).get(KEY)
    if text is None:
        raise FileError(f"{path} was not written by save_graft: its header holds no graft.")
    config = parse_json(text, f"The header of {path}")
    number = require_format(config, f"The header of {path}")
    if (folder / config_name).exists() and read_json(folder / config_name) != config:
        raise FileError(
            f"{folder / config_name} was edited, or belongs to another graft than {weights_name}, which carries its own copy. "
            "Delete it to load the weights as they were saved, or save the graft again."
        )
    tensors = read_tensors(path)
    if number == 1:
        config, tensors = _from_format_1(config, tensors, folder)
    check_kinds(config, _KINDS, str(path))
    return config, tensors


def require_format(config: dict[str, Any], where: str) -> int:
    """The format of a description. Raises `FileError` for one that this version cannot read."""
    number = config.get("format")
    if type(number) is not int or number < 1:
        raise FileError(f"{where} is damaged: its format is {number!r}.")
    if number > FORMAT:
        made_with = config["versions"].get("diffusers_graft") if isinstance(config.get("versions"), dict) else None
        raise FileError(
            f"{where} has format {number}; this version of diffusers-graft reads up to {FORMAT}. It needs diffusers-graft "
            f"{made_with or 'of a newer version'} or later: pip install -U diffusers-graft"
        )
    return number


def read_plan(data: Any, classes: dict[str, type[Operator]] | None = None) -> GraftPlan:
    """A plan from a description. Raises `FileError` also where it holds what no plan of ours does.

    Args:
        classes: operators by name that came along as code.
    """
    plan = GraftPlan.from_dict(data) if not classes else _plan_with(data, classes)
    sound = isinstance(plan.model_class, str)
    for edit in plan.edits:
        sizes = {name: value for name, value in vars(edit.site).items() if name not in ("kind", "path", "activation")}
        sound = sound and isinstance(edit.site.path, str) and isinstance(edit.site.activation, str | None)
        sound = sound and all(value is None or (type(value) is int and 0 <= value < 2**31) for value in sizes.values())
    if not sound:
        raise FileError("This is not a graft plan: a site's path is no text, or a size of it no number.")
    if len({edit.site.path for edit in plan.edits}) < len(plan.edits):
        raise FileError("This is not a graft plan: it edits one site twice.")
    return plan


def _plan_with(data: Any, classes: dict[str, type[Operator]]) -> GraftPlan:
    edits = []
    for edit in data["edits"]:
        if isinstance(edit, dict) and edit.get("operator") in classes:
            settings = {name: value for name, value in edit.items() if name != "site"}
            try:
                edits.append(Edit(Site.from_dict(edit["site"]), _configured(classes[edit["operator"]], settings)))
            except (KeyError, TypeError, AttributeError) as error:
                raise FileError(f"This is not a graft plan: {error!r}.") from error
        else:
            edits += GraftPlan.from_dict({**data, "edits": [edit]}).edits
    return replace(GraftPlan.from_dict({**data, "edits": []}), edits=tuple(edits))


def check_kinds(config: dict[str, Any], kinds: dict[str, type], where: str) -> None:
    """Raise `FileError` where an entry is missing or of another type."""
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind) or (kind is int and isinstance(config[name], bool)):
            raise FileError(f"{where} is damaged: its {name} is {type(config.get(name)).__name__}, not {kind.__name__}.")


def _from_format_1(config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path):
    """Format 1 kept LoRA in files of its own, and hashed whole models."""
    if digest(tensors) != config.get("tensors_sha256"):
        raise FileError(f"{folder / WEIGHTS} was edited or damaged: its tensors are not those that were saved.")
    lora = None
    if (folder / "adapter_config.json").exists():
        saved = read_json(folder / "adapter_config.json")
        adapters = read_tensors(folder / "adapter_model.safetensors")
        tensors = tensors | adapters
        paths = sorted({name.partition(".lora_")[0] for name in adapters})
        lora = {
            "lora_dropout": float(saved.get("lora_dropout") or 0.0), "use_rslora": bool(saved.get("use_rslora")),
            "use_dora": bool(saved.get("use_dora")), "fan_in_fan_out": bool(saved.get("fan_in_fan_out")),
            "layers": {path: {"r": saved.get("r"), "alpha": saved.get("lora_alpha")} for path in paths},
        }  # fmt: skip
    base = config.get("base") if isinstance(config.get("base"), dict) else {}
    base = {**base, "fingerprint": None, "sha256": base.get("fingerprint"), "parts": {}}
    later = {"format": FORMAT, "base": base, "lora": lora, "compressed": {}, "scores": {}, "about": {}}
    return {**config, **later, "checksum": checksum(tensors)}, tensors
