"""Compares the tensors in the files of a packed checkpoint with the model, before they take memory."""

from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .. import compat
from ..errors import InputError

REMEDY = "Download it again, or pack the original model again with `save_packed`."
PACKED = "packed_weight"
"""Last part of the names of packed weights."""


@dataclass(frozen=True)
class Header:
    """One tensor, as a file describes it.

    Attributes:
        file: path of the file.
        shape: of the tensor.
        dtype: as safetensors names it, for example "U8".
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_headers(files: list[str] | None) -> dict[str, Header]:
    """Return name -> header of all tensors in safetensors files. The tensors themselves are not read.

    Raises:
        InputError: there are no such files, one is damaged, or none has packed weights.
    """
    found: dict[str, Header] = {}
    for file in files or []:
        if not file.endswith(".safetensors"):
            raise InputError(f"{file}: packed weights are in safetensors files. {REMEDY}")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - only dicts are iterated by key
                    part = opened.get_slice(name)
                    found[name] = Header(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}). {REMEDY}") from error
    if not any(name.endswith(f".{PACKED}") for name in found):
        raise InputError(
            "the config says that the checkpoint has packed weights, and its files have none. Remove "
            f"quantization_config from its config.json. {REMEDY}"
        )
    return found


def check_headers(headers: dict[str, Header], model: PreTrainedModel) -> None:
    """Refuse files whose tensors are not those of a model, which is on the meta device.

    Raises:
        InputError: names the first tensor that is missing or has another shape or type.
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        header = headers.get(name)
        if header is None:
            if name in compat.tied_copies(model):
                continue
            raise InputError(f"the files of the packed checkpoint have no {name}. {REMEDY}")
        if header.shape != tuple(tensor.shape):
            raise InputError(
                f"{header.file}: {name} has shape {header.shape}, and the config says {tuple(tensor.shape)}. {REMEDY}"
            )
        if (header.dtype == "U8") != (tensor.dtype == torch.uint8):
            raise InputError(f"{header.file}: {name} has numbers of type {header.dtype}, not {tensor.dtype}. {REMEDY}")
    other = next((name for name in headers if name.endswith(f".{PACKED}") and name not in expected), None)
    if other is not None:
        raise InputError(f"{headers[other].file}: the config describes no linear layer for {other}. {REMEDY}")
