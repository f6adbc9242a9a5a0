"""What `graft_config.json` says: read back, and brought up to date where an older version wrote it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ..core.sites import Site
from ..errors import FileError
from ..injection.graft import Graft
from ..operators import Operator, configure
from ..operators.registry import configure_class
from ..planning.plan import Edit, GraftPlan
from .tensors import checksum, digest, parse_json, read_header, read_json, read_tensors

FORMAT = 2
KEY = "graft_config"
MARK = (
    "_graft"  # where config.json describes the grafts of a whole model, by variant: pipelines download no other JSON
)
CARRIED = (
    "base",
    "settings",
    "scores",
    "imported",
    "about",
)  # by a model that is saved whole, loaded, and saved again
ORIGIN = "_graft_origin"
_KINDS = {
    "format": int,
    "versions": dict,
    "base": dict,
    "plan": dict,
    "checksum": str,
    "history": list,
    "compressed": dict,
    "scores": dict,
    "about": dict,
}


def names(variant: str | None = None) -> tuple[str, str, str]:
    """The files of a graft: its description, its weights, its proof."""
    infix = infix_of(variant)
    return f"graft_config{infix}.json", f"graft_model{infix}.safetensors", f"graft_proof{infix}.safetensors"


def infix_of(variant: str | None) -> str:
    """What a variant adds to the names of files, before their ending. Raises `FileError` for one that is no word."""
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"(\w[\w.-]*)?", variant)):
        raise FileError(f"A variant is a word that goes into the names of files, such as bf16; got {variant!r}.")
    return f".{variant}" if variant else ""


CONFIG, WEIGHTS, PROOF = names()
ALL_WEIGHTS = "graft_model*.safetensors"  # of all variants


def holds_graft(folder: Path) -> bool:
    """Whether `save_graft` wrote there, any variant."""
    return any(folder.glob(ALL_WEIGHTS))


def described(config: dict[str, Any]) -> dict[str, Any]:
    """What a `config.json` says of whole grafted models: a description of each variant, that of the first by an empty
    name.
    """
    return config[MARK] if isinstance(config.get(MARK), dict) else {}


def is_adapter(name: str) -> bool:
    """Whether a saved tensor belongs to LoRA, by its name."""
    return ".lora_" in name


def as_whole(model: ModelMixin, graft: Graft, **carried: Any) -> None:
    """Note that a model stands without the base it was made on, and what its description carries on."""
    graft.is_standalone = True
    vars(model)[ORIGIN] = {name: carried.get(name) for name in CARRIED}


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
    return GraftPlan.from_dict(data) if not classes else _plan_with(data, classes)


def _plan_with(data: Any, classes: dict[str, type[Operator]]) -> GraftPlan:
    plan = GraftPlan.from_dict({**data, "edits": []})
    try:
        edits = [{**edit} for edit in data["edits"]]
        return replace(
            plan, edits=tuple(Edit(Site.from_dict(edit.pop("site")), _config(edit, classes)) for edit in edits)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"This is not a graft plan: {error!r}.") from error


def _config(spec: Any, classes: dict[str, type[Operator]]) -> Any:
    """The config of an operator that came as code, or that is made of some that did; any other setting as it is."""
    if not isinstance(spec, dict) or "operator" not in spec:
        return spec
    settings = {name: _config(value, classes) for name, value in spec.items()}
    return configure_class(classes[spec["operator"]], settings) if spec["operator"] in classes else configure(settings)


def check_kinds(config: dict[str, Any], kinds: dict[str, type], where: str) -> None:
    """Raise `FileError` where an entry is missing or of another type."""
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind) or (kind is int and isinstance(config[name], bool)):
            raise FileError(
                f"{where} is damaged: its {name} is {type(config.get(name)).__name__}, not {kind.__name__}."
            )


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
            "lora_dropout": float(saved.get("lora_dropout") or 0.0),
            "use_rslora": bool(saved.get("use_rslora")),
            "use_dora": bool(saved.get("use_dora")),
            "fan_in_fan_out": bool(saved.get("fan_in_fan_out")),
            "layers": {path: {"r": saved.get("r"), "alpha": saved.get("lora_alpha")} for path in paths},
        }
    base = config.get("base") if isinstance(config.get("base"), dict) else {}
    base = {**base, "fingerprint": None, "sha256": base.get("fingerprint"), "parts": {}}
    later = {"format": FORMAT, "base": base, "lora": lora, "compressed": {}, "scores": {}, "about": {}}
    return {**config, **later, "checksum": checksum(tensors)}, tensors
