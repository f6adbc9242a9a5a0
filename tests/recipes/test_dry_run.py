"""A dry run says what a run takes: as a real one does, and as arithmetic on paper has it."""

import pytest

import diffusers_graft as dg
from diffusers_graft.errors import GraftError
from diffusers_graft.evaluation.benchmark import PeakMemory
from diffusers_graft.injection.install import install
from diffusers_graft.recipes.data import make_data
from diffusers_graft.recipes.dry_run import estimate
from diffusers_graft.recipes.reading import load_recipe
from diffusers_graft.recipes.sources import load_source
from diffusers_graft.testbed.letters import TRAIN_FONTS, glyph_bank

STAGE = {"steps": 3, "warmup": 1, "progress": False}
ARCHITECTURES = "recipes/architectures"
DIT = {"name": "facebook/DiT-XL-2-256", "config": f"{ARCHITECTURES}/dit-xl-2-256.json"}
PIXART = {
    "name": "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS",
    "config": f"{ARCHITECTURES}/pixart-sigma-xl-2-2k.json",
    "dtype": "bfloat16",
}
FLUX = {"name": "black-forest-labs/FLUX.1-dev", "config": f"{ARCHITECTURES}/flux-1-dev.json", "dtype": "bfloat16"}


# Stage two without a teacher.
PAPER = {"denoising": 1, "distill_output": 0}


def stages_of(recipe, devices=1):
    return {stage.name: stage for stage in estimate(load_recipe(recipe), devices=devices).stages}


@pytest.mark.parametrize(
    ("plan", "finetune", "batch_size"),
    [
        ({"self_attention[1::2]": "neighborhood"}, {}, 32),
        ({"feed_forward[:]": "mlp(expansion=3)"}, {"lora": {"r": 8, "target_modules": "all-linear"}}, 16),
    ],
)
def test_the_peak_of_a_real_run_is_within_a_tenth(plan, finetune, batch_size):
    recipe = load_recipe(
        {
            "model": "testbed:letters",
            "plan": plan,
            "data": {"batch_size": batch_size, "held_out": 16},
            "distill": STAGE,
            "finetune": {**STAGE, **finetune},
        }
    )
    predicted = {stage.name: stage.memory for stage in estimate(recipe).stages}
    glyph_bank(TRAIN_FONTS)  # kept for good, and no part of any run
    source = load_source(recipe.model)
    data = make_data(recipe, source)
    settings = {"noise_scheduler": source.noise_scheduler, "held_out": data.held_out}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in source.model.state_dict().values())
    with PeakMemory() as one:
        graft = dg.build_graft(source.model, dg.plan_graft(source.model, recipe.plan))
        dg.distill(source.model, graft, data.train, recipe.distill, **settings)
    install(source.model, graft)
    with PeakMemory() as two:
        dg.finetune(source.model, data.train, recipe.finetune, **settings)
    assert predicted["stage one"] == pytest.approx(weights + one.peak, rel=0.1)
    assert predicted["stage two"] == pytest.approx(weights + one.now + two.peak, rel=0.1)


def test_parameters_flops_and_downloads_of_a_testbed():
    recipe = {"model": "testbed:letters", "plan": {"self_attention[:]": "identity"}, "finetune": None}
    costs = estimate(load_recipe(recipe))
    assert costs.parameters[0] == costs.parameters[1] == 1_638_436
    # 4 N^2 D of softmax in each of 8 layers of 64 tokens of width 96.
    assert costs.flops[0] - costs.flops[1] == 8 * 4 * 64 * 64 * 96
    assert costs.downloads == {}
    assert "Download: nothing" in str(costs)


def test_data_that_are_not_there_are_a_note():
    recipe = {"model": DIT, "plan": {"self_attention[0]": "identity"}, "data": {"latents": "gone"}, "finetune": None}
    costs = estimate(load_recipe(recipe))
    assert any("Not ready: There is no folder gone" in note for note in costs.notes)
    assert costs.downloads is None
    with pytest.raises(GraftError, match="one device or more"):
        estimate(load_recipe(recipe), devices=0)


