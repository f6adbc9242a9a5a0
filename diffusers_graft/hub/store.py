"""A graft as a folder: `graft_model.safetensors`, `graft_config.json`, `graft_proof.safetensors`, and the card.

The weights file is a graft by itself: its header repeats the configuration, and one rename puts it in place, so a save
that is interrupted leaves the old graft or the new one. The proof is a seeded input with its output, replayed on loading.
"""
from __future__ import annotations

import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin

from .._version import __version__
from ..anatomy import evaluating, example_inputs, predict, require_model
from ..errors import FileError, MismatchError, StateError
from ..graft import Graft, base_tensors, build_graft, is_enabled
from ..plan import GraftPlan
from ..surgery import check_seats, install, require_graft, uninstall
from .adapters import load_adapters, save_adapters
from .cards import write_card
from .files import digest, local_folder, read_header, read_json, read_tensors, write_tensors, write_text

logger = logging.getLogger(__name__)

FORMAT = 1
CONFIG, WEIGHTS, PROOF = "graft_config.json", "graft_model.safetensors", "graft_proof.safetensors"
_PATTERNS = ["graft_*", "adapter_*", "README.md"]


def save_graft(model: ModelMixin, folder: str | Path, *, scores: dict[str, Any] | None = None) -> None:
    """Write a model's graft, its proof and a card to a folder; a graft saved there before is replaced whole.

    Args:
        scores: measured results by row, as `dg.evaluate` gives them, for the card.

    Raises:
        StateError: the model has no graft, or has lost its processors.
        FileError: the folder cannot be written; what it held is unchanged.
    """
    graft, folder = require_graft(model), Path(folder)
    check_seats(graft)
    if not is_enabled(model):
        raise StateError("This graft is disabled: call model.enable_graft(), so that the proof shows its outputs.")
    if graft.standalone:
        raise StateError("This model was loaded whole, without the base it was made on: save it with save_pretrained.")
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file. Give a folder.")
    tensors = graft.own_tensors(model)
    config = describe(model, graft, tensors)
    text = json.dumps(config, indent=2)
    write_tensors(folder / PROOF, prove(model), {})
    save_adapters(model, graft, folder)
    write_tensors(folder / WEIGHTS, tensors, {"graft_config": text})
    write_text(folder / CONFIG, text + "\n")
    write_card(folder, model, graft, config, scores or {})


