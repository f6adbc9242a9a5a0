"""Blocks as sites: the lists they stand in, the streams they carry on, and what the model reads of them from outside."""
from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass

from diffusers import ModelMixin
from torch import nn

from ..errors import OperatorError
from ..site import Site, Sites
from ..source import parameters_of, returned_names, tree_of

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
    names, = answers
    if isinstance(names, str):
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
        found = [_block(f"{path}.{number}", block, len(blocks) + number, parts) for number, block in enumerate(entries)]
        if refusal(entries) is None:
            for first in range(0, len(entries) - 1, 2):
                if unlike(entries[first], entries[first + 1]) is None:
                    pairs.append(_span("block_pair", len(pairs), found[first : first + 2]))
        blocks += found
    return Sites([*blocks, *pairs])


def run_of(blocks: Sites) -> Site:
    """Neighbouring blocks as one site."""
    return _span("block_run", blocks[0].index, list(blocks))


def _span(kind: str, index: int, blocks: list[Site]) -> Site:
    last = blocks[-1]
    return Site(kind=kind, index=index, path=blocks[0].path, width=last.width, blocks=len(blocks), streams=last.streams)


def _block(path: str, block: nn.Module, index: int, parts: Sites) -> Site:
    inside = [site for site in parts if site.path.startswith(f"{path}.")]
    streams = len(streams_of(block_class(block)).names) - getattr(block, "context_pre_only", False)
    return Site(kind="block", index=index, path=path, width=inside[0].width, blocks=1, streams=streams)


def _lists(model: ModelMixin, parts: Sites) -> list[tuple[str, nn.ModuleList]]:
    """Lists whose every entry is a block with parts and streams of its own, the outermost, in forward order."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{outer}.") for outer, _ in found):
            sites = [[site for site in parts if site.path.startswith(f"{path}.{n}.")] for n in range(len(module))]
            if all(sites) and all(streams_of(block_class(block)) for block in module):
                found.append((path, module))
    order = {site.path: place for place, site in enumerate(parts)}
    return sorted(found, key=lambda entry: min(place for path, place in order.items() if path.startswith(f"{entry[0]}.")))


def refusals(model: ModelMixin, parts: Sites) -> list[str]:
    """Why blocks of a model cannot run side by side, a sentence for each list of them."""
    reasons = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(site.path.startswith(f"{path}.") for site in parts):
            pairs = zip(module, module[1:], strict=False)
            if why := refusal(module) or next((why for pair in pairs if (why := unlike(*pair))), None):
                reasons.append(f"{path} of {type(model).__name__}: {why}.")
    return reasons


def require_alike(model: ModelMixin, run: Site) -> None:
    """Raise `OperatorError` unless the blocks of a run can run side by side."""
    blocks = [model.get_submodule(path) for path in run.paths]
    pairs = zip(blocks, blocks[1:], strict=False)
    if why := refusal(blocks) or next((why for pair in pairs if (why := unlike(*pair))), None):
        raise OperatorError(f"{run.address} of {type(model).__name__} cannot run side by side: {why}.")


def refusal(blocks: Iterable[nn.Module]) -> str | None:
    """Why no two neighbours of a list can run side by side."""
    classes = {block_class(block) for block in blocks}
    for cls in sorted(classes, key=lambda cls: cls.__name__):
        if skips := [name for name in parameters_of(cls) if name in _SKIPS]:
            return f"{cls.__name__} takes a skip connection ({skips[0]}) from another block, which would cross the pair"
        if streams_of(cls) is None:
            return f"what {cls.__name__} returns cannot be matched with its arguments"
    return None


def unlike(one: nn.Module, other: nn.Module) -> str | None:
    """Why two neighbours cannot run side by side."""
    if block_class(one) is not block_class(other):
        return f"neighbours are of different classes, {block_class(one).__name__} and {block_class(other).__name__}"
    return None


def read_from_outside(model: ModelMixin, path: str) -> set[tuple[str, ...]]:
    """What a model's forward reads of a block itself, as chains of names: `("norm1", "emb")` of DiT's first block."""
    name, _, number = path.rpartition(".")
    tree = tree_of(type(model).forward)
    chains: set[tuple[str, ...]] = set()
    for node in ast.walk(tree) if tree is not None else ():
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if chain and isinstance(node, ast.Subscript) and ast.unparse(node.value) == f"self.{name}" \
                and ast.unparse(node.slice) == number:
            chains.add(tuple(chain))
    return {chain for chain in chains if not any(other != chain and other[: len(chain)] == chain for other in chains)}
