"""Puts a loaded pair where a plan says."""

import torch
from transformers import PreTrainedModel

from ..drafts.model import DovetailDraft
from ..targets.layers_on_gpu import place_layers
from .device_plan import DevicePlan


def apply_plan(plan: DevicePlan, target: PreTrainedModel, draft: DovetailDraft, gpu: str = "cuda") -> None:
    """Put a loaded pair where a plan says: the draft, the tables it borrows, and layers of the target.

    Args:
        plan: of this pair; see `DeviceSplitPolicy.plan`.
        target: on the CPU; one of another engine than torch stays as it is.
        draft: anywhere, before it has met the target.
        gpu: the device that "gpu" stands for in the plan.

    Raises:
        ValueError: see `place_layers`.
    """
    device = gpu if plan.draft_device == "gpu" else "cpu"
    draft.to(device=device, dtype=getattr(torch, plan.draft_dtype))
    draft.embedding_device = "cpu" if (plan.draft_device, plan.embedding_device) == ("gpu", "cpu") else None
    draft.draft_vocab_size = plan.draft_vocab_size
    place_layers(target, plan.gpu_layers, gpu)
