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
from diffusers.models.modeling_utils import ContextManagers, no_init_weights

from ..cards.card import check_about, check_scores, write_card
from ..errors import FileError, MismatchError, StateError
from ..injection.graft import Graft, base_tensors, is_enabled
from ..injection.install import check_processors, install, require_graft, uninstall
from .atomic_folder import local_folder, replacing
from .compression import compress as compressed
from .compression import restore
from .config_file import KEY, is_adapter, names, read_description, read_plan, to_text
from .describe import describe, describe_base
from .empty_graft import build_blank, check_operators, require_dtype, require_like
from .lora import adapter_tensors, load_adapters
from .proof import prove, replay
from .remote_code.operator_source import describe_code, is_pinned, sources, trusted, unnamed_sources
from .tensors import checksum, digest, fingerprint, require_finite, write_tensors, write_text

logger = logging.getLogger(__name__)

_BESIDES = ["README.md", "graft_operator_*.py", "adapter_*"]  # what is read beside a variant, the last in format 1


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
    """Write a model's graft, its proof and a card to a folder; a graft saved there before is replaced whole.

    Args:
        scores: measured results by row, as `dg.evaluate` gives them, for the card, which tells how rows are named.
        about: what a person tells on the card, as for `dg.card`: `license`, `datasets`, `hardware`, `speed`, `limits`.
        compress: relative error allowed to updates of pretrained weights, which are then stored as small as that
            allows.
        self_contained: the operators' source goes along, for people who do not have them; it runs only where it is
            trusted.
        variant: another set of weights beside the first, as diffusers names them: `graft_model.bf16.safetensors`.

    Raises:
        StateError: the model has no graft, or has lost its processors.
        FileError: the folder cannot be written, or a value is not finite; what the folder held is unchanged.
    """
    graft, folder = require_graft(model), Path(folder)
    own, adapters = _tensors(model, graft)
    stored, told, proof = own, {}, None
    if compress is not None:
        base = base_tensors(model)
        stored, told = compressed(own, base, compress)
        with _holding(own, restore(stored, told, base, folder)):
            proof = prove(model)
    stored = {**stored, **adapters}
    config = describe(model, graft, checksum(stored))
    config |= {"scores": check_scores(scores), "about": check_about(about)}
    code = sources(graft.plan) if self_contained else {}
    config |= {"compressed": told, "code": describe_code(code)}
    proof, text = proof or prove(model), to_text(config)
    config_name, weights_name, proof_name = names(variant)
    stale = ["adapter_config.json", "adapter_model.safetensors", *unnamed_sources(folder, config_name)]
    with replacing(folder, stale=stale) as stage:
        for name, source in code.items():
            write_text(stage / name, source)
        write_tensors(stage / proof_name, proof, {})
        write_tensors(stage / weights_name, stored, {KEY: text})
        write_text(stage / config_name, text + "\n")
        write_card(stage, folder, model, graft, config)


