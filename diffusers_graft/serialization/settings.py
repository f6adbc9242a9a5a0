"""Settings of a model that its configuration does not hold, carried with what is saved and told on its card."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin
from diffusers.models.embeddings import Timesteps

from ..errors import FileError

# The only attributes that a file may set, by the class that has them; a number each.
_ALLOWED = {"downscale_freq_shift": Timesteps}


def apply_settings(model: ModelMixin, settings: Any) -> None:
    """Set what a saved description asks for: rows of `path`, `attribute` and `value`.

    Raises `FileError` for anything but a number in one of the known places; the model is then as it was.
    """
    rows = [_checked(model, row) for row in (settings if isinstance(settings, list) else [settings])]
    for module, attribute, value in rows:
        setattr(module, attribute, value)


def _checked(model: ModelMixin, row: Any) -> tuple[Any, str, float]:
    try:
        module, attribute, value = model.get_submodule(row["path"]), row["attribute"], row["value"]
        sound = type(value) in (int, float) and isinstance(module, _ALLOWED[attribute])
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"The setting {row!r} does not fit the model: {error!r}.") from error
    if not sound:
        raise FileError(
            f"The setting {row!r} is none that a file may change; those are {', '.join(_ALLOWED)}, numbers."
        )
    return module, attribute, value


def frequency_settings(model: ModelMixin, shift: float) -> list[dict[str, Any]]:
    """Rows that give every timestep embedding of a model this `downscale_freq_shift`."""
    paths = [path for path, module in model.named_modules() if isinstance(module, Timesteps)]
    return [{"path": path, "attribute": "downscale_freq_shift", "value": shift} for path in paths]
