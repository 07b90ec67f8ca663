"""Computes the bytes of a target and of a draft from their configs.

`target_sizes` and `draft_sizes` take a config and how its weights are stored. Weights are counted on a model on the
device "meta", which takes no memory, so they are exact for every architecture that transformers builds. Cache sizes
follow `cache.py` and `drafts/cuda_graph_rows.py`. Temporaries of a pass are estimated by a formula, which
benchmarks/plan_accuracy.py checks. The module makes no decisions.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ..cache import refuse_reason, reserved
from ..compat import DynamicCache, cache_argument, keeps_recurrent_state, layers_for
from ..drafts.base import DRAFT_ROWS
from ..drafts.config import DovetailConfig
from ..drafts.cuda_graph_rows import MAX_STATIC_ROWS, MIN_COLUMNS, power_of_two
from ..drafts.model import DovetailDraft
from ..targets.config_sizes import sizes_of
from ..targets.features import decoder_layers
from ..targets.layers_on_gpu import final_norm, parts_of
from .storage import FLOAT_DTYPES, Storage


@dataclass(frozen=True)
class Rows:
    """Row counts of a generation.

    Attributes:
        context: number of tokens of prompt and answer.
        nodes: number of nodes of the largest tree (N).
        prefill: number of prompt rows that the target runs in one pass, at most `context`.
    """

    context: int
    nodes: int
    prefill: int


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one decoder layer.

    Attributes:
        weights_bytes: bytes of its weights as they are stored.
        kv_row_bytes: bytes of its keys and values of one row; 0 if it reads the rows of another layer.
        window: number of rows that its attention sees; None if it sees all rows.
    """

    weights_bytes: int
    kv_row_bytes: int
    window: int | None

    def kv_bytes(self, rows: Rows, *, allocated: bool) -> int:
        """Return the bytes of its cache: whole buffers (on a GPU), or only the pages that are written (on a CPU)."""
        full = rows.context + rows.nodes
        capacity = reserved(full if self.window is None else min(self.window - 1 + rows.nodes, full))
        return self.kv_row_bytes * (capacity if allocated else min(capacity, full))


@dataclass(frozen=True)
class Widths:
    """Widths of one row inside a decoder layer, in numbers.

    Attributes:
        hidden: width of the residual stream.
        inner: width of the MLP.
        query: width of all queries together.
        key_value: width of all keys and values together.
    """

    hidden: int
    inner: int
    query: int
    key_value: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Widths":
        """Read the widths of a config. Experts count as one MLP as wide as all experts of one token together."""
        sizes, text = sizes_of(config), config.get_text_config(decoder=True)
        query_dim = max(getattr(text, "qk_head_dim", None) or 0, sizes.head_dim)
        expert = getattr(text, "moe_intermediate_size", None) or sizes.intermediate_size
        inner = max(sizes.intermediate_size, (getattr(text, "num_experts_per_tok", None) or 0) * expert)
        return cls(sizes.hidden_size, inner, sizes.heads * query_dim, 2 * sizes.kv_heads * sizes.head_dim)

    def pass_bytes(self, rows: int, number_bytes: int) -> int:
        """Return the peak bytes of temporaries while a decoder layer runs `rows` rows of `number_bytes` numbers.

        Around the layer there are four tensors of the stream's width (embeddings or features, the layer's input, the
        residual, the normed input). Inside it, either the MLP holds three tensors of its width (gate, up, product), or
        attention holds keys, values and six tensors of the queries' width (queries and their rotation).
        """
        inside = max(3 * self.inner, 6 * self.query + self.key_value)
        return rows * number_bytes * (4 * self.hidden + inside)

    def masked_pass_bytes(self, rows: int, keys: int, number_bytes: int, *, additive: bool) -> int:
        """Return the same for a pass with a mask over `keys` rows of the cache.

        An additive mask is used as it is; attention converts a boolean one. With a mask, transformers' attention
        repeats grouped keys and values for all query heads, layer by layer.
        """
        mask = rows * keys * (number_bytes if additive else 1)
        converted = 0 if additive else rows * keys * number_bytes
        repeated = 2 * self.query * keys * number_bytes if 2 * self.query > self.key_value else 0
        attention = rows * number_bytes * (4 * self.hidden + 2 * self.query) + repeated + converted
        return mask + max(self.pass_bytes(rows, number_bytes), attention)


