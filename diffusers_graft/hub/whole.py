"""`save_pretrained` of a grafted model: its weights as diffusers writes them, its description, its card."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ..errors import StateError
from ..graft import Graft
from ..surgery import check_seats
from .adapters import adapter_tensors
from .cards import write_card
from .code import describe_code, sources
from .describing import describe_whole
from .description import CONFIG, is_adapter, to_text
from .files import checksum, read_json, write_text
from .folders import replacing
from .full import AUTO, MARK, STEM, config_digest
from .self_contained import AUTO_MAP, FILE, library_file


def save_whole(original, model: ModelMixin, graft: Graft, folder: Path, *args, self_contained: bool = False, **kwargs) -> None:
    """What diffusers' `save_pretrained` writes, the graft's description and its card, all at once.

    LoRA layers of the graft come along, unfused: their tensors lie among the weights, and the layers that carry them are
    written as they are underneath.

    Args:
        self_contained: the code that reads the model goes along, for people without this package: `AutoModel.from_pretrained`
            runs it where `trust_remote_code=True` allows.

    Raises `StateError` for LoRA layers that the graft did not bring, and for a graft that lost its processors.
    """
    check_seats(graft)
    weights = _weights(model, graft)
    code = sources(graft.plan) if self_contained else {}
    description = {**describe_whole(model, graft, checksum(weights)), "code": describe_code(code)}
    suffix = f".{kwargs['variant']}" if kwargs.get("variant") else ""
    stale = [f"{STEM}{suffix}.safetensors", f"{STEM}{suffix}-?????-of-?????.safetensors",
             f"{STEM}-?????-of-?????{suffix}.safetensors", f"{STEM}.safetensors.index{suffix}.json",
             FILE, "graft_operator_*.py"]  # fmt: skip
    code |= {FILE: library_file(graft.plan)} if self_contained else {}
    with replacing(folder, stale=stale) as stage:
        _write_weights(original, model, weights, stage, *args, **kwargs)
        config = read_json(stage / "config.json")
        config.pop("_name_or_path", None)  # it may be a path of this machine; the description names the base
        description["model"] = config_digest(config)
        config |= {MARK: description} | ({AUTO: AUTO_MAP} if self_contained else {})
        write_text(stage / "config.json", to_text(config) + "\n")
        write_text(stage / CONFIG, to_text(description) + "\n")
        for name, text in code.items():
            write_text(stage / name, text)
        write_card(stage, folder, model, graft, description, whole=True)


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
    return {**plain, **adapter_tensors(model, graft)}


def _write_weights(original, model: ModelMixin, weights: dict[str, Any], folder: Path, *args, **kwargs) -> None:
    """diffusers' own saving, of these tensors in place of what it would ask the model for."""
    vars(model)["state_dict"] = lambda: weights
    try:
        original(model, folder, *args, **kwargs)
    finally:
        del vars(model)["state_dict"]
