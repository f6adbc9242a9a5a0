"""Training sets: made by a pipeline, encoded from images, read in an order that can be taken up again."""

import itertools

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PixArtSigmaPipeline,
    UNet2DConditionModel,
    WanPipeline,
)
from safetensors.torch import load_file, save_file

import diffusers_graft as dg
from diffusers_graft.data import datasets
from diffusers_graft.errors import FileError, StateError, TrainingError
from diffusers_graft.training.batches import BatchStream, ShuffledBatches, make_batches
from diffusers_graft.training.noised_batch import Noising

from ..inspection.models import tiny
from ..models import SCHEDULER, batches, same_tensors, tensors_of, tiny_dit, tiny_pixart


def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8, scaling_factor=0.3
    ).eval()


def dit_pipeline():
    labels = {i: f"class {i}" for i in range(5)}
    return DiTPipeline(
        tiny_dit(in_channels=4, out_channels=4, num_embeds_ada_norm=1000), tiny_vae(), DDIMScheduler(), id2label=labels
    )


def pixart_pipeline():
    pipe = PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=tiny_vae(), transformer=tiny_pixart(), scheduler=DDIMScheduler()
    )
    pipe.encode_prompt = encode_prompt
    return pipe


def lumina_pipeline():
    """Puts the prompts before what stands for none."""
    model = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=3,
        multiple_of=8,
        cross_attention_dim=10,
    )
    flow, rest = FlowMatchEulerDiscreteScheduler(), {"text_encoder": None, "tokenizer": None}
    pipe = LuminaPipeline(transformer=model.eval(), scheduler=flow, vae=tiny_vae(), **rest)
    pipe.encode_prompt = encode_prompt
    return pipe


def encode_prompt(prompt, do_classifier_free_guidance=True, **_):
    embeds = torch.stack([torch.full((12, 10), float(len(text))) for text in prompt])
    mask = torch.ones(len(prompt), 12)
    return embeds, mask, torch.zeros_like(embeds), torch.zeros_like(mask)


SETTINGS = {"batch_size": 2, "shard_size": 4, "progress": False, "num_inference_steps": 2}


def test_a_label_pipeline_makes_its_training_set(tmp_path):
    pipe, seen = dit_pipeline(), []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, *a, **k: (seen.append(latents), decode(latents, *a, **k))[1]
    found = dg.data.from_pipeline(pipe, [3, 1, 4], 7, tmp_path, guidance_scale=2.0, **SETTINGS)
    assert len(found) == 7
    assert [int(found[i]["class_labels"]) for i in range(7)] == [3, 1, 4, 3, 1, 4, 3]
    torch.testing.assert_close(found[2]["sample"], 0.3 * seen[1][0])
    assert found[-1]["sample"].shape == (4, 8, 8)
    graft = dg.build_graft(pipe.transformer, dg.plan_graft(pipe.transformer, {"self_attention[1]": "hyena_x"}))
    config = dg.DistillConfig(steps=2, progress=False)
    dg.distill(pipe.transformer, graft, make_batches(found, 4, 0), config, noise_scheduler=SCHEDULER)


def test_a_prompt_pipeline_gives_the_conditioning_of_the_prompt_itself(tmp_path):
    pipe = pixart_pipeline()
    found = dg.data.from_pipeline(
        pipe, ["one", "three"], 4, tmp_path, height=8, width=8, use_resolution_binning=False, **SETTINGS
    )
    assert [found[i]["encoder_hidden_states"].unique().tolist() for i in range(4)] == [[3.0], [5.0]] * 2
    assert found[0]["encoder_attention_mask"].all()
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())
    batch = next(iter(ShuffledBatches(found, 2, 0)))
    graft = dg.build_graft(pipe.transformer, dg.plan_graft(pipe.transformer, {"self_attention[1]": "hyena_x"}))
    dg.distill(pipe.transformer, graft, [batch], dg.DistillConfig(steps=1, progress=False), noise_scheduler=SCHEDULER)


def wan_vae():
    mean, std = [0.5] * 4, [2.0] * 4
    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=mean, latents_std=std
    ).eval()


