"""Reading a diffusers model: which parts it has, how its tokens lie, what its forward takes."""

from .example_inputs import example_inputs
from .families import Family, argument_names, bind_arguments, context_of, family_of, read_context
from .find_sites import find_sites, require_model
from .forward import evaluating, predict
from .inline_feed_forwards import inline_feed_forwards
from .pretrained_weights import linear_pair, projections

__all__ = [
    "Family",
    "argument_names",
    "bind_arguments",
    "context_of",
    "evaluating",
    "example_inputs",
    "family_of",
    "find_sites",
    "inline_feed_forwards",
    "linear_pair",
    "predict",
    "projections",
    "read_context",
    "require_model",
]