@dataclass(frozen=True)
class TargetSizes:
    """Sizes of a target.

    Attributes:
        storage: how its weights are stored.
        weights: bytes outside the decoder layers, by name: "embedding", "head" (0 for a tied table), "final norm",
            "rest".
        layers: sizes of the decoder layers; empty if they cannot be identified.
        tied: whether head and embedding are the same table.
        head_bias: whether the head has a bias.
        packed_head: whether the head has packed weights, which a draft on the CPU shares.
        vocab_size: number of rows of the tables (V).
        widths: widths of a decoder layer.
        modules: module names and the layers that they belong to (see `parts_of`).
    """

    storage: Storage
    weights: dict[str, int]
    layers: tuple[LayerSizes, ...]
    tied: bool
    head_bias: bool
    packed_head: bool
    vocab_size: int
    widths: Widths
    modules: dict[str, int | str]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights and buffers together."""
        return sum(self.weights.values()) + sum(layer.weights_bytes for layer in self.layers)

    def features_bytes(self, rows: Rows, width: int) -> int:
        """Return the bytes of the prompt's features, `width` numbers per row. They are kept during the generation."""
        return rows.context * width * self.storage.run_bytes

    def prefill_bytes(self, rows: Rows) -> int:
        """Return the bytes of temporaries of one pass over prompt rows, without features.

        A prompt that runs in one pass needs no mask if every layer sees all of it.
        """
        if rows.prefill == rows.context and all((layer.window or math.inf) >= rows.context for layer in self.layers):
            return self.widths.pass_bytes(rows.prefill, self.storage.run_bytes)
        seen = (rows.context if layer.window is None else layer.window - 1 + rows.prefill for layer in self.layers)
        keys = min(max(seen, default=rows.context), rows.context)
        return self.widths.masked_pass_bytes(rows.prefill, keys, self.storage.run_bytes, additive=False)

    def score_bytes(self, rows: Rows) -> int:
        """Return the bytes of temporaries of one pass over a tree, with its logits in float32."""
        keys, logits_bytes = rows.context + rows.nodes, rows.nodes * self.vocab_size * 4
        return self.widths.masked_pass_bytes(rows.nodes, keys, self.storage.run_bytes, additive=False) + logits_bytes


@dataclass(frozen=True)
class DraftSizes:
    """Sizes of a draft that reads features.

    Attributes:
        config: config of the draft.
        number_bytes: bytes of a number in its dtype.
        blocks_bytes: bytes of all weights of the draft itself, without the target's tables.
        own_head: number of rows of its head; None if it uses the target's head.
    """

    config: DovetailConfig
    number_bytes: int
    blocks_bytes: int
    own_head: int | None

    @property
    def widths(self) -> Widths:
        """Widths of a block."""
        return Widths.of(self.config)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a table in the draft's dtype."""
        return self.config.hidden_size * self.number_bytes

    def kv_bytes(self, rows: Rows, *, on_gpu: bool) -> int:
        """Return the bytes of its cache. A GPU holds a power of two of rows, a CPU the rows in use."""
        kept = self._capacity(rows) if on_gpu else rows.context + rows.nodes
        return self.config.num_hidden_layers * self.widths.key_value * self.number_bytes * kept

    def pass_bytes(self, rows: Rows) -> int:
        """Return the bytes of temporaries of its pass over the whole prompt, and of logits over one level of a tree."""
        fusion = (6 * self.widths.hidden + self.config.feature_size) * rows.context * self.number_bytes
        logits = MAX_STATIC_ROWS * self._logits * (self.number_bytes + 8)  # and log-probabilities in float32, twice
        return max(self.widths.pass_bytes(rows.context, self.number_bytes), fusion) + logits

    @property
    def _logits(self) -> int:
        return self.own_head or self.config.vocab_size

    def _capacity(self, rows: Rows) -> int:
        return power_of_two(max(rows.context + DRAFT_ROWS, MIN_COLUMNS))


