"""Targets whose weights are packed for the CPU kernels while they are loaded.

`CpuWeights` is a quantization config of transformers, so `from_pretrained` calls the quantizer of this module for each
matrix when it has been read. Then one matrix at a time exists in the checkpoint's dtype.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import compat
from ..errors import InputError
from ..kernels.linear import KINDS, PackedLinear

METHOD = "dovetail"
"""Name of the quantization method in configs."""


class CpuWeights(QuantizationConfigMixin):
    """Asks `from_pretrained` to pack the linear layers of a model for the CPU kernels.

    The layers read their weights once for all rows of a pass. The result of a row does not depend on other rows, to
    the bit. Activations are quantized for each row and each 32 inputs, with 16 bits for "int8" and 8 bits for "int4".

        target = AutoModelForCausalLM.from_pretrained(ID, quantization_config=CpuWeights("int8"))

    Args:
        weights: "int8": 8.5 bits a weight, numbers as in GGUF's Q8_0. "int4": 4.5 bits, numbers as in Q4_0.
        modules_to_not_convert: names of linear layers that stay as they are, or beginnings of such names. The output
            head is packed, too, unless it is named here.

    Raises:
        InputError: there is no such kind of weights.
    """

    def __init__(self, weights: str = "int8", modules_to_not_convert: list[str] | None = None, **_: Any) -> None:
        if weights not in KINDS:
            raise InputError(f"weights must be one of {', '.join(KINDS)}, got {weights!r}.")
        self.quant_method: Any = METHOD
        self.weights = weights
        self.modules_to_not_convert = list(modules_to_not_convert or [])


class CpuWeightsQuantizer(HfQuantizer):
    """Replaces linear layers before the weights are loaded, and packs each matrix when it has been read."""

    requires_calibration = False

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse devices other than the CPU, and checkpoints that hold packed weights already.

        Raises:
            InputError: the reason.
        """
        if self.pre_quantized:
            raise InputError("the checkpoint says that it is quantized already. Load one with floating-point weights.")
        placed = device_map.values() if isinstance(device_map, dict) else [device_map]
        if not all(_is_cpu(device) for device in placed):
            raise InputError('CpuWeights packs weights for the CPU. Pass device_map="cpu", or no device_map.')

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Return whether a parameter is the weight of a layer that packs it."""
        owner, name = param_name.rpartition(".")[::2]
        return name == "weight" and isinstance(model.get_submodule(owner), PackedLinear)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        config = self.quantization_config
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and not _is_named(name, config.modules_to_not_convert):
                model.set_submodule(name, _replacement(module, config.weights))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for module in model.modules():  # heads whose weights are those of the embedding, and weights that were missing
            if isinstance(module, PackedLinear):
                module.pack_()
        return model

    def get_quantize_ops(self) -> "Pack":
        """Return what transformers calls with each matrix that it has read."""
        return Pack()

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Return False: transformers refuses to save packed weights, which only this package can read."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether the weights can be trained."""
        return False


class Pack(compat.ConversionOps):
    """Packs the matrix of one layer."""

    def convert(
        self, input_dict: dict[str, Any], *_: Any, model: nn.Module, full_layer_name: str, **__: Any
    ) -> dict[str, Any]:
        """Return the name of the parameter with its packed weights.

        Args:
            input_dict: one name with a matrix (M, K), or with a list of one.
            model: that is loaded.
            full_layer_name: the parameter's name in the model.
        """
        weight: Tensor | list[Tensor] = next(iter(input_dict.values()))
        matrix = weight[0] if isinstance(weight, list) else weight
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        assert isinstance(layer, PackedLinear)
        return {full_layer_name: layer.packed(matrix)}


def _is_cpu(device: Any) -> bool:
    """Return whether an entry of a device_map stands for the CPU on this machine."""
    if device in (None, "auto", "balanced", "sequential"):
        return device is None or not torch.cuda.is_available()
    return device != "disk" and torch.device(device).type == "cpu"


def _is_named(name: str, beginnings: list[str]) -> bool:
    return any(name == beginning or name.startswith(beginning + ".") for beginning in beginnings)


def _replacement(linear: nn.Linear, kind: str) -> PackedLinear:
    with torch.device("meta"):
        bias, dtype = linear.bias is not None, linear.weight.dtype
        return PackedLinear(linear.in_features, linear.out_features, bias=bias, kind=kind, dtype=dtype)


if METHOD not in AUTO_QUANTIZER_MAPPING:  # the module may be loaded again
    register_quantization_config(METHOD)(CpuWeights)
    register_quantizer(METHOD)(CpuWeightsQuantizer)
