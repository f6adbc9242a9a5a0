"""The checkpoints released with the paper on grafting, read without running anything, as grafted models of ours.

They are pickles in the naming of the original DiT, with the operators' own names inside; which operator sits where,
and its settings, are read off names and shapes. Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv
2506.05340.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_utils import no_init_weights

from ..core.sites import Site
from ..errors import FileError
from ..injection.graft import get_graft
from ..injection.install import install
from ..inspection import find_sites
from ..operators import configure
from ..planning.plan import Edit, GraftPlan
from .config_file import set_origin
from .download import local_folder, require_source
from .empty_graft import build_empty_graft
from .load_model import assign_tensors
from .settings import apply_settings, frequency_settings

Tensors = dict[str, torch.Tensor]

_BASE = "facebook/DiT-XL-2-256"
_DIT_XL = {"num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16, "sample_size": 32}
_EXPANSION = 4  # of the feed-forwards of the original, which diffusers builds too


def import_upstream(
    source: str | Path,
    *,
    num_attention_heads: int = 16,
    sample_size: int = 32,
    window: tuple[int, int] = (4, 4),
    weights: str = "ema",
    license: str | None = None,
    **hub_arguments: Any,
) -> DiTTransformer2DModel:
    """A checkpoint of the paper as a grafted model: `save_pretrained` and `push_to_hub` write it as ours.

    The original computes its timestep frequencies with `downscale_freq_shift=0`, where diffusers has 1, and normalises
    with an epsilon of 1e-6; both come along with the model and stand on its card.

    Args:
        source: a `model.pt`, or a Hub repository that holds one, such as `grafting/dit-xl2-mha-hyena_x-50p-fid2.74`.
        num_attention_heads, sample_size, window: what tensors cannot tell; DiT-XL/2 at 256 x 256 unless given.
        weights: `ema`, the averaged weights that the paper evaluates, or `model`.
        license: of the weights, for the card.
        hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises `FileError` for anything that is no such checkpoint.
    """
    path = _file(source, hub_arguments)
    tensors = _read(path, weights)
    config = _config(tensors, num_attention_heads, sample_size, path)
    with no_init_weights():
        model = DiTTransformer2DModel(**config)
    _check_positions(model, tensors, path)
    sites = find_sites(model)
    parts = [_part(tensors, site.path, window, path) for site in sites]
    _graft(model, [(site, part.operator) for site, part in zip(sites, parts, strict=True) if part.operator])
    settings = frequency_settings(model, 0)
    apply_settings(model, settings)
    values = _common(tensors, config["num_layers"]) | {
        name: tensor for part in parts for name, tensor in part.tensors.items()
    }
    assign_tensors(model, {name: tensor.float() for name, tensor in values.items()}, path, assign=True)
    base = _BASE if all(config[name] == value for name, value in _DIT_XL.items()) else None
    set_origin(
        model,
        get_graft(model),
        base={"model_class": type(model).__name__, "name_or_path": base},
        settings=settings,
        imported={"from": path.name if Path(source).exists() else str(source), "weights": weights, "license": license},
    )
    return model.eval()


def _graft(model: DiTTransformer2DModel, operators: list[tuple[Site, dict[str, Any]]]) -> None:
    edits = tuple(Edit(site, configure(operator).resolved(site)) for site, operator in operators)
    with no_init_weights():
        install(model, build_empty_graft(model, GraftPlan(DiTTransformer2DModel.__name__, edits)))


def _file(source: str | Path, hub_arguments: dict[str, Any]) -> Path:
    require_source(source)
    if Path(source).is_file():
        return Path(source)
    if Path(source).suffix in (".pt", ".pth"):
        raise FileError(f"There is no file {source}. Give the path of a model.pt, or a Hub repository that holds one.")
    folder = local_folder(source, ["*.pt", "*.pth"], **hub_arguments)
    found = sorted([*folder.glob("*.pt"), *folder.glob("*.pth")])
    if len(found) != 1:
        raise FileError(
            f"{source} holds {len(found)} checkpoints ({', '.join(p.name for p in found)}). Name one file."
        )
    return found[0]


def _read(path: Path, weights: str) -> Tensors:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the settings of the run, which are not used
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileError(f"{path} was not read: it holds more than tensors, or is damaged.") from error
    if isinstance(data, Mapping) and isinstance(data.get(weights), Mapping):
        data = data[weights]
    if not isinstance(data, Mapping) or not all(isinstance(value, torch.Tensor) for value in data.values()):
        raise FileError(f"{path} holds no {weights!r} of tensors. Choose weights='ema' or weights='model'.")
    if any(not value.isfinite().all() for value in data.values() if value.is_floating_point()):
        raise FileError(f"{path} holds values that are not finite.")
    return {re.sub(r"^(module|_orig_mod)\.", "", name): value for name, value in data.items()}


def _config(tensors: Tensors, heads: int, sample_size: int, path: Path) -> dict[str, Any]:
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
        out_channels = tensors["final_layer.linear.weight"].shape[0] // patch**2
        labels = tensors["y_embedder.embedding_table.weight"].shape[0] - 1  # the last is that of no label
    except (KeyError, ValueError) as error:
        raise FileError(f"{path} is no checkpoint of a DiT in the original naming: {error!r}.") from error
    if width % heads:
        raise FileError(f"{path} is {width} wide, which {heads} heads do not divide. Give num_attention_heads.")
    if blocks != set(range(len(blocks))):
        raise FileError(f"{path} lacks blocks: it has {sorted(blocks)}.")
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": out_channels,
        "num_layers": len(blocks),
        "sample_size": sample_size,
        "patch_size": patch,
        "num_embeds_ada_norm": labels,
        "norm_eps": 1e-6,
    }


def _check_positions(model: DiTTransformer2DModel, tensors: Tensors, path: Path) -> None:
    """The checkpoint's own table of positions tells whether the latent size is right."""
    table = tensors.get("pos_embed")
    if table is None:
        return
    ours = model.pos_embed.pos_embed
    if table.shape != ours.shape:
        side = round(table.shape[1] ** 0.5) * model.config.patch_size
        raise FileError(f"{path} is for latents of {side} x {side}. Give sample_size={side}.")
    if not torch.allclose(table, ours, atol=1e-4):
        raise FileError(f"{path} has other positions than the sines and cosines of a DiT.")