def flow_pipeline(name):
    """Flux tells all samples the same ids; Wan asks in two calls, first for the prompt, then for none."""
    model, flow, rest = (
        tiny(f"{name}Model"),
        FlowMatchEulerDiscreteScheduler(),
        {"text_encoder": None, "tokenizer": None},
    )

    def text(prompt, value, width):
        return torch.stack([torch.full((5, width), float(value or len(one))) for one in prompt])

    if name.startswith("Wan"):
        pipe = WanPipeline(vae=wan_vae(), scheduler=flow, transformer=model, **rest)
        pipe.encode_prompt = lambda prompt, **_: (text(prompt, None, 16), text(prompt, 9, 16))
        return pipe, flow, {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 3.0}
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1, shift_factor=0.1)
    pipe = FluxPipeline(vae=vae, scheduler=flow, transformer=model, text_encoder_2=None, tokenizer_2=None, **rest)
    pipe.encode_prompt = lambda prompt, **_: (text(prompt, None, 8), torch.zeros(len(prompt), 8), torch.zeros(5, 3))
    return pipe, flow, {"height": 8, "width": 8}


@pytest.mark.parametrize("name", ["FluxTransformer2D", "WanTransformer3D"])
def test_sets_of_flow_pipelines_are_what_their_models_train_on(name, tmp_path):
    pipe, flow, arguments = flow_pipeline(name)
    pipe.set_progress_bar_config(desc="mine")
    found = dg.data.from_pipeline(pipe, ["one", "three"], 3, tmp_path, **SETTINGS, **arguments)
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert [found[i]["encoder_hidden_states"].unique().tolist() for i in range(3)] == [[3.0], [5.0], [3.0]]
    pipe.transformer.set_graft({"block_pair[0]": "parallel"})
    dg.finetune(
        pipe.transformer, make_batches(found, 3, 0), dg.FinetuneConfig(steps=1, progress=False), noise_scheduler=flow
    )


def test_a_pipeline_whose_model_takes_more_than_latents_is_refused(tmp_path):
    pipe = pixart_pipeline()
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda hidden_states, **kwargs: forward(hidden_states[:, :4], **kwargs)
    pipe.scheduler.scale_model_input = lambda latents, timestep: torch.cat([latents, latents], dim=1)
    with pytest.raises(TrainingError, match="no clean sample"):
        dg.data.from_pipeline(pipe, ["one"], 1, tmp_path, height=8, width=8, use_resolution_binning=False, **SETTINGS)


def test_prompts_are_found_where_a_pipeline_puts_them_first(tmp_path):
    pipe = lumina_pipeline()
    found = dg.data.from_pipeline(
        pipe, ["one", "three"], 3, tmp_path, height=16, width=16, proportional_attn=False, **SETTINGS
    )
    assert [found[i]["encoder_hidden_states"].unique().tolist() for i in range(3)] == [[3.0], [5.0], [3.0]]
    assert found[0]["encoder_mask"].all()
    assert pipe.encode_prompt is encode_prompt


def test_conditioning_that_a_set_cannot_hold_is_refused_and_the_folder_is_free_for_another_try(tmp_path):
    call = {"conditions": ["one"], "n": 1, "folder": tmp_path, "height": 16, "width": 16, **SETTINGS}
    with pytest.raises(
        TrainingError, match="tells its transformer base_sequence_length=16, and a training set holds tensors"
    ):
        dg.data.from_pipeline(lumina_pipeline(), **call)
    assert len(dg.data.from_pipeline(lumina_pipeline(), **call, proportional_attn=False)) == 1


def test_a_set_wants_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    for folder in (path, path / "inside"):
        with pytest.raises(FileError, match="Give a folder"):
            dg.data.from_pipeline(dit_pipeline(), [0], 1, folder, **SETTINGS)
        with pytest.raises(FileError, match="Give a folder"):
            dg.data.encode([torch.zeros(3, 8, 8)], tiny_vae(), folder=folder, progress=False)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("conditions", ["one", []])
def test_conditions_are_a_list(conditions, tmp_path):
    with pytest.raises(TrainingError, match="a list of prompts"):
        dg.data.from_pipeline(None, conditions, 1, tmp_path)


class CutError(Exception):
    pass


def test_an_interrupted_set_is_finished_by_the_same_call(tmp_path, monkeypatch):
    whole = dg.data.from_pipeline(dit_pipeline(), [0, 1], 10, tmp_path / "whole", **SETTINGS)
    written = []

    def cut(tensors, path):
        if len(written) == 2:
            path.write_bytes(b"half")
            raise CutError
        written.append(path)
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "save_file", cut)
        with pytest.raises(CutError):
            dg.data.from_pipeline(dit_pipeline(), [0, 1], 10, tmp_path / "cut", **SETTINGS)
    with pytest.raises(FileError, match="not finished"):
        dg.data.Shards(tmp_path / "cut")
    calls = []
    pipe = dit_pipeline()
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    again = dg.data.from_pipeline(pipe, [0, 1], 10, tmp_path / "cut", **SETTINGS)
    assert len(calls) == 2  # one batch of two samples, at two steps
    assert all(torch.equal(again[i]["sample"], whole[i]["sample"]) for i in range(10))
    with pytest.raises(StateError, match="other settings \\(seed\\)"):
        dg.data.from_pipeline(pipe, [0, 1], 10, tmp_path / "cut", seed=1, **SETTINGS)
    path = min((tmp_path / "cut").glob("*.safetensors"))
    path.write_bytes(b"half")
    with pytest.raises(FileError, match="damaged"):
        _ = again[0]


