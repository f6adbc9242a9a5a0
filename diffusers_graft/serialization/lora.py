"""LoRA beside a graft: its layers by name and rank in the description, its tensors among those of the graft."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from ..errors import FileError
from ..injection.graft import Graft
from ..training.finetune.lora import add_lora, refuse_foreign_lora, remove_lora

_SHARED = {"lora_dropout": float, "use_rslora": bool, "use_dora": bool, "fan_in_fan_out": bool}


def describe_adapters(model: ModelMixin, graft: Graft) -> dict[str, Any] | None:
    """The LoRA of a graft as data, resolved layer by layer; None without one."""
    config = graft.adapter_config
    if config is None:
        return None
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    described = {
        path: {"r": layer.r["default"], "alpha": layer.lora_alpha["default"]} for path, layer in layers.items()
    }
    return {**{name: kind(getattr(config, name)) for name, kind in _SHARED.items()}, "layers": described}


def adapter_tensors(model: ModelMixin, graft: Graft) -> dict[str, torch.Tensor]:
    """The tensors of a graft's LoRA by their names in the model. Raises `StateError` for LoRA that is not the graft's."""
    refuse_foreign_lora(model, graft)
    return {} if graft.adapter_config is None else get_peft_model_state_dict(model)


def load_adapters(model: ModelMixin, graft: Graft, described: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Add a saved LoRA to a model whose graft is installed. Raises `FileError` where it does not fit,
    `StateError` where there is another; nothing is left then."""
    if described is None and not tensors:
        return
    config = _config(described)
    refuse_foreign_lora(model, graft)
    shapes = {name: (parameter.shape, parameter.requires_grad) for name, parameter in model.named_parameters()}
    with _undone_on_error(model, graft):
        add_lora(model, graft, config)
        expected = {(name, value.shape) for name, value in get_peft_model_state_dict(model).items()}
        given = {(name, value.shape) for name, value in tensors.items()}
        adapted = {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}
        if odd := sorted({name for name, _ in expected ^ given} | (adapted ^ set(config.target_modules))):
            raise FileError(f"The saved LoRA does not fit the model: {', '.join(odd[:4])} differ.")
        set_peft_model_state_dict(model, tensors)
    for name, parameter in model.named_parameters():
        known = shapes.get(name.replace(".base_layer.", "."))
        if known is not None:
            parameter.requires_grad_(known[1])  # peft freezes what it does not train


def _config(described: Any) -> LoraConfig:
    """peft's config from our description: numbers and names alone, since some of peft's settings name code to import."""
    try:
        layers = {str(path): (row["r"], row["alpha"]) for path, row in described["layers"].items()}
        settings = {name: described[name] for name in _SHARED}
        sound = layers and all(type(settings[name]) is kind for name, kind in _SHARED.items())
        sound = sound and all(type(r) is int and 0 < r < 2**16 and type(a) in (int, float) for r, a in layers.values())
        if not sound or not all(re.fullmatch(r"[\w.]+", path) for path in layers):
            raise ValueError("a rank, a path or a setting is none")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise FileError(f"The description of this graft's LoRA is damaged: {error!r}.") from error
    r, alpha = next(iter(layers.values()))
    escaped = {re.escape(path): pair for path, pair in layers.items()}
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=list(layers),
        exclude_modules=[],
        rank_pattern={path: pair[0] for path, pair in escaped.items() if pair[0] != r},
        alpha_pattern={path: pair[1] for path, pair in escaped.items() if pair[1] != alpha},
        **settings,
    )


@contextlib.contextmanager
def _undone_on_error(model: ModelMixin, graft: Graft) -> Iterator[None]:
    """Where LoRA cannot be added whole, put every module back in its place."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException as error:
        remove_lora(model, graft)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
        if isinstance(error, ValueError | TypeError | RuntimeError | KeyError) and not isinstance(error, FileError):
            raise FileError(f"The saved LoRA does not fit the model: {error}") from error
        raise
