"""Seats of blocks: several side by side at the first one's path, or nothing, or a linear map, in place of them.

Blocks that go on running are shallow copies at their own paths, so that tensors, LoRA targets, edits inside them and
what the model reads of them keep their names. The first calls the others and merges; the others hand on what they are
given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from torch.utils._pytree import tree_leaves

from ..core.sites import Site, Sites
from ..errors import OperatorError, StateError
from ..inspection import bind_arguments
from ..inspection.block_loops import read_from_outside
from ..inspection.blocks import block_class, streams_of
from ..inspection.source import parameters_of
from ..operators import BlockOperator


@dataclass(eq=False)
class _Agreement:
    """Whether blocks that were merged are told the same beside their streams; looked at in the first forward."""

    expected: dict[str, Any] | None = None
    checked: bool = False


@dataclass(frozen=True)
class _Call:
    """How blocks of one class are called and answer, read once: compiled code could not look it up."""

    run: Callable[..., Any]
    name: str
    parameters: tuple[str, ...]
    streams: tuple[str, ...]
    several: bool

    @classmethod
    def of(cls, block: type) -> _Call:
        streams = streams_of(block)
        return cls(block.forward, block.__name__, parameters_of(block), streams.names, streams.several)

    def given(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return bind_arguments(self.parameters, args, kwargs)

    def streams_in(self, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor | None]:
        given = self.given(args, kwargs)
        return [given.get(name) for name in self.streams]

    def told(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a block is told beside its streams."""
        return {name: value for name, value in self.given(args, kwargs).items() if name not in self.streams}

    def streams_out(self, output: Any) -> list[torch.Tensor | None]:
        streams = list(output) if isinstance(output, tuple) else [output]
        if isinstance(output, tuple) != self.several or len(streams) != len(self.streams):
            raise OperatorError(
                f"{self.name} gave {len(streams)} streams, and its source says {', '.join(self.streams)}: "
                "it cannot run beside another block."
            )
        return streams

    def answer(self, streams: list[torch.Tensor | None]) -> Any:
        return tuple(streams) if self.several else streams[0]


class RemovedBlock(nn.Module):
    """Hands its streams on, through its operator where it has one.

    Attributes:
        graft_class: of the block that stood here.
        graft_parts: the sites inside that block, which are not there while this one is.
        graft_call: how that block was called.
    """

    def __init__(self, cls: type, parts: Sites, operator: BlockOperator | None):
        super().__init__()
        self.graft_class, self.graft_parts, self.graft_call = cls, parts, _Call.of(cls)
        if operator is not None:
            self.graft = operator

    def forward(self, *args, **kwargs) -> Any:
        streams = self.graft_call.streams_in(args, kwargs)
        if (operator := getattr(self, "graft", None)) is not None:
            context, number, names = operator.slot.current, 0, self.graft_call.streams
            ended = operator.site.streams < len(names)  # the prompt's, at the last block
            for place, stream in enumerate(streams):
                if stream is not None and (names[place] == "hidden_states" or not ended):
                    streams[place], number = operator(stream, context, stream=number), number + 1
        return self.graft_call.answer(streams)


def side_by_side(copies: list[nn.Module], operator: BlockOperator) -> list[nn.Module]:
    """Copies of blocks as seats that run together; the first holds the operator."""
    first, *others = copies
    first.graft = operator
    agreement, call = _Agreement(), _Call.of(type(first))
    vars(first)["graft_others"] = others
    for number, seat in enumerate(copies):
        vars(seat).update(graft_agreement=agreement, graft_call=call)
        vars(seat)["forward"] = partial(_hand_on if number else _run_together, seat)  # a method could not be pickled
    return copies


def removed(
    model: ModelMixin, site: Site, originals: list[nn.Module], parts: Sites, operator: BlockOperator
) -> list[nn.Module]:
    """Seats that run no block; only what the model itself reads of one, such as DiT's embeddings, stays."""
    seats = []
    for number, (path, original) in enumerate(zip(site.paths, originals, strict=True)):
        inside = Sites(part for part in parts if part.path.startswith(f"{path}."))
        seat = RemovedBlock(block_class(original), inside, None if number else operator)
        for chain in read_from_outside(model, path):
            _keep(seat, original, chain)
        seats.append(seat)
    return seats


