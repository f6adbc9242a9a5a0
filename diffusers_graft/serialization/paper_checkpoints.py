"""Import of the checkpoints released with the paper on grafting, as grafted models, without running their pickles.

They are pickles in the naming of the original DiT, with the names of their operators; the operators of
the sites and their settings are read off names and shapes. Paper: Exploring Diffusion Transformer Designs via
Grafting, arXiv 2506.05340.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_utils import no_init_weights

from ..cards.hub_metadata import check_license
from ..core.sites import Site
from ..core.storage import require_regular
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

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

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
    """Load a checkpoint of the paper as a grafted model, which `save_pretrained` and `push_to_hub` write as ours.

    The original computes its timestep frequencies with `downscale_freq_shift=0`, where diffusers has 1, and normalises
    with an epsilon of 1e-6; both are saved with the model and stated on its card.

    Args:
        source: a `model.pt`, or a Hub repository that holds one, such as `grafting/dit-xl2-mha-hyena_x-50p-fid2.74`.
        num_attention_heads, sample_size, window: settings that tensors do not show; DiT-XL/2 at 256 x 256 unless
            given.
        weights: `ema`, the averaged weights that the paper evaluates, or `model`.
        license: of the weights, for the card; an id of the Hub.
        hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        FileError: anything that is no such checkpoint.
        UnknownNameError: a license that the Hub does not know.
    """
    from diffusers import DiTTransformer2DModel

    check_license(license)
    path = _find_file(source, hub_arguments)
    tensors = _read_tensors(path, weights)
    config = _read_config(tensors, num_attention_heads, sample_size, path)
    with no_init_weights():
        model = DiTTransformer2DModel(**config)
    _check_positions(model, tensors, path)
    parts = [_read_part(tensors, site, window, path) for site in find_sites(model)]
    _graft(model, parts)
    settings = frequency_settings(model, 0)
    apply_settings(model, settings)
    values = _rename_common(tensors, config["num_layers"])
    for part in parts:
        values |= part.tensors
    assign_tensors(model, {name: tensor.float() for name, tensor in values.items()}, path, assign=True)
    is_dit_xl = all(config[name] == value for name, value in _DIT_XL.items())
    graft = get_graft(model)
    assert graft is not None
    set_origin(
        model,
        graft,
        base={"model_class": type(model).__name__, "name_or_path": _BASE if is_dit_xl else None},
        settings=settings,
        imported={"from": path.name if Path(source).exists() else str(source), "weights": weights, "license": license},
    )
    return model.eval()


@dataclass(frozen=True)
class _Part:
    """One site of the checkpoint.

    Attributes:
        site: of our model.
        operator: its name and settings; None for a part that the checkpoint has as in the original.
        tensors: by our names.
    """

    site: Site
    operator: dict[str, Any] | None
    tensors: Tensors


# a part that was read: its operator, None for the original's, and its tensors by our names within the site
_Reading = tuple[dict[str, Any] | None, Tensors]


def _graft(model: DiTTransformer2DModel, parts: list[_Part]) -> None:
    edits = []
    for part in parts:
        if part.operator is not None:
            edits.append(Edit(part.site, configure(part.operator).resolved(part.site)))
    with no_init_weights():
        install(model, build_empty_graft(model, GraftPlan(type(model).__name__, tuple(edits))))


def _find_file(source: str | Path, hub_arguments: dict[str, Any]) -> Path:
    """Return the one checkpoint of a source. Raises `FileError` where there is none, or there are several."""
    require_source(source)
    if Path(source).is_file():
        return Path(source)
    if Path(source).suffix in (".pt", ".pth"):
        raise FileError(f"There is no file {source}. Give the path of a model.pt, or a Hub repository that holds one.")
    folder = local_folder(source, ["*.pt", "*.pth"], **hub_arguments)
    found = sorted([*folder.glob("*.pt"), *folder.glob("*.pth")])
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        raise FileError(f"{source} holds {len(found)} checkpoints ({names}). Name one file.")
    return found[0]


def _read_tensors(path: Path, weights: str) -> Tensors:
    """Return the tensors of a checkpoint by their names in it. Raises `FileError` for anything else in the file."""
    require_regular(path)
    try:
        # argparse.Namespace: the settings of the run, which are not used
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileError(f"{path} was not read: it holds more than tensors, or is damaged.") from error
    if isinstance(data, Mapping) and isinstance(data.get(weights), Mapping):
        data = data[weights]
    if not isinstance(data, Mapping) or not all(isinstance(value, torch.Tensor) for value in data.values()):
        raise FileError(f"{path} holds no {weights!r} of tensors. Choose weights='ema' or weights='model'.")
    if any(not value.isfinite().all() for value in data.values() if value.is_floating_point()):
        raise FileError(f"{path} holds values that are not finite.")
    # prefixes of DistributedDataParallel and of torch.compile
    return {re.sub(r"^(module|_orig_mod)\.", "", name): value for name, value in data.items()}


def _read_config(tensors: Tensors, heads: int, sample_size: int, path: Path) -> dict[str, Any]:
    """Return the arguments of the diffusers class, from shapes. Raises `FileError` for shapes of another model."""
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        out_channels = tensors["final_layer.linear.weight"].shape[0] // patch**2
        # the last row is that of no label
        labels = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
    except (KeyError, ValueError) as error:
        raise FileError(f"{path} is not a checkpoint of a DiT in the original naming: {error!r}.") from error
    if width % heads:
        raise FileError(f"{path} is {width} wide, which {heads} heads do not divide. Give num_attention_heads.")
    blocks = set()
    for name in tensors:
        match = re.match(r"blocks\.(\d+)\.", name)
        if match:
            blocks.add(int(match[1]))
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
    """Raise `FileError` unless the latent size that was given is that of the checkpoint's table of positions."""
    table = tensors.get("pos_embed")
    if table is None:
        return
    expected = model.pos_embed.get_buffer("pos_embed")
    if table.shape != expected.shape:
        side = round(table.shape[1] ** 0.5) * model.config["patch_size"]
        raise FileError(f"{path} is for latents of {side} x {side}. Give sample_size={side}.")
    if not torch.allclose(table, expected, atol=1e-4):
        raise FileError(f"{path} has other positions than the sines and cosines of a DiT.")


