"""Operators that work in each family, measured on a tiny model of every transformer class of diffusers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import diffusers
import torch
from diffusers import ModelMixin

from diffusers_graft.cli.verbs import say
from diffusers_graft.core.sites import Sites
from diffusers_graft.errors import GraftError
from diffusers_graft.injection.graft import build_graft
from diffusers_graft.injection.install import install, uninstall
from diffusers_graft.inspection import family_of, find_sites, inline_feed_forwards, predict, read_context
from diffusers_graft.planning.plan import plan_graft
from tests.tiny_models import ROWS, exported, inputs_of, tiny

MIXERS = {
    "self_attention": "self_attention",
    "sliding_window": {"operator": "sliding_window", "window": (1, 1)},
    "neighborhood": "neighborhood",
    "linear_attention": "linear_attention",
    "hyena_x": "hyena_x",
}
_MLP = {"operator": "mlp", "init": "random", "activation": "gelu", "expansion": 1}
_KINDS = {
    "joint": "joint_attention",
    "self": "self_attention",
    "cross": "cross_attention",
    "feed-forward": "feed_forward",
}
COLUMNS = ("class", *_KINDS, "grid", *MIXERS, "mlp")
FULLY = ("sliding_window", "linear_attention", "hyena_x")


@dataclass(frozen=True)
class Row:
    """Measurements of one class.

    Attributes:
        cells: by column; `yes`, `same` for an output that is the original's bit for bit, `no`, and `-` without sites.
        reasons: why not, in the library's own words.
        inline: feed-forwards that are no module, by `; `.
    """

    cells: dict[str, str]
    reasons: str = ""
    inline: str = ""

    @property
    def name(self) -> str:
        return self.cells["class"]

    @property
    def fully(self) -> bool:
        """Return whether windows, linear attention and Hyena-X run wherever the image is mixed."""
        return all(self.cells[mixer] == "yes" for mixer in FULLY)


def main_sites(model: ModelMixin) -> Sites:
    """The joint and self-attention that a forward reaches and that runs on the image, the video or the sound."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
        for path, module in model.named_modules()
    ]
    with torch.no_grad():
        predict(model, inputs_of(type(model).__name__))
    for handle in handles:
        handle.remove()
    aside = family_of(model).aside
    return Sites(
        site
        for site in find_sites(model)
        if site.kind in ("joint_attention", "self_attention")
        and site.path in called
        and not (aside and site.path.startswith(aside))
    )


def measure_family(name: str) -> Row:
    """The row of a class."""
    if name not in ROWS:
        return _unmeasured(name, "this version of diffusers-graft has no tiny configuration of it.")
    model = tiny(name)
    if not isinstance(model, ModelMixin):
        return _unmeasured(name, "it is no ModelMixin; its parts are.")
    sites = find_sites(model)
    main = main_sites(model)
    inputs = inputs_of(name)
    with torch.no_grad():
        before = predict(model, inputs)
    cells = {column: str(len(sites.where(kind=kind)) or "-") for column, kind in _KINDS.items()}
    inline = inline_feed_forwards(model, sites)
    if count := sum(len(entry.paths) for entry in inline):
        cells["feed-forward"] += f", {count} inline"
    cells["grid"] = str(read_context(model, (), inputs_of(name)).grid or "-")
    said = {mixer: _outcome(model, main, spec, before) for mixer, spec in MIXERS.items()}
    said["mlp"] = _outcome(model, sites.where(kind="feed_forward"), _MLP, before)
    refusals = {mixer: words for mixer, words in said.items() if words not in ("yes", "same", "-")}
    reasons = [words.partition(". ")[0].rstrip(".") + "." for words in refusals.values()]
    if not main:
        reasons.append("it has no self- or joint-attention with a processor.")
    cells |= said | dict.fromkeys(refusals, "no")
    return Row({"class": name, **cells}, " ".join(dict.fromkeys(reasons)), "; ".join(map(str, inline)))


def _unmeasured(name: str, reason: str) -> Row:
    return Row(dict.fromkeys(COLUMNS, "") | {"class": name}, reason)


def _outcome(model: ModelMixin, sites: Sites, spec: object, before: torch.Tensor) -> str:
    """`yes`, `same` or `-`, else why not."""
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


def measure_families() -> list[Row]:
    """A row for every class of the installed diffusers."""
    return [measure_family(name) for name in sorted(exported())]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement to a parser."""
    parser.add_argument("--full", action="store_true", help="a line a class, as in examples/benchmarks/families.md")


def run(arguments: argparse.Namespace) -> None:
    """Measure with options that were parsed."""
    # imported here, since the tables import the rows of this module
    from .family_tables import full_table, short_table

    rows = measure_families()
    table = full_table if arguments.full else short_table
    say(table(rows, diffusers.__version__))
