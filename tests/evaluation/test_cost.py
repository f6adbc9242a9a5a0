"""Parameters and floating-point operations of models and grafts."""

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

import diffusers_graft as dg
from diffusers_graft.evaluation.cost import count_flops, count_parameters

from ..inspection.models import inputs_of, tiny
from ..models import tiny_dit, tiny_pixart


@pytest.mark.parametrize("model", [tiny_dit(), tiny_pixart()], ids=["dit", "pixart"])
def test_flops_of_a_self_graft_are_the_originals(model):
    """The operators' own prices, and torch's counter for the rest, make what the counter makes of the original."""
    original = count_flops(model)
    model.set_graft({"self_attention[:]": "self_attention", "feed_forward[:]": "mlp"})
    assert count_flops(model) == original
    model.unset_graft()
    model.set_graft({"self_attention[:]": "neighborhood", "feed_forward[0]": {"operator": "mlp", "expansion": 6}})
    attention = 4 * 16 * (16 - 9) * 16 * len(model.transformer_blocks)
    assert count_flops(model) == original - attention + 4 * 16 * 16 * 32
    model.unset_graft()
    model.set_graft({"self_attention[0]": "hyena_x"})
    (operator,) = model.graft.operators().values()
    assert count_flops(model) == original - 4 * 16 * 16 * 16 + operator.flops(16)
    assert not operator._forward_hooks
    assert not operator._forward_pre_hooks


def test_flops_of_linear_attention_on_a_prompt():
    """16 queries, 12 keys, 2 heads of 8, 3 layers: two products with the state and one with its normaliser."""
    model = tiny_pixart()
    original = count_flops(model)
    model.set_graft({"cross_attention[:]": "linear_attention"})
    assert count_flops(model) == original + 3 * 2 * (2 * 12 * 8 * 8 + 2 * 16 * 8 * 8 + 2 * 16 * 8 - 4 * 16 * 12 * 8)


def test_flops_of_pooled_keys_where_the_stride_does_not_divide_the_grid():
    """9 queries of width 16 on a grid of 3 x 3, whose keys and values become 2 x 2."""
    model, inputs = (
        tiny_dit(),
        {"timestep": torch.ones(1, dtype=torch.long), "class_labels": torch.zeros(1, dtype=torch.long)},
    )
    inputs["hidden_states"] = torch.zeros(1, 1, 6, 6)
    original = count_flops(model, inputs)
    model.set_graft({"self_attention[0]": "pooled_keys"})
    assert count_flops(model, inputs) == original - 4 * 9 * 9 * 16 + 4 * 9 * 4 * 16 + 2 * 2 * 4 * 4 * 16


@pytest.mark.parametrize(
    ("operator", "flops"),
    [
        ("neighborhood", 4 * 36 * 27 * 16),
        ({"operator": "hybrid", "first": "neighborhood", "second": "identity", "split": 1}, 4 * 36 * 27 * 8),
        (
            {"operator": "hybrid", "first": "pooled_keys", "second": "identity", "split": 1},
            4 * 3 * 2 * 2 * (36 + 4) * 8,
        ),
    ],
    ids=str,
)
def test_flops_on_a_video(operator, flops):
    """36 tokens of width 16 in 3 frames of 3 x 4: windows of 27 tokens, and 3 x 2 x 2 pooled keys."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
    )
    inputs = {
        "hidden_states": torch.zeros(1, 4, 3, 3, 4),
        "timestep": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(1, 2, 8),
    }
    original = count_flops(model, inputs)
    model.set_graft({"self_attention[0]": operator})
    assert count_flops(model, inputs) == original - 4 * 36 * 36 * 16 + flops


@pytest.mark.parametrize(
    "name",
    [
        "FluxTransformer2DModel",
        "LatteTransformer3DModel",
        "PixArtTransformer2DModel",
        "ZImageTransformer2DModel",
        "PriorTransformer",
    ],
)
def test_flops_of_a_self_graft_are_the_originals_whatever_an_attention_is_given(name):
    """A prompt beside the image, the frames of one place, keys of a prompt alone, a list of images, tokens on no grid."""
    model = tiny(name)
    original = count_flops(model, inputs_of(name))
    model.set_graft(
        {site.address: "self_attention" for site in dg.find_sites(model) if site.kind.endswith("attention")}
    )
    assert count_flops(model, inputs_of(name)) == original


def test_parameters_that_run():
    model = tiny_dit()
    before = count_parameters(model)
    model.set_graft({"feed_forward[0]": {"operator": "mlp", "expansion": 6}})
    assert count_parameters(model) == before + 2 * 16 * 32 + 32


class LearnedQueries(ModelMixin, ConfigMixin):
    """A model whose part is given a view of a parameter, as the perceiver of Bria's second Fibo."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.queries, self.part = nn.Parameter(torch.zeros(4, 8)), nn.Linear(8, 8)

    def forward(self, sample):
        return sample + self.part(self.queries[:2].unsqueeze(0).expand(3, -1, -1))


def test_views_of_parameters_are_counted():
    assert count_flops(LearnedQueries(), {"sample": torch.zeros(3, 2, 8)}) == 2 * 3 * 2 * 8 * 8
