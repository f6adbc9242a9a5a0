"""LoRA on a grafted model: peft's layers, installed and removed as seats are."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from diffusers import ModelMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from ...errors import StateError, TrainingError
from ...injection.graft import Graft

# What may differ from peft's own: these neither change the weights under a layer nor need more of a saved graft.
_CARRIED = {
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
_STARTS = (True, False, "gaussian", "orthogonal")


def add_lora(model: ModelMixin, graft: Graft, config: LoraConfig, *, resume: bool = False) -> None:
    """Put LoRA layers into the body of a grafted model; the graft remembers them.

    Works on models without diffusers' peft mixin, DiT and PixArt among them. Seats are left out unless
    `config.exclude_modules` says otherwise: new parts are trained whole. Without `config.target_modules`, all linear
    layers get them. To `resume`, layers that the graft got by the same settings are kept.

    Raises `StateError` where the model carries LoRA already, `TrainingError` for settings that a graft cannot save and
    take out again, or that fit no layer.
    """
    _require_plain(config)
    if config.target_modules is None:
        config = dataclasses.replace(config, target_modules="all-linear")
    if config.exclude_modules is None:
        seats = "|".join(re.escape(path) for path in graft.seats)
        config = dataclasses.replace(config, exclude_modules=rf"({seats})\..*")
    if resume and graft.adapter_config is not None and lora_settings(graft.adapter_config) == lora_settings(config):
        return
    if _layers(model):
        raise StateError("This model carries LoRA layers already. Fuse or unload them before training new ones.")
    vars(model).pop("peft_config", None)  # of layers that are gone
    try:
        inject_adapter_in_model(copy.deepcopy(config), model)  # peft shortens long lists of targets in place
    except ValueError as error:
        raise TrainingError(f"This LoRA does not fit {type(model).__name__}: {error}") from error
    graft.adapter_config = config
    inside = tuple(f"{path}." for path in graft.seats)
    for layer in _layers(model).values():
        layer.train(layer.get_base_layer().training)  # or its dropout would run in a model that evaluates
    graft.adapters = {path: layer for path, layer in _layers(model).items() if not path.startswith(inside)}


def _require_plain(config: LoraConfig) -> None:
    more = {name: value for name, value in lora_settings(config).items() if name not in _CARRIED}
    if more.pop("init_lora_weights", True) not in _STARTS:
        more["init_lora_weights"] = config.init_lora_weights
    if more:
        told = ", ".join(f"{name}={value!r}" for name, value in more.items())
        raise TrainingError(
            f"The LoRA of a graft is plain, so that it can be saved and taken out again: leave out {told}."
        )


def remove_lora(model: ModelMixin, graft: Graft) -> None:
    """Put back the layers that `add_lora` wrapped; what LoRA learned is lost."""
    for path, layer in _layers(model).items():
        model.set_submodule(path, layer.get_base_layer())
    graft.adapters, graft.adapter_config = {}, None


def refuse_foreign_lora(model: ModelMixin, graft: Graft) -> None:
    """Raise `StateError` for LoRA layers that the graft did not bring: it would neither save nor remove them."""
    if graft.adapter_config is None and (layers := _layers(model)):
        raise StateError(
            f"This model carries LoRA layers that are not the graft's ({next(iter(layers))} and others). Fuse or unload them "
            "first; those that dg.finetune trains are the graft's, and are saved with it."
        )


def lora_settings(config: LoraConfig) -> dict[str, Any]:
    """What was chosen, JSON-able: settings that differ from peft's own."""
    usual = LoraConfig().to_dict()
    chosen = {name: value for name, value in config.to_dict().items() if value != usual[name]}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in chosen.items()}


def _layers(model: ModelMixin) -> dict[str, BaseTunerLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