def _rename_common(tensors: Tensors, layers: int) -> Tensors:
    """Return the tensors that no operator replaces, by our names."""
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    for layer in range(layers):
        norm = f"transformer_blocks.{layer}.norm1"
        names[f"{norm}.linear"] = f"blocks.{layer}.adaLN_modulation.1"
        # diffusers has a copy of the conditioning in every block
        names[f"{norm}.emb.timestep_embedder.linear_1"] = "t_embedder.mlp.0"
        names[f"{norm}.emb.timestep_embedder.linear_2"] = "t_embedder.mlp.2"
        names[f"{norm}.emb.class_embedder.embedding_table"] = "y_embedder.embedding_table"
    renamed = {}
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in tensors:
                renamed[f"{ours}.{kind}"] = tensors[f"{theirs}.{kind}"]
    return renamed


def _read_part(tensors: Tensors, site: Site, window: tuple[int, int], file: Path) -> _Part:
    """Return the part of a site. Raises `FileError` for an operator that no reader knows."""
    _, layer, child = site.path.split(".")
    is_attention = child == "attn1"
    prefix = f"blocks.{layer}.{'attn' if is_attention else 'mlp'}."
    inside = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            inside[name.removeprefix(prefix).removeprefix("mixer.")] = tensor
    modules = {name.rpartition(".")[0] or name for name in inside}
    if is_attention:
        reading = (
            _read_attention(inside, modules, window) or _read_hyena(inside, modules) or _read_mamba2(inside, modules)
        )
    else:
        reading = _read_mlp(inside, modules) or _read_hyena_mlp(inside, modules)
    if reading is None:
        names = ", ".join(sorted(inside))
        raise FileError(f"{file} has an operator in {prefix[:-1]} that is not known: {names}.")
    operator, renamed = reading
    return _Part(site, operator, {f"{site.path}.{name}": tensor for name, tensor in renamed.items()})


