"""Checks whether a draft fits a target.

The functions compare the configs of a draft and a target. Sizes that must agree raise an error if they differ; other
differences only give a warning.
"""

import logging
import warnings

from transformers import PretrainedConfig

from ..errors import InputError
from .config import DovetailConfig

logger = logging.getLogger(__name__)


def check_fits(config: DovetailConfig, target: PretrainedConfig) -> None:
    """Refuse a target whose sizes do not fit the draft.

    Args:
        config: config of the draft.
        target: config of the target.

    Raises:
        InputError: vocabulary, hidden size or layers differ.
    """
    text = target.get_text_config(decoder=True)
    sizes = {
        "vocabulary": (config.vocab_size, text.vocab_size),
        "hidden size": (config.target_hidden_size or config.hidden_size, text.hidden_size),
    }
    for name, (own, seen) in sizes.items():
        if own != seen:
            raise InputError(
                f"the draft's {name} is {own}, the target's is {seen}: "
                f"this draft was trained for {config.target_name_or_path or 'another target'}, not for "
                f"{target.name_or_path or type(target).__name__}. Load the target that the draft was trained for, or "
                "train a draft with `dovetail train --target DIR`."
            )
    config.layers_of(target)


def note_positions(config: DovetailConfig, target: PretrainedConfig) -> None:
    """Warn if the draft's config has fewer positions than the target.

    Many published drafts have 2048 positions in their config, regardless of how they were trained. They can still be
    used for longer texts.
    """
    positions = getattr(target.get_text_config(decoder=True), "max_position_embeddings", None) or 0
    if config.max_position_embeddings < positions:
        logger.warning(
            "the draft's config has %d positions and the target has %d: the draft is used up to the target's length. "
            "Beyond its own length fewer drafted tokens may be accepted. The text is not affected.",
            config.max_position_embeddings,
            positions,
        )


def warn_of_other_target(config: DovetailConfig, target: PretrainedConfig) -> None:
    """Warn if the draft was trained for a target of another name, even if the sizes fit."""
    own, seen = config.target_name_or_path, target.name_or_path
    if own and seen and short_name(own) != short_name(seen):
        warnings.warn(
            f"this draft was trained for {own!r} and is used with {seen!r}. The text is not affected, but few drafted "
            "tokens may be accepted.",
            stacklevel=2,
        )


def short_name(name: str) -> str:
    """Return the last part of a path or hub id in lower case. Local copies of a hub model usually keep it."""
    return name.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1].lower()
