"""Others' formulations of what operators compute: each gives the same numbers, and is timed beside ours in one run.

Sources: local-attention (a package); FlexAttention (torch); one gather for each query, and a mask of all pairs, as
written by hand; SSD minimal, arXiv 2405.21060, Section 6; the chunks of the gated delta rule, arXiv 2412.06464,
Section 3.3, by forward substitution; a gated convolution as compiled shifts and sums; blocks of keys that are gathered
for each block of queries, as the equations of VSA, arXiv 2505.13389, say it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from diffusers_graft.core.context import Grid
from diffusers_graft.errors import MissingDependencyError
from diffusers_graft.evaluation.operator_costs import build_example, example_context, example_tensors
from diffusers_graft.operators import Operator, parse_operator
from diffusers_graft.operators.ops.scans import gated_delta_rule

Call = Callable[..., torch.Tensor]

CHUNK = 64  # tokens of a chunk in both scans
GATHERING = 64  # queries whose keys are gathered at a time


@dataclass(frozen=True)
class Contest:
    """One thing to compute, by an operator and by others.

    Attributes:
        name: of the operator.
        inputs: tensors of one sample.
        ours: the operator, called with the inputs.
        peers: others' formulations by name, called likewise.
        forward_only: names of peers without a backward on CPUs.
    """

    name: str
    inputs: list[torch.Tensor]
    ours: Call
    peers: dict[str, Call]
    forward_only: tuple[str, ...] = ()


def make_contests(grid: Grid, heads: int, head_width: int) -> Iterator[Contest]:
    """Yield everything that others compute, too, on one sample of a grid.

    Raises `MissingDependencyError` without local-attention.
    """
    yield _window("sliding_window(window=(128, 128))", grid, heads, head_width)
    yield _window("neighborhood(kernel=7)", grid, heads, head_width)
    yield _block_sparse("block_sparse(keep=0.1)", grid, heads, head_width)
    yield _gated_convolution(grid, heads, head_width)
    yield _state_space(grid, heads, head_width)
    yield _delta_rule(grid, heads, head_width)


def compiled(call: Call) -> Call:
    """Compile a formulation as a whole."""
    return torch.compile(call, fullgraph=True, dynamic=False)


def _build(spec: str, heads: int, head_width: int) -> Operator:
    return build_example(parse_operator(spec), width=heads * head_width, heads=heads)


def _window(spec: str, grid: Grid, heads: int, head_width: int) -> Contest:
    operator = _build(spec, heads, head_width)
    tokens = grid.tokens
    seen = [sorted(operator.receptive_field(token, grid)) for token in range(tokens)]
    flex_name = "FlexAttention, compiled"
    peers = {
        "a gather for each query": gather_for_each_query(seen),
        "softmax under a mask of all pairs": mask_all_pairs(seen),
    }
    if operator.name == "sliding_window":
        before, after = operator.config.window
        peers[flex_name] = attend_flexibly(partial(_sees_band, before, after), tokens)
        if before == after:
            peers["local-attention"] = make_local_attention(before)
    else:
        peers[flex_name] = attend_flexibly(partial(_sees_square, grid, operator.config.kernel), tokens)
    context = example_context(operator, grid)
    inputs = example_tensors(operator, tokens)
    return Contest(spec, inputs, lambda *parts: operator(*parts, context), peers, (flex_name,))


def make_local_attention(window: int) -> Call:
    """Return the package's attention within as many tokens before as after each."""
    try:
        from local_attention import LocalAttention
    except ImportError as error:
        raise MissingDependencyError("Peers in the benchmark", "local-attention", extra="bench") from error
    attention = LocalAttention(
        window, look_backward=1, look_forward=1, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True
    )
    return attention.__call__


