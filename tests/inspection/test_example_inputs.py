"""Inputs for families whose arguments are known."""

import pytest
import torch

from diffusers_graft.errors import GeometryError, ModelError
from diffusers_graft.inspection import example_inputs, predict

from ..models import tiny_dit, tiny_pixart
from .models import tiny


@pytest.mark.parametrize("make", [tiny_dit, tiny_pixart])
def test_inputs_run_and_depend_on_the_seed_alone(make):
    model = make().bfloat16()
    inputs = example_inputs(model, batch_size=2, size=8, seed=3)
    assert predict(model, inputs).shape[0] == 2
    assert inputs["hidden_states"].dtype == torch.bfloat16
    assert inputs["timestep"].dtype == torch.int64
    again = example_inputs(model, batch_size=2, size=8, seed=3)
    other = example_inputs(model, batch_size=2, size=8, seed=4)
    assert torch.equal(inputs["hidden_states"], again["hidden_states"])
    assert not torch.equal(inputs["hidden_states"], other["hidden_states"])


def test_sizes_without_a_patch_and_families_that_are_not_known_are_refused():
    with pytest.raises(GeometryError, match="Latents of 1 x 1 hold no patch of 2 x 2"):
        example_inputs(tiny_dit(), size=1)
    with pytest.raises(ModelError, match="No example inputs are known for SD3Transformer2DModel, only for"):
        example_inputs(tiny("SD3Transformer2DModel"))
