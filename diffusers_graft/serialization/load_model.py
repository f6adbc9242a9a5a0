"""A grafted model read as a whole, without the base it was made on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import ContextManagers, no_init_weights

from ..errors import FileError, StateError
from ..injection.graft import Graft
from ..injection.install import install
from .atomic_folder import inside, local_folder
from .config_file import (
    CARRIED,
    CONFIG,
    MARK,
    as_whole,
    check_kinds,
    described,
    infix_of,
    is_adapter,
    read_plan,
    require_format,
)
from .empty_graft import build_blank, check_operators, require_dtype, require_like
from .remote_code.operator_source import is_pinned, trusted
from .settings import apply_settings
from .tensors import checksum, read_json, read_tensors, require_finite

_BESIDES = ["config.json", CONFIG, "README.md", "graft_operator_*.py"]  # what is read beside the weights of a variant
STEM = "diffusion_pytorch_model"
AUTO = "auto_map"  # where config.json names code that loads the model
FETCHING = ("cache_dir", "force_download", "token", "local_files_only", "revision", "subfolder")
_LOADING = ("dtype", "torch_dtype", "variant", "low_cpu_mem_usage", "trust_remote_code")


def load_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    low_cpu_mem_usage: bool = True,
    trust_remote_code: bool = False,
    **hub_arguments: Any,
) -> ModelMixin:
    """A grafted model, of the right class, from what its `save_pretrained` wrote.

    Args:
        source: folder or Hub repository id.
        dtype: as in diffusers' `from_pretrained`, which also calls it `torch_dtype`; float32 unless given.
        device: where the model goes.
        low_cpu_mem_usage: take the tensors of the file for the model's own instead of copying them into initialised
            ones.
        trust_remote_code: run operators that come as code; from the Hub also `revision` must then be the id of a
            commit.
        hub_arguments: `token`, `cache_dir`, `local_files_only` and the like, for `huggingface_hub.snapshot_download`.

    Raises:
        FileError: missing, damaged, or not a whole grafted model.
        UnknownNameError, StateError: an argument that nothing takes, a dtype that no model computes in.
    """
    folder = local_folder(
        source, [*_BESIDES, *weight_files(variant)], subfolder=subfolder, revision=revision, **hub_arguments
    )
    description = _description(folder, variant)
    classes = trusted(description, folder, trust=trust_remote_code, pinned=is_pinned(source, revision))
    plan, tensors = read_plan(description["plan"], classes), read_weights(folder, variant)
    if description.get("checksum") not in (None, checksum(tensors)):
        raise FileError(f"The weights in {folder} were edited or damaged: they are not those that were saved.")
    require_finite(tensors, folder)
    adapters = {name: tensors.pop(name) for name in filter(is_adapter, list(tensors))}
    with ContextManagers([no_init_weights()] if low_cpu_mem_usage else []):
        model = _bare_model(folder, len(tensors))
        plan.check(model)
        check_operators(plan, tensors, folder)
        graft = build_blank(model, plan)
    install(model, graft)
    graft.history = description["history"]
    apply_settings(model, description.get("settings", []))
    take(model, tensors, folder, assign=low_cpu_mem_usage)
    as_whole(model, graft, **{name: description.get(name) for name in CARRIED})
    model = _cast(model, tensors, dtype or torch_dtype or torch.float32, description.get("buffers"))
    _adapt(model, graft, description.get("lora"), adapters)
    return model.to(device).eval() if device is not None else model.eval()


def _adapt(model: ModelMixin, graft: Graft, described: Any, adapters: dict[str, torch.Tensor]) -> None:
    if described is None and not adapters:
        return
    try:
        from .lora import load_adapters  # a model without LoRA is read without peft, too
    except ModuleNotFoundError as error:
        raise FileError("This model carries LoRA layers, which are peft's. Run: pip install peft") from error
    load_adapters(model, graft, described, adapters)


def load_as_diffusers(source: str | Path, kwargs: dict[str, Any]) -> ModelMixin:
    """`load_pretrained`, asked in the words of diffusers' `from_pretrained`; what only tunes its loading is passed
    over.

    Raises `StateError` for what a grafted model cannot be given while it is loaded, and whatever `load_pretrained`
    raises.
    """
    device = kwargs.get("device_map")
    spread = isinstance(device, dict) or device in ("auto", "balanced", "balanced_low_0", "sequential")
    if kwargs.get("quantization_config") is not None or spread:
        raise StateError(
            "A grafted model is loaded without quantization, onto one device. Load the base as you like, then load_graft."
        )
    known = {name: kwargs[name] for name in (*FETCHING, *_LOADING) if kwargs.get(name) is not None}
    return load_pretrained(source, device=device, **known)


def _description(folder: Path, variant: str | None) -> dict[str, Any]:
    """Of one variant, from `config.json`; format 1 had a file of its own."""
    config, name = read_json(folder / "config.json"), variant or ""
    known = described(config)
    if known and name not in known:
        there = ", ".join(repr(name or None) for name in known)
        raise FileError(f"There is no {weight_file(variant)} of a grafted model in {folder}. Its variants: {there}.")
    description, where = (known[name], "config.json") if known else (read_json(folder / CONFIG), CONFIG)
    check_kinds({"description": description}, {"description": dict}, str(folder / where))
    require_format(description, str(folder / where))
    check_kinds(description, {"plan": dict, "history": list}, str(folder / where))
    if description.get("model") not in (None, config_digest(config)):
        raise FileError(
            f"{folder / 'config.json'} was edited, or belongs to another model than its graft. Save it again."
        )
    return description


def config_digest(config: dict[str, Any]) -> str:
    """Of everything in `config.json` that is the model's own."""
    own = {name: value for name, value in config.items() if name not in (MARK, AUTO)}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _model_class(folder: Path) -> type[ModelMixin]:
    name = read_json(folder / "config.json").get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise FileError(f"{folder / 'config.json'} names the class {name}, which diffusers does not have.")
    return cls


