"""Two mixers on the heads of one attention."""

from dataclasses import replace

import pytest
import torch

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import OperatorError
from diffusers_graft.injection.attention_core import mix, mix_with_others
from diffusers_graft.operators import configure

from .examples import ATTENTION, build, qkv


@pytest.mark.parametrize("split", [0.7, 2, (2, 0)])
def test_a_hybrid_mixes_each_head_by_its_own(split):
    first = (0, 1) if split != (2, 0) else (2, 0)
    operator, inputs = build({"operator": "hybrid", "second": "linear_attention", "split": split}), qkv(30)
    mixed = operator(*inputs, Context())
    for name, heads in (("sliding_window", first), ("linear_attention", {0, 1, 2} - set(first))):
        for head in heads:
            alone = build(name, replace(ATTENTION, heads=1))(*(part[:, head : head + 1] for part in inputs), Context())
            torch.testing.assert_close(mixed[:, head : head + 1], alone)


@pytest.mark.parametrize("batch", [(), (1,)])
def test_a_hybrid_gives_each_head_its_own_mask(batch):
    mask = torch.rand(*batch, 3, 6, 6) > 0.4
    mask[..., 0] = True
    settings_ = {"operator": "hybrid", "first": "self_attention", "second": "self_attention", "split": (1,)}
    expected = build("self_attention")(*qkv(6), Context(mask=mask))
    torch.testing.assert_close(build(settings_)(*qkv(6), Context(mask=mask)), expected)


@pytest.mark.parametrize(
    ("second", "refused"),
    [("hyena_x", False), ("sliding_window(window=(2, 0))", False), ("hyena_x(layout='2d')", True)],
)
def test_a_hybrid_is_causal_where_both_mixers_are(second, refused):
    operator, context = (
        build(f"hybrid(first='self_attention', second={second!r}, split=1)"),
        Context(grid=Grid(height=3, width=4), causal=True),
    )
    if refused:
        with pytest.raises(OperatorError, match="hybrid looks ahead"):
            mix(operator, *qkv(12), context)
        return
    inputs, changed = qkv(12), qkv(12)
    changed[2][:, :, 7:] += 1
    assert torch.equal(mix(operator, *inputs, context)[:, :, :7], mix(operator, *changed, context)[:, :, :7])


@pytest.mark.parametrize("split", [0, 3, 10**30, 0.0, 1.5, (0, 0), (3,), (), "half", True])
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(OperatorError, match="hybrid: split"):
        build({"operator": "hybrid", "split": split})


def test_a_hybrid_needs_two_heads():
    with pytest.raises(OperatorError, match="has one head, and two mixers need two"):
        build("hybrid", replace(ATTENTION, heads=1))


def test_a_hybrid_of_what_is_no_mixer_is_refused():
    with pytest.raises(OperatorError, match="first is a mixer, one that replaces a softmax; mlp is not"):
        configure({"operator": "hybrid", "first": "mlp"})


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("first", "second"),
    [("hyena_y", "neighborhood"), ("sliding_window", "linear_attention"), ("hybrid(split=1)", "identity")],
)
def test_beside_text_each_mixer_follows_its_rule_as_alone(first, second, before):
    grid, text = Grid(height=5, width=6), 7
    sequence = qkv(grid.tokens + text, heads=4)
    context = Context(grid=grid, text_tokens=text)
    start = text if before else 0
    site = replace(ATTENTION, heads=4, width=16)
    operator = build({"operator": "hybrid", "first": first, "second": second, "split": (3, 0, 1)}, site)
    together = mix_with_others(operator, *sequence, context, start=start, image=grid.tokens)
    for part, heads in zip(operator.parts, operator.groups, strict=True):
        inputs = [tensor[:, list(heads)] for tensor in sequence]
        alone = mix_with_others(part, *inputs, context, start=start, image=grid.tokens)
        torch.testing.assert_close(together[:, list(heads)], alone, rtol=1e-12, atol=1e-12)
