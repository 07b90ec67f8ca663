"""Reads what a GGUF file says about itself: its metadata, and where its tensors lie. No tensor is read.

Everything that the file claims is compared with its length before memory is taken or a loop begins, because files come
from strangers: counts, lengths of texts and arrays, and places of tensors. Split files are read together.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, MissingFileError

MOST_TEXT_BYTES = 2**24
"""Bytes of one text, of which the longest are chat templates."""

MOST_NAME_BYTES = 1024
MOST_DIMENSIONS = 4
MOST_KEPT = 2**16
"""Numbers of an array that is kept. Longer ones belong to tokenizers, which transformers reads."""

MOST_ELEMENTS = 2**22
"""Elements of an array. The longest ones have one for each token of a tokenizer."""

LEAST_ENTRY_BYTES = 13
LEAST_TENSOR_BYTES = 32

NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Type of a value in metadata -> its format."""

TEXT, ARRAY = 8, 9
VERSIONS = (2, 3)

PART_NAME = re.compile(r"(?P<start>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """Place of a tensor.

    Attributes:
        type_name: for example "Q4_K" or "F32".
        shape: as torch has it: (outputs, inputs) of a matrix.
        row_bytes: bytes of the numbers with the same indices but the last.
        file: that it lies in, from byte `start`.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    row_bytes: int
    file: Path
    start: int

    def bytes_of_rows(self) -> np.ndarray:
        """Return its bytes (..., row_bytes) uint8, in a memory map of the file that cannot be written."""
        shape = (*self.shape[:-1], self.row_bytes)
        return np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.start, shape=shape)


@dataclass(frozen=True)
class Gguf:
    """A model in one file or several.

    Attributes:
        file: the first.
        metadata: of the first. Texts in arrays, and long arrays, are left out.
        tensors: of all files, by name.
        parts: number of files.
    """

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    parts: int

    @property
    def architecture(self) -> str:
        """Name of the model's architecture."""
        return self.metadata["general.architecture"]


def read_gguf(file: Path) -> Gguf:
    """Read the metadata and the places of the tensors of a model.

    Args:
        file: the only file of the model, or the first.

    Raises:
        InputError: it is damaged, not a GGUF file, of a version that is not supported, or not the first file.
        MissingFileError: it does not exist, or another file of the model does not.
        ImportError: the package `gguf` is not installed.
    """
    metadata, tensors = _read_one(file)
    parts = metadata.get("split.count", 1)
    if not isinstance(parts, int) or not 0 <= parts <= 99_999:
        raise _damaged(file, f"it is one of {parts!r} files")
    if parts > 1:
        for other in _other_parts(file, metadata, parts):
            more = _read_one(other)[1]
            if twice := sorted(tensors.keys() & more.keys()):
                raise _damaged(other, f"another file of the model has a tensor {twice[0]!r}, too")
            tensors |= more
        if metadata.get("split.tensors.count", len(tensors)) != len(tensors):
            raise _damaged(file, "its files do not have as many tensors together as it says")
    if not isinstance(metadata.get("general.architecture"), str):
        raise _damaged(file, "it does not name its architecture")
    return Gguf(file, metadata, tensors, max(parts, 1))


