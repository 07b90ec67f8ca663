"""Names of transformers that may change: what the package uses of them, and whether the installed version has it.

Methods that other modules wrap or override are listed with their class. Since 5.24 the cache is called `cache`, in
earlier versions `past_key_values`: as an argument of `generate` and of forward methods, and as a field of outputs.
"""

import inspect

from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.core_model_loading import ConversionOps
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.quantizers import HfQuantizer

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache, the newest first."""

_parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE: str = next(name for name in CACHE_NAMES if name in _parameters)
"""Name of the cache in the installed version."""

OWNERS: dict[str, type] = {
    owner.__name__: owner
    for owner in (
        CandidateGenerator,
        ConversionOps,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        GenerationMixin,
        HfQuantizer,
        LlamaRotaryEmbedding,
        PreTrainedModel,
    )
}
"""Classes of transformers that `NAMES` names."""

NAMES: dict[str, tuple[str, ...]] = {
    # wrapped by `hf.py`
    "GenerationMixin._validate_generation_mode": ("generation_mode", "generation_config", "generation_mode_kwargs"),
    "GenerationMixin._assisted_decoding": (
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
    ),
    "GenerationMixin._get_candidate_generator": ("generation_config", "logits_processor", "assistant_model"),
    # also overridden by `adapters.stored_target.StoredTarget`
    "GenerationMixin._sample": ("input_ids", "logits_processor", "stopping_criteria", "generation_config"),
    "GenerationMixin._beam_search": ("input_ids", "logits_processor", "stopping_criteria", "generation_config"),
    "GenerationMixin._prepare_cache_for_generation": ("generation_config", "model_kwargs"),
    # overridden by `drafts.network.DraftNetwork`
    "PreTrainedModel._init_weights": ("module",),
    "PreTrainedModel.post_init": (),
    "PreTrainedModel._keys_to_ignore_on_load_unexpected": (),
    "PreTrainedModel._supports_sdpa": (),
    "PreTrainedModel._can_set_attn_implementation": (),
    "PreTrainedModel.set_attn_implementation": ("attn_implementation",),
    "PreTrainedModel._keep_in_fp32_modules": (),
    "PreTrainedModel._keep_in_fp32_modules_strict": (),
    # called or read here
    "GenerationMixin._prefill": ("input_ids", "generation_config", "model_kwargs"),
    "GenerationMixin._update_model_kwargs_for_generation": ("outputs", "model_kwargs"),
    "GenerationMixin.prepare_inputs_for_generation": ("input_ids", "next_sequence_length", CACHE, "attention_mask"),
    "GenerationMixin._prepare_position_ids_for_generation": ("inputs_tensor", "model_kwargs"),
    "GenerationMixin._supports_default_dynamic_cache": (),
    "PreTrainedModel._is_stateful": (),
    # subclassed or filled by `cache.py`
    "DynamicLayer.update": ("key_states", "value_states"),
    "DynamicLayer.lazy_initialization": ("key_states", "value_states"),
    "DynamicLayer.get_seq_length": (),
    "DynamicLayer.get_mask_sizes": (),
    "DynamicSlidingWindowLayer.__init__": ("sliding_window",),
    # called by the assisted loop on `generation.stock_loop.DovetailCandidateGenerator`
    "CandidateGenerator.get_candidates": ("input_ids",),
    "CandidateGenerator.update_candidate_strategy": ("input_ids", "scores", "num_matches"),
    # overridden by `targets.cpu_weights`
    "HfQuantizer.validate_environment": (),
    "HfQuantizer.param_needs_quantization": ("model", "param_name"),
    "HfQuantizer._process_model_before_weight_loading": ("model",),
    "HfQuantizer._process_model_after_weight_loading": ("model",),
    "HfQuantizer.get_quantize_ops": (),
    "HfQuantizer.is_serializable": (),
    "ConversionOps.convert": ("input_dict",),
    # used by `drafts.blocks`
    "LlamaRotaryEmbedding.forward": ("x", "position_ids"),
}
"""Class and name -> parameters that must exist."""


def missing_names() -> list[str]:
    """Return what the installed transformers lacks of `NAMES`: names, and parameters as "name(parameter)"."""
    missing = []
    for full_name, parameters in NAMES.items():
        owner, name = full_name.split(".")
        if not hasattr(OWNERS[owner], name):
            missing.append(full_name)
        elif parameters:
            known = inspect.signature(getattr(OWNERS[owner], name)).parameters
            missing += [f"{full_name}({parameter})" for parameter in parameters if parameter not in known]
    return missing
