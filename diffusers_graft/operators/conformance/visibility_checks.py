"""Checks of the tokens that may be seen: under a mask, ahead, beside others, within the declared receptive field."""

from __future__ import annotations

import dataclasses
import math

import torch

from ...core.context import Context, Grid
from ...errors import GraftError
from ..base import BlockOperator, FeedForwardOperator, Mixer, Operator
from ..self_attention import regroup_heads
from .case import Subject, fail, run

# Small enough to ask every token for what it sees; an operator may refuse them, with words.
SMALL_GRIDS = (Grid(height=5, width=6), Grid(frames=3, height=3, width=4), Grid(height=8, width=9))


def check_honours_mask(subject: Subject) -> bool | None:
    """Hidden keys change nothing, however they are hidden; a mask that differs by query is honoured or refused."""
    operator = subject.build()
    if not operator.honours_mask:
        return False
    inputs = subject.inputs()
    tokens = subject.grid.tokens
    hidden = 3
    visible = (torch.arange(tokens) < tokens - hidden)[None, None, None]
    # Keys and values change, not queries: those of hidden tokens may do as they like.
    changed = [tensor.clone() for tensor in inputs]
    for tensor in changed[1:3]:
        tensor[:, :, -hidden:] += 1
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    for mask in (visible, additive(visible, float("-inf")), additive(visible, -10000.0), causal):
        context = dataclasses.replace(subject.context, mask=mask)
        try:
            before = run(operator, inputs, context)
            after = run(operator, changed, context)
        except GraftError:
            # Keys that are summed once for all queries can be hidden from all of them alone.
            if mask is causal:
                continue
            raise
        if not torch.allclose(before[:, :, :-hidden], after[:, :, :-hidden], rtol=1e-9, atol=1e-9):
            which = "a mask that differs by query" if mask is causal else f"a {mask.dtype} mask of keys"
            fail("honours_mask", f"honours_mask is True, but keys hidden by {which} change the output")
    return None


def check_mask_bias(subject: Subject) -> bool | None:
    """A mask that hides nothing, or biases all keys alike, changes nothing; a bias weighs a key by its exponential."""
    operator = subject.build()
    if not operator.honours_mask:
        return False
    inputs = subject.inputs()
    tokens = subject.grid.tokens
    expected = run(operator, inputs, subject.context)
    everything = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    zeros = torch.zeros(1, 1, 1, tokens, dtype=torch.float64)
    for mask in (everything, zeros, zeros - 1.5):
        output = run(operator, inputs, dataclasses.replace(subject.context, mask=mask))
        if not torch.allclose(output, expected, rtol=1e-9, atol=1e-9):
            fail(
                "mask_bias", f"a {mask.dtype} mask of one value for all keys, {mask.flatten()[0]}, changes the output"
            )
    bias = zeros.clone()
    bias[..., 1] = math.log(3)
    plain = _odds_of_key(operator, inputs, subject.context, key=1)
    biased = _odds_of_key(operator, inputs, dataclasses.replace(subject.context, mask=bias), key=1)
    # Tokens that see this key alone, or not at all, have no odds.
    shared = plain.isfinite() & (plain.abs() > 1e-9) & (plain.abs() < 1e9)
    if not torch.allclose(biased[shared], 3 * plain[shared], rtol=1e-6):
        fail("mask_bias", "a bias of log 3 on one key does not make its weight three times as large")
    return None


def _odds_of_key(operator: Operator, inputs: list[torch.Tensor], context: Context, *, key: int) -> torch.Tensor:
    """Return a key's weight over that of all others, for every query, [B, H, N, E]: of operators that average values.

    They are linear in the values, and give the same for equal values at every token; of others there are no odds.
    """
    query, keys, value, *more = inputs
    chosen = torch.zeros_like(value)
    chosen[:, :, key] = 1.0
    of_key = run(operator, [query, keys, chosen, *more], context)
    of_others = run(operator, [query, keys, 1 - chosen, *more], context)
    total = of_key + of_others
    if not torch.allclose(total, total[:, :, :1].expand_as(total)):
        return torch.full_like(total, math.nan)
    return of_key / of_others


