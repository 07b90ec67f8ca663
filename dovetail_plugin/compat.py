"""The one place that names what transformers does not promise to keep: private or recently changed names.

Everything else in the package goes through this module, so a new release of transformers that changes one of them
fails in `missing_names` (and its test) first. Methods of transformers that are overridden or wrapped in other modules
are listed in `NAMES` with their class. This module uses nothing of the rest of the package.

Tested versions are `OLDEST` to `NEWEST`. Since 5.24 the cache is called `cache`, in earlier versions
`past_key_values`: as an argument of `generate` and of forward methods, and as a field of outputs.
"""

# ruff: noqa: E402 - an old version is refused before a name that it lacks is looked for

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import transformers

OLDEST, NEWEST = (5, 5), (5, 24)
"""First and last minor version that the tests run with."""

OLDEST_TORCH = (2, 10)
"""First torch whose restricted unpickling is safe with hostile files (CVE-2026-24747)."""


def version_of(text: str) -> tuple[int, int]:
    """Return major and minor number of a version such as "5.24.0.dev0"."""
    major, minor = text.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def refuse_old(package: str, installed: str, oldest: tuple[int, int]) -> None:
    """Refuse a package that is older than `oldest`.

    Raises:
        ImportError: names both versions.
    """
    if version_of(installed) < oldest:
        raise ImportError(
            f"Dovetail needs {package} {dotted(oldest)} or later, and {installed} is installed. "
            f"Upgrade it with `pip install -U {package}`."
        )


def dotted(version: tuple[int, int]) -> str:
    """Return a version as text, for example "5.24"."""
    return ".".join(map(str, version))


import torch

refuse_old("torch", torch.__version__, OLDEST_TORCH)
refuse_old("transformers", transformers.__version__, OLDEST)

from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.masking_utils import create_masks_for_generate
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.pipelines import base as pipelines
from transformers.utils import cached_file

__all__ = [
    "CACHE",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "Cache",
    "CandidateGenerator",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LlamaRotaryEmbedding",
    "StaticCache",
    "apply_rotary_pos_emb",
    "pipelines",
]

logger = logging.getLogger(__name__)

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache, the newest first."""

SharedLayer: type | None = getattr(cache_utils, "DummyLayer", None)
"""Class of cache layers that read the rows of another layer and hold none; None before transformers had one."""

IndexedLayer: type | None = getattr(cache_utils, "DynamicIndexedLayer", None)
"""Class of cache layers with the keys of an index beside the rows; None before transformers had one."""

_parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE: str = next(name for name in CACHE_NAMES if name in _parameters)
"""Name of the cache in the installed version."""

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
    # used by `drafts.blocks`
    "LlamaRotaryEmbedding.forward": ("x", "position_ids"),
}
"""Class and name -> parameters that must exist."""


def is_tested(installed: str = transformers.__version__) -> bool:
    """Return whether a transformers version is one that the tests run with."""
    return OLDEST <= version_of(installed) <= NEWEST


def warn_untested() -> None:
    """Warn if the installed transformers is newer than the tested versions."""
    if not is_tested():
        logger.warning(
            "transformers %s is newer than the versions Dovetail is tested with (%s to %s). Drafts are checked against "
            "plain generation on a tiny model before the first one is used.",
            transformers.__version__,
            dotted(OLDEST),
            dotted(NEWEST),
        )


def missing_names() -> list[str]:
    """Return what the installed transformers lacks of `NAMES`: names, and parameters as "name(parameter)"."""
    missing = []
    for full_name, parameters in NAMES.items():
        owner, name = full_name.split(".")
        if not hasattr(globals()[owner], name):
            missing.append(full_name)
        elif parameters:
            known = inspect.signature(getattr(globals()[owner], name)).parameters
            missing += [f"{full_name}({parameter})" for parameter in parameters if parameter not in known]
    return missing


# --- arguments of generate and forward -----------------------------------------------------------------


MODE_ARGUMENTS = ("self", "generation_mode", "generation_config", "generation_mode_kwargs")
LOOP_ARGUMENTS = ("self", "input_ids", "logits_processor", "stopping_criteria", "generation_config")
CANDIDATE_ARGUMENTS = ("self", "generation_config", "input_ids", "inputs_tensor", "logits_processor", "model_kwargs")
PIPELINE_ARGUMENTS = ("model", "assistant_model", "assistant_tokenizer")
"""Parameters of the functions that `hf.py` wraps, in their order."""


def bound_arguments(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], order: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the arguments of a call by name, as `function`'s signature binds them; extra keywords are merged in.

    Args:
        function: that is called, perhaps a wrapper that hides the names of its parameters.
        args: by position.
        kwargs: by name.
        order: names of those arguments by position that the signature does not name.

    Raises:
        TypeError: the call does not fit the signature.
    """
    signature = inspect.signature(function)
    arguments = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL:
            rest = arguments.pop(name, ())
            arguments |= dict(zip(order[len(args) - len(rest) :], rest, strict=False))
    return arguments


