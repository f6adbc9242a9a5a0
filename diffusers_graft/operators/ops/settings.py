"""Checks of settings that operators' configs share: each raises `OperatorError` in words, or does nothing."""

from __future__ import annotations

import math
from typing import Any

from ...errors import OperatorError


def require_count(who: str, name: str, value: Any, *, least: int = 1, most: int | None = None, example: int) -> None:
    """Raise `OperatorError` unless `value` is a whole number from `least` to `most`.

    Settings that cost time or memory without a tensor of their size have a `most`: a few bytes of an untrusted file
    must not buy endless work.
    """
    # Exactly int: True is a whole number to Python, and no count.
    if type(value) is int and value >= least and (most is None or value <= most):
        return
    upper = "" if most is None else f" to {most}"
    raise OperatorError(f"{who}: {name} is a whole number from {least}{upper}; got {value!r}. Try {example}.")


def require_odd(who: str, name: str, value: Any) -> None:
    """Raise `OperatorError` unless `value` is the side of a window with a middle."""
    if type(value) is not int or value < 1 or value % 2 == 0:
        raise OperatorError(f"{who}: {name} is an odd count of tokens; got {value!r}. Try 3 or 5.")


def require_flag(who: str, name: str, value: Any) -> None:
    """Raise `OperatorError` unless `value` is True or False."""
    # Not by truth: a text such as "False" would be true.
    if type(value) is not bool:
        raise OperatorError(f"{who}: {name} is True or False; got {value!r}.")


def require_ratio(who: str, value: Any) -> None:
    """Raise `OperatorError` unless `value` can be an expansion."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise OperatorError(f"{who}: expansion is a positive ratio; got {value!r}. Try 3, 4 or 6.")
