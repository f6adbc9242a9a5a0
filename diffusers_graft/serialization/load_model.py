"""A grafted model read in full, without the base it was made on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin

from ..core.storage import read_json, read_tensors
from ..errors import FileError, GraftError, StateError
from ..injection.graft import Graft
from ..injection.install import install
from ..injection.waiting_parts import COMPUTE_DTYPES
from ..planning.plan import GraftPlan
from .config_file import CONFIG, MARK, descriptions_in, infix_of, is_adapter, read_plan, require_format, set_origin
from .download import file_in, local_folder
from .empty_graft import (
    build_empty_graft,
    check_operators,
    require_device,
    require_dtype,
    require_like,
    require_same_names,
    without_initial_values,
)
from .entries import CARRIED, check_description
from .limits import Budget, building_within, first_line
from .remote_code.operator_source import is_pinned, register_trusted
from .settings import apply_settings
from .tensors import Tensors, checksum, require_finite

STEM = "diffusion_pytorch_model"
_FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES}  # of buffers, by name
AUTO = "auto_map"  # where config.json names code that loads the model
_BESIDES = ["config.json", CONFIG, "README.md", "graft_operator_*.py"]  # files read beside the weights of a variant


def load_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    subfolder: str | None = "",
    variant: str | None = None,
    low_cpu_mem_usage: bool = True,
    trust_remote_code: bool = False,
    **hub_arguments: Any,
) -> ModelMixin:
    """Load a grafted model, of the right class, from what its `save_pretrained` wrote.

    Args:
        source: folder or Hub repository id.
        dtype: as in diffusers' `from_pretrained`, which also calls it `torch_dtype`; float32 unless given.
        device: where the model goes; diffusers' `device_map` may name one device, too.
        quantization_config: as in diffusers' `from_pretrained`, and refused: a grafted model is not quantised on load.
        low_cpu_mem_usage: assign the tensors of the file to the model instead of copying them into initialised ones.
        trust_remote_code: run operators that come as code; from the Hub also `revision` must then be the id of a
            commit.
        hub_arguments: `token`, `cache_dir`, `local_files_only` and the like, for `huggingface_hub.snapshot_download`.

    Raises:
        FileError: missing, damaged, no full grafted model, or out of proportion to what its files hold.
        UnknownNameError: an argument that nothing takes.
        StateError: a dtype or a device that a model cannot have, quantisation, or several devices.
    """
    device = _one_device(device, device_map, quantization_config)
    require_dtype(dtype)
    require_dtype(torch_dtype)
    wanted = [*_BESIDES, *weight_files(variant)]
    folder = local_folder(source, wanted, subfolder=subfolder, revision=revision, **hub_arguments)
    config, description = _read_config(folder, variant)
    register_trusted(description, folder, trust=trust_remote_code, pinned=is_pinned(source, revision))
    tensors = read_weights(folder, variant, description.get("files"))
    if description.get("checksum") not in (None, checksum(tensors)):
        raise FileError(f"The weights in {folder} were edited or damaged: they are not those that were saved.")
    require_finite(tensors, folder)
    adapters = {name: tensors.pop(name) for name in list(tensors) if is_adapter(name)}
    plan = _checked_plan(config, description, tensors, folder)
    with without_initial_values(low_cpu_mem_usage):
        model, graft = _build(config, plan, folder)
    graft.history = description["history"]
    apply_settings(model, description.get("settings") or [])
    assign_tensors(model, tensors, folder, assign=low_cpu_mem_usage)
    set_origin(model, graft, **{name: description.get(name) for name in CARRIED})
    _cast(model, tensors, dtype or torch_dtype or torch.float32, description.get("buffers"), folder)
    _load_lora(model, graft, description.get("lora"), adapters)
    if device is not None:
        model.to(device)  # pyright: ignore[reportArgumentType]  # diffusers wraps `to`, and loses that it is a method
    return model.eval()


def _one_device(device: Any, device_map: Any, quantization_config: Any) -> Any:
    """Return the device to load onto. Raises `StateError` for several, and for quantisation."""
    is_spread = isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential")
    if quantization_config is not None or is_spread:
        raise StateError(
            "A grafted model is loaded without quantization, onto one device. Load the base as you like, then "
            "load_graft."
        )
    if device is None:
        device = device_map
    require_device(device)
    return device


def _load_lora(model: ModelMixin, graft: Graft, described: Any, adapters: Tensors) -> None:
    if described is None and not adapters:
        return
    from .lora import load_adapters

    try:
        # A model without LoRA is read without peft, which is imported there.
        load_adapters(model, graft, described, adapters)
    except ModuleNotFoundError as error:
        raise FileError("This model carries LoRA layers, which are peft's. Run: pip install peft") from error


def _read_config(folder: Path, variant: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration of a model and the description of the graft of a variant, both from `config.json`."""
    config = read_json(folder / "config.json")
    where = str(folder / "config.json")
    known = descriptions_in(config)
    if (variant or "") not in known:
        there = ", ".join(repr(name or None) for name in known)
        if not there:
            raise FileError(
                f"{where} describes no graft: this is not a grafted model, as its save_pretrained writes it."
            )
        raise FileError(f"There is no {weight_file(variant)} of a grafted model in {folder}. Its variants: {there}.")
    description = known[variant or ""]
    if not isinstance(description, dict):
        raise FileError(f"{where} is damaged: its description is {type(description).__name__}, not dict.")
    require_format(description, where)
    check_description(description, where, is_full_model=True)
    if description.get("model") not in (None, config_digest(config)):
        raise FileError(f"{where} was edited, or belongs to another model than its graft. Save it again.")
    return {name: value for name, value in config.items() if name not in (MARK, AUTO)}, description


