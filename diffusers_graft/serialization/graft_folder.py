"""A graft as a folder: `graft_model.safetensors`, `graft_config.json`, `graft_proof.safetensors`, and the card.

The weights file is a graft by itself: its header repeats the description. All files of a save take their places
together.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ..cards.about import check_about, check_scores
from ..cards.card import write_card
from ..core.storage import replace_files, write_tensors, write_text
from ..errors import FileError, MismatchError, StateError
from ..injection.graft import Graft, base_tensors, is_enabled
from ..injection.install import check_processors, install, require_graft, uninstall
from .compression import compress as compress_tensors
from .compression import restore
from .config_file import KEY, file_names, is_adapter, read_description, read_plan, stale_files, to_text
from .describe import describe_base, describe_graft
from .download import local_folder
from .empty_graft import (
    build_empty_graft,
    check_operators,
    require_device,
    require_dtype,
    require_like,
    require_same_names,
    without_initial_values,
)
from .lora import adapter_tensors, load_adapters, require_unfused
from .proof import prove, replay
from .remote_code.operator_source import describe_code, is_pinned, register_trusted, sources
from .tensors import Tensors, checksum, fingerprint, require_finite

logger = logging.getLogger(__name__)

_BESIDES = ["README.md", "graft_operator_*.py"]  # files that are read beside those of a variant


def save_graft(
    model: ModelMixin,
    folder: str | Path,
    *,
    scores: dict[str, Any] | None = None,
    variant: str | None = None,
    about: dict[str, Any] | None = None,
    compress: float | None = None,
    self_contained: bool = False,
) -> None:
    """Write a model's graft, its proof and a card to a folder; a graft saved there before is replaced.

    Args:
        scores: measured results by row, as `dg.evaluate` gives them, for the card; `dg.card` says how rows are named.
        about: what you add to the card, as for `dg.card`: `license`, `datasets`, `hardware`, `speed`, `limits`.
        compress: relative error that is allowed for updates of pretrained weights; they are then stored as small as
            that allows.
        self_contained: save the operators' source, too, for people who do not have them; it runs only where it is
            trusted.
        variant: name of another set of weights beside the first, as in diffusers: `"bf16"` writes
            `graft_model.bf16.safetensors`.

    Raises:
        StateError: the model has no graft, has lost its processors, or carries LoRA that its tensors do not describe.
        FileError: the folder cannot be written, a value is not finite, or an operator's source cannot be separated
            from the script it stands in; what the folder held is unchanged.
    """
    graft = require_graft(model)
    folder = Path(folder)
    config_name, weights_name, proof_name = file_names(variant)
    _require_saveable(model, graft)
    # What a person mistyped is refused before the model runs for its proof.
    scores = check_scores(scores)
    about = check_about(about)
    base = base_tensors(model)
    tensors = graft.tensors(model)
    adapters = adapter_tensors(model, graft)
    require_finite({**tensors, **adapters}, "the graft")
    code = {}
    if self_contained:
        code = sources(graft.plan)
    if compress is None:
        stored = tensors
        compressed = {}
        proof = prove(model)
    else:
        stored, compressed = compress_tensors(tensors, base, compress)
        # The proof is of the values that loading will give.
        with _holding(tensors, restore(stored, compressed, base, folder)):
            proof = prove(model)
    stored = {**stored, **adapters}
    config = describe_graft(model, graft, base) | {
        "checksum": checksum(stored),
        "compressed": compressed,
        "code": describe_code(code),
        "scores": scores,
        "about": about,
    }
    with replace_files(folder, stale=stale_files(folder, [config_name])) as temporary:
        for name, source in code.items():
            write_text(temporary / name, source)
        write_card(temporary, folder, model, graft, config)
        # The next save removes what is listed here, and nothing else.
        config["files"] = sorted({path.name for path in temporary.iterdir()} | {*file_names(variant)})
        text = to_text(config)
        write_tensors(temporary / proof_name, proof)
        write_tensors(temporary / weights_name, stored, {KEY: text})
        write_text(temporary / config_name, text + "\n")


def _require_saveable(model: ModelMixin, graft: Graft) -> None:
    check_processors(graft)
    if not is_enabled(model):
        raise StateError("This graft is disabled: call model.enable_graft(), so that the proof shows its outputs.")
    if graft.is_standalone:
        raise StateError(
            "This model was loaded in full, without the base it was made on: save it with save_pretrained."
        )
    require_unfused(model, graft)


@contextlib.contextmanager
def _holding(tensors: Tensors, values: Tensors) -> Iterator[None]:
    """Give the tensors of a model other values inside the block."""
    before = {name: tensor.data for name, tensor in tensors.items()}
    try:
        for name, tensor in tensors.items():
            tensor.data = values[name].to(tensor.device, tensor.dtype)
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data = before[name]


def load_graft(
    model: ModelMixin,
    source: str | Path,
    *,
    revision: str | None = None,
    allow_base_mismatch: bool = False,
    subfolder: str | None = "",
    variant: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    low_cpu_mem_usage: bool = True,
    verify: bool = True,
    trust_remote_code: bool = False,
    **hub_arguments: Any,
) -> Graft:
    """Install a saved graft in the model it was made for; its outputs are those that were saved, bit for bit.

    Args:
        source: a folder that `save_graft` wrote, or a Hub repository id.
        revision: branch, tag or commit of the repository.
        allow_base_mismatch: install on a base other than the one the graft was made on.
        subfolder, variant: where the graft lies, and which, as `save_graft` named it.
        device, dtype (or torch_dtype): where the model goes first, if given; the graft follows it.
        low_cpu_mem_usage: build the parts without initial values, since the values of the file replace them.
        trust_remote_code: run operators that come as code; from the Hub also `revision` must then be the id of a
            commit.
        verify: replay the proof, one forward of the model, and compare the base.
        hub_arguments: `token`, `cache_dir`, `local_files_only` and the like, for `huggingface_hub.snapshot_download`.

    Raises:
        FileError: files that are missing, damaged, edited, of another format, or out of proportion to what they hold.
        MismatchError: a graft made for another model.
        StateError: a grafted model; a dtype or a device that a model cannot have.
        UnknownNameError: an argument that nothing takes.

    After any error the model is as it was before, every value of it.
    """
    # Arguments are checked before anything is downloaded.
    require_dtype(dtype)
    require_dtype(torch_dtype)
    require_device(device)
    wanted = [*file_names(variant), *_BESIDES]
    folder = local_folder(source, wanted, subfolder=subfolder, revision=revision, **hub_arguments)
    config, saved = read_graft(folder, variant)
    register_trusted(config, folder, trust=trust_remote_code, pinned=is_pinned(source, revision))
    # From here on cheap checks come first, and nothing is built before its tensors were compared.
    plan = read_plan(config["plan"], model)
    plan.check(model)
    if verify:
        _check_base(model, config, allow_base_mismatch)
    adapters = {name: tensor for name, tensor in saved.items() if is_adapter(name)}
    tensors = {name: tensor for name, tensor in saved.items() if name not in adapters}
    if config["compressed"]:
        tensors = restore(tensors, config["compressed"], base_tensors(model), folder)
    check_operators(plan, tensors, folder)
    with _moved(model, device=device, dtype=dtype or torch_dtype):
        with without_initial_values(low_cpu_mem_usage):
            graft = build_empty_graft(model, plan, config["history"])
        fill(model, graft, tensors, folder)
        with _installed(model, graft):
            _require_finite_casts(graft.tensors(model), tensors, folder)
            load_adapters(model, graft, config.get("lora"), adapters)
            if verify:
                replay(model, folder / file_names(variant)[2])
    return graft


def _require_finite_casts(installed: Tensors, saved: Tensors, folder: Path) -> None:
    """Raise `FileError` where a cast to the model's dtype made a value infinite; the others were checked as read."""
    require_finite({name: t for name, t in installed.items() if t.dtype != saved[name].dtype}, folder)


