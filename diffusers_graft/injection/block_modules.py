"""Seats of blocks: several side by side at the first one's path, or nothing, or a linear map, in place of them.

Blocks that go on running are shallow copies at their own paths, so that tensors, LoRA targets, edits inside them and
what the model reads of them keep their names. The first one calls the others and merges; the others pass on their
input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from torch.utils._pytree import tree_leaves

from ..core.sites import BlockSite, Sites
from ..errors import OperatorError
from ..inspection import bind_arguments
from ..inspection.block_loops import read_from_outside
from ..inspection.blocks import block_class, streams_of
from ..inspection.source import parameters_of
from ..operators import BlockOperator
from .hooks import register_block

Stream = torch.Tensor | None


@dataclass(frozen=True)
class _BlockCall:
    """The call of blocks of one class, its arguments and streams, read once: compiled code could not read it."""

    run: Callable[..., Any]
    name: str
    parameters: tuple[str, ...]
    streams: tuple[str, ...]
    returns_tuple: bool

    @classmethod
    def of(cls, block: type) -> _BlockCall:
        streams = streams_of(block)
        assert streams is not None  # blocks whose streams are unknown are no sites
        return cls(block.forward, block.__name__, parameters_of(block), streams.names, streams.several)

    def read_streams(self, args: tuple, kwargs: dict[str, Any]) -> list[Stream]:
        """Return the streams among the arguments of a call."""
        arguments = bind_arguments(self.parameters, args, kwargs)
        return [arguments.get(name) for name in self.streams]

    def read_conditions(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the other arguments of a call, by name."""
        arguments = bind_arguments(self.parameters, args, kwargs)
        return {name: value for name, value in arguments.items() if name not in self.streams}

    def split_output(self, output: Any) -> list[Stream]:
        """Return the streams of an answer. Raises `OperatorError` where they are not those its source names."""
        is_tuple = isinstance(output, tuple)
        if not is_tuple:
            output = (output,)
        streams = list(output)
        if is_tuple != self.returns_tuple or len(streams) != len(self.streams):
            raise OperatorError(
                f"{self.name} gave {len(streams)} streams, and its source says {', '.join(self.streams)}: "
                "it cannot run beside another block."
            )
        return streams

    def join_output(self, streams: list[Stream]) -> Any:
        """Return streams as a block of this class returns them."""
        return tuple(streams) if self.returns_tuple else streams[0]


@dataclass(eq=False)
class _FirstCall:
    """The arguments, beside the streams, that the first block of a pair was given; compared in the first forward."""

    conditions: dict[str, Any] | None = None
    is_checked: bool = False


class RemovedBlock(nn.Module):
    """A block that is not there: it passes its streams on, through its operator where it has one.

    Attributes:
        graft_class: class of the block that was here.
        graft_parts: sites inside that block, which are not there while this one is.
        graft_call: how that block was called.
    """

    def __init__(self, cls: type, parts: Sites):
        super().__init__()
        self.graft_class = cls
        self.graft_parts = parts
        self.graft_call = _BlockCall.of(cls)

    def __reduce__(self):
        # The generated class cannot be imported, so it is generated again.
        return _make_removed, (self.graft_class,), vars(self).copy()

    def forward(self, *args, **kwargs) -> Any:
        streams = self.graft_call.read_streams(args, kwargs)
        operator = getattr(self, "graft", None)
        if operator is None:
            return self.graft_call.join_output(streams)
        context = operator.slot.current
        names = self.graft_call.streams
        prompt_ends = operator.site.streams < len(names)  # as at the last block of many models
        number = 0
        for place, stream in enumerate(streams):
            if stream is None or (prompt_ends and names[place] != "hidden_states"):
                continue
            streams[place] = operator(stream, context, stream=number)
            number += 1
        return self.graft_call.join_output(streams)


@functools.cache
def _removed_class(original: type) -> type[RemovedBlock]:
    """Generate the class that replaces blocks of one class: diffusers' caches and hooks look blocks up by class."""
    cls = type(f"Removed{original.__name__}", (RemovedBlock,), {"__module__": __name__})
    register_block(cls, original)
    return cls


def _make_removed(original: type) -> RemovedBlock:
    return object.__new__(_removed_class(original))


