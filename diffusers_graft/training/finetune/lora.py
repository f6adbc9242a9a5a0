"""LoRA beside a graft: layers of peft that are installed and removed as seats are."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin

from ...errors import StateError, TrainingError
from ...injection.graft import Graft

if TYPE_CHECKING:
    from peft import LoraConfig

# Settings that may differ from peft's: they neither change the weights under a layer nor add to a saved graft.
_SAVED_SETTINGS = {
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "task_type",
}
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def add_lora(model: ModelMixin, graft: Graft, config: LoraConfig, *, resume: bool = False, seed: int = 0) -> None:
    """Add LoRA layers to a grafted model and record them in its graft.

    Works on models without diffusers' peft mixin, DiT and PixArt among them. Seats get none unless
    `config.exclude_modules` says otherwise, since their weights are trained in full. Without `config.target_modules`,
    all linear layers get them.

    Args:
        resume: leave layers in place that the graft has already, if the same settings made them.
        seed: of the initial weights; torch's global generator is left as it is.

    Raises:
        StateError: the model has LoRA layers already.
        TrainingError: settings that a graft cannot save and remove again, or that fit no layer.
    """
    _require_saveable(config)
    config = _with_defaults(config, graft)
    if resume and graft.adapter_config is not None and lora_settings(graft.adapter_config) == lora_settings(config):
        return
    if _find_layers(model):
        raise StateError("This model carries LoRA layers already. Fuse or unload them before training new ones.")
    # peft leaves this record behind when its layers are removed, and would refuse new ones for it.
    vars(model).pop("peft_config", None)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            # A copy, since peft shortens long lists of targets in place.
            from peft import inject_adapter_in_model

            inject_adapter_in_model(copy.deepcopy(config), model)
        except ValueError as error:
            raise TrainingError(f"This LoRA does not fit {type(model).__name__}: {error}") from error
    graft.adapter_config = config
    layers = _find_layers(model)
    for layer in layers.values():
        # peft's layers start in training mode: their dropout would run in a model that evaluates.
        layer.train(layer.get_base_layer().training)
    seats = tuple(f"{path}." for path in graft.seats)
    graft.adapters = {path: layer for path, layer in layers.items() if not path.startswith(seats)}


def remove_lora(model: ModelMixin, graft: Graft) -> None:
    """Remove the LoRA layers of a model, with what they learned, and put back the layers they wrapped."""
    for path, layer in _find_layers(model).items():
        model.set_submodule(path, layer.get_base_layer())
    graft.adapters = {}
    graft.adapter_config = None


def refuse_foreign_lora(model: ModelMixin, graft: Graft) -> None:
    """Raise `StateError` for LoRA layers that the graft did not add: it would neither save nor remove them."""
    layers = _find_layers(model)
    if layers and graft.adapter_config is None:
        raise StateError(
            f"This model carries LoRA layers that are not the graft's ({next(iter(layers))} and others). Fuse or "
            "unload them first; those that dg.finetune trains are the graft's, and are saved with it."
        )


def lora_settings(config: LoraConfig) -> dict[str, Any]:
    """Return the settings that differ from peft's defaults, JSON-able."""
    defaults = type(config)().to_dict()
    chosen = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    for name, value in chosen.items():
        # Sets have no order, which JSON and comparisons need.
        if isinstance(value, set):
            chosen[name] = sorted(value)
    return chosen


def _require_saveable(config: LoraConfig) -> None:
    settings = lora_settings(config)
    refused = {name: value for name, value in settings.items() if name not in _SAVED_SETTINGS}
    if refused.get("init_lora_weights", True) in _INITIALISATIONS:
        refused.pop("init_lora_weights", None)
    if refused:
        named = ", ".join(f"{name}={value!r}" for name, value in refused.items())
        raise TrainingError(
            f"The LoRA of a graft is plain, so that it can be saved and removed again: leave out {named}."
        )


def _with_defaults(config: LoraConfig, graft: Graft) -> LoraConfig:
    """Return the settings with target layers filled in: all linear ones outside the seats."""
    if config.target_modules is None:
        config = dataclasses.replace(config, target_modules="all-linear")
    if config.exclude_modules is None:
        seats = "|".join(re.escape(path) for path in graft.seats)
        config = dataclasses.replace(config, exclude_modules=rf"({seats})\..*")
    return config


def _find_layers(model: ModelMixin) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