def _split(tensors: Tensors, name: str, parts: tuple[str, ...]) -> Tensors:
    """Return the rows of one layer as several layers of equal size."""
    split = {}
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" in tensors:
            rows = tensors[f"{name}.{kind}"].chunk(len(parts))
            split.update({f"{part}.{kind}": value for part, value in zip(parts, rows, strict=True)})
    return split


_PROJECTIONS = ("to_q", "to_k", "to_v")


def _read_attention(inside: Tensors, modules: set[str], window: tuple[int, int]) -> _Reading | None:
    """Read the original's attention, or a sliding window, which has other names."""
    if modules == {"qkv", "proj"}:
        return None, _split(inside, "qkv", _PROJECTIONS) | _split(inside, "proj", ("to_out.0",))
    if modules == {"Wqkv", "out_proj"}:
        renamed = _split(inside, "Wqkv", _PROJECTIONS) | _split(inside, "out_proj", ("to_out.0",))
        return {"operator": "sliding_window", "window": tuple(window)}, renamed
    return None


def _read_hyena(inside: Tensors, modules: set[str]) -> _Reading | None:
    """Read Hyena-SE, -X or -Y, which differ in the filters they have."""
    filters = tuple(sorted(modules - {"in_proj", "out_proj"}))
    names = {("inner_filter", "short_filter"): "hyena_se", ("short_filter",): "hyena_x", ("inner_filter",): "hyena_y"}
    if filters not in names:
        return None
    renamed = _split(inside, "in_proj", _PROJECTIONS) | _split(inside, "out_proj", ("to_out.0",))
    # their filters are of one dimension, ours of two
    two_dimensional = {
        name: tensor[..., None] if name.endswith("filter.weight") else tensor for name, tensor in inside.items()
    }
    convolutions = tuple(f"graft.convolutions.{name}" for name in ("query", "key", "value"))
    renamed |= _split(two_dimensional, "short_filter", convolutions)
    renamed |= _split(two_dimensional, "inner_filter", ("graft.inner",))
    return {"operator": names[filters], "kernel_size": inside[f"{filters[0]}.weight"].shape[-1]}, renamed


def _read_mamba2(inside: Tensors, modules: set[str]) -> _Reading | None:
    if modules != {"in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj"}:
        return None
    width, inner = inside["out_proj.weight"].shape
    operator = {
        "operator": "mamba2",
        "bidirectional": False,
        "state": (inside["conv1d.weight"].shape[0] - inner) // 2,
        "expand": inner // width,
        "conv": inside["conv1d.weight"].shape[-1],
        "head_width": inner // len(inside["A_log"]),
    }
    return operator, {f"graft.{name}": tensor for name, tensor in inside.items()}


def _read_mlp(inside: Tensors, modules: set[str]) -> _Reading | None:
    """Read the original's feed-forward, or an mlp of another width."""
    if modules != {"fc1", "fc2"}:
        return None
    hidden, width = inside["fc1.weight"].shape
    if hidden == _EXPANSION * width:
        return None, _split(inside, "fc1", ("net.0.proj",)) | _split(inside, "fc2", ("net.2",))
    operator = {"operator": "mlp", "expansion": hidden / width, "activation": "gelu-approximate"}
    return operator, _split(inside, "fc1", ("graft.up",)) | _split(inside, "fc2", ("graft.down",))


def _read_hyena_mlp(inside: Tensors, modules: set[str]) -> _Reading | None:
    if modules != {"in_proj", "short_filter", "out_proj"}:
        return None
    filters = inside["short_filter.weight"]
    width, hidden = inside["out_proj.weight"].shape
    operator = {
        "operator": "hyena_mlp",
        "expansion": hidden / width,
        "kernel_size": filters.shape[-1],
        "positions": len(filters),
    }
    renamed = _split(inside, "in_proj", ("graft.up",)) | _split(inside, "out_proj", ("graft.down",))
    renamed |= _split(inside, "short_filter", ("graft.convolution",))
    return operator, renamed
