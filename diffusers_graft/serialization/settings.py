"""Settings of a model that its configuration does not hold: saved with it, and named on its card."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin
from diffusers.models.embeddings import Timesteps

from ..errors import FileError

# The only attributes that a file may set, by the class that has them: a number from 0 to 1 each.
_ALLOWED = {"downscale_freq_shift": Timesteps}


def apply_settings(model: ModelMixin, settings: Any) -> None:
    """Set what a saved description asks for: rows of `path`, `attribute` and `value`.

    Raises `FileError` for anything but a number in one of the known places; the model is then as it was.
    """
    rows = settings if isinstance(settings, list) else [settings]
    if len(rows) > sum(1 for _ in model.modules()):
        raise FileError(f"{len(rows):,} settings are more than the model has modules.")
    # All are checked before the first is set.
    for module, attribute, value in [_checked(model, row) for row in rows]:
        setattr(module, attribute, value)


def _checked(model: ModelMixin, row: Any) -> tuple[Any, str, float]:
    try:
        module = model.get_submodule(row["path"])
        attribute = row["attribute"]
        value = row["value"]
        is_sound = type(value) in (int, float) and 0 <= value <= 1 and isinstance(module, _ALLOWED[attribute])
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"The setting {row!r} does not fit the model: {error!r}."[:400]) from error
    if not is_sound:
        known = ", ".join(_ALLOWED)
        raise FileError(f"The setting {row!r} is none that a file may change; those are {known}, from 0 to 1."[:400])
    return module, attribute, value


def frequency_settings(model: ModelMixin, shift: float) -> list[dict[str, Any]]:
    """Return rows that give every timestep embedding of a model this `downscale_freq_shift`."""
    paths = [path for path, module in model.named_modules() if isinstance(module, Timesteps)]
    return [{"path": path, "attribute": "downscale_freq_shift", "value": shift} for path in paths]
