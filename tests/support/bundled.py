"""The bundled pair, loaded on the engine under test."""

from pathlib import Path
from typing import Any

import engines
import torch
from transformers import AutoModelForCausalLM

from dovetail_plugin import DovetailDraft

PAIR = Path(__file__).resolve().parents[2] / "examples" / "tiny_pair"
TARGET, DRAFT = PAIR / "dovetail-tiny-target", PAIR / "dovetail-tiny-draft"


def load_pair(dtype: torch.dtype | str) -> tuple[Any, DovetailDraft]:
    """Target and draft; the draft runs in the engine where the engine can run drafts."""
    target = engines.current().target(AutoModelForCausalLM.from_pretrained(TARGET, dtype=dtype), own_runner=True)
    return target, DovetailDraft.from_pretrained(DRAFT, dtype=dtype)