def test_images_are_encoded_once_with_their_labels_or_prompts(tmp_path):
    vae, images = tiny_vae(), torch.rand(5, 3, 8, 8) * 2 - 1
    labelled = dg.data.encode(
        images, vae, folder=tmp_path / "a", class_labels=[0, 1, 2, 3, 4], batch_size=2, shard_size=2, progress=False
    )
    assert [int(labelled[i]["class_labels"]) for i in range(5)] == [0, 1, 2, 3, 4]
    with torch.no_grad():
        mean = vae.encode(images[:1]).latent_dist.mean
    assert (labelled[0]["sample"] - 0.3 * mean[0]).abs().max() < 3
    encoder = dg.data.prompt_encoder(pixart_pipeline())
    told = dg.data.encode(
        images, vae, encoder, folder=tmp_path / "b", prompts=["a", "bb", "ccc", "d", "e"], progress=False
    )
    assert told[2]["encoder_hidden_states"].unique().tolist() == [3.0]
    with pytest.raises(TrainingError, match="5 images and 1 prompts"):
        dg.data.encode(images, vae, encoder, folder=tmp_path / "c", prompts=["a"])
    with pytest.raises(TrainingError, match="text_encoder"):
        dg.data.encode(images, vae, folder=tmp_path / "c", prompts=["a"] * 5)
    with pytest.raises(TrainingError, match="a way of its own"):
        dg.data.prompt_encoder(dit_pipeline())
    assert {tensor.dtype for tensor in load_file(next((tmp_path / "b").glob("*.safetensors"))).values()} == {
        torch.float32
    }


class Numbers(torch.utils.data.Dataset):
    """Counts how often it is read."""

    def __init__(self, count=10):
        self.count, self.read = count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read += 1
        return {"sample": torch.tensor([float(index)])}


def taken(batches, count):
    return [batch["sample"].flatten().tolist() for batch in itertools.islice(batches, count)]


def test_latents_of_every_autoencoder_are_scaled_as_its_pipelines_do(tmp_path):
    vae, video = wan_vae(), torch.randn(3, 5, 16, 16)
    expected = (vae.encode(video[None]).latent_dist.sample(torch.Generator().manual_seed(0)) - 0.5) / 2
    torch.testing.assert_close(
        dg.data.encode([video], vae, folder=tmp_path / "wan", progress=False)[0]["sample"], expected[0]
    )
    blocks = {
        f"{side}coder_{name}": (value, value)
        for side in ("en", "de")
        for name, value in {"block_out_channels": 4, "layers_per_block": 1, "qkv_multiscales": ()}.items()
    }
    deep = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        scaling_factor=0.4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        **blocks,
    )
    image = torch.randn(3, 8, 8)
    found = dg.data.encode([image], deep, folder=tmp_path / "deep", progress=False)
    torch.testing.assert_close(found[0]["sample"], 0.4 * deep.encode(image[None]).latent[0].detach())


def test_shuffled_batches_hold_every_sample_once_an_epoch():
    batches = taken(ShuffledBatches(Numbers(), 3, seed=0), 6)
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert len(set(first)) == len(set(second)) == 9
    assert first != second
    assert taken(ShuffledBatches(Numbers(), 3, seed=0), 6) == batches
    assert taken(ShuffledBatches(Numbers(), 3, seed=1), 6) != batches
    assert [len(batch) for batch in taken(ShuffledBatches(Numbers(2), 5, seed=0), 2)] == [2, 2]
    assert taken(ShuffledBatches(Numbers(), 3, seed=0, workers=1), 2) == batches[:2]


def test_batches_of_nothing_are_refused():
    for samples, size in (([], 4), ([1, 2], 0), ([1, 2], -1)):
        with pytest.raises(TrainingError, match=f"batches of {size} out of {len(samples)} samples"):
            ShuffledBatches(samples, size, seed=0)


