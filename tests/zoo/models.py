"""A tiny model and inputs for every transformer class of diffusers: one row a class.

A row is (configuration, inputs). Sizes of a forward are counted in *tokens*, not in latent pixels, so that a test knows the
grid without asking the library: `height` x `width` image tokens, `frames` for videos, `text` prompt tokens.
"""
from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models import transformers


@dataclass
class Draw:
    """Sizes of one forward in tokens, and what makes its tensors."""

    batch: int = 2
    frames: int = 3
    height: int = 4
    width: int = 6
    text: int = 5
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def tokens(self):
        return self.height * self.width

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def image(self, channels, patch=2):
        return self.randn(self.batch, channels, self.height * patch, self.width * patch)

    def video(self, channels, patch=2):
        return self.randn(self.batch, channels, self.frames, self.height * patch, self.width * patch)

    def frames_first(self, channels, patch=2):
        return self.randn(self.batch, self.frames, channels, self.height * patch, self.width * patch)

    def packed(self, channels):
        return self.randn(self.batch, self.tokens, channels)

    def prompt(self, width):
        return self.randn(self.batch, self.text, width)

    def time(self, low=0.3, high=0.9):
        return torch.linspace(high, low, self.batch)

    def steps(self):
        return torch.linspace(900, 300, self.batch)

    def mask(self):
        return torch.ones(self.batch, self.text)

    def image_ids(self, axes=3):
        ids = torch.zeros(self.height, self.width, axes)
        ids[..., 1] += torch.arange(self.height)[:, None]
        ids[..., 2] += torch.arange(self.width)
        return ids.flatten(0, 1)

    def latents(self, model_inputs, prompt, **more):
        """The common call: latents, prompt, time."""
        return {"hidden_states": model_inputs, "encoder_hidden_states": self.prompt(prompt), "timestep": self.steps()} | more

    def flux(self, channels, prompt, axes=3, **more):
        return self.latents(self.packed(channels), prompt, img_ids=self.image_ids(axes), txt_ids=torch.zeros(self.text, axes),
                            **more) | {"timestep": self.time()}  # fmt: skip


def _kandinsky6(z):
    return {"hidden_states": z.randn(z.batch, z.frames, 2 * z.height, 2 * z.width, 9), "encoder_hidden_states": z.prompt(8),
            "pooled_projections": z.randn(z.batch, 8), "timestep": z.time(300, 900)}  # fmt: skip


def _kandinsky5(z):
    return {"hidden_states": z.randn(z.batch, z.frames, 2 * z.height, 2 * z.width, 4), "encoder_hidden_states": z.prompt(8),
            "timestep": z.time(300, 900), "pooled_projections": z.randn(z.batch, 8),
            "visual_rope_pos": [torch.arange(z.frames), torch.arange(z.height), torch.arange(z.width)],
            "text_rope_pos": torch.arange(z.text)}  # fmt: skip


def _framepack(z):
    side, history = (2 * z.height, 2 * z.width), {}
    for name, frames in (("clean", 2), ("history_2x", 2), ("history_4x", 4)):
        history |= {f"latents_{name}": z.randn(z.batch, 4, frames, *side), f"indices_latents_{name}": torch.arange(frames)}
    return z.latents(z.video(4), 8, encoder_attention_mask=z.mask(), pooled_projections=z.randn(z.batch, 8),
                     guidance=torch.full((z.batch,), 6000.0), image_embeds=z.randn(z.batch, 5, 8),
                     indices_latents=torch.arange(z.frames), **history)  # fmt: skip


def _helios(z):
    side = (2 * z.height, 2 * z.width)
    history = {}
    for name, frames in (("short", 1), ("mid", 2), ("long", 4)):
        history[f"indices_latents_history_{name}"] = torch.ones(z.batch, frames)
        history[f"latents_history_{name}"] = z.randn(z.batch, 4, frames, *side)
    return z.latents(z.video(4), 16, indices_hidden_states=torch.ones(z.batch, z.frames), **history)


def _cosmos3(z):
    text, image = torch.arange(z.text), torch.arange(z.text, z.text + z.tokens)
    return {"input_ids": torch.arange(z.text) + 1, "text_indexes": text, "und_len": z.text, "sequence_length": z.text + z.tokens,
            "position_ids": torch.arange(z.text + z.tokens).expand(3, -1), "vision_tokens": [z.randn(1, 2, 1, z.height, z.width)],
            "vision_token_shapes": [(1, z.height, z.width)], "vision_sequence_indexes": image, "vision_mse_loss_indexes": image,
            "vision_timesteps": torch.ones(z.tokens), "vision_noisy_frame_indexes": [torch.tensor([0])]}  # fmt: skip


