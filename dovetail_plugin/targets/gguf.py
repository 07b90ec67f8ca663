"""Targets in GGUF files: `load_gguf` returns a model of transformers whose linear layers are packed as in the file.

transformers finds the parameters of the tensors and builds the model. This module gives it each tensor when it is
wanted. A matrix in Q8_0, Q4_0, Q4_K or Q6_K goes from the file into the order of the CPU kernels, and nothing is
rounded. One in another quantization is unpacked and packed as "int8". Everything else becomes float tensors. So at most
the packed model and one tensor are in memory.
"""

from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from .. import compat
from ..errors import InputError
from ..kernels.library import packed_bytes
from ..kernels.linear import PackedLinear
from .cpu_weights import CpuWeights, CpuWeightsQuantizer, Pack, replacement
from .gguf_file import Gguf, read_gguf
from .gguf_weights import FLOATS, Parameters, floats_of, kind_of
from .row_exact import make_row_exact

METHOD = "dovetail_gguf"
"""Name of the quantization method in configs of loaded models."""

MOST_LAYERS = 4096
MOST_EXPERTS = 65536

BY_FIRST_FILE = ("stablelm",)
"""Architectures whose config transformers reads from the names of the tensors, in the first file only."""

FIELDS = {
    "qwen2moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3": {"attention.key_length": "head_dim"},
    "qwen3moe": {"expert_feed_forward_length": "moe_intermediate_size"},
}
"""Architecture -> keys that transformers does not read, and the fields of its config that they belong to."""

FACTORS = "rope_freqs.weight"
"""Tensor of files of Llama 3.1 and later: what the frequencies of rotary positions are divided by."""

TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


def load_gguf(file: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a target from a GGUF file, with the numbers that the file holds.

        target = load_gguf("model-Q4_K_M.gguf")
        tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="model-Q4_K_M.gguf")

    Args:
        file: path of the file; of a model in several files the first, NAME-00001-of-0000N.gguf.
        dtype: of the activations and of all that is not packed: embedding, norms, biases, and the experts of an MoE
            model.

    Returns:
        A model on the CPU in evaluation mode. Its linear layers are `PackedLinear`, where they are quantized in the
        file, the head too.

    Raises:
        MissingFileError: there is no such file, or one of several is missing.
        InputError: the file is damaged, or it does not fit its own config; or transformers does not know its
            architecture.
        ImportError: the package `gguf` is not installed.
    """
    gguf = read_gguf(Path(file))
    config = gguf_config(gguf)
    parameters = Parameters(gguf, config, dtype)
    kinds = {name.rpartition(".")[0]: matrix.kind for name, matrix in parameters.matrices.items()}
    try:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=parameters.loaded(),
            dtype=dtype,
            quantization_config=GgufWeights(gguf, kinds),
        )
    except RuntimeError as error:  # transformers goes on to the end, and does not say what happened first
        if parameters.failures:
            raise parameters.failures[0] from error
        raise
    for name in parameters.tied:
        model.get_submodule(name.rpartition(".")[0]).take_(parameters.matrices[name].packed(), dtype)
    not_packed = [name for name, part in model.named_modules() if isinstance(part, PackedLinear) and not part.is_packed]
    assert not not_packed, f"{not_packed} should have been packed"
    _stretch_positions(model, gguf)
    _end_texts(model, gguf)
    model.config.name_or_path = model.name_or_path = str(file)
    return model


def gguf_config(gguf: Gguf) -> PretrainedConfig:
    """Return the config of a model, which transformers reads from the file.

    Raises:
        InputError: the config cannot be read or used, or the architecture is not known.
    """
    name = gguf.architecture
    if not compat.is_known_gguf(name):
        raise InputError(
            f"{gguf.file} has architecture {name!r}, whose tensors transformers cannot find in GGUF files. Known ones "
            f"are {', '.join(compat.gguf_architectures())}."
        )
    if gguf.parts > 1 and name in BY_FIRST_FILE:
        raise InputError(f"{gguf.file}: models of architecture {name!r} are read from one file only. Merge its files.")
    for field, most in (("block_count", min(MOST_LAYERS, len(gguf.tensors))), ("expert_count", MOST_EXPERTS)):
        value = gguf.metadata.get(f"{name}.{field}", 0)
        if not isinstance(value, int) or value > most:
            raise InputError(f"{gguf.file} is damaged: {name}.{field} is {value!r}, and {most} is possible at most.")
    try:
        config = AutoConfig.from_pretrained(str(gguf.file.parent), gguf_file=gguf.file.name)
    except Exception as error:  # whatever the values of a file make transformers raise
        raise InputError(
            f"{gguf.file}: transformers cannot use its config ({type(error).__name__}: {error}). Download it again."
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{gguf.file} is a {config.model_type} model, and targets are decoder-only models.")
    if gguf.parts > 1 and "output.weight" in gguf.tensors:  # transformers looks for it in the first file
        config.tie_word_embeddings = False
    fields = {f"{name}.{key}": field for key, field in FIELDS.get(name, {}).items()} | TOKENS
    for key, field in fields.items():
        if isinstance(number := gguf.metadata.get(key), int):
            setattr(config, field, number)
    return config


def planned_config(file: str | Path) -> PretrainedConfig:
    """Return the config of the model in a file for plans, with the bits and dtype that `load_gguf` gives its weights.

    Raises:
        MissingFileError, InputError, ImportError: see `load_gguf`.
    """
    gguf = read_gguf(Path(file))
    config, weights = gguf_config(gguf), GgufWeights(gguf, {})
    if weights.bits:
        config.quantization_config = weights.to_dict()
    config.dtype, config.name_or_path = torch.float32, str(file)
    return config


def is_gguf(name: str | Path | None) -> bool:
    """Return whether a name of a model is that of a GGUF file."""
    return name is not None and Path(name).suffix.lower() == ".gguf" and not Path(name).is_dir()


def _stretch_positions(model: PreTrainedModel, gguf: Gguf) -> None:
    """Divide the frequencies of rotary positions by the file's factors, which transformers does not read."""
    tensor = gguf.tensors.get(FACTORS)
    if tensor is None:
        return
    factors = torch.from_numpy(floats_of(tensor)).flatten()
    rotary = [part for part in model.modules() if getattr(part, "inv_freq", torch.empty(0)).shape == factors.shape]
    if len(rotary) != 1:
        raise InputError(f"{gguf.file} has {FACTORS}, and a {model.config.model_type} model has no place for them.")
    rotary[0].inv_freq /= factors


