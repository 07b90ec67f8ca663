"""Makes the config of a tiny model from a config class alone, by the names of its fields.

What enters is a config with the class's default values, what leaves is one with the same structure: the same kinds of
layers, attention, experts and sub-configs, but a few layers of width 64, four experts, and windows and chunks of 16
tokens. Names of fields are transformers' vocabulary, so the same rules serve families that do not exist yet. Where
they do not do, `overrides.py` has a family's own values.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

VOCAB = 256
HIDDEN, HEADS, HEAD_DIM = 64, 4, 16
WINDOW = 16
"""Tokens of a sliding window or an attention chunk; a text of the table passes it several times."""
POSITIONS = 512
"""Rows of a table of learnt positions, and `max_position_embeddings`."""
LAYERS, MOST_LAYERS = 4, 8
INDEX_HEADS = 32
"""Heads of an index of sparse attention. With few, many scores are zero together, and which of equal ones are chosen
depends on the width of a pass: plain text has no definite answer there."""

LAYER_COUNT = re.compile(
    r"(.*_)?(num_hidden_layers|num_layers|n_layers?|layers|depth|num_blocks|num_layers_per_stack)$"
)
LAYER_INDICES = re.compile(r".*(_layers|idxs|indexes|indices|indexs|layer_ids)$")
KV_HEADS = re.compile(r".*(key_value_heads|kv_heads|kv_n_heads|num_query_groups)$")
TOKEN = re.compile(r".*(token_ids?|token_index|_index|(im_start|im_end|im_newline|image_patch)_id)$")

RULES: list[tuple[str, int | None]] = [
    (r"(qk_head_dim|mamba_d_ssm|mamba_intermediate|time_step_rank|mamba_dt_rank)", None),  # follow from other fields
    (r".*vocab.*|num_embeddings|codebook_size|mel_vocab_size", VOCAB),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|model_max_length)", POSITIONS),
    (r"(context_length|max_2d_position_embeddings|position_embedding_size|max_source_positions|seq_len)", POSITIONS),
    (r"(sliding_window|sliding_window_size|window_size|attention_window_size|.*attention_chunk_size)", WINDOW),
    (r"(keep_window_size|local_attention|local_attention_window_len|local_attn_chunk_length)", WINDOW),
    (r"(lsh_attn_chunk_length|index_topk|mamba_chunk_size|chunk_size|conv_chunksize)", WINDOW),
    (r".*(mamba_n_heads|mamba_num_heads|n_mamba_heads)", 8),
    (r"index_n_heads", INDEX_HEADS),
    (r".*(attention_)?heads(_per_layer)?|n_head|num_linear_heads", HEADS),
    (r".*head_dim(ension)?|d_kv|d_head|dim_head|kv_channels|attention_head_size|resampler_dim_head", HEAD_DIM),
    (r"mamba_d_head|mamba_headdim", HEAD_DIM),
    (r".*(experts_per_tok(en)?|moe_topk|moe_k|moe_top_k)", 2),
    (r"topk_group", 1),
    (r"n_group|num_expert_group", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"(n_routed_experts|.*num_experts|num_local_experts|zero_expert_num|expert_num)", 4),
    (r"max_window_layers|first_k_dense_replace|num_dense_layers|num_kv_shared_layers", 2),
    (r".*(intermediate|ffn|mlp|feed_forward).*(size|dim)(_mlp)?|dff|d_ff|dim_ff|d_inner|.*ffn_dim|n_inner", 96),
    (r".*(hidden_size|hidden_dim|hidden_sizes|d_model|n_embd|emb_dim|embed_dim|embedding_size|embedding_dim)", HIDDEN),
    (r"(projection_dim|.*output_dim|.*input_dim|projection_size|lru_width|width|.*proj_dim|dim_model_base)", HIDDEN),
    (
        r"(dim|.*_out_dim|.*_in_dim|adapter_input_size|classifier_proj_size|input_size|pooler_output_size|backbone_hidden_size)",
        HIDDEN,
    ),
    (r".*(lora_rank|_rank)", HEAD_DIM),
    (r"(mamba_d_state|state_size|ssm_state_size|rotary_dim|laurel_rank)", HEAD_DIM),
    (r"base_channels", 32),
    (r"(original_max_position_embeddings|rel_extent)", 32),
]
"""Pattern that a whole name matches -> the largest value of such a field; None leaves it to the config class."""

PATTERNS = [(re.compile(pattern), value) for pattern, value in RULES]

FLAGS = {"use_sliding_window": True, "is_decoder": True}
"""Fields that choose what is tested: windows where a family has them, and the decoder of families with an encoder."""

UNTIED = {"tie_word_embeddings": False}
"""With random weights that are shared by embedding and head, a model repeats one token."""


MROPE = [4, 2, 2]
"""Pairs of a head's numbers that turn with time, height and width."""

LEAVE = object()
"""As a value of an override: the config class computes the field."""

MISSING = {"num_key_value_heads": HEADS, "head_dim": HEAD_DIM}
"""Values of fields that some config classes leave to checkpoints."""


@dataclass
class TokenIds:
    """Gives token ids beyond the tiny vocabulary new ones at its end, equal ones for equal ids."""

    new: dict[int, int] = field(default_factory=dict)

    def __call__(self, old: int) -> int:
        if old < VOCAB // 2:
            return old
        return self.new.setdefault(old, VOCAB - 1 - len(self.new))


def tiny_config(config_class: type, overrides: dict[str, Any]) -> PretrainedConfig:
    """A config of the same structure as the class's default one, for a model of some ten thousand weights.

    Args:
        config_class: with usable default values.
        overrides: field -> value instead of the rule's; a dict for a sub-config has fields of it.
    """
    known = set(dir(config_class)) | set(getattr(config_class, "__annotations__", {}))
    flags = {name: value for name, value in FLAGS.items() if name in known}
    return shrunk(config_class(**flags), overrides, TokenIds())


