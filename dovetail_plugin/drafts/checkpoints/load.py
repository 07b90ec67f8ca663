"""Helpers of `DovetailDraft.from_pretrained` and `attach`.

They open checkpoints of all formats and compare what config and weights say before anything is built, check that a
loaded draft is complete, choose its dtype, and read which tokens a reduced head proposes. This module builds no models.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import machine
from ...compat import find_file
from ...errors import InputError
from ..config import DovetailConfig
from ..fields import OVERRIDES
from .files import Weights, read_token_order
from .read import BORROWED, own_names, read_config, translate

HUB_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
"""Arguments of `from_pretrained` that select where files come from."""


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that select where files come from, if they are given."""
    return {name: arguments[name] for name in HUB_KWARGS if arguments.get(name) is not None}


def dtype_for(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype for `dtype="auto"`: that of the weights, or fp16 for bf16 weights on a GPU without bf16.

    Args:
        stored: dtype of the weights in the checkpoint.
        device: where the draft will run.
    """
    if device.type == "cuda" and stored == torch.bfloat16 and not machine.gpu_supports_bf16():
        return torch.float16
    return stored


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose config was read and whose weights were only looked at.

    Attributes:
        name: directory or hub id.
        config: config of the draft.
        stand_ins: tensors on the meta device, under the names that `DovetailDraft` uses.
        weights: the weight files.
        stored: content of config.json if it has the format of another project, otherwise None.
        kind: format: "dovetail", or one of `read.py`.
    """

    name: str
    config: DovetailConfig
    stand_ins: dict[str, Tensor]
    weights: Weights
    stored: dict[str, Any] | None
    kind: str


def open_checkpoint(name: str, arguments: dict[str, Any]) -> Opened:
    """Read the config of a draft of any format, and names, shapes and dtypes of its weights.

    Args:
        name: directory or hub id.
        arguments: of `from_pretrained`. A `config` replaces the stored one, and fields of the config, which are taken
            out, replace those of the stored one.

    Raises:
        InputError: a file cannot be used, or config and weights contradict each other.
        MissingFileError: there is no such checkpoint, or it has no weights.
    """
    hub, config, stored = hub_arguments(arguments), arguments.get("config"), None
    kind = DovetailConfig.model_type
    if not isinstance(config, DovetailConfig):
        content = read_config(name, **hub)
        if content.get("model_type") == DovetailConfig.model_type:
            changed = {field: arguments.pop(field) for field in list(arguments) if field in OVERRIDES}
            config = DovetailConfig.from_dict(content | changed, name_or_path=name)
        else:
            stored = content
    files = {field: arguments.get(field) for field in ("variant", "use_safetensors")}
    weights = Weights(name, **files, **hub)
    stand_ins = weights.stand_ins
    if stored is not None:
        translated = translate(name, stored, own_names(stand_ins))
        config, stand_ins, kind = translated.config, translated.tensors, translated.kind
    assert isinstance(config, DovetailConfig)
    blocks = len({key.split(".")[1] for key in stand_ins if key.startswith("layers.")})
    if config.num_hidden_layers > blocks:
        raise InputError(
            f"{name} is not a complete Dovetail draft. Its config has num_hidden_layers={config.num_hidden_layers}, "
            f"and its weights have {blocks} blocks. Download the checkpoint again."
        )
    return Opened(name, config, stand_ins, weights, stored, kind)


def loading_arguments(opened: Opened) -> dict[str, Any]:
    """Read the tensors of a checkpoint.

    Args:
        opened: the checkpoint.

    Returns:
        Arguments that make transformers' `from_pretrained` load these tensors, and no files.

    Raises:
        InputError: the ids of a reduced vocabulary are not valid.
    """
    config, tensors = opened.config, opened.weights.read()
    if opened.stored is not None:
        tensors = translate(opened.name, opened.stored, own_names(tensors)).tensors
    tensors = {name: tensor for name, tensor in tensors.items() if name not in BORROWED}
    if config.dtype is None:
        dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        config.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    if "token_ids" in tensors:
        check_token_ids(opened.name, tensors["token_ids"], config.vocab_size)
    return {"config": config, "state_dict": tensors}


def check_stored(opened: Opened, expected: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose weights are not those of the draft that its config describes.

    Args:
        opened: the checkpoint.
        expected: tensors of that draft, on the meta device.

    Raises:
        InputError: tensors are missing, unexpected, of the wrong shape or dtype, or larger than the weight files.
    """
    found = {name: tensor for name, tensor in opened.stand_ins.items() if name not in BORROWED}
    shapes = [(name, found[name].shape, expected[name].shape) for name in sorted(found.keys() & expected.keys())]
    info = {
        "missing_keys": expected.keys() - found.keys(),
        "unexpected_keys": found.keys() - expected.keys(),
        "mismatched_keys": [(name, own, wanted) for name, own, wanted in shapes if own != wanted],
    }
    check_loaded(opened.name, info)
    for name, wanted in expected.items():
        kind = found[name].dtype
        fits = kind in FLOATS if wanted.is_floating_point() else kind == wanted.dtype
        if not fits:
            raise InputError(
                f"{opened.name}: {name} is stored as {kind}, and drafts have "
                f"{'float64, float32, float16 or bfloat16' if wanted.is_floating_point() else wanted.dtype}. Quantized "
                "drafts are not supported; use the draft that this one was made from."
            )
    if sum(tensor.numel() * tensor.itemsize for tensor in found.values()) > opened.weights.bytes:
        raise InputError(f"{opened.name}: the tensors have more bytes than the weight files. Download it again.")


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of the weights of a draft."""

TOKEN_ORDER = "token_order.npy"
"""File of a checkpoint with all token ids, (V,) int32, sorted by their frequency in the training text."""


def token_order(opened: Opened, arguments: dict[str, Any]) -> Tensor | None:
    """Read the order of tokens that a checkpoint brings for a reduced head.

    Args:
        opened: the checkpoint.
        arguments: of `from_pretrained`.

    Returns:
        (V,) int32 ids of all tokens, the most frequent first; None if there is no such file, or if the draft has its
        own head.

    Raises:
        InputError: the file cannot be used.
    """
    if opened.config.fusion == "eagle3":
        return None
    try:
        file = find_file(opened.name, TOKEN_ORDER, **hub_arguments(arguments))
    except OSError:  # the hub cannot be reached, and whether it has this optional file is unknown
        return None
    return None if file is None else read_token_order(file, opened.config.vocab_size).int()


def frequent_tokens(order: Tensor | None, count: int, vocab_size: int) -> Tensor:
    """Return the most frequent tokens.

    Args:
        order: (V,) ids of all tokens, the most frequent first. None means ascending ids, which is the order in
            byte-pair vocabularies.
        count: number of tokens, between 1 and `vocab_size`.
        vocab_size: number of tokens of the target (V).

    Returns:
        (count,) int64 ids, ascending.

    Raises:
        InputError: `count` is out of range.
    """
    if not 1 <= count <= vocab_size:
        raise InputError(f"draft_vocab_size must be between 1 and the target's {vocab_size} tokens, got {count}.")
    return torch.arange(count) if order is None else order[:count].long().sort().values


def check_token_ids(name: object, ids: Tensor, vocab_size: int) -> None:
    """Refuse a reduced head whose tokens are not different tokens of the vocabulary.

    Args:
        name: of the checkpoint, for the message.
        ids: (v,) int64 tokens of the head.
        vocab_size: number of tokens of the target (V).

    Raises:
        InputError: an id is out of range or used twice.
    """
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise InputError(
            f"{name}: token_ids has the token {int(wrong[0])}, outside the vocabulary of {vocab_size}. Download the "
            "checkpoint again."
        )
    if len(ids.unique()) != len(ids):
        raise InputError(f"{name}: token_ids has a token twice. Download the checkpoint again.")


MOST_NAMES = 40
"""Names of tensors in a message."""


def check_loaded(name: object, info: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of the draft.

    Args:
        name: of the checkpoint, for the message.
        info: loading info from transformers' `from_pretrained(..., output_loading_info=True)`.

    Raises:
        InputError: names the tensors that are missing, unexpected or of the wrong shape.
    """
    problems = []
    for kind in ("missing_keys", "unexpected_keys"):
        if info[kind]:
            problems.append(f"{kind.split('_')[0]}: " + _listed(sorted(info[kind])))
    wrong = [f"{key} is {tuple(found)}, expected {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]]
    if wrong:
        problems.append("wrong shape: " + _listed(wrong))
    if problems:
        raise InputError(f"{name} is not a complete Dovetail draft. " + "; ".join(problems) + ".")


def _listed(names: Iterable[str]) -> str:
    """Return names for a message, the first `MOST_NAMES` of them."""
    names = [name[:200] for name in names]
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
