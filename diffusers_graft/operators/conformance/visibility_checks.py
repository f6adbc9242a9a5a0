"""Checks of what a token may see: under a mask, ahead of itself, within the declared receptive field."""

from __future__ import annotations

import dataclasses

import torch

from ...core.context import Context
from ...errors import GraftError
from ..base import BlockOperator, FeedForwardOperator, Operator
from .case import Subject, fail, run


def check_honours_mask(subject: Subject) -> bool | None:
    """Hidden keys change nothing, however they are hidden; a mask that differs by query is honoured or refused."""
    operator, inputs = subject.build(), subject.inputs()
    if not operator.honours_mask:
        return False
    tokens, hidden = subject.grid.tokens, 3
    visible = (torch.arange(tokens) < tokens - hidden)[None, None, None]
    changed = [inputs[0], *(tensor.clone() for tensor in inputs[1:])]
    for tensor in changed[1:]:
        tensor[:, :, -hidden:] += 1
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    for mask in (visible, additive(visible, float("-inf")), additive(visible, -10000.0), causal):
        context = dataclasses.replace(subject.context, mask=mask)
        try:
            before, after = run(operator, inputs, context), run(operator, changed, context)
        except GraftError:
            if mask is causal:
                continue
            raise
        seen = slice(0, tokens - hidden)
        if not torch.allclose(before[:, :, seen], after[:, :, seen], rtol=1e-9, atol=1e-9):
            what = "a mask that differs by query" if mask is causal else f"a {mask.dtype} mask of keys"
            fail("honours_mask", f"honours_mask is True, but keys hidden by {what} change the output")
    return None


def check_honours_others(subject: Subject) -> bool | None:
    """KeyTensor beyond the queries' own share one softmax with those, for every query; hidden, they change nothing."""
    operator, inputs = subject.build(), subject.inputs()
    if not operator.honours_others:
        return False
    query, key, value = inputs
    alone = run(operator, inputs, subject.context)
    drawn = torch.randn(
        len(key), key.shape[1], 8, key.shape[3], generator=torch.Generator().manual_seed(3), dtype=key.dtype
    )
    masses = []
    for others in drawn.split([3, 5], dim=2):
        keys = torch.cat([key, others], dim=2)
        values = torch.cat([torch.zeros_like(value), torch.ones_like(others)], dim=2)
        share = run(operator, [query, keys, values], subject.context)[..., :1]
        theirs = (query @ others.transpose(-1, -2) * query.shape[-1] ** -0.5).exp().sum(-1, keepdim=True)
        masses.append(theirs * (1 - share) / share)  # of the queries' own keys
        visible = (torch.arange(keys.shape[2]) < key.shape[2])[None, None, None]
        values = torch.cat([value, others], dim=2)
        hidden = run(operator, [query, keys, values], dataclasses.replace(subject.context, mask=visible))
        if not torch.allclose(hidden, alone, rtol=1e-9, atol=1e-9):
            fail("honours_others", "honours_others is True, but other keys change the output though a mask hides them")
    if not (masses[0].isfinite().all() and torch.allclose(*masses, rtol=1e-7)):
        fail("honours_others", "honours_others is True, but other keys do not share one softmax with the queries' own")
    return None


def additive(visible: torch.Tensor, hidden: float) -> torch.Tensor:
    """A mask of booleans as one to add to scores."""
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, hidden)


def check_sees_ahead(subject: Subject) -> bool | None:
    """Whether tokens change with a later one tells which way an operator that mixes tokens looks."""
    operator, inputs = subject.build(), subject.inputs(batch=1)
    if isinstance(operator, FeedForwardOperator | BlockOperator):
        return False
    ahead = _sees_ahead(operator, inputs, subject.context)
    if ahead == operator.causal_operator:
        seen = "see later ones" if ahead else "see none after them"
        fail("sees_ahead", f"causal_operator is {operator.causal_operator}, but tokens {seen}")
    if operator.stays_causal and _sees_ahead(operator, inputs, dataclasses.replace(subject.context, causal=True)):
        fail("sees_ahead", "honours_causal is True, but tokens see later ones where attention is causal")
    return None


def _sees_ahead(operator: Operator, inputs: list[torch.Tensor], context: Context) -> bool:
    expected = run(operator, inputs, context)
    for later in range(1, expected.shape[-2]):  # one by one: an operator may keep to the rows of the grid
        changed = [tensor.clone() for tensor in inputs]
        for tensor in changed:
            tensor[..., later:, :] += 1
        difference = run(operator, changed, context) - expected
        if difference[..., :later, :].abs().max() > 1e-9:
            return True
    return False


def check_receptive_field(subject: Subject) -> None:
    """A token's output depends on the tokens that are declared, and on no others."""
    for there in subject.accepted()[:2]:
        operator, tokens = there.build(), there.grid.tokens
        inputs = [tensor.requires_grad_() for tensor in there.inputs(batch=1)]
        for token in (0, tokens // 2 + there.grid.width // 2, tokens - 1):
            seen = _tokens_seen(run(operator, inputs, there.context), inputs, token)
            declared = set(operator.receptive_field(token, there.grid))
            if seen != declared:
                more, less = sorted(seen - declared), sorted(declared - seen)
                fail(
                    "receptive_field",
                    f"token {token} of the grid {there.grid} also depends on {more[:8]}, and does not depend on {less[:8]} "
                    "of those that receptive_field names",
                )


def _tokens_seen(output: torch.Tensor, inputs: list[torch.Tensor], token: int) -> set[int]:
    """Tokens of any input that the output at `token` has a gradient for."""
    if not output.requires_grad:
        return set()
    found = torch.autograd.grad(output[..., token, :].sum(), inputs, allow_unused=True)
    seen = [gradient.transpose(-1, -2).flatten(0, -2).any(0) for gradient in found if gradient is not None]
    return set(torch.stack(seen).any(0).nonzero().flatten().tolist()) if seen else set()