def not_sampling(mode: Any) -> tuple[str, str] | None:
    """Return (kind, reason) why a mode of `generate` runs another loop than greedy search and sampling, or None."""
    name = getattr(mode, "value", str(mode))
    if name in ("greedy_search", "sample"):
        return None
    if name == "assisted_generation":
        return name, "the call asks for another way of drafting (prompt_lookup_num_tokens, for example)."
    return name, f"drafting works with greedy search and sampling, and the call asks for {name.replace('_', ' ')}."


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Remove the cache from arguments of `generate` or forward, under whatever name, and return it or None."""
    found = [kwargs.pop(name) for name in CACHE_NAMES if name in kwargs]
    return next((cache for cache in found if cache is not None), None)


def cache_argument(model: nn.Module) -> str:
    """Return the name of the cache among the arguments of a model's forward method."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in (CACHE, *CACHE_NAMES) if name in parameters), CACHE)


def run_prompt(
    model: PreTrainedModel,
    input_ids: Tensor,
    kwargs: dict[str, Any],
    *,
    cached: int,
    chunk: int | None,
) -> Any:
    """Run the prompt's passes as plain `generate` does, and return the output of the last one.

    Args:
        model: the target.
        input_ids: (1, T) int64, the whole prompt, or what is new of it.
        kwargs: of the forward pass, as `generate` prepared them, with the cache. Changed in place.
        cached: tokens at the start of `input_ids` whose rows the cache holds.
        chunk: rows of a pass, or None.
    """
    config = GenerationConfig(prefill_chunk_size=chunk)
    config._mask_length = input_ids.shape[1] if cached else -1  # tells the whole text from what is new of it
    if cached and kwargs.get("attention_mask") is None:  # before 5.23 only the mask tells
        kwargs["attention_mask"] = torch.ones_like(input_ids)
    return model._prefill(input_ids, config, kwargs)


