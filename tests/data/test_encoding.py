"""Training sets encoded once from pictures and captions."""

import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image
from safetensors.torch import load_file

import diffusers_graft as dg
from diffusers_graft.data.encoding import to_pixels
from diffusers_graft.errors import TrainingError

from .pipelines import dit_pipeline, flow_pipeline, pixart_pipeline, tiny_vae, wan_vae


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
    with pytest.raises(TrainingError, match="DiTPipeline takes no prompt"):
        dg.data.prompt_encoder(dit_pipeline())
    assert {tensor.dtype for tensor in load_file(next((tmp_path / "b").glob("samples-*"))).values()} == {torch.float32}


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


def test_pictures_of_every_mode_become_pixels_and_cover_the_size_asked_for():
    wide = Image.new("RGB", (40, 10), (255, 0, 0))
    wide.paste((0, 0, 255), (15, 0, 25, 10))
    pixels = to_pixels(wide, 10)
    assert pixels.shape == (3, 10, 10)
    assert pixels[:, 5, 5].tolist() == [-1, -1, 1]
    assert to_pixels(Image.new("L", (6, 4), 128), (2, 3)).shape == (3, 2, 3)
    assert to_pixels(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).unique().tolist() == [1]
    assert to_pixels(Image.new("P", (2, 3))).shape == (3, 3, 2)
    with pytest.raises(TrainingError, match="got ndarray"):
        to_pixels(pixels.numpy())


def test_pictures_and_captions_are_encoded_as_tensors_and_prompts_are(tmp_path):
    pictures = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(3)]
    encoder = dg.data.prompt_encoder(pixart_pipeline())
    call = {"prompts": ["a", "bb", "ccc"], "progress": False}
    found = dg.data.encode(pictures, tiny_vae(), encoder, folder=tmp_path / "a", **call)
    tensors = dg.data.encode([to_pixels(one) for one in pictures], tiny_vae(), encoder, folder=tmp_path / "b", **call)
    for i in range(3):
        assert torch.equal(found[i]["sample"], tensors[i]["sample"])
        assert found[i]["encoder_hidden_states"].unique().tolist() == [i + 1]


def test_prompts_are_encoded_for_a_pipeline_whose_denoiser_is_never_run(tmp_path):
    pipe, _, arguments = flow_pipeline("FluxTransformer2D")
    ran = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    conditioning = dg.data.prompt_encoder(pipe, **arguments)(["one", "three"])
    assert conditioning["encoder_hidden_states"].unique().tolist() == [3.0, 5.0]
    assert conditioning["img_ids"].value.shape[-1] == 3
    assert not ran
    assert not pipe.transformer._forward_pre_hooks
