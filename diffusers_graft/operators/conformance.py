"""The conformance suite: `check_operator(config)` proves what an operator declares.

Which checks apply follows from the operator's declarations, never from its name. Where an operator has a `reference` method,
the definition in plain torch, its forward and gradients are compared with it.
"""
from __future__ import annotations

from dataclasses import dataclass

from ..site import Site
from . import configure
from ._checks import CHECKS, ConformanceError, Subject
from .base import OperatorConfig

__all__ = ["ConformanceError", "Report", "check_operator", "example_site"]


@dataclass(frozen=True)
class Report:
    """The checks an operator passed."""

    config: OperatorConfig
    passed: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.config} passed {len(self.passed)} checks:", *(f"  {name}" for name in self.passed)])


def example_site(kind: str) -> Site:
    """A small site of a kind, to build an operator on."""
    if kind == "feed_forward":
        return Site(kind=kind, index=0, path="blocks.0.ff", width=12, hidden=48, activation="gelu-approximate")
    return Site(kind=kind, index=0, path="blocks.0.attn", width=12, heads=3, head_width=4)


def check_operator(config: OperatorConfig | str | dict, *, kind: str | None = None) -> Report:
    """Run every check that applies to an operator.

    Args:
        config: as a rule takes it: a Config, a name, or a dict.
        kind: kind of site to build it on; its first unless given.

    Raises:
        ConformanceError: naming the first check that failed, and what was seen.
    """
    config = configure(config)
    subject = Subject(config, example_site(kind or config.owner.kinds[0]))
    passed = []
    for check in CHECKS:
        if check(subject) is not False:
            passed.append(check.__name__.removeprefix("check_"))
    return Report(config, tuple(passed))
