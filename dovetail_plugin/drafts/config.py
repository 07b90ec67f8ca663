"""`DovetailConfig`: sizes of a draft, and the target that it was trained for.

It is made from a target's config (`DovetailConfig.for_target`) or read from `config.json`, and `network.py` builds the
draft from it. It contains no budget and no device, because these belong to a run and not to a checkpoint.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from ..compat import LlamaRotaryEmbedding
from ..errors import InputError
from ..targets.config_sizes import sizes_of
from .fields import FIELDS, OVERRIDES, check_fields, check_rope, shown

logger = logging.getLogger(__name__)

# Fields are named as in Llama's config and in the reference checkpoints, so that vLLM and other tools that read
# `config.json` understand them.

EDGES = np.array([0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])
"""Boundaries between the bins."""

BINS = len(EDGES) + 1
"""Number of bins."""

CENTERS = np.concatenate([[0.001], (EDGES[:-1] + EDGES[1:]) / 2, [0.985]])
"""Draft probability that represents each bin."""

EAGLE3_STATES = ("low", "middle", "high")
"""Default features of EAGLE-3: hidden states 2, M // 2 and M - 3 of a target with M layers."""


class DovetailConfig(PretrainedConfig):
    """Configuration of a `DovetailDraft`. The attributes are also the keyword arguments of the constructor.

    Attributes:
        vocab_size: number of tokens of the target (V).
        hidden_size: width of the draft (H). Except for "eagle3", it equals the width of the target.
        intermediate_size: inner width of the draft's MLPs.
        num_hidden_layers: number of draft blocks, 1 or more.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key/value heads (grouped-query attention). It must divide the query heads.
        head_dim: width of a head, an even number.
        rms_norm_eps: epsilon of all RMSNorms.
        rope_parameters: rotary embedding in transformers' format, `{"rope_type": ..., "rope_theta": ...}`.
        max_position_embeddings: number of positions of the target.
        initializer_range: standard deviation of the weights of an untrained draft.
        fusion: `"dgf"` (Dynamic Gating Fusion, the Dovetail paper), `"concat"` (`fc([e ; f])`, EAGLE-1 and EAGLE-2)
            or `"eagle3"` (features of several layers; one block reads feature and token side by side).
        fusion_bias: whether the `fc` of the fusion has a bias.
        attention_bias: whether the q, k and v projections have a bias.
        logit_softcap: soft cap of the target's final logits (Gemma 2), or None.
        logit_scale: factor that turns outputs of the target's head into logits (Cohere, Granite).
        target_name_or_path: target that the draft was trained for.
        target_hidden_size: width of the target's hidden states if it differs from `hidden_size` ("eagle3").
        feature_layers: hidden states that features consist of, in transformers' numbering (0 is the embeddings;
            "eagle3"). None means those of `EAGLE3_STATES`.
        draft_vocab_size: number of tokens of the draft's own head ("eagle3"). None means all.
        norm_before_residual: whether the residual stream begins after the norm of the feature ("eagle3").
        norm_output: whether predictions are fed back after the output norm instead of before it ("eagle3"; EAGLE-3.1).
        own_embedding: whether the checkpoint contains an embedding table ("eagle3").
        calibration: acceptance rates on held-out text for each bin of draft probability (`EDGES`), under
            "greedy" and "sampling". Training measures them. None if they were not measured.

    Raises:
        InputError: a field has a wrong type or is out of bounds (see `fields.FIELDS`), or fields do not fit together.
    """

    model_type = "dovetail"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    fusion: Literal["dgf", "concat", "eagle3"] = "dgf"
    fusion_bias: bool = True
    attention_bias: bool = False
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    target_name_or_path: str | None = None
    target_hidden_size: int | None = None
    feature_layers: list[int] | None = None
    draft_vocab_size: int | None = None
    norm_before_residual: bool = False
    norm_output: bool = False
    own_embedding: bool = False
    calibration: dict[str, list[float]] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "DovetailConfig":
        """Make a config from the content of a config.json.

        Further fields stay, as notes of whoever made the draft. Those that are large, or named as a method of configs,
        are ignored with a warning.

        Args:
            config_dict: content of the file.
            kwargs: see `PretrainedConfig.from_dict`. `name_or_path` names the checkpoint in messages.

        Raises:
            InputError: see `DovetailConfig`.
        """
        name = kwargs.get("name_or_path") or "the draft"
        further = {
            field: value
            for field, value in config_dict.items()
            if field not in FIELDS and not field.startswith("_") and field not in ("model_type", "auto_map")
        }
        read = "transformers_weights"  # which transformers takes for the name of a file
        notes = {f: v for f, v in further.items() if not hasattr(cls, f) and _is_note(v) and f != read}
        if unknown := sorted(further.keys() - notes.keys()):
            logger.warning("%s: config.json has fields that no draft has. They are ignored: %s", name, shown(unknown))
        stored = {field: value for field, value in config_dict.items() if field in FIELDS}
        for field in [field for field in kwargs if field in OVERRIDES]:
            stored[field] = kwargs.pop(field)
        try:
            check_fields(stored, FIELDS)
            made = super().from_dict(stored, **kwargs)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise InputError(
                f"{name}: config.json cannot be used: {error} Correct it, or download the draft again."
            ) from error
        for field, value in notes.items():
            setattr(made[0] if isinstance(made, tuple) else made, field, value)
        return made

    def __post_init__(self, **kwargs: Any) -> None:
        own = {name: getattr(self, name) for name in FIELDS if name in type(self).__dataclass_fields__}
        check_fields(own | kwargs, FIELDS)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": float(kwargs.pop("rope_theta", 10000.0))}
        super().__post_init__(**kwargs)
        self._check()
        self._check_rotary()

    def _check(self) -> None:
        assert self.num_key_value_heads is not None and self.head_dim is not None  # filled in above
        if self.head_dim % 2 or self.head_dim < 2:
            raise InputError(f"head_dim must be even, and 2 or more, for rotary embeddings, got {self.head_dim}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.fusion == "eagle3" and self.num_hidden_layers != 1:
            raise InputError(
                f'num_hidden_layers must be 1 with fusion="eagle3", because EAGLE-3 has one block; '
                f"got {self.num_hidden_layers}."
            )
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise InputError(
                f"draft_vocab_size must be between 1 and vocab_size ({self.vocab_size}), got {self.draft_vocab_size}."
            )
        for name, rates in (self.calibration or {}).items():
            if name not in ("greedy", "sampling") or len(rates) != BINS:
                raise InputError(
                    f'calibration must have {BINS} rates between 0 and 1 under "greedy" and "sampling", got '
                    f"{shown(rates)} under {name!r}."
                )

    def _check_rotary(self) -> None:
        """Refuse rotary parameters that give no table of finite angles for whole heads."""
        assert self.head_dim is not None and self.rope_parameters is not None  # filled in above
        check_rope(self.rope_parameters, self.head_dim)
        try:
            with torch.device("cpu"):
                rotary = LlamaRotaryEmbedding(self)
            usable = rotary.inv_freq.shape == (self.head_dim // 2,) and math.isfinite(rotary.attention_scaling)
            if rotary.rope_type != "default":  # whose angles are finite for every base
                usable = usable and bool(rotary.inv_freq.isfinite().all())
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise InputError(f"rope_parameters cannot be used: {shown(self.rope_parameters)} ({error!r}).") from error
        if not usable:
            raise InputError(
                f"rope_parameters must give {self.head_dim // 2} finite frequencies for heads of {self.head_dim}, got "
                f"{shown(self.rope_parameters)}."
            )

    @property
    def feature_size(self) -> int:
        """Width of the features that the draft reads (F)."""
        if self.fusion != "eagle3":
            return self.hidden_size
        return len(self.feature_layers or EAGLE3_STATES) * (self.target_hidden_size or self.hidden_size)

    def layers_of(self, target: PretrainedConfig) -> tuple[int, ...] | None:
        """Return the hidden states of a target that features consist of; None is the one after the final norm.

        Args:
            target: config of the target.

        Raises:
            InputError: the target does not have these layers.
        """
        if self.fusion != "eagle3":
            return None
        count = target.get_text_config(decoder=True).num_hidden_layers
        layers = tuple(self.feature_layers or (2, count // 2, count - 3))
        if not all(0 <= layer < count for layer in layers):
            raise InputError(
                f"the draft reads hidden states {layers}, but the target has {count} layers. Use the draft with the "
                "target that it was trained for."
            )
        return layers

    @classmethod
    def for_target(
        cls, config: PretrainedConfig, *, blocks: int = 1, fusion: Literal["dgf", "concat"] = "dgf", **overrides: Any
    ) -> "DovetailConfig":
        """Make the config of a draft that fits a target.

        Args:
            config: config of the target.
            blocks: number of draft blocks.
            fusion: see `DovetailConfig`.
            overrides: fields of `DovetailConfig` that replace those of the target.

        Raises:
            ValueError: a size is missing in the target's config, see `sizes_of`.
        """
        sizes, text = sizes_of(config, for_draft=True), config.get_text_config(decoder=True)
        fields: dict[str, Any] = dict(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=blocks,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            rms_norm_eps=sizes.norm_eps,
            rope_parameters=_rope_parameters(text),
            max_position_embeddings=sizes.positions or 2048,
            fusion=fusion,
            logit_softcap=getattr(text, "final_logit_softcapping", None),
            logit_scale=_logit_scale(text),
            target_name_or_path=_public_name(config.name_or_path),
            **{name: getattr(text, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        )
        return cls(**(fields | overrides))


def _is_note(value: Any) -> bool:
    """Return whether a value is JSON of at most 10,000 characters."""
    try:
        return len(json.dumps(value)) <= 10_000
    except (TypeError, ValueError, RecursionError):
        return False


def _public_name(name: str) -> str | None:
    """Return a hub id unchanged, and only the last part of a local path, because paths differ between machines."""
    return Path(name).resolve().name if name and Path(name).is_dir() else name or None


def _logit_scale(config: PretrainedConfig) -> float:
    if getattr(config, "logit_scale", None) is not None:  # Cohere multiplies
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides
        return 1.0 / float(config.logits_scaling)
    return 1.0


def _rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Return the target's rotary parameters for whole heads, those of full attention if kinds of layers differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:
        rope = rope["full_attention"]
    elif rope and all(isinstance(value, dict) for value in rope.values()):
        rope = next(iter(rope.values()))
    rope = rope or {}
    # The draft rotates whole heads, even if the target (GPT-NeoX, Phi) rotates only a part of each.
    rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    # The factors of longrope are sized for the width that the target rotates, so only theta is used.
    if rope.get("rope_type") == "longrope":
        rope = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}
    return {"rope_type": "default", "rope_theta": 10000.0} | rope
