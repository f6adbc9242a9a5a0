"""Attention masks that are the same for every query, as operators that sum keys once, or block by block, take them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...errors import OperatorError


def mask_row(who: str, mask: torch.Tensor) -> torch.Tensor:
    """Return the one row of a mask, [..., 1, M].

    Raises `OperatorError` where a mask differs from query to query, and where compiled code, which cannot compare
    values, is given one that may.
    """
    row = mask[..., :1, :]
    if mask.shape[-2] > 1 and (torch.compiler.is_compiling() or not torch.equal(mask, row.expand_as(mask))):
        raise OperatorError(
            f"{who} was given an attention mask of shape {tuple(mask.shape)}: it sums keys once for all "
            "queries, so a mask must hide the same keys from each. Give it as [..., 1, keys], or keep softmax here."
        )
    return row


def key_weights(who: str, mask: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Turn a mask into a factor on each key, [B, 1 or H, M, 1]: 0 or 1, or of an additive mask its exponential.

    Raises as `mask_row`.
    """
    row = mask_row(who, mask)
    # One value may stand for all keys.
    row = row.transpose(-1, -2).expand(*row.shape[:-2], keys, 1).to(dtype)
    if mask.dtype == torch.bool:
        return row
    return row.exp()


def key_bias(who: str, mask: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Turn a mask into numbers to add to the scores of each key, [B or 1, H or 1, M]. Raises as `mask_row`."""
    row = mask_row(who, mask)
    # Masks may leave out leading axes, as broadcasting lets them.
    row = row[(None,) * (4 - row.dim())][:, :, 0]
    row = row.expand(*row.shape[:-1], keys)
    if mask.dtype != torch.bool:
        return row.to(dtype)
    return torch.zeros(row.shape, dtype=dtype, device=row.device).masked_fill(~row, float("-inf"))


def mask_others(mask: torch.Tensor | None, tokens: int, pooled: int) -> torch.Tensor | None:
    """Return the mask of a prompt's keys behind that of the image's pooled keys, which are never hidden."""
    if mask is None:
        return None
    visible = True if mask.dtype == torch.bool else 0.0
    return F.pad(mask[..., tokens:], (pooled, 0), value=visible)
