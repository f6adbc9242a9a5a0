"""What operators start from: the linear layers of the parts they replace."""

from __future__ import annotations

from diffusers.models import activations
from diffusers.models.attention import FeedForward
from torch import nn

from ..errors import OperatorError
from ..operators.base import LinearPair, Projections, dense_weight

# Activations of diffusers' feed-forwards that operators can start from, without a gate and with one.
UNGATED = ("gelu", "gelu-approximate", "geglu-approximate", "linear-silu")
GATED = ("geglu", "swiglu")


def activation_of(feed_forward: nn.Module) -> str:
    """diffusers' `activation_fn` name; of feed-forwards that are not diffusers' own, the name of their class."""
    if not isinstance(feed_forward, FeedForward):
        return type(feed_forward).__name__
    first = feed_forward.net[0]
    if isinstance(first, activations.GELU):
        return "gelu-approximate" if first.approximate == "tanh" else "gelu"
    names = {
        activations.GEGLU: "geglu",
        activations.ApproximateGELU: "geglu-approximate",
        activations.SwiGLU: "swiglu",
        activations.LinearActivation: "linear-silu",
    }
    return names.get(type(first), type(first).__name__)


def linear_pair(feed_forward: nn.Module, path: str = "a feed-forward") -> LinearPair:
    """Read the linear layers of a feed-forward. Raises `OperatorError` where `path` has no such layers to start from."""
    activation = activation_of(feed_forward)
    if activation not in (*UNGATED, *GATED):
        raise OperatorError(
            f"Nothing can start from {path}: with {activation} it is not down(activation(up(x))). Choose init='random'."
        )
    up, down = feed_forward.net[0].proj, feed_forward.net[2]
    if odd := sorted({type(layer).__name__ for layer in (up, down) if not isinstance(layer, nn.Linear)}):
        raise OperatorError(
            f"The layers of {path} are {', '.join(odd)}, and not plain linear ones to start from. Fuse LoRA into the "
            'weights first (pipe.fuse_lora, pipe.unload_lora_weights), or choose init="random".'
        )
    layers = {"down": down.weight, "down_bias": down.bias, "activation": activation}
    if activation in UNGATED:
        return LinearPair(up=up.weight, up_bias=up.bias, **layers)
    # diffusers has both input layers of a gated unit in one, the gate behind.
    weight, gate = dense_weight("feed-forward", up.weight).chunk(2)
    bias, gate_bias = (None, None) if up.bias is None else up.bias.chunk(2)
    return LinearPair(up=weight, up_bias=bias, gate=gate, gate_bias=gate_bias, **layers)


def projections(attention: nn.Module, path: str) -> Projections:
    """The four linear layers of an attention. Raises `OperatorError` where they are not four plain ones of one width."""
    layers = {name: getattr(attention, f"to_{name[0]}", None) for name in ("query", "key", "value")}
    out = getattr(attention, "to_out", None)
    layers["out"] = out[0] if isinstance(out, nn.ModuleList | nn.Sequential) else out
    if odd := sorted(name for name, layer in layers.items() if not isinstance(layer, nn.Linear)):
        raise OperatorError(
            f"{path} has no plain linear layer for {', '.join(odd)}, so nothing can start from its "
            'projections: choose init="random".'
        )
    widths = {name: layer.in_features if name == "out" else layer.out_features for name, layer in layers.items()}
    if len(set(widths.values())) > 1:
        told = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise OperatorError(
            f"The projections of {path} differ in width ({told}), as where heads share keys, so nothing "
            'can start from them: choose init="random".'
        )
    tokens = {name: layers[name].in_features for name in ("query", "key", "value")}
    if len(set(tokens.values())) > 1:
        told = ", ".join(f"{name} {width}" for name, width in tokens.items())
        raise OperatorError(
            f"The projections of {path} take tokens of several widths ({told}): it mixes two sequences, "
            "which no operator for one can start from. Leave it as it is."
        )
    biases = {f"{name}_bias": layer.bias for name, layer in layers.items()}
    return Projections(**{name: layer.weight for name, layer in layers.items()}, **biases)
