"""Copies of modules: shallow ones that share their children, deep ones that share nothing, and what lies between.

A seat starts as a shallow copy of the part it replaces, so that weights are stored once. Whatever trains it, or loads
weights into it, unties the children that will change.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from ..errors import OperatorError, StateError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Attributes of `module.compile()` and of hooks: they are bound to the module that is copied.
_BOUND = ("_compiled_call_impl", "forward", "_diffusers_hook")


def copy_shallow(module: ModuleT) -> ModuleT:
    """Copy a module so that children, parameters and buffers are shared, but not the dictionaries that hold them."""
    twin = object.__new__(type(module))
    for name, value in vars(module).items():
        if name in _BOUND:
            continue
        vars(twin)[name] = value.copy() if isinstance(value, dict | set | list) else value
    return twin


def copy_deep(module: nn.Module) -> nn.Module:
    """Copy a module so that nothing is shared, to be trained: quantised weights come in full precision.

    Raises:
        StateError: the copy would run the original, since hooks replaced a forward.
        OperatorError: its weights are quantised in a form that cannot be undone.
    """
    for part in module.modules():
        if is_hooked(part):
            raise StateError(
                f"A copy of this {type(part).__name__} would run the original, since hooks replaced its forward. "
                "Train first, and start parts at random, before you enable layerwise casting or offloading."
            )
    twin = copy.deepcopy(module)
    for layer in twin.modules():
        for name, weight in list(layer._parameters.items()):
            if weight is not None and is_quantised(weight):
                layer._parameters[name] = nn.Parameter(_dequantise(layer, weight))
    return twin


def _dequantise(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    if not weight.is_floating_point():
        raise OperatorError(
            f"The weights of a {type(layer).__name__} are quantised, and only that layer can read them: it can be "
            "neither trained nor started at random. Graft and train the model in full precision, and load_graft over "
            "this one."
        )
    return weight.detach().dequantize().to(weight.dtype)


def copy_restarted(module: nn.Module) -> nn.Module:
    """Copy a module with fresh random weights."""
    fresh = copy_deep(module)
    for layer in fresh.modules():
        if hasattr(layer, "reset_parameters"):
            # Drawn in float32 where operators are made, so that they are the same on every device.
            drawn = copy.deepcopy(layer).to(torch.get_default_device(), torch.float32)
            drawn.reset_parameters()  # pyright: ignore[reportCallIssue]  # a method of layers, not of all modules
            layer.load_state_dict(drawn.state_dict())
    return fresh


def is_quantised(weight: torch.Tensor) -> bool:
    """Return whether a weight is stored as whole numbers, or in a class that torch does not have itself."""
    return not weight.is_floating_point() or type(weight.data).__module__.partition(".")[0] != "torch"


def is_hooked(module: nn.Module) -> bool:
    """Return whether hooks of diffusers or accelerate, or another function, run in place of a module's forward."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def fill_block(seats: dict[str, nn.Module], path: str) -> None:
    """Put the seats of parts into the seat of the block at `path`; the original block keeps its parts."""
    inner = [other for other in seats if other.startswith(f"{path}.")]
    for other in inner:
        *between, last = other.removeprefix(f"{path}.").split(".")
        holder = seats[path]
        for name in between:
            child = holder._modules[name]
            assert child is not None
            # Copied once, though several seats may lie in it.
            if "graft_copy" not in vars(child):
                child = copy_shallow(child)
                vars(child)["graft_copy"] = True
                holder._modules[name] = child
            holder = child
        holder._modules[last] = seats[other]


def untie(
    seat: nn.Module, original: nn.Module, children: set[str] | None, inner: frozenset[str], prefix: str = ""
) -> None:
    """Copy what a seat shares with its original, in place.

    Args:
        seat: receives the copies.
        original: keeps what was shared.
        children: names of the children and parameters to copy; None means all.
        inner: paths inside the seat of other seats, which are left alone.
        prefix: path, with a dot, of `seat` inside the outermost one.
    """
    for name, child in original._modules.items():
        path = prefix + name
        if child is None or path in inner or (children is not None and name not in children):
            continue
        held = seat._modules.get(name)
        if held is child:
            seat._modules[name] = copy_deep(child)
        elif type(held) is nn.Module or any(other.startswith(f"{path}.") for other in inner):
            # A holder on the way to other seats, or of what the model reads of a removed block.
            assert held is not None
            untie(held, child, None, inner, f"{path}.")
    for name, parameter in original._parameters.items():
        if parameter is None or (children is not None and name not in children):
            continue
        if seat._parameters.get(name) is parameter:
            seat._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
