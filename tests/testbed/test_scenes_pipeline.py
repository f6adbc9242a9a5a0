"""The pretrained text-to-image pipeline of the testbed, and what it does with bad input."""

import random
import subprocess
import sys
import warnings

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PixArtSigmaPipeline, UniPCMultistepScheduler
from safetensors.torch import load_file

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.errors import GraftError, ModelError, TrainingError, UnknownNameError
from diffusers_graft.testbed import scenes

PROMPTS = ["a red circle and a blue star", "three green hearts"]
# Draws with a saved pipeline, with a saved graft, and without it, under as many threads as the test.
IN_A_NEW_PROCESS = """
import sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from diffusers_graft.testbed import scenes
folder, threads, *prompts = sys.argv[1:]
torch.set_num_threads(int(threads))
settings = {"size": 64, "steps": 2, "progress": False}
drawn = {"saved": scenes.draw_prompts(DiffusionPipeline.from_pretrained(f"{folder}/pipeline"), prompts, **settings)}
pipeline = scenes.pipeline()
pipeline.transformer.load_graft(f"{folder}/graft")
drawn["grafted"] = scenes.draw_prompts(pipeline, prompts, **settings)
pipeline.transformer.unset_graft()
drawn["original"] = scenes.draw_prompts(pipeline, prompts, **settings)
save_file(drawn, f"{folder}/drawn.safetensors")
"""


@pytest.fixture(scope="module")
def drawing():
    return scenes.pipeline()


@pytest.fixture(autouse=True)
def _restore(drawing):
    parts = dict(drawing.components)
    yield
    drawing.register_modules(**parts)


def draw(pipeline, size=64, steps=2):
    return scenes.draw_prompts(pipeline, PROMPTS, size=size, steps=steps, progress=False)


def test_the_pipeline_is_diffusers_own_and_small(drawing):
    assert type(drawing) is PixArtSigmaPipeline
    parameters = sum(p.numel() for p in drawing.transformer.parameters())
    assert 1.5e6 < parameters < 6e6
    files = [path for path in scenes.pipeline.__globals__["WEIGHTS"].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_pipeline_loads_without_a_warning(caplog):
    assert type(scenes.pipeline().vae).__name__ == "AutoencoderTiny"
    assert not [record.getMessage() for record in caplog.records]


def test_the_pipeline_with_its_defaults_draws_256_pixels(drawing):
    images = drawing(PROMPTS[0], num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, 256, 256)


def test_saved_and_loaded_the_pipeline_draws_the_same_bits(drawing, tmp_path):
    drawing.save_pretrained(tmp_path)
    assert torch.equal(draw(PixArtSigmaPipeline.from_pretrained(tmp_path)), draw(drawing))


def test_grafted_and_without_its_graft_the_pipeline_draws_the_same_bits_here_and_in_a_new_process(drawing, tmp_path):
    before = draw(drawing)
    drawing.transformer.set_graft({"self_attention[1::2]": "sliding_window"})
    grafted = draw(drawing)
    drawing.save_pretrained(tmp_path / "pipeline")
    drawing.transformer.save_graft(tmp_path / "graft")
    drawing.transformer.unset_graft()
    assert not torch.equal(grafted, before)
    assert torch.equal(draw(drawing), before)
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path), str(torch.get_num_threads()), *PROMPTS]
    subprocess.run(command, check=True)
    drawn = load_file(tmp_path / "drawn.safetensors")
    assert torch.equal(drawn["saved"], grafted)
    assert torch.equal(drawn["grafted"], grafted)
    assert torch.equal(drawn["original"], before)


def test_pictures_depend_on_their_place_and_seed_and_not_on_the_batch(drawing):
    together = draw(drawing)
    alone = scenes.draw_prompts(drawing, PROMPTS, size=64, steps=2, batch_size=1, progress=False)
    assert torch.allclose(together, alone, atol=1e-3)


@pytest.mark.parametrize("size", [64, 128])
def test_it_draws_at_the_sizes_it_was_trained_at(drawing, size):
    assert draw(drawing, size).shape == (2, 3, size, size)


def test_negative_prompts_and_guidance_move_a_picture_and_offloading_does_not():
    pipeline = scenes.pipeline()
    latents = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw_one(**changes):
        settings = {"height": 64, "width": 64, "use_resolution_binning": False, "clean_caption": False}
        settings |= {"num_inference_steps": 2, "guidance_scale": 3.0, "latents": latents, **changes}
        return pipeline(PROMPTS[0], output_type="pt", **settings).images

    plain = draw_one()
    assert torch.equal(draw_one(negative_prompt=""), plain)
    assert not torch.allclose(draw_one(negative_prompt=PROMPTS[1]), plain, atol=0.01)
    # Away from the prompt itself is nowhere, as no guidance is.
    assert torch.allclose(draw_one(negative_prompt=PROMPTS[0]), draw_one(guidance_scale=1.0), atol=1e-4)
    pipeline.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(draw_one(), plain)


