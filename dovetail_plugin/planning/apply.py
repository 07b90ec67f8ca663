"""Moves a loaded pair to the devices that a plan assigns."""

import torch
from transformers import PreTrainedModel

from ..drafts.model import DovetailDraft
from ..targets.layers_on_gpu import PlacedLayers, place_layers
from .device_plan import DevicePlan


def apply_plan(
    plan: DevicePlan, target: PreTrainedModel, draft: DovetailDraft | None = None, gpu: str = "cuda"
) -> PlacedLayers:
    """Move a loaded pair as planned: the draft, the tables that it borrows, and layers of the target.

    Args:
        plan: plan for this pair, from `DeviceSplitPolicy.plan`.
        target: target on the CPU. A target of another engine than torch is not changed.
        draft: draft on any device, not attached to a target yet. None for a plan with prompt lookup.
        gpu: torch device that the plan calls "gpu".

    Returns:
        A handle whose `remove()` moves the target's layers back to the CPU.

    Raises:
        ValueError: some layers of the target have already been placed.
    """
    if draft is not None and plan.draft_dtype is not None:
        draft.to(device=gpu if plan.draft_device == "gpu" else "cpu", dtype=getattr(torch, plan.draft_dtype))
        draft.embedding_device = "cpu" if (plan.draft_device, plan.embedding_device) == ("gpu", "cpu") else None
        draft.draft_vocab_size = plan.draft_vocab_size
    return place_layers(target, plan.gpu_layers, gpu)
