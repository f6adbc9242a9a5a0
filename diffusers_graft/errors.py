"""Errors of this library: every message says what was asked, what there is, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST_NAME = 100


class GraftError(Exception):
    """Base of every error this library raises on purpose."""


class UnknownNameError(GraftError, LookupError):
    """A name (operator, kind, setting) that does not exist; the message lists what does and suggests the nearest."""

    def __init__(self, what: str, name: object, available: Iterable[str], *, advice: str = ""):
        names = sorted(available)
        # Names come from files too, and comparing takes the square of their length.
        shown = repr(name)[:_LONGEST_NAME]
        words = [f"There is no {what} {shown}."]
        near = difflib.get_close_matches(str(name)[:_LONGEST_NAME], names, n=1)
        if near:
            words.append(f"Did you mean {near[0]!r}?")
        if advice:
            words.append(advice)
        words.append(f"Available: {', '.join(names) or 'none'}.")
        super().__init__(" ".join(words))


class RuleError(GraftError, ValueError):
    """Rules that cannot become a plan: bad text, nothing matched, two claims on one site."""


class OperatorError(GraftError, ValueError):
    """An operator whose settings, or whose site, it cannot work with."""


class GeometryError(GraftError, ValueError):
    """Tokens do not lie as an operator needs them to: no grid, or a grid that does not match the sequence."""


class ModelError(GraftError, TypeError):
    """The object given is not a model this library can read."""


class StateError(GraftError, RuntimeError):
    """A verb that does not fit the model's present state, such as grafting a grafted model."""


class MismatchError(GraftError, ValueError):
    """A plan or graft made for another model."""


class FileError(GraftError, OSError):
    """A file that is missing, damaged, or of a format this version does not read."""


class TrainingError(GraftError, RuntimeError):
    """Training cannot go on, for example because a loss is not finite."""


class MissingDependencyError(GraftError, ImportError):
    """A package is not installed; the message names the extra that brings it, or the package itself."""

    def __init__(self, what: str, needs: str, *, extra: str | None = None):
        wanted = needs.replace(" ", "==")
        if extra is not None:
            wanted = f"diffusers-graft[{extra}]"
        super().__init__(f'{what} needs {needs}, which is not installed. Run: pip install "{wanted}"')
