"""Tiny models of images, and their inputs: one row a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .draw import BASIC, FLUX, HEADS, HUNYUAN, ROPE, VIDEO, Draw


def _qwen21(z: Draw) -> dict[str, Any]:
    mask = torch.zeros(z.batch, z.text + z.tokens // 4).bool()
    mask[:, z.text :] = True
    return z.latents(
        z.packed(4),
        8,
        encoder_hidden_states_mask=z.mask().long(),
        img_shapes=[[(1, z.height, z.width)]] * z.batch,
        img_mask=mask,
    ) | {"timestep": z.time()}


def _ideogram(z: Draw) -> dict[str, Any]:
    text, count = z.text, z.text + z.tokens
    hidden, prompt = torch.zeros(z.batch, count, 16), torch.zeros(z.batch, count, 24)
    hidden[:, text:], prompt[:, :text] = z.packed(16), z.prompt(24)
    position = torch.zeros(z.batch, count, 3).long()
    position[:, :text] += torch.arange(text)[:, None]
    position[:, text:] = 65536 + z.image_ids().long()
    indicator = torch.full((z.batch, count), 3)
    indicator[:, text:] = 2
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": prompt,
        "timestep": z.time(),
        "position_ids": position,
        "segment_ids": torch.ones(z.batch, count).long(),
        "indicator": indicator,
    }


def _omnigen(z: Draw) -> dict[str, Any]:
    count = z.text + 1 + z.tokens
    return {
        "hidden_states": z.image(4),
        "timestep": z.time(),
        "input_ids": torch.arange(z.text).expand(z.batch, -1),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(z.batch, count, count),
        "position_ids": torch.arange(count).expand(z.batch, -1),
    }


def _hidream(z: Draw) -> dict[str, Any]:
    return {
        "hidden_states": z.image(4),
        "timesteps": z.steps(),
        "encoder_hidden_states_t5": z.prompt(8),
        "encoder_hidden_states_llama3": z.randn(2, z.batch, z.text, 8),
        "pooled_embeds": z.randn(z.batch, 8),
    }


def _sizes(z: Draw) -> dict[str, Any]:
    return {
        "original_size": torch.full((z.batch, 2), 64.0),
        "target_size": torch.full((z.batch, 2), 64.0),
        "crop_coords": torch.zeros(z.batch, 2),
    }


def _hunyuan_dit(z: Draw) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    rope = get_2d_rotary_pos_embed(8, ((0, 0), (z.height, z.width)), (z.height, z.width), output_type="pt")
    return z.latents(
        z.image(4),
        8,
        text_embedding_mask=torch.ones(z.batch, z.text),
        encoder_hidden_states_t5=z.prompt(8),
        text_embedding_mask_t5=torch.ones(z.batch, z.text),
        image_meta_size=torch.full((z.batch, 6), 64.0),
        style=torch.zeros(z.batch).long(),
        image_rotary_emb=rope,
    )


def _lumina_next(z: Draw) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return z.latents(
        z.image(4),
        8,
        encoder_mask=z.mask(),
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 384, 384),
        cross_attention_kwargs={},
    ) | {"timestep": z.time()}


ROWS: dict[str, tuple[dict[str, Any], Callable[[Draw], dict[str, Any]]]] = {
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 16,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 256,
        },
        lambda z: z.latents(z.image(4), 8) | {"timestep": z.time()},
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 8,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 32, 32),
        },
        lambda z: (
            z.latents(z.image(4), 8, encoder_hidden_states=z.randn(z.batch, 2, z.text, 8)) | {"timestep": z.time()}
        ),
    ),
    "BriaFiboTransformer2DModel": (
        {**FLUX, "text_encoder_dim": 4, "joint_attention_dim": 8},
        lambda z: z.flux(4, 8, text_encoder_layers=[z.prompt(4) for _ in range(4)]),
    ),
    "BriaTransformer2DModel": ({**FLUX, "pooled_projection_dim": None}, lambda z: z.flux(4, 8)),
    "ChromaTransformer2DModel": (
        {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda z: z.flux(4, 8),
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **BASIC,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 16,
            "sample_size": 16,
        },
        lambda z: z.latents(z.image(4), 8, **_sizes(z)),
    ),
    "CogView4Transformer2DModel": (
        {
            **BASIC,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "rope_axes_dim": (8, 8),
        },
        lambda z: z.latents(z.image(4), 8, **_sizes(z)),
    ),
    "DiTTransformer2DModel": (
        {**BASIC, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5, "in_channels": 4},
        lambda z: {"hidden_states": z.image(4), "timestep": z.steps(), "class_labels": torch.arange(z.batch)},
    ),
    "ErnieImageTransformer2DModel": (
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 24,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda z: {
            "hidden_states": z.image(4, 1),
            "timestep": z.time(),
            "text_bth": z.prompt(8),
            "text_lens": torch.full((z.batch,), z.text),
        },
    ),
    "Flux2Transformer2DModel": (
        {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 8},
        lambda z: z.flux(4, 8, axes=4, guidance=torch.ones(z.batch)),
    ),
    "Flux3Transformer2DModel": (
        {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 8, "cond_in_channels": 4},
        lambda z: z.flux(4, 8, axes=4),
    ),
    "FluxTransformer2DModel": (
        {**FLUX, "pooled_projection_dim": 8},
        lambda z: z.flux(4, 8, pooled_projections=z.randn(z.batch, 8)),
    ),
    "GlmImageTransformer2DModel": (
        {
            **BASIC,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 16,
        },
        lambda z: z.latents(
            z.image(4),
            8,
            prior_token_id=torch.arange(z.tokens).expand(z.batch, -1) % 16,
            prior_token_drop=torch.zeros(z.batch, z.tokens).bool(),
            target_size=torch.full((z.batch, 2), 64.0),
            crop_coords=torch.zeros(z.batch, 2),
        ),
    ),
    "HiDreamImageTransformer2DModel": (
        {
            **HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_single_layers": 2,
            "caption_channels": [8, 8],
            "text_emb_dim": 8,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (32, 32),
            "llama_layers": [0, 1, 1, 0],
            "num_routed_experts": 2,
            "num_activated_experts": 1,
        },
        _hidream,
    ),
    "HunyuanDiT2DModel": (
        {
            **BASIC,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 16,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "text_len": 5,
            "text_len_t5": 5,
        },
        _hunyuan_dit,
    ),
    "HunyuanImageTransformer2DModel": (
        {**HUNYUAN, "patch_size": (1, 1), "rope_axes_dim": (8, 8)},
        lambda z: z.latents(z.image(4, 1), 8, encoder_attention_mask=z.mask()),
    ),
    "Ideogram4Transformer2DModel": (
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "intermediate_size": 24,
            "adaln_dim": 8,
            "llm_features_dim": 24,
            "mrope_section": (2, 1, 1),
        },
        _ideogram,
    ),
    "Krea2Transformer2DModel": (
        {
            **HEADS,
            **ROPE,
            "in_channels": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 24,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
        },
        lambda z: {
            "hidden_states": z.packed(4),
            "encoder_hidden_states": z.randn(z.batch, z.text, 3, 8),
            "timestep": z.time(),
            "position_ids": torch.cat([torch.zeros(z.text, 3), z.image_ids()]),
        },
    ),
    "LongCatImageTransformer2DModel": ({**FLUX, "pooled_projection_dim": 8}, lambda z: z.flux(4, 8)),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (64, 32, 32),
            "cap_feat_dim": 8,
        },
        lambda z: z.latents(z.image(4), 8, encoder_attention_mask=z.mask().bool()) | {"timestep": z.time()},
    ),
    "LuminaNextDiT2DModel": (
        {
            "sample_size": 8,
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 8,
        },
        _lumina_next,
    ),
    "NucleusMoEImageTransformer2DModel": (
        {
            **HEADS,
            **ROPE,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "joint_attention_dim": 8,
            "num_experts": 2,
            "mlp_ratio": 8,
            "moe_intermediate_dim": 16,
            "num_key_value_heads": 1,
            "capacity_factors": [2.0, 2.0],
        },
        lambda z: (
            z.latents(
                z.packed(4),
                8,
                encoder_hidden_states_mask=z.mask().bool(),
                img_shapes=[(1, z.height, z.width)] * z.batch,
            )
            | {"timestep": z.time()}
        ),
    ),
    "OmniGenTransformer2DModel": (
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 16,
            "time_step_dim": 4,
            "pos_embed_max_size": 16,
            "rope_scaling": {"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
        },
        _omnigen,
    ),
    "OvisImageTransformer2DModel": ({**FLUX, "out_channels": 4}, lambda z: z.flux(4, 8)),
    "PRXTransformer2DModel": (
        {
            "in_channels": 4,
            "context_in_dim": 8,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda z: z.latents(z.image(4), 8) | {"timestep": z.time()},
    ),
    "PixArtTransformer2DModel": (
        {
            **BASIC,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 8,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "use_additional_conditions": False,
        },
        lambda z: z.latents(
            z.image(4),
            8,
            encoder_attention_mask=z.mask(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
    ),
    "QwenImage21Transformer2DModel": (
        {**HEADS, **ROPE, "in_channels": 4, "out_channels": 4, "context_in_dim": 8, "mlp_ratio": 2},
        _qwen21,
    ),
    "QwenImageTransformer2DModel": (
        {**HEADS, **ROPE, "in_channels": 4, "out_channels": 4, "patch_size": 1, "joint_attention_dim": 8},
        lambda z: (
            z.latents(
                z.packed(4),
                8,
                encoder_hidden_states_mask=z.mask().long(),
                img_shapes=[[(1, z.height, z.width)]] * z.batch,
            )
            | {"timestep": z.time()}
        ),
    ),
    "SD3Transformer2DModel": (
        {
            **BASIC,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 8,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 16,
            "num_layers": 3,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda z: z.latents(z.image(4), 8, pooled_projections=z.randn(z.batch, 8)),
    ),
    "SanaTransformer2DModel": (
        {
            **VIDEO,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "sample_size": 8,
        },
        lambda z: z.latents(z.image(4, 1), 8),
    ),
    "ZImageTransformer2DModel": (
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 8,
            "axes_dims": [4, 6, 6],
            "axes_lens": [256, 32, 32],
        },
        lambda z: {
            "x": [z.randn(4, 1, 2 * z.height, 2 * z.width) for _ in range(z.batch)],
            "t": z.time(),
            "cap_feats": [z.randn(z.text, 8) for _ in range(z.batch)],
        },
    ),
}
