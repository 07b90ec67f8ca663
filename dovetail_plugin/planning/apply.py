"""Puts a loaded pair where a plan says."""

import torch
from transformers import PreTrainedModel

from ..drafts.model import DovetailDraft
from ..targets.layers_on_gpu import PlacedLayers, place_layers
from .device_plan import DevicePlan


def apply_plan(
    plan: DevicePlan, target: PreTrainedModel, draft: DovetailDraft | None = None, gpu: str = "cuda"
) -> PlacedLayers:
    """Put a loaded pair where a plan says: the draft, the tables it borrows, and layers of the target.

    Args:
        plan: of this pair; see `DeviceSplitPolicy.plan`.
        target: on the CPU; a target of another engine than torch stays as it is.
        draft: on any device, not attached to a target yet; None for a plan with prompt lookup.
        gpu: the device that "gpu" stands for in the plan.

    Returns:
        A handle whose `remove()` moves the target's layers back to the CPU.

    Raises:
        ValueError: layers of the target are placed already.
    """
    if draft is not None and plan.draft_dtype is not None:
        draft.to(device=gpu if plan.draft_device == "gpu" else "cpu", dtype=getattr(torch, plan.draft_dtype))
        draft.embedding_device = "cpu" if (plan.draft_device, plan.embedding_device) == ("gpu", "cpu") else None
        draft.draft_vocab_size = plan.draft_vocab_size
    return place_layers(target, plan.gpu_layers, gpu)
