"""Sizes of a target and a draft from their configs: models without storage are built on meta and counted.

Enters: a config and a storage type. Leaves: `TargetSizes`, `DraftSizes`. Weights are exact for every architecture that
transformers builds, in float types; those of exported targets follow the exporters' rules (`QUANTISED`).
"""

import copy
import math
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..cache import refuse_reason
from ..compat import DynamicCache, cache_argument, keeps_recurrent_state, layers_for
from ..drafts.config import DovetailConfig
from ..drafts.model import DovetailDraft
from ..targets.layers_on_gpu import decoder_layers, final_norm
from .memory import DraftSizes, LayerSizes, TargetSizes, Widths

FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED = ("int8", "int4")
"""Weights of an exported target. int8: every weight matrix at one byte, with a float16 scale for each output channel.
int4: matrices of the decoder layers at half a byte, with a float16 scale for every 128 inputs; embedding and head
stay at 8 bits. So OpenVINO's and optimum's exports do it. Vectors (norms, biases) are float16."""

INT4_GROUP = 128
QUANTISED_RUN_BYTES = 4
"""Of a number in keys, values and activations of an exported target: the adapters compute in float32 by default."""


def target_sizes(config: PretrainedConfig, dtype: str) -> TargetSizes:
    """Sizes of a decoder-only model stored as `dtype`, one of `FLOAT_DTYPES` or `QUANTISED`.

    Raises:
        ValueError: the config is of a model that cannot be a target (encoder-decoder, recurrent), or of none.
    """
    model = _on_meta(config, FLOAT_DTYPES.get(dtype, torch.float16))
    text = config.get_text_config(decoder=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    try:
        layers, norm = list(decoder_layers(model)), final_norm(model)
    except ValueError:  # none that could be told apart: their weights count as rest, and none can be moved
        layers, norm = [], None
    special: dict[int, int | str] = {id(layer): index for index, layer in enumerate(layers)}
    if norm is not None:
        special[id(norm)] = "norm"
    number_bytes = FLOAT_DTYPES[dtype].itemsize if dtype in FLOAT_DTYPES else QUANTISED_RUN_BYTES
    sizes = tuple(_layer_sizes(layers, config, dtype, number_bytes))
    embedding_bytes = _stored_bytes(_tensors(embedding), dtype, table=True)
    head_bytes = _stored_bytes((t for t in _tensors(head) if t is not embedding.weight), dtype, table=True)
    norm_bytes = 0 if norm is None else _stored_bytes(_tensors(norm), dtype)
    counted = {id(t) for m in (embedding, head, norm, *layers) if m is not None for t in _tensors(m)}
    return TargetSizes(
        dtype=dtype,
        embedding_bytes=embedding_bytes,
        layers=sizes,
        norm_bytes=norm_bytes,
        head_bytes=head_bytes,
        rest_bytes=_stored_bytes((t for t in _tensors(model) if id(t) not in counted), dtype, table=True),
        tied=tied,
        head_bias=getattr(head, "bias", None) is not None,
        vocab_size=text.vocab_size,
        number_bytes=number_bytes,
        widths=_widths(text),
        modules=dict(_modules(model, "", special)),
    )


def draft_sizes(config: DovetailConfig, dtype: str) -> DraftSizes:
    """Sizes of a `DovetailDraft` in `dtype`, one of `FLOAT_DTYPES`; the target's tables are not among them."""
    with torch.device("meta"):
        draft = DovetailDraft(copy.deepcopy(config))
    number_bytes = FLOAT_DTYPES[dtype].itemsize
    blocks = sum(p.numel() for p in draft.parameters()) * number_bytes + sum(b.nbytes for b in draft.buffers())
    widths = _widths(config)
    return DraftSizes(
        blocks_bytes=blocks,
        kv_row_bytes=config.num_hidden_layers * widths.key_value * number_bytes,
        number_bytes=number_bytes,
        vocab_size=config.vocab_size,
        own_head=None if draft.head_weight is None else draft.head_weight.shape[0],
        own_embedding=config.own_embedding,
        features=config.feature_size,
        widths=widths,
    )


# --- counting ----------------------------------------------------------------------------------


def _on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    name = config.name_or_path or type(config).__name__
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    reason = refuse_reason(layers_for(config.get_text_config(decoder=True)))
    if keeps_recurrent_state(model) or reason:
        reason = reason or "it keeps a recurrent state"
        raise ValueError(f"{name} cannot take back rejected tokens: {reason}. There is nothing to plan with a draft.")
    return model


def _layer_sizes(
    layers: list[nn.Module], config: PretrainedConfig, dtype: str, number_bytes: int
) -> Iterator[LayerSizes]:
    """Of every layer; the cache has none for those that read the rows of earlier ones, which are the last."""
    text = config.get_text_config(decoder=True)
    cached = zip(_numbers_of_a_token(config, text), layers_for(text), strict=True)
    for layer, rows in zip_longest(layers, cached):
        weights_bytes = 0 if layer is None else _stored_bytes(_tensors(layer), dtype)
        numbers, kind = rows or (0, None)
        yield LayerSizes(weights_bytes, numbers * number_bytes, getattr(kind, "sliding_window", None))


def _numbers_of_a_token(config: PretrainedConfig, text: PretrainedConfig) -> list[int]:
    """In keys and values of each layer of the cache: what the model itself writes for one token, run on meta.

    Versions of transformers differ in what they keep (of latent attention), and so do layers of a model.
    """
    cache, model = DynamicCache(config=text), _on_meta(config, torch.bfloat16)  # some kernels have no other on meta
    try:
        with torch.no_grad(), torch.device("meta"):
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True, **{cache_argument(model): cache})
    except RuntimeError:  # it looks at numbers, which are not there; so does GPT-2
        return [_widths(text).key_value] * len(cache.layers)
    return [0 if layer.keys is None else layer.keys.numel() + layer.values.numel() for layer in cache.layers]