def _common(tensors: Tensors, layers: int) -> Tensors:
    """What no operator replaces; diffusers keeps a copy of the conditioning in every block."""
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    for layer in range(layers):
        norm = f"transformer_blocks.{layer}.norm1"
        names[f"{norm}.linear"] = f"blocks.{layer}.adaLN_modulation.1"
        for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
            names[f"{norm}.emb.timestep_embedder.{ours}"] = f"t_embedder.mlp.{theirs}"
        names[f"{norm}.emb.class_embedder.embedding_table"] = "y_embedder.embedding_table"
    return {
        f"{ours}.{kind}": tensors[f"{theirs}.{kind}"]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in tensors
    }


@dataclass(frozen=True)
class _Part:
    """What sits at one site: an operator's name and settings, or None for the original's own, and its tensors by our
    names.
    """

    path: str
    operator: dict[str, Any] | None
    tensors: Tensors


def _part(tensors: Tensors, path: str, window: tuple[int, int], file: Path) -> _Part:
    _, layer, kind = path.split(".")
    theirs = f"blocks.{layer}.{'attn' if kind == 'attn1' else 'mlp'}."
    own = {
        name.removeprefix(theirs).removeprefix("mixer."): t for name, t in tensors.items() if name.startswith(theirs)
    }
    modules = {name.rpartition(".")[0] or name for name in own}
    for read in (_attention, _hyena, _mamba2) if kind == "attn1" else (_mlp, _hyena_mlp):
        found = read(own, modules, window)
        if found:
            operator, named = found
            return _Part(path, operator, {f"{path}.{name}": tensor for name, tensor in named.items()})
    raise FileError(f"{file} has an operator in {theirs[:-1]} that is not known: {', '.join(sorted(own))}.")


def _split(tensors: Tensors, name: str, parts: tuple[str, ...]) -> Tensors:
    """The rows of one layer shared out among several."""
    split = {}
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" in tensors:
            rows = tensors[f"{name}.{kind}"].chunk(len(parts))
            split.update({f"{part}.{kind}": value for part, value in zip(parts, rows, strict=True)})
    return split


_PROJECTIONS = ("to_q", "to_k", "to_v")


def _attention(own: Tensors, modules: set[str], window: tuple[int, int]):
    for inward, outward, operator in (
        ("qkv", "proj", None),
        ("Wqkv", "out_proj", {"operator": "sliding_window", "window": tuple(window)}),
    ):
        if modules == {inward, outward}:
            return operator, _split(own, inward, _PROJECTIONS) | _split(own, outward, ("to_out.0",))
    return None


def _hyena(own: Tensors, modules: set[str], window):
    filters = modules - {"in_proj", "out_proj"}
    names = {("inner_filter", "short_filter"): "hyena_se", ("short_filter",): "hyena_x", ("inner_filter",): "hyena_y"}
    operator = names.get(tuple(sorted(filters)))
    if operator is None:
        return None
    named = _split(own, "in_proj", _PROJECTIONS) | _split(own, "out_proj", ("to_out.0",))
    upright = {name: t[..., None] if name.endswith("filter.weight") else t for name, t in own.items()}
    named |= _split(upright, "short_filter", tuple(f"graft.convolutions.{part}" for part in ("query", "key", "value")))
    named |= _split(upright, "inner_filter", ("graft.inner",))
    return {"operator": operator, "kernel_size": own[f"{min(filters)}.weight"].shape[-1]}, named


def _mamba2(own: Tensors, modules: set[str], window):
    if modules != {"in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj"}:
        return None
    width, inner = own["out_proj.weight"].shape
    settings = {
        "state": (own["conv1d.weight"].shape[0] - inner) // 2,
        "expand": inner // width,
        "conv": own["conv1d.weight"].shape[-1],
        "head_width": inner // len(own["A_log"]),
    }
    return {"operator": "mamba2", "bidirectional": False, **settings}, {f"graft.{name}": t for name, t in own.items()}


def _mlp(own: Tensors, modules: set[str], window):
    if modules != {"fc1", "fc2"}:
        return None
    hidden, width = own["fc1.weight"].shape
    if hidden == _EXPANSION * width:
        return None, _split(own, "fc1", ("net.0.proj",)) | _split(own, "fc2", ("net.2",))
    operator = {"operator": "mlp", "expansion": hidden / width, "activation": "gelu-approximate"}
    return operator, _split(own, "fc1", ("graft.up",)) | _split(own, "fc2", ("graft.down",))


def _hyena_mlp(own: Tensors, modules: set[str], window):
    if modules != {"in_proj", "short_filter", "out_proj"}:
        return None
    filters, (width, hidden) = own["short_filter.weight"], own["out_proj.weight"].shape
    settings = {"expansion": hidden / width, "kernel_size": filters.shape[-1], "positions": len(filters)}
    named = _split(own, "in_proj", ("graft.up",)) | _split(own, "out_proj", ("graft.down",))
    named |= _split(own, "short_filter", ("graft.convolution",))
    return {"operator": "hyena_mlp", **settings}, named
