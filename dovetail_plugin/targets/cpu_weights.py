"""Targets whose weights are packed for the CPU kernels while they are loaded.

`CpuWeights` is a quantization config of transformers, so `from_pretrained` calls the quantizer of this module for each
matrix when it has been read. Then one matrix at a time exists in the checkpoint's dtype.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import compat
from ..errors import InputError
from ..kernels import WEIGHTS
from ..kernels.linear import PackedLinear
from .packed_experts import expect_packed, is_unknown, make_layer, matrices_of, pack_matrices, use_packed
from .packed_files import PACKED, check_headers, read_headers
from .row_exact import make_row_exact

logger = logging.getLogger(__name__)

METHOD = "dovetail"
"""Name of the quantization method in configs."""

FORMAT = 1
"""Number of the format of packed weights in files, which grows when older versions cannot read new files."""


class CpuWeights(QuantizationConfigMixin):
    """Asks `from_pretrained` to pack the linear layers of a model for passes of a few rows on a CPU.

    With "int8" and "int4", the kernels of this package read the weights once for all rows of a pass, and the result of
    a row does not depend on other rows, to the bit. Activations are quantized for each row and each 32 inputs, with 16
    bits for "int8" and 8 bits for "int4". With "float", oneDNN packs the weights, and numbers change by the order of
    float sums only.

        target = AutoModelForCausalLM.from_pretrained(ID, quantization_config=CpuWeights("int8"))

    Args:
        weights: "int8": 8.5 bits a weight, numbers as in GGUF's Q8_0. "int4": 4.5 bits, numbers as in Q4_0. "float":
            the weights as they are, in their own dtype where the CPU has arithmetic for it, otherwise in float32.
        modules_to_not_convert: names, or parts of names, of modules whose linear layers stay as they are. The output
            head is packed, too, unless it is named here. Layers that the model keeps in float32 are never packed.
        quant_method: name of the method, as transformers finds it in configs.
        format: number of the format of packed weights in files.

    Raises:
        InputError: there is no such kind of weights, or the format is newer than this version.
    """

    def __init__(
        self,
        weights: str = "int8",
        modules_to_not_convert: list[str] | None = None,
        quant_method: str = METHOD,
        format: int = FORMAT,
    ) -> None:
        if format != FORMAT:
            raise InputError(
                f"the packed weights have format {format!r}, and this version of dovetail_plugin reads {FORMAT}. "
                "Install a newer version, or load the original model."
            )
        if weights not in WEIGHTS:
            raise InputError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}.")
        self.quant_method: Any = quant_method
        self.weights = weights
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.format = format

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the config that a config.json has; arguments as in transformers.

        Raises:
            InputError: see the class; or a field is unknown.
        """
        if config_dict.get("format", FORMAT) != FORMAT:
            cls(format=config_dict["format"])
        try:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        except TypeError as error:
            raise InputError(f"the quantization_config cannot be used: {error}. Download it again.") from error


