"""Limits on what a file may ask for, checked before anything is built or run.

The budget of loading: ten bytes of memory for each byte of the files, and 64 MiB more. A model or an operator that a
description asks for is first built on the meta device, where tensors take no memory, and building stops as soon as it
would exceed that budget, or has more parts than the tensors of the file can fill. Work is limited by what an operator
says it costs: at most a thousand times that of a transformer block of the site's width.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules import module as modules

from ..errors import FileError, GraftError
from ..operators import BlockOperator, Operator

_BYTES_PER_SAVED_BYTE = 10
_EXTRA_BYTES = 64 * 2**20
_PARTS_PER_TENSOR = 4
_EXTRA_PARTS = 4096
_MOST_BLOCKS = 1000  # of transformer blocks, whose cost an operator may have
_TOKENS = 1024  # of the forward that is priced


@dataclass(frozen=True)
class Budget:
    """Memory and parts that a file of some size may ask for."""

    bytes: int
    parts: int

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> Budget:
        """Return the budget of a file with these tensors."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return cls(_BYTES_PER_SAVED_BYTE * size + _EXTRA_BYTES, _PARTS_PER_TENSOR * len(tensors) + _EXTRA_PARTS)


@contextlib.contextmanager
def building_within(budget: Budget, what: str) -> Iterator[None]:
    """Build modules on the meta device, and stop where they exceed a budget.

    Raises `FileError` where they do, and for whatever goes wrong in building.
    """
    thread = threading.get_ident()
    spent = {"bytes": 0, "parts": 0}

    def count(module: torch.nn.Module, name: str, part: Any) -> None:
        # The hooks are called for modules of all threads.
        if threading.get_ident() != thread:
            return
        spent["parts"] += 1
        if isinstance(part, torch.Tensor):
            spent["bytes"] += part.numel() * part.element_size()
        if spent["parts"] > budget.parts:
            raise FileError(f"{what} asks for more than {budget.parts:,} parts, which its tensors cannot fill.")
        if spent["bytes"] > budget.bytes:
            raise FileError(f"{what} asks for more than {budget.bytes:,} bytes, out of proportion to its file.")

    handles = [
        modules.register_module_parameter_registration_hook(count),
        modules.register_module_buffer_registration_hook(count),
        modules.register_module_module_registration_hook(count),
    ]
    try:
        with torch.device("meta"):
            yield
    except GraftError:
        raise
    except Exception as error:
        # Sizes of a file may be of any kind: modules of torch and diffusers divide by them and multiply them.
        raise FileError(f"{what} cannot be built: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()


def check_work(operator: Operator, what: str) -> None:
    """Raise `FileError` for an operator that costs out of proportion to its site, such as by many steps."""
    if isinstance(operator, BlockOperator):
        return
    width = operator.site.width
    # Projections and feed-forward of a block, and its softmax attention.
    block = 24 * _TOKENS * width**2 + 4 * _TOKENS**2 * width
    try:
        cost = operator.flops(_TOKENS)
    except GraftError:
        # An operator of another package need not say what it costs, and some need a grid to say it.
        return
    # Not `>`, which a cost that is no number would pass.
    if not cost <= _MOST_BLOCKS * block:
        raise FileError(
            f"{what} costs {cost / block:,.0f} times a transformer block of its width; up to {_MOST_BLOCKS:,} times "
            "are loaded."
        )


def first_line(error: BaseException) -> str:
    """Return the kind and the first words of an error, since some messages print whole models."""
    words = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {words[:200]}"
