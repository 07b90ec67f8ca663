"""Builds a tiny random model of a family: fp32, on the CPU, with logits that vary enough for greedy text."""

import copy
import math
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig, PreTrainedModel

from .discovery import Family
from .overrides import OVERRIDES, VARIANTS
from .shrink import tiny_config

MOST_WEIGHTS = 30_000_000
STD = 0.2
"""Of weights, so that the text depends on all of a model."""


class CannotBuildError(Exception):
    """The rules and overrides do not give a model that is tiny."""


def config_for(family: Family) -> PretrainedConfig:
    """The tiny config of a family, which is a part of the full one where the model is made from a part."""
    fields = OVERRIDES.get(family.model_type, {}) | VARIANTS.get(f"{family.model_type}/{family.variant}", {})
    config: Any = tiny_config(CONFIG_MAPPING[family.model_type], fields)
    wanted = getattr(transformers, family.class_name).config_class
    if isinstance(config, wanted):
        return config
    parts = [part for part in vars(config).values() if isinstance(part, wanted)]
    return parts[0] if parts else config


def build(family: Family, seed: int = 0) -> PreTrainedModel:
    """A random model of a family.

    Raises:
        CannotBuildError: it would have more than `MOST_WEIGHTS` weights.
    """
    config, model_class = config_for(family), getattr(transformers, family.class_name)
    with torch.device("meta"):
        weights = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if weights > MOST_WEIGHTS:
        raise CannotBuildError(f"{weights:,} weights")
    torch.manual_seed(seed)
    model = model_class._from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point():
            fan_in = math.prod(parameter.shape[1:])
            parameter.data.normal_(std=min(STD, 1.6 / math.sqrt(fan_in)), generator=generator)
        elif "gate" in name and parameter.numel() == 1:  # closed at first in models that add images to a language model
            parameter.data.fill_(0.5)
    model.generation_config = GenerationConfig()  # without tokens that a family forces or suppresses
    return model
