"""Finding the parts of a model that can be replaced, by looking at its modules."""
from __future__ import annotations

from collections import Counter
from typing import Any

from diffusers import ModelMixin
from diffusers.models import activations
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from ..errors import ModelError, OperatorError
from ..operators import LinearPair, Projections
from ..site import Site, Sites
from .families import family_of


def find_sites(model: ModelMixin) -> Sites:
    """Every replaceable part of a model, in forward order; the same sites before and after grafting.

    Raises:
        ModelError: not a diffusers model, or of a family this version cannot read.
    """
    require_model(model)
    family_of(model)
    seen: Counter[str] = Counter()
    sites = []
    for path, module in model.named_modules():
        site = getattr(module, "graft_site", None) or _describe(path, module, seen)
        if site is not None:
            seen[site.kind] += 1
            sites.append(site)
    return Sites(sites)


def require_model(model: Any) -> None:
    """Raise `ModelError` unless given a diffusers model; a pipeline is told apart, as people pass those by mistake."""
    if isinstance(model, ModelMixin):
        return
    parts = getattr(model, "components", None)
    hint = " That is a pipeline: pass its transformer, pipe.transformer." if isinstance(parts, dict) else ""
    raise ModelError(f"A graft needs a diffusers model (a ModelMixin); got {type(model).__name__}.{hint}")


def _describe(path: str, module: nn.Module, seen: Counter[str]) -> Site | None:
    if isinstance(module, Attention):
        kind = _attention_kind(module)
        return Site(kind=kind, index=seen[kind], path=path, width=module.query_dim, heads=module.heads,
                    head_width=module.inner_dim // module.heads)  # fmt: skip
    if isinstance(module, FeedForward):
        first, last = module.net[0], module.net[2]
        return Site(kind="feed_forward", index=seen["feed_forward"], path=path, width=last.out_features,
                    hidden=last.in_features, activation=_activation(first))  # fmt: skip
    return None


def _attention_kind(attention: Attention) -> str:
    if attention.added_kv_proj_dim is not None:
        return "joint_attention"
    return "cross_attention" if attention.is_cross_attention else "self_attention"


def _activation(first: nn.Module) -> str:
    """diffusers' `activation_fn` name of a feed-forward's first layer."""
    if isinstance(first, activations.GELU):
        return "gelu-approximate" if first.approximate == "tanh" else "gelu"
    names = {
        activations.GEGLU: "geglu", activations.ApproximateGELU: "geglu-approximate",
        activations.SwiGLU: "swiglu", activations.LinearActivation: "linear-silu",
    }  # fmt: skip
    return names.get(type(first), type(first).__name__)


def linear_pair(feed_forward: nn.Module) -> LinearPair:
    """The two linear layers of a feed-forward. Raises `OperatorError` where there is no such pair to start from."""
    activation = _activation(feed_forward.net[0])
    if activation not in ("gelu", "gelu-approximate", "geglu-approximate", "linear-silu"):
        raise OperatorError(
            f"A feed-forward with {activation} is not down(activation(up(x))), so nothing can start from it: "
            'choose init="random".'
        )
    up, down = feed_forward.net[0].proj, feed_forward.net[2]
    return LinearPair(up=up.weight, up_bias=up.bias, down=down.weight, down_bias=down.bias, activation=activation)


def projections(attention: nn.Module) -> Projections:
    """The four linear layers of an attention. Raises `OperatorError` where they are not four plain linear layers."""
    layers = {name: getattr(attention, f"to_{name[0]}", None) for name in ("query", "key", "value")}
    layers["out"] = (getattr(attention, "to_out", None) or [None])[0]
    if odd := sorted(name for name, layer in layers.items() if not isinstance(layer, nn.Linear)):
        raise OperatorError(
            f"{type(attention).__name__} has no plain linear layer for {', '.join(odd)}, so nothing can start from its "
            'projections: choose init="random".'
        )
    biases = {f"{name}_bias": layer.bias for name, layer in layers.items()}
    return Projections(**{name: layer.weight for name, layer in layers.items()}, **biases)
