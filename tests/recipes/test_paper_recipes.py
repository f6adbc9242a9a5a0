"""Every recipe of the paper resolves on its real architecture to the paper's sites, parameters and FLOPs.

Figures are those of Table 4 of arXiv 2506.05340: changes in per cent of all attentions or feed-forwards.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

import diffusers_graft as dg
from diffusers_graft.core.storage import read_json
from diffusers_graft.evaluation.cost import count_flops, count_parameters
from diffusers_graft.inspection import example_inputs
from diffusers_graft.recipes.reading import load_recipe
from diffusers_graft.recipes.run import choose_local, make_metrics, resolve_plan
from diffusers_graft.serialization.paper_checkpoints import _DIT_XL

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
RELEASED = json.loads((ROOT / "hub_cards" / "paper.json").read_text())["models"]
TOKENS, WIDTH, TAPS = 256, 1152, 4
ATTENTION = 4 * WIDTH * WIDTH + 4 * WIDTH
FEED_FORWARD = 8 * WIDTH * WIDTH + 5 * WIDTH
INTERLEAVED = {"50": list(range(1, 28, 2)), "75": [n for n in range(28) if n % 4], "100": list(range(28))}
# The printed change of parameters, by operator, at 50 % and 75 %.
PARAMETERS = {
    "hyena_se": (0.22, 0.33),
    "hyena_x": (0.16, 0.24),
    "hyena_y": (0.05, 0.08),
    "swa": (0, 0),
    "mamba_2": (28.02, 42.04),
    "mlp_r_3": (-12.50, -18.75),
    "mlp_r_6": (25.00, 37.50),
    "mlp-hyena_x": (0.02, 0.03),
}
SOFTMAX = 4 * TOKENS * TOKENS * WIDTH  # products of matrices, as the counter sees them
MLP = 16 * TOKENS * WIDTH * WIDTH
CONVOLUTION = 2 * TAPS * TOKENS * WIDTH
GATES = 2 * TOKENS * WIDTH
# Change of one site by the paper's formulas.
FLOPS = {
    "hyena_se": 4 * CONVOLUTION + GATES - SOFTMAX,
    "hyena_x": 3 * CONVOLUTION + GATES - SOFTMAX,
    "hyena_y": CONVOLUTION + GATES - SOFTMAX,
    "mlp_r_3": -MLP // 4,
    "mlp_r_6": MLP // 2,
    "mlp-hyena_x": 6 * CONVOLUTION + 2 * GATES,
}


def ids(path):
    return path.stem


def operator_of(name):
    """The operator in the name of a released model: dit-xl2-mha-hyena_x-50p-fid2.74."""
    kind, operator = name.split("-")[2:4]
    return f"mlp-{operator}" if (kind, operator) == ("mlp", "hyena_x") else operator


@functools.cache
def architecture(cls, path):
    with torch.device("meta"):
        return cls.from_config(read_json(ROOT / path)).to("meta").eval()


def model_of(recipe):
    cls = PixArtTransformer2DModel if "PixArt" in recipe.model.name else DiTTransformer2DModel
    return architecture(cls, recipe.model.config)


def plan_of(recipe):
    model = model_of(recipe)
    addresses = [site.address for site in dg.find_sites(model)]
    return resolve_plan(model, choose_local(recipe.plan, dict.fromkeys(addresses, 0.0)))


def added_parameters(plan, model):
    graft = dg.build_graft(model, plan)
    before = [graft.originals[path] for edit in plan.edits for path in edit.site.paths]
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in before]
    return sum(part.numel() for seat in graft.seats.values() for part in seat.parameters()) - sum(counts)


def test_every_released_model_and_every_ablation_has_a_recipe():
    names = {path.stem for path in RECIPES}
    assert set(RELEASED) <= names
    assert names - set(RELEASED) == {
        "self-graft-attention-8k",
        "self-graft-attention-64k",
        "layers-interleaved",
        "layers-top-local",
        "layers-low-local",
        "layers-deep",
        "parallel-pairs",
        "pixart-sigma-2k-hyena_x",
    }


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_released_models_have_the_papers_layers_and_parameters(name):
    recipe = load_recipe(ROOT / "recipes" / "paper" / f"{name}.yaml")
    plan = plan_of(recipe)
    share = name.split("-")[4].removesuffix("p")
    assert [edit.site.index for edit in plan.edits] == INTERLEAVED[share]
    assert {edit.config.init for edit in plan.edits} == {"random"}
    family = ATTENTION if "-mha-" in name else FEED_FORWARD
    printed = 0 if share == "100" else PARAMETERS[operator_of(name)][share == "75"]
    added = added_parameters(plan, model_of(recipe))
    assert 100 * added / (28 * family) == pytest.approx(printed, abs=0.0051)
    rules = RELEASED[name]["rules"]
    if rules:
        theirs = dg.plan_graft(model_of(recipe), rules)
        assert [(one.site, one.config.owner) for one in theirs.edits] == [
            (one.site, one.config.owner) for one in plan.edits
        ]


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_released_models_have_the_papers_flops(name):
    operator = operator_of(name)
    recipe = load_recipe(ROOT / "recipes" / "paper" / f"{name}.yaml")
    plan = plan_of(recipe)
    graft = dg.build_graft(model_of(recipe), plan)
    flops = [part.flops(TOKENS) for part in graft.operators().values()]
    if operator in FLOPS:
        original = SOFTMAX if "-mha-" in name else MLP
        assert flops == [FLOPS[operator] + original] * len(plan.edits)
    elif operator == "swa":
        # The paper counts 9 keys of every token; those at the two ends have fewer.
        assert flops[0] / SOFTMAX == pytest.approx(9 / 256, rel=0.01)
    elif operator == "mamba_2":
        # Its projections and its scan, the paper's 2 (2 D) 64 N, within what the chunks of the scan add.
        projections = 2 * TOKENS * (WIDTH * (4 * WIDTH + 272) + 2 * WIDTH * WIDTH)
        scan = 2 * 2 * WIDTH * 64 * TOKENS
        assert projections + scan <= flops[0] < projections + 8 * scan
    else:
        assert flops == [SOFTMAX if "-mha-" in name else MLP] * 28


@pytest.mark.long
@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_the_flops_of_the_whole_model_change_by_those_of_its_parts(path):
    recipe = load_recipe(path)
    model = model_of(recipe)
    inputs = example_inputs(model, text_tokens=300)
    before = count_flops(model, inputs)
    parameters = count_parameters(model)
    graft = dg.build_graft(model, plan_of(recipe))
    model.set_graft(graft)
    try:
        after = count_flops(model, inputs)
        added = count_parameters(model) - parameters
    finally:
        model.unset_graft()
    operator = operator_of(path.stem) if path.stem in RELEASED else ""
    if operator in FLOPS:
        assert after - before == FLOPS[operator] * len(graft.plan.edits)
    if path.stem == "parallel-pairs":
        assert added == 14 * (2 * WIDTH**2 + WIDTH)
    if path.stem.startswith("pixart"):
        # Two thirds of a forward are softmax (speed.md has 66.1 %), and half of it goes.
        assert (before - after) / before == pytest.approx(0.331, abs=0.002)


def test_pairs_add_the_papers_parameters():
    recipe = load_recipe(ROOT / "recipes" / "paper" / "parallel-pairs.yaml")
    plan = plan_of(recipe)
    assert [edit.site.paths for edit in plan.edits][0] == ("transformer_blocks.0", "transformer_blocks.1")
    assert len(plan.edits) == 14
    added = added_parameters(plan, model_of(recipe))
    # 675,129,632 parameters become the paper's 712,304,672.
    assert added == 712_304_672 - 675_129_632


def test_pixart_has_the_papers_layers_and_adapters():
    recipe = load_recipe(ROOT / "recipes" / "paper" / "pixart-sigma-2k-hyena_x.yaml")
    plan = plan_of(recipe)
    assert [edit.site.index for edit in plan.edits] == [8, 10, 12, 14, 16, 18, *range(20, 28)]
    assert recipe.finetune.lora.r == 64
    assert recipe.data.synthetic.samples == 12_000


def test_layers_are_chosen_as_the_ablation_says():
    layers = {
        name: [
            edit.site.index for edit in plan_of(load_recipe(ROOT / "recipes" / "paper" / f"layers-{name}.yaml")).edits
        ]
        for name in ("interleaved", "top-local", "low-local", "deep")
    }
    assert layers["interleaved"] == INTERLEAVED["50"]
    assert layers["deep"] == list(range(14, 28))
    rules = {"self_attention[most local 50%]": "hyena_x"}
    locality = {f"self_attention[{number}]": number / 28 for number in range(28)}
    assert choose_local(rules, locality) == {"self_attention[14,15,16,17,18,19,20,21,22,23,24,25,26,27]": "hyena_x"}


def test_metrics_of_recipes_are_there():
    names = {name for path in RECIPES for name in load_recipe(path).evaluate.metrics}
    assert names == {"FID", "SFID", "InceptionScore", "PrecisionRecall", "GenEval"}
    for path in RECIPES:
        make_metrics(load_recipe(path).evaluate)


def test_architectures_are_those_of_the_released_models():
    config = read_json(ROOT / "recipes" / "architectures" / "dit-xl-2-256.json")
    assert {name: config[name] for name in _DIT_XL} == _DIT_XL
