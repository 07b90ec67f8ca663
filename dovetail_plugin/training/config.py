"""Every number of a training run, validated in one place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FUSIONS = ("dgf", "concat")
PRECISIONS = ("no", "bf16")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TrainingConfig:
    """Of one `dovetail train`.

    Args:
        target: directory or hub id of the target.
        data: files of one JSON object a line: `messages`, `prompt` + `completion`, or `text`.
        out: directory for the draft, its loss plot and the state to resume from.
        blocks, fusion: architecture, see `DovetailConfig`.
        steps: optimizer steps.
        batch_size: sequences in a step, over all processes and accumulation.
        accumulate: gradient accumulation, parts a step's batch is cut into.
        max_length: tokens; longer sequences are cut.
        lr: peak of the cosine schedule. warmup_steps: of the linear rise to it.
        clip: largest gradient norm.
        feature_noise: half-width of the uniform noise on input features, in units of their RMS.
        ce_weight: weight of the soft cross-entropy beside SmoothL1.
        rollout: passes over each sequence; from the second on the draft reads its own predictions, as it
            does below the first level of a tree.
        held_out: sequences kept from training for the acceptance estimate.
        eval_every, save_every: steps between estimates, and between resumable states.
        seed: of initial weights, order and noise.
        dtype: of the target while training. save_dtype: of the stored draft.
        mixed_precision: accelerate's, "no" or "bf16".
        cache_features: directory for target features, computed once; None computes them on the fly.

    Raises:
        ValueError: a number is out of range.
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
    dtype: str = "auto"
    save_dtype: str = "bfloat16"
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
        choices = {"fusion": FUSIONS, "mixed_precision": PRECISIONS, "save_dtype": DTYPES, "dtype": ("auto", *DTYPES)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if not self.data:
            raise ValueError("no data given: pass at least one .jsonl file.")
