"""The contract that all operators share: configs, precision, sizes without tokens or memory."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GeometryError, GraftError, OperatorError
from diffusers_graft.injection.attention_core import mix
from diffusers_graft.injection.modules import AttentionSeat, FeedForwardSeat
from diffusers_graft.operators import AttentionOperator, Mixer, available, configure, get, parse_operator
from diffusers_graft.operators.base import BlockOperator
from diffusers_graft.operators.conformance.case import Subject, run
from diffusers_graft.operators.conformance.suite import example_site

from .examples import FEED_FORWARD, build, qkv


@pytest.mark.parametrize(
    "spec",
    [
        {"operator": "neighborhood", "kernel": 4},
        {"operator": "neighborhood", "kernel": 0},
        {"operator": "neighborhood", "dilation": 0},
        {"operator": "sliding_window", "window": (1, -1)},
        {"operator": "sliding_window", "window": 4},
        {"operator": "hyena_x", "kernel_size": 0},
        {"operator": "hyena_x", "layout": "4d"},
        {"operator": "linear_attention", "feature_map": "exp"},
        {"operator": "mlp", "expansion": 0},
        {"operator": "mlp", "activation": "geglu"},
        {"operator": "mlp", "expansion": float("inf")},
        {"operator": "mlp", "expansion": "4"},
        {"operator": "linear_attention", "value_conv": 2},
        {"operator": "linear_attention", "value_conv": -1},
        {"operator": "sliding_window", "window": (True, 4)},
        {"operator": "hyena_x", "kernel": 4},
        {"operator": "hyena_x", "init": "cold"},
        {"operator": "hyenax"},
        {"kernel": 3},
        3,
        {"operator": "pooled_keys", "stride": 0},
        {"operator": "identity", "output": "keys"},
        {"operator": "hyena_x", "layout": 5},
        {"operator": "mlp", "activation": {"a": 1}},
        {"operator": "mlp", "init": None},
        {"operator": "parallel", "residual": "False"},
        {"operator": "hyena_x", "backend": ["torch"]},
        {"operator": "self_attention", "heads": 0},
        {"operator": "hyena_se", "kernel_size": 1.5},
        {"operator": "hyena_y", "layout": "1d"},
    ],
)
def test_bad_settings_are_refused(spec):
    with pytest.raises(GraftError):
        configure(spec)


def define_with(config):
    type("Roll", (Mixer,), {"Config": config})


def test_settings_that_nothing_would_read_are_refused():
    class Config(Mixer.Config):
        shift: int = 1

    with pytest.raises(
        OperatorError, match="Roll.Config is not a dataclass, so its settings are not read: decorate it"
    ):
        define_with(Config)


def test_a_config_without_new_settings_needs_the_decorator_too():
    class Config(Mixer.Config):
        init = "random"

    with pytest.raises(OperatorError, match="Roll.Config is not a dataclass"):
        define_with(Config)


def test_a_config_is_frozen_and_its_settings_are_keywords():
    @dataclass(frozen=True)
    class ByPosition(Mixer.Config):
        shift: int = 1

    with pytest.raises(OperatorError, match="given by position: decorate it"):
        define_with(ByPosition)
    with pytest.raises(OperatorError, match="Roll.Config is not an OperatorConfig"):
        define_with(dict)


def test_a_config_is_not_taken_from_its_owner():
    owner = get("hyena_x")

    class Other(owner):
        Config = owner.Config

    assert owner.Config.owner is owner
    assert Other.Config.owner is Other


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        "moe_mlp",
        "hyena_x",
        "hyena_se",
        {"operator": "sliding_window", "window": (3, 40)},
        {"operator": "linear_attention", "value_conv": 3},
    ],
    ids=str,
)
def test_autocast_gives_one_precision_in_every_mode(spec, grad):
    config = configure(spec)
    operator = config.build(example_site(config.owner.kinds[0]))
    inputs = [part.float() for part in qkv(300)] if isinstance(operator, Mixer) else [torch.randn(2, 9, 12)]
    context = Context(grid=Grid(height=15, width=20))
    torch._dynamo.reset()
    calls = operator, torch.compile(operator, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        eager, compiled = (call(*inputs, context) for call in calls)
    with torch.autocast("cpu", torch.bfloat16):
        assert eager.dtype == compiled.dtype == operator(*inputs, context).dtype
    torch.testing.assert_close(compiled, eager, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["neighborhood", "pooled_keys", "gated_deltanet"])
def test_a_batch_of_none(name):
    operator, context = build(name), Context(grid=Grid(height=17, width=18))
    inputs = (
        [part[:0] for part in qkv(306)]
        if isinstance(operator, Mixer)
        else [torch.zeros(0, 306, 12, dtype=torch.float64)]
    )
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert operator(*inputs, context).shape == inputs[0].shape


@pytest.mark.parametrize("name", [name for name in available() if not issubclass(get(name), BlockOperator)])
def test_no_tokens_are_refused(name):
    """By the seat, so that no operator has to."""
    site = example_site(get(name).kinds[0])
    operator = configure(name).resolved(site).build(site)
    if isinstance(operator, Mixer):
        run = partial(mix, operator, *qkv(0), Context())
    else:
        whole = isinstance(operator, AttentionOperator)
        seat = AttentionSeat(site, operator, ("hidden_states",)) if whole else FeedForwardSeat(site, operator)
        run = partial(seat, torch.zeros(1, 0, 12))
    with pytest.raises(GeometryError, match=f"{name} was given no tokens"):
        run()


@pytest.mark.parametrize("name", available())
def test_runs_without_memory(name):
    config = configure(name)
    subject = Subject(config, example_site(config.owner.kinds[0]))
    with torch.device("meta"):
        operator = config.resolved(subject.site).build(subject.site)
    inputs = [tensor.float().to("meta") for tensor in subject.inputs()]
    assert run(operator, inputs, subject.context).shape == inputs[0].shape


def test_an_operator_refuses_another_kind():
    with pytest.raises(OperatorError, match="replaces self_attention"):
        configure("hyena_x").build(FEED_FORWARD)


@pytest.mark.parametrize(
    ("spec", "number"),
    [
        ("neighborhood(dilation=2)", "2209.15001"),
        ("neighborhood(kernel=9, stride=3)", "2502.04507"),
        ("neighborhood(shape='circle')", "2412.16112"),
        ("neighborhood(far=4)", "2412.16112"),
        ("linear_attention(feature_map='softmax')", "2402.04347"),
        ("linear_attention(feature_map='polynomial')", "2509.24899"),
        ("linear_attention(heads=2)", "2501.12976"),
        ("linear_attention(rotary='halves')", "2509.24695"),
        ("block_sparse(mass=0.9)", "2507.13546"),
        ("sparse_linear(choose='nearest')", "2601.04342"),
        ("gated_deltanet(decay='channel')", "2510.26692"),
    ],
)
def test_settings_have_papers_of_their_own(spec, number):
    config = parse_operator(spec)
    usual = configure(config.owner.name).papers
    assert usual == (config.owner.paper,)
    assert set(usual) < set(config.papers)
    assert any(paper.endswith(f", arXiv {number}") for paper in config.papers)
