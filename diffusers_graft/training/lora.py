"""LoRA on a grafted model: peft's layers, installed and removed as seats are."""
from __future__ import annotations

import dataclasses
import re

from diffusers import ModelMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import StateError
from ..graft import Graft


def add_lora(model: ModelMixin, graft: Graft, config: LoraConfig) -> None:
    """Put LoRA layers into the body of a grafted model; the graft remembers them.

    Works on models without diffusers' peft mixin, DiT and PixArt among them. Seats are left out unless
    `config.exclude_modules` says otherwise: new parts are trained whole.

    Raises `StateError` where the model carries LoRA already.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise StateError("This model carries LoRA layers already. Fuse or unload them before training new ones.")
    if config.exclude_modules is None:
        seats = "|".join(re.escape(path) for path in graft.seats)
        config = dataclasses.replace(config, exclude_modules=rf"({seats})\..*")
    inject_adapter_in_model(config, model)
    graft.adapter_config = config
    inside = tuple(f"{path}." for path in graft.seats)
    graft.adapters = {
        path: module for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not path.startswith(inside)
    }  # fmt: skip
