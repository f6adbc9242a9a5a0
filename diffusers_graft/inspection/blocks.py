"""Blocks as sites: the lists they stand in, the streams they carry on, and why some cannot run side by side."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import ModelMixin
from torch import nn

from ..core.sites import BlockSite, Site, Sites
from ..errors import OperatorError
from .block_loops import apart
from .source import parameters_of, returned_names

# What a block's forward takes from a block far above it.
_SKIPS = ("skip", "skip_connection", "res_hidden_states", "res_hidden_states_tuple")


@dataclass(frozen=True)
class Streams:
    """How a block's answer lies in its arguments.

    Attributes:
        names: the argument that every element of the answer carries on, in the order of the answer.
        several: whether the answer is a tuple.
    """

    names: tuple[str, ...]
    several: bool


def streams_of(cls: type) -> Streams | None:
    """The streams of a block's class, from the names its forward returns; None where they cannot be told."""
    taken, answers = parameters_of(cls), returned_names(cls)
    if not taken or len(answers) != 1:
        return None
    (names,) = answers
    if isinstance(names, str):
        if names.startswith("self."):  # what a block inside it returns
            return None
        return Streams((names if names in taken else taken[0],), several=False)
    return Streams(names, several=True) if names and set(names) <= set(taken) else None


def block_class(block: nn.Module) -> type:
    """The class of a block; of what stands in for a removed one, that of the original."""
    return getattr(block, "graft_class", type(block))


def block_sites(model: ModelMixin, parts: Sites) -> Sites:
    """Every block, and every pair of neighbours (2i, 2i + 1) that could run side by side, in forward order."""
    blocks: list[Site] = []
    pairs: list[Site] = []
    for path, entries in _lists(model, parts):
        found = [
            _block(f"{path}.{number}", block, len(blocks) + number, parts) for number, block in enumerate(entries)
        ]
        if refusal(model, path) is None:
            for first in range(0, len(entries) - 1, 2):
                if _unlike(entries[first], entries[first + 1]) is None:
                    pairs.append(_span("block_pair", len(pairs), found[first : first + 2]))
        blocks += found
    return Sites([*blocks, *pairs])


def join_blocks(blocks: Sites) -> Site:
    """Return neighbouring blocks as one site."""
    return _span("block_run", blocks[0].index, list(blocks))


def _span(kind: str, index: int, blocks: list[Site]) -> Site:
    last = blocks[-1]
    return BlockSite(
        kind=kind, index=index, path=blocks[0].path, width=last.width, blocks=len(blocks), streams=last.streams
    )


def _block(path: str, block: nn.Module, index: int, parts: Sites) -> Site:
    inside = [site for site in parts if site.path.startswith(f"{path}.")]
    streams = len(streams_of(block_class(block)).names) - getattr(block, "context_pre_only", False)
    return BlockSite(kind="block", index=index, path=path, width=inside[0].width, blocks=1, streams=streams)


def _lists(model: ModelMixin, parts: Sites) -> list[tuple[str, nn.ModuleList]]:
    """Lists whose every entry is a block with parts and streams of its own, the outermost, in forward order."""
    found = []
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and not any(path.startswith(f"{outer}.") for outer, _ in found)
        ):
            sites = [[site for site in parts if site.path.startswith(f"{path}.{n}.")] for n in range(len(module))]
            if all(sites) and all(streams_of(block_class(block)) for block in module):
                found.append((path, module))
    order = {site.path: place for place, site in enumerate(parts)}
    return sorted(
        found, key=lambda entry: min(place for path, place in order.items() if path.startswith(f"{entry[0]}."))
    )


def refusals(model: ModelMixin, parts: Sites) -> list[str]:
    """Why blocks of a model cannot run side by side, a sentence for each list of them."""
    reasons = []
    for path, module in model.named_modules():
        holds_parts = isinstance(module, nn.ModuleList) and any(site.path.startswith(f"{path}.") for site in parts)
        if holds_parts and (why := refusal(model, path) or _unlike_neighbours(list(module))):
            reasons.append(f"{path} of {type(model).__name__}: {why}.")
    return reasons


def require_alike(model: ModelMixin, run: Site) -> None:
    """Raise `OperatorError` unless the blocks of a run can run side by side."""
    blocks = [model.get_submodule(path) for path in run.paths]
    if why := refusal(model, run.path.rpartition(".")[0]) or _unlike_neighbours(blocks):
        raise OperatorError(f"{run.address} of {type(model).__name__} cannot run side by side: {why}.")


def require_one_width(model: ModelMixin, site: Site, parts: Sites) -> None:
    """Raise `OperatorError` where the blocks of a site carry streams of different widths, as their parts show."""
    widths = sorted({part.width for part in parts if part.path.startswith(f"{site.path}.")})
    if site.streams > 1 and len(widths) > 1:
        cls = block_class(model.get_submodule(site.path)).__name__
        raise OperatorError(
            f"{site.address} of {type(model).__name__}: {cls} carries streams of widths {widths}, and these weights are made "
            "for one. Choose what has none: remove, or parallel(merge='sum')."
        )


def refusal(model: ModelMixin, path: str) -> str | None:
    """Why no two neighbours of the list at a path can run side by side."""
    holder, _, name = path.rpartition(".")
    for cls in sorted({block_class(block) for block in model.get_submodule(path)}, key=lambda cls: cls.__name__):
        if skips := [parameter for parameter in parameters_of(cls) if parameter in _SKIPS]:
            return (
                f"{cls.__name__} takes a skip connection ({skips[0]}) from another block, which would cross the pair"
            )
        if (streams := streams_of(cls)) is None:
            return f"what {cls.__name__} returns cannot be matched with its arguments"
        if why := apart(type(model.get_submodule(holder)), name, cls, streams.names):
            return why
    return None


def _unlike_neighbours(blocks: list[nn.Module]) -> str | None:
    return next((why for pair in zip(blocks, blocks[1:], strict=False) if (why := _unlike(*pair))), None)


def _unlike(one: nn.Module, other: nn.Module) -> str | None:
    """Why two neighbours cannot run side by side."""
    if block_class(one) is not block_class(other):
        return f"neighbours are of different classes, {block_class(one).__name__} and {block_class(other).__name__}"
    return None
