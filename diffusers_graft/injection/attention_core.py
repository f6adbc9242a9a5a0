"""Running a mixer in place of softmax. Where image and text share one attention, only image-to-image mixing is
replaced.

The rule for MM-DiT and single streams, the same in training and at inference. Text tokens, and whatever else is no
image token (registers, padding, earlier frames), keep softmax attention over everything. An image token gives

    out = (1 - p) * mixer + p * text

where `mixer` is the operator on image tokens alone, `text` the token's softmax attention over the others, and p the
share of attention that the others get,

    p = Z(others) / (Z(others) + Z(image)),    Z(keys) = sum of exp(scale * query . key)

with Z(image) over the image tokens that the operator reads for this token, its receptive field. For a softmax window
that is exactly one softmax over window and text, and plain torch computes it as such; for a convolution or a scan it
is what softmax would give to the tokens they read. Of fields beyond 64 tokens, 64 evenly spaced ones stand for all.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..core.context import Context, Grid
from ..core.sites import Site
from ..errors import GeometryError, OperatorError
from ..operators import Mixer, OperatorConfig
from ..operators.ops.backends import compute_dtype, specialize

FIELD = 64  # tokens that stand for a receptive field, at most
AT_ONCE = 256
NONE = torch.finfo(torch.float32).min  # log weight of a token that is not there; finite, so that gradients are


def mix(
    operator: Mixer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
) -> torch.Tensor:
    """The operator's output, [B, H, N, E]. Raises where the replaced attention hides what the operator would show."""
    require_tokens(operator.name, query.shape[2])
    if context.causal and not operator.stays_causal:
        raise OperatorError(f"{operator.name} looks ahead, and this attention is causal. Leave it as it is.")
    if context.mask is not None and not operator.honours_mask:
        refuse_hiding(context.mask, operator.name)
        context = replace(context, mask=None)
    return operator(query, key, value, context)


def require_tokens(who: str, tokens: int) -> None:
    """Raise `GeometryError` for a sequence without tokens."""
    if tokens == 0:
        raise GeometryError(f"{who} was given no tokens at all. Give the model latents of at least one patch.")


def refuse_hiding(mask: torch.Tensor, name: str) -> None:
    """Raise `GeometryError` for a mask that hides anything from an operator that cannot honour it."""
    hidden = ~mask if mask.dtype == torch.bool else mask != 0
    words = (
        f"{name} cannot honour an attention mask that hides tokens. Pass inputs without padding, "
        'or choose an operator that can: linear_attention, or a window with backend="torch".'
    )
    if torch.compiler.is_compiling():
        torch._assert_async(~hidden.any(), words)
    elif hidden.any():
        raise GeometryError(words)


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
    """[B, H, N, E] and twice [B, H, M, E] of a sequence whose image tokens are `image` keys from `start`.

    Queries are the whole sequence, the image tokens alone, or none of them. Raises `OperatorError` for causal
    attention with tokens behind the image, where no model of diffusers has them.
    """
    if context.causal and key.shape[2] > start + image:
        raise OperatorError(
            f"{operator.name} cannot stand in a causal attention whose image has other tokens behind it. Leave it as it is."
        )
    queries = slice(start, start + image) if query.shape[2] == key.shape[2] else slice(0, image)
    if query.shape[2] < image:
        return _softmax(query, key, value, context, slice(0, query.shape[2]))
    seen_by_image = replace(context, mask=_rows(context.mask, queries))
    # Each part of a hybrid shares attention with the text by its own rule, as it would alone.
    mixed = operator.mix_parts(
        functools.partial(_image_queries, start=start), query[:, :, queries], key, value, seen_by_image
    )
    parts = [slice(0, queries.start), slice(queries.stop, query.shape[2])]
    before, after = (_softmax(query[:, :, part], key, value, context, part) for part in parts)
    return torch.cat([before, mixed, after], dim=2) if query.shape[2] > image else mixed


def _softmax(query, key, value, context: Context, part: slice) -> torch.Tensor:
    if part.stop == part.start:
        return query
    mask = _rows(context.mask, part)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=context.scale, is_causal=context.causal
    )


def _image_queries(operator: Mixer, query, key, value, context: Context, *, start: int) -> torch.Tensor:
    image = query.shape[2]
    own, rest = slice(start, start + image), (slice(0, start), slice(start + image, key.shape[2]))
    if operator.honours_others and not context.causal:
        key, value = (torch.cat([part[:, :, some] for some in (own, *rest)], dim=2) for part in (key, value))
        mask = None if context.mask is None else torch.cat([context.mask[..., some] for some in (own, *rest)], dim=-1)
        return mix(operator, query, key, value, replace(context, mask=mask))
    mask = None if context.mask is None else context.mask[..., own]
    mixed = mix(operator, query, key[:, :, own], value[:, :, own], replace(context, mask=mask))
    if key.shape[2] == image:
        return mixed
    scale = query.shape[-1] ** -0.5 if context.scale is None else context.scale
    seen = _seen(operator, query, key[:, :, own], mask, context.grid, scale)
    key, value = (torch.cat([tensor[:, :, part] for part in rest], dim=2) for tensor in (key, value))
    mask = None if context.mask is None else torch.cat([context.mask[..., part] for part in rest], dim=-1)
    return _shared(mixed, seen, query, key, value, mask, scale)


