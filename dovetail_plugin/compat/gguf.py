"""transformers' own knowledge about GGUF files: architectures, names of tensors, and what becomes of their numbers.

The functions that are used are loaded when a file is read, because they load tokenizers of several families.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel

GGUF_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "get_gguf_hf_weights_map": ("hf_model", "processor"),
    "TensorProcessor.process": ("weights", "name"),
    "TENSOR_PROCESSORS": (),
    "GGUF_SUPPORTED_ARCHITECTURES": (),
}
"""Name in transformers' module for GGUF files -> parameters that must exist."""

NO_ARCHITECTURES = ("general", "tokenizer")
"""Entries of transformers' list of architectures that are sections of a file."""


def missing_gguf_functions() -> list[str]:
    """Return what the installed transformers lacks of `GGUF_FUNCTIONS`: names, and parameters as "name(parameter)"."""
    missing = []
    for full_name, parameters in GGUF_FUNCTIONS.items():
        found: Any = _module()
        for part in full_name.split("."):
            found = getattr(found, part, None)
        if found is None:
            missing.append(full_name)
        elif parameters:
            known = inspect.signature(found).parameters
            missing += [f"{full_name}({parameter})" for parameter in parameters if parameter not in known]
    return missing


def gguf_architectures() -> list[str]:
    """Return the names of the architectures whose tensors transformers can find in a GGUF file."""
    return sorted(name for name in _module().GGUF_SUPPORTED_ARCHITECTURES if name not in NO_ARCHITECTURES)


def is_known_gguf(architecture: str) -> bool:
    """Return whether an architecture, as files name it, is one of `gguf_architectures`."""
    return _squeezed(architecture) in map(_squeezed, gguf_architectures())


@dataclass(frozen=True)
class GgufNames:
    """How the tensors of a file become parameters of a model.

    Attributes:
        parameters: name of a tensor -> name of a parameter. The tensors of experts are named without ".weight".
        process: transformers' function for the numbers of one tensor.
    """

    parameters: dict[str, str]
    process: Callable[..., Any] = field(repr=False)

    def parameter_of(self, tensor: str) -> str | None:
        """Return the name of the parameter that a tensor belongs to, or None."""
        return self.parameters.get(tensor) or self.parameters.get(tensor.removesuffix(".weight"))

    def processed(self, tensors: Mapping[str, Callable[[], np.ndarray]], parameter: str) -> np.ndarray:
        """Return what transformers makes of the tensors of one parameter.

        Args:
            tensors: name of each tensor -> returns its float32 numbers.
            parameter: that they belong to.
        """
        parsed: dict[str, dict[str, Any]] = {"tensors": {}}
        for name, numbers in tensors.items():
            out = self.process(
                weights=numbers(), name=name, tensor_key_mapping=self.parameters, parsed_parameters=parsed
            )
            if out.name is not None:
                return np.asarray(out.weights)
        return parsed["tensors"][parameter].numpy()


def gguf_names(model: PreTrainedModel, architecture: str) -> GgufNames:
    """Return the names of a model's tensors in a file of an architecture.

    Raises:
        NotImplementedError: the `gguf` package does not know the type of model.
    """
    module = _module()
    kind = module.TENSOR_PROCESSORS.get(architecture, module.TensorProcessor)
    processor = kind(config=model.config.to_dict())
    return GgufNames(module.get_gguf_hf_weights_map(model, processor), processor.process)


def _squeezed(name: str) -> str:
    """Return a name as files and transformers have it in common: one writes qwen2moe, the other qwen2_moe."""
    return name.replace("_", "").replace("-", "").lower()


def _module() -> Any:
    from transformers import modeling_gguf_pytorch_utils

    return modeling_gguf_pytorch_utils
