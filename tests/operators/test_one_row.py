"""Sequences of one row, which are grids like any other: outputs and gradients are those of the references."""

import pytest
import torch

from diffusers_graft.core.context import Grid
from diffusers_graft.operators import configure
from diffusers_graft.operators.conformance.case import Subject, in_context

from .examples import ATTENTION, with_gradients

SPECS = [
    "block_sparse(block=4, keep=2)",
    "block_sparse(block=4, keep=2, gate='token')",
    "sparse_linear(block=4, keep=2)",
    "sparse_linear(block=4, keep=2, choose='nearest')",
    "neighborhood(kernel=5, shape='circle', far=3)",
    "neighborhood(kernel=12, stride=4)",
    "radial",
    "compressed_linear",
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_sequence_of_one_row(spec):
    subject = Subject(configure(spec), ATTENTION, Grid(height=1, width=301))
    operator = subject.build()

    def outputs(call):
        return with_gradients(
            lambda *inputs: call(*in_context(operator, list(inputs), subject.context)), subject.inputs()
        )

    reference = getattr(operator, "reference", operator)
    for one, other in zip(outputs(operator), outputs(reference), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