def _widths(text: PretrainedConfig) -> Widths:
    """Of a layer, by the config's usual names; experts count as one MLP as wide as those of a token together."""
    hidden, heads = text.hidden_size, text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    query_dim = max(getattr(text, "qk_head_dim", None) or 0, head_dim)
    inner = next((w for w in (getattr(text, n, None) for n in ("intermediate_size", "n_inner", "ffn_dim")) if w), None)
    routed = (getattr(text, "num_experts_per_tok", None) or 0) * (getattr(text, "moe_intermediate_size", None) or 0)
    return Widths(hidden, max(inner or 4 * hidden, routed), heads * query_dim, 2 * kv_heads * head_dim)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def _stored_bytes(tensors: Iterable[Tensor], dtype: str, *, table: bool = False) -> int:
    """Of tensors in a file or graph of this type; `table`: an embedding, a head or the like."""
    total = 0
    for tensor in tensors:
        if dtype not in QUANTISED or tensor.ndim < 2:
            total += tensor.nbytes
            continue
        numbers, inputs = tensor.numel(), tensor.shape[-1]
        if dtype == "int8" or table:
            total += numbers + 2 * numbers // inputs
        else:
            total += math.ceil(numbers / 2) + 2 * numbers // inputs * math.ceil(inputs / INT4_GROUP)
    return total


def _modules(module: nn.Module, prefix: str, special: dict[int, int | str]) -> Iterable[tuple[str, int | str]]:
    """(name, what it is) of the special modules and of the largest ones that hold none of them."""
    for name, child in module.named_children():
        if id(child) in special:
            yield prefix + name, special[id(child)]
        elif any(id(inside) in special for inside in child.modules()):
            yield from _modules(child, f"{prefix}{name}.", special)
        else:
            yield prefix + name, "rest"
    own: dict[str, Any] = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    for name in own:
        yield prefix + name, "rest"
