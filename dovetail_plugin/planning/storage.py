"""How a target's weights are stored: float dtypes, exports, and quantized checkpoints of other projects.

`storage_of` takes a config and the dtype that the user asked for and returns a `Storage`, which computes the bytes of a
tensor. The bits of a quantized checkpoint come from its `quantization_config`; methods that are not in `METHODS` are
refused. The module does not know devices or models.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..kernels import FLOAT
from ..kernels.float_linear import packed_dtype
from ..targets.cpu_weights import METHOD
from ..targets.gguf import METHOD as GGUF_METHOD

FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPORTED_RUN_BYTES = 4
"""Bytes of a number in caches and activations of an exported target: the adapters compute in float32 by default."""


@dataclass(frozen=True)
class MatrixFormat:
    """Format of a quantized matrix.

    Attributes:
        bits: bits of one weight.
        group: number of inputs of one output that share a scale; None if all of them do.
        group_bits: bits of the scale and zero point of one group.
    """

    bits: float
    group: int | None
    group_bits: float

    def bytes_of(self, tensor: Tensor) -> int:
        """Return the bytes of a (..., outputs, inputs) matrix in this format."""
        inputs = tensor.shape[-1]
        groups = tensor.numel() // inputs * math.ceil(inputs / (self.group or inputs))
        return math.ceil(tensor.numel() * self.bits / 8) + math.ceil(groups * self.group_bits / 8)


INT8, INT4 = MatrixFormat(8, None, 16), MatrixFormat(4, 128, 16)
"""Matrices as OpenVINO and optimum export them: one float16 scale per output (int8) or per 128 inputs (int4)."""


@dataclass(frozen=True)
class Storage:
    """How a target's weights are stored.

    Attributes:
        name: name for messages, for example "bfloat16", "int4" or "awq (4 bits)".
        dtype: dtype of all tensors that are not quantized.
        run_bytes: bytes of a number in caches and activations.
        matrices: format of the decoder layers' matrices; None if they are not quantized.
        tables: format of the embedding table, the head and everything else outside the decoder layers.
        exported: whether these are the weights of another engine than torch, or packed for the CPU. Then a plan puts no
            layer on a GPU.
        experts_only: whether only the stacked matrices of experts are quantized.
        kept: regular expressions of module names whose weights stay in `dtype`.
        packs_head: whether the head is packed in the format of `matrices`, also if it is tied to the embedding, which
            stays as it is.
    """

    name: str
    dtype: torch.dtype
    run_bytes: int
    matrices: MatrixFormat | None = None
    tables: MatrixFormat | None = None
    exported: bool = False
    experts_only: bool = False
    kept: tuple[str, ...] = ()
    packs_head: bool = False

    def bytes_of(self, name: str, tensor: Tensor, *, in_layer: bool) -> int:
        """Return the bytes of a tensor of a model that was built in `dtype`."""
        form = self.matrices if in_layer else self.tables
        if form is None or tensor.ndim < (3 if self.experts_only else 2) or name.endswith("bias") or self._keeps(name):
            return tensor.nbytes
        return form.bytes_of(tensor)

    def packed_head_bytes(self, name: str, weight: Tensor) -> int | None:
        """Return the bytes of a head's own packed copy of its weight `name`, or None if it has none."""
        if self.matrices is None or not self.packs_head or self._keeps(name):
            return None
        return self.matrices.bytes_of(weight)

    def _keeps(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        return any(re.search(pattern, module) for pattern in self.kept)


EXPORTED = {
    "int8": Storage("int8", torch.float16, EXPORTED_RUN_BYTES, INT8, INT8, exported=True),
    "int4": Storage("int4", torch.float16, EXPORTED_RUN_BYTES, INT4, INT8, exported=True),
}
"""Weights of an exported target. int4 exports keep embedding and head at 8 bits. Norms and biases are float16."""


def storage_of(config: PretrainedConfig, dtype: str | None) -> Storage:
    """Return how the weights of a model are stored.

    Args:
        config: config of the model. Its `quantization_config` is used only if `dtype` is None or "auto".
        dtype: a name in `FLOAT_DTYPES` or `EXPORTED`. None or "auto" uses the dtype or quantization of the config.

    Raises:
        ValueError: the dtype is unknown, or the checkpoint is quantized by an unknown method.
    """
    quantization = getattr(config, "quantization_config", None)
    if dtype in (None, "auto") and quantization:
        return _quantized(config, quantization if isinstance(quantization, dict) else quantization.to_dict())
    name = stored_dtype(config) or "float32" if dtype in (None, "auto") else str(dtype)
    if name in EXPORTED:
        return EXPORTED[name]
    if name not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join([*FLOAT_DTYPES, *EXPORTED])}, got {name!r}.")
    return Storage(name, FLOAT_DTYPES[name], FLOAT_DTYPES[name].itemsize)


