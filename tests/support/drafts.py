"""Random drafts of the tiny Llama, and text for them."""

from pathlib import Path

import torch
from families import prompt, tiny_target
from transformers import PreTrainedModel

from dovetail_plugin import DovetailDraft


def make_draft(fusion="dgf", blocks=1, seed=0):
    torch.manual_seed(seed)
    draft = DovetailDraft.for_target(tiny_target("llama"), fusion=fusion, blocks=blocks)
    for parameter in draft.parameters():  # norms and biases away from their neutral initial values
        parameter.data += torch.randn_like(parameter) * 0.15
    return draft


def text_and_features(length=6):
    generator = torch.Generator().manual_seed(2)
    return prompt(length + 1)[0], torch.randn(length, 32, generator=generator)


def write_draft(directory: Path, target: PreTrainedModel) -> Path:
    """Write a valid draft of two blocks for a target; returns the directory."""
    torch.manual_seed(5)
    DovetailDraft.for_target(target, blocks=2).save_pretrained(directory)
    return directory
