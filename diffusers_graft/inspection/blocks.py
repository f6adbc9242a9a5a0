"""Blocks as sites: the lists they are in, the streams they carry on, and why some cannot run side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from diffusers import ModelMixin
from torch import nn

from ..core.sites import BlockSite, Site, Sites
from ..errors import OperatorError
from .block_loops import find_separation
from .source import parameters_of, returned_names

# Arguments by which a block takes something from a block far above it.
_SKIPS = ("skip", "skip_connection", "res_hidden_states", "res_hidden_states_tuple")


@dataclass(frozen=True)
class Streams:
    """Correspondence of what a block returns with its arguments.

    Attributes:
        names: the argument that every returned tensor carries on, in the order in which they are returned.
        several: whether a tuple is returned.
    """

    names: tuple[str, ...]
    several: bool


def streams_of(cls: type) -> Streams | None:
    """Return the streams of a block's class, from the names its forward returns; None where these do not tell."""
    parameters = parameters_of(cls)
    answers = returned_names(cls)
    if not parameters or len(answers) != 1:
        return None
    (names,) = answers
    if isinstance(names, tuple):
        if not names or not set(names) <= set(parameters):
            return None
        return Streams(names, several=True)
    if names.startswith("self."):
        # What is returned by a module inside it may be anything.
        return None
    # One tensor under another name is the first argument, computed anew.
    name = names if names in parameters else parameters[0]
    return Streams((name,), several=False)


def block_class(block: nn.Module) -> type:
    """Return the class of a block; for what replaces a removed one, that of the original."""
    return getattr(block, "graft_class", type(block))


def block_sites(model: ModelMixin, parts: Sites) -> Sites:
    """Return every block, and every pair of neighbours (2i, 2i + 1) that could run side by side, in forward order."""
    blocks: list[BlockSite] = []
    pairs: list[BlockSite] = []
    for path, entries in _block_lists(model, parts):
        found = []
        for number, block in enumerate(entries):
            found.append(_block_site(f"{path}.{number}", block, len(blocks) + number, parts))
        if find_refusal(model, path) is None:
            # Pairs do not overlap, so that every second one can be replaced without a clash.
            for first in range(0, len(entries) - 1, 2):
                if _find_difference(entries[first], entries[first + 1]) is None:
                    pairs.append(_span("block_pair", len(pairs), found[first : first + 2]))
        blocks += found
    return Sites([*blocks, *pairs])


def join_blocks(sites: Iterable[Site]) -> BlockSite:
    """Return neighbouring blocks as one site, a `block_run`."""
    blocks = [site for site in sites if isinstance(site, BlockSite)]
    return _span("block_run", blocks[0].index, blocks)


def _span(kind: str, index: int, blocks: list[BlockSite]) -> BlockSite:
    last = blocks[-1]
    return BlockSite(
        kind=kind, index=index, path=blocks[0].path, width=last.width, blocks=len(blocks), streams=last.streams
    )


def _block_site(path: str, block: nn.Module, index: int, parts: Sites) -> BlockSite:
    streams = streams_of(block_class(block))
    assert streams is not None, "lists whose blocks have none are left out"
    # The last block of some models drops the prompt's stream.
    count = len(streams.names) - getattr(block, "context_pre_only", False)
    width = _parts_inside(path, parts)[0].width
    return BlockSite(kind="block", index=index, path=path, width=width, blocks=1, streams=count)


def _parts_inside(path: str, parts: Iterable[Site]) -> list[Site]:
    return [site for site in parts if site.path.startswith(f"{path}.")]


def _block_lists(model: ModelMixin, parts: Sites) -> list[tuple[str, nn.ModuleList]]:
    """Return the outermost lists whose every entry is a block with parts and streams, in forward order."""
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        # Lists inside a block are its own matter.
        if any(path.startswith(f"{outer}.") for outer, _ in found):
            continue
        have_parts = all(_parts_inside(f"{path}.{number}", parts) for number in range(len(module)))
        if have_parts and all(streams_of(block_class(block)) for block in module):
            found.append((path, module))
    # Modules are named in the order of their definition, parts in that of a forward.
    places = {site.path: place for place, site in enumerate(parts)}
    return sorted(found, key=lambda entry: places[_parts_inside(entry[0], parts)[0].path])


def refusals(model: ModelMixin, parts: Sites) -> list[str]:
    """Return why blocks of a model cannot run side by side, a sentence for each list of them."""
    reasons = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and _parts_inside(path, parts):
            why = find_refusal(model, path) or _find_different_neighbours(list(module))
            if why:
                reasons.append(f"{path} of {type(model).__name__}: {why}.")
    return reasons


def require_alike(model: ModelMixin, run: Site) -> None:
    """Raise `OperatorError` unless the blocks of a run can run side by side."""
    blocks = [model.get_submodule(path) for path in run.paths]
    why = find_refusal(model, run.path.rpartition(".")[0]) or _find_different_neighbours(blocks)
    if why:
        raise OperatorError(f"{run.address} of {type(model).__name__} cannot run side by side: {why}.")


def require_one_width(model: ModelMixin, site: BlockSite, parts: Sites) -> None:
    """Raise `OperatorError` where the blocks of a site carry streams of different widths, as their parts show."""
    widths = sorted({part.width for part in _parts_inside(site.path, parts)})
    if site.streams > 1 and len(widths) > 1:
        cls = block_class(model.get_submodule(site.path)).__name__
        raise OperatorError(
            f"{site.address} of {type(model).__name__}: {cls} carries streams of widths {widths}, and these weights "
            "are made for one. Choose what has none: remove, or parallel(merge='sum')."
        )


def find_refusal(model: ModelMixin, path: str) -> str | None:
    """Return why no two neighbours of the list at a path can run side by side, None where they can."""
    holder, _, name = path.rpartition(".")
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    # By name, so that the reason given is the same in every run.
    for cls in sorted({block_class(block) for block in blocks}, key=lambda cls: cls.__name__):
        skips = [parameter for parameter in parameters_of(cls) if parameter in _SKIPS]
        if skips:
            return (
                f"{cls.__name__} takes a skip connection ({skips[0]}) from another block, which would cross the pair"
            )
        streams = streams_of(cls)
        if streams is None:
            return f"what {cls.__name__} returns cannot be matched with its arguments"
        why = find_separation(type(model.get_submodule(holder)), name, cls, streams.names)
        if why:
            return why
    return None


def _find_different_neighbours(blocks: list[nn.Module]) -> str | None:
    for one, other in pairwise(blocks):
        why = _find_difference(one, other)
        if why:
            return why
    return None


def _find_difference(one: nn.Module, other: nn.Module) -> str | None:
    """Return why two neighbours cannot run side by side."""
    if block_class(one) is block_class(other):
        return None
    return f"neighbours are of different classes, {block_class(one).__name__} and {block_class(other).__name__}"
