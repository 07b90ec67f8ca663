"""Whether a draft fits a target: sizes that must agree, and what is worth saying where they need not.

Enters: the configs of a draft and of a target. Leaves: an error, a warning, or nothing.
"""

import logging
import warnings

from transformers import PretrainedConfig

from .config import DovetailConfig

logger = logging.getLogger(__name__)


def check_fits(config: DovetailConfig, target: PretrainedConfig) -> None:
    """Refuse the config of a target whose sizes are not the draft's.

    Raises:
        ValueError: vocabulary, hidden size or layers differ.
    """
    text = target.get_text_config(decoder=True)
    sizes = {
        "vocabulary": (config.vocab_size, text.vocab_size),
        "hidden size": (config.target_hidden_size or config.hidden_size, text.hidden_size),
    }
    for what, (own, seen) in sizes.items():
        if own != seen:
            raise ValueError(
                f"the draft's {what} is {own}, the target's is {seen}: "
                f"this draft was made for {config.target_name_or_path or 'another target'}, not for "
                f"{target.name_or_path or type(target).__name__}. Train one with "
                "`dovetail train --target DIR`, or load the target that it names."
            )
    config.layers_of(target)


def note_positions(config: DovetailConfig, target: PretrainedConfig) -> None:
    """Many published heads say 2048 positions whatever they were trained for: say that it does not stop them."""
    positions = getattr(target.get_text_config(decoder=True), "max_position_embeddings", None) or 0
    if config.max_position_embeddings < positions:
        logger.warning(
            "the draft's config says %d positions and the target has %d: the draft is used up to the target's length; "
            "beyond its own it may be right less often, and the text is the same.",
            config.max_position_embeddings,
            positions,
        )


def warn_of_other_target(config: DovetailConfig, target: PretrainedConfig) -> None:
    """A draft may fit by its sizes and still have been trained for another model."""
    own, seen = config.target_name_or_path, target.name_or_path
    if own and seen and short_name(own) != short_name(seen):
        warnings.warn(
            f"this draft was trained for {own!r} and is used with {seen!r}: the text stays right, but few "
            "drafted tokens may be accepted.",
            stacklevel=2,
        )


def short_name(name: str) -> str:
    """Last part of a path or hub id: local copies of a hub model keep their name."""
    return name.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1].lower()
