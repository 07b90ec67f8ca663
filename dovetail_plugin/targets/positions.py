"""How far the positions of a transformers model reach, and where its rotary embedding changes."""

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel


def table_length(model: PreTrainedModel) -> int | None:
    """Return the number of positions that a model has a table for; None where positions are computed.

    Rotary embeddings are computed for any position. `max_position_embeddings` only says how long the training texts
    were, and model cards ask users to go beyond it, for example with yarn.
    """
    if any(hasattr(module, "inv_freq") or hasattr(module, "rope_init_fn") for module in model.modules()):
        return None
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def dynamic_from(config: PretrainedConfig) -> int | None:
    """Return the length of text beyond which each token changes the rotary embedding (dynamic NTK), or None.

    All rows of a pass are rotated as its last row asks for, and those of plain generation each for itself. So beyond
    this length a pass may have one row only.

    Args:
        config: of the text model.
    """
    return config.max_position_embeddings if any(r["rope_type"] == "dynamic" for r in _rotary(config)) else None


def long_from(config: PretrainedConfig) -> int | None:
    """Return the length of text beyond which the rotary embedding is another one (longrope), or None.

    Phi-3 models run their text again at the length that their config names, whatever their rotary embedding is.

    Args:
        config: of the text model.
    """
    named = getattr(config, "original_max_position_embeddings", None)
    own = [r.get("original_max_position_embeddings") for r in _rotary(config) if r["rope_type"] == "longrope"]
    return min(filter(None, (named, *own)), default=None)


def levels_within(boundary: int | None, length: int, cached: int) -> int | None:
    """Return how many levels below the root a pass may have so that it does not cross a boundary; None for any number.

    Args:
        boundary: see `long_from`.
        length: tokens of the text, the root included.
        cached: rows in the cache. Beyond the boundary, models begin a new cache if theirs has no more rows than it.
    """
    if boundary is None or (length > boundary and cached > boundary):
        return None
    return max(boundary - length, 0)


def _rotary(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary settings of a config: one, or one for each type of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    each = [value for value in settings.values() if isinstance(value, dict)] or [settings]
    return [one for one in each if one.get("rope_type")]
