"""The parameters of a model in a GGUF file: packed matrices, and floats that transformers processes.

Nothing is read before it is wanted. transformers takes an entry of a state dict with `entry[...]` and casts it with
`to`, so an entry may stand for numbers in a file.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .. import compat
from ..errors import InputError
from ..kernels.gguf_blocks import BLOCK_TYPES, repack
from ..kernels.packing import ROWS_AT_ONCE, pack
from .cpu_weights import is_named
from .gguf_file import Gguf, GgufTensor

logger = logging.getLogger(__name__)

FLOATS: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": None, "F64": np.dtype("<f8")}
"""Types of tensors that are not quantized -> dtype in numpy, which has no bfloat16."""

NOT_USED = ("rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that change positions, and that transformers does not use."""


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix of a linear layer, packed when transformers wants its numbers.

    transformers reads a value with `value[...]` and casts it with `to`; packed bytes are not cast.

    Attributes:
        kind: of packed weights.
        order: the row of the tensor that each output has, or None for the order of the file.
        numbers: if the kind is another than that of the file: float weights (outputs, inputs), once they are read.
        failures: errors are added to it.
    """

    tensor: GgufTensor
    kind: str
    order: Tensor | None
    numbers: "Floats | None"
    failures: list[InputError]

    def __getitem__(self, _: Any) -> "Matrix":
        return self

    def to(self, *_: Any, **__: Any) -> "Matrix":
        """Return this matrix, which stays as it is."""
        return self

    def packed(self) -> Tensor:
        """Return the packed bytes.

        Raises:
            InputError: a number in the file is infinite or NaN.
        """
        try:
            if self.numbers is not None:
                return pack(self.numbers[...], self.kind)
            return repack(torch.from_numpy(self.tensor.bytes_of_rows().copy()), self.tensor.type_name, self.order)
        except InputError as error:
            failure = InputError(f"{self.tensor.file} is damaged: {self.tensor.name}: {error}")
            self.failures.append(failure)
            raise failure from error


@dataclass(frozen=True)
class Floats:
    """The tensors of one parameter, read and processed when transformers wants their numbers.

    Attributes:
        shape: that the parameter has.
        dtype: that it gets.
    """

    parameter: str
    tensors: list[GgufTensor]
    names: compat.GgufNames
    shape: torch.Size
    dtype: torch.dtype

    def __getitem__(self, _: Any) -> Tensor:
        numbers = {tensor.name: partial(floats_of, tensor) for tensor in self.tensors}
        found = self.names.processed(numbers, self.parameter)
        if found.shape != self.shape:
            raise InputError(
                f"{self.tensors[0].file} has {self.parameter} of shape {found.shape}, and its config describes "
                f"{tuple(self.shape)}."
            )
        return torch.from_numpy(np.array(found)).to(self.dtype)


class Parameters:
    """The parameters of a model, by their names.

    Args:
        gguf: file with the tensors.
        config: of the model.
        dtype: of the parameters that are not packed.

    Raises:
        InputError: a tensor is missing or of another size, or transformers cannot tell their names.

    Attributes:
        matrices: parameters that are packed.
        tied: names of those of `matrices` that are tied to the embedding.
        failures: why numbers of the file could not be used.
    """

    def __init__(self, gguf: Gguf, config: PretrainedConfig, dtype: torch.dtype) -> None:
        self._gguf, self._dtype = gguf, dtype
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            self._names = compat.gguf_names(model, gguf.architecture)
        except Exception as error:  # whatever values that nobody has checked make a model raise
            raise InputError(
                f"{gguf.file}: its config describes no model that can be built ({type(error).__name__}: {error})."
            ) from error
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._sources = self._find_sources(model)
        self.matrices: dict[str, Matrix] = {}
        self.tied: list[str] = []
        self.failures: list[InputError] = []
        kept = compat.modules_in_float32(model)
        embeddings = {id(part.weight): name for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
        for name, part in model.named_modules():
            if type(part) is not nn.Linear or is_named(name, kept):
                continue
            table = embeddings.get(id(part.weight))
            matrix = self._matrix(f"{name}.weight", f"{table or name}.weight")
            if matrix is not None:
                self.matrices[f"{name}.weight"] = matrix
                self.tied += [f"{name}.weight"] if table else []
        self._log()

    def loaded(self) -> dict[str, Any]:
        """Return what transformers reads: names of parameters, and what gives their numbers."""
        floats = {name: self._tensors(name) for name in self._sources if name not in self.matrices}
        return floats | {name: matrix for name, matrix in self.matrices.items() if name not in self.tied}

    def _find_sources(self, model: PreTrainedModel) -> dict[str, list[GgufTensor]]:
        """Return the tensors of each parameter. A parameter that is tied to another may have none."""
        found: dict[str, list[GgufTensor]] = {}
        known = model.state_dict().keys()
        for tensor in self._gguf.tensors.values():
            name = self._names.parameter_of(tensor.name)
            if name is not None and name in known:
                found.setdefault(name, []).append(tensor)
        tied = compat.tied_names(model)
        for name, shape in self._shapes.items():
            size = sum(prod(tensor.shape) for tensor in found.get(name, ()))
            if size != shape.numel() and not (name in tied and name not in found):
                seen = f"it has {size} numbers for it" if size else "it has no tensor for it"
                raise InputError(
                    f"{self._gguf.file}: its config describes {name} of shape {tuple(shape)}, and {seen}. Download it "
                    "again."
                )
        return found

    def _tensors(self, name: str, dtype: torch.dtype | None = None) -> Floats:
        shape = self._shapes.get(name, torch.Size(self._sources[name][0].shape))
        return Floats(name, self._sources[name], self._names, shape, dtype or self._dtype)

    def _matrix(self, name: str, source: str) -> Matrix | None:
        """Return the matrix of a linear layer, or None if its numbers are floats. `source`: a tied one's own name."""
        tensors = self._sources.get(name) or self._sources.get(source)
        if tensors is None:
            raise InputError(f"{self._gguf.file}: it has no tensor for {source}. Download it again.")
        if len(tensors) != 1 or tensors[0].type_name in FLOATS:
            return None
        tensor, shape = tensors[0], self._shapes[name]
        rows = row_order(self._names, tensor, shape) if tensor.type_name in BLOCK_TYPES else None
        if rows is None:
            return Matrix(tensor, "int8", None, self._tensors(source, torch.float32), self.failures)
        order = None if torch.equal(rows, torch.arange(len(rows))) else rows
        return Matrix(tensor, kind_of(tensor), order, None, self.failures)

    def _log(self) -> None:
        """Say once what is not as in the file."""
        again = Counter(matrix.tensor.type_name for matrix in self.matrices.values() if matrix.numbers is not None)
        if again:
            logger.warning(
                "%s has matrices in %s, which the CPU kernels do not read as they are: they are quantized again, to "
                "int8, which changes their numbers a little.",
                self._gguf.file,
                ", ".join(f"{name} ({count})" for name, count in sorted(again.items())),
            )
        ignored = [name for name in self._gguf.tensors if name in NOT_USED]
        scaling = self._gguf.metadata.get(f"{self._gguf.architecture}.rope.scaling.type", "none")
        ignored += [] if scaling == "none" else [f"RoPE scaling {scaling!r}"]
        if ignored:
            logger.warning(
                "%s has %s, which transformers does not read from GGUF files. The model is another one at long texts "
                "than in other programs.",
                self._gguf.file,
                ", ".join(ignored),
            )


