"""Writes a model with packed weights as a checkpoint that `from_pretrained` loads at once, without packing."""

import copy
import os
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from .. import compat
from ..errors import InputError
from ..files import refuse_occupied, whole_directory
from ..kernels import KINDS
from ..kernels.linear import PackedLinear
from .cpu_weights import METHOD, CpuWeights
from .tokenizer_files import copy_tokenizer


def save_packed(
    model: PreTrainedModel, directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> None:
    """Save a model that was loaded with `CpuWeights`, as it is in memory.

        save_packed(target, "my-model-int8")
        target = AutoModelForCausalLM.from_pretrained("my-model-int8")

    Loading needs dovetail_plugin to be imported. The generation config is saved too, and the tokenizer is copied if the
    model's source has one.

    Args:
        model: with "int8" or "int4" weights.
        directory: does not exist, or is empty. It is written whole or not at all.
        max_shard_size: largest size of a file of weights, as in `save_pretrained`.

    Raises:
        InputError: the weights are not packed, or float weights, which have no format for files, or a GGUF file's.
        OccupiedError: the directory has content.
        WriteError: it cannot be written.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, CpuWeights):
        raise InputError("save_packed saves models that were loaded with CpuWeights. Use model.save_pretrained.")
    if config.quant_method != METHOD:
        raise InputError("the model is from a GGUF file, which has packed weights already. Keep that file.")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if config.weights not in KINDS or any(not layer.is_packed for layer in layers.values()):
        raise InputError(
            f"weights of kind {config.weights!r} are in an order that depends on the CPU, and are packed while a model "
            "is loaded. Load the original model again, or pack it in int8 or int4."
        )
    directory = Path(directory)
    refuse_occupied(directory)
    stored = copy.deepcopy(model.config)
    stored.architectures = [type(model).__name__]
    with whole_directory(directory) as part:
        save_torch_state_dict(
            _tensors(model, layers),
            part,
            max_shard_size=max_shard_size,
            shared_tensors_to_discard=sorted(compat.tied_copies(model)),
        )
        stored.save_pretrained(part)
        if model.can_generate():
            model.generation_config.save_pretrained(part)
        if model.name_or_path:
            copy_tokenizer(model.name_or_path, part)


def _tensors(model: PreTrainedModel, layers: dict[str, PackedLinear]) -> dict[str, Tensor]:
    """Return the tensors of a model on the CPU, without the placeholders of packed weights."""
    placeholders = {f"{name}.weight" for name in layers}
    state: dict[str, Tensor] = model.state_dict()
    off = [name for name, tensor in state.items() if tensor.device != torch.device("cpu")]
    if off:
        raise InputError(f"{off[0]} is on {state[off[0]].device}. Move the model to the CPU first.")
    return {name: tensor for name, tensor in state.items() if name not in placeholders}
