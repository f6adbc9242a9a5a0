"""Prompts among the conditions that samples were drawn for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import GraftError


def text_of(condition: Any) -> str | None:
    """Return the prompt of a condition, which is a text or a line of GenEval's metadata; None for a class label."""
    if isinstance(condition, dict):
        condition = condition.get("prompt")
    return condition if isinstance(condition, str) else None


def texts_of(conditions: Sequence[Any], who: str) -> list[str]:
    """Return the prompts of conditions. Raises `GraftError` for one that is none."""
    texts = []
    for condition in conditions:
        text = text_of(condition)
        if text is None:
            raise GraftError(f"{who} compares pictures with prompts; got the condition {condition!r}.")
        texts.append(text)
    return texts
