"""The conformance suite: `check_operator(config)` proves what an operator declares.

Which checks apply follows from the operator's declarations, never from its name. Where an operator has a `reference`
method, the definition in plain torch, its forward and gradients are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...core.tables import Table, Tabular
from ...errors import GraftError, OperatorError
from .. import configure
from ..base import OperatorConfig
from .case import ConformanceError, Subject, example_site
from .checks import CHECKS

__all__ = ["ConformanceError", "Report", "check_operator", "example_site"]


@dataclass(frozen=True)
class Report(Tabular):
    """The checks an operator passed; `str(report)` is a table of them."""

    config: OperatorConfig
    passed: tuple[str, ...]

    def to_table(self) -> Table:
        """Return the checks with what each of them proves."""
        return Table([(name, _PROMISES[name]) for name in self.passed], heading=("passed", "what it proves"))

    def __str__(self) -> str:
        width = max(map(len, self.passed), default=0)
        rows = (f"  {name:<{width}}  {_PROMISES[name]}" for name in self.passed)
        return "\n".join([f"{self.config} passed {len(self.passed)} checks:", *rows])


def check_operator(config: OperatorConfig | str | dict[str, Any], *, kind: str | None = None) -> Report:
    """Run every check that applies to an operator.

    Args:
        config: as a rule takes it: a Config, a name, or a dict.
        kind: kind of site to build it on; its first unless given.

    Raises:
        ConformanceError: naming the first check that failed, and what was seen.
        OperatorError: an operator that declares no kinds, or not this one.
        GraftError: where the operator cannot be built on a site of that kind.
    """
    config = configure(config)
    name = config.owner.name
    kinds = config.owner.kinds
    if not kinds:
        raise OperatorError(
            f'{name} declares no kinds of site. Set kinds, such as ("self_attention",), or derive from Mixer.'
        )
    if kind is not None and kind not in kinds:
        raise OperatorError(f"{name} replaces {' or '.join(kinds)}, and was to be checked on {kind!r}. Leave it out.")
    subject = Subject(config, example_site(kind or kinds[0]))
    with _named("build", letting=GraftError):
        subject.build()
    # Checks run on the first grid that is not refused: a window may be larger than the others.
    with _named("every_grid"):
        subject = subject.accepted()[0]
    passed = []
    for check in CHECKS:
        with _named(_name(check)):
            if check(subject) is not False:
                passed.append(_name(check))
    return Report(config, tuple(passed))


@contextmanager
def _named(check: str, *, letting: type[GraftError] = ConformanceError) -> Iterator[None]:
    """Report an error within as the failure of this check, but for what is said in words already."""
    try:
        yield
    except letting:
        raise
    except Exception as error:
        raise ConformanceError(f"{check}: {type(error).__name__}: {error}") from error


def _name(check: Callable[[Subject], bool | None]) -> str:
    return check.__name__.removeprefix("check_")


_PROMISES = {_name(check): str(check.__doc__).splitlines()[0] for check in CHECKS}
