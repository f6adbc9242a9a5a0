"""UNets: attention on a grid that is halved on the way down."""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel, UNetMotionModel, UVit2DModel

import diffusers_graft as dg

from ..inspection.models import first
from ..inspection.test_grids import changed, near
from .families import FEED_FORWARD, one_step, same_after_a_round

CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SHAPE = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def latents(*more):
    return torch.randn(2, 4, *more, generator=torch.Generator().manual_seed(0))


def prompt(width):
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))


UNETS = {
    "UNet2DConditionModel": (
        lambda: UNet2DConditionModel(**SHAPE, **CROSS, cross_attention_dim=8, attention_head_dim=4),
        lambda: {"sample": latents(16, 24), "timestep": torch.tensor([5, 7]), "encoder_hidden_states": prompt(8)},
    ),
    "UNet2DModel": (
        lambda: UNet2DModel(
            **SHAPE,
            down_block_types=("AttnDownBlock2D",) * 2,
            up_block_types=("AttnUpBlock2D",) * 2,
            attention_head_dim=4,
        ),
        lambda: {"sample": latents(16, 24), "timestep": torch.tensor([5, 7])},
    ),
    "UNetMotionModel": (
        lambda: UNetMotionModel(
            **SHAPE,
            down_block_types=("CrossAttnDownBlockMotion",) * 2,
            up_block_types=("CrossAttnUpBlockMotion",) * 2,
            cross_attention_dim=8,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
        ),
        lambda: {
            "sample": latents(3, 16, 24),
            "timestep": torch.tensor([5, 7]),
            "encoder_hidden_states": prompt(8).repeat_interleave(3, 0),
        },
    ),
    "UVit2DModel": (
        lambda: UVit2DModel(
            hidden_size=32,
            cond_embed_dim=8,
            encoder_hidden_size=8,
            block_out_channels=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=17,
            codebook_size=16,
            intermediate_size=32,
            in_channels=8,
            micro_cond_encode_dim=2,
            micro_cond_embed_dim=10,
            block_num_heads=2,
            num_res_blocks=1,
            sample_size=8,
            downsample=True,
            upsample=True,
        ),
        lambda: {
            "input_ids": torch.arange(96).view(1, 8, 12) % 16,
            "encoder_hidden_states": prompt(8)[:1],
            "pooled_text_emb": torch.ones(1, 8),
            "micro_conds": torch.ones(1, 5),
        },
    ),
}


def built(name):
    torch.manual_seed(0)
    model = UNETS[name][0]()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@torch.no_grad()
def predict(model, name):
    return first(model(**UNETS[name][1]()))


@pytest.mark.parametrize("name", UNETS)
def test_kinds_are_those_of_the_calls(name):
    model, seen = built(name), {}

    def hook(module, args, kwargs, path):
        queries, keys = (
            (args + (None,))[:2]
            if len(args) > 1
            else (args[0] if args else kwargs["hidden_states"], kwargs.get("encoder_hidden_states"))
        )
        seen[path] = keys is not None and keys is not queries

    sites = [site for site in dg.find_sites(model) if site.kind != "feed_forward"]
    for site in sites:
        model.get_submodule(site.path).register_forward_pre_hook(
            lambda module, args, kwargs, path=site.path: hook(module, args, kwargs, path), with_kwargs=True
        )
    predict(model, name)
    assert {site.path: site.kind == "cross_attention" for site in sites} == seen
    assert [site.path for site in sites] == list(seen), "sites are in forward order"


SPECS = ["self_attention", "neighborhood", "sliding_window", "hyena_x", "linear_attention", "mlp"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", UNETS)
def test_grafts_go_in_run_learn_reload_and_come_out(name, spec, tmp_path):
    model = built(name)
    before, keys = predict(model, name), list(model.state_dict())
    kind, operator = ("feed_forward", FEED_FORWARD) if spec == "mlp" else ("self_attention", spec)
    sites = [site for site in dg.find_sites(model).where(kind=kind) if "motion_modules" not in site.path]
    assert bool(sites) == (name != "UNet2DModel" or kind == "self_attention")
    if not sites:
        return
    model.set_graft({site.address: operator for site in sites})
    assert torch.equal(predict(model, name), before) == (spec == "self_attention")
    if spec != "self_attention":
        one_step(model, UNETS[name][1]())
    same_after_a_round(model, built(name), tmp_path, lambda model: predict(model, name))
    model.unset_graft()
    assert torch.equal(predict(model, name), before)
    assert list(model.state_dict()) == keys


@torch.no_grad()
def attended(model, name, path, touched=None):
    """What one attention makes of its tokens, [N, D] of the first sample; one of them touched on the way in."""
    seat, seen = model.get_submodule(path), []

    def touch(module, args):
        return (
            args[0].index_add(1, torch.tensor([touched]), torch.ones(len(args[0]), 1, args[0].shape[2])),
            *args[1:],
        )

    handles = [seat.register_forward_hook(lambda module, args, output: seen.append(output[0]))]
    handles += [seat.register_forward_pre_hook(touch)] if touched is not None else []
    predict(model, name)
    for handle in handles:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "UNetMotionModel", "UVit2DModel"])
def test_a_touched_token_reaches_its_neighbours_on_the_grid_of_its_level(name):
    model, levels = built(name), set()
    for site in [
        site for site in dg.find_sites(model).where(kind="self_attention") if "motion_modules" not in site.path
    ]:
        model.set_graft({site.address: "neighborhood"})
        before = attended(model, name, site.path)
        height = math.isqrt(len(before) * 2 // 3)  # the latents are two by three
        grid = dg.Grid(height=height, width=height * 3 // 2)
        levels.add(grid)
        token = grid.width + 4
        assert changed(before, attended(model, name, site.path, touched=token)) == near(token, grid)
        model.unset_graft()
    assert len(levels) == (1 if name == "UVit2DModel" else 2)


def test_the_frames_of_one_place_take_sequence_operators():
    model = built("UNetMotionModel")
    sites = [site for site in dg.find_sites(model).where(kind="self_attention") if "motion_modules" in site.path]
    assert len(sites) > 4
    model.set_graft({site.address: {"operator": "sliding_window", "window": (1, 1)} for site in sites})
    assert predict(model, "UNetMotionModel").isfinite().all()
