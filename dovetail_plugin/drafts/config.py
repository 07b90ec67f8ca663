"""`DovetailConfig`: the shape of a draft model and the target it belongs to.

Enters: a target's config (`DovetailConfig.for_target`) or a stored `config.json`. Leaves: plain numbers
for `modeling.py`. It holds no budgets and no devices: those are decisions of a run, not of a checkpoint.
"""

from pathlib import Path
from typing import Any, Literal

from transformers import PretrainedConfig

from ..targets.config_sizes import sizes_of
from .calibration import BINS

# The fields have Llama's names, as in the reference checkpoints, so that tools which read `config.json`
# (vLLM among them) find what they look for.


EAGLE3_STATES = ("low", "middle", "high")
"""What EAGLE-3 heads read unless their config names layers: hidden states 2, M // 2 and M - 3 of M layers."""


class DovetailConfig(PretrainedConfig):
    """Configuration of a [`DovetailDraft`].

    Args:
        vocab_size: tokens of the target (V).
        hidden_size: width of the target's last hidden state (H), which is also the draft's.
        intermediate_size: inner width of the draft's MLPs.
        num_hidden_layers: draft blocks, 1 or more.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads (grouped-query attention); must divide the query heads.
        head_dim: width of a head.
        rms_norm_eps: epsilon of every RMSNorm.
        rope_parameters: rotary embedding in transformers' format, `{"rope_type": ..., "rope_theta": ...}`.
        max_position_embeddings: positions of the target.
        fusion: `"dgf"` (Dynamic Gating Fusion, the Dovetail paper), `"concat"` (`fc([e ; f])`, EAGLE-1 and EAGLE-2)
            or `"eagle3"` (features of several layers, one block that reads feature and token side by side).
        fusion_bias: whether the fusion's `fc` has a bias. attention_bias: whether q, k and v have.
        logit_softcap: the target's final logit soft cap (Gemma 2), or None.
        logit_scale: factor between the target's head and its logits (Cohere, Granite).
        target_name_or_path: the target this draft was trained for.
        target_hidden_size: width of the target's hidden states where it is not the draft's ("eagle3").
        feature_layers: the hidden states that features are made of, in transformers' numbering, 0 being the
            embeddings ("eagle3"); None takes the three that EAGLE-3 takes.
        draft_vocab_size: tokens of the draft's own head ("eagle3"); None is all.
        norm_before_residual: the residual stream begins behind the feature's norm ("eagle3").
        own_embedding: the checkpoint brings an embedding table of its own ("eagle3").
        calibration: how often nodes of each draft probability were accepted on held-out text, by bin of
            `acceptance.EDGES`, under "greedy" and "sampling"; training measures it. None takes rules of thumb.

    Raises:
        ValueError: a size is not positive, heads do not divide, or `fusion` is unknown.
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
    own_embedding: bool = False
    calibration: dict[str, list[float]] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": float(kwargs.pop("rope_theta", 10000.0))}
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        assert self.num_key_value_heads is not None and self.head_dim is not None  # filled in above
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.fusion not in ("dgf", "concat", "eagle3"):
            raise ValueError(f'fusion must be "dgf", "concat" or "eagle3", got {self.fusion!r}.')
        if self.fusion == "eagle3" and self.num_hidden_layers != 1:
            raise ValueError(f"an EAGLE-3 draft has one block, got num_hidden_layers={self.num_hidden_layers}.")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be between 1 and vocab_size ({self.vocab_size}), got {self.draft_vocab_size}."
            )
        for name, rates in (self.calibration or {}).items():
            if name not in ("greedy", "sampling") or len(rates) != BINS or not all(0.0 <= r <= 1.0 for r in rates):
                raise ValueError(
                    f"calibration must hold {BINS} rates between 0 and 1 under greedy and sampling, got "
                    f"{len(rates)} under {name!r}."
                )

    @property
    def feature_size(self) -> int:
        """F: width of the features that the draft reads."""
        if self.fusion != "eagle3":
            return self.hidden_size
        return len(self.feature_layers or EAGLE3_STATES) * (self.target_hidden_size or self.hidden_size)

    def layers_of(self, target: PretrainedConfig) -> tuple[int, ...] | None:
        """Hidden states of the target that its features are made of; None is the one after the final norm.

        Raises:
            ValueError: the target has no such layers.
        """
        if self.fusion != "eagle3":
            return None
        count = target.get_text_config(decoder=True).num_hidden_layers
        layers = tuple(self.feature_layers or (2, count // 2, count - 3))
        if not all(0 <= layer < count for layer in layers):
            raise ValueError(f"the draft reads hidden states {layers}, but the target has {count} layers.")
        return layers

    @classmethod
    def for_target(
        cls, config: PretrainedConfig, *, blocks: int = 1, fusion: Literal["dgf", "concat"] = "dgf", **overrides: Any
    ) -> "DovetailConfig":
        """The draft config that fits a target's config; `overrides` replace single fields.

        Raises:
            ValueError: a size is missing in the target's config, see `sizes_of`.
        """
        sizes, text = sizes_of(config), config.get_text_config(decoder=True)
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
            pad_token_id=text.pad_token_id,
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
        )
        return cls(**(fields | overrides))


def _public_name(name: str) -> str | None:
    """A hub id as it is; of a local directory only its last part, which means something elsewhere."""
    return Path(name).resolve().name if name and Path(name).is_dir() else name or None


def _logit_scale(config: PretrainedConfig) -> float:
    if getattr(config, "logit_scale", None) is not None:  # Cohere multiplies
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides
        return 1.0 / float(config.logits_scaling)
    return 1.0


def _rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The target's rotary parameters, full width; of several kinds of layers the full-attention one."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:
        rope = rope["full_attention"]
    elif rope and all(isinstance(value, dict) for value in rope.values()):
        rope = next(iter(rope.values()))
    # The draft rotates whole heads, also where the target (GPT-NeoX, Phi) rotates a part of each.
    rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    # longrope and others carry factors sized for the target's own partial width; without them theta is kept.
    if rope.get("rope_type") == "longrope":
        rope = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}
    return {"rope_type": "default", "rope_theta": 10000.0} | rope
