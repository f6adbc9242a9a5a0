"""Run a mixer in place of softmax. Where image and text share one attention, only image-to-image mixing is replaced.

The rule for MM-DiT and single streams, the same in training and at inference. Text tokens, and whatever else is no
image token (registers, padding, earlier frames), keep softmax attention over everything. An image token gives

    out = (1 - p) * mixer + p * text

where `mixer` is the operator on image tokens alone, `text` the token's softmax attention over the others, and p the
share of attention that the others get,

    p = Z(others) / (Z(others) + Z(image)),    Z(keys) = sum of exp(scale * query . key)

with Z(image) over the image tokens that the operator reads for this token, its receptive field. For a softmax window
that is exactly one softmax over window and text, and plain torch computes it as such; for a convolution or a scan it
is what softmax would give to the tokens they read. An operator may say a p of its own, by its `image_share`.

p is exact for fields of up to `EXACT` tokens. In larger ones the token's nearest neighbours count exactly, and of the
rest `SAMPLES` tokens stand for all: one drawn from each of as many cells of equal size, which follow a space-filling
curve, so that they lie evenly on the grid and alias with none of its periods. Every token is as likely as every other
to be drawn. With d the largest difference between scores within a cell, log Z(image) is off by at most d, and p by at
most d / 4.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import random
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..core.context import Context, Grid
from ..core.sites import AttentionSite
from ..errors import GeometryError, OperatorError
from ..operators import Mixer, OperatorConfig
from ..operators.ops.backends import compute_dtype, specialize

logger = logging.getLogger(__name__)

SMALL = 64  # tokens of a field that are scored without another softmax
EXACT = 1024
SAMPLES = 256
AT_ONCE = 256
NONE = torch.finfo(torch.float32).min  # log weight of a token that is not there; finite, so that gradients are


def mix(
    operator: Mixer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
) -> torch.Tensor:
    """Return the operator's output, [B, H, N, E].

    Raises `GeometryError` or `OperatorError` where the replaced attention hides tokens that the operator would show.
    """
    require_tokens(operator.name, query.shape[2])
    if context.softmax is not None and operator.ignores_attention_backend and not torch.compiler.is_compiling():
        _warn_ignored_backend(operator.name)
    if context.causal and not operator.stays_causal:
        raise OperatorError(f"{operator.name} looks ahead, and this attention is causal. Leave it as it is.")
    if context.mask is not None and not operator.honours_mask:
        if operator.honours_others and key.shape[2] > query.shape[2]:
            # A prompt's keys may be hidden from it, the image's own may not.
            refuse_hiding(context.mask[..., : query.shape[2]], operator.name)
        else:
            refuse_hiding(context.mask, operator.name)
            context = context.changed(mask=None)
    return operator(query, key, value, context)


@functools.cache
def _warn_ignored_backend(name: str) -> None:
    """Warn once for each operator that the model's attention backend does not reach it."""
    logger.warning(
        "%s computes its softmax without the attention backend set on the model: choose its own `backend` setting.",
        name,
    )


def require_tokens(who: str, tokens: int) -> None:
    """Raise `GeometryError` for a sequence without tokens."""
    if tokens == 0:
        raise GeometryError(f"{who} was given no tokens at all. Give the model latents of at least one patch.")


def refuse_hiding(mask: torch.Tensor, name: str) -> None:
    """Raise `GeometryError` for a mask that hides anything from an operator that cannot honour it."""
    hidden = ~mask if mask.dtype == torch.bool else mask != 0
    message = (
        f"{name} cannot honour an attention mask that hides tokens. Pass inputs without padding, "
        'or choose an operator that can: linear_attention, or a window with backend="torch".'
    )
    if torch.compiler.is_compiling():
        # Compiled code cannot branch on values; the device checks them as it runs.
        torch._assert_async(~hidden.any(), message)
    elif hidden.any():
        raise GeometryError(message)


