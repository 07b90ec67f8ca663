"""Reads the files of a checkpoint and believes none of them: JSON, weights, and the order of tokens.

`read_json` bounds size and depth. `Weights` looks at names, shapes and dtypes first, from the header of a safetensors
file or the index of a pickled one, without memory for the tensors; what these claim is compared with the size of the
file. `read_token_order` compares the header of a NumPy file with its size before it reads on. Pickled weights are read
with `weights_only=True`, which runs no code from torch 2.10 on; with an older torch they are refused. Every fault is an
`InputError` that names the file. This module does not know configs or models.
"""

import json
import os
import pickle
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...compat import OLDEST_TORCH, dotted, find_file, version_of
from ...errors import InputError, MissingFileError
from ..fields import shown

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names of weight files, in the order in which they are looked for."""

MOST_JSON_BYTES = 2**24
MOST_JSON_DEPTH = 32

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name of a dtype in safetensors files -> dtype."""


# --- JSON ---------------------------------------------------------------------------------------------


def read_json(file: str, what: str, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: path.
        what: name of the file for messages, for example "some/draft: config.json".
        most_bytes: size of the largest file that is read.

    Raises:
        InputError: it is not a regular file, too large, not UTF-8, not JSON, not an object, or nested too deeply.
    """
    again = "Download it again."
    size = os.path.getsize(file)
    if not os.path.isfile(file):  # a pipe would be waited for
        raise InputError(f"{what} is not a file. {again}")
    if size > most_bytes:
        raise InputError(f"{what} has {size} bytes, and at most {most_bytes} are read. Is it the right file?")
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits, deep nesting
        raise InputError(f"{what} is not JSON ({error}). {again}") from error
    if not isinstance(content, dict):
        raise InputError(f"{what} is a JSON {type(content).__name__}, not an object. {again}")
    level: list[Any] = [content]
    for _ in range(MOST_JSON_DEPTH):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, (dict, list))]
        if not level:
            return content
    raise InputError(f"{what} is nested more than {MOST_JSON_DEPTH} levels deep. {again}")


# --- weights ------------------------------------------------------------------------------------------


class Weights:
    """The weight files of a checkpoint.

    Args:
        name: directory or hub id.
        variant: as in transformers' `from_pretrained`: a word within the names of the files.
        use_safetensors: as in transformers' `from_pretrained`: False leaves out safetensors files.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

    Attributes:
        files: paths, one for each shard.
        bytes: of all files together.
        stand_ins: tensors on the meta device with the names, shapes and dtypes of the stored ones.

    Raises:
        MissingFileError: there are no weight files, or a shard is missing.
        InputError: a file is damaged, contains other things than tensors, or an index names files elsewhere.
    """

    def __init__(
        self, name: str, *, variant: str | None = None, use_safetensors: bool | None = None, **hub_kwargs: Any
    ) -> None:
        self.files = weight_files(name, variant=variant, use_safetensors=use_safetensors, **hub_kwargs)
        self.bytes = sum(os.path.getsize(file) for file in self.files)
        self.stand_ins: dict[str, Tensor] = {}
        for file in self.files:
            found = look_into_safetensors(file) if file.endswith(".safetensors") else _look_into_pickle(file)
            if twice := sorted(found.keys() & self.stand_ins.keys()):
                raise InputError(f"{name}: {shown(twice[0])} is in two weight files. Download the checkpoint again.")
            self.stand_ins |= found

    def read(self) -> dict[str, Tensor]:
        """Read all tensors, on the CPU."""
        tensors: dict[str, Tensor] = {}
        for file in self.files:
            tensors |= read_safetensors(file) if file.endswith(".safetensors") else _read_pickle(file)
        return tensors


def weight_files(
    name: str, *, variant: str | None = None, use_safetensors: bool | None = None, **hub_kwargs: Any
) -> list[str]:
    """Return the paths of a checkpoint's weight files: the first of `WEIGHT_FILES`, or the files that it lists.

    Args and errors: see `Weights`.
    """
    names = [file for file in WEIGHT_FILES if use_safetensors is not False or ".bin" in file]
    candidates = [_with_variant(file, variant) for file in names]
    for candidate in candidates:
        file = find_file(name, candidate, **hub_kwargs)
        if file is None:
            continue
        if not candidate.endswith(".json"):
            return [file]
        shards = _shards(file, f"{name}: {candidate}", ".safetensors" if "safetensors" in candidate else ".bin")
        found = {shard: find_file(name, shard, **hub_kwargs) for shard in shards}
        if missing := [shard for shard, path in found.items() if path is None]:
            raise MissingFileError(
                f"{name}: {candidate} names {', '.join(missing[:8])}, which is missing. Download the checkpoint again."
            )
        return [path for path in found.values() if path is not None]
    raise MissingFileError(f"{name} has no weights. One of these files is needed: {', '.join(candidates)}.")


def _with_variant(file: str, variant: str | None) -> str:
    """Return the name of a variant's file: "model.fp16.safetensors", "model.safetensors.index.fp16.json"."""
    if variant is None:
        return file
    stem, _, suffix = file.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


def _shards(file: str, what: str, suffix: str) -> list[str]:
    """Return the names of the files that an index lists, all of them within the checkpoint's directory."""
    table = read_json(file, what).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise InputError(f"{what} has no weight_map from tensors to files. Download it again.")
    shards = sorted(set(table.values()))
    for shard in shards:
        if not is_inside(shard) or not shard.endswith(suffix):
            raise InputError(
                f"{what} names the file {shown(shard)}, and only {suffix} files of the checkpoint itself are read. "
                "Download it again, or ask its author."
            )
    return shards


def is_inside(name: str) -> bool:
    """Return whether a file name that stands in a checkpoint stays within the checkpoint's directory."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set(name) & set("\\:\0")


def tensor_names(file: str) -> list[str] | None:
    """Return the names of the tensors in a safetensors file, from its header; None for files of another format.

    Raises:
        InputError: the file is damaged.
    """
    if not file.endswith(".safetensors"):
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            return list(stored.keys())
    except (SafetensorError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise _damaged(file, error) from error


def _damaged(file: str, error: Exception) -> InputError:
    return InputError(f"{file} is truncated or not safetensors ({error}). Copy or download it again.")


def look_into_safetensors(file: str) -> dict[str, Tensor]:
    """Return stand-ins for the tensors of a safetensors file, from its header, which is compared with its size."""
    stand_ins = {}
    try:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - it is not a dict
                part = stored.get_slice(key)
                kind = DTYPES.get(part.get_dtype())
                if kind is None:
                    raise InputError(f"{file}: {shown(key)} has the dtype {part.get_dtype()}, which no draft has.")
                stand_ins[key] = torch.empty(part.get_shape(), dtype=kind, device="meta")
    except InputError:
        raise
    except (SafetensorError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise _damaged(file, error) from error
    return stand_ins


def read_safetensors(file: str) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, on the CPU."""
    with safe_open(file, framework="pt") as stored:
        return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - it is not a dict


def _look_into_pickle(file: str) -> dict[str, Tensor]:
    """Return stand-ins for the tensors of a file of `torch.save`; its tensors are mapped, not read."""
    if version_of(torch.__version__) < OLDEST_TORCH:
        raise InputError(
            f"{file} is a pickle. Reading it with torch {torch.__version__} can run code in it (CVE-2026-24747), so it "
            f"is read with torch {dotted(OLDEST_TORCH)} or later only. Upgrade torch, or ask its author for "
            "safetensors."
        )
    size = os.path.getsize(file)
    if not size:
        raise InputError(f"{file} is empty: its download was interrupted. Download it again.")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError) as error:
        raise InputError(
            f"{file} is damaged, or was saved by torch before 1.6 ({error}). Download it again, or ask its author for "
            "safetensors."
        ) from error
    stored_plainly = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored_plainly or sum(entry.file_size for entry in entries) > size:
        raise InputError(f"{file} unpacks to more bytes than it has. Ask its author for safetensors.")
    stand_ins = {}
    for name, tensor in _read_pickle(file, mmap=True).items():
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise InputError(f"{file}: {shown(name)} has fewer bytes than its shape needs. Download it again.")
        stand_ins[name] = torch.empty_like(tensor, device="meta")
    return stand_ins


