"""Weights to packed weights and back. c-src/kernels.h describes the order of the bytes."""

import mmap
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from . import KINDS
from .library import BLOCK, GROUP, PANEL, SCALES_OF_BLOCKS, packed_bytes

ROWS_AT_ONCE = 2048
"""Outputs that are packed at a time, which bounds the memory that packing takes."""

HUGE_PAGE = 2 << 20
"""Bytes of a huge page on x86-64."""

CANDIDATES = tuple(1 - step / 40 for step in range(1, 9))
"""Further int4 scales that are tried, in units of the one at which the largest weight is a number itself."""


def pack(weight: Tensor, kind: str) -> Tensor:
    """Quantize weights in groups of 32 inputs, and pack them for the kernels.

    Args:
        weight: (M, K) of any float dtype, on any device.
        kind: "int8": the scale makes the largest weight of a group 127. "int4": the scale, of some near that of the
            largest weight, has the smallest squared error.

    Returns:
        (`packed_bytes`,) uint8 on the CPU.

    Raises:
        InputError: weights are infinite, NaN or too large for scales in half precision, or the kind is another one.
    """
    if kind not in KINDS:
        raise InputError(f"weights can be quantized to {', '.join(KINDS)}, not to {kind!r}.")
    outputs, inputs = weight.shape
    packed = memory_for(packed_bytes(outputs, inputs, kind))
    at = 0
    for rows in weight.split(ROWS_AT_ONCE):
        groups = _in_groups(rows.detach().to(device="cpu", dtype=torch.float32))
        scale, numbers = _int8(groups) if kind == "int8" else _int4(groups)
        if not bool(scale.isfinite().all()):
            raise InputError(
                "weights are infinite, NaN or too large for scales in half precision. Name the layer in "
                "modules_to_not_convert."
            )
        part = in_panels(scale, numbers)
        packed[at : at + len(part)] = part
        at += len(part)
    return packed


def memory_for(size: int) -> Tensor:
    """Return (size,) uint8 for packed weights on the CPU, in huge pages where the system has them.

    A pass reads all weights once, and a stream over small pages waits for the address of each: 5 to 13 % of a product
    of one row, measured. torch's memory may have been used before, and then it keeps its small pages.
    """
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without huge pages
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)


