"""Gradient checkpointing under a graft."""

import pytest
import torch

from diffusers_graft.inspection import example_inputs

from ..inspection.models import inputs_of, tiny
from ..models import tiny_dit


def test_gradient_checkpointing():

    gradients = []
    for checkpointing in (False, True):
        model = tiny_dit()
        model.set_graft({"self_attention[:]": "neighborhood"})
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        inputs = example_inputs(model, batch_size=2)
        torch.manual_seed(0)
        model(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("spec", ["neighborhood", {"operator": "hyena_x", "layout": "2d"}], ids=str)
def test_gradient_checkpointing_of_two_forwards_at_once(spec):
    """Blocks that run again are told what they were told the first time, not what the last forward was."""
    gradients = []
    for checkpointing in (False, True):
        model, inputs = tiny("SanaTransformer2DModel").train(), inputs_of("SanaTransformer2DModel")
        model.set_graft({"self_attention[:]": {"operator": spec} if isinstance(spec, str) else spec})
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(2)
        images = torch.randn(2, 4, 4, 12), torch.randn(2, 4, 8, 6)
        sum(model(**{**inputs, "hidden_states": image}).sample.square().sum() for image in images).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
    model.unset_graft()
    functions = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    assert {function.__module__ for function in functions if function} == {"diffusers.models.modeling_utils"}