def _bare_model(folder: Path, tensors: int) -> ModelMixin:
    """The ungrafted model that `config.json` describes. Raises `FileError` where it describes none."""
    config = {name: value for name, value in read_json(folder / "config.json").items() if name not in (MARK, AUTO)}
    layers = [value for name, value in config.items() if name.endswith("layers") and isinstance(value, int)]
    if max(layers, default=0) > tensors:
        raise FileError(
            f"{folder / 'config.json'} asks for {max(layers)} layers; the weights hold {tensors} tensors in all."
        )
    try:
        return _model_class(folder).from_config(config)
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"{folder / 'config.json'} describes no model: {error!r}") from error


def weight_file(variant: str | None) -> str:
    """The file of a model's weights, where it is one."""
    return f"{STEM}{infix_of(variant)}.safetensors"


def weight_files(variant: str | None) -> list[str]:
    """Patterns of all files that may hold a model's weights, as diffusers of today and of old name them, or list them."""
    infix = infix_of(variant)
    return [
        weight_file(variant),
        f"{STEM}{infix}-?????-of-?????.safetensors",
        f"{STEM}-?????-of-?????{infix}.safetensors",
        f"{STEM}.safetensors.index{infix}.json",
    ]


def read_weights(folder: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a model that diffusers saved, in one file or in shards. Raises `FileError`; pickles are not read."""
    index = folder / f"{STEM}.safetensors.index{infix_of(variant)}.json"
    if index.exists():
        mapped = read_json(index).get("weight_map")
        if not isinstance(mapped, dict) or not mapped:
            raise FileError(f"{index} is damaged: it holds no weight_map.")
        files = dict.fromkeys(inside(folder, name) for name in mapped.values())
        tensors = {name: tensor for path in files for name, tensor in read_tensors(path).items()}
        if odd := sorted(mapped.keys() ^ tensors.keys()):
            raise FileError(f"{index} does not fit the files it names: {', '.join(odd[:4])} differ.")
        return tensors
    path = folder / weight_file(variant)
    if not path.exists() and (pickles := sorted(p.name for p in folder.glob("*.bin"))):
        raise FileError(f"{folder} has its weights in {', '.join(pickles)}: pickles can run code and are not read.")
    return read_tensors(path)


def take(model: ModelMixin, tensors: dict[str, torch.Tensor], folder: Path, *, assign: bool) -> None:
    """Give a model all its tensors. Raises `FileError` where they do not fit."""
    expected = model.state_dict()
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise FileError(f"The weights in {folder} do not fit the model and its graft: {', '.join(odd[:4])} differ.")
    for name, tensor in tensors.items():
        require_like(expected[name], tensor, name, folder)
    if assign:  # a copy, since mapped memory would crash the process once somebody writes over the file
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=assign)


def _cast(model: ModelMixin, tensors: dict[str, torch.Tensor], dtype: torch.dtype, buffers: Any) -> ModelMixin:
    """In the dtype asked for, but for what diffusers keeps in float32.

    Buffers that are no weights (tables of positions) had a dtype of their own if the model was loaded in that dtype,
    and
    another if it was cast to it: where the model comes back as it was saved, so do they.
    """
    require_dtype(dtype)
    kept = set(type(model)._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if kept & set(name.split(".")) else dtype
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = tensors[name].to(wanted)
    as_saved = any(tensor.dtype == dtype for tensor in tensors.values()) and isinstance(buffers, dict)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            path, _, own = name.rpartition(".")
            told = getattr(torch, str(buffers.get(name)), None) if as_saved else None
            wanted = told if isinstance(told, torch.dtype) and told.is_floating_point else dtype
            model.get_submodule(path)._buffers[own] = buffer.to(wanted)
    return model
