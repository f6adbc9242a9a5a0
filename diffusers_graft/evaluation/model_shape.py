"""A model from its config.json alone, with random weights: speed does not depend on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin

from ..core.storage import read_json
from ..errors import FileError


def load_shape(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> ModelMixin:
    """Make a model of the shape that a config.json describes, in evaluation mode.

    Args:
        path: of the file, or of the folder that holds it.
        dtype: of the weights; float32 unless given.
        device: where they are.

    Raises `FileError` for a file that is missing, or that describes no model of diffusers.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    config = read_json(path)
    # Read from the file, and looked up among diffusers' own classes alone: nothing of a stranger's is imported.
    name = config.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, ModelMixin) or not issubclass(found, ConfigMixin):
        raise FileError(f"{path} describes no model of diffusers: its _class_name is {name!r}.")
    try:
        # Made where they belong, since large models do not fit the CPU as well.
        with torch.device(device):
            model: Any = found.from_config(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FileError(f"{path} does not describe a {name}: {error}.") from error
    return model.to(dtype=dtype or torch.float32).eval()