def build_parallel(copies: list[nn.Module], operator: BlockOperator) -> list[nn.Module]:
    """Make copies of blocks run side by side; the first one holds the operator."""
    first, *others = copies
    first.graft = operator
    # In `vars`, since as children the others would have two paths each.
    vars(first)["graft_others"] = others
    call = _BlockCall.of(type(first))
    first_call = _FirstCall()
    for seat in copies:
        # A partial of a function, since a method could not be pickled.
        vars(seat).update(graft_call=call, graft_first_call=first_call, forward=functools.partial(_pass_on, seat))
    vars(first)["forward"] = functools.partial(_run_together, first)
    return copies


def build_removed(
    model: ModelMixin, site: BlockSite, originals: list[nn.Module], parts: Sites, operator: BlockOperator
) -> list[nn.Module]:
    """Build seats that run no block; what the model itself reads of one, such as DiT's embeddings, stays."""
    seats = []
    for path, original in zip(site.paths, originals, strict=True):
        inside = Sites(part for part in parts if part.path.startswith(f"{path}."))
        cls = block_class(original)
        seat = _removed_class(cls)(cls, inside)
        if not seats:
            # One operator replaces all that the blocks did.
            seat.graft = operator
        for chain in read_from_outside(model, path):
            _copy_chain(seat, original, chain)
        seats.append(seat)
    return seats


def _copy_chain(seat: nn.Module, original: nn.Module, chain: tuple[str, ...]) -> None:
    """Give a seat what a chain of names leads to in the original, and nothing beside it."""
    name, *rest = chain
    child = original._modules.get(name)
    if child is None:
        if name in vars(original):
            vars(seat)[name] = vars(original)[name]
    elif rest and (rest[0] in child._modules or rest[0] in vars(child)):
        holder = seat._modules.setdefault(name, nn.Module())
        assert holder is not None
        _copy_chain(holder, child, tuple(rest))
    else:
        seat._modules[name] = child


# `self` is a copy of a block of diffusers, of any class, with the attributes that `build_parallel` gave it.
def _run_together(self: Any, *args, **kwargs) -> Any:
    """Run all blocks on one input and merge what they return: the forward of the first one's seat."""
    call: _BlockCall = self.graft_call
    inputs = call.read_streams(args, kwargs)
    if not torch.compiler.is_compiling() and not self.graft_first_call.is_checked:
        self.graft_first_call.conditions = call.read_conditions(args, kwargs)
    outputs = [call.split_output(call.run(block, *args, **kwargs)) for block in (self, *self.graft_others)]
    operator: BlockOperator = self.graft
    merged = []
    number = 0
    for stream, of_blocks in zip(inputs, zip(*outputs, strict=True), strict=True):
        if stream is None or any(output is None for output in of_blocks):
            merged.append(None)
        elif number == operator.site.streams:
            # A stream that ends here: the last block passes it on.
            merged.append(of_blocks[-1])
        else:
            merged.append(operator(stream, *of_blocks, operator.slot.current, stream=number))
            number += 1
    return call.join_output(merged)


def _pass_on(self: Any, *args, **kwargs) -> Any:
    """Return the input, which the first block has dealt with: the forward of the other seats."""
    call: _BlockCall = self.graft_call
    first_call: _FirstCall = self.graft_first_call
    if not torch.compiler.is_compiling() and first_call.conditions is not None:
        _require_same(call.name, first_call.conditions, call.read_conditions(args, kwargs))
        first_call.conditions = None
        first_call.is_checked = True
    return call.join_output(call.read_streams(args, kwargs))


def _require_same(block: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in one.keys() | other.keys():
        leaves = tree_leaves(one.get(name))
        other_leaves = tree_leaves(other.get(name))
        same = len(leaves) == len(other_leaves) and all(map(_is_same, leaves, other_leaves))
        if not same:
            raise OperatorError(
                f"Each {block} of this model takes its own {name}, so neighbours cannot get the same input. "
                "Blocks with different conditions do not run side by side."
            )


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and (one.is_meta or torch.equal(one, other)))
    # Objects of other kinds, such as caches, are each block's own.
    return not isinstance(one, (bool, int, float, str)) or one == other
