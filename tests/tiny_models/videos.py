"""Tiny models of videos and of images among videos, and their inputs: one row a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .draw import HEADS, HUNYUAN, LFE, LTX2, VIDEO, WAN, Draw


def _kandinsky6(z: Draw) -> dict[str, Any]:
    return {
        "hidden_states": z.randn(z.batch, z.frames, 2 * z.height, 2 * z.width, 9),
        "encoder_hidden_states": z.prompt(8),
        "pooled_projections": z.randn(z.batch, 8),
        "timestep": z.time(300, 900),
    }


def _kandinsky5(z: Draw) -> dict[str, Any]:
    return {
        "hidden_states": z.randn(z.batch, z.frames, 2 * z.height, 2 * z.width, 4),
        "encoder_hidden_states": z.prompt(8),
        "timestep": z.time(300, 900),
        "pooled_projections": z.randn(z.batch, 8),
        "visual_rope_pos": [torch.arange(z.frames), torch.arange(z.height), torch.arange(z.width)],
        "text_rope_pos": torch.arange(z.text),
    }


def _framepack(z: Draw) -> dict[str, Any]:
    side, history = (2 * z.height, 2 * z.width), {}
    for name, frames in (("clean", 2), ("history_2x", 2), ("history_4x", 4)):
        history |= {
            f"latents_{name}": z.randn(z.batch, 4, frames, *side),
            f"indices_latents_{name}": torch.arange(frames),
        }
    return z.latents(
        z.video(4),
        8,
        encoder_attention_mask=z.mask(),
        pooled_projections=z.randn(z.batch, 8),
        guidance=torch.full((z.batch,), 6000.0),
        image_embeds=z.randn(z.batch, 5, 8),
        indices_latents=torch.arange(z.frames),
        **history,
    )


def _helios(z: Draw) -> dict[str, Any]:
    side = (2 * z.height, 2 * z.width)
    history = {}
    for name, frames in (("short", 1), ("mid", 2), ("long", 4)):
        history[f"indices_latents_history_{name}"] = torch.ones(z.batch, frames)
        history[f"latents_history_{name}"] = z.randn(z.batch, 4, frames, *side)
    return z.latents(z.video(4), 16, indices_hidden_states=torch.ones(z.batch, z.frames), **history)


def _cosmos3(z: Draw) -> dict[str, Any]:
    text, image = torch.arange(z.text), torch.arange(z.text, z.text + z.tokens)
    return {
        "input_ids": torch.arange(z.text) + 1,
        "text_indexes": text,
        "und_len": z.text,
        "sequence_length": z.text + z.tokens,
        "position_ids": torch.arange(z.text + z.tokens).expand(3, -1),
        "vision_tokens": [z.randn(1, 2, 1, z.height, z.width)],
        "vision_token_shapes": [(1, z.height, z.width)],
        "vision_sequence_indexes": image,
        "vision_mse_loss_indexes": image,
        "vision_timesteps": torch.ones(z.tokens),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def _minimax_h3(z: Draw) -> dict[str, Any]:
    audio, video = 4, z.tokens
    places = torch.arange(z.text + audio + video)
    text, sound, image = places[: z.text], places[z.text : z.text + audio], places[z.text + audio :]
    tags = torch.zeros(len(places)).long()
    tags[text], tags[sound] = 1, 2
    position = torch.zeros(len(places), 3)
    position[:, 0] = torch.where(tags == 0, 0, places)
    position[image] = z.image_ids()
    return {
        "hidden_states": z.randn(z.batch, video, 16),
        "audio_hidden_states": z.randn(z.batch, audio, 6),
        "encoder_hidden_states": z.prompt(8),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": position,
        "video_indices": image,
        "audio_indices": sound,
        "text_indices": text,
    }


def _consisid(z: Draw) -> dict[str, Any]:
    return z.latents(z.frames_first(4), 8, id_vit_hidden=[z.randn(z.batch, 2, 2)], id_cond=z.randn(z.batch, 2))


def _ltx2(z: Draw) -> dict[str, Any]:
    audio = 4
    return {
        "hidden_states": z.randn(z.batch, z.frames * z.tokens, 4),
        "audio_hidden_states": z.randn(z.batch, audio, 4),
        "encoder_hidden_states": z.prompt(16),
        "audio_encoder_hidden_states": z.prompt(16),
        "timestep": z.time(300, 900)[:, None].expand(-1, z.frames * z.tokens),
        "audio_timestep": z.time(300, 900)[:, None].expand(-1, audio),
        "num_frames": z.frames,
        "height": z.height,
        "width": z.width,
        "audio_num_frames": audio,
    }


def _sana_refiner(z: Draw) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2AudioVideoRotaryPosEmbed

    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(
        dim=16,
        patch_size=1,
        patch_size_t=1,
        base_num_frames=20,
        base_height=2048,
        base_width=2048,
        scale_factors=(8, 32, 32),
        modality="video",
        double_precision=False,
        num_attention_heads=2,
    )
    coordinates = rope.prepare_video_coords(z.batch, z.frames, z.height, z.width, device="cpu", fps=24.0)
    return {
        "hidden_states": z.randn(z.batch, z.frames * z.tokens, 4),
        "encoder_hidden_states": z.prompt(16),
        "timestep": z.time(300, 900)[:, None].expand(-1, z.frames * z.tokens),
        "video_rotary_emb": rope(coordinates, device="cpu"),
        "encoder_attention_mask": z.mask(),
    }


def _sana_wm(z: Draw) -> dict[str, Any]:
    camera = torch.eye(4).repeat(z.batch, z.frames, 1, 1)
    camera[..., 2, 3] = 0.1 * torch.arange(z.frames)
    lens = torch.tensor([float(z.width), float(z.height), z.width / 2, z.height / 2]).expand(z.batch, z.frames, 4)
    return {
        "hidden_states": z.video(4, 1),
        "timestep": z.time(300, 900)[:, None, None].expand(-1, 1, z.frames),
        "encoder_hidden_states": z.prompt(8)[:, None],
        "encoder_attention_mask": z.mask().long(),
        "camera_conditions": torch.cat([camera.flatten(-2), lens], -1),
        "chunk_plucker": z.video(8, 1),
    }


def _animate(z: Draw) -> dict[str, Any]:
    return z.latents(
        z.video(12),
        16,
        encoder_hidden_states_image=z.randn(z.batch, 3, 16),
        pose_hidden_states=z.video(4)[:, :, 1:],
        face_pixel_values=z.randn(z.batch, 3, 4 * z.frames - 7, 16, 16),
    )


def _animate2(z: Draw) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    side = (z.frames, 2 * z.height, 2 * z.width)
    return {
        "hidden_states": [z.randn(4, *side)],
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": [z.randn(z.text, 8)],
        "condition_latents": [z.randn(4, *side)],
        "encoder_hidden_states_image": z.randn(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": z.frames * z.tokens,
        "offset_grid_sizes": torch.tensor([[z.frames, z.height, z.width]]),
    }


def _allegro_rope(z: Draw) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *frequencies, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
        embed_dim=12, crops_coords=((0, 0), (z.height, z.width)), grid_size=(z.height, z.width), temporal_size=z.frames
    )
    places = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long())
    return tuple(frequencies), tuple(places.T.reshape(3, 1, -1))


ROWS: dict[str, tuple[dict[str, Any], Callable[[Draw], dict[str, Any]]]] = {
    "AllegroTransformer3DModel": (
        {
            **VIDEO,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 8,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 8,
        },
        lambda z: z.latents(
            z.video(4),
            8,
            attention_mask=torch.ones(z.batch, z.frames, 2 * z.height, 2 * z.width),
            encoder_attention_mask=z.mask(),
            image_rotary_emb=_allegro_rope(z),
        ),
    ),
    "AnyFlowFARTransformer3DModel": (
        {**WAN, "attention_head_dim": 16},
        lambda z: {
            "hidden_states": z.randn(z.batch, 4, 4, 16, 16),
            "timestep": torch.full((z.batch, 4), 500.0),
            "r_timestep": torch.full((z.batch, 4), 250.0),
            "encoder_hidden_states": z.prompt(16),
            "chunk_partition": [2, 2],
        },
    ),
    "AnyFlowTransformer3DModel": (
        WAN,
        lambda z: {
            "hidden_states": z.frames_first(4),
            "timestep": torch.full((z.batch, z.frames), 500.0),
            "r_timestep": torch.full((z.batch, z.frames), 250.0),
            "encoder_hidden_states": z.prompt(16),
        },
    ),
    "ChronoEditTransformer3DModel": (WAN, lambda z: z.latents(z.video(4), 16)),
    "CogVideoXTransformer3DModel": (
        {
            **VIDEO,
            "time_embed_dim": 4,
            "text_embed_dim": 8,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 5,
        },
        lambda z: z.latents(z.frames_first(4), 8),
    ),
    "ConsisIDTransformer3DModel": (
        {
            **VIDEO,
            **LFE,
            "time_embed_dim": 4,
            "text_embed_dim": 8,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 5,
            "cross_attn_interval": 1,
            "is_train_face": True,
            "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1,
        },
        _consisid,
    ),
    "Cosmos3OmniTransformer": (
        {
            "head_dim": 8,
            "hidden_size": 16,
            "intermediate_size": 24,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "rope_axes_dim": [2, 1, 1],
            "vocab_size": 32,
            "dtype": "float32",
        },
        _cosmos3,
    ),
    "CosmosTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 8,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        },
        lambda z: z.latents(z.video(4), 8),
    ),
    "EasyAnimateTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "time_embed_dim": 4,
            "text_embed_dim": 8,
            "mmdit_layers": 2,
            "sample_width": 12,
            "sample_height": 8,
            "add_noise_in_inpaint_model": False,
        },
        lambda z: z.latents(z.video(4), 8),
    ),
    "HeliosTransformer3DModel": (
        {**{name: value for name, value in WAN.items() if name != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)},
        _helios,
    ),
    "HunyuanVideo15Transformer3DModel": (
        {
            **{name: value for name, value in HUNYUAN.items() if name != "num_single_layers"},
            "patch_size": 1,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "target_size": 16,
            "task_type": "t2v",
        },
        lambda z: z.latents(
            z.video(4, 1),
            8,
            encoder_attention_mask=z.mask(),
            encoder_hidden_states_2=z.prompt(8),
            encoder_attention_mask_2=z.mask(),
            image_embeds=z.randn(z.batch, 3, 8),
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {
            **HUNYUAN,
            "pooled_projection_dim": 8,
            "has_image_proj": True,
            "image_proj_dim": 8,
            "has_clean_x_embedder": True,
        },
        _framepack,
    ),
    "HunyuanVideoTransformer3DModel": (
        {**HUNYUAN, "pooled_projection_dim": 8},
        lambda z: z.latents(
            z.video(4),
            8,
            encoder_attention_mask=z.mask(),
            pooled_projections=z.randn(z.batch, 8),
            guidance=torch.full((z.batch,), 6000.0),
        ),
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 8,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        lambda z: z.latents(
            z.randn(z.batch, z.tokens, 4, 1, 2, 2), 8, shape_list=[[(1, z.height, z.width)]] * z.batch
        ),
    ),
    "JoyImageEditTransformer3DModel": (
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 8,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        lambda z: z.latents(z.video(4), 8),
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_text_dim": 8,
            "in_text_dim2": 8,
            "time_dim": 8,
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
        },
        _kandinsky5,
    ),
    "Kandinsky6SRTransformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 8,
            "time_dim": 8,
            "patch_size": (1, 2, 2),
            "model_dim": 32,
            "ff_dim": 32,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        lambda z: {"hidden_states": z.randn(z.batch, z.frames, 16, 16, 9), "timestep": z.time(300, 900)},
    ),
    "Kandinsky6Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 8,
            "in_text_dim2": 8,
            "time_dim": 8,
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        _kandinsky6,
    ),
    "LTX2VideoTransformer3DModel": (LTX2, _ltx2),
    "LTXVideoTransformer3DModel": (
        {**VIDEO, "cross_attention_dim": 16, "caption_channels": 8},
        lambda z: z.latents(
            z.randn(z.batch, z.frames * z.tokens, 4),
            8,
            encoder_attention_mask=z.mask(),
            num_frames=z.frames,
            height=z.height,
            width=z.width,
        ),
    ),
    "LatteTransformer3DModel": (
        {
            **VIDEO,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "sample_size": 8,
            "patch_size": 2,
            "video_length": 3,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
        },
        lambda z: z.latents(z.video(4), 8),
    ),
    "MiniMaxH3Transformer3DModel": (
        {
            **HEADS,
            "hidden_size": 24,
            "num_refiner_layers": 1,
            "ffn_dim": 24,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 8,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
    ),
    "MochiTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 4,
            "max_sequence_length": 5,
        },
        lambda z: z.latents(z.video(4), 8, encoder_attention_mask=z.mask().bool()),
    ),
    "MotifVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_single_layers": 2,
            "text_embed_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda z: z.latents(z.video(4), 8, encoder_attention_mask=z.mask()),
    ),
    "SanaVideoTransformer3DModel": (
        {
            **VIDEO,
            "attention_head_dim": 12,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 8,
            "rope_max_seq_len": 32,
        },
        lambda z: z.latents(z.video(4), 8),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (LTX2, _sana_refiner),
    "SanaWMTransformer3DModel": (
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "caption_channels": 8,
            "mlp_ratio": 2,
            "chunk_plucker_channels": 8,
            "chunk_plucker_post_attn_blocks": 2,
        },
        _sana_wm,
    ),
    "SkyReelsV2Transformer3DModel": (WAN, lambda z: z.latents(z.video(4), 16)),
    "WanAnimate2Transformer3DModel": (
        {
            "text_len": 5,
            "in_dim": 8,
            "dim": 24,
            "ffn_dim": 24,
            "freq_dim": 8,
            "text_dim": 8,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 2,
        },
        _animate2,
    ),
    "WanAnimateTransformer3DModel": (
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        _animate,
    ),
    "WanTransformer3DModel": (WAN, lambda z: z.latents(z.video(4), 16)),
    "WanVACETransformer3DModel": (
        {**WAN, "vace_layers": [0], "vace_in_channels": 6},
        lambda z: z.latents(z.video(4), 16, control_hidden_states=z.video(6)),
    ),
}
