"""Pretrained weights that operators start from: the linear layers of the parts they replace."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers.models import activations
from diffusers.models.attention import FeedForward
from torch import nn

from ..errors import OperatorError
from ..operators.base import LinearPair, Projections, dense_weight

# Activations of diffusers' feed-forwards that operators can start from, without a gate and with one.
UNGATED = ("gelu", "gelu-approximate", "geglu-approximate", "linear-silu")
GATED = ("geglu", "swiglu")

_NAMES = {
    activations.GEGLU: "geglu",
    activations.ApproximateGELU: "geglu-approximate",
    activations.SwiGLU: "swiglu",
    activations.LinearActivation: "linear-silu",
}


def activation_of(feed_forward: nn.Module) -> str:
    """Return diffusers' `activation_fn` name; for feed-forwards of another class, the name of that."""
    if not isinstance(feed_forward, FeedForward):
        return type(feed_forward).__name__
    first = feed_forward.net[0]
    if isinstance(first, activations.GELU):
        return "gelu-approximate" if first.approximate == "tanh" else "gelu"
    return _NAMES.get(type(first), type(first).__name__)


def linear_pair(feed_forward: nn.Module, path: str = "a feed-forward") -> LinearPair:
    """Read the linear layers of a feed-forward. Raises `OperatorError` where nothing can start from them."""
    activation = activation_of(feed_forward)
    if not isinstance(feed_forward, FeedForward) or activation not in (*UNGATED, *GATED):
        raise OperatorError(
            f"Nothing can start from {path}: with {activation} it is not down(activation(up(x))). "
            "Choose init='random'."
        )
    candidates = [feed_forward.net[0].proj, feed_forward.net[2]]
    layers = [layer for layer in candidates if isinstance(layer, nn.Linear)]
    if len(layers) < 2:
        odd = sorted({type(layer).__name__ for layer in candidates if not isinstance(layer, nn.Linear)})
        raise OperatorError(
            f"The layers of {path} are {', '.join(odd)}, and not plain linear ones to start from. Fuse LoRA into the "
            'weights first (pipe.fuse_lora, pipe.unload_lora_weights), or choose init="random".'
        )
    up, down = layers
    if activation in UNGATED:
        return LinearPair(up=up.weight, up_bias=up.bias, down=down.weight, down_bias=down.bias, activation=activation)
    # diffusers has both input layers of a gated unit in one, the gate behind.
    weight, gate = dense_weight("feed-forward", up.weight).chunk(2)
    bias = gate_bias = None
    if up.bias is not None:
        bias, gate_bias = up.bias.chunk(2)
    return LinearPair(
        up=weight,
        up_bias=bias,
        gate=gate,
        gate_bias=gate_bias,
        down=down.weight,
        down_bias=down.bias,
        activation=activation,
    )


def projections(attention: nn.Module, path: str) -> Projections:
    """Read the four linear layers of an attention.

    Raises `OperatorError` where they are not four plain ones, of one width, that take tokens of one width.
    """
    out = getattr(attention, "to_out", None)
    if isinstance(out, nn.ModuleList | nn.Sequential):
        out = out[0]
    candidates = {
        "query": getattr(attention, "to_q", None),
        "key": getattr(attention, "to_k", None),
        "value": getattr(attention, "to_v", None),
        "out": out,
    }
    layers = {name: layer for name, layer in candidates.items() if isinstance(layer, nn.Linear)}
    odd = sorted(candidates.keys() - layers.keys())
    if odd:
        raise OperatorError(
            f"{path} has no plain linear layer for {', '.join(odd)}, so nothing can start from its "
            'projections: choose init="random".'
        )
    inputs = {name: layer for name, layer in layers.items() if name != "out"}
    widths = {name: layer.out_features for name, layer in inputs.items()} | {"out": layers["out"].in_features}
    if len(set(widths.values())) > 1:
        raise OperatorError(
            f"The projections of {path} differ in width ({_list(widths)}), as where heads share keys, so nothing "
            'can start from them: choose init="random".'
        )
    tokens = {name: layer.in_features for name, layer in inputs.items()}
    if len(set(tokens.values())) > 1:
        raise OperatorError(
            f"The projections of {path} take tokens of several widths ({_list(tokens)}): it mixes two sequences, "
            "which no operator for one can start from. Leave it as it is."
        )
    biases = {f"{name}_bias": layer.bias for name, layer in layers.items()}
    return Projections(**{name: layer.weight for name, layer in layers.items()}, **biases)


def _list(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {width}" for name, width in widths.items())