def _minimax_h3(z):
    audio, video = 4, z.tokens
    places = torch.arange(z.text + audio + video)
    text, sound, image = places[: z.text], places[z.text : z.text + audio], places[z.text + audio :]
    tags = torch.zeros(len(places)).long()
    tags[text], tags[sound] = 1, 2
    position = torch.zeros(len(places), 3)
    position[:, 0] = torch.where(tags == 0, 0, places)
    position[image] = z.image_ids()
    return {"hidden_states": z.randn(z.batch, video, 16), "audio_hidden_states": z.randn(z.batch, audio, 6),
            "encoder_hidden_states": z.prompt(8), "timestep": torch.tensor([0.7, 0.3]), "timestep_indices": (tags == 2).long(),
            "token_tags": tags, "position_ids": position, "video_indices": image, "audio_indices": sound, "text_indices": text}  # fmt: skip


def _qwen21(z):
    mask = torch.zeros(z.batch, z.text + z.tokens // 4).bool()
    mask[:, z.text :] = True
    return z.latents(z.packed(4), 8, encoder_hidden_states_mask=z.mask().long(), img_shapes=[[(1, z.height, z.width)]] * z.batch,
                     img_mask=mask) | {"timestep": z.time()}  # fmt: skip


def _ideogram(z):
    text, count = z.text, z.text + z.tokens
    hidden, prompt = torch.zeros(z.batch, count, 16), torch.zeros(z.batch, count, 24)
    hidden[:, text:], prompt[:, :text] = z.packed(16), z.prompt(24)
    position = torch.zeros(z.batch, count, 3).long()
    position[:, :text] += torch.arange(text)[:, None]
    position[:, text:] = 65536 + z.image_ids().long()
    indicator = torch.full((z.batch, count), 3)
    indicator[:, text:] = 2
    return {"hidden_states": hidden, "encoder_hidden_states": prompt, "timestep": z.time(), "position_ids": position,
            "segment_ids": torch.ones(z.batch, count).long(), "indicator": indicator}  # fmt: skip


def _omnigen(z):
    count = z.text + 1 + z.tokens
    return {"hidden_states": z.image(4), "timestep": z.time(), "input_ids": torch.arange(z.text).expand(z.batch, -1),
            "input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(z.batch, count, count),
            "position_ids": torch.arange(count).expand(z.batch, -1)}  # fmt: skip


def _consisid(z):
    return z.latents(z.frames_first(4), 8, id_vit_hidden=[z.randn(z.batch, 2, 2)], id_cond=z.randn(z.batch, 2))


def _ltx2(z):
    audio = 4
    return {"hidden_states": z.randn(z.batch, z.frames * z.tokens, 4), "audio_hidden_states": z.randn(z.batch, audio, 4),
            "encoder_hidden_states": z.prompt(16), "audio_encoder_hidden_states": z.prompt(16),
            "timestep": z.time(300, 900)[:, None].expand(-1, z.frames * z.tokens), "audio_timestep": z.time(300, 900)[:, None].expand(-1, audio),
            "num_frames": z.frames, "height": z.height, "width": z.width, "audio_num_frames": audio}  # fmt: skip


def _sana_refiner(z):
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2AudioVideoRotaryPosEmbed

    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(
        dim=16, patch_size=1, patch_size_t=1, base_num_frames=20, base_height=2048, base_width=2048, scale_factors=(8, 32, 32),
        modality="video", double_precision=False, num_attention_heads=2)  # fmt: skip
    coordinates = rope.prepare_video_coords(z.batch, z.frames, z.height, z.width, device="cpu", fps=24.0)
    return {"hidden_states": z.randn(z.batch, z.frames * z.tokens, 4), "encoder_hidden_states": z.prompt(16),
            "timestep": z.time(300, 900)[:, None].expand(-1, z.frames * z.tokens), "video_rotary_emb": rope(coordinates, device="cpu"),
            "encoder_attention_mask": z.mask()}  # fmt: skip


def _sana_wm(z):
    camera = torch.eye(4).repeat(z.batch, z.frames, 1, 1)
    camera[..., 2, 3] = 0.1 * torch.arange(z.frames)
    lens = torch.tensor([float(z.width), float(z.height), z.width / 2, z.height / 2]).expand(z.batch, z.frames, 4)
    return {"hidden_states": z.video(4, 1), "timestep": z.time(300, 900)[:, None, None].expand(-1, 1, z.frames),
            "encoder_hidden_states": z.prompt(8)[:, None], "encoder_attention_mask": z.mask().long(),
            "camera_conditions": torch.cat([camera.flatten(-2), lens], -1), "chunk_plucker": z.video(8, 1)}  # fmt: skip


def _animate(z):
    return z.latents(z.video(12), 16, encoder_hidden_states_image=z.randn(z.batch, 3, 16),
                     pose_hidden_states=z.video(4)[:, :, 1:], face_pixel_values=z.randn(z.batch, 3, 4 * z.frames - 7, 16, 16))  # fmt: skip


def _animate2(z):
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    side = (z.frames, 2 * z.height, 2 * z.width)
    return {"hidden_states": [z.randn(4, *side)], "timestep": torch.tensor([1.0]), "encoder_hidden_states": [z.randn(z.text, 8)],
            "condition_latents": [z.randn(4, *side)], "encoder_hidden_states_image": z.randn(1, 4, 1280),
            "kv_cache": WanAnimate2KVCache(2), "kv_cache_mode": "extract", "seq_len": z.frames * z.tokens,
            "offset_grid_sizes": torch.tensor([[z.frames, z.height, z.width]])}  # fmt: skip


def _hidream(z):
    return {"hidden_states": z.image(4), "timesteps": z.steps(), "encoder_hidden_states_t5": z.prompt(8),
            "encoder_hidden_states_llama3": z.randn(2, z.batch, z.text, 8), "pooled_embeds": z.randn(z.batch, 8)}  # fmt: skip


def _protein(z):
    count = z.tokens
    return {"bb_ca": z.randn(z.batch, count, 3), "local_latents": z.randn(z.batch, count, 4), "bb_ca_time": z.time(),
            "local_latents_time": z.time(), "padding_mask": torch.ones(z.batch, count).bool(),
            "conditioning": {"is_in_context_conditioning": torch.zeros(z.batch, count).bool(),
                             "supports_local_latent": torch.ones(z.batch, count).bool()}}  # fmt: skip


def _sizes(z):
    return {"original_size": torch.full((z.batch, 2), 64.0), "target_size": torch.full((z.batch, 2), 64.0),
            "crop_coords": torch.zeros(z.batch, 2)}  # fmt: skip


def _hunyuan_dit(z):
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    rope = get_2d_rotary_pos_embed(8, ((0, 0), (z.height, z.width)), (z.height, z.width), output_type="pt")
    return z.latents(z.image(4), 8, text_embedding_mask=torch.ones(z.batch, z.text), encoder_hidden_states_t5=z.prompt(8),
                     text_embedding_mask_t5=torch.ones(z.batch, z.text), image_meta_size=torch.full((z.batch, 6), 64.0),
                     style=torch.zeros(z.batch).long(), image_rotary_emb=rope)  # fmt: skip


def _lumina_next(z):
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return z.latents(z.image(4), 8, encoder_mask=z.mask(), image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 384, 384),
                     cross_attention_kwargs={}) | {"timestep": z.time()}  # fmt: skip


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_ROPE = {"axes_dims_rope": (4, 6, 6)}
_FLUX = {**_HEADS, **_ROPE, "num_single_layers": 2, "in_channels": 4, "joint_attention_dim": 8}
_BASIC = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
_VIDEO = {**_BASIC, "in_channels": 4, "out_channels": 4}
_WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 8,
        "ffn_dim": 24, "num_layers": 2, "rope_max_seq_len": 32}  # fmt: skip
