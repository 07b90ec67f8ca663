"""Computes the memory that a comparison of engines takes, and refuses it before long work if it does not fit.

All engines are loaded at once, because they take turns. Sizes come from the target's config and from the files of
exported targets; nothing is loaded.
"""

from pathlib import Path

import torch
from transformers import PretrainedConfig

from .. import machine
from ..errors import InputError
from ..kernels import FLOAT
from ..kernels.float_linear import packed_dtype
from ..kernels.library import bytes_per_weight
from ..planning.device_plan import format_bytes
from ..planning.memory import TargetSizes, target_sizes
from ..planning.storage import storage_of
from .engines import ROWS
from .roofline import buffer_bytes

WEIGHT_FILES = (".bin", ".onnx", ".data", ".onnx_data")
"""Endings of the files that hold an exported target's weights."""


def engines_bytes(
    config: PretrainedConfig,
    *,
    dtype: str,
    kinds: list[str],
    exported: dict[str, int],
    draft_bytes: int,
    context: int,
) -> dict[str, int]:
    """Return the bytes of each part of a comparison, by name.

    Args:
        config: of the target.
        dtype: of the target in torch; "auto" is the stored one.
        kinds: kinds of packed weights that are compared.
        exported: name of an exported target -> bytes of its weights.
        draft_bytes: bytes of the draft's own weights.
        context: tokens before each timed pass.

    Raises:
        ValueError: the config belongs to a model that cannot be a target, or the dtype is unknown.
    """
    sizes = target_sizes(config, storage_of(config, dtype))
    embedding, engines = sizes.weights["embedding"], 1 + len(kinds) + len(exported)
    head = sizes.weights["head"] or embedding
    rows_bytes = sum(layer.kv_row_bytes for layer in sizes.layers) * (context + max(ROWS))
    parts = {"torch": sizes.weights_bytes}
    parts |= {kind: _packed(sizes, kind) for kind in kinds}
    parts |= exported
    # A draft shares the tables of a target in torch. Beside others it has a copy of what is quantized there. Its own
    # weights it has once more beside each, packed or in a graph of the engine, in int4 or int8.
    tables = (len(kinds) + 2 * len(exported)) * head
    packed = [bytes_per_weight("int4" if kind == "int4" else "int8") for kind in ("torch", *kinds, *exported)]
    parts["drafts"] = engines * draft_bytes + int(draft_bytes / sizes.storage.run_bytes * sum(packed)) + tables
    parts["keys and values"] = engines * rows_bytes
    parts["buffer for the read bandwidth"] = buffer_bytes()
    return parts


def exported_bytes(directory: Path) -> int:
    """Return the bytes of the weights of an exported target, in a directory or in a file."""
    if directory.is_file():
        return directory.stat().st_size
    return sum(file.stat().st_size for file in directory.rglob("*") if file.suffix in WEIGHT_FILES)


def refuse_without_memory(parts: dict[str, int]) -> None:
    """Refuse a comparison whose parts do not fit the free memory together.

    Raises:
        InputError: names the bytes of each part, and those that are free.
    """
    needed, free = sum(parts.values()), machine.available_bytes()
    if free is None or needed <= free:
        return
    named = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    raise InputError(
        f"the engines are loaded together, which takes {needed} bytes ({named}), and {free} bytes of memory are free. "
        "Name fewer engines or take a smaller target."
    )


def _packed(sizes: TargetSizes, kind: str) -> int:
    """Return the bytes of a target with packed weights: all but the embedding; a tied head is packed, too."""
    embedding, head = sizes.weights["embedding"], sizes.weights["head"] or sizes.weights["embedding"]
    linear = sum(layer.weights_bytes for layer in sizes.layers) + head
    rest = sizes.weights_bytes - embedding - sizes.weights["head"] - (linear - head)
    share = _bytes_of_a_weight(kind, sizes.storage.run_bytes) / sizes.storage.run_bytes
    return embedding + rest + int(linear * share)


def _bytes_of_a_weight(kind: str, run_bytes: int) -> float:
    """Return the bytes of a packed weight; for floats of 16 bits the larger of what oneDNN makes of both dtypes."""
    if kind != FLOAT:
        return bytes_per_weight(kind)
    dtypes = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if dtype.itemsize == run_bytes]
    return max((packed_dtype(dtype) or dtype).itemsize for dtype in dtypes)
