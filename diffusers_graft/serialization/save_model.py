"""`save_pretrained` of a grafted model: its weights as diffusers writes them, its description, its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict

from ..cards.card import write_card
from ..errors import StateError
from ..injection.graft import Graft
from ..injection.install import check_processors
from .atomic_folder import replacing, settle
from .config_file import CONFIG, MARK, described, holds_graft, is_adapter, to_text
from .describe import describe_whole
from .load_model import AUTO, config_digest, weight_files
from .lora import adapter_tensors
from .remote_code.operator_source import describe_code, sources, unnamed_sources
from .remote_code.pack import AUTO_MAP, FILE, library_file
from .tensors import apart, checksum, read_json, require_finite, write_text


def save_whole(
    original,
    model: ModelMixin,
    graft: Graft,
    folder: Path,
    *,
    variant: str | None = None,
    self_contained: bool = False,
    **kwargs: Any,
) -> None:
    """What diffusers' `save_pretrained` writes, the graft's description and its card, all at once.

    LoRA layers of the graft come along, unfused: their tensors lie among the weights, and the layers that carry them
    are written as they are underneath.

    Args:
        variant: other weights beside the first, as diffusers names them; `config.json` describes the graft of each.
        self_contained: the code that reads the model goes along, for people without this package:
            `AutoModel.from_pretrained` runs it where `trust_remote_code=True` allows.

    Raises `StateError` for LoRA layers that the graft did not bring, for a graft that lost its processors, and for
    other files than safetensors; `FileError` for values that are not finite, and for a folder that cannot be written.
    """
    if not kwargs.get("safe_serialization", True) or kwargs.get("use_flashpack"):
        raise StateError(
            "A grafted model is saved as safetensors and read from nothing else. Leave the other format out."
        )
    check_processors(graft)
    weights = _weights(model, graft)
    require_finite(weights, "the model")
    code = sources(graft.plan) if self_contained else {}
    description = {**describe_whole(model, graft, checksum(weights)), "code": describe_code(code)}
    there = _config_in(folder)
    others = _others(there, variant)
    auto = {AUTO: AUTO_MAP} if self_contained or (others and AUTO in there) else {}
    files = (
        ["config.json"] if holds_graft(folder) else ["config.json", CONFIG]
    )  # a graft there describes itself in the other
    stale = [*weight_files(variant), *([] if auto else [FILE]), *unnamed_sources(folder, *files, also=to_text(others))]
    code |= {FILE: library_file(graft.plan)} if self_contained else {}
    with replacing(folder, stale=stale) as stage:
        _write_weights(original, model, weights, stage, variant=variant, **kwargs)
        _describe_in_config(stage, others, variant or "", description, auto)
        shown = (
            {CONFIG: to_text(description)} if CONFIG in files else {}
        )  # for people and tools; config.json is what is read
        for name, text in {**code, **shown}.items():
            write_text(stage / name, text)
        write_card(stage, folder, model, graft, description, is_full_model=True)


def _describe_in_config(
    stage: Path, others: dict[str, Any], name: str, description: dict[str, Any], auto: dict[str, Any]
) -> None:
    """Put the description of a variant beside the others' into the `config.json` that diffusers wrote."""
    config = read_json(stage / "config.json")
    config.pop("_name_or_path", None)  # it may be a path of this machine; the description names the base
    description["model"] = config_digest(config)
    write_text(stage / "config.json", to_text(config | {MARK: {**others, name: description}, **auto}) + "\n")


def _config_in(folder: Path) -> dict[str, Any]:
    """The `config.json` that is there, empty where there is none that can be read."""
    settle(folder)
    try:
        return read_json(folder / "config.json")
    except OSError:  # FileError is one
        return {}


def _others(config: dict[str, Any], variant: str | None) -> dict[str, Any]:
    return {name: told for name, told in described(config).items() if name != (variant or "")}


def forget_description(model: ModelMixin) -> None:
    """Drop what a model built `from_config` of a grafted one took over, which would tell of weights that are not its
    own.
    """
    config = vars(model).get("_internal_dict", {})
    if MARK in config:
        model._internal_dict = FrozenDict({name: value for name, value in config.items() if name not in (MARK, AUTO)})


def require_alone(folder: Path, variant: str | None, *, where: str | None = None) -> None:
    """Raise `StateError` where diffusers' `config.json` of a plain model would leave grafted variants without
    description.
    """
    if others := _others(_config_in(folder), variant):
        there = ", ".join(repr(name or None) for name in others)
        own = "Give the plain one a repository or a folder of its own."
        raise StateError(f"{where or folder} holds a grafted model (variant {there}). {own}")


def _weights(model: ModelMixin, graft: Graft) -> dict[str, torch.Tensor]:
    """Every tensor by the name it has without LoRA around it, and those of LoRA."""
    tensors = model.state_dict()
    adapters = [name for name in tensors if is_adapter(name)]
    if adapters and graft.adapter_config is None:
        raise StateError(
            f"This model carries LoRA layers that are not the graft's ({adapters[0]} and others). Fuse or unload them first; "
            "those that dg.finetune trains are the graft's, and are saved with it."
        )
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if not is_adapter(name)}
    return apart({**plain, **adapter_tensors(model, graft)})


def _write_weights(original, model: ModelMixin, weights: dict[str, Any], folder: Path, **kwargs) -> None:
    """diffusers' own saving, of these tensors in place of what it would ask the model for."""
    vars(model)["state_dict"] = lambda: weights
    try:
        original(model, folder, **kwargs)
    finally:
        del vars(model)["state_dict"]