def check_honours_others(subject: Subject) -> bool | None:
    """Keys beyond the queries' own share one softmax with those, for every query; hidden, they change nothing."""
    operator = subject.build()
    if not operator.honours_others:
        return False
    query, key, value, *more = inputs = subject.inputs()
    # Softmax over regrouped heads has the scores of those.
    heads = getattr(operator, "heads", query.shape[1])
    alone = run(operator, inputs, subject.context)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(len(key), key.shape[1], 8, key.shape[3], generator=generator, dtype=key.dtype)
    masses = []
    for others in drawn.split([3, 5], dim=2):
        keys = torch.cat([key, others], dim=2)
        none = torch.zeros_like(keys)
        values = torch.cat([torch.zeros_like(value), torch.ones_like(others)], dim=2)
        # What values of zero give is no part of a share: pooled ones may have a bias.
        with_values = run(operator, [query, keys, values, *more], subject.context)
        output = with_values - run(operator, [query, keys, none, *more], subject.context)
        share = regroup_heads(output, heads)[..., :1]
        some_queries, some_others = (regroup_heads(part, heads) for part in (query, others))
        scores = some_queries @ some_others.transpose(-1, -2) * some_queries.shape[-1] ** -0.5
        theirs = scores.exp().sum(-1, keepdim=True)
        masses.append(theirs * (1 - share) / share)  # of the queries' own keys
        visible = (torch.arange(keys.shape[2]) < key.shape[2])[None, None, None]
        values = torch.cat([value, others], dim=2)
        for mask in (visible, additive(visible, float("-inf"))):
            context = dataclasses.replace(subject.context, mask=mask)
            hidden = run(operator, [query, keys, values, *more], context)
            if not torch.allclose(hidden, alone, rtol=1e-9, atol=1e-9):
                fail(
                    "honours_others",
                    "honours_others is True, but other keys change the output though a mask hides them",
                )
    # Two sets of others must find the queries' own keys of equal mass.
    if not (masses[0].isfinite().all() and torch.allclose(*masses, rtol=1e-7)):
        fail("honours_others", "honours_others is True, but other keys do not share one softmax with the queries' own")
    return None


def additive(visible: torch.Tensor, hidden: float) -> torch.Tensor:
    """Turn a mask of booleans into one to add to scores."""
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, hidden)


def check_scale(subject: Subject) -> bool | None:
    """Heads that weigh keys by softmax do so with the scale that the attention was given; the others ignore it."""
    operator = subject.build()
    if not isinstance(operator, Mixer):
        return False
    query, *others = inputs = subject.inputs()
    tripled = [3 * query, *others]
    context = subject.context
    scaled = dataclasses.replace(context, scale=3 * query.shape[-1] ** -0.5)
    expected = run(operator, tripled, context)
    output = run(operator, inputs, scaled)
    wrong = ((output - expected).abs() > 1e-9).flatten(2).any(-1)
    # Softmax is known by its odds, which are cubed where queries are tripled.
    odds = _odds_of_neighbours(operator, inputs, context)
    cubed = _odds_of_neighbours(operator, tripled, context)
    is_softmax = odds.isfinite() & ((odds - 1).abs() > 1e-3) & torch.isclose(cubed, odds**3, rtol=1e-6)
    if (wrong & is_softmax).any():
        fail("scale", "it weighs keys by softmax, and not with the scale of the context")
    return None


def _odds_of_neighbours(operator: Operator, inputs: list[torch.Tensor], context: Context) -> torch.Tensor:
    """Return the weight of the first token on itself over that on the next, in each head's first channel: [B, H]."""
    query, key, value, *more = inputs
    weights = []
    for place in (0, 1):
        chosen = torch.zeros_like(value)
        chosen[:, :, place] = 1.0
        weights.append(run(operator, [query, key, chosen, *more], context)[:, :, 0, 0])
    return weights[0] / weights[1]


def check_sees_ahead(subject: Subject) -> bool | None:
    """Tokens see later ones, unless it is declared that they do not."""
    operator = subject.build()
    inputs = subject.inputs(batch=1)
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
    """A token's output depends on the tokens that are declared, and on no others: every token of a small grid."""
    for grid in SMALL_GRIDS:
        try:
            _require_declared_field(subject.on(grid), range(grid.tokens))
        except GraftError as error:
            if str(error).startswith("receptive_field"):
                raise
            # The grid is refused with words.
    # Larger grids are cut into tiles, which small ones are not: a few tokens of those as well.
    for there in subject.accepted()[:2]:
        tokens = there.grid.tokens
        _require_declared_field(there, (0, tokens // 2 + there.grid.width // 2, tokens - 1))


def _require_declared_field(subject: Subject, tokens: range | tuple[int, ...]) -> None:
    """Fail unless these tokens depend on what `receptive_field` names."""
    operator = subject.build()
    inputs = [tensor.requires_grad_() for tensor in subject.inputs(batch=1)]
    output = run(operator, inputs, subject.context)
    for token in tokens:
        seen = _tokens_seen(output, inputs, token)
        declared = set(operator.receptive_field(token, subject.grid))
        # Which tokens are chosen is known of these inputs alone.
        if seen != declared and not (operator.chooses_tokens and seen < declared):
            more = sorted(seen - declared)[:8]
            less = sorted(declared - seen)[:8]
            fail(
                "receptive_field",
                f"token {token} of the grid {subject.grid} also depends on {more}, and does not depend on {less} "
                "of those that receptive_field names",
            )


def _tokens_seen(output: torch.Tensor, inputs: list[torch.Tensor], token: int) -> set[int]:
    """Return the tokens of any input that the output at `token` has a gradient for."""
    if not output.requires_grad:
        return set()
    found = torch.autograd.grad(output[..., token, :].sum(), inputs, retain_graph=True, allow_unused=True)
    seen = [gradient.transpose(-1, -2).flatten(0, -2).any(0) for gradient in found if gradient is not None]
    if not seen:
        return set()
    return set(torch.stack(seen).any(0).nonzero().flatten().tolist())
