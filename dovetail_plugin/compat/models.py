"""Models and what belongs to them: configs, the layers of their caches, and files of their repositories."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, cache_utils
from transformers.activations import GELUTanh, SiLUActivation
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import cached_file

SharedLayer: type | None = getattr(cache_utils, "DummyLayer", None)
"""Class of cache layers that read the rows of another layer and hold none; None before transformers had one."""

IndexedLayer: type | None = getattr(cache_utils, "DynamicIndexedLayer", None)
"""Class of cache layers with the keys of an index beside the rows; None before transformers had one."""


def attention_of(config: PretrainedConfig) -> str | None:
    """Return the name of a model's attention implementation."""
    return config._attn_implementation


def parts_of(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    """Return the configs that a config contains, by the names of its attributes."""
    found = {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: part for name, part in found.items() if isinstance(part, PretrainedConfig)}


def can_set_attention(model: PreTrainedModel) -> bool:
    """Return whether the layers of a model look up their attention by name."""
    return model._can_set_attn_implementation()


def has_torch_attention(model: PreTrainedModel) -> bool:
    """Return whether a model can use torch's own attention function."""
    return model._supports_sdpa


def activation_of(module: nn.Module) -> str | None:
    """Return "silu" or "gelu_tanh" if a module is that activation function and nothing else."""
    if type(module) in (nn.SiLU, SiLUActivation):
        return "silu"
    fused = type(module) is GELUTanh and isinstance(module.act, functools.partial)
    return "gelu_tanh" if fused or (type(module) is nn.GELU and module.approximate == "tanh") else None


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


def tied_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters that are tied to others, or others to them."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied.keys(), *tied.values()}


def tied_copies(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters that are tied to others, and that files need not have."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Register a function that runs the experts of MoE models whose config names it."""
    ALL_EXPERTS_FUNCTIONS.register(name, function)


def modules_in_float32(model: PreTrainedModel) -> set[str]:
    """Return parts of the names of modules whose weights the authors of a model keep in float32."""
    return {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}


def was_loaded(parameter: Tensor) -> bool:
    """Return whether a parameter comes from a checkpoint, while a model is loaded."""
    return getattr(parameter, "_is_hf_initialized", False)


def mark_initialized(parameter: nn.Parameter) -> None:
    """Have transformers leave a parameter as it is: it comes from a checkpoint, or has its first numbers."""
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