def unpack(packed: Tensor, outputs: int, inputs: int, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights (outputs, inputs) that packed weights stand for, on their device in `dtype`."""
    weights = torch.empty(outputs, inputs, dtype=dtype, device=packed.device)
    panels = packed.view(-(-outputs // PANEL), -1).split(ROWS_AT_ONCE // PANEL)
    for part, some in zip(weights.split(ROWS_AT_ONCE), panels, strict=True):
        weights_of_panels = _unpacked_blocks if kind in SCALES_OF_BLOCKS else _unpacked
        part.copy_(weights_of_panels(some, -(-inputs // GROUP), kind)[: len(part), :inputs])
    return weights


def in_panels(scale: Tensor, numbers: Tensor) -> Tensor:
    """Return the packed bytes of weights scale * numbers, for the kinds without blocks.

    Args:
        scale: (panels, 16, groups) float16.
        numbers: (panels, 16, groups, 32), int8 for "int8"; for "int4" uint8, 0 to 15, which stand for -8 to 7.
    """
    return torch.cat([_bytes_by_output(scale), _number_bytes(numbers)], dim=-1).flatten()


def blocks_in_panels(scales: list[Tensor], factors: list[Tensor], numbers: Tensor) -> Tensor:
    """Return the packed bytes of the kinds with blocks; c-src/kernels.h says what they stand for.

    Args:
        scales: one or two (panels, 16, blocks) float16: of the weights, and of the minima.
        factors: two (panels, 16, groups) of 8 bits: of the weights and of the minima, or of both halves of a group.
        numbers: (panels, 16, groups, 32), uint8 0 to 15 for "q4_k" and int8 for "q6_k".
    """
    panels, _, groups, _ = numbers.shape
    of_groups = torch.cat([*map(_bytes_by_output, factors), _number_bytes(numbers)], dim=-1)
    of_blocks = of_groups.view(panels, groups // (BLOCK // GROUP), -1)
    return torch.cat([*map(_bytes_by_output, scales), of_blocks], dim=-1).flatten()


def _unpacked(packed: Tensor, groups: int, kind: str) -> Tensor:
    """Return the weights (16 * panels, 32 * groups) float32 of whole panels, one in each row of `packed`."""
    panels = len(packed)
    parts = packed.view(panels, groups, -1)
    scale, body = _by_output(parts[..., : 2 * PANEL], torch.float16), parts[..., 2 * PANEL :]
    numbers = _int8_numbers(body) if kind == "int8" else _int4_numbers(body) - 8
    return (numbers * scale[..., None]).reshape(panels * PANEL, groups * GROUP)


def _unpacked_blocks(packed: Tensor, groups: int, kind: str) -> Tensor:
    """Return the weights (16 * panels, 32 * groups) float32 of whole panels, one in each row of `packed`."""
    panels, blocks, of_block = len(packed), groups * GROUP // BLOCK, BLOCK // GROUP
    parts = packed.view(panels, blocks, -1)
    scale_bytes = 2 * PANEL * SCALES_OF_BLOCKS[kind]
    scales = _by_output(parts[..., :scale_bytes].reshape(panels, -1, 2 * PANEL), torch.float16)
    scales = scales.view(panels, PANEL, blocks, -1).repeat_interleave(of_block, dim=2)  # (panels, 16, groups, 1 or 2)
    of_groups = parts[..., scale_bytes:].reshape(panels, groups, -1)
    first, second, body = of_groups.split([PANEL, PANEL, of_groups.shape[-1] - 2 * PANEL], dim=-1)
    if kind == "q4_k":
        factor, of_minimum = _by_output(first, torch.uint8), _by_output(second, torch.uint8)
        scale, minimum = scales[..., 0] * factor, scales[..., 1] * of_minimum
        weights = _int4_numbers(body) * scale[..., None] - minimum[..., None]
    else:
        factors = torch.stack([_by_output(first, torch.int8), _by_output(second, torch.int8)], dim=-1)
        weights = _int8_numbers(body) * (scales * factors).repeat_interleave(GROUP // 2, dim=-1)
    return weights.reshape(panels * PANEL, groups * GROUP)


def _in_groups(rows: Tensor) -> Tensor:
    """Return (panels, 16, groups, 32) of rows (M, K), filled up with zeros."""
    outputs, inputs = rows.shape
    panels, groups = -(-outputs // PANEL), -(-inputs // GROUP)
    padded = F.pad(rows, (0, groups * GROUP - inputs, 0, panels * PANEL - outputs))
    return padded.view(panels, PANEL, groups, GROUP)


def _int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales (panels, 16, groups) float16 and numbers (panels, 16, groups, 32) int8."""
    scale = (groups.abs().amax(-1) / 127).half()
    return scale, _divided(groups, scale).round_().clamp_(-127, 127).to(torch.int8)


def _int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales (panels, 16, groups) float16 and numbers 0 to 15 (panels, 16, groups, 32) uint8.

    The weight of the largest magnitude is eight steps below zero, where there is one step more than above.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8
    scale = largest.half()
    numbers, error = _rounded(groups, scale)
    for candidate in CANDIDATES:
        other_scale = (largest * candidate).half()
        other_numbers, other_error = _rounded(groups, other_scale)
        better = other_error < error
        scale, error = torch.where(better, other_scale, scale), torch.where(better, other_error, error)
        numbers = torch.where(better[..., None], other_numbers, numbers)
    return scale, (numbers + 8).to(torch.uint8)


def _rounded(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers -8 to 7 (panels, 16, groups, 32) and their squared errors (panels, 16, groups), as float32."""
    numbers = _divided(groups, scale).round_().clamp_(-8, 7)
    return numbers, (numbers * scale.float()[..., None]).sub_(groups).square_().sum(-1)


def _divided(groups: Tensor, scale: Tensor) -> Tensor:
    """Return groups / scale; zeros where the scale is zero."""
    scale = scale.float()[..., None]
    return torch.where(scale == 0, 0.0, groups / scale)


def _bytes_by_output(numbers: Tensor) -> Tensor:
    """Return (panels, groups, bytes) uint8 of numbers (panels, 16, groups)."""
    return numbers.transpose(1, 2).contiguous().view(torch.uint8)


def _by_output(body: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers (panels, 16, groups) float32 of bytes (panels, groups, ...); `_bytes_by_output` backwards."""
    return body.contiguous().view(dtype).float().transpose(1, 2)


def _number_bytes(numbers: Tensor) -> Tensor:
    """Return (panels, groups, bytes) uint8 of numbers (panels, 16, groups, 32)."""
    return _int8_bytes(numbers) if numbers.dtype == torch.int8 else _int4_bytes(numbers)


def _int8_numbers(body: Tensor) -> Tensor:
    """Return numbers (panels, 16, groups, 32) float32 of bytes; `_int8_bytes` backwards."""
    panels, groups = body.shape[:2]
    pairs = body.contiguous().view(torch.int8).view(panels, groups, GROUP // 2, PANEL, 2)
    return pairs.permute(0, 3, 1, 2, 4).reshape(panels, PANEL, groups, GROUP).float()


def _int4_numbers(body: Tensor) -> Tensor:
    """Return numbers 0 to 15 (panels, 16, groups, 32) float32 of bytes; `_int4_bytes` backwards."""
    panels, groups = body.shape[:2]
    halves = torch.stack([body & 15, body >> 4], dim=2).view(panels, groups, 2, GROUP // 8, PANEL, 4)
    return halves.permute(0, 4, 1, 3, 2, 5).reshape(panels, PANEL, groups, GROUP).float()


def _int8_bytes(numbers: Tensor) -> Tensor:
    """Return (panels, groups, 512) uint8: for each pair of inputs two numbers of each output."""
    panels, _, groups, _ = numbers.shape
    pairs = numbers.view(panels, PANEL, groups, GROUP // 2, 2).permute(0, 2, 3, 1, 4)
    return pairs.reshape(panels, groups, -1).view(torch.uint8)


def _int4_bytes(numbers: Tensor) -> Tensor:
    """Return (panels, groups, 256) uint8: for each eight inputs four numbers in low halves and four in high ones."""
    panels, _, groups, _ = numbers.shape
    halves = numbers.view(panels, PANEL, groups, GROUP // 8, 2, 4).permute(0, 2, 4, 3, 1, 5)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(panels, groups, -1)