def _keep(seat: nn.Module, original: nn.Module, chain: tuple[str, ...]) -> None:
    """Leave what a chain of names leads to in place, and nothing beside it."""
    name, *rest = chain
    child = original._modules.get(name)
    if child is None:
        vars(seat).update({name: vars(original)[name]} if name in vars(original) else {})
    elif rest and (rest[0] in child._modules or rest[0] in vars(child)):
        _keep(seat._modules.setdefault(name, nn.Module()), child, tuple(rest))
    else:
        seat._modules[name] = child


def _run_together(self: nn.Module, *args, **kwargs) -> Any:
    call, operator = self.graft_call, self.graft
    before = call.streams_in(args, kwargs)
    if not torch.compiler.is_compiling() and not self.graft_agreement.checked:
        self.graft_agreement.expected = call.told(args, kwargs)
    outputs = [call.streams_out(call.run(block, *args, **kwargs)) for block in (self, *self.graft_others)]
    merged, number = [], 0
    for stream, made in zip(before, zip(*outputs, strict=True), strict=True):
        if stream is None or any(output is None for output in made):
            merged.append(None)
            continue
        if number == operator.site.streams:  # one that the last block only hands on
            merged.append(made[-1])
            continue
        merged.append(operator(stream, *made, operator.slot.current, stream=number))
        number += 1
    return call.answer(merged)


def _hand_on(self: nn.Module, *args, **kwargs) -> Any:
    call, agreement = self.graft_call, self.graft_agreement
    if not torch.compiler.is_compiling() and agreement.expected is not None:
        _require_same(call.name, agreement.expected, call.told(args, kwargs))
        agreement.expected, agreement.checked = None, True
    return call.answer(call.streams_in(args, kwargs))


def _require_same(who: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in one.keys() | other.keys():
        if not _alike(one.get(name), other.get(name)):
            raise OperatorError(
                f"Each {who} of this model is told its own {name}, so neighbours cannot get the same input. "
                "Blocks that are told different things do not run side by side."
            )


def _alike(one: Any, other: Any) -> bool:
    ones, others = tree_leaves(one), tree_leaves(other)
    return len(ones) == len(others) and all(map(_same, ones, others))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and (one.is_meta or torch.equal(one, other)))
    return not isinstance(one, bool | int | float | str) or one == other


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of the same class that shares children, parameters and buffers, but none of the dictionaries."""
    twin = object.__new__(type(module))
    containers = (dict, set, list)
    vars(twin).update({k: v.copy() if isinstance(v, containers) else v for k, v in vars(module).items()})
    for name in (
        "_compiled_call_impl",
        "forward",
        "_diffusers_hook",
    ):  # of `module.compile()`, and of hooks that are gone:
        vars(twin).pop(name, None)  # they are bound to the original
    return twin


def own_copy(module: nn.Module) -> nn.Module:
    """A copy that shares nothing. Raises `StateError` where it would run the original: hooks stand in place of a
    forward.
    """
    if hooked := [type(part).__name__ for part in module.modules() if is_hooked(part)]:
        raise StateError(
            f"A copy of this {hooked[0]} would run the original, since hooks replaced its forward. Train first, "
            "and start parts at random, before you enable layerwise casting or offloading."
        )
    return copy.deepcopy(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether something runs in place of a module's forward: hooks of diffusers or accelerate, or a stranger's
    function.
    """
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def fill_block(seats: dict[str, nn.Module], path: str) -> None:
    """Put the seats of parts into the seat of the block they lie in; the original block keeps its own."""
    for other in [other for other in seats if other.startswith(f"{path}.")]:
        holder, (*between, last) = seats[path], other.removeprefix(f"{path}.").split(".")
        for name in between:
            if "graft_copy" not in vars(holder._modules[name]):
                holder._modules[name] = shallow_copy(holder._modules[name])
                vars(holder._modules[name])["graft_copy"] = True
            holder = holder._modules[name]
        holder._modules[last] = seats[other]


def untie(
    seat: nn.Module, original: nn.Module, children: set[str] | None, inner: frozenset[str], here: str = ""
) -> None:
    """Copies of what is shared; on the way to seats inside, which are parts of their own, module by module."""
    for name, child in original._modules.items():
        if child is None or not (children is None or name in children) or here + name in inner:
            continue
        if seat._modules.get(name) is child:
            seat._modules[name] = own_copy(child)
        elif type(seat._modules.get(name)) is nn.Module or any(other.startswith(f"{here}{name}.") for other in inner):
            untie(seat._modules[name], child, None, inner, f"{here}{name}.")
    for name, parameter in original._parameters.items():
        if (
            parameter is not None
            and seat._parameters.get(name) is parameter
            and (children is None or name in children)
        ):
            seat._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