@contextlib.contextmanager
def _holding(own: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> Iterator[None]:
    """The tensors of a model with other values inside, those that loading will give them."""
    before = {name: tensor.data for name, tensor in own.items()}
    try:
        for name, tensor in own.items():
            tensor.data = values[name].to(tensor.device, tensor.dtype)
        yield
    finally:
        for name, tensor in own.items():
            tensor.data = before[name]


def _tensors(model: ModelMixin, graft: Graft) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The graft's own tensors and those of its LoRA, sound enough to be read again."""
    _require_whole(model, graft)
    own, adapters = graft.tensors(model), adapter_tensors(model, graft)
    require_finite({**own, **adapters}, "the graft")
    return own, adapters


def _require_whole(model: ModelMixin, graft: Graft) -> None:
    check_processors(graft)
    if not is_enabled(model):
        raise StateError("This graft is disabled: call model.enable_graft(), so that the proof shows its outputs.")
    if graft.is_standalone:
        raise StateError("This model was loaded whole, without the base it was made on: save it with save_pretrained.")


def load_graft(
    model: ModelMixin,
    source: str | Path,
    *,
    revision: str | None = None,
    allow_base_mismatch: bool = False,
    subfolder: str = "",
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
        low_cpu_mem_usage: build the parts without values of their own, which the file's would replace.
        trust_remote_code: run operators that come as code; from the Hub also `revision` must then be the id of a
            commit.
        verify: replay the proof, one forward of the model, and compare the base.
        hub_arguments: `token`, `cache_dir`, `local_files_only` and the like, for `huggingface_hub.snapshot_download`.

    Raises `FileError` for files that are missing, damaged, edited, or of a newer format, `MismatchError` for those
    made for another model, `StateError` for a grafted one and for odd dtypes, `UnknownNameError` for an argument that
    nothing takes.
    """
    folder = local_folder(
        source, [*names(variant), *_BESIDES], subfolder=subfolder, revision=revision, **hub_arguments
    )
    config, tensors = read_graft(folder, variant)
    classes = trusted(config, folder, trust=trust_remote_code, pinned=is_pinned(source, revision))
    plan = read_plan(config["plan"], classes)
    plan.check(model)
    if verify:
        _check_base(model, config, allow_base_mismatch)
    own, adapters = _parted(model, config, tensors, folder)
    check_operators(plan, own, folder)
    with _moved(model, device=device, dtype=dtype or torch_dtype):
        with ContextManagers([no_init_weights()] if low_cpu_mem_usage else []):
            graft = build_blank(model, plan, config["history"])
        fill(model, graft, own, folder)
        with _installed(model, graft):
            load_adapters(model, graft, config.get("lora"), adapters)
            if verify:
                replay(model, folder / names(variant)[2])
    return graft


@contextlib.contextmanager
def _moved(model: ModelMixin, **where: Any) -> Iterator[None]:
    """Move a model, if asked to, and put its very tensors back should anything go wrong inside."""
    require_dtype(where["dtype"])
    if all(value is None for value in where.values()):
        yield
        return
    tensors = [
        tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad) if tensor is not None
    ]
    before = [(tensor, tensor.data) for tensor in tensors]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        model.to(**where)
        yield
    except BaseException:
        for tensor, data in before:
            tensor.data = data
        for module, own in buffers:
            module._buffers.update(own)
        raise


def _parted(model: ModelMixin, config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path):
    """The graft's own tensors, whole again where they were compressed, and those of LoRA."""
    adapters = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
    own = {name: tensor for name, tensor in tensors.items() if name not in adapters}
    return restore(own, config["compressed"], base_tensors(model), folder) if config["compressed"] else own, adapters


@contextlib.contextmanager
def _installed(model: ModelMixin, graft: Graft) -> Iterator[None]:
    """Install a graft, and take it out again should anything go wrong inside."""
    install(model, graft)
    try:
        yield
    except BaseException:
        uninstall(model)
        raise


def read_graft(folder: Path, variant: str | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Description and tensors of a saved graft, checked against each other."""
    config, tensors = read_description(folder, variant)
    if checksum(tensors) != config["checksum"]:
        raise FileError(
            f"{folder / names(variant)[1]} was edited or damaged: its tensors are not those that were saved."
        )
    require_finite(tensors, folder)
    return config, tensors


def _check_base(model: ModelMixin, config: dict[str, Any], allowed: bool) -> None:
    saved = config["base"]
    parts = saved.get("parts")
    if "sha256" in saved:  # format 1
        same, others = digest(base_tensors(model), as_bfloat16=True) == saved["sha256"], []
    else:
        paths = list(parts) if isinstance(parts, dict) else []
        here = describe_base(model, paths)
        same = here["fingerprint"] == saved.get("fingerprint") or _same_in_float16(model, saved)
        others = [path for path in paths if here["parts"][path] != parts[path]]
    if same:
        return
    name = saved.get("name_or_path") or "a model that was not loaded from the Hub"
    where = f", among them those of {len(others)} parts that it replaces" if others else ""
    message = f"This graft was made on {name}; the weights of this {type(model).__name__} are others{where}."
    if not allowed:
        raise MismatchError(f"{message} Load that base, or pass allow_base_mismatch=True and expect other outputs.")
    logger.warning(message)


def _same_in_float16(model: ModelMixin, saved: dict[str, Any]) -> bool:
    return fingerprint(base_tensors(model), through=torch.float16) == saved.get("float16_fingerprint")


def fill(model: ModelMixin, graft: Graft, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Give a newly built graft its saved tensors. Raises `FileError` where they do not fit."""
    body, known = {}, base_tensors(model)
    by_seat: dict[str, dict[str, torch.Tensor]] = {path: {} for path in graft.seats}
    for name, tensor in tensors.items():
        path = next((path for path in graft.seats if name.startswith(f"{path}.")), None)
        if path is not None:
            by_seat[path][name.removeprefix(f"{path}.")] = tensor
        elif name in known:
            require_like(known[name], tensor, name, folder)
            body[name] = tensor
        else:
            raise FileError(f"{folder} does not fit: it holds {name}, which this model does not have.")
    for path, saved in by_seat.items():
        graft.untie(path, {name.partition(".")[0] for name in saved})
        expected = graft.tensors_of(path)
        if odd := sorted(expected.keys() ^ saved.keys()):
            raise FileError(f"{folder} does not fit {path}: {', '.join(odd[:4])} are missing, or too many.")
        for name, tensor in saved.items():
            require_like(expected[name], tensor, f"{path}.{name}", folder)
            expected[name].data.copy_(tensor)  # by its name without LoRA, which the base may carry
    graft.body = body
