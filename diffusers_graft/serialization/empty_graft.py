"""Grafts without values: what loading fills, and checks before it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ..core.sites import Site
from ..errors import FileError, GraftError, StateError
from ..injection.graft import COMPUTE_DTYPES, Graft, build_graft
from ..operators import Mixer, Operator, OperatorConfig
from ..planning.plan import Edit, GraftPlan, build_operator


class _Blank:
    """A config whose operators do not start from the part they replace: their values are about to be loaded."""

    def __init__(self, config: OperatorConfig):
        self.config = config
        # A random start would copy the projections that a mixer shares; the others must not ask for what they would
        # replace.
        self.init = "warm" if issubclass(config.owner, Mixer) else "random"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    def build(self, site: Site) -> Operator:
        operator = self.config.build(site)
        vars(operator)["init_from"] = lambda original: None
        return operator


def build_blank(model: ModelMixin, plan: GraftPlan, history: list[dict[str, Any]] | None = None) -> Graft:
    """The parts of a plan beside the model, at no more than the cost of their memory."""
    graft = build_graft(
        model, replace(plan, edits=tuple(replace(edit, config=_Blank(edit.config)) for edit in plan.edits))
    )
    graft.plan, graft.history = plan, history or []
    for operator in graft.operators().values():
        del vars(operator)["init_from"]
    return graft


def check_operators(plan: GraftPlan, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Raise `FileError` unless each operator's tensors are all there, no others, of the right shapes; nothing is
    built.
    """
    for edit in plan.edits:
        expected = _expected(edit)
        prefix = f"{edit.site.path}.graft."
        there = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if odd := sorted(expected.keys() ^ there.keys()):
            raise FileError(
                f"{folder} does not fit {edit.site.path}: {', '.join(odd[:4])} missing, or not of {edit.config}."
            )
        for name, tensor in there.items():
            require_like(expected[name], tensor, f"{prefix}{name}", folder)


def _expected(edit: Edit) -> dict[str, torch.Tensor]:
    """What the operator of an edit holds, without memory for it."""
    try:
        with torch.device("meta"):
            return build_operator(edit.config, edit.site).state_dict()
    except GraftError:
        raise
    except (ArithmeticError, RuntimeError, TypeError, ValueError, LookupError, MemoryError) as error:
        raise FileError(f"{edit} cannot be built: {error}") from error


def require_dtype(dtype: Any) -> None:
    """Raise `StateError` for a dtype that no model computes in, and for words such as "auto"."""
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        known = ", ".join(map(str, COMPUTE_DTYPES))
        raise StateError(
            f"A grafted model is loaded in one of {known}; not in {dtype!r}. Leave it out for the usual one."
        )


def require_like(expected: torch.Tensor, given: torch.Tensor, name: str, folder: Path) -> None:
    """Raise `FileError` for a tensor of another shape, or of a type that cannot become the expected one."""
    if expected.shape != given.shape:
        raise FileError(f"{name} in {folder} does not fit: it is {tuple(given.shape)}, not {tuple(expected.shape)}.")
    if expected.dtype != given.dtype and not (expected.is_floating_point() and given.is_floating_point()):
        raise FileError(f"{name} in {folder} does not fit: it is {given.dtype}, not {expected.dtype}.")