def position_ids_for(model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return the position ids that `generate` makes for a prompt (1, T) whose caller gives none: (..., 1, T) int64."""
    return model._prepare_position_ids_for_generation(input_ids, kwargs)


def with_next_tokens(model: PreTrainedModel, output: Any, kwargs: dict[str, Any], count: int) -> dict[str, Any]:
    """Return arguments of the forward pass for a text that is `count` tokens longer, as plain `generate` updates them.

    Args:
        model: the target.
        output: of the latest pass.
        kwargs: of the text so far; not changed.
        count: number of further tokens, 0 or more.
    """
    kwargs = dict(kwargs)
    update = model._update_model_kwargs_for_generation
    own = getattr(update, "__func__", None) is not GenerationMixin._update_model_kwargs_for_generation
    if own or kwargs.get("token_type_ids") is not None:  # these repeat the last value only one by one
        for _ in range(count):
            kwargs = update(output, kwargs, is_encoder_decoder=False)
    elif count:
        kwargs = update(output, kwargs, num_new_tokens=count)
    return kwargs


def masks_of_pass(model: PreTrainedModel, inputs: dict[str, Any], cache: Cache, rows: int) -> dict[str, Tensor | None]:
    """Return the 4-D masks that a model makes for a pass, by type of layer; None where a row sees all rows before it.

    Args:
        model: the target.
        inputs: of the pass, from the model's `prepare_inputs_for_generation`.
        cache: of the pass.
        rows: rows of the pass.
    """
    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    names = ("position_ids", "token_type_ids", "mm_token_type_ids", "block_sequence_ids")
    masks = make(
        config=model.config,
        inputs_embeds=torch.empty(1, rows, 0, dtype=model.dtype, device=model.device),
        attention_mask=inputs.get("attention_mask"),
        **{CACHE: cache},
        **{name: inputs[name] for name in names if inputs.get(name) is not None},
    )
    return masks if isinstance(masks, dict) else {"all": masks}


@dataclass
class DraftedOutput(GenerateDecoderOnlyOutput):
    """Result of `generate` with `return_dict_in_generate=True`, and the report of the call.

    Attributes:
        report: a `GenerationReport`.
    """

    report: Any = None


def output_of_generate(
    sequences: Tensor, scores: tuple[Tensor, ...] | None, logits: tuple[Tensor, ...] | None, cache: Any, report: Any
) -> DraftedOutput:
    """Return what `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences: (B, T) int64.
        scores: processed scores (B, V) of each new token, or None.
        logits: raw logits (B, V) of each new token, or None.
        cache: keys and values of the text.
        report: of the call.
    """
    return DraftedOutput(sequences=sequences, scores=scores, logits=logits, report=report, **{CACHE: cache})


def processor_of_sequence(processor: Any, index: int) -> Any:
    """Let a copy of a logits processor of a batch serve one of its sequences alone, and return it.

    Args:
        processor: a copy; changed in place.
        index: of the sequence in the batch.
    """
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        processor._prefix_allowed_tokens_fn = lambda _batch, ids: allowed(index, ids)
    elif isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor):
        processor.encoder_input_ids = processor.encoder_input_ids[index : index + 1]
    elif isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
        processor.generated_ngrams, processor.batch_size = [processor.generated_ngrams[index]], 1
    elif isinstance(ignored := getattr(processor, "prompt_ignore_length", None), Tensor):  # padding, since 5.24
        processor.prompt_ignore_length = ignored[index : index + 1]
    return processor


def ends_one_by_one(criteria: StoppingCriteriaList) -> bool:
    """Return whether a sequence of a batch is padded once it has stopped, as `generate` does if there is an end token.

    Without one, a sequence that has stopped goes on until all have. Then only a common length ends them alike.
    """
    return any(isinstance(c, EosTokenCriteria) for c in criteria) or all(
        isinstance(c, MaxLengthCriteria) for c in criteria
    )


OF_OTHER_DRAFTS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type")
"""Options of `generate` that ask for another way of drafting."""

OF_ASSISTANTS = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "max_matching_ngram_size",
)
"""Options of `generate` for transformers' own assisted loop."""


def options_set(config: GenerationConfig, names: Sequence[str]) -> list[str]:
    """Return those options of a prepared config whose value is not the default."""
    defaults = config._get_default_generation_params()
    return [n for n in names if getattr(config, n, None) not in (None, False, defaults.get(n))]


def mask_length(config: GenerationConfig, default: int) -> int:
    """Return the length of the attention mask that `generate` dropped because it was all ones; `default` if unknown."""
    return getattr(config, "_mask_length", default)


# --- models and caches ---------------------------------------------------------------------------------


def attention_of(config: PretrainedConfig) -> str | None:
    """Return the name of a model's attention implementation."""
    return config._attn_implementation


def keeps_recurrent_state(model: PreTrainedModel) -> bool:
    """Return whether a model's cache holds a state from which single tokens cannot be removed."""
    return bool(model._is_stateful) or not model._supports_default_dynamic_cache()


def layers_for(config: PretrainedConfig) -> list[DynamicLayer]:
    """Return the empty cache layers that transformers makes for a (text) config."""
    layers = list(DynamicCache(config=config).layers)
    # Before 5.24, a config that shares no layers (num_kv_shared_layers 0) made a cache that gets them one by one.
    return layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]


def layers_in(cache: Cache, config: PretrainedConfig) -> list[DynamicLayer]:
    """Return the empty layers that transformers makes in a cache for a (text) config.

    A `DynamicCache()` that was made without a config keeps all rows, in layers with a window too.
    """
    layers, copied = layers_for(config), getattr(cache, "layer_class_to_replicate", None)
    if copied == DynamicLayer:
        return [DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer for layer in layers]
    return layers


def stock_layer(keys: Tensor | None, values: Tensor | None) -> DynamicLayer:
    """Return transformers' own layer over these keys and values (1, heads, n, head_dim), without a copy."""
    return _filled(DynamicLayer(), keys, values)


def stock_sliding_layer(
    window: int, keys: Tensor | None, values: Tensor | None, seen: int, *, recording: bool = False
) -> DynamicLayer:
    """Return transformers' own sliding-window layer over these rows; `seen` counts the dropped ones too.

    Args:
        window: tokens that a token can see.
        keys: (1, heads, n, head_dim), or None.
        values: the same.
        seen: tokens so far.
        recording: see `records_past`.
    """
    layer = _filled(DynamicSlidingWindowLayer(sliding_window=window), keys, values)
    layer.cumulative_length = seen
    if recording:
        layer.activate_past_recording()
    return layer


def stock_indexed_layer(
    keys: Tensor | None, values: Tensor | None, indexer_keys: Tensor | None, position_ids: Tensor | None
) -> DynamicLayer:
    """Return transformers' own layer over these rows, with the keys (1, n, dim) and positions (p, 1, n) of an index."""
    assert IndexedLayer is not None, "transformers made such a layer"
    layer: Any = _filled(IndexedLayer(), keys, values)
    if indexer_keys is not None:
        layer.lazy_initialization_indexer(indexer_keys)
        layer.indexer_keys = indexer_keys
    layer.indexer_position_ids = position_ids
    return layer


def records_past(layer: DynamicLayer) -> bool:
    """Return whether a sliding-window layer keeps rows before its window until `crop` (transformers 5.24)."""
    return getattr(layer, "record_past", False)


def _filled(layer: DynamicLayer, keys: Tensor | None, values: Tensor | None) -> DynamicLayer:
    if keys is not None and values is not None:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return layer


def hands_features_to_generators() -> bool:
    """Return whether the assisted loop gives the target's outputs to candidate generators (transformers 5.8)."""
    return hasattr(CandidateGenerator, "requires_model_outputs")


def mark_initialized(parameter: nn.Parameter) -> None:
    """Have `initialize_weights` leave this parameter as it is."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def commit_of(config: PretrainedConfig) -> str | None:
    """Return the commit of the hub repository that a config was read from; None if it is unknown, as since 5.24."""
    return getattr(config, "_commit_hash", None)


def find_file(name: str, file: str, **hub_kwargs: Any) -> str | None:
    """Return the local path of a file of a directory or hub repository, or None if there is no such file.

    Args:
        name: directory or hub id.
        file: path within it.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, `force_download`.
    """
    return _cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub_kwargs)


def require_file(name: str, file: str, **hub_kwargs: Any) -> str:
    """Return the local path of a file of a directory or hub repository; arguments as `find_file`.

    Raises:
        OSError: there is no such file, or the hub cannot be reached.
    """
    return _cached_file(name, file, **hub_kwargs)


def _cached_file(name: str, file: str, **kwargs: Any) -> Any:
    try:
        return cached_file(name, file, **kwargs)
    except RuntimeError as error:  # huggingface_hub before 1.28 closes its client when the hub cannot be reached
        raise OSError(f"the hub cannot be reached: {error}") from error