def test_other_schedulers_of_flow_matching_draw(drawing):
    drawing.scheduler = UniPCMultistepScheduler.from_config(
        drawing.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    assert draw(drawing).isfinite().all()


def test_the_autoencoder_keeps_what_pictures_show(drawing):
    rng = random.Random(5)
    chosen = [scenes.sample_scene(rng) for _ in range(24)]
    with torch.no_grad():
        latents = drawing.vae.encode(scenes.draw_scenes(chosen, 256)).latents
        found = scenes.detect(drawing.vae.decode(latents).sample)
    assert latents.shape == (24, 12, 32, 32)
    wrong = 0
    for scene, objects in zip(chosen, found, strict=True):
        truth = sorted((one.kind, one.colour) for one in scene.objects)
        wrong += truth != sorted((one.kind, one.colour) for one in objects)
    assert wrong <= 1


def test_unknown_words_and_empty_prompts_are_said(drawing):
    settings = {"num_inference_steps": 1, "height": 64, "width": 64, "use_resolution_binning": False}
    with pytest.warns(UserWarning, match="read as <unk>: zebra"):
        drawing("a red circle and a zebra", **settings)
    with pytest.warns(UserWarning, match="read as <unk>: zebra"):
        drawing("a red circle", negative_prompt="a zebra", **settings)
    with pytest.warns(UserWarning, match="An empty prompt"):
        drawing("", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        drawing("a red circle, a box and two hoops.", clean_caption=False, **settings)


def test_unknown_words_are_one_word_and_an_empty_prompt_is_none(drawing):
    unknown = drawing.tokenizer.unk_token_id
    assert drawing.tokenizer("a red zebra").input_ids.count(unknown) == 1
    encoded = scenes.encode_captions(drawing, ["a red zebra", "a red unicorn", "a red star", "", "  "])
    zebra, unicorn, star, empty, blank = encoded["encoder_hidden_states"]
    assert torch.equal(zebra, unicorn)
    assert not torch.equal(zebra, star)
    assert torch.equal(empty, blank)
    assert torch.equal(empty, scenes.null_prompt(drawing)["encoder_hidden_states"][0])


def test_a_scheduler_of_another_family_is_refused(drawing):
    drawing.scheduler = DDIMScheduler()
    with pytest.raises(GraftError, match="DDIMScheduler .* does not fit"):
        drawing(PROMPTS[0])
    drawing.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(GraftError, match="lacks scale_model_input"):
        drawing(PROMPTS[0])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("IPNDMScheduler", "does not fit"),
        ("CMStochasticIterativeScheduler", "does not fit"),
        ("FlowMatchHeunDiscreteScheduler", "cannot run FlowMatchHeunDiscreteScheduler"),
        ("FlowMatchLCMScheduler", "cannot run FlowMatchLCMScheduler"),
    ],
)
def test_settings_that_a_scheduler_only_carries_do_not_make_it_fit(drawing, name, said):
    drawing.scheduler = getattr(diffusers, name).from_config(drawing.scheduler.config)
    with pytest.raises(GraftError, match=said):
        drawing(PROMPTS[0])
    with pytest.raises(GraftError, match=said):
        scenes.draw_prompts(drawing, PROMPTS, size=64)


def test_a_pipeline_without_text_encoder_is_refused_unless_states_are_given(drawing):
    states, mask, no_states, no_mask = PixArtSigmaPipeline.encode_prompt(drawing, PROMPTS[0])
    drawing.text_encoder = None
    with pytest.raises(ModelError, match="no text encoder"):
        draw(drawing)
    with pytest.raises(ModelError, match="no text encoder"):
        scenes.null_prompt(drawing)
    given = {"prompt_embeds": states, "prompt_attention_mask": mask}
    given |= {"negative_prompt": None, "negative_prompt_embeds": no_states, "negative_prompt_attention_mask": no_mask}
    settings = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 1}
    assert drawing(**given, **settings).images


def test_a_pipeline_that_diffusers_loaded_is_checked_where_prompts_are_drawn(drawing, tmp_path):
    drawing.save_pretrained(tmp_path)
    loaded = PixArtSigmaPipeline.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="read as <unk>: zebra"):
        scenes.draw_prompts(loaded, ["a zebra"], size=64, steps=1)
    loaded.text_encoder = None
    with pytest.raises(ModelError, match="no text encoder"):
        scenes.draw_prompts(loaded, ["a red star"], size=64, steps=1)