_HUNYUAN = {**_HEADS, "in_channels": 4, "out_channels": 4, "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 8,
            "rope_axes_dim": (4, 6, 6), "patch_size": 2}  # fmt: skip
_LTX2 = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
         "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
         "audio_cross_attention_dim": 8, "num_layers": 2, "caption_channels": 16, "rope_double_precision": False}  # fmt: skip
_LFE = {f"LFE_{name}": value for name, value in {
    "id_dim": 2, "vit_dim": 2, "depth": 5, "dim_head": 8, "num_heads": 2, "num_id_token": 1, "num_querie": 1, "output_dim": 10,
    "ff_mult": 1, "num_scale": 1}.items()}  # fmt: skip

ZOO: dict[str, tuple[dict[str, Any], Any]] = {
    "AceStepTransformer1DModel": (
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "in_channels": 24, "audio_acoustic_hidden_dim": 8, "encoder_hidden_size": 32},
        lambda z: {"hidden_states": z.randn(z.batch, 2 * z.tokens, 8), "timestep": z.time(), "timestep_r": z.time(),
                   "encoder_hidden_states": z.prompt(32), "context_latents": z.randn(z.batch, 2 * z.tokens, 16)}),
    "AllegroTransformer3DModel": (
        {**_VIDEO, "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 8, "sample_height": 8,
         "sample_width": 8, "sample_frames": 8},
        lambda z: z.latents(z.video(4), 8, attention_mask=torch.ones(z.batch, z.frames, 2 * z.height, 2 * z.width),
                            encoder_attention_mask=z.mask(), image_rotary_emb=_allegro_rope(z))),
    "AnyFlowFARTransformer3DModel": (
        {**_WAN, "attention_head_dim": 16},
        lambda z: {"hidden_states": z.randn(z.batch, 4, 4, 16, 16), "timestep": torch.full((z.batch, 4), 500.0),
                   "r_timestep": torch.full((z.batch, 4), 250.0), "encoder_hidden_states": z.prompt(16), "chunk_partition": [2, 2]}),
    "AnyFlowTransformer3DModel": (
        _WAN,
        lambda z: {"hidden_states": z.frames_first(4), "timestep": torch.full((z.batch, z.frames), 500.0),
                   "r_timestep": torch.full((z.batch, z.frames), 250.0), "encoder_hidden_states": z.prompt(16)}),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 16, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "joint_attention_dim": 8, "caption_projection_dim": 16, "pos_embed_max_size": 256},
        lambda z: z.latents(z.image(4), 8) | {"timestep": z.time()}),
    "BriaFibo2Transformer2DModel": (
        {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 8,
         "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 4,
         "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": (4, 6, 6), "axes_lens": (64, 32, 32)},
        lambda z: z.latents(z.image(4), 8, encoder_hidden_states=z.randn(z.batch, 2, z.text, 8)) | {"timestep": z.time()}),
    "BriaFiboTransformer2DModel": (
        {**_FLUX, "text_encoder_dim": 4, "joint_attention_dim": 8},
        lambda z: z.flux(4, 8, text_encoder_layers=[z.prompt(4) for _ in range(4)])),
    "BriaTransformer2DModel": ({**_FLUX, "pooled_projection_dim": None}, lambda z: z.flux(4, 8)),
    "ChromaTransformer2DModel": (
        {**_FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda z: z.flux(4, 8)),
    "ChronoEditTransformer3DModel": (_WAN, lambda z: z.latents(z.video(4), 16)),
    "CogVideoXTransformer3DModel": (
        {**_VIDEO, "time_embed_dim": 4, "text_embed_dim": 8, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
         "max_text_seq_length": 5},
        lambda z: z.latents(z.frames_first(4), 8)),
    "CogView3PlusTransformer2DModel": (
        {**_BASIC, "in_channels": 4, "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 2,
         "pos_embed_max_size": 16, "sample_size": 16},
        lambda z: z.latents(z.image(4), 8, **_sizes(z))),
    "CogView4Transformer2DModel": (
        {**_BASIC, "in_channels": 4, "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4,
         "rope_axes_dim": (8, 8)},
        lambda z: z.latents(z.image(4), 8, **_sizes(z))),
    "ConsisIDTransformer3DModel": (
        {**_VIDEO, **_LFE, "time_embed_dim": 4, "text_embed_dim": 8, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
         "max_text_seq_length": 5, "cross_attn_interval": 1, "is_train_face": True, "cross_attn_dim_head": 1,
         "cross_attn_num_heads": 1},
        _consisid),
    "Cosmos3OmniTransformer": (
        {"head_dim": 8, "hidden_size": 16, "intermediate_size": 24, "latent_channel": 2, "latent_patch_size": 1,
         "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "patch_latent_dim": 2,
         "rope_axes_dim": [2, 1, 1], "vocab_size": 32, "dtype": "float32"},
        _cosmos3),
    "CosmosTransformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "mlp_ratio": 2,
         "text_embed_dim": 8, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "concat_padding_mask": False,
         "extra_pos_embed_type": None},
        lambda z: z.latents(z.video(4), 8)),
    "DiTTransformer2DModel": (
        {**_BASIC, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5, "in_channels": 4},
        lambda z: {"hidden_states": z.image(4), "timestep": z.steps(), "class_labels": torch.arange(z.batch)}),
    "DreamLiteTransformer2DModel": (
        {**_BASIC, "in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 8},
        lambda z: {"hidden_states": z.image(8, 1), "encoder_hidden_states": z.prompt(8)}),
    "DualTransformer2DModel": (
        {**_BASIC, "in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 8},
        lambda z: {"hidden_states": z.image(8, 1), "encoder_hidden_states": z.randn(z.batch, 77 + 257, 8)}),
    "EasyAnimateTransformer3DModel": (
        {**_HEADS, "in_channels": 4, "out_channels": 4, "patch_size": 2, "time_embed_dim": 4, "text_embed_dim": 8, "mmdit_layers": 2,
         "sample_width": 12, "sample_height": 8, "add_noise_in_inpaint_model": False},
        lambda z: z.latents(z.video(4), 8)),
    "ErnieImageTransformer2DModel": (
        {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 24, "in_channels": 4, "out_channels": 4,
         "text_in_dim": 8, "rope_axes_dim": (4, 6, 6)},
        lambda z: {"hidden_states": z.image(4, 1), "timestep": z.time(), "text_bth": z.prompt(8),
                   "text_lens": torch.full((z.batch,), z.text)}),
    "Flux2Transformer2DModel": (
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 8},
        lambda z: z.flux(4, 8, axes=4, guidance=torch.ones(z.batch))),
    "Flux3Transformer2DModel": (
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 8, "cond_in_channels": 4},
        lambda z: z.flux(4, 8, axes=4)),
    "FluxTransformer2DModel": ({**_FLUX, "pooled_projection_dim": 8}, lambda z: z.flux(4, 8, pooled_projections=z.randn(z.batch, 8))),
    "GlmImageTransformer2DModel": (
        {**_BASIC, "in_channels": 4, "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4,
         "prior_vq_quantizer_codebook_size": 16},
        lambda z: z.latents(z.image(4), 8, prior_token_id=torch.arange(z.tokens).expand(z.batch, -1) % 16,
                            prior_token_drop=torch.zeros(z.batch, z.tokens).bool(), target_size=torch.full((z.batch, 2), 64.0),
                            crop_coords=torch.zeros(z.batch, 2))),
    "HeliosTransformer3DModel": (
        {**{name: value for name, value in _WAN.items() if name != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)}, _helios),
    "HiDreamImageTransformer2DModel": (
        {**_HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_single_layers": 2, "caption_channels": [8, 8],
         "text_emb_dim": 8, "axes_dims_rope": (4, 6, 6), "max_resolution": (32, 32), "llama_layers": [0, 1, 1, 0],
         "num_routed_experts": 2, "num_activated_experts": 1},
        _hidream),
    "HunyuanDiT2DModel": (
        {**_BASIC, "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 16, "cross_attention_dim": 8,
         "cross_attention_dim_t5": 8, "pooled_projection_dim": 4, "text_len": 5, "text_len_t5": 5},
        _hunyuan_dit),
    "HunyuanImageTransformer2DModel": (
        {**_HUNYUAN, "patch_size": (1, 1), "rope_axes_dim": (8, 8)},
        lambda z: z.latents(z.image(4, 1), 8, encoder_attention_mask=z.mask())),
    "HunyuanVideo15Transformer3DModel": (
        {**{name: value for name, value in _HUNYUAN.items() if name != "num_single_layers"}, "patch_size": 1, "text_embed_2_dim": 8,
         "image_embed_dim": 8, "target_size": 16, "task_type": "t2v"},
        lambda z: z.latents(z.video(4, 1), 8, encoder_attention_mask=z.mask(), encoder_hidden_states_2=z.prompt(8),
                            encoder_attention_mask_2=z.mask(), image_embeds=z.randn(z.batch, 3, 8))),
    "HunyuanVideoFramepackTransformer3DModel": (
        {**_HUNYUAN, "pooled_projection_dim": 8, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        _framepack),
    "HunyuanVideoTransformer3DModel": (
        {**_HUNYUAN, "pooled_projection_dim": 8},
        lambda z: z.latents(z.video(4), 8, encoder_attention_mask=z.mask(), pooled_projections=z.randn(z.batch, 8),
                            guidance=torch.full((z.batch,), 6000.0))),
    "Ideogram4Transformer2DModel": (
        {"in_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "intermediate_size": 24,
         "adaln_dim": 8, "llm_features_dim": 24, "mrope_section": (2, 1, 1)},
        _ideogram),
    "JoyImageEditPlusTransformer3DModel": (
        {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 8, "num_layers": 2, "rope_dim_list": [4, 6, 6]},
        lambda z: z.latents(z.randn(z.batch, z.tokens, 4, 1, 2, 2), 8, shape_list=[[(1, z.height, z.width)]] * z.batch)),
    "JoyImageEditTransformer3DModel": (
        {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 8, "num_layers": 2, "rope_dim_list": [4, 6, 6]},
        lambda z: z.latents(z.video(4), 8)),
    "Kandinsky5Transformer3DModel": (
        {"in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "model_dim": 24, "ff_dim": 32, "num_text_blocks": 1,
         "num_visual_blocks": 2, "axes_dims": (4, 4, 4)},
        _kandinsky5),
    "Kandinsky6SRTransformer3DModel": (
        {"in_visual_dim": 4, "out_visual_dim": 8, "time_dim": 8, "patch_size": (1, 2, 2), "model_dim": 32, "ff_dim": 32,
         "num_visual_blocks": 2, "axes_dims": (4, 6, 6)},
        lambda z: {"hidden_states": z.randn(z.batch, z.frames, 16, 16, 9), "timestep": z.time(300, 900)}),
    "Kandinsky6Transformer3DModel": (
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "model_dim": 24, "ff_dim": 32,
         "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4), "in_audio_dim": 4, "out_audio_dim": 4},
        _kandinsky6),
    "Krea2Transformer2DModel": (
        {**_HEADS, **_ROPE, "in_channels": 4, "num_key_value_heads": 1, "intermediate_size": 24, "timestep_embed_dim": 8,
         "text_hidden_dim": 8, "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
         "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
        lambda z: {"hidden_states": z.packed(4), "encoder_hidden_states": z.randn(z.batch, z.text, 3, 8), "timestep": z.time(),
                   "position_ids": torch.cat([torch.zeros(z.text, 3), z.image_ids()])}),
    "LTX2VideoTransformer3DModel": (_LTX2, _ltx2),
    "LTXVideoTransformer3DModel": (
        {**_VIDEO, "cross_attention_dim": 16, "caption_channels": 8},
        lambda z: z.latents(z.randn(z.batch, z.frames * z.tokens, 4), 8, encoder_attention_mask=z.mask(), num_frames=z.frames,
                            height=z.height, width=z.width)),
    "LatteTransformer3DModel": (
        {**_VIDEO, "cross_attention_dim": 16, "caption_channels": 8, "sample_size": 8, "patch_size": 2, "video_length": 3,
         "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False},
        lambda z: z.latents(z.video(4), 8)),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 8, "latent_dim": 4},
        lambda z: {"hidden_states": z.packed(4), "encoder_hidden_states": z.prompt(8), "encoder_attention_mask": z.mask().bool(),
                   "timestep": z.time(), "attention_mask": torch.ones(z.batch, z.tokens).bool(), "latent_cond": z.packed(4)}),
    "LongCatImageTransformer2DModel": ({**_FLUX, "pooled_projection_dim": 8}, lambda z: z.flux(4, 8)),
    "Lumina2Transformer2DModel": (
        {"sample_size": 16, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2,
         "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 6, 6), "axes_lens": (64, 32, 32), "cap_feat_dim": 8},
        lambda z: z.latents(z.image(4), 8, encoder_attention_mask=z.mask().bool()) | {"timestep": z.time()}),
    "LuminaNextDiT2DModel": (
        {"sample_size": 8, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16,
         "cross_attention_dim": 8},
        _lumina_next),
    "MiniMaxH3Transformer3DModel": (
        {**_HEADS, "hidden_size": 24, "num_refiner_layers": 1, "ffn_dim": 24, "in_channels": 4, "audio_in_channels": 6,
         "text_dim": 8, "freq_dim": 8, "time_embed_hidden_dim": 16, "time_embed_dim": 8, "rope_freq_dim": 2},
        _minimax_h3),
    "MiniMaxMusic3RVQDepthDecoder": (
        {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "audio_vocab_size": 8, "num_codebooks": 4},
        lambda z: {"inputs_embeds": z.randn(z.batch, 4, 16)}),
    "MiniMaxMusic3Transformer1DModel": (
        {"in_channels": 4, "condition_dim": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
         "ff_inner_dim": 24, "rotary_dim": 4, "fourier_embedding_dim": 8},
        lambda z: {"hidden_states": z.packed(4).transpose(1, 2), "timestep": z.time(), "encoder_hidden_states": z.packed(8)}),
    "MochiTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4,
         "text_embed_dim": 8, "time_embed_dim": 4, "max_sequence_length": 5},
        lambda z: z.latents(z.video(4), 8, encoder_attention_mask=z.mask().bool())),
    "MotifVideoTransformer3DModel": (
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_single_layers": 2, "text_embed_dim": 8, "rope_axes_dim": (4, 6, 6)},
        lambda z: z.latents(z.video(4), 8, encoder_attention_mask=z.mask())),
    "NucleusMoEImageTransformer2DModel": (
        {**_HEADS, **_ROPE, "in_channels": 4, "out_channels": 4, "patch_size": 1, "joint_attention_dim": 8, "num_experts": 2, "mlp_ratio": 8,
         "moe_intermediate_dim": 16, "num_key_value_heads": 1, "capacity_factors": [2.0, 2.0]},
        lambda z: z.latents(z.packed(4), 8, encoder_hidden_states_mask=z.mask().bool(), img_shapes=[(1, z.height, z.width)] * z.batch)
        | {"timestep": z.time()}),
    "OmniGenTransformer2DModel": (
        {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24, "num_layers": 2,
         "pad_token_id": 0, "vocab_size": 16, "time_step_dim": 4, "pos_embed_max_size": 16,
         "rope_scaling": {"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]}},
        _omnigen),
    "OvisImageTransformer2DModel": ({**_FLUX, "out_channels": 4}, lambda z: z.flux(4, 8)),
    "PRXTransformer2DModel": (
        {"in_channels": 4, "context_in_dim": 8, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]},
        lambda z: z.latents(z.image(4), 8) | {"timestep": z.time()}),
    "PixArtTransformer2DModel": (
        {**_BASIC, "in_channels": 4, "out_channels": 8, "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 8,
         "use_additional_conditions": False},
        lambda z: z.latents(z.image(4), 8, encoder_attention_mask=z.mask(),
                            added_cond_kwargs={"resolution": None, "aspect_ratio": None})),
    "PriorTransformer": (
        {**_BASIC, "embedding_dim": 8, "num_embeddings": 5, "additional_embeddings": 4},
        lambda z: {"hidden_states": z.randn(z.batch, 8), "timestep": z.steps(), "proj_embedding": z.randn(z.batch, 8),
                   "encoder_hidden_states": z.prompt(8)}),
    "QwenImage21Transformer2DModel": (
        {**_HEADS, **_ROPE, "in_channels": 4, "out_channels": 4, "context_in_dim": 8, "mlp_ratio": 2}, _qwen21),
    "QwenImageTransformer2DModel": (
        {**_HEADS, **_ROPE, "in_channels": 4, "out_channels": 4, "patch_size": 1, "joint_attention_dim": 8},
        lambda z: z.latents(z.packed(4), 8, encoder_hidden_states_mask=z.mask().long(), img_shapes=[[(1, z.height, z.width)]] * z.batch)
        | {"timestep": z.time()}),
    "RFD4ProteinaTransformer": (
        {"nlayers": 2, "token_dim": 24, "nheads": 2, "dim_cond": 8, "pair_repr_dim": 8, "latent_dim": 4, "token_type_emb_dim": 4,
         "cath_emb_dim": 4, "t_emb_dim": 8, "seq_sep_dim": 8, "xt_pair_dist_dim": 6, "tri_mult_c": 8, "num_sequence_classes": 5,
         "feats_seq": ("xt_bb_ca", "xt_local_latents"), "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
         "feats_pair_repr": ("xt_bb_ca_pair_dists",), "feats_pair_cond": ("time_emb_bb_ca", "time_emb_local_latents")},
        _protein),
    "SD3Transformer2DModel": (
        {**_BASIC, "sample_size": 16, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 8, "caption_projection_dim": 16,
         "pooled_projection_dim": 8, "pos_embed_max_size": 16, "num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda z: z.latents(z.image(4), 8, pooled_projections=z.randn(z.batch, 8))),
    "SanaTransformer2DModel": (
        {**_VIDEO, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8,
         "sample_size": 8},
        lambda z: z.latents(z.image(4, 1), 8)),
    "SanaVideoTransformer3DModel": (
        {**_VIDEO, "attention_head_dim": 12, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12,
         "cross_attention_dim": 24, "caption_channels": 8, "rope_max_seq_len": 32},
        lambda z: z.latents(z.video(4), 8)),
    "SanaWMLTX2RefinerTransformer3DModel": (_LTX2, _sana_refiner),
    "SanaWMTransformer3DModel": (
        {"in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2,
         "linear_head_dim": 16, "caption_channels": 8, "mlp_ratio": 2, "chunk_plucker_channels": 8,
         "chunk_plucker_post_attn_blocks": 2},
        _sana_wm),
    "SkyReelsV2Transformer3DModel": (_WAN, lambda z: z.latents(z.video(4), 16)),
    "StableAudio3DiTModel": (
        {"io_channels": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "cond_token_dim": 8, "global_cond_dim": 8,
         "local_add_cond_dim": 4, "timestep_features_dim": 8, "num_memory_tokens": 3},
        lambda z: {"hidden_states": z.packed(4).transpose(1, 2), "timestep": z.time(), "encoder_hidden_states": z.prompt(8),
                   "global_hidden_states": z.randn(z.batch, 8), "local_add_cond": z.packed(4).transpose(1, 2)}),
    "StableAudioDiTModel": (
        {"sample_size": 24, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "num_key_value_attention_heads": 1, "out_channels": 4, "cross_attention_dim": 8, "time_proj_dim": 8,
         "global_states_input_dim": 8, "cross_attention_input_dim": 8},
        lambda z: {"hidden_states": z.packed(4).transpose(1, 2), "timestep": z.time(), "encoder_hidden_states": z.prompt(8),
                   "global_hidden_states": z.randn(z.batch, 1, 8),
                   "rotary_embedding": (torch.ones(z.tokens + 1, 4), torch.zeros(z.tokens + 1, 4))}),
    "T5FilmDecoder": (
        {"input_dims": 4, "targets_length": 24, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24},
        lambda z: {"encodings_and_masks": [(z.prompt(16), z.mask())], "decoder_input_tokens": z.randn(z.batch, 24, 4),
                   "decoder_noise_time": z.time()}),
    "Transformer2DModel": (
        {**_BASIC, "in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 8},
        lambda z: {"hidden_states": z.image(8, 1), "encoder_hidden_states": z.prompt(8)}),
    "TransformerTemporalModel": (
        {**_BASIC, "in_channels": 8, "norm_num_groups": 4},
        lambda z: {"hidden_states": z.randn(z.batch * 4, 8, z.height, z.width), "num_frames": 4}),
    "WanAnimate2Transformer3DModel": (
        {"text_len": 5, "in_dim": 8, "dim": 24, "ffn_dim": 24, "freq_dim": 8, "text_dim": 8, "out_dim": 4, "num_heads": 2,
         "num_layers": 2},
        _animate2),
    "WanAnimateTransformer3DModel": (
        {**_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 16,
         "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8,
         "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
         "inject_face_latents_blocks": 2},
        _animate),
    "WanTransformer3DModel": (_WAN, lambda z: z.latents(z.video(4), 16)),
    "WanVACETransformer3DModel": (
        {**_WAN, "vace_layers": [0], "vace_in_channels": 6},
        lambda z: z.latents(z.video(4), 16, control_hidden_states=z.video(6))),
    "ZImageTransformer2DModel": (
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 8,
         "axes_dims": [4, 6, 6], "axes_lens": [256, 32, 32]},
        lambda z: {"x": [z.randn(4, 1, 2 * z.height, 2 * z.width) for _ in range(z.batch)], "t": z.time(),
                   "cap_feats": [z.randn(z.text, 8) for _ in range(z.batch)]}),
}  # fmt: skip

ONE_AT_A_TIME = {"Cosmos3OmniTransformer": "it takes one packed sample", "WanAnimate2Transformer3DModel": "lists, one sample here"}


def _allegro_rope(z):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *frequencies, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
        embed_dim=12, crops_coords=((0, 0), (z.height, z.width)), grid_size=(z.height, z.width), temporal_size=z.frames)  # fmt: skip
    places = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long())
    return tuple(frequencies), tuple(places.T.reshape(3, 1, -1))


def exported():
    """Every class diffusers exports as a transformer, by name."""
    return {name: cls for name in dir(transformers) if inspect.isclass(cls := getattr(transformers, name))}


def tiny(name, **settings):
    """A tiny model of a class; parameters at zero get noise, since zeroed gates would hide what attention does."""
    torch.manual_seed(0)
    model = exported()[name](**{**ZOO[name][0], **settings})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs_of(name, **sizes):
    """Arguments of a forward; what a model changes in place is made anew by every call."""
    draw = Draw(**sizes)
    if name in ONE_AT_A_TIME:
        draw.batch = 1
    inputs = ZOO[name][1](draw)
    if "txt_seq_lens" in inspect.signature(exported()[name].forward).parameters:  # diffusers before 0.37
        inputs["txt_seq_lens"] = [draw.text] * draw.batch
    return inputs


def first(output):
    """The first tensor of whatever a model gives."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


@torch.no_grad()
def predict(model, name, **sizes):
    return first(model(**inputs_of(name, **sizes)))
