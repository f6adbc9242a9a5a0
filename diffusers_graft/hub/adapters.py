"""LoRA weights beside a graft, in peft's own files: `adapter_config.json` and `adapter_model.safetensors`."""
from __future__ import annotations

from pathlib import Path

from diffusers import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from ..errors import FileError
from ..graft import Graft
from ..training.lora import add_lora
from .files import read_tensors, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapters(model: ModelMixin, graft: Graft, folder: Path) -> None:
    """Write the LoRA of a graft; without one, remove what an earlier save left."""
    if graft.adapter_config is None:
        for name in (WEIGHTS, CONFIG):
            (folder / name).unlink(missing_ok=True)
        return
    write_tensors(folder / WEIGHTS, get_peft_model_state_dict(model), {})
    graft.adapter_config.save_pretrained(folder)


def load_adapters(model: ModelMixin, graft: Graft, folder: Path) -> None:
    """Add the saved LoRA, if there is one, to a model whose graft is installed."""
    if not (folder / CONFIG).exists():
        return
    add_lora(model, graft, LoraConfig.from_pretrained(folder))
    result = set_peft_model_state_dict(model, read_tensors(folder / WEIGHTS))
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise FileError(f"{folder / WEIGHTS} does not fit the model: {sorted(missing + result.unexpected_keys)}.")
