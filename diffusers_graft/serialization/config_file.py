"""The description of a saved graft: read from `graft_config.json`, the header of the weights, or `config.json`.

A graft folder keeps it in the header of its weights and, for people and tools, in `graft_config.json`; a full model
keeps one for each variant in `config.json`, the only JSON file that pipelines download.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ..core.storage import finish_save, is_plain_name, parse_json, read_header, read_json, read_tensors
from ..errors import FileError
from ..injection.graft import Graft
from ..planning.plan import GraftPlan
from .entries import CARRIED, check_description

FORMAT = 2
KEY = "graft_config"  # in the header of a graft's weights
MARK = "_graft"  # in the config.json of a full model
ORIGIN = "_graft_origin"
ALL_WEIGHTS = "graft_model*.safetensors"  # of all variants


def file_names(variant: str | None = None) -> tuple[str, str, str]:
    """Return the names of a graft's files: its description, its weights, its proof."""
    infix = infix_of(variant)
    return f"graft_config{infix}.json", f"graft_model{infix}.safetensors", f"graft_proof{infix}.safetensors"


def infix_of(variant: str | None) -> str:
    """Return what a variant adds to file names, before their ending. Raises `FileError` for one that is no word."""
    is_word = isinstance(variant, str) and re.fullmatch(r"(\w[\w.-]*)?", variant)
    if variant is not None and not is_word:
        raise FileError(f"A variant is a word that goes into the names of files, such as bf16; got {variant!r}.")
    if not variant:
        return ""
    return f".{variant}"


CONFIG, WEIGHTS, PROOF = file_names()


def holds_graft(folder: Path) -> bool:
    """Return whether `save_graft` wrote there, any variant."""
    return any(folder.glob(ALL_WEIGHTS))


def descriptions_in(config: dict[str, Any]) -> dict[str, Any]:
    """Return the descriptions of a `config.json` by variant, the unnamed one by an empty text."""
    descriptions = config.get(MARK)
    if not isinstance(descriptions, dict):
        return {}
    return descriptions


def is_adapter(name: str) -> bool:
    """Return whether a saved tensor belongs to LoRA, by its name."""
    return ".lora_" in name


def set_origin(model: ModelMixin, graft: Graft, **carried: Any) -> None:
    """Note that a model stands without the base it was made on, and the entries that its next save repeats."""
    graft.is_standalone = True
    vars(model)[ORIGIN] = {name: carried.get(name) for name in CARRIED}


def to_text(config: dict[str, Any]) -> str:
    """Return a description as it is written in the file and in the header of the weights."""
    return json.dumps(config, indent=2, allow_nan=False)


def read_description(folder: Path, variant: str | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the description and the tensors of a saved graft. Raises `FileError` for anything unsound."""
    config_name, weights_name, _ = file_names(variant)
    path = folder / weights_name
    text = read_header(path).get(KEY)
    if text is None:
        raise FileError(f"{path} was not written by save_graft: its header holds no graft.")
    config = parse_json(text, f"The header of {path}")
    require_format(config, f"The header of {path}")
    # People may read the file and trust what it says, so both must say the same.
    if (folder / config_name).exists() and read_json(folder / config_name) != config:
        raise FileError(
            f"{folder / config_name} was edited, or belongs to another graft than {weights_name}, which carries its "
            "own copy. Delete it to load the weights as they were saved, or save the graft again."
        )
    check_description(config, str(path), is_full_model=False)
    return config, read_tensors(path)


def require_format(config: dict[str, Any], where: str) -> None:
    """Raise `FileError` for a description of a format that this version cannot read."""
    number = config.get("format")
    if type(number) is not int or number < 1:
        raise FileError(f"{where} is damaged: its format is {number!r}.")
    if number == FORMAT:
        return
    if number < FORMAT:
        raise FileError(f"{where} has format {number}, which no released version wrote. Save the graft again.")
    made_with = "of a newer version"
    versions = config.get("versions")
    if isinstance(versions, dict):
        made_with = versions.get("diffusers_graft", made_with)
    raise FileError(
        f"{where} has format {number}; this version of diffusers-graft reads format {FORMAT}. It needs "
        f"diffusers-graft {made_with} or later: pip install -U diffusers-graft"
    )


def read_plan(data: dict[str, Any], model: ModelMixin) -> GraftPlan:
    """Read the plan of a description. Raises `FileError` also where it holds what no plan of ours does.

    Args:
        model: that the plan is for; a plan of more edits than it has modules is not read at all.
    """
    # Counted first, since reading an edit takes a thousand times longer.
    edits = data.get("edits")
    modules = sum(1 for _ in model.modules())
    if isinstance(edits, list) and len(edits) > modules:
        raise FileError(f"This plan has {len(edits):,} edits, for a {type(model).__name__} of {modules:,} modules.")
    return GraftPlan.from_dict(data)


def stale_files(folder: Path, replaced: Iterable[str]) -> list[str]:
    """Return the files that an earlier save of ours wrote and that no description names once it is replaced.

    A description lists the files of its save as `files`; nothing goes by its name alone.

    Args:
        replaced: descriptions that the new save replaces: names of graft folders' files, and `config.json:variant`
            of full models.
    """
    finish_save(folder)
    written: set[str] = set()
    needed: set[str] = set()
    for place, files in _records(folder).items():
        if place in replaced:
            written |= files
        else:
            needed |= files
    return sorted(written - needed)


def _records(folder: Path) -> dict[str, set[str]]:
    """Return the files that each description in a folder lists."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("graft_config*.json")):
        found[path.name] = read_if_sound(path)
    for variant, description in descriptions_in(read_if_sound(folder / "config.json")).items():
        found[f"config.json:{variant}"] = description
    records: dict[str, set[str]] = {}
    for place, description in found.items():
        files = isinstance(description, dict) and description.get("files")
        if isinstance(files, list):
            # The folder may come from somebody else: only names that a save of ours gives, and never a path.
            records[place] = {name for name in files if isinstance(name, str) and _is_ours(name)}
    return records


_OURS = re.compile(
    r"graft_(config|model|proof|operator_|code)[\w.-]*|README\.md|training\.png"
    r"|diffusion_pytorch_model[\w.-]*\.(safetensors|json)"
)


def _is_ours(name: str) -> bool:
    return is_plain_name(name) and _OURS.fullmatch(name) is not None


def read_if_sound(path: Path) -> dict[str, Any]:
    """Read a JSON file, empty where there is none that can be read."""
    try:
        return read_json(path)
    except FileError:
        return {}