@contextlib.contextmanager
def _moved(model: ModelMixin, **where: Any) -> Iterator[None]:
    """Move a model, if asked to, and put its very tensors back should anything go wrong inside."""
    if all(value is None for value in where.values()):
        yield
        return
    # Moving between some devices makes new parameters, between others it gives the old ones new data.
    holders = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    tensors = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
    before = [(tensor, tensor.data) for tensor in tensors if tensor is not None]
    try:
        model.to(**where)
        yield
    except BaseException:
        for module, parameters, buffers in holders:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for tensor, data in before:
            tensor.data = data
        raise


@contextlib.contextmanager
def _installed(model: ModelMixin, graft: Graft) -> Iterator[None]:
    """Install a graft, and take it out again should anything go wrong inside."""
    install(model, graft)
    try:
        yield
    except BaseException:
        uninstall(model)
        raise


def read_graft(folder: Path, variant: str | None = None) -> tuple[dict[str, Any], Tensors]:
    """Read the description and tensors of a saved graft, checked against each other."""
    config, tensors = read_description(folder, variant)
    if checksum(tensors) != config["checksum"]:
        raise FileError(
            f"{folder / file_names(variant)[1]} was edited or damaged: its tensors are not those that were saved."
        )
    require_finite(tensors, folder)
    return config, tensors


def _check_base(model: ModelMixin, config: dict[str, Any], is_allowed: bool) -> None:
    """Raise `MismatchError` for another base than the one a graft was made on, or warn where that is allowed."""
    saved = config["base"]
    parts = saved.get("parts") or {}
    base = base_tensors(model)
    here = describe_base(model, base, parts)
    if here["fingerprint"] == saved.get("fingerprint"):
        return
    # A base loaded in float16 was rounded twice.
    if fingerprint(base, through=torch.float16) == saved.get("float16_fingerprint"):
        return
    others = [path for path in parts if here["parts"][path] != parts[path]]
    name = saved.get("name_or_path") or "a model that was not loaded from the Hub"
    message = f"This graft was made on {name}; the weights of this {type(model).__name__} are others"
    if others:
        message += f", among them those of {len(others)} parts that it replaces"
    if not is_allowed:
        raise MismatchError(f"{message}. Load that base, or pass allow_base_mismatch=True and expect other outputs.")
    logger.warning(f"{message}.")


def fill(model: ModelMixin, graft: Graft, tensors: Tensors, folder: Path) -> None:
    """Give a newly built graft its saved tensors. Raises `FileError` where they do not fit."""
    body: Tensors = {}
    base = base_tensors(model)
    by_seat: dict[str, Tensors] = {path: {} for path in graft.seats}
    for name, tensor in tensors.items():
        path = next((path for path in graft.seats if name.startswith(f"{path}.")), None)
        if path is not None:
            by_seat[path][name.removeprefix(f"{path}.")] = tensor
        elif name in base:
            require_like(base[name], tensor, name, folder)
            body[name] = tensor
        else:
            raise FileError(f"{folder} does not fit: it holds {name}, which this model does not have.")
    for path, saved in by_seat.items():
        # Children that were saved were trained; the others stay shared with the original.
        graft.untie(path, {name.partition(".")[0] for name in saved})
        expected = graft.tensors_of(path)
        require_same_names(expected, saved, f"{folder} does not fit {path}")
        for name, tensor in saved.items():
            require_like(expected[name], tensor, f"{path}.{name}", folder)
            # By its name without LoRA, which the base may carry.
            expected[name].data.copy_(tensor)
    graft.body = body
