"""Causal language models with random weights, built quickly from a config."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from .. import machine
from ..compat import mark_initialized

BLOCK = (1 << 24) - 3
"""Number of random values that the weights of a large model repeat. Odd, so that matrices of one shape differ."""


def random_model(config: PretrainedConfig, dtype: torch.dtype, *, seed: int = 0) -> PreTrainedModel:
    """Build a causal language model with random weights on the CPU, in `dtype` from the start.

    Matrices repeat one block of normally distributed values. Norms, biases, and buffers such as rotary frequencies are
    initialized by transformers.

    Args:
        config: of a decoder-only model; it is not changed.
        dtype: of all parameters.
        seed: of the random values.

    Raises:
        ValueError: the weights do not fit into the free memory of this machine.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    needed, free = sum(parameter.nbytes for parameter in model.parameters()), machine.available_bytes()
    if free is not None and needed > free:
        raise ValueError(
            f"the weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. Use a smaller model or dtype."
        )
    model.to_empty(device="cpu")
    model.tie_weights()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    generator = torch.Generator().manual_seed(seed)
    block = torch.empty(min(BLOCK, sum(m.numel() for m in matrices)), dtype=dtype)
    block.normal_(std=0.02, generator=generator)
    at = 0
    for matrix in matrices:
        for part in matrix.data.view(-1).split(len(block)):
            ahead = min(len(part), len(block) - at)
            part[:ahead] = block[at : at + ahead]
            part[ahead:] = block[: len(part) - ahead]
            at = (at + len(part)) % len(block)
        mark_initialized(matrix)  # the next line leaves it as it is
    model.initialize_weights()
    return model.eval()