def _read_pickle(file: str, *, mmap: bool = False) -> dict[str, Tensor]:
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} is damaged, or a pickle with code, which is not run ({shown(str(error))}). "
            "Download it again, or ask its author for safetensors."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything: it is a program of calls
        raise InputError(
            f"{file} is damaged ({shown(str(error))}). Download it again, or ask its author for safetensors."
        ) from error
    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in stored.items()
    ):
        raise InputError(f"{file} contains other things than named tensors. Ask its author for safetensors.")
    return stored


# --- the order of tokens ------------------------------------------------------------------------------


def read_token_order(file: str, vocab_size: int) -> Tensor:
    """Read the token ids of a vocabulary, sorted by their frequency, from a NumPy file.

    Args:
        file: path.
        vocab_size: number of tokens (V).

    Returns:
        (V,) int64, every id once.

    Raises:
        InputError: the file is not a NumPy array of these ids. Nothing is read if its size is not that of V ids.
    """
    remedy = "Delete it to use the lowest ids, or train the draft again."
    try:
        with open(file, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, kind = read_header(stream)
            start = stream.tell()
            if kind.hasobject or kind.kind not in "iu" or shape != (vocab_size,):
                raise InputError(
                    f"{file} has {shown(kind)} values of shape {shown(shape)}, and the ids of all {vocab_size} tokens "
                    f"are needed. {remedy}"
                )
            if os.path.getsize(file) != start + vocab_size * kind.itemsize:
                raise InputError(f"{file} is cut off, or longer than its header says. {remedy}")
            order = np.frombuffer(stream.read(), dtype=kind).astype(np.int64)
    except InputError:
        raise
    except Exception as error:  # the header is a Python expression, which can be damaged in many ways
        raise InputError(f"{file} is not a NumPy array ({shown(str(error))}). {remedy}") from error
    wrong = order[(order < 0) | (order >= vocab_size)]
    if len(wrong):
        raise InputError(f"{file} has the token {wrong[0]}, outside the vocabulary of {vocab_size}. {remedy}")
    if len(np.unique(order)) != vocab_size:
        raise InputError(f"{file} has a token twice. {remedy}")
    return torch.from_numpy(order)
