"""Tiny models of sound, of embeddings, and parts of UNets, and their inputs: one row a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .draw import BASIC, Draw


def _protein(z: Draw) -> dict[str, Any]:
    count = z.tokens
    return {
        "bb_ca": z.randn(z.batch, count, 3),
        "local_latents": z.randn(z.batch, count, 4),
        "bb_ca_time": z.time(),
        "local_latents_time": z.time(),
        "padding_mask": torch.ones(z.batch, count).bool(),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(z.batch, count).bool(),
            "supports_local_latent": torch.ones(z.batch, count).bool(),
        },
    }


ROWS: dict[str, tuple[dict[str, Any], Callable[[Draw], dict[str, Any]]]] = {
    "AceStepTransformer1DModel": (
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "encoder_hidden_size": 32,
        },
        lambda z: {
            "hidden_states": z.randn(z.batch, 2 * z.tokens, 8),
            "timestep": z.time(),
            "timestep_r": z.time(),
            "encoder_hidden_states": z.prompt(32),
            "context_latents": z.randn(z.batch, 2 * z.tokens, 16),
        },
    ),
    "DreamLiteTransformer2DModel": (
        {**BASIC, "in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 8},
        lambda z: {"hidden_states": z.image(8, 1), "encoder_hidden_states": z.prompt(8)},
    ),
    "DualTransformer2DModel": (
        {**BASIC, "in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 8},
        lambda z: {"hidden_states": z.image(8, 1), "encoder_hidden_states": z.randn(z.batch, 77 + 257, 8)},
    ),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 8, "latent_dim": 4},
        lambda z: {
            "hidden_states": z.packed(4),
            "encoder_hidden_states": z.prompt(8),
            "encoder_attention_mask": z.mask().bool(),
            "timestep": z.time(),
            "attention_mask": torch.ones(z.batch, z.tokens).bool(),
            "latent_cond": z.packed(4),
        },
    ),
    "MiniMaxMusic3RVQDepthDecoder": (
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "audio_vocab_size": 8,
            "num_codebooks": 4,
        },
        lambda z: {"inputs_embeds": z.randn(z.batch, 4, 16)},
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {
            "in_channels": 4,
            "condition_dim": 8,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 24,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda z: {
            "hidden_states": z.packed(4).transpose(1, 2),
            "timestep": z.time(),
            "encoder_hidden_states": z.packed(8),
        },
    ),
    "PriorTransformer": (
        {**BASIC, "embedding_dim": 8, "num_embeddings": 5, "additional_embeddings": 4},
        lambda z: {
            "hidden_states": z.randn(z.batch, 8),
            "timestep": z.steps(),
            "proj_embedding": z.randn(z.batch, 8),
            "encoder_hidden_states": z.prompt(8),
        },
    ),
    "RFD4ProteinaTransformer": (
        {
            "nlayers": 2,
            "token_dim": 24,
            "nheads": 2,
            "dim_cond": 8,
            "pair_repr_dim": 8,
            "latent_dim": 4,
            "token_type_emb_dim": 4,
            "cath_emb_dim": 4,
            "t_emb_dim": 8,
            "seq_sep_dim": 8,
            "xt_pair_dist_dim": 6,
            "tri_mult_c": 8,
            "num_sequence_classes": 5,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "feats_pair_cond": ("time_emb_bb_ca", "time_emb_local_latents"),
        },
        _protein,
    ),
    "StableAudio3DiTModel": (
        {
            "io_channels": 4,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 8,
            "global_cond_dim": 8,
            "local_add_cond_dim": 4,
            "timestep_features_dim": 8,
            "num_memory_tokens": 3,
        },
        lambda z: {
            "hidden_states": z.packed(4).transpose(1, 2),
            "timestep": z.time(),
            "encoder_hidden_states": z.prompt(8),
            "global_hidden_states": z.randn(z.batch, 8),
            "local_add_cond": z.packed(4).transpose(1, 2),
        },
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 24,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "out_channels": 4,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        lambda z: {
            "hidden_states": z.packed(4).transpose(1, 2),
            "timestep": z.time(),
            "encoder_hidden_states": z.prompt(8),
            "global_hidden_states": z.randn(z.batch, 1, 8),
            "rotary_embedding": (torch.ones(z.tokens + 1, 4), torch.zeros(z.tokens + 1, 4)),
        },
    ),
    "T5FilmDecoder": (
        {"input_dims": 4, "targets_length": 24, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24},
        lambda z: {
            "encodings_and_masks": [(z.prompt(16), z.mask())],
            "decoder_input_tokens": z.randn(z.batch, 24, 4),
            "decoder_noise_time": z.time(),
        },
    ),
    "Transformer2DModel": (
        {**BASIC, "in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 8},
        lambda z: {"hidden_states": z.image(8, 1), "encoder_hidden_states": z.prompt(8)},
    ),
    "TransformerTemporalModel": (
        {**BASIC, "in_channels": 8, "norm_num_groups": 4},
        lambda z: {"hidden_states": z.randn(z.batch * 4, 8, z.height, z.width), "num_frames": 4},
    ),
}