def mix_with_others(
    operator: Mixer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: Context,
    *,
    start: int,
    image: int,
) -> torch.Tensor:
    """Mix a sequence whose image tokens are the `image` keys from `start`.

    Args:
        operator: replaces the image-to-image part.
        query: [B, H, N, E]: the whole sequence, the image tokens alone, or none of them.
        key, value: [B, H, M, E].
        context: of the running attention.
        start: place of the first image token among the keys.
        image: number of image tokens.

    Returns:
        [B, H, N, E].

    Raises:
        OperatorError: causal attention with tokens behind the image, where no model of diffusers has them.
    """
    tokens = query.shape[2]
    keys = key.shape[2]
    if context.causal and keys > start + image:
        raise OperatorError(
            f"{operator.name} cannot replace causal attention whose image has other tokens behind it. Leave it as it "
            "is."
        )
    if tokens < image:
        return _softmax(query, key, value, context, slice(0, tokens))
    queries = slice(start, start + image) if tokens == keys else slice(0, image)
    image_context = _context_of_image(operator.name, context, queries, tokens)
    # Each part of a hybrid shares attention with the text by its own rule, as it would alone.
    mix_part = functools.partial(_mix_image, start=start)
    mixed = operator.mix_parts(mix_part, query[:, :, queries], key, value, image_context)
    if tokens == image:
        return mixed
    before = _softmax(query, key, value, context, slice(0, queries.start))
    after = _softmax(query, key, value, context, slice(queries.stop, tokens))
    return torch.cat([before, mixed, after], dim=2)


def _context_of_image(name: str, context: Context, image: slice, tokens: int) -> Context:
    """Return the context of the image's queries, whose places among `tokens` are `image`.

    Raises `OperatorError` where the operator of this name was given something of other tokens.
    """
    length = image.stop - image.start

    def select(part: torch.Tensor, dim: int) -> torch.Tensor:
        # What a processor gives may be of the image alone already.
        if part.shape[dim] == length:
            return part
        if part.shape[dim] != tokens:
            raise OperatorError(
                f"{name} needs what the processor knows of {length} image tokens, and it has "
                f"{part.shape[dim]} of them, padded or joined to others. Choose another mixer there."
            )
        return part.narrow(dim, image.start, length)

    more: dict[str, Any] = {"mask": _rows(context.mask, image)}
    if context.hidden_states is not None:
        more["hidden_states"] = select(context.hidden_states, 1)
    if context.unrotated is not None:
        more["unrotated"] = tuple(select(part, 2) for part in context.unrotated)
    return context.changed(**more)


def _softmax(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context, part: slice
) -> torch.Tensor:
    """Attend from the queries of `part` to all keys."""
    query = query[:, :, part]
    if part.stop == part.start:
        return query
    mask = _rows(context.mask, part)
    return context.attend(query, key, value, mask=mask, scale=context.scale, causal=context.causal)


class _Keys(NamedTuple):
    """Keys and values [B, H, M, E], and the mask on them, [..., M] or None."""

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None

    def select(self, *parts: slice) -> _Keys:
        """Join some of the tokens."""
        key = _join([self.key[:, :, part] for part in parts], dim=2)
        value = _join([self.value[:, :, part] for part in parts], dim=2)
        if self.mask is None:
            return _Keys(key, value, None)
        return _Keys(key, value, _join([self.mask[..., part] for part in parts], dim=-1))