def test_no_steps_no_list_and_no_size_are_refused(drawing):
    with pytest.raises(GraftError, match="1 step or more"):
        scenes.draw_prompts(drawing, PROMPTS, steps=0)
    with pytest.raises(GraftError, match="Put it into a list"):
        scenes.draw_prompts(drawing, "a red star")
    with pytest.raises(GraftError, match="list of prompts is empty"):
        drawing([])
    for size in (0, -8):
        with pytest.raises(GraftError, match="multiples of 8"):
            scenes.SceneScore(size=size)


def test_a_size_that_is_no_multiple_of_8_is_refused(drawing):
    with pytest.raises(GraftError, match="multiples of 8"):
        draw(drawing, size=60)
    with pytest.raises(GraftError, match="no prompts"):
        scenes.draw_prompts(drawing, [])
    # The call of the pipeline is checked by diffusers, batches of scenes are ours.
    with pytest.raises(ValueError, match="divisible by 8"):
        drawing(PROMPTS[0], height=60, width=64, use_resolution_binning=False)
    with pytest.raises(GraftError, match="multiples of 8"):
        next(scenes.scene_batches(drawing, 1, seed=0, size=60))


def test_prompts_beyond_the_data_are_refused_or_named(drawing, tmp_path, caplog):
    pictures = torch.zeros(1, 3, 64, 64)
    with pytest.raises(TrainingError, match="1 images and 2 prompts"):
        dg.data.encode(
            pictures, drawing.vae, dg.data.prompt_encoder(drawing), folder=tmp_path / "encoded", prompts=PROMPTS
        )
    settings = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 1}
    drawn = dg.data.from_pipeline(drawing, PROMPTS, 1, tmp_path / "drawn", clean_caption=False, **settings)
    assert len(drawn) == 1
    assert "Of 2 conditions only the first 1 are drawn" in caplog.text


def test_diffusers_has_neither_controlnet_nor_inpainting_nor_image_to_image_for_this_family():
    # Where one appears, `examples/use_grafted_pipeline.py` is to use it in place of its own loop.
    names = [name for name in dir(diffusers) if name.startswith("PixArt")]
    assert "PixArtSigmaPipeline" in names
    assert not [name for name in names if "ControlNet" in name or "Inpaint" in name or "Img2Img" in name]


def test_the_score_is_a_metric_of_evaluate(drawing):
    metric = scenes.SceneScore(count=1, size=64, steps=2)
    batches = scenes.scene_batches(drawing, 2, seed=0, size=64, steps=1)
    measured = dg.evaluate(drawing.transformer, batches, noise_scheduler=drawing.scheduler, metrics=[metric])
    assert 0 <= measured["seen.low"] <= measured["seen.score"] <= measured["seen.high"] <= 1
    assert measured.protocol["SceneScore.steps"] == 2


def test_training_sets_are_drawn_by_the_pipeline_and_encoded_from_pictures(drawing, tmp_path):
    settings = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 1}
    drawn = dg.data.from_pipeline(drawing, PROMPTS, 2, tmp_path / "drawn", max_sequence_length=32, **settings)
    rng = random.Random(0)
    pictures = scenes.draw_scenes([scenes.sample_scene(rng) for _ in range(2)], 64)
    encoded = dg.data.encode(
        pictures,
        drawing.vae,
        lambda prompts: scenes.encode_captions(drawing, prompts),
        folder=tmp_path / "encoded",
        prompts=PROMPTS,
    )
    assert drawn[0]["sample"].shape == encoded[0]["sample"].shape == (12, 8, 8)
    assert drawn[1]["encoder_hidden_states"].shape == encoded[1]["encoder_hidden_states"].shape == (32, 128)
    assert torch.allclose(drawn[1]["encoder_hidden_states"], encoded[1]["encoder_hidden_states"], atol=1e-5)


def test_batches_of_scenes_train_a_graft(drawing):
    transformer = drawing.transformer
    batches = scenes.scene_batches(drawing, 2, seed=0, size=64)
    training = {"noise_scheduler": drawing.scheduler, "null_prompt": scenes.null_prompt(drawing)}
    graft = dg.build_graft(transformer, dg.plan_graft(transformer, {"self_attention[1]": "neighborhood"}))
    reports = dg.distill(transformer, graft, batches, dg.DistillConfig(steps=4, warmup=1, lr=1e-3), **training)
    transformer.set_graft(graft)
    losses = dg.finetune(transformer, batches, dg.FinetuneConfig(steps=2, warmup=1, lr=1e-4), **training)
    transformer.unset_graft()
    assert len(reports) == 1
    assert len(losses) == 2


def test_the_testbeds_have_names():
    assert type(testbed.load_named("testbed:letters")).__name__ == "DiTTransformer2DModel"
    assert type(testbed.load_named("testbed:scenes")).__name__ == "PixArtTransformer2DModel"
    with pytest.raises(UnknownNameError, match="testbed:letters, testbed:scenes"):
        testbed.load_named("testbed:digits")
