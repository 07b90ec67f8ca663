"""Fields of configs where the rules of `shrink.py` do not do, by model type.

A dict under the name of a sub-config is for its fields. `VARIANTS` are further cases of families that have options
which change what a target has to do: a text that crosses the length where rotary embeddings change, other positions.
"""

from typing import Any

from transformers import CLIPVisionConfig

from .shrink import LEAVE, MROPE


def rope(**fields: Any) -> dict[str, Any]:
    """Rotary parameters."""
    return {"rope_type": "default", "rope_theta": 10_000.0} | fields


def clip(**fields: Any) -> CLIPVisionConfig:
    """A vision tower instead of one that only timm has, which is not installed. Text does not pass through it."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    return CLIPVisionConfig(**sizes, image_size=32, patch_size=8, **fields)


ROPE_BY_LAYER = {kind: rope(mrope_section=MROPE) for kind in ("full_attention", "sliding_attention")}
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2}
CHAMELEON_IDS = {"<image>": 250, "IMGIMGA": 248, "IMGIMGB": 249}
EMU3_IDS = {"<image>": 250, "<|extra_200|>": 249, "<|visual token 000000|>": 248}
GEMMA4_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "global_head_dim": 16,
    "position_embedding_size": 64,
}
TWO_TILES = [[56, 56]]
"""One tile of an image beside the whole of it."""
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
SLIDING_MLA = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "audio_config": {"codebook_dim": 64},
        "image_token_offset": 256,
        "audio_token_offset": 512,
        "text_config": {"vocab_size": 768},
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"decoder_layers": 2},
    "chameleon": {"vocabulary_map": CHAMELEON_IDS},
    "cohere_compass": {"text_config": {"rope_parameters": ROPE_BY_LAYER}},
    "cohere_compass_text": {"rope_parameters": ROPE_BY_LAYER},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2}
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {**MOE, "n_shared_experts": 1},
    "dots3_note": {"text_config": SLIDING_MLA},
    "dots3_note_text": SLIDING_MLA,
    "emu3": {"vocabulary_map": EMU3_IDS},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": rope(mrope_section=[3, 3, 2])}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "fast_vlm": {"vision_config": clip()},
    "florence2": {
        "vision_config": {"embed_dim": (32, 32, 64, 64), "num_heads": (2, 2, 4, 4), "num_groups": (2, 2, 4, 4)},
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {"vision_config": GEMMA4_VISION},
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 64, "output_proj_dims": 64}},
    "glm4v_moe": {"text_config": {"rope_parameters": rope(mrope_section=[2, 1, 1], partial_rotary_factor=0.5)}},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1, 2],
        "image_grid_pinpoints": [[64, 64]],
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": LEAVE},
    "hunyuan_vl": {"text_config": {"rope_parameters": rope(mrope_section=[2, 2, 2, 2])}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "llava_next": {"image_grid_pinpoints": TWO_TILES},
    "llava_next_video": {"image_grid_pinpoints": TWO_TILES},
    "llava_onevision": {"image_grid_pinpoints": TWO_TILES},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mllama": {"vision_config": {"vision_output_dim": 128}},
    "mistral4": {"head_dim": LEAVE},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 2]}},
    "paddleocr_vl": {"text_config": {"rope_parameters": rope(mrope_section=MROPE)}},
    "perception_lm": {"vision_config": clip(model_args={"embed_dim": 64})},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 240},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 240},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 16)},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "vipllava": {"vision_feature_layers": (-2, -1)},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
}

LONGROPE = rope(
    rope_type="longrope",
    short_factor=[1.0] * 8,
    long_factor=[float(i + 2) for i in range(8)],
    original_max_position_embeddings=32,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "dory/last_loop": {"recurrent_kv_cache_mode": "last_loop", "ngpt_alpha_init": 0.5},
    "falcon/alibi": {"alibi": True},
    "falcon/new_decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt2/reordered": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "llama/dynamic": {"rope_parameters": rope(rope_type="dynamic", factor=2.0), "max_position_embeddings": 48},
    "llama/longrope": {"rope_parameters": LONGROPE},
    "llama/yarn": {
        "rope_parameters": rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=48),
        "max_position_embeddings": 48,
    },
    "phi3/longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "phimoe/longrope": {"rope_parameters": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.2}},
}
"""Model type and a name of the variant -> fields of the config, beside the family's own."""
