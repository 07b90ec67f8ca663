"""The sizes in a transformers config, read in one place.

Input: the config of a decoder-only language model, composite configs (text and vision) included. Output: a
`ConfigSizes` with one name for each size, whatever the architecture calls it. The module knows nothing of weights,
dtypes or drafts.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

REQUIRED = ("hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers")
INNER_NAMES = ("intermediate_size", "n_inner", "ffn_dim")
EPS_NAMES = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")


@dataclass(frozen=True)
class ConfigSizes:
    """Sizes of a decoder-only language model.

    Attributes:
        hidden_size: width of the residual stream (H).
        vocab_size: rows of the embedding table (V).
        layers: number of decoder layers.
        heads: number of query heads.
        kv_heads: number of key/value heads.
        head_dim: width of a head.
        intermediate_size: inner width of the MLP, in its widest layer.
        positions: `max_position_embeddings`, or None if the config has no limit.
        norm_eps: epsilon of the norms.
    """

    hidden_size: int
    vocab_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    positions: int | None
    norm_eps: float


def sizes_of(config: PretrainedConfig, *, for_draft: bool = False) -> ConfigSizes:
    """Read the sizes of a target's config.

    Args:
        config: of the target.
        for_draft: whether sizes of attention may differ between layers, as in Gemma 4. A draft then gets usual sizes.

    Raises:
        ValueError: the model is an encoder-decoder, a size is missing, or a size differs between layers.
    """
    if config.is_encoder_decoder:
        raise ValueError(
            f"{config.model_type} models are encoder-decoders. Dovetail works with decoder-only language models."
        )
    text = config.get_text_config(decoder=True)
    missing = [name for name in REQUIRED if _field(text, name) is None]
    if missing:
        raise ValueError(
            f"{type(text).__name__} has no {', '.join(missing)}. Dovetail needs a decoder-only language model."
        )
    hidden_size, heads = _number(text, "hidden_size"), _number(text, "num_attention_heads")
    inner = next((value for name in INNER_NAMES if (value := _field(text, name))), 4 * hidden_size)
    return ConfigSizes(
        hidden_size=hidden_size,
        vocab_size=_number(text, "vocab_size"),
        layers=_number(text, "num_hidden_layers"),
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads", default=heads, may_differ=for_draft),
        head_dim=_number(text, "head_dim", default=hidden_size // heads, may_differ=for_draft),
        intermediate_size=max(inner) if isinstance(inner, (list, tuple)) else inner,
        positions=_field(text, "max_position_embeddings") or None,
        norm_eps=next((value for name in EPS_NAMES if (value := _field(text, name)) is not None), 1e-6),
    )


def _field(config: PretrainedConfig, name: str) -> Any:
    """The value of a field, or None if the config does not have it."""
    try:
        return getattr(config, name, None)
    except RuntimeError as error:  # what transformers raises for fields that differ between layers
        raise ValueError(f"{type(config).__name__} has no single {name}: it differs between layers.") from error


def _number(config: PretrainedConfig, name: str, *, default: int | None = None, may_differ: bool = False) -> int:
    try:
        value = _field(config, name)
    except ValueError:
        if not may_differ:
            raise
        value = None
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{type(config).__name__} has {name}={value!r}. Dovetail needs one whole number above 0.")
    return value