class CpuWeightsQuantizer(HfQuantizer):
    """Replaces linear layers before the weights are loaded, and packs each matrix when it has been read."""

    def __init__(self, quantization_config: CpuWeights, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._experts: set[str] = set()  # names of modules whose matrices are packed by expert

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse devices other than the CPU.

        Raises:
            InputError: the reason.
        """
        placed = device_map.values() if isinstance(device_map, dict) else [device_map]
        if not all(_is_cpu(device) for device in placed):
            raise InputError('CpuWeights packs weights for the CPU. Pass device_map="cpu", or no device_map.')

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Return whether a parameter is the weight of a layer that packs it.

        Weights that are tied to others are loaded as they are, so that transformers can compare and tie them.
        """
        owner, name = param_name.rpartition(".")[::2]
        if owner in self._experts:
            return name in matrices_of(model.get_submodule(owner))
        tied = compat.tied_names(model)
        return name == "weight" and param_name not in tied and isinstance(model.get_submodule(owner), PackedLinear)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        """Replace the layers that are packed: those that the config tells, or those that a packed checkpoint has.

        Raises:
            InputError: see `packed_files.read_headers` and `packed_files.check_headers`.
        """
        config = self.quantization_config
        headers = read_headers(checkpoint_files) if self.pre_quantized else None
        kept = [*config.modules_to_not_convert, *compat.modules_in_float32(model)]

        def is_packed(name: str, first: str) -> bool:
            return not is_named(name, kept) if headers is None else f"{name}.{first}" in headers

        unknown = set()
        for name, module in list(model.named_modules()):
            matrices = matrices_of(module)
            if type(module) is nn.Linear and is_packed(name, PACKED):
                layer = replacement(module, config.weights)
                if headers is not None:
                    layer.expect_packed(tied=f"{name}.weight" in compat.tied_copies(model))
                model.set_submodule(name, layer)
            elif matrices and is_packed(name, f"{matrices[0]}.0.{PACKED}"):
                self._experts.add(name)
                use_packed(module)
                for matrix in matrices if headers is not None else ():
                    expect_packed(module, matrix, config.weights)
            elif is_unknown(module) and not is_named(name, kept):
                unknown.add(type(module).__name__)
        if unknown:
            logger.warning("the experts in %s have an own forward method, so they stay as they are.", sorted(unknown))
        if headers is not None:
            check_headers(headers, model)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Pack the weights that are tied to the embedding, and initialize what the checkpoint lacks.

        Attention and activations become exact for each row, as packed layers are.
        """
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        std = getattr(model.config.get_text_config(decoder=True), "initializer_range", None) or 0.02
        for module in list(model.modules()):
            if not isinstance(module, PackedLinear):
                continue
            if module.bias is not None and not compat.was_loaded(module.bias):
                module.bias.data.zero_()
            if module.is_packed:
                if self.pre_quantized:
                    module.hold_place(model.dtype)
                continue
            if id(module.weight) not in embeddings and not compat.was_loaded(module.weight):
                module.weight.data.normal_(std=std)
            module.pack_(module.weight)
        for name in self._experts:
            experts = model.get_submodule(name)
            for matrix in ("gate_up_proj", "up_proj", "down_proj"):
                parameter = experts._parameters.get(matrix)
                if parameter is not None:  # the checkpoint lacks it
                    pack_matrices(experts, matrix, parameter.detach(), self.quantization_config.weights)
        make_row_exact(model)
        return model

    def get_quantize_ops(self) -> "Pack":
        """Return what transformers calls with each matrix that it has read."""
        return Pack(self.quantization_config.weights)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Return False: transformers refuses to save packed weights, which only this package can read."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether the weights can be trained."""
        return False


class Pack(compat.ConversionOps):
    """Packs the matrix of one layer, or the matrices of the experts of one layer."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def convert(
        self,
        input_dict: dict[str, Any],
        *_: Any,
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **__: Any,
    ) -> dict[str, Any]:
        """Pack matrices into their layers, and return what else the file held for them.

        Args:
            input_dict: names with a matrix (M, K) or the matrices of all experts each, or with a list of one of them.
                Converters of a model may have made several of one that was stored.
            model: that is loaded.
            full_layer_name: the parameter's name in the model, if there is one matrix only.
            missing_keys: names that are not loaded yet.
        """
        rest = {}
        for key, value in input_dict.items():
            name = full_layer_name if len(input_dict) == 1 else key
            owner, kind = name.rpartition(".")[::2]
            layer, tensor = model.get_submodule(owner), value[0] if isinstance(value, list) else value
            if kind == "weight" and isinstance(layer, PackedLinear):
                self.give(layer, tensor)
                compat.mark_initialized(layer.weight)
            elif kind in matrices_of(layer):
                pack_matrices(layer, kind, tensor, self._kind)
            else:
                rest[name] = value
                continue
            (missing_keys or set()).discard(name)
        return rest

    def give(self, layer: PackedLinear, matrix: Any) -> None:
        """Give a layer its matrix (M, K)."""
        layer.pack_(matrix)


def _is_cpu(device: Any) -> bool:
    """Return whether an entry of a device_map stands for the CPU on this machine."""
    if isinstance(device, int):
        return False
    if device in (None, "auto", "balanced", "sequential"):
        return device is None or not torch.cuda.is_available()
    return device != "disk" and torch.device(device).type == "cpu"


def is_named(name: str, parts: Iterable[str]) -> bool:
    """Return whether one of `parts` is a part of a name, of one or more whole words between dots."""
    return any(f".{part}." in f".{name}." for part in parts)


def replacement(linear: nn.Linear, kind: str) -> PackedLinear:
    """Return a layer without memory that packed weights of a linear layer can be loaded into."""
    bias, dtype = linear.bias is not None, linear.weight.dtype
    return make_layer(linear.in_features, linear.out_features, kind, bias=bias, dtype=dtype)


if METHOD not in AUTO_QUANTIZER_MAPPING:  # the module may be loaded again
    register_quantization_config(METHOD)(CpuWeights)
    register_quantizer(METHOD)(CpuWeightsQuantizer)