def target_sizes(config: PretrainedConfig, storage: Storage) -> TargetSizes:
    """Compute the sizes of a target.

    Raises:
        ValueError: the config belongs to a model that cannot be a target, for example an encoder-decoder or a recurrent
            model.
    """
    model = _on_meta(config, storage.dtype)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    try:
        layers, norm = list(decoder_layers(model)), final_norm(model)
    except ValueError:  # the layers cannot be identified: their weights count as rest, and none can be moved
        layers, norm = [], None
    in_layers = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    stored = {
        id(tensor): storage.bytes_of(name, tensor, in_layer=id(tensor) in in_layers)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }

    def take(module: nn.Module) -> int:  # each tensor counts in the first part that has it
        return sum(stored.pop(id(tensor), 0) for tensor in (*module.parameters(), *module.buffers()))

    weights = {"embedding": take(embedding), "head": take(head), "final norm": take(norm) if norm is not None else 0}
    packed_head = storage.packed_head_bytes(f"{name_of(model, head)}.weight", head.weight)
    weights["head"] = weights["head"] if packed_head is None else packed_head
    layer_bytes = [take(layer) for layer in layers]
    weights["rest"] = take(model)
    return TargetSizes(
        storage=storage,
        weights=weights,
        layers=tuple(_layer_sizes(model, layer_bytes, storage.run_bytes)),
        tied=head.weight is embedding.weight,
        head_bias=getattr(head, "bias", None) is not None,
        packed_head=packed_head is not None,
        vocab_size=sizes_of(config).vocab_size,
        widths=Widths.of(config),
        modules=parts_of(model, layers, norm),
    )


def name_of(model: nn.Module, module: nn.Module) -> str:
    """Return the name of a module in a model."""
    return next(name for name, each in model.named_modules() if each is module)


def draft_sizes(config: DovetailConfig, dtype: str) -> DraftSizes:
    """Compute the sizes of a `DovetailDraft` in `dtype`, one of `FLOAT_DTYPES`, without the target's tables."""
    with torch.device("meta"):
        draft = DovetailDraft(copy.deepcopy(config))
    number_bytes = FLOAT_DTYPES[dtype].itemsize
    blocks_bytes = sum(p.numel() for p in draft.parameters()) * number_bytes + sum(b.nbytes for b in draft.buffers())
    return DraftSizes(config, number_bytes, blocks_bytes, None if draft.head_weight is None else len(draft.head_weight))


def _on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    name = config.name_or_path or type(config).__name__
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name} is a {config.model_type} model, which AutoModelForCausalLM cannot load. Plans are made for models "
            "that it loads; give the text model's config if the checkpoint has one."
        )
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the shapes are those of the unpacked weights
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    reason = refuse_reason(layers_for(config.get_text_config(decoder=True)))
    if keeps_recurrent_state(model) or reason:
        reason = reason or "it keeps a recurrent state"
        raise ValueError(f"{name} cannot take back rejected tokens: {reason}. It cannot be used with a draft.")
    return model


def _layer_sizes(model: PreTrainedModel, weights_bytes: list[int], number_bytes: int) -> Iterator[LayerSizes]:
    """Yield the sizes of each layer. Keys and values are counted by running the model over one token.

    With latent attention, the number of cached values differs between versions of transformers and between layers. The
    last layers of some models have no cache, because they read the rows of earlier layers.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    try:
        with torch.no_grad(), torch.device("meta"):
            # Some kernels support only this dtype on meta.
            ids = torch.zeros(1, 1, dtype=torch.int64)
            model.to(torch.bfloat16)(ids, use_cache=True, **{cache_argument(model): cache})
        kept_rows = [(kept.keys, kept.values, getattr(kept, "indexer_keys", None)) for kept in cache.layers]
        numbers = [sum(rows.numel() for rows in each if rows is not None) for each in kept_rows]
    except RuntimeError:  # some models read values, which do not exist on meta
        numbers = [Widths.of(model.config).key_value] * len(cache.layers)
    windows = [getattr(kept, "sliding_window", None) for kept in cache.layers]
    for layer_bytes, row, window in zip_longest(weights_bytes, numbers, windows):
        yield LayerSizes(layer_bytes or 0, number_bytes * (row or 0), window)
