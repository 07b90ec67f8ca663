"""`TrainingConfig`: all settings of a training run, validated in one place. Needs only the standard library."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

FUSIONS = ("dgf", "concat")
PRECISIONS = ("no", "bf16")
DTYPES = ("float32", "bfloat16", "float16")

_AT_LEAST_ONE = ("blocks", "steps", "batch_size", "accumulate", "rollout", "held_out", "eval_every", "save_every")
_ABOVE_ZERO = ("lr", "clip")
_AT_LEAST_ZERO = ("warmup_steps", "feature_noise", "ce_weight", "seed")


def _setting(text: str, default: Any, choices: tuple[str, ...] | None = None, most: int | None = None) -> Any:
    """A field with a default; `text`, `choices` and the largest value become its metadata."""
    limits = {"choices": choices, "most": most}
    return field(default=default, metadata={"help": text} | {k: v for k, v in limits.items() if v is not None})


@dataclass(frozen=True)
class TrainingConfig:
    """All settings of one training run.

    `dovetail train` has one option for each field. In Python, `metadata["help"]` of a field (see `dataclasses.fields`)
    describes it, `metadata["choices"]` lists its values if there are only a few, and `metadata["most"]` is the largest.

    Raises:
        ValueError: a value is out of range, or two values do not fit each other.
    """

    target: str = field(metadata={"help": "directory or hub id of the target"})
    data: tuple[Path, ...] = field(
        metadata={"help": "files with one JSON object per line: messages, prompt and completion, or text"}
    )
    out: Path = field(metadata={"help": "directory for the draft, its loss plot and the state to resume from"})
    blocks: int = _setting("decoder blocks of the draft", 1, most=6)
    fusion: Literal["dgf", "concat"] = _setting("how the draft combines feature and token", "dgf", FUSIONS)
    steps: int = _setting("optimizer steps", 2000)
    batch_size: int = _setting("sequences per step, over all processes and accumulated parts", 16)
    accumulate: int = _setting("parts that the batch of a step is cut into, to save memory", 1)
    max_length: int = _setting("tokens per sequence; longer sequences are cut", 1024)
    lr: float = _setting("peak learning rate of the cosine schedule", 1e-3)
    warmup_steps: int = _setting("steps in which the learning rate rises linearly to its peak", 100)
    clip: float = _setting("largest gradient norm; larger gradients are scaled down", 0.5)
    feature_noise: float = _setting("half-width of the uniform noise on input features, in units of their RMS", 0.1)
    ce_weight: float = _setting("weight of the soft cross-entropy; the SmoothL1 loss has weight 1", 0.5)
    rollout: int = _setting("passes per sequence; from the second on, the draft reads its own predictions", 3)
    held_out: int = _setting("sequences kept out of training to estimate acceptance, from all parts of the data", 32)
    eval_every: int = _setting("steps between two estimates of acceptance", 200)
    save_every: int = _setting("steps between two states that a run can resume from", 500)
    seed: int = _setting("seed of initial weights, order of the data and noise", 0, most=2**63 - 1)
    dtype: str = _setting("dtype of the target during training; auto: as stored", "auto", ("auto", *DTYPES))
    save_dtype: str = _setting("dtype of the stored draft", "bfloat16", DTYPES)
    mixed_precision: Literal["no", "bf16"] = _setting("mixed precision of the draft's passes", "no", PRECISIONS)
    init_from: str | None = field(
        default=None, metadata={"help": "directory or hub id of a draft whose weights training starts from"}
    )
    cache_features: Path | None = field(
        default=None, metadata={"help": "directory that keeps target features, so that they are computed only once"}
    )

    def __post_init__(self) -> None:
        self._check_range(_AT_LEAST_ONE, "at least 1", lambda value: value >= 1)
        self._check_range(_ABOVE_ZERO, "above 0", lambda value: value > 0)
        self._check_range(_AT_LEAST_ZERO, "at least 0", lambda value: value >= 0)
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate}).")
        if self.max_length < self.rollout + 3:
            raise ValueError(
                f"max_length ({self.max_length}) is too short for {self.rollout} rollout passes. "
                f"Use at least {self.rollout + 3}."
            )
        for setting in fields(self):
            value, choices = getattr(self, setting.name), setting.metadata.get("choices")
            most = setting.metadata.get("most")
            if most is not None and value > most:
                raise ValueError(f"{setting.name} must be at most {most}, got {value}.")
            if choices is not None and value not in choices:
                raise ValueError(f"{setting.name} must be one of {', '.join(choices)}, got {value!r}.")
        if not self.data:
            raise ValueError("data is empty. Pass at least one .jsonl file.")

    def _check_range(self, names: tuple[str, ...], wanted: str, is_valid: Any) -> None:
        for name in names:
            if not is_valid(getattr(self, name)):  # also refuses NaN
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}.")