def describe(model: ModelMixin, graft: Graft, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What `graft_config.json` holds."""
    return {
        "format": FORMAT,
        "versions": versions(),
        "base": {"model_class": type(model).__name__, "name_or_path": _hub_name(model),
                 "fingerprint": digest(base_tensors(model), as_bfloat16=True)},
        "plan": graft.plan.to_dict(),
        "tensors_sha256": digest(tensors),
        "history": graft.history,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of everything that can change an output."""
    return {"diffusers_graft": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__,
            "python": platform.python_version()}  # fmt: skip


def _hub_name(model: ModelMixin) -> str | None:
    """The base's repository id; a path on somebody's disk helps nobody and stays private."""
    name = getattr(model.config, "_name_or_path", None)
    return name if name and not os.path.exists(name) and name.count("/") == 1 and not name.startswith(("/", ".")) else None


def load_graft(
    model: ModelMixin, source: str | Path, *, revision: str | None = None, allow_base_mismatch: bool = False,
    **hub_arguments: Any,
) -> Graft:  # fmt: skip
    """Install a saved graft; the model's outputs are then those of the model that was saved, bit for bit.

    Args:
        source: a folder that `save_graft` wrote, or a Hub repository id.
        revision: branch, tag or commit of the repository.
        allow_base_mismatch: install on a base other than the one the graft was made on.
        hub_arguments: `token`, `cache_dir`, `local_files_only` and the like, for `huggingface_hub.snapshot_download`.

    Raises:
        FileError: missing, damaged, edited, or of a newer format.
        MismatchError: made for another model.
        StateError: the model is grafted already.
    """
    require_model(model)
    folder = local_folder(source, _PATTERNS, revision=revision, **hub_arguments)
    config, tensors = read_graft(folder)
    plan = GraftPlan.from_dict(config["plan"])
    plan.check(model)
    _check_base(model, config, allow_base_mismatch)
    graft = build_graft(model, plan)
    fill(model, graft, tensors, folder)
    graft.history = config["history"]
    install(model, graft)
    try:
        load_adapters(model, graft, folder)
        replay(model, folder)
    except BaseException:
        uninstall(model)
        raise
    return graft


def read_graft(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of a saved graft, checked against each other."""
    try:
        config = json.loads(read_header(folder / WEIGHTS)["graft_config"])
        newer = config["format"] > FORMAT
        made_with = config["versions"]["diffusers_graft"]
        expected = config["tensors_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{folder / WEIGHTS} was not written by save_graft: its header holds no graft.") from error
    if newer:
        raise FileError(f"This graft has format {config['format']}; it needs diffusers-graft {made_with} or later.")
    if (folder / CONFIG).exists() and read_json(folder / CONFIG) != config:
        raise FileError(
            f"{folder / CONFIG} was edited, or belongs to another graft than {WEIGHTS}, which carries its own copy. "
            "Delete it to load the weights as they were saved, or save the graft again."
        )
    tensors = read_tensors(folder / WEIGHTS)
    if digest(tensors) != expected:
        raise FileError(f"{folder / WEIGHTS} was edited or damaged: its tensors are not those that were saved.")
    return config, tensors


def _check_base(model: ModelMixin, config: dict[str, Any], allowed: bool) -> None:
    if digest(base_tensors(model), as_bfloat16=True) == config["base"]["fingerprint"]:
        return
    name = config["base"]["name_or_path"] or "a model that was not loaded from the Hub"
    message = f"This graft was made on {name}; the weights of this {type(model).__name__} are others."
    if not allowed:
        raise MismatchError(f"{message} Load that base, or pass allow_base_mismatch=True and expect other outputs.")
    logger.warning(message)


def fill(model: ModelMixin, graft: Graft, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Give a newly built graft its saved tensors. Raises `FileError` where they do not fit."""
    body, known = {}, dict(model.named_parameters())
    by_seat: dict[str, dict[str, torch.Tensor]] = {path: {} for path in graft.seats}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FileError(f"{name} in {folder} holds values that are not finite; this graft cannot be used.")
        path = next((path for path in graft.seats if name.startswith(f"{path}.")), None)
        if path is not None:
            by_seat[path][name.removeprefix(f"{path}.")] = tensor
        elif name in known and known[name].shape == tensor.shape:
            body[name] = tensor
        else:
            raise FileError(f"{folder / WEIGHTS} holds {name} {tuple(tensor.shape)}, which this model does not have.")
    for path, saved in by_seat.items():
        graft.unshare(path, {name.partition(".")[0] for name in saved})
        expected = set(graft.own_tensors_of(path))
        if expected != set(saved):
            raise FileError(f"{folder / WEIGHTS} does not fit {path}: {sorted(expected ^ set(saved))} differ.")
        try:
            graft.seats[path].load_state_dict(saved, strict=False)
        except RuntimeError as error:
            raise FileError(f"{folder / WEIGHTS} does not fit {path}: {error}") from error
    graft.body = body


def _proof_inputs(model: ModelMixin) -> dict[str, Any]:
    """Small latents: a proof should not cost minutes where a model was made for 16,000 tokens."""
    return example_inputs(model, size=min(model.config.sample_size, 32))


@torch.no_grad()
def prove(model: ModelMixin) -> dict[str, torch.Tensor]:
    """A seeded input and the model's output for it."""
    inputs = _proof_inputs(model)
    with evaluating(model):
        return {**_flat(inputs), "output": predict(model, inputs)}


@torch.no_grad()
def replay(model: ModelMixin, folder: Path) -> float | None:
    """Largest difference from the proven output, logged; None for a graft without proof."""
    if not (folder / PROOF).exists():
        logger.warning(f"{folder} carries no proof; its outputs were not checked.")
        return None
    saved = read_tensors(folder / PROOF)
    with evaluating(model):
        output = predict(model, _unflat(_proof_inputs(model), saved))
    expected = saved["output"].to(output.device, output.dtype)
    if output.shape != expected.shape:
        raise FileError(f"{folder / PROOF} holds an output of shape {tuple(expected.shape)}, not {tuple(output.shape)}.")
    difference = (output - expected).abs().max().item()
    level = logging.INFO if difference <= 1e-3 * expected.abs().max().item() else logging.WARNING
    logger.log(level, f"proof replayed: largest difference {difference:.3g}")
    return difference


def _flat(inputs: dict[str, Any], prefix: str = "inputs.") -> dict[str, torch.Tensor]:
    tensors = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            tensors.update(_flat(value, f"{prefix}{name}."))
        elif isinstance(value, torch.Tensor):
            tensors[prefix + name] = value
    return tensors


def _unflat(inputs: dict[str, Any], saved: dict[str, torch.Tensor], prefix: str = "inputs.") -> dict[str, Any]:
    """The example inputs, their tensors replaced by the saved ones."""
    filled = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            value = _unflat(value, saved, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor) and prefix + name in saved:
            value = saved[prefix + name].to(value.device, value.dtype)
        filled[name] = value
    return filled
