"""Import of checkpoints whose attention is Video Sparse Attention, as FastVideo trains it, as grafted models.

Their attention has a layer more, `to_gate_compress`, which diffusers drops without a word: the model then runs without
its coarse branch, and under dense attention. Paper: VSA, arXiv 2505.13389.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights

from ..cards.hub_metadata import check_license
from ..core.sites import Site
from ..core.storage import read_json
from ..errors import FileError
from ..injection.graft import get_graft
from ..injection.install import install
from ..inspection import find_sites
from ..operators import configure
from ..planning.plan import Edit, GraftPlan
from .config_file import set_origin
from .download import local_folder
from .empty_graft import build_empty_graft
from .limits import Budget, building_within
from .load_model import assign_tensors, model_class, read_weights, weight_files
from .tensors import Tensors, require_finite

GATE = "to_gate_compress"


def holds_gates(names: Iterable[str]) -> bool:
    """Return whether tensors of these names are gates of Video Sparse Attention."""
    return any(f".{GATE}." in name for name in names)


def import_sparse(
    source: str | Path,
    *,
    keep: int | float = 0.2,
    block: int | tuple[int, int, int] = (4, 4, 4),
    dtype: torch.dtype = torch.float32,
    license: str | None = None,
    subfolder: str | None = "",
    **hub_arguments: Any,
) -> ModelMixin:
    """Load a checkpoint with gates of Video Sparse Attention, such as FastWan's, as a grafted model.

    Args:
        source: a folder as diffusers has it, or a Hub repository.
        keep: blocks of keys that it was trained to see, a count or a share: 1 less the sparsity, which tensors do not
            show.
        block: sides of a block along frames, height and width.
        license: of the weights, for the card; an id of the Hub.
        subfolder: of the model within a pipeline, such as `transformer`.
        hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        FileError: a checkpoint without such gates, or with gates at no self-attention.
        OperatorError: for settings that `block_sparse` refuses.
        UnknownNameError: a license that the Hub does not know.
    """
    check_license(license)
    operator = configure({"operator": "block_sparse", "block": block, "keep": keep, "gate": "token"})
    folder = local_folder(source, ["config.json", *weight_files(None)], subfolder=subfolder, **hub_arguments)
    config = read_json(folder / "config.json")
    tensors = read_weights(folder)
    require_finite(tensors, folder)
    if not holds_gates(tensors):
        raise FileError(
            f"No tensor of {folder} is named {GATE}, so its attention is not Video Sparse Attention. Load it with "
            "from_pretrained, and graft it."
        )
    cls = model_class(config, folder)
    # On the meta device first: a few bytes of config.json may ask for any size.
    with building_within(Budget.of(tensors), f"The model of {folder / 'config.json'}"):
        sites = list(find_sites(cls.from_config(config)).where(kind="self_attention"))
    edits = {}
    # Listed first, since names are changed on the way.
    for name in [name for name in tensors if f".{GATE}." in name]:
        place, _, parameter = name.partition(f".{GATE}.")
        site = _site_at(place, sites, folder)
        edits[site.path] = Edit(site, operator.resolved(site))
        tensors[f"{site.path}.graft.gate_projection.{parameter}"] = tensors.pop(name)
    with no_init_weights():
        model = cls.from_config(config)
        plan = GraftPlan(type(model).__name__, tuple(edits[site.path] for site in sites if site.path in edits))
        install(model, build_empty_graft(model, plan))
    assign_tensors(model, _cast(tensors, dtype), folder, assign=True)
    graft = get_graft(model)
    assert graft is not None
    is_local = Path(source).exists()
    set_origin(
        model,
        graft,
        base={"model_class": type(model).__name__, "name_or_path": None if is_local else str(source)},
        imported={"from": folder.name if is_local else str(source), "weights": "sparse", "license": license},
    )
    return model.eval()


def _site_at(place: str, sites: list[Site], folder: Path) -> Site:
    """Return the self-attention that a gate belongs to: it lies in the attention itself, or in its block."""
    for site in sites:
        if site.path == place or site.path.startswith(f"{place}."):
            return site
    raise FileError(f"The gates of {folder} at {place} belong to no self-attention that can be grafted.")


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