def test_stage_one_of_dit_agrees_with_the_arithmetic():
    recipe = {"model": DIT, "plan": {"self_attention[:]": "hyena_x"}, "finetune": None}
    recipe |= {"data": {"latents": ".", "batch_size": 1}, "distill": {"steps": 1}}
    costs = estimate(load_recipe(recipe))
    stage = costs.stages[1]
    # A forward takes 0.237 TFLOP; with 28 students 0.408 a sample. Weights, gradients and Adam's moments of 28
    # attentions of 5.3 million parameters take 2.4 GB in float32.
    assert costs.flops[0] == pytest.approx(0.237e12, rel=0.005)
    assert stage.flops == pytest.approx(0.408e12, rel=0.02)
    assert stage.state == pytest.approx(2.4e9, rel=0.01)


def test_the_teacher_of_a_sharded_model_is_a_second_one():
    recipe = {"model": "testbed:letters", "plan": {"self_attention[1::2]": "neighborhood"}, "distill": None}
    weights = {}
    for name, objective in (("teacher", {}), ("paper", PAPER)):
        for devices in (1, 2):
            two = stages_of({**recipe, "finetune": {"steps": 1, **objective}}, devices)["stage two"]
            weights[name, devices] = two.weights
    original = 4 * 1_638_436
    assert weights["teacher", 2] - weights["paper", 2] == pytest.approx(original / 2, rel=0.02)
    # On one device graft and original are exchanged in place.
    assert weights["teacher", 1] == pytest.approx(weights["paper", 1], rel=0.02)


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 8])
def test_pixart_at_2048_pixels_agrees_with_the_arithmetic(devices):
    recipe = {
        "model": PIXART,
        "plan": {"self_attention[8,10,12,14,16,18,20:28]": "hyena_x"},
        "data": {"synthetic": {"prompts": ["a"], "samples": 12_000}, "batch_size": 1},
        "distill": {"steps": 1},
        "finetune": {
            "steps": 1,
            "lora": {"r": 64, "target_modules": "all-linear"},
            "gradient_checkpointing": True,
            **PAPER,
        },
    }
    costs = estimate(load_recipe(recipe), devices=devices)
    assert costs.flops[0] == pytest.approx(52.4e12, rel=0.002)
    data, one, two = costs.stages
    # 4 x 256 x 256 latents and 300 x 4,096 embeddings in bfloat16, a mask beside them.
    assert data.disk == pytest.approx(12_000 * 2 * (4 * 256**2 + 300 * 4096), rel=0.001)
    # The embeddings of 16,384 positions are a buffer.
    weights = 2 * (costs.parameters[0] + 16_384 * 1152)
    students = 14 * (4 * 1152**2 + 4 * 1152 + 3 * 5 * 1152)
    assert one.weights == pytest.approx(weights / devices + 2 * students, rel=0.01)
    # A copy in float32, its gradients, Adam's moments, and the best so far.
    assert one.state == pytest.approx(20 * students, rel=0.01)
    assert two.weights < 1.3 * (weights / devices + 2 * students)


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 8])
def test_flux_agrees_with_the_arithmetic(devices):
    recipe = {
        "model": FLUX,
        "plan": {"joint_attention[50%]": "neighborhood"},
        "data": {"latents": ".", "batch_size": 1},
        "distill": None,
        "finetune": {"steps": 1, "gradient_checkpointing": True, **PAPER},
    }
    two = stages_of(recipe, devices)["stage two"]
    parameters = 11_901_408_320
    # bfloat16 weights, and the originals beside the graft; then 20 bytes a parameter, as above.
    assert two.weights == pytest.approx(4 * parameters / devices, rel=0.05)
    assert two.state == pytest.approx(20 * parameters / devices, rel=0.01)
