"""Annotations of shapes are true: operators run under jaxtyping's checker, which refuses tensors that do not fit."""

import inspect

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from diffusers_graft.operators import available, configure
from diffusers_graft.operators.base import BlockOperator, Mixer
from diffusers_graft.operators.conformance.case import Subject, example_site, in_context
from diffusers_graft.operators.ops.backends import WithBackends

OPERATORS = [name for name in available() if not issubclass(configure(name).owner, BlockOperator)]


def annotated_methods(operator):
    """Names of the methods that compute its output, each with shapes in its signature."""
    names = ["in_torch" if isinstance(operator, WithBackends) else "forward"]
    return [*names, *(name for name in ("reference", "countable") if hasattr(operator, name))]


def checked(operator, name):
    function = inspect.unwrap(getattr(type(operator), name))
    return jaxtyped(typechecker=beartype)(function)


@pytest.mark.parametrize("name", OPERATORS)
def test_shapes_of_operators_are_as_annotated(name):
    config = configure(name)
    subject = Subject(config, example_site(config.owner.kinds[0]))
    operator = subject.build()
    for method in annotated_methods(operator):
        arguments = in_context(operator, subject.inputs(), subject.context)
        output = checked(operator, method)(operator, *arguments)
        assert output.shape == subject.inputs()[0].shape


@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_of_another_shape_are_refused(name):
    config = configure(name)
    subject = Subject(config, example_site(config.owner.kinds[0]))
    operator = subject.build()
    inputs = subject.inputs()
    wrong = [inputs[0][0]]
    if isinstance(operator, Mixer):
        wrong = [inputs[0], inputs[1][:1], inputs[2]]
    for method in annotated_methods(operator):
        with pytest.raises(TypeCheckError):
            checked(operator, method)(operator, *wrong, subject.context)


def test_whole_numbers_are_refused():
    operator = configure("mlp").build(example_site("feed_forward"))
    with pytest.raises(TypeCheckError):
        checked(operator, "forward")(operator, torch.ones(1, 3, 12, dtype=torch.long), None)
