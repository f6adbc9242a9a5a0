"""Gated DeltaNet, which starts from the original's projections."""

import pytest
import torch

from diffusers_graft.core.context import Context
from diffusers_graft.errors import GraftError
from diffusers_graft.operators import Projections, configure

from .examples import with_gradients
from .recurrences import build, draw, parameters


def attention_projections(biases=True):
    weights = {name: draw(12, 12, seed=seed) for seed, name in enumerate(("query", "key", "value", "out"))}
    return Projections(**weights, **{f"{name}_bias": draw(12, seed=7) for name in weights if biases})


@pytest.mark.parametrize("biases", [True, False])
def test_gated_deltanet_starts_from_the_projections(biases):
    operator, original = build("gated_deltanet"), attention_projections(biases)
    operator.init_from(original)
    for name in ("query", "key", "value", "out"):
        layer, bias = operator.get_submodule(f"{name[0]}_proj"), getattr(original, f"{name}_bias")
        assert torch.equal(layer.weight, getattr(original, name))
        assert torch.equal(layer.bias, torch.zeros(12) if bias is None else bias)


def test_gated_deltanet_of_one_token_is_its_value():
    """What is written in full to an empty state and asked for by its own key comes back as it was."""
    operator, original = build("gated_deltanet"), attention_projections()
    operator.init_from(original)
    operator.k_proj = operator.q_proj
    torch.nn.init.zeros_(operator.b_proj.weight)
    token = draw(1, 1, 12)
    value = token @ original.value.T + original.value_bias
    torch.testing.assert_close(operator(token, Context()), 0.5 * value @ original.out.T + original.out_bias)


def test_gated_deltanet_is_the_mean_of_both_directions():
    one, both = build({"operator": "gated_deltanet", "bidirectional": False}), build("gated_deltanet")
    both.load_state_dict(one.state_dict())
    hidden_states = draw(2, 70, 12)
    back = one(hidden_states.flip(1), Context()).flip(1)
    torch.testing.assert_close(both(hidden_states, Context()), (one(hidden_states, Context()) + back) / 2)


def test_gated_deltanet_adds_few_tensors():
    assert parameters("gated_deltanet") == 5_313_024 + 2 * 16 * 1152 + 2 * 16


def test_a_decay_for_each_channel_by_hand():
    """Kimi Delta Attention: S <- Diag(d) S; S <- S + b k (v - S^T k)^T; o = S^T q, in one direction."""
    operator = build({"operator": "gated_deltanet", "decay": "channel", "bidirectional": False, "chunk": 32})
    hidden_states = draw(2, 70, 12)

    def by_hand(hidden_states):
        heads = [
            part.view(2, 70, 3, 4)
            for part in (
                operator.q_proj(hidden_states),
                operator.k_proj(hidden_states),
                operator.v_proj(hidden_states),
            )
        ]
        query, key, value = heads
        query = query / query.norm(dim=-1, keepdim=True)
        key = key / key.norm(dim=-1, keepdim=True)
        strength = operator.b_proj(hidden_states).sigmoid()
        step = torch.nn.functional.softplus(operator.a_proj(hidden_states) + operator.dt_bias).view(2, 70, 3, 4)
        decay = (-operator.A_log.exp()[:, None] * step).exp()
        state = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
        outputs = []
        for n in range(70):
            state = decay[:, n, :, :, None] * state
            recalled = torch.einsum("bhkv,bhk->bhv", state, key[:, n])
            written = strength[:, n, :, None] * (value[:, n] - recalled)
            state = state + key[:, n, :, :, None] * written[:, :, None]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, n]))
        return operator.o_proj(torch.stack(outputs, dim=1).flatten(2))

    given = with_gradients(lambda part: operator(part, Context()), [hidden_states])
    for one, other in zip(given, with_gradients(by_hand, [hidden_states]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_equal_decays_of_all_channels_are_that_of_the_head():
    one, each = build("gated_deltanet"), build({"operator": "gated_deltanet", "decay": "channel"})
    for name in ("q_proj", "k_proj", "v_proj", "b_proj", "o_proj"):
        each.get_submodule(name).load_state_dict(one.get_submodule(name).state_dict())
    with torch.no_grad():
        each.A_log.copy_(one.A_log)
        each.dt_bias.copy_(one.dt_bias.repeat_interleave(4))
        torch.nn.init.zeros_(one.a_proj.weight)
        torch.nn.init.zeros_(each.a_proj[1].weight)
    hidden_states = draw(2, 70, 12)
    torch.testing.assert_close(each(hidden_states, Context()), one(hidden_states, Context()))


def test_strong_decays_of_channels_stay_finite():
    """Decays since a chunk began would underflow, and their inverses overflow."""
    operator = build({"operator": "gated_deltanet", "decay": "channel"}).float()
    torch.nn.init.constant_(operator.A_log, 4.0)
    torch.nn.init.constant_(operator.dt_bias, 3.0)
    inputs = draw(1, 200, 12).float()
    given, expected = (
        with_gradients(call, [inputs])
        for call in (lambda part: operator(part, Context()), lambda part: operator.reference(part, Context()))
    )
    for one, other in zip(given, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_the_published_parts_start_as_if_they_were_not_there(gate):
    plain = build("gated_deltanet")
    full = build({"operator": "gated_deltanet", "short_conv": 4, "output_gate": gate})
    full.load_state_dict(plain.state_dict(), strict=False)
    original = attention_projections()
    plain.init_from(original)
    full.init_from(original)
    hidden_states = draw(2, 70, 12)
    torch.testing.assert_close(full(hidden_states, Context()), plain(hidden_states, Context()))


def test_the_output_norm_gives_every_head_the_size_of_values():
    operator, original = build({"operator": "gated_deltanet", "output_norm": True}), attention_projections()
    operator.init_from(original)
    seen = []
    operator.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    operator(draw(2, 70, 12), Context())
    expected = (original.value.square().sum(1) + original.value_bias.square()).sqrt()
    normed = (seen[0] / expected).view(2, 70, 3, 4)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(2, 70, 3, dtype=torch.float64), rtol=0.01, atol=0)


def test_kda_at_dit_xls_width_adds_the_tensors_counted():
    """Decays through 72 channels, a bias for each of 1,152 and a rate for each of 16 heads."""
    added = parameters({"operator": "gated_deltanet", "decay": "channel"}) - 5_313_024 - 16 * 1152
    assert added == 1152 * 72 + 72 * 1152 + 1152 + 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "token"}, "decay of gated_deltanet"),
        ({"output_gate": "relu"}, "output_gate of gated_deltanet"),
        ({"short_conv": -1}, "short_conv is a whole number from 0"),
        ({"silu": 1}, "silu is True or False"),
        ({"decay": "channel", "backend": "fla"}, "has one decay for each head"),
    ],
    ids=str,
)
def test_options_that_are_none_are_refused(settings, message):
    with pytest.raises(GraftError, match=message):
        configure({"operator": "gated_deltanet", **settings})