def stored_dtype(config: PretrainedConfig) -> str | None:
    """Return the float dtype of a config, or None. In composite configs it is at the top or in the text config."""
    for part in (config, config.get_text_config(decoder=True)):
        name = str(getattr(part, "dtype", None)).removeprefix("torch.")
        if name in FLOAT_DTYPES:
            return name
    return None


# --- quantized checkpoints ---------------------------------------------------------------------


def _grouped(fields: dict[str, Any]) -> MatrixFormat:
    """Return the format of AWQ and GPTQ, with a float16 scale and a zero point for each group."""
    bits, group = fields["bits"], fields.get("group_size", 128)
    return MatrixFormat(bits, group if group > 0 else None, 16 + bits)


def _of_dtype(dtype: torch.dtype) -> MatrixFormat:
    return MatrixFormat(8 * dtype.itemsize, None, 0)


def _bitsandbytes(fields: dict[str, Any]) -> MatrixFormat:
    if not fields.get("load_in_4bit"):
        return MatrixFormat(8, None, 32)
    return MatrixFormat(4, 64, 8 + 32 / 256 if fields.get("bnb_4bit_use_double_quant") else 32)


def _fp8(fields: dict[str, Any]) -> MatrixFormat:
    rows, inputs = fields.get("weight_block_size") or (1, None)
    return MatrixFormat(8, inputs, 32 / rows)


def _compressed_tensors(fields: dict[str, Any]) -> MatrixFormat:
    found = {repr(group.get("weights")): group.get("weights") for group in fields["config_groups"].values()}
    if len(found) != 1:
        raise ValueError("its groups of layers have different formats")
    (weights,) = found.values()
    if weights is None:
        raise ValueError("it quantizes no weights")
    rows, inputs = weights.get("block_structure") or (1, weights.get("group_size"))
    zero_point_bits = 0 if weights.get("symmetric", True) else weights["num_bits"]
    return MatrixFormat(weights["num_bits"], inputs, (16 + zero_point_bits) / rows)


METHODS: dict[str, Callable[[dict[str, Any]], MatrixFormat]] = {
    "awq": _grouped,
    "gptq": _grouped,
    "mxfp4": lambda _: MatrixFormat(4, 32, 8),
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "fbgemm_fp8": lambda _: MatrixFormat(8, None, 32),
    "compressed-tensors": _compressed_tensors,
    METHOD: lambda fields: MatrixFormat({"int8": 8, "int4": 4}[fields["weights"]], 32, 16),
    GGUF_METHOD: lambda fields: MatrixFormat(fields["bits"], None, 0),
}
"""`quant_method` of a `quantization_config` -> format of its matrices. Embedding and head are counted in `dtype`."""


def _quantized(config: PretrainedConfig, fields: dict[str, Any]) -> Storage:
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    remedy = "Set dtype (--dtype) to the type of the weights in memory, for example bfloat16 if they are unpacked."
    if method not in METHODS:
        raise ValueError(
            f"quantization_config has quant_method {method!r}, whose size cannot be read from a config. Known methods "
            f"are {', '.join(METHODS)}. {remedy}"
        )
    dtype = FLOAT_DTYPES[stored_dtype(config) or "bfloat16"]
    try:
        is_float = method == METHOD and fields["weights"] == FLOAT
        matrices = _of_dtype(packed_dtype(dtype) or dtype) if is_float else METHODS[method](fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"quantization_config of method {method!r} cannot be used: {error!r}. {remedy}") from error
    lists = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers")
    kept = tuple(_pattern(entry) for name in lists for entry in fields.get(name) or [])
    return Storage(
        f"{method} ({matrices.bits:g} bits)",
        dtype,
        dtype.itemsize,
        matrices,
        exported=method in (METHOD, GGUF_METHOD),  # packed layers run on the CPU only
        experts_only=method == "mxfp4",
        kept=kept,
        packs_head=method == METHOD,
    )


def _pattern(entry: str) -> str:
    """Return a regular expression for an entry of a list of modules: "re:..." or a part of a module name."""
    if entry.startswith("re:"):
        return f"^(?:{entry[3:]})"
    name = re.escape(entry.removeprefix("model.")).replace(r"\*", "[^.]*")
    return rf"(?:^|\.){name}(?:\.|$)"