def shrunk(config: PretrainedConfig, overrides: dict[str, Any], ids: TokenIds) -> PretrainedConfig:
    """A tiny config like `config`."""
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_") and k not in IGNORED}
    picks = picked_layers(fields)
    new: dict[str, Any] = {}
    for name, value in fields.items():
        own = overrides.get(name)
        if own is LEAVE:
            continue
        if name in UNTIED:
            new[name] = UNTIED[name]
        elif isinstance(value, PretrainedConfig) and not isinstance(own, PretrainedConfig):
            new[name] = shrunk(value, own or {}, ids)
        elif name in overrides:
            new[name] = own
        else:
            small = shrunk_value(name, value, fields, picks, ids)
            if small is not None:
                new[name] = small
    rope = new.get("rope_parameters")
    turns_in_sections = "mrope_section" in getattr(type(config), "ignore_keys_at_rope_validation", ())
    if rope is not None and turns_in_sections and not any(isinstance(value, dict) for value in rope.values()):
        new["rope_parameters"] = {"mrope_section": MROPE} | rope
    new |= {k: v for k, v in overrides.items() if k not in new and v is not LEAVE}
    return type(config)(**new)


IGNORED = {
    "id2label",
    "label2id",
    "dtype",
    "transformers_version",
    "architectures",
    "return_dict",
    "ignore_keys_at_rope_validation",
}


def shrunk_value(name: str, value: Any, fields: dict[str, Any], picks: dict[int, list[int]], ids: TokenIds) -> Any:
    """The tiny value of one field, or None for the config class's own choice."""
    if value is None and name in MISSING:
        return MISSING[name]
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, dict):
        return small_rope(value) if name.startswith("rope") else value
    if isinstance(value, (list, tuple)):
        return shrunk_list(name, value, picks, ids)
    if not isinstance(value, int):
        return value
    if TOKEN.fullmatch(name):
        return ids(value)
    if name == "window_size" and isinstance(patch := fields.get("patch_size"), int):
        return 4 * patch if value >= 2 * patch else value  # pixels; otherwise patches
    if KV_HEADS.fullmatch(name):
        return small_kv_heads(value, fields)
    for pattern, most in PATTERNS:
        if pattern.fullmatch(name):
            return None if most is None else min(value, most)
    if LAYER_COUNT.fullmatch(name):
        return len(picks.get(value, range(min(value, LAYERS))))
    if name == "image_size" and isinstance(fields.get("patch_size"), int):
        return 4 * fields["patch_size"]
    return value


def small_kv_heads(value: int, fields: dict[str, Any]) -> int:
    """1, 2 or 4 key/value heads, for one head, grouped heads, and as many as queries."""
    heads = [v for k, v in fields.items() if re.fullmatch(r".*heads?", k) and not KV_HEADS.fullmatch(k)]
    if value == 1:
        return 1
    return HEADS if value in heads else 2


def shrunk_list(name: str, value: Any, picks: dict[int, list[int]], ids: TokenIds) -> Any:
    """A list for fewer layers, or of other token ids."""
    numbers = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if TOKEN.fullmatch(name) and numbers:
        return type(value)(ids(v) for v in value)
    if len(value) in picks and not is_indices(name, value, len(value)):
        rule = next((most for pattern, most in PATTERNS if pattern.fullmatch(name)), None)
        chosen = [value[i] for i in picks[len(value)]]
        if numbers and rule is not None:
            chosen = [min(v, rule) for v in chosen]
        return type(value)(chosen)
    for count, layers in picks.items():
        if is_indices(name, value, count):
            return type(value)(new for new, old in enumerate(layers) if old in value)
    return value


def is_indices(name: str, value: Any, count: int) -> bool:
    """Whether a list names layers by their numbers."""
    if not LAYER_INDICES.fullmatch(name) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return False
    return list(value) == sorted(set(value)) and (not value or 0 <= value[0] <= value[-1] < count)


def picked_layers(fields: dict[str, Any]) -> dict[int, list[int]]:
    """Number of layers in the full config -> the layers that a tiny model keeps: one of each kind, four at least."""
    counts = {v for k, v in fields.items() if LAYER_COUNT.fullmatch(k) and isinstance(v, int) and v >= 1}
    counts |= {len(v) for k, v in fields.items() if k == "layer_types" and isinstance(v, (list, tuple))}
    picks = {}
    for count in counts:
        kinds: dict[str, int] = {}
        for layer in range(count):
            kind = []
            for name, value in sorted(fields.items()):
                if not isinstance(value, (list, tuple)):
                    continue
                if is_indices(name, value, count):
                    kind.append(str(layer in value))
                elif len(value) == count:
                    kind.append(str(value[layer]))
            kinds.setdefault(",".join(kind), layer)
        chosen = sorted(kinds.values())[:MOST_LAYERS]
        rest = [layer for layer in range(count) if layer not in chosen]
        picks[count] = sorted(chosen + rest[: max(0, LAYERS - len(chosen))])
    return picks


def small_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters for heads of `HEAD_DIM` numbers."""
    new = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            new[name] = small_rope(value)
        elif name in ("mrope_section", "xdrope_section"):
            half, others = int(HEAD_DIM * parameters.get("partial_rotary_factor", 1.0)) // 2, len(value) - 1
            new[name] = [half - others * (half // len(value)), *[half // len(value)] * others]
        elif name == "original_max_position_embeddings":
            new[name] = 32
        else:
            new[name] = value
    return new