def row_order(names: compat.GgufNames, tensor: GgufTensor, shape: torch.Size) -> Tensor | None:
    """Return the row of a tensor that each output of its layer has, or None if more than rows changes.

    transformers' function for the tensor is asked what it makes of the numbers of rows, and of columns.
    """
    if tensor.shape != tuple(shape):
        return None
    outputs, inputs = (np.arange(1, count + 1, dtype=np.float32) for count in shape)
    rows, columns = np.broadcast_to(outputs[:, None], shape), np.broadcast_to(inputs, shape)
    try:
        found, beside = (names.processed({tensor.name: partial(np.asarray, asked)}, "") for asked in (rows, columns))
    except Exception:  # it needs the numbers themselves
        return None
    if found is rows and beside is columns:
        return torch.arange(len(rows))
    if found.shape != rows.shape or not np.array_equal(beside, columns) or not (found == found[:, :1]).all():
        return None
    order = torch.from_numpy(np.array(found[:, 0])).long() - 1
    return order if torch.equal(order.sort().values, torch.arange(len(order))) else None


def kind_of(tensor: GgufTensor) -> str:
    """Return the kind of packed weights that a quantized matrix becomes."""
    return BLOCK_TYPES[tensor.type_name].kind if tensor.type_name in BLOCK_TYPES else "int8"


def floats_of(tensor: GgufTensor) -> np.ndarray:
    """Return the numbers of a tensor as float32."""
    raw = tensor.bytes_of_rows()
    if tensor.type_name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if found := FLOATS.get(tensor.type_name):
        return raw.view(found).astype(np.float32)
    from gguf import GGMLQuantizationType, dequantize

    numbers = np.empty((prod(tensor.shape[:-1]), tensor.shape[-1]), dtype=np.float32)
    rows = raw.reshape(-1, tensor.row_bytes)
    try:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            numbers[some] = dequantize(rows[some], GGMLQuantizationType[tensor.type_name])
        return numbers.reshape(tensor.shape)
    except NotImplementedError as error:
        raise InputError(
            f"{tensor.file}: the package gguf cannot unpack {tensor.type_name}, the type of {tensor.name}. Convert the "
            "model to another quantization."
        ) from error