def _other_parts(file: Path, metadata: dict[str, Any], parts: int) -> list[Path]:
    """Return the files of a split model but the first, which all exist."""
    named = PART_NAME.fullmatch(file.name)
    if named is None or int(named["parts"]) != parts:
        raise InputError(
            f"{file} is one of {parts} files of a model, which are found by their names. Give them the names that they "
            f"had: NAME-00001-of-{parts:05d}.gguf, and so on."
        )
    names = [file.with_name(f"{named['start']}-{part:05d}-of-{parts:05d}.gguf") for part in range(1, parts + 1)]
    if metadata.get("split.no", 0) != 0 or file.name != names[0].name:
        raise InputError(f"{file} is not the first file of its model. Give {names[0].name}.")
    missing = [name.name for name in names if not name.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise MissingFileError(
            f"{file} is the first of {parts} files of a model, and beside it there is no {', '.join(missing[:3])}"
            f"{more}. Download all of them into one directory."
        )
    return names[1:]


def _read_one(file: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Return the metadata and the tensors of one file."""
    if not file.is_file():
        raise MissingFileError(f"there is no file {file}.")
    sizes = _sizes_of_types()
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"{file} is not a GGUF file.")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(file, content).read(sizes)


class _Reader:
    """Goes through the header of a file. `at` is the next byte."""

    def __init__(self, file: Path, content: mmap.mmap) -> None:
        self._file, self._content, self._at = file, content, 4

    def read(self, sizes: dict[int, tuple[str, int, int]]) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Read all. `sizes`: number of a type of tensors -> its name, and the weights and bytes of a block."""
        version = self._number("<I")
        if version not in VERSIONS:
            raise InputError(f"{self._file} has version {version} of the format, and versions 2 and 3 are supported.")
        tensor_count, entry_count = self._number("<Q"), self._number("<Q")
        if not 0 < tensor_count * LEAST_TENSOR_BYTES + entry_count * LEAST_ENTRY_BYTES <= len(self._content):
            raise self._wrong(f"it says that it has {tensor_count} tensors and {entry_count} entries of metadata")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._text(MOST_NAME_BYTES)
            if key in metadata:
                raise self._wrong(f"it has two entries {key!r}")
            metadata[key] = self._value(self._number("<I"))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise self._wrong(f"general.alignment is {alignment!r}")
        found: dict[str, GgufTensor] = {}
        for _ in range(tensor_count):
            tensor = self._tensor(sizes)
            if tensor.name in found:
                raise self._wrong(f"it has two tensors {tensor.name!r}")
            found[tensor.name] = tensor
        begin = -(-self._at // alignment) * alignment
        return metadata, {name: self._placed(tensor, begin, alignment) for name, tensor in found.items()}

    def _tensor(self, sizes: dict[int, tuple[str, int, int]]) -> GgufTensor:
        """Read the description of a tensor, whose start is counted from the first tensor."""
        name, dimensions = self._text(MOST_NAME_BYTES), self._number("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._wrong(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        number, start = self._number("<I"), self._number("<Q")
        if number not in sizes:
            raise self._wrong(f"tensor {name!r} has type {number}, which the package gguf does not know")
        type_name, weights, block_bytes = sizes[number]
        if min(shape) < 1 or shape[-1] % weights:
            raise self._wrong(f"tensor {name!r} of type {type_name} has shape {shape}")
        return GgufTensor(name, type_name, shape, shape[-1] // weights * block_bytes, self._file, start)

    def _placed(self, tensor: GgufTensor, begin: int, alignment: int) -> GgufTensor:
        """Return a tensor with its start counted from the beginning of the file, which it does not reach beyond."""
        end = begin + tensor.start + prod(tensor.shape[:-1]) * tensor.row_bytes
        if end > len(self._content) or tensor.start % alignment:
            raise self._wrong(
                f"tensor {tensor.name!r} of shape {tensor.shape} ends at byte {end}, and the file has "
                f"{len(self._content)}"
            )
        shape, rows = tensor.shape, tensor.row_bytes
        return GgufTensor(tensor.name, tensor.type_name, shape, rows, self._file, begin + tensor.start)

    def _value(self, kind: int) -> Any:
        """Read a value of metadata. None stands for arrays that are not kept."""
        if kind == TEXT:
            return self._text(MOST_TEXT_BYTES)
        if kind != ARRAY:
            return self._number(self._format(kind))
        kind, count = self._number("<I"), self._number("<Q")
        if count > MOST_ELEMENTS:
            raise self._wrong(f"an array in its metadata has {count} elements")
        if kind == TEXT:
            for _ in range(count):
                self._skip(self._number("<Q"))
            return None
        each = self._format(kind)
        size, begin = struct.calcsize(each) * count, self._at
        self._skip(size)
        if count > MOST_KEPT:
            return None
        return list(struct.unpack(f"<{count}{each[1]}", self._content[begin : begin + size]))

    def _format(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise self._wrong(f"its metadata has a value of type {kind}")
        return NUMBERS[kind]

    def _number(self, form: str) -> Any:
        begin, size = self._at, struct.calcsize(form)
        self._skip(size)
        return struct.unpack(form, self._content[begin : begin + size])[0]

    def _text(self, most: int) -> str:
        size = self._number("<Q")
        if size > most:
            raise self._wrong(f"it has a text of {size} bytes where at most {most} are allowed")
        begin = self._at
        self._skip(size)
        try:
            return self._content[begin : begin + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong("a text in it is not UTF-8") from error

    def _skip(self, size: int) -> None:
        if size > len(self._content) - self._at:
            raise self._wrong(f"it ends within its header, after {len(self._content)} bytes")
        self._at += size

    def _wrong(self, what: str) -> InputError:
        return _damaged(self._file, what)


def _damaged(file: Path, what: str) -> InputError:
    return InputError(f"{file} is damaged: {what}. Download it again.")


def _sizes_of_types() -> dict[int, tuple[str, int, int]]:
    """Return the number of each type of tensors -> its name, and the weights and bytes of a block."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install '.[gguf]' in a checkout.") from error
    return {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}
