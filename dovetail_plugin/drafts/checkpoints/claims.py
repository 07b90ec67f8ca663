"""Loads language models and their tokenizers, after what a config claims is compared with the weight files.

transformers takes memory for whatever a config describes and fills in what the files lack. So a few hundred bytes could
ask for gigabytes. Here the numbers of layers are compared with the tensors in the files, then the model is built on the
meta device, without memory, and its weights are counted.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from ...errors import InputError, MissingFileError
from ..fields import MOST_BLOCKS, MOST_HEADS, shown
from .files import tensor_names, weight_files
from .load import hub_arguments
from .read import read_config

WEIGHTS_PER_BYTE = 8
"""Most weights that a byte of a file holds, in any quantized format."""

MOST_BUFFER_BYTES = 2**30
"""Bytes that buffers may take that are in no file, for example tables of positions."""

MOST = {"layer": MOST_BLOCKS, "block": MOST_BLOCKS, "expert": MOST_HEADS, "head": MOST_HEADS}
"""Part of the name of a number in a config -> its largest value."""


def model_config(name: str | Path, *, trust_remote_code: bool = False, **arguments: Any) -> PretrainedConfig:
    """Read the config of a language model; its numbers of layers are checked before transformers makes lists of them.

    Args:
        name: directory, hub id, or path of the file itself.
        trust_remote_code: whether code that comes with the config may run. Nobody is asked on standard input.
        arguments: of `AutoConfig.from_pretrained`.

    Raises:
        MissingFileError: there is no such file, or the hub cannot be reached.
        InputError: the file is damaged, or a field of it cannot be used.
        ValueError: transformers does not know the type of model, or it needs code that may not run.
    """
    _check_numbers(str(name), read_config(str(name), **hub_arguments(arguments)), MOST_BLOCKS)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **arguments)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # transformers lets through what the values of a file make it raise
        raise InputError(f"{name}: config.json cannot be used: {error} Correct it, or download it again.") from error


def load_language_model(name: str, **arguments: Any) -> PreTrainedModel:
    """Load a causal language model, after `check_claims`.

    Args:
        name: directory or hub id.
        arguments: of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        InputError: see `check_claims`; or a file has values that transformers cannot use.
        OSError, ValueError, ImportError: see `AutoModelForCausalLM.from_pretrained`.
    """
    check_claims(name, arguments)
    try:
        return AutoModelForCausalLM.from_pretrained(name, **arguments)
    except (OSError, ValueError, ImportError, MemoryError):
        raise
    except Exception as error:  # transformers lets through what the values of a file make it raise
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise InputError(
            f"{name}: one of its files cannot be used ({type(error).__name__}: {error}). Download it again."
        ) from error


def load_tokenizer(name: str, **arguments: Any) -> Any:
    """Load the tokenizer of a language model.

    Args:
        name: directory or hub id.
        arguments: of `AutoTokenizer.from_pretrained`. Without `trust_remote_code` transformers may ask on the terminal
            whether code may run.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **arguments)
    except Exception as error:  # the tokenizers library raises `Exception` itself for a file that it cannot read
        raise InputError(f"{name}: its tokenizer cannot be read ({type(error).__name__}: {error}).") from error


def check_claims(name: str, arguments: dict[str, Any]) -> None:
    """Refuse a causal language model whose config describes more than its weight files can hold.

    Models that come with code, and weights in other files than safetensors and `.bin`, are not checked.

    Args:
        name: directory or hub id.
        arguments: of `from_pretrained`.

    Raises:
        InputError: names what does not fit, or the config belongs to another kind of model.
        MissingFileError: there is no such model.
        ValueError: the model comes with code, and `trust_remote_code` is not set.
    """
    if arguments.get("gguf_file") or "state_dict" in arguments:
        return
    hub, config = hub_arguments(arguments), arguments.get("config")
    given = isinstance(config, PretrainedConfig)
    stored = read_config(name, **hub) if not given else {}
    replaced = {field: arguments[field] for field in stored.keys() & arguments.keys() - {"dtype", "torch_dtype"}}
    try:
        files = weight_files(name, **{key: arguments.get(key) for key in ("variant", "use_safetensors")}, **hub)
    except MissingFileError:  # transformers knows further formats
        return
    names = [key for file in files for key in tensor_names(file) or ()]
    _check_numbers(name, stored | replaced, len(names) or MOST_BLOCKS)
    if not given:
        trusted = bool(arguments.get("trust_remote_code"))
        config = model_config(name, trust_remote_code=trusted, **hub, **replaced)
    assert config is not None, "given, or read"
    if not is_causal(config):
        raise InputError(f"{name} is a {config.model_type} model, not a decoder-only language model.")
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        _check_weights(name, config, sum(map(os.path.getsize, files)))


def is_causal(config: PretrainedConfig) -> bool:
    """Return whether `AutoModelForCausalLM` loads models with this config."""
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _check_numbers(name: str, config: dict[str, Any], tensors: int, within: str = "") -> None:
    """Refuse numbers of layers, blocks, experts and heads that would keep the builder busy."""
    for field, value in config.items():
        if isinstance(value, dict):
            _check_numbers(name, value, tensors, f"{within}{field}.")
        most = next((most for part, most in MOST.items() if part in field), None)
        if most is None or not isinstance(value, int) or not field.startswith(("n_", "num_")):
            continue
        most = min(most, tensors) if field.startswith(("num_hidden_layer", "n_layer", "num_layer")) else most
        if value > most:
            raise InputError(
                f"{name}: its config has {within}{field}={shown(value)}, and its files have room for {most} at most. "
                "Download it again."
            )


def _check_weights(name: str, config: PretrainedConfig, file_bytes: int) -> None:
    """Build the model on the meta device and compare the number of its weights with the bytes of the files."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the shapes are those of the unpacked weights
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ImportError:
        raise
    except Exception as error:  # whatever a config that nobody has checked makes a model raise
        raise InputError(
            f"{name}: its config describes no model that can be built ({type(error).__name__}: {shown(str(error))}). "
            "Download it again."
        ) from error
    weights = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
    if weights > WEIGHTS_PER_BYTE * file_bytes or buffers > WEIGHTS_PER_BYTE * file_bytes + MOST_BUFFER_BYTES:
        raise InputError(
            f"{name}: its config describes {weights} weights and {buffers} bytes of tables, and its weight files have "
            f"{file_bytes} bytes. Download it again."
        )