def _join(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    # One part stays a view, where torch would copy it.
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _mix_image(
    operator: Mixer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context, *, start: int
) -> torch.Tensor:
    """Mix the image tokens, whose queries these are, with themselves and with the others."""
    tokens = query.shape[2]
    keys = _Keys(key, value, context.mask)
    inside = slice(start, start + tokens)
    outside = (slice(0, start), slice(start + tokens, key.shape[2]))
    if operator.honours_others and not context.causal:
        key, value, mask = keys.select(inside, *outside)
        return mix(operator, query, key, value, context.changed(mask=mask))
    image = keys.select(inside)
    mixed = mix(operator, query, image.key, image.value, context.changed(mask=image.mask))
    if key.shape[2] == tokens:
        return mixed
    others = keys.select(*outside)
    scale = query.shape[-1] ** -0.5 if context.scale is None else context.scale
    share = operator.image_share(tokens, key.shape[2] - tokens)
    if share is not None:
        text = F.scaled_dot_product_attention(query, others.key, others.value, attn_mask=others.mask, scale=scale)
        return share * mixed + (1 - share) * text
    grid = context.grid
    if grid is None or grid.tokens != tokens:
        grid = Grid(height=1, width=tokens)
    fields = fields_of(operator, grid, query.device)
    if len(fields) == 2 and fields[0].size(0) == 1 and fields[0].size(1) > SMALL:
        # One field for all queries: a softmax over it and the text is exact, and stores no scores.
        return _share_softmax(mixed, query, others, image, fields[0][0], scale)
    return _share_score(mixed, query, others, _image_score(fields, query, image, scale), scale)


def _share_score(
    mixed: torch.Tensor, query: torch.Tensor, others: _Keys, score: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return (1 - p) * mixed + p * text from one softmax: over the text, and one key more that scores log Z(image).

    That score is two channels that only this key reads: what the query's precision can hold of it, and the rest. The
    key's value is one more channel, which comes out as 1 - p.
    """
    precision = compute_dtype(query)  # autocast lowers queries that it has left in float32
    limit = torch.finfo(precision).max / 4
    score = (score / scale).clamp(-limit, limit)
    high = score.to(precision)
    rest = (score - high).to(precision)
    # Eight more channels in all, since kernels want widths in steps of eight.
    query = F.pad(torch.cat([query, high, rest], dim=-1), (0, 6))
    key = _append_token(others.key, channels=2)
    value = _append_token(others.value, channels=1)
    mask = others.mask
    if mask is not None:
        mask = F.pad(mask, (0, 1), value=mask.dtype == torch.bool)
    shared = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return _split_share(shared, mixed)


def _append_token(tensor: torch.Tensor, channels: int) -> torch.Tensor:
    """Append a token and eight channels to [B, H, M, E]: zeros, but for ones in the token's first new channels."""
    ones = tensor.new_ones(*tensor.shape[:2], 1, channels)
    token = F.pad(ones, (tensor.shape[-1], 8 - channels))
    return torch.cat([F.pad(tensor, (0, 8)), token], dim=2)


def _share_softmax(
    mixed: torch.Tensor, query: torch.Tensor, others: _Keys, image: _Keys, field: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return (1 - p) * mixed + p * text from one softmax over the text and the field, indices [K] of image tokens.

    The field's values are zero but for one more channel, which comes out as 1 - p.
    """
    image_key = image.key[:, :, field]
    key = F.pad(torch.cat([others.key, image_key], dim=2), (0, 8))
    image_value = F.pad(image_key.new_ones(*image_key.shape[:3], 1), (others.value.shape[-1], 7))
    value = torch.cat([F.pad(others.value, (0, 8)), image_value], dim=2)
    mask = others.mask
    if mask is not None and image.mask is not None:
        image_mask = image.mask.expand(*image.mask.shape[:-1], image.key.shape[2])
        mask = torch.cat([mask, image_mask[..., field]], dim=-1)
    shared = F.scaled_dot_product_attention(F.pad(query, (0, 8)), key, value, attn_mask=mask, scale=scale)
    return _split_share(shared, mixed)


def _split_share(shared: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """Add the image's part to the text's, weighted by 1 - p, which is the channel behind the values."""
    width = mixed.shape[-1]
    return shared[..., :width] + shared[..., width : width + 1] * mixed


def _image_score(fields: tuple[torch.Tensor, ...], query: torch.Tensor, image: _Keys, scale: float) -> torch.Tensor:
    """Return log Z(image) of every image token, [B, H, N, 1]."""
    tokens = query.shape[2]
    mask = image.mask
    pieces = []
    for indices, weights in zip(fields[::2], fields[1::2], strict=True):
        if len(indices) == 1:
            scores = query @ image.key[:, :, indices[0]].transpose(-1, -2)
        else:
            scores = _FieldScores.apply(query, image.key, indices)
        scores = scale * scores.to(torch.promote_types(scores.dtype, torch.float32)) + weights
        if mask is not None:
            per_query = indices.expand(tokens, -1)[(None,) * (mask.dim() - 2)].expand(*mask.shape[:-2], -1, -1)
            scores = _hide(scores, mask.expand(*mask.shape[:-2], tokens, tokens).gather(-1, per_query))
        pieces.append(scores)
    return torch.cat(pieces, dim=-1).logsumexp(-1, keepdim=True)


class _FieldScores(torch.autograd.Function):
    """Scores of each query with the keys of its field: [B, H, N, K] from fields [N, K].

    A few queries at a time, and again for the gradient: what they gather is many times the keys.
    """

    @staticmethod
    def forward(query: torch.Tensor, key: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
        size = _queries_at_once(fields)
        pieces = zip(query.split(size, 2), fields.split(size, 0), strict=True)
        return torch.cat([(_gather(key, some) @ few[..., None])[..., 0] for few, some in pieces], dim=2)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        query, key, fields = ctx.saved_tensors
        size = _queries_at_once(fields)
        grads = grad.to(key.dtype).split(size, 2)
        queries = query.to(key.dtype).split(size, 2)
        query_grads = []
        key_grad = torch.zeros_like(key)
        for slopes, few, some in zip(grads, queries, fields.split(size, 0), strict=True):
            query_grads.append((slopes[..., None, :] @ _gather(key, some))[..., 0, :])
            key_grad.index_add_(2, some.flatten(), (slopes[..., None] * few[..., None, :]).flatten(2, 3))
        return torch.cat(query_grads, dim=2), key_grad, None


def _queries_at_once(fields: torch.Tensor) -> int:
    # At most sixteen pieces of small fields, since compiled code unrolls them;
    # `specialize`, since it knows no `shape` here.
    size = max(AT_ONCE, -(-specialize(fields.size(0)) // 16))
    return max(1, size * SMALL // max(SMALL, specialize(fields.size(1))))


def _gather(key: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
    """Return the keys of each field, [B, H, N, K, E]."""
    return key.index_select(2, fields.flatten()).unflatten(2, fields.size())


def fields_of(operator: Mixer, grid: Grid, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the tokens that stand for each token's receptive field, made once for a grid.

    Pairs of indices [N or 1, K] and log weights [N or 1, K]: one pair, or two where a sample that all tokens share
    comes beside the neighbours of each.
    """
    site = operator.site
    sides = (grid.frames, grid.height, grid.width)
    # Not the site itself, which is another one for each of the compiled blocks.
    sizes = (site.width, site.heads, site.head_width)
    return operator.constant(_fields_on, operator.settings, sizes, sides, device)


def _fields_on(
    config: OperatorConfig, sizes: tuple[int, int, int], sides: tuple[int, int, int], device: torch.device
) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(device) for tensor in _fields(config, sizes, sides))


@functools.lru_cache(maxsize=64)
def _fields(
    config: OperatorConfig, sizes: tuple[int, int, int], sides: tuple[int, int, int]
) -> tuple[torch.Tensor, ...]:
    width, heads, head_width = sizes
    frames, height, columns = sides
    grid = Grid(frames=frames, height=height, width=columns)
    site = AttentionSite(kind="self_attention", index=0, path="", width=width, heads=heads, head_width=head_width)
    # Its field is all that is wanted of it, so no memory for weights.
    with torch.device("meta"):
        operator = config.build(site)
    fields = [operator.receptive_field(token, grid) for token in range(grid.tokens)]
    largest = max(map(len, fields))
    shared = all(field == fields[0] for field in fields)
    # Constants of compiled code and of training must be plain tensors, whatever mode this first call runs in.
    with torch.inference_mode(False), torch.device("cpu"):
        if largest <= EXACT:
            if shared:
                fields = fields[:1]
            return _table([dict.fromkeys(sorted(field), 0.0) for field in fields])
        rank = _curve_rank(grid)
        if shared:
            return _neighbours_and_sample(set(fields[0]), grid, rank)
        return _table([_neighbours_with_sample(set(field), token, grid, rank) for token, field in enumerate(fields)])


def _table(rows: list[dict[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and log weights as two tensors [N, K]; short rows, and empty ones, end in tokens of no weight."""
    width = max(1, *map(len, rows))
    indices = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.full((len(rows), width), NONE)
    for number, row in enumerate(rows):
        indices[number, : len(row)] = torch.tensor(list(row), dtype=torch.long)
        weights[number, : len(row)] = torch.tensor(list(row.values()))
    return indices, weights


def _neighbours_with_sample(field: set[int], token: int, grid: Grid, rank: list[int]) -> dict[int, float]:
    """Return the log weights of a token's neighbours, and of those drawn from the rest of its field."""
    near = sorted(_neighbours(token, grid) & field)
    far = field.difference(near)
    drawn = _draw(far, rank)
    weight = math.log(max(1, len(far)) / max(1, len(drawn)))
    return dict.fromkeys(near, 0.0) | dict.fromkeys(drawn, weight)


def _neighbours_and_sample(field: set[int], grid: Grid, rank: list[int]) -> tuple[torch.Tensor, ...]:
    """Return the neighbours of each token, [N, K], and one sample for all, [1, SAMPLES], with its weights for each."""
    near = [sorted(_neighbours(token, grid) & field) for token in range(grid.tokens)]
    drawn = _draw(field, rank)
    is_far = torch.ones(grid.tokens, len(drawn), dtype=torch.bool)
    for place, token in enumerate(drawn):
        # A drawn token that is a neighbour, and counted already, leaves its weight to the others.
        is_far[list(_neighbours(token, grid)), place] = False
    far = len(field) - torch.tensor([len(tokens) for tokens in near])
    weight = (far / is_far.sum(1)).log()
    weights = weight[:, None].where(is_far, NONE)
    return *_table([dict.fromkeys(tokens, 0.0) for tokens in near]), torch.tensor([drawn]), weights


def _neighbours(token: int, grid: Grid) -> set[int]:
    """Return a token and those beside it on the grid, corners and adjacent frames included."""
    frame, rest = divmod(token, grid.height * grid.width)
    row, column = divmod(rest, grid.width)
    places = itertools.product(
        range(max(0, frame - 1), min(grid.frames, frame + 2)),
        range(max(0, row - 1), min(grid.height, row + 2)),
        range(max(0, column - 1), min(grid.width, column + 2)),
    )
    return {(f * grid.height + y) * grid.width + x for f, y, x in places}


def _draw(tokens: Collection[int], rank: list[int]) -> list[int]:
    """Draw one token from each of `SAMPLES` cells of equal size along the curve; all where they are fewer."""
    ordered = sorted(tokens, key=rank.__getitem__)
    count = len(ordered)
    cells = min(SAMPLES, count)
    generator = random.Random(0)  # the same tokens in every process, so that a saved graft gives the same output
    places = [int((cell + generator.random()) * count / cells) for cell in range(cells)]
    return [ordered[min(place, count - 1)] for place in places]


def _curve_rank(grid: Grid) -> list[int]:
    """Return each token's place along a curve (Morton's) that fills the grid, neighbours near one another."""
    codes = []
    for token in range(grid.tokens):
        frame, rest = divmod(token, grid.height * grid.width)
        row, column = divmod(rest, grid.width)
        code = 0
        for bit in range(max(frame, row, column).bit_length()):
            for place, side in enumerate((column, row, frame)):
                code |= (side >> bit & 1) << (3 * bit + place)
        codes.append(code)
    rank = [0] * grid.tokens
    for place, token in enumerate(sorted(range(grid.tokens), key=codes.__getitem__)):
        rank[token] = place
    return rank


def _rows(mask: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    """Return the rows of a mask that belong to some queries; a mask for all queries has one."""
    if mask is None or mask.dim() < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., part, :]


def _hide(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Apply a mask; where all is hidden, scores stay finite, so that a share of zero is zero and not undefined."""
    lowest = torch.finfo(scores.dtype).min
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, lowest)
    return (scores + mask).clamp(min=lowest)