def _shared(
    mixed: torch.Tensor,
    seen: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """(1 - p) * mixed + p * text in one softmax: over the text, and one key more that scores log Z(image), `seen`.

    That score is two channels that only this key looks at, what the query's precision holds of it and the rest. Its
    value is one more channel, which comes out as 1 - p. Eight channels in all, as kernels want them.
    """
    held = compute_dtype(query)  # autocast lowers queries that it has left in float32
    limit = torch.finfo(held).max / 4
    score = (seen / scale).clamp(-limit, limit)
    high = score.to(held)
    query = F.pad(torch.cat([query, high, (score - high).to(held)], dim=-1), (0, 6))
    key, value = _with_one_more(key, 2), _with_one_more(value, 1)
    mask = mask if mask is None else F.pad(mask, (0, 1), value=mask.dtype == torch.bool)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    width = mixed.shape[-1]
    return found[..., :width] + found[..., width : width + 1] * mixed


def _with_one_more(part: torch.Tensor, ones: int) -> torch.Tensor:
    """[B, H, M, E] with one token and eight channels more: zeros, but for the token's first new channels."""
    token = F.pad(part.new_ones(*part.shape[:2], 1, ones), (part.shape[-1], 8 - ones))
    return torch.cat([F.pad(part, (0, 8)), token], dim=2)


def _seen(operator: Mixer, query, key, mask: torch.Tensor | None, grid: Grid | None, scale: float) -> torch.Tensor:
    """log Z(image) of every image token, [B, H, N, 1]."""
    tokens = query.shape[2]
    grid = grid if grid is not None and grid.tokens == tokens else Grid(height=1, width=tokens)
    fields, weights = fields_of(operator, grid, query.device)
    shared = len(fields) == 1
    scores = query @ key[:, :, fields[0]].transpose(-1, -2) if shared else _FieldScores.apply(query, key, fields)
    scores = scale * scores.to(torch.promote_types(scores.dtype, torch.float32)) + weights
    if mask is not None:
        fields = fields.expand(tokens, -1)[(None,) * (mask.dim() - 2)].expand(*mask.shape[:-2], -1, -1)
        scores = _hide(scores, mask.expand(*mask.shape[:-2], tokens, tokens).gather(-1, fields))
    return scores.logsumexp(-1, keepdim=True)


class _FieldScores(torch.autograd.Function):
    """Each query with the keys of its field, [B, H, N, K], from fields [N, K].

    A few queries at a time, and anew for the gradient: what they gather is many times the keys.
    """

    @staticmethod
    def forward(query: torch.Tensor, key: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
        pieces = zip(_split(query, 2), _split(fields, 0), strict=True)
        return torch.cat([(_gathered(key, some) @ few[..., None])[..., 0] for few, some in pieces], dim=2)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        query, key, fields = ctx.saved_tensors
        of_queries, of_keys = [], torch.zeros_like(key)
        pieces = zip(_split(grad.to(key.dtype), 2), _split(query.to(key.dtype), 2), _split(fields, 0), strict=True)
        for slopes, few, some in pieces:
            of_queries.append((slopes[..., None, :] @ _gathered(key, some))[..., 0, :])
            of_keys.index_add_(2, some.flatten(), (slopes[..., None] * few[..., None, :]).flatten(2, 3))
        return torch.cat(of_queries, dim=2), of_keys, None


def _split(part: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    return part.split(
        max(AT_ONCE, -(-specialize(part.size(dim)) // 16)), dim
    )  # of a constant, compiled code knows no `shape`


def _gathered(key: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
    """[B, H, N, K, E]."""
    return key.index_select(2, fields.flatten()).unflatten(2, fields.size())


def fields_of(operator: Mixer, grid: Grid, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and log weights of the tokens that stand for each token's receptive field: [N or 1, K], made once for a
    grid.
    """
    site, sides = operator.site, (grid.frames, grid.height, grid.width)
    sizes = (
        site.width,
        site.heads,
        site.head_width,
    )  # not the site itself, which is another for each of the compiled blocks
    return operator.constant(_fields_on, operator.settings, sizes, sides, device)


def _fields_on(
    config: OperatorConfig, sizes: tuple[int, int, int], sides: tuple[int, int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    fields, weights = _fields(config, sizes, sides)
    return fields.to(device), weights.to(device)


@functools.lru_cache(maxsize=64)
def _fields(
    config: OperatorConfig, sizes: tuple[int, int, int], sides: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    (width, heads, head_width), (frames, height, columns) = sizes, sides
    grid = Grid(frames=frames, height=height, width=columns)
    site = Site(kind="self_attention", index=0, path="", width=width, heads=heads, head_width=head_width)
    with torch.device("meta"):
        operator = config.build(site)
    fields = [operator.receptive_field(token, grid) for token in range(grid.tokens)]
    if all(field == fields[0] for field in fields):
        fields = fields[:1]
    chosen = [_evenly(field if isinstance(field, range) else sorted(field)) for field in fields]
    width = max(1, *map(len, chosen))  # of no tokens at all, one of no weight
    with torch.inference_mode(False), torch.device("cpu"):
        indices = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in chosen])
        weights = torch.tensor(
            [
                [math.log(max(1, len(field)) / max(1, len(tokens)))] * len(tokens) + [NONE] * (width - len(tokens))
                for field, tokens in zip(fields, chosen, strict=True)
            ]
        )
    return indices, weights


def _evenly(field) -> list[int]:
    return list(field) if len(field) <= FIELD else [field[int((i + 0.5) * len(field) / FIELD)] for i in range(FIELD)]


def _rows(mask: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return mask if mask is None or mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., part, :]


def _hide(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores under a mask; where all is hidden they stay finite, so that a share of zero is zero and not undefined."""
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (scores + mask).clamp(min=lowest)
