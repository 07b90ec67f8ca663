"""Matrices of GGUF files to packed weights, with the numbers that the file holds.

A row of a quantized matrix is a series of blocks of 32 or 256 weights: scales and numbers, side by side. Here they are
put into the order of the kernels. Nothing is rounded, so the packed weights stand for exactly the weights of the file.
This module knows neither files nor names of tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .library import GROUP, PANEL, packed_bytes
from .packing import ROWS_AT_ONCE, blocks_in_panels, in_panels, memory_for


@dataclass(frozen=True)
class BlockType:
    """A type of quantized matrices.

    Attributes:
        kind: of packed weights that have its numbers.
        weights: that a block holds.
        bytes: of a block.
        pack: makes packed bytes of blocks (panels, 16, blocks, bytes) uint8.
    """

    kind: str
    weights: int
    bytes: int
    pack: Callable[[Tensor], Tensor]


def repack(blocks: Tensor, type_name: str, order: Tensor | None = None) -> Tensor:
    """Pack a quantized matrix for the kernels.

    Args:
        blocks: (M, bytes of a row) uint8, as in the file.
        type_name: its type, a key of `BLOCK_TYPES`.
        order: (M,) int64, the row of `blocks` that each output has, or None for the order of the file.

    Returns:
        (`packed_bytes`,) uint8.

    Raises:
        InputError: a row is not a number of whole blocks, or a scale is infinite or NaN.
    """
    found = BLOCK_TYPES[type_name]
    outputs, row_bytes = blocks.shape
    if row_bytes % found.bytes:
        raise InputError(f"rows of {row_bytes} bytes are not blocks of {found.bytes} bytes, as {type_name} has.")
    packed = memory_for(packed_bytes(outputs, row_bytes // found.bytes * found.weights, found.kind))
    at = 0
    for first in range(0, outputs, ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        rows = blocks[some] if order is None else blocks[order[some]]
        rows = F.pad(rows, (0, 0, 0, -len(rows) % PANEL))
        part = found.pack(rows.view(-1, PANEL, row_bytes // found.bytes, found.bytes))
        packed[at : at + len(part)] = part
        at += len(part)
    return packed


def _q8_0(blocks: Tensor) -> Tensor:
    return in_panels(_halves(blocks[..., :2]), blocks[..., 2:].contiguous().view(torch.int8))


def _q4_0(blocks: Tensor) -> Tensor:
    both = blocks[..., 2:]
    return in_panels(_halves(blocks[..., :2]), torch.cat([both & 15, both >> 4], dim=-1))


def _q4_k(blocks: Tensor) -> Tensor:
    """Twelve bytes hold eight factors and eight factors of minima, of six bits each."""
    low, low_minima, rest = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    factors = torch.cat([low & 63, rest & 15 | low >> 6 << 4], dim=-1)
    minima = torch.cat([low_minima & 63, rest >> 4 | low_minima >> 6 << 4], dim=-1)
    both = blocks[..., 16:].unflatten(-1, (4, GROUP))
    numbers = torch.stack([both & 15, both >> 4], dim=-2)  # (panels, 16, blocks, 4, 2, 32)
    scales = [_halves(blocks[..., :2]), _halves(blocks[..., 2:4])]
    return blocks_in_panels(scales, [factors.flatten(2), minima.flatten(2)], numbers.flatten(2, 4))


def _q6_k(blocks: Tensor) -> Tensor:
    """The low four bits of 128 weights lie in 64 bytes, their high two bits in 32."""
    low = blocks[..., :128].unflatten(-1, (2, 64))
    low = torch.stack([low & 15, low >> 4], dim=-2).flatten(-3).unflatten(-1, (8, GROUP))
    high = blocks[..., 128:192].unflatten(-1, (2, GROUP))
    high = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-3, -2)
    numbers = (low | high << 4).to(torch.int8) - 32  # (panels, 16, blocks, 8, 32)
    factors = blocks[..., 192:208].contiguous().view(torch.int8).unflatten(-1, (8, 2))
    halves = [factors[..., half].flatten(2) for half in (0, 1)]
    return blocks_in_panels([_halves(blocks[..., 208:])], halves, numbers.flatten(2, 3))


def _halves(pairs: Tensor) -> Tensor:
    """Return float16 numbers (panels, 16, blocks) of bytes (panels, 16, blocks, 2)."""
    numbers = pairs.contiguous().view(torch.float16).squeeze(-1)
    if not bool(numbers.isfinite().all()):
        raise InputError("a scale is infinite or NaN.")
    return numbers


BLOCK_TYPES = {
    "Q8_0": BlockType("int8", 32, 34, _q8_0),
    "Q4_0": BlockType("int4", 32, 18, _q4_0),
    "Q4_K": BlockType("q4_k", 256, 144, _q4_k),
    "Q6_K": BlockType("q6_k", 256, 210, _q6_k),
}
"""Name of a type in GGUF files -> how it is packed."""
