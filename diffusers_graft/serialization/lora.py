"""LoRA beside a graft: its layers by name and rank in the description, its tensors among those of the graft."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin

from ..errors import FileError, StateError
from ..injection.graft import Graft
from ..training.finetune.lora import add_lora, refuse_foreign_lora, remove_lora

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

_SHARED = {"lora_dropout": float, "use_rslora": bool, "use_dora": bool, "fan_in_fan_out": bool}
_ADAPTER = "default"
_LARGEST_RANK = 2**16
_LARGEST_ALPHA = 1e6


def describe_adapters(model: ModelMixin, graft: Graft) -> dict[str, Any] | None:
    """Return the LoRA of a graft as data, layer by layer; None without one."""
    layers = _layers(model)
    if graft.adapter_config is None or not layers:
        return None
    described: dict[str, Any] = {name: kind(getattr(graft.adapter_config, name)) for name, kind in _SHARED.items()}
    described["layers"] = {path: _describe_layer(layer) for path, layer in layers.items()}
    return described


def _describe_layer(layer: LoraLayer) -> dict[str, Any]:
    row = {"r": layer.r[_ADAPTER], "alpha": layer.lora_alpha[_ADAPTER]}
    # set_adapters and scale_layer change the scaling, and neither rank nor alpha.
    if layer.scaling[_ADAPTER] != _usual_scaling(layer):
        row["scaling"] = layer.scaling[_ADAPTER]
    return row


def _usual_scaling(layer: LoraLayer) -> float:
    rank = layer.r[_ADAPTER]
    if layer.use_rslora.get(_ADAPTER):
        return layer.lora_alpha[_ADAPTER] / math.sqrt(rank)
    return layer.lora_alpha[_ADAPTER] / rank


def adapter_tensors(model: ModelMixin, graft: Graft) -> dict[str, torch.Tensor]:
    """Return the tensors of a graft's LoRA by their names in the model.

    Raises `StateError` for LoRA that is not the graft's, and for LoRA whose state its tensors do not hold: fused into
    the weights, disabled, or one of several adapters.
    """
    refuse_foreign_lora(model, graft)
    if graft.adapter_config is None:
        return {}
    layers = _layers(model)
    for path, layer in layers.items():
        _require_plain_state(path, layer)
    if not layers:
        return {}
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def require_unfused(model: ModelMixin, graft: Graft) -> None:
    """Raise `StateError` where LoRA that a graft was trained with is no longer in its layers.

    Its share is then in the weights of the base, or lost, and a graft holds neither.
    """
    lost = sorted(graft.adapters.keys() - _layers(model).keys())
    if lost:
        raise StateError(
            f"The LoRA of this graft is no longer at {lost[0]}: it was fused and unloaded, or taken off. Save the "
            "model with save_pretrained, which writes all weights as they are."
        )


def _layers(model: ModelMixin) -> dict[str, LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _require_plain_state(path: str, layer: LoraLayer) -> None:
    if layer.merged:
        raise StateError(
            f"The LoRA at {path} is fused into the weights, and would be applied twice after loading. "
            "Call model.unfuse_lora() first, or unload the LoRA after fusing it to save the fused weights."
        )
    if layer.disable_adapters:
        raise StateError(
            f"The LoRA at {path} is disabled, and would act again after loading. Enable it first, or take it off."
        )
    adapters = set(layer.r)
    if adapters != {_ADAPTER} or set(layer.active_adapters) != {_ADAPTER}:
        raise StateError(
            f"{path} carries the LoRA adapters {sorted(adapters)}, of which {sorted(layer.active_adapters)} run. A "
            f"graft is saved with the one it was trained with, {_ADAPTER!r}: delete the others, and have that one run."
        )


def load_adapters(model: ModelMixin, graft: Graft, described: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Add a saved LoRA to a model whose graft is installed.

    Raises `FileError` where it does not fit, `StateError` where there is another; nothing is left then.
    """
    if described is None and not tensors:
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config, scalings = _read_config(described, tensors)
    paths = set(config.target_modules or ())
    refuse_foreign_lora(model, graft)
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with _removed_on_error(model, graft):
        add_lora(model, graft, config)
        expected = {(name, value.shape) for name, value in get_peft_model_state_dict(model).items()}
        given = {(name, value.shape) for name, value in tensors.items()}
        adapted = set(_layers(model))
        odd = sorted({name for name, _ in expected ^ given} | (adapted ^ paths))
        if odd:
            raise FileError(f"The saved LoRA does not fit the model: {', '.join(odd[:4])} differ.")
        set_peft_model_state_dict(model, tensors)
    # After peft set the usual ones.
    for path, scaling in scalings.items():
        _layers(model)[path].scaling[_ADAPTER] = scaling
    for name, parameter in model.named_parameters():
        before = requires_grad.get(name.replace(".base_layer.", "."))
        if before is not None:
            # peft freezes what it does not train.
            parameter.requires_grad_(before)


def _read_config(described: Any, tensors: dict[str, torch.Tensor]) -> tuple[LoraConfig, dict[str, float]]:
    """Make peft's config of a description, and the scaling of the layers that have one of their own.

    Only numbers and names are read, since some of peft's settings name code to import.
    """
    from peft import LoraConfig

    try:
        layers: dict[str, dict[str, Any]] = dict(described["layers"])
        settings = {name: described[name] for name in _SHARED}
        if not layers or not all(type(settings[name]) is kind for name, kind in _SHARED.items()):
            raise ValueError("it has no layers, or a setting of another kind")
        if not 0 <= settings["lora_dropout"] < 1:
            raise ValueError("its dropout is no share")
        for path, row in layers.items():
            _check_layer(path, row, tensors)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise FileError(f"The description of this graft's LoRA is damaged: {error!r}.") from error
    # peft has one rank and alpha for all layers, and patterns for those that differ.
    first = next(iter(layers.values()))
    config = LoraConfig(
        r=first["r"],
        lora_alpha=first["alpha"],
        target_modules=list(layers),
        exclude_modules=[],
        rank_pattern={re.escape(path): row["r"] for path, row in layers.items() if row["r"] != first["r"]},
        alpha_pattern={
            re.escape(path): row["alpha"] for path, row in layers.items() if row["alpha"] != first["alpha"]
        },
        **settings,
    )
    return config, {path: float(row["scaling"]) for path, row in layers.items() if "scaling" in row}


def _check_layer(path: str, row: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` for a layer whose rank, numbers or name cannot be; nothing is built of the rank before."""
    if not re.fullmatch(r"[\w.]+", path):
        raise ValueError(f"{path!r} is not the path of a layer")
    rank = row["r"]
    if type(rank) is not int or not 0 < rank < _LARGEST_RANK:
        raise ValueError(f"the rank of {path} is none")
    for number in (row["alpha"], row.get("scaling", 0)):
        if type(number) not in (int, float) or not abs(number) <= _LARGEST_ALPHA:
            raise ValueError(f"the alpha of {path} is none")
    down = tensors.get(f"{path}.lora_A.weight", tensors.get(f"{path}.lora_embedding_A"))
    if down is None or down.dim() == 0 or down.shape[0] != rank:
        raise ValueError(f"the tensors of {path} are not of rank {rank}")


@contextlib.contextmanager
def _removed_on_error(model: ModelMixin, graft: Graft) -> Iterator[None]:
    """Take LoRA off again where it cannot be added to all its layers."""
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
