"""Operators: what a graft puts in place of attentions, feed-forwards and blocks. One file each, found by its name."""

from __future__ import annotations

import re

from .base import (
    AttentionOperator,
    BlockOperator,
    BlockPairOperator,
    FeedForwardOperator,
    LinearPair,
    Mixer,
    Operator,
    OperatorConfig,
    Projections,
)
from .ops.hub_kernels import load_hub_kernel
from .registry import available, configure, get, parse_operator, register

__all__ = [
    "AttentionOperator",
    "BlockOperator",
    "BlockPairOperator",
    "FeedForwardOperator",
    "LinearPair",
    "Mixer",
    "Operator",
    "OperatorConfig",
    "Projections",
    "available",
    "configure",
    "get",
    "load_hub_kernel",
    "parse_operator",
    "register",
]


def __getattr__(name: str) -> type[Operator]:
    """Return an operator by the name of its class: `operators.HyenaX` is `operators.get("hyena_x")`."""
    file_name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    if name[:1].isupper() and file_name in available():
        return get(file_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
