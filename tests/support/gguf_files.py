"""GGUF files for tests: quantized matrices, and whole files of tiny models."""

import torch

from dovetail_plugin.kernels.gguf_blocks import BLOCK_TYPES

SCALES_AT = {"Q8_0": [0], "Q4_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}
"""Type -> where the half-precision numbers of a block begin."""


def random_blocks(type_name: str, outputs: int, inputs: int, scale: float = 0.01) -> torch.Tensor:
    """A matrix (outputs, bytes of a row) uint8 whose numbers and factors are any that the type has."""
    found = BLOCK_TYPES[type_name]
    blocks = torch.randint(0, 256, (outputs, inputs // found.weights, found.bytes), dtype=torch.uint8)
    for at in SCALES_AT[type_name]:
        halves = (scale * torch.randn(outputs, inputs // found.weights, 1)).half()
        blocks[..., at : at + 2] = halves.view(torch.uint8)
    return blocks.flatten(1)
