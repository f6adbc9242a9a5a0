"""Grafts without values: built for loading, after the saved tensors were compared with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights

from ..core.sites import Site
from ..errors import FileError, StateError
from ..injection.graft import Graft, build_graft
from ..injection.waiting_parts import COMPUTE_DTYPES
from ..operators import Mixer, Operator, OperatorConfig
from ..planning.plan import GraftPlan, build_operator
from .limits import Budget, building_within, check_work


class _EmptyConfig:
    """A config whose operators do not start from the part they replace: their values are about to be loaded."""

    def __init__(self, config: OperatorConfig):
        self.config = config
        # A random start would copy the projections that a mixer shares; the others must not ask for the projections
        # that they replace.
        self.init = "warm" if issubclass(config.owner, Mixer) else "random"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    def build(self, site: Site) -> Operator:
        operator = self.config.build(site)
        vars(operator)["init_from"] = lambda original: None
        return operator


def build_empty_graft(model: ModelMixin, plan: GraftPlan, history: list[dict[str, Any]] | None = None) -> Graft:
    """Build the parts of a plan beside the model, at no more than the cost of their memory."""
    edits = tuple(replace(edit, config=_EmptyConfig(edit.config)) for edit in plan.edits)
    graft = build_graft(model, replace(plan, edits=edits))
    graft.plan = plan
    graft.history = history or []
    for operator in graft.operators().values():
        del vars(operator)["init_from"]
    return graft


def without_initial_values(is_wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Leave out the drawing of initial values inside the block, where that is wanted."""
    if is_wanted:
        return no_init_weights()
    return contextlib.nullcontext()


def check_operators(plan: GraftPlan, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Compare each operator of a plan with its tensors in a file, before it is built.

    Raises `FileError` where tensors are missing, too many or of other shapes, and for an operator that asks for more
    memory, parts or work than the file warrants.
    """
    budget = Budget.of(tensors)
    for edit in plan.edits:
        what = f"{edit.site.path} in {folder}"
        with building_within(budget, what):
            operator = build_operator(edit.config, edit.site)
            expected = operator.state_dict()
        check_work(operator, what)
        prefix = f"{edit.site.path}.graft."
        given = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        require_same_names(expected, given, f"{folder} does not fit {edit.site.path}, which is {edit.config}")
        for name, tensor in given.items():
            require_like(expected[name], tensor, f"{prefix}{name}", folder)


def require_dtype(dtype: Any) -> None:
    """Raise `StateError` for a dtype that no model computes in, and for words such as "auto"."""
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        known = ", ".join(map(str, COMPUTE_DTYPES))
        raise StateError(
            f"A grafted model is loaded in one of {known}; not in {dtype!r}. Leave it out for the usual one."
        )


def require_device(device: Any) -> None:
    """Raise `StateError` for a device that does not exist here, or holds no values."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
        is_usable = torch.device(device).type != "meta"
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise StateError(f"A model cannot be loaded onto {device!r}: {str(error)[:200]}.") from error
    if not is_usable:
        raise StateError("A model cannot be loaded onto the meta device, which holds no values. Give another device.")


def require_same_names(expected: Iterable[str], given: Iterable[str], message: str) -> None:
    """Raise `FileError` where names are missing or too many; the message goes on with the first of them."""
    odd = sorted(set(expected) ^ set(given))
    if odd:
        raise FileError(f"{message}: {', '.join(odd[:4])} differ.")


def require_like(expected: torch.Tensor, given: torch.Tensor, name: str, folder: Path) -> None:
    """Raise `FileError` for a tensor of another shape, or of a type that cannot become the expected one."""
    if expected.shape != given.shape:
        raise FileError(f"{name} in {folder} does not fit: it is {tuple(given.shape)}, not {tuple(expected.shape)}.")
    if expected.dtype != given.dtype and not (expected.is_floating_point() and given.is_floating_point()):
        raise FileError(f"{name} in {folder} does not fit: it is {given.dtype}, not {expected.dtype}.")