def gather_for_each_query(seen: list[list[int]]) -> Call:
    """Return softmax over keys that are gathered query by query, some queries at a time."""
    most = max(map(len, seen))
    # Where a query sees fewer keys, its first one is repeated and hidden.
    places = torch.tensor([keys + keys[:1] * (most - len(keys)) for keys in seen])
    is_hidden = torch.arange(most) >= torch.tensor([len(keys) for keys in seen])[:, None]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mixed = []
        for start in range(0, len(seen), GATHERING):
            piece = slice(start, start + GATHERING)
            keys = key[:, :, places[piece]]
            scores = torch.einsum("bhqe,bhqke->bhqk", query[:, :, piece], keys) * query.shape[-1] ** -0.5
            weights = scores.masked_fill(is_hidden[piece], float("-inf")).softmax(-1)
            mixed.append(torch.einsum("bhqk,bhqke->bhqe", weights, value[:, :, places[piece]]))
        return torch.cat(mixed, dim=2)

    return attend


def mask_all_pairs(seen: list[list[int]]) -> Call:
    """Return softmax over all keys under a mask."""
    visible = torch.zeros(len(seen), len(seen), dtype=torch.bool)
    for query, keys in enumerate(seen):
        visible[query, keys] = True
    return partial(F.scaled_dot_product_attention, attn_mask=visible)


def attend_flexibly(sees: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tokens: int) -> Call:
    """Return FlexAttention under a rule, compiled, its blocks found beforehand."""
    blocks = create_block_mask(lambda batch, head, query, key: sees(query, key), None, None, tokens, tokens, "cpu")
    attend = compiled(flex_attention)
    return lambda query, key, value: attend(query, key, value, block_mask=blocks)


