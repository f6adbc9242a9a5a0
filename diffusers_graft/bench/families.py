"""What works in which family: a table measured on a tiny model of every transformer class of the installed diffusers."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import diffusers
import torch
from diffusers import ModelMixin

from ..anatomy import family_of, find_sites, predict, read_context
from ..errors import GraftError
from ..graft import build_graft
from ..plan import plan_graft
from ..site import Sites
from ..surgery import install, uninstall
from .zoo import ROWS, exported, inputs_of, tiny

_MIXERS = {
    "self_attention": "self_attention", "sliding_window": {"operator": "sliding_window", "window": (1, 1)},
    "neighborhood": "neighborhood", "linear_attention": "linear_attention", "hyena_x": "hyena_x",
}  # fmt: skip
_MLP = {"operator": "mlp", "init": "random", "activation": "gelu", "expansion": 1}
COLUMNS = ("class", "joint", "self", "cross", "feed-forward", "grid", *_MIXERS, "mlp")


def main_sites(model: ModelMixin) -> Sites:
    """The joint and self-attention that a forward reaches and that runs on the image, the video or the sound."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path)) for path, module in model.named_modules()
    ]
    with torch.no_grad():
        predict(model, inputs_of(type(model).__name__))
    for handle in handles:
        handle.remove()
    aside = family_of(model).aside
    return Sites(
        site for site in find_sites(model)
        if site.kind in ("joint_attention", "self_attention") and site.path in called
        and not (aside and site.path.startswith(aside))
    )  # fmt: skip


def _outcome(model: ModelMixin, sites: Sites, spec: object, before: torch.Tensor) -> str:
    """`yes`, `same` for an output that is the original's bit for bit, `-` without sites, else why not."""
    if not sites:
        return "-"
    inputs = inputs_of(type(model).__name__)
    try:
        install(model, build_graft(model, plan_graft(model, {site.address: spec for site in sites})))
    except GraftError as error:
        return str(error)
    try:
        with torch.no_grad():
            output = predict(model, inputs)
    except GraftError as error:
        return str(error)
    finally:
        uninstall(model)
    return "same" if torch.equal(output, before) else "yes" if output.isfinite().all() else "the output is not finite"


def measure_family(name: str) -> dict[str, str]:
    """One row of the table, by column."""
    if name not in ROWS:
        return {"class": name, "joint": "this version of diffusers-graft has no tiny configuration of it"}
    model = tiny(name)
    if not isinstance(model, ModelMixin):
        return {"class": name, "joint": "it is no ModelMixin; its parts are"}
    sites, main, inputs = find_sites(model), main_sites(model), inputs_of(name)
    with torch.no_grad():
        before = predict(model, inputs)
    kinds = ("joint_attention", "self_attention", "cross_attention", "feed_forward")
    counts = [str(len(sites.where(kind=kind)) or "-") for kind in kinds]
    grid = str(read_context(model, (), inputs_of(name)).grid or "-")
    mixed = [_outcome(model, main, spec, before) for spec in _MIXERS.values()]
    mlp = _outcome(model, sites.where(kind="feed_forward"), _MLP, before)
    return dict(zip(COLUMNS, (name, *counts, grid, *mixed, mlp), strict=True))


def families_markdown(say: Callable[[str], None]) -> None:
    """The table, and below it every refusal in its own words."""
    say(
        f"Measured with diffusers {diffusers.__version__} on a tiny model of each class: sites found, grid read, operators "
        "run in every self- and joint-attention that mixes the image; `same` is the original's output bit for bit.\n"
    )
    say("| " + " | ".join(COLUMNS) + " |")
    say("|" + "---|" * len(COLUMNS))
    refusals: dict[str, dict[str, None]] = {}
    for name in sorted(exported()):
        say("| " + " | ".join(_cells(measure_family(name), refusals)) + " |")
    say("")
    for name, words in refusals.items():
        say(f"- `{name}`: {' '.join(words)}")


def _cells(row: dict[str, str], refusals: dict[str, dict[str, None]]) -> Iterator[str]:
    for column in COLUMNS:
        value = row.get(column, "")
        if column == "class" or len(value) < 16:
            yield value
        else:
            refusals.setdefault(row["class"], {})[value.partition(". ")[0].rstrip(".") + "."] = None
            yield "no"