def _end_texts(model: PreTrainedModel, gguf: Gguf) -> None:
    """Have texts end at the tokens that the file names."""
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    found = [gguf.metadata[name] for name in names if isinstance(gguf.metadata.get(name), int)]
    if found and model.generation_config is not None:
        ends = list(dict.fromkeys(found))
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


# --- the seam to transformers ----------------------------------------------------------------------


class GgufWeights(CpuWeights):
    """Quantization config of models that `load_gguf` has loaded.

    Args:
        gguf: their file.
        kinds: name of a linear layer -> kind of its packed weights.

    Attributes:
        bits: of a packed weight of the decoder layers on average, for plans; 0 if none is packed.
    """

    def __init__(self, gguf: Gguf, kinds: dict[str, str]) -> None:
        super().__init__(modules_to_not_convert=["experts"], quant_method=METHOD)
        self.kinds = kinds
        packed = [
            (prod(tensor.shape), packed_bytes(*tensor.shape, kind_of(tensor)))
            for tensor in gguf.tensors.values()
            if tensor.name.startswith("blk.") and len(tensor.shape) == 2 and tensor.type_name not in FLOATS
        ]
        self.bits = 8 * sum(size for _, size in packed) / max(1, sum(count for count, _ in packed))


class GgufQuantizer(CpuWeightsQuantizer):
    """Replaces the linear layers that are quantized in the file, and gives them their packed weights."""

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,  # noqa: ARG002 - the file was read before
        **_: Any,
    ) -> PreTrainedModel:
        for name, kind in self.quantization_config.kinds.items():
            model.set_submodule(name, replacement(model.get_submodule(name), kind))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.quantization_config.kinds:
            make_row_exact(model)
        return model

    def get_quantize_ops(self) -> "Take":
        """Return what transformers calls with each matrix."""
        return Take(self.quantization_config.weights)


class Take(Pack):
    """Gives layers the matrices of a file, which are packed as they are."""

    def give(self, layer: PackedLinear, matrix: Any) -> None:
        """Give a layer its `Matrix`."""
        layer.take_(matrix.packed(), layer.weight.dtype)


if METHOD not in AUTO_QUANTIZER_MAPPING:  # the module may be loaded again
    register_quantization_config(METHOD)(GgufWeights)
    register_quantizer(METHOD)(GgufQuantizer)