def _sees_band(before: int, after: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (key >= query - before) & (key <= query + after)


def _sees_square(grid: Grid, kernel: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    reach = kernel // 2
    middle_row = (query // grid.width).clamp(reach, grid.height - 1 - reach)
    middle_column = (query % grid.width).clamp(reach, grid.width - 1 - reach)
    is_near_row = (key // grid.width - middle_row).abs() <= reach
    return is_near_row & ((key % grid.width - middle_column).abs() <= reach)


def _block_sparse(spec: str, grid: Grid, heads: int, head_width: int) -> Contest:
    operator = _build(spec, heads, head_width)
    side = operator.config.block
    rows = grid.height // side
    columns = grid.width // side
    kept = operator.config.kept_of(rows * columns)

    def in_blocks(part: torch.Tensor) -> torch.Tensor:
        # Blocks divide the grid: [B, H, N, E] -> [B, H, n, b, E].
        tiles = part.unflatten(2, (rows, side, columns, side)).transpose(3, 4)
        return tiles.flatten(4, 5).flatten(2, 3)

    def in_order(blocks: torch.Tensor) -> torch.Tensor:
        tiles = blocks.unflatten(2, (rows, columns)).unflatten(4, (side, side))
        return tiles.transpose(3, 4).flatten(2, 5)

    def by(attend: Call) -> Call:
        def call(*parts: torch.Tensor) -> torch.Tensor:
            query, key, value = map(in_blocks, parts)
            scores = query.detach().mean(3) @ key.detach().mean(3).mT
            return in_order(attend(query, key, value, scores.topk(kept).indices))

        return call

    flex_name = "FlexAttention, compiled"
    peers = {
        "a gather for each block": by(gather_blocks),
        "softmax under a mask of all pairs": by(mask_pairs_of_blocks),
        flex_name: by(attend_blocks_flexibly(side * side)),
    }
    context = example_context(operator, grid)
    inputs = example_tensors(operator, grid.tokens)
    return Contest(spec, inputs, lambda *parts: operator(*parts, context), peers, (flex_name,))


def gather_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Compute softmax of each block of queries over gathered blocks: [B, H, n, b, E] and the chosen, [B, H, n, K]."""
    sample = torch.arange(len(query))[:, None, None, None]
    head = torch.arange(query.shape[1])[:, None, None]
    keys = key[sample, head, chosen].flatten(3, 4)
    values = value[sample, head, chosen].flatten(3, 4)
    weights = (query @ keys.mT * query.shape[-1] ** -0.5).softmax(-1)
    return weights @ values


def mask_pairs_of_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Compute softmax over all keys under a mask, head by head, as `gather_blocks` does."""
    blocks, size = query.shape[2:4]
    visible = _see_blocks(chosen, blocks)
    mixed = []
    # One mask at a time: those of all heads would take gigabytes.
    for head in range(query.shape[1]):
        pairs = visible[:, head].repeat_interleave(size, 1).repeat_interleave(size, 2)
        parts = [part[:, head].flatten(1, 2) for part in (query, key, value)]
        mixed.append(F.scaled_dot_product_attention(*parts, attn_mask=pairs))
    return torch.stack(mixed, dim=1).unflatten(2, (blocks, size))


def attend_blocks_flexibly(size: int) -> Call:
    """Return FlexAttention, compiled, over the chosen blocks of `size` tokens, as `gather_blocks` computes it."""
    attend = compiled(flex_attention)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        visible = _see_blocks(chosen, query.shape[2])
        indices = visible.int().argsort(dim=-1, descending=True, stable=True).int()
        counts = visible.sum(-1, dtype=torch.int32)

        def sees(sample: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
            return visible[sample, head, row // size, column // size]

        # All of a chosen block is seen, so that no mask is computed within it. A tensor of its own says that none is
        # seen in part: torch names one that is given twice once.
        partly = (torch.zeros_like(counts), torch.zeros_like(indices))
        mask = BlockMask.from_kv_blocks(*partly, counts, indices, BLOCK_SIZE=size, mask_mod=sees)
        mixed = attend(query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3), block_mask=mask)
        return mixed.unflatten(2, query.shape[2:4])

    return call


def _see_blocks(chosen: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return whether a block of queries sees a block of keys, [B, H, n, n]."""
    return torch.zeros(*chosen.shape[:-1], blocks, dtype=torch.bool).scatter(-1, chosen, True)


def _gated_convolution(grid: Grid, heads: int, head_width: int) -> Contest:
    spec = "hyena_x(backend='compiled')"
    operator = _build(spec, heads, head_width)
    context = example_context(operator, grid)
    filters = [(one.weight[:, 0, :, 0], one.bias) for one in operator.convolutions.values()]

    def shift_and_sum(part: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        sequence = part.transpose(1, 2).flatten(2)
        taps = weight.shape[1]
        padded = F.pad(sequence, (0, 0, taps - 1, 0))
        convolved = bias
        for tap in range(taps):
            convolved = convolved + weight[:, tap] * padded[:, tap : tap + sequence.shape[1]]
        return convolved

    def gate(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = (shift_and_sum(part, *one) for part, one in zip((query, key, value), filters, strict=True))
        first, second, third = parts
        return (first * (second * third)).unflatten(2, (heads, head_width)).transpose(1, 2)

    inputs = example_tensors(operator, grid.tokens)
    return Contest(
        spec, inputs, lambda *parts: operator(*parts, context), {"shifts and sums, compiled": compiled(gate)}
    )


def _state_space(grid: Grid, heads: int, head_width: int) -> Contest:
    spec = f"mamba2(head_width={head_width}, chunk={CHUNK}, expand=1)"
    operator = _build(spec, heads, head_width)
    generator = torch.Generator().manual_seed(1)
    state = operator.config.state
    shapes = (heads, head_width), (state,), (state,), (heads,)
    *inputs, step = (torch.randn(1, grid.tokens, *shape, generator=generator) for shape in shapes)
    # As steps are at the start.
    inputs.append(F.softplus(step + operator.dt_bias.detach()))
    rate = -operator.A_log.detach().exp()

    def scan(value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        parts = [value * step[..., None], key, query, rate * step]
        forwards = ssd_minimal(*parts)
        backwards = ssd_minimal(*(part.flip(1) for part in parts)).flip(1)
        itself = (query * key).sum(-1)[..., None, None] * parts[0]
        return forwards + backwards - itself

    return Contest(f"scan of {spec}", inputs, operator.scan_chunks, {"SSD minimal, each way": scan})


def ssd_minimal(value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """Compute a state space one way, by decay matrices within chunks and between them; chunks divide the tokens.

    Args:
        value: [B, N, H, P].
        key, query: [B, N, S].
        log_decay: [B, N, H].
    """
    value, key, query = (part.unflatten(1, (-1, CHUNK)) for part in (value, key, query))
    logs = log_decay.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2)  # [B, H, T, Q]
    sums = logs.cumsum(-1)
    within = _decays_between(logs)
    mixed = torch.einsum("btis,btjs,bhtij,btjhp->btihp", query, key, within, value)
    until_end = (sums[..., -1:] - sums).exp()
    added = torch.einsum("btjs,bhtj,btjhp->bthps", key, until_end, value)
    # The state that enters a chunk is the decayed sum of what those before it added.
    between = _decays_between(F.pad(sums[..., -1], (1, 0)))[..., :-1, 1:]
    entering = torch.einsum("bhut,bthps->buhps", between, added)
    mixed = mixed + torch.einsum("btis,bthps,bhti->btihp", query, entering, sums.exp())
    return mixed.flatten(1, 2)


def _decays_between(logs: torch.Tensor) -> torch.Tensor:
    """Return the product of the decays after j up to i for every j up to i, zero above: [..., Q, Q]."""
    sums = logs.cumsum(-1)
    earlier = torch.ones(logs.shape[-1], logs.shape[-1], dtype=torch.bool).tril()
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(~earlier, float("-inf")).exp()


def _delta_rule(grid: Grid, heads: int, head_width: int) -> Contest:
    spec = f"gated_deltanet(chunk={CHUNK})"
    operator = _build(spec, heads, head_width)
    hidden_states = torch.randn(1, grid.tokens, heads * head_width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inputs = list(operator.project(hidden_states))

    def ours(*parts: torch.Tensor) -> torch.Tensor:
        return gated_delta_rule(*parts, chunk=CHUNK) + gated_delta_rule(*parts, chunk=CHUNK, backwards=True)

    def naive(*parts: torch.Tensor) -> torch.Tensor:
        return naive_delta_chunks(*parts) + naive_delta_chunks(*(part.flip(1) for part in parts)).flip(1)

    return Contest(f"scan of {spec}", inputs, ours, {"naive chunks, each way": naive})


def naive_delta_chunks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, strength: torch.Tensor, log_decay: torch.Tensor
) -> torch.Tensor:
    """Run the gated delta rule one way, row by row within chunks and then chunk by chunk; chunks divide the tokens.

    Args:
        query, key, value: [B, N, E].
        strength, log_decay: [B, N].
    """
    query, key, value, strength, log_decay = (
        part.unflatten(1, (-1, CHUNK)) for part in (query, key, value, strength, log_decay)
    )
    sums = log_decay.cumsum(-1)
    decays = _decays_between(log_decay)
    written = key * strength[..., None]
    system = -(written @ key.mT * decays).tril(-1)
    # The inverse of 1 - system, by forward substitution.
    rows = [system[..., 0, :]]
    for place in range(1, CHUNK):
        row = system[..., place, :]
        above = torch.stack(rows, dim=-2)
        rows.append(row + (row[..., None, :place] @ above)[..., 0, :])
    inverse = torch.stack(rows, dim=-2) + torch.eye(CHUNK, dtype=key.dtype)
    values = inverse @ (value * strength[..., None])
    recalls = inverse @ (written * sums.exp()[..., None])
    read = query @ key.mT * decays
    state = torch.zeros_like(key[:, 0, 0, :, None] * value[:, 0, 0, None])
    mixed = []
    for chunk in range(key.shape[1]):
        new = values[:, chunk] - recalls[:, chunk] @ state
        from_state = (query[:, chunk] * sums[:, chunk, :, None].exp()) @ state
        mixed.append(from_state + read[:, chunk] @ new)
        total = sums[:, chunk, -1, None]
        state = state * total[..., None].exp() + (key[:, chunk] * (total - sums[:, chunk]).exp()[..., None]).mT @ new
    return torch.stack(mixed, dim=1).flatten(1, 2)