def test_stages_take_batches_and_say_so_of_single_samples(tmp_path):
    found = dg.data.from_pipeline(dit_pipeline(), [0], 2, tmp_path, **SETTINGS)
    model = tiny_dit(in_channels=4)
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[0]": "hyena_x"}))
    for batches_given, held_out in ((found, None), (batches(1, channels=4), found)):
        with pytest.raises(TrainingError, match="pass a DataLoader"):
            dg.distill(model, graft, batches_given, noise_scheduler=SCHEDULER, held_out=held_out)
    model.set_graft(graft)
    with pytest.raises(TrainingError, match="pass a DataLoader"):
        dg.finetune(model, found, noise_scheduler=SCHEDULER)


def test_seeking_reads_nothing_of_a_dataset_and_all_of_an_iterator():
    expected = taken(ShuffledBatches(Numbers(), 3, seed=0), 9)
    data = Numbers()
    stream = BatchStream(ShuffledBatches(data, 3, seed=0))
    stream.seek(7)
    assert data.read == 0
    assert taken(stream, 2) == expected[7:]
    assert stream.position == 9
    stream = BatchStream({"sample": torch.tensor([float(i)])} for i in range(9))
    stream.seek(7)
    assert taken([stream.peek()], 1) == taken(stream, 1) == [[7.0]]


SAMPLE, LABELS = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([SAMPLE, LABELS], "got list"),
        (None, "got NoneType"),
        ({"sample": SAMPLE.numpy(), "class_labels": LABELS}, "got ndarray"),
        ({"sample": SAMPLE, "class_labels": LABELS, "prompt": "a"}, "does not take prompt"),
        ({"sample": SAMPLE}, "needs class_labels"),
        ({"sample": SAMPLE, "class_labels": None}, "needs class_labels, a tensor"),
        ({"timestep": LABELS, "class_labels": LABELS}, "needs hidden_states"),
        ({"sample": SAMPLE, "class_labels": LABELS + 6}, "of 2 whole numbers below 6"),
        ({"sample": SAMPLE, "class_labels": LABELS[:1]}, "of 2 whole numbers"),
        ({"sample": SAMPLE, "class_labels": LABELS / 2}, "whole"),
        ({"sample": SAMPLE.long(), "class_labels": LABELS}, "clean ones in floating point"),
        ({"sample": SAMPLE[:0], "class_labels": LABELS[:0]}, "A batch holds samples"),
    ],
)
def test_batches_that_do_not_fit_the_model(batch, words, tmp_path):
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[2]": "hyena_x"}))
    before = tensors_of(model)
    with pytest.raises(TrainingError, match=words):
        dg.distill(model, graft, [batch], dg.DistillConfig(steps=1, progress=False), noise_scheduler=SCHEDULER)
    with pytest.raises(TrainingError, match=words):
        dg.distill(model, graft, batches(1), noise_scheduler=SCHEDULER, held_out=[batch], output_dir=tmp_path / "run")
    with pytest.raises(TrainingError, match=words):
        dg.closed_form(model, graft, [batch], noise_scheduler=SCHEDULER)
    with pytest.raises(TrainingError, match=words):
        dg.evaluate(model, [batch], noise_scheduler=SCHEDULER)
    assert same_tensors(model, before)
    model.set_graft(graft)
    with pytest.raises(TrainingError, match=words):
        dg.finetune(
            model,
            [batch],
            dg.FinetuneConfig(steps=1, progress=False),
            noise_scheduler=SCHEDULER,
            output_dir=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()  # neither begun nor are checkpoints of another run dropped


def test_a_null_prompt_takes_the_place_of_what_is_there():
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[2]": "hyena_x"}))
    for null, words in (
        ({"prompt": SAMPLE}, "prompt of a batch is a tensor"),
        ({"class_labels": 3}, "dict of tensors"),
        ([1], "dict of tensors"),
    ):
        with pytest.raises(TrainingError, match=words):
            dg.distill(
                model,
                graft,
                batches(),
                dg.DistillConfig(steps=1, progress=False),
                noise_scheduler=SCHEDULER,
                null_prompt=null,
            )


def test_both_stages_of_a_unet_which_calls_its_noised_input_sample():
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    sample, prompt, generator = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8), torch.Generator()
    clean = {"sample": sample, "encoder_hidden_states": prompt}
    complete = {**clean, "timestep": torch.tensor([3, 4]), "target": sample}
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[0]": "hyena_x"}))
    dg.distill(model, graft, [clean, complete], dg.DistillConfig(steps=2, progress=False), noise_scheduler=SCHEDULER)
    model.set_graft(graft)
    dg.finetune(model, [clean, complete], dg.FinetuneConfig(steps=2, progress=False), noise_scheduler=SCHEDULER)
    noising = Noising(scheduler=SCHEDULER)
    assert torch.equal(noising(model, complete, generator).noisy, sample)
    assert not torch.equal(noising(model, clean, generator).noisy, sample)
