"""`save_pretrained` of a grafted model: its weights as diffusers writes them, its description, its card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict

from ..cards.card import CARD, write_card
from ..cards.user_edits import OURS, add_note, merge_edits
from ..core.storage import finish_save, read_json, read_text, replace_files, separate_memory, write_text
from ..errors import StateError
from ..injection.graft import Graft
from ..injection.install import check_processors
from .config_file import (
    CONFIG,
    MARK,
    descriptions_in,
    holds_graft,
    infix_of,
    is_adapter,
    read_if_sound,
    stale_files,
    to_text,
)
from .describe import describe_model
from .load_model import AUTO, config_digest, index_file
from .lora import adapter_tensors
from .remote_code.operator_source import describe_code, sources
from .remote_code.pack import AUTO_MAP, FILE, library_file
from .tensors import Tensors, checksum, is_quantised, require_finite


def save_grafted(
    original: Callable[..., Any],
    model: ModelMixin,
    graft: Graft,
    folder: Path,
    *,
    variant: str | None = None,
    self_contained: bool = False,
    **kwargs: Any,
) -> None:
    """Write what diffusers' `save_pretrained` writes, the graft's description and its card, all at once.

    LoRA layers of the graft come along, unfused: their tensors lie among the weights, and the layers that carry them
    are written as they are underneath.

    Args:
        variant: other weights beside the first, as diffusers names them; `config.json` describes the graft of each.
        self_contained: the code that reads the model goes along, for people without this package:
            `AutoModel.from_pretrained` runs it where `trust_remote_code=True` allows.

    Raises `StateError` for LoRA that the graft did not bring or whose tensors do not describe it, for quantised
    weights, for a graft that lost its processors, and for other files than safetensors; `FileError` for values that
    are not finite, for an operator whose source cannot be separated, and for a folder that cannot be written.
    """
    if not kwargs.get("safe_serialization", True) or kwargs.get("use_flashpack"):
        # A pickle would be written and never read.
        raise StateError(
            "A grafted model is saved as safetensors and read from nothing else. Leave the other format out."
        )
    # Refuses a variant that is no word before anything is gathered.
    infix_of(variant)
    check_processors(graft)
    weights = _weights(model, graft)
    require_finite(weights, "the model")
    code = {}
    if self_contained:
        code = sources(graft.plan)
    description = {**describe_model(model, graft), "checksum": checksum(weights), "code": describe_code(code)}
    there = _config_in(folder)
    others = _others(there, variant)
    auto_map = {}
    if self_contained or (others and AUTO in there):
        auto_map = {AUTO: AUTO_MAP}
    replaced = [f"config.json:{variant or ''}"]
    is_shown = not holds_graft(folder)  # a graft in the folder describes itself in that file
    if is_shown:
        replaced.append(CONFIG)
    if self_contained:
        code[FILE] = library_file(graft.plan)
    with replace_files(folder, stale=stale_files(folder, replaced)) as temporary:
        _write_weights(original, model, weights, temporary, variant=variant, **kwargs)
        for name, text in code.items():
            write_text(temporary / name, text)
        write_card(temporary, folder, model, graft, description, is_full_model=True)
        config = read_json(temporary / "config.json")
        # It may be a path of this machine; the description names the base.
        config.pop("_name_or_path", None)
        description["model"] = config_digest(config)
        written = {path.name for path in temporary.iterdir()} - {"config.json"}
        if auto_map:
            written.add(FILE)  # another variant may need the code that this one was saved without
        if is_shown:
            written.add(CONFIG)
        description["files"] = sorted(written)
        if is_shown:
            write_text(temporary / CONFIG, to_text(description))
        described = {**config, MARK: {**others, variant or "": description}, **auto_map}
        write_text(temporary / "config.json", to_text(described) + "\n")


def save_plain(original: Callable[..., Any], model: ModelMixin, folder: Path, **kwargs: Any) -> Any:
    """Save a model without a graft; where a grafted one was saved before, the files of that save go.

    Sections of the card that a person wrote stay.
    """
    replaced = [f"config.json:{kwargs.get('variant') or ''}"]
    if not holds_graft(folder):
        replaced.append(CONFIG)
    stale = stale_files(folder, replaced)
    # Without a save of ours there, diffusers writes as it ever did.
    if not stale:
        return original(model, folder, **kwargs)
    # diffusers reads an index of shards first, so one of an older save would hide these weights.
    with replace_files(folder, stale=[*stale, index_file(kwargs.get("variant"))]) as temporary:
        result = original(model, temporary, **kwargs)
        if CARD in stale and (folder / CARD).exists():
            card = merge_edits(add_note(""), read_text(folder / CARD))
            if card.partition(f"<!-- {OURS}")[0].strip():
                write_text(temporary / CARD, card)
    return result


def is_described(folder: Path, variant: str | None) -> bool:
    """Return whether the `config.json` of a folder describes the graft of a variant."""
    return (variant or "") in descriptions_in(_config_in(folder))


def _config_in(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a folder, empty where there is none that can be read."""
    finish_save(folder)
    return read_if_sound(folder / "config.json")


def _others(config: dict[str, Any], variant: str | None) -> dict[str, Any]:
    return {name: one for name, one in descriptions_in(config).items() if name != (variant or "")}


def forget_description(model: ModelMixin) -> None:
    """Drop the description that a model built `from_config` of a grafted one took over with its settings."""
    config = vars(model).get("_internal_dict", {})
    if MARK in config:
        vars(model)["_internal_dict"] = FrozenDict(
            {name: value for name, value in config.items() if name not in (MARK, AUTO)}
        )


def require_no_variants(folder: Path, variant: str | None, *, where: str | None = None) -> None:
    """Raise `StateError` where diffusers' `config.json` of a plain model would drop the description of variants."""
    others = _others(_config_in(folder), variant)
    if others:
        there = ", ".join(repr(name or None) for name in others)
        advice = "Give the plain one a repository or a folder of its own."
        raise StateError(f"{where or folder} holds a grafted model (variant {there}). {advice}")


def _weights(model: ModelMixin, graft: Graft) -> Tensors:
    """Return every tensor by the name it has without LoRA around it, and those of LoRA."""
    tensors = model.state_dict()
    quantised = [name for name, tensor in tensors.items() if is_quantised(tensor)]
    if quantised:
        raise StateError(
            f"{quantised[0]} is quantised, and weights are saved as plain tensors. Save the graft alone, with "
            "save_graft: it loads over the same quantised base."
        )
    adapters = [name for name in tensors if is_adapter(name)]
    if adapters and graft.adapter_config is None:
        raise StateError(
            f"This model carries LoRA layers that are not the graft's ({adapters[0]} and others). Fuse and unload "
            "them first; those that dg.finetune trains are the graft's, and are saved with it."
        )
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if not is_adapter(name)}
    return separate_memory({**plain, **adapter_tensors(model, graft)})


def _write_weights(
    original: Callable[..., Any], model: ModelMixin, weights: Tensors, folder: Path, **kwargs: Any
) -> None:
    """Run diffusers' save with these tensors in place of those it would ask the model for."""
    vars(model)["state_dict"] = lambda: weights
    try:
        original(model, folder, **kwargs)
    finally:
        del vars(model)["state_dict"]
