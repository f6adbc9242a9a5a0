"""A grafted model as a whole: `save_pretrained`, and back without the base it was made on."""
from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin

from ..errors import FileError, StateError
from ..graft import build_graft, installed, is_enabled
from ..plan import GraftPlan
from ..surgery import check_seats, install
from .files import local_folder, read_json, read_tensors, write_text
from .store import CONFIG, FORMAT, versions

_PATTERNS = ["*.json", "*.safetensors", "README.md"]


def load_pretrained(
    source: str | Path, *, revision: str | None = None, torch_dtype: torch.dtype | None = None, subfolder: str = "",
    **hub_arguments: Any,
) -> ModelMixin:  # fmt: skip
    """A grafted model, of the right class, from what its `save_pretrained` wrote.

    Args:
        source: folder or Hub repository id.
        torch_dtype: as in diffusers' `from_pretrained`; float32 unless given.

    Raises:
        FileError: missing, damaged, or not a whole grafted model.
    """
    folder = local_folder(source, _PATTERNS, revision=revision, **hub_arguments) / subfolder
    config, graft_config = read_json(folder / "config.json"), read_json(folder / CONFIG)
    if graft_config.get("format", FORMAT + 1) > FORMAT:
        raise FileError(f"{folder / CONFIG} has a format this version does not read. Upgrade: pip install -U diffusers-graft")
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise FileError(f"{folder / 'config.json'} names the class {config.get('_class_name')}, which diffusers does not have.")
    model = cls.from_config(config)
    graft = build_graft(model, GraftPlan.from_dict(graft_config["plan"]))
    install(model, graft)
    graft.standalone, graft.history = True, graft_config["history"]
    try:
        model.load_state_dict(_weights(folder))
    except RuntimeError as error:
        raise FileError(f"The weights in {folder} do not fit the model and its graft: {error}") from error
    return model.to(torch_dtype or torch.float32).eval()


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(path for path in folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        raise FileError(f"There are no diffusion_pytorch_model*.safetensors in {folder}.")
    return {name: tensor for path in files for name, tensor in read_tensors(path).items()}


def attach_saving() -> None:
    """Teach `ModelMixin.save_pretrained` and `from_pretrained` about grafts; without one they are what they were."""
    ModelMixin.save_pretrained = _saving(ModelMixin.save_pretrained)
    ModelMixin.from_pretrained = classmethod(_loading(ModelMixin.from_pretrained.__func__))


def _saving(original):
    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        graft = installed(self)
        if graft is not None and is_enabled(self):
            check_seats(graft)
            if graft.adapter_config is not None:
                raise StateError("A whole model is saved without LoRA layers; save_graft keeps them.")
            config = {"format": FORMAT, "versions": versions(), "plan": graft.plan.to_dict(), "history": graft.history}
            write_text(Path(save_directory) / CONFIG, json.dumps(config, indent=2) + "\n")
        return original(self, save_directory, *args, **kwargs)

    return save_pretrained


def _loading(original):
    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        folder = Path(pretrained_model_name_or_path or "") / (kwargs.get("subfolder") or "")
        if all((folder / name).is_file() for name in (CONFIG, "config.json")):
            return load_pretrained(folder, torch_dtype=kwargs.get("dtype") or kwargs.get("torch_dtype"))
        return original(cls, pretrained_model_name_or_path, **kwargs)

    return from_pretrained
