"""Every setting of a training run, validated in one place. Imports no torch, so the command line can read it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one training run; each is an option of `dovetail train`, whose help is the text below.

    Args:
        target: directory or hub id of the target.
        data: files with one JSON object per line: `messages`, `prompt` and `completion`, or `text`.
        out: directory for the draft, its loss plot and the state to resume from.
        blocks: decoder blocks of the draft.
        fusion: how feature and token are combined, see `DovetailConfig`.
        steps: optimizer steps.
        batch_size: sequences in a step, over all processes and accumulation.
        accumulate: parts that the batch of a step is cut into, to save memory.
        max_length: tokens of a sequence; longer ones are cut.
        lr: peak learning rate of the cosine schedule.
        warmup_steps: steps in which the learning rate rises linearly to its peak.
        clip: largest gradient norm.
        feature_noise: half-width of the uniform noise on input features, in units of their RMS.
        ce_weight: weight of the soft cross-entropy loss beside the SmoothL1 loss.
        rollout: passes over each sequence; from the second on the draft reads its own predictions, as it does below
            the first level of a tree.
        held_out: sequences kept from training for the acceptance estimate.
        eval_every: steps between acceptance estimates.
        save_every: steps between states to resume from.
        seed: seed of initial weights, order and noise.
        dtype: data type of the target while training; auto keeps the one that is stored.
        save_dtype: data type of the stored draft.
        mixed_precision: precision of the draft's passes, as accelerate names it.
        cache_features: directory for target features, which are computed once and kept there; without it they are
            computed whenever they are needed.

    Raises:
        ValueError: a number is out of range, or a value is not one of its choices.
    """

    target: str
    data: tuple[Path, ...]
    out: Path
    blocks: int = 1
    fusion: Literal["dgf", "concat"] = "dgf"
    steps: int = 2000
    batch_size: int = 16
    accumulate: int = 1
    max_length: int = 1024
    lr: float = 1e-3
    warmup_steps: int = 100
    clip: float = 0.5
    feature_noise: float = 0.1
    ce_weight: float = 0.5
    rollout: int = 3
    held_out: int = 32
    eval_every: int = 200
    save_every: int = 500
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    mixed_precision: Literal["no", "bf16"] = "no"
    cache_features: Path | None = None

    def __post_init__(self) -> None:
        at_least_one = (
            "blocks",
            "steps",
            "batch_size",
            "accumulate",
            "rollout",
            "held_out",
            "eval_every",
            "save_every",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate}).")
        if self.max_length < self.rollout + 3:
            raise ValueError(f"max_length ({self.max_length}) is too short for {self.rollout} rollout passes.")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("warmup_steps", "feature_noise", "ce_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name, known in choices().items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if not self.data:
            raise ValueError("no data given: pass at least one .jsonl file.")


def choices() -> dict[str, tuple[str, ...]]:
    """The values that a setting of `TrainingConfig` can have, for those that have a fixed set of them."""
    hints = get_type_hints(TrainingConfig)
    return {f.name: get_args(hints[f.name]) for f in fields(TrainingConfig) if get_origin(hints[f.name]) is Literal}