def config_digest(config: dict[str, Any]) -> str:
    """Return a hash of the entries of `config.json` that are the model's."""
    entries = {name: value for name, value in config.items() if name not in (MARK, AUTO)}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def model_class(config: dict[str, Any], folder: Path) -> Any:
    """Return the class of diffusers that a configuration names, a model."""
    name = config.get("_class_name")
    cls = None
    if isinstance(name, str) and name.isidentifier():
        cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise FileError(f"{folder / 'config.json'} names the class {name!r}, which diffusers does not have.")
    return cls


def _checked_plan(
    config: dict[str, Any],
    description: dict[str, Any],
    tensors: Tensors,
    folder: Path,
) -> GraftPlan:
    """Read the plan of a model, and compare the model and its operators with the tensors before they are built."""
    # On the meta device: a few bytes of config.json may ask for any size.
    cls = model_class(config, folder)
    with building_within(Budget.of(tensors), f"The model of {folder / 'config.json'}"):
        model = cls.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]  # a ConfigMixin too
    plan = read_plan(description["plan"], model)
    # Tensors inside edited parts are the operators', which are compared below.
    seats = tuple(f"{path}." for edit in plan.edits for path in edit.site.paths)
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name in tensors:
            require_like(tensor, tensors[name], name, folder)
        elif not name.startswith(seats):
            raise FileError(f"The weights in {folder} do not fit the model and its graft: {name} is missing.")
    for name in tensors.keys() - expected.keys():
        if not name.startswith(seats):
            raise FileError(f"The weights in {folder} do not fit the model and its graft: {name} is not part of it.")
    check_operators(plan, tensors, folder)
    return plan


def _build(config: dict[str, Any], plan: GraftPlan, folder: Path) -> tuple[Any, Graft]:
    """Build a model and its graft without values. Raises `FileError` where the configuration is of none."""
    try:
        cls = model_class(config, folder)
        model = cls.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]  # a ConfigMixin too
        plan.check(model)
        graft = build_empty_graft(model, plan)
    except GraftError:
        raise
    except Exception as error:
        raise FileError(f"{folder / 'config.json'} describes no model: {first_line(error)}") from error
    install(model, graft)
    return model, graft


def weight_file(variant: str | None) -> str:
    """Return the name of the file of a model's weights, where it is one."""
    return f"{STEM}{infix_of(variant)}.safetensors"


def weight_files(variant: str | None) -> list[str]:
    """Return patterns of all files that may hold or list a model's weights, as diffusers of any version names them."""
    infix = infix_of(variant)
    return [
        weight_file(variant),
        f"{STEM}{infix}-?????-of-?????.safetensors",
        f"{STEM}-?????-of-?????{infix}.safetensors",
        index_file(variant),
    ]


def index_file(variant: str | None) -> str:
    """Return the name of the file that lists the shards of a model's weights."""
    return f"{STEM}.safetensors.index{infix_of(variant)}.json"


def read_weights(folder: Path, variant: str | None = None, files: list[str] | None = None) -> Tensors:
    """Read the tensors of a model that diffusers saved, in one file or in shards.

    Args:
        files: those that its description lists, where it does: an index of shards that is not among them is stale.

    Raises `FileError`; pickles are not read.
    """
    index = folder / index_file(variant)
    if index.exists() and (files is None or index.name in files):
        mapped = read_json(index).get("weight_map")
        if not isinstance(mapped, dict) or not mapped:
            raise FileError(f"{index} is damaged: it holds no weight_map.")
        # One after the other: a list of names may be long, and the first one that is not there ends it.
        shards: set[str] = set()
        tensors: Tensors = {}
        for name in mapped.values():
            if not isinstance(name, str) or name not in shards:
                tensors.update(read_tensors(file_in(folder, name)))
                shards.add(name)
        require_same_names(mapped, tensors, f"{index} does not fit the files it names")
        return tensors
    path = folder / weight_file(variant)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles and not path.exists():
        raise FileError(f"{folder} has its weights in {', '.join(pickles)}: pickles can run code and are not read.")
    return read_tensors(path)


def assign_tensors(model: ModelMixin, tensors: Tensors, folder: Path, *, assign: bool) -> None:
    """Give a model all its tensors. Raises `FileError` where they do not fit."""
    expected = model.state_dict()
    require_same_names(expected, tensors, f"The weights in {folder} do not fit the model and its graft")
    for name, tensor in tensors.items():
        require_like(expected[name], tensor, name, folder)
    if assign:
        # A copy, since mapped memory would crash the process once somebody writes over the file.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=assign)


def _cast(
    model: ModelMixin, tensors: Tensors, dtype: torch.dtype, buffers: dict[str, str] | None, folder: Path
) -> None:
    """Cast a model to the dtype asked for, except what diffusers computes in float32.

    Buffers that are no weights (tables of positions) had another dtype if the model was cast than if it was loaded in
    its dtype: where the model comes back as it was saved, they do too. Raises `FileError` where a cast makes a value
    infinite.
    """
    in_float32 = set(type(model)._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        wanted = dtype
        if in_float32 & set(name.split(".")):
            wanted = torch.float32
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = tensors[name].to(wanted)
            require_finite({name: parameter.data}, folder)
    is_as_saved = any(tensor.dtype == dtype for tensor in tensors.values())
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            wanted = dtype
            if is_as_saved and buffers:
                wanted = _FLOATS.get(buffers.get(name, ""), dtype)
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._buffers[last] = buffer.to(wanted)
