"""Shapes of the tensors that operators take and return.

B batch, H heads, N query tokens, M key tokens, D width, E head width. `Float` is any floating-point dtype; a name that
stands twice in one signature is one size.
"""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

# Queries, and what a mixer returns.
HeadTensor: TypeAlias = Float[Tensor, "B H N E"]
# Keys and values.
KeyTensor: TypeAlias = Float[Tensor, "B H M E"]
# Hidden states.
TokenTensor: TypeAlias = Float[Tensor, "B N D"]
