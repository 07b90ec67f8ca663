"""What targets of several engines share: masks, positions, tables, and the class that `generate` is called on.

Knows the loop's trees and texts and transformers' generation, but no engine.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from dovetail_plugin.generation.generate import generate_plainly
from dovetail_plugin.targets.base import Tables
from dovetail_plugin.tree import DraftTree, ancestor_mask

HIDDEN = float(np.finfo(np.float16).min)
"""Added to a mask where a row must not look; within the half precision that some graphs keep masks in."""

NO_BIAS = np.zeros((1, 1, 1, 1), dtype=np.float32)
"""The tree bias that changes nothing."""

PREFILL_ROWS = 512
"""Prompt rows in one pass; bounds the memory of activations and masks."""


def seen_and_positions(
    total: int, attention_mask: Tensor | None, *, tokens: int, position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mask and position ids of `total` tokens from the start of the text, both (total,) int64.

    Args:
        attention_mask: (1, total), 0 at padding; None without padding.
        tokens: how many of them the cache holds.
        position: of the first token that it does not hold.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return np.ones(total, dtype=np.int64), np.arange(total) + position - tokens
    seen = attention_mask[0].numpy().astype(np.int64)
    return seen, np.maximum(seen.cumsum() - 1, 0)


def tree_bias(tree: DraftTree, slots: int) -> np.ndarray | None:
    """(1, 1, N, slots + N) float32 that hides nodes which are no ancestors; None for a chain.

    Args:
        slots: columns of the cache in front of the tree's.
    """
    nodes = len(tree)
    if np.array_equal(tree.parents.numpy(), np.arange(nodes) - 1):
        return None
    bias = np.zeros((1, 1, nodes, slots + nodes), dtype=np.float32)
    ancestors = ancestor_mask(tree.parents, int(tree.depths.max())).numpy()
    bias[0, 0, :, slots:] = np.where(ancestors, 0.0, HIDDEN)
    return bias


def state_name(layer: int) -> str:
    """Of the output that a graph gets for a hidden state, in transformers' numbering."""
    return f"hidden_state.{layer}"


def states_before_layers(stream: list[Any], count: int) -> list[Any]:
    """The hidden state before each of `count` layers.

    Args:
        stream: values of the residual stream of a graph that others read, in order, without the last one.

    Raises:
        ValueError: they are not one or two for each layer.
    """
    per_layer, rest = divmod(len(stream), count)
    if rest or per_layer not in (1, 2):
        raise ValueError(
            f"looked for one or two residual Add nodes in each of {count} layers and found {len(stream)} in all, so "
            "hidden states of single layers cannot be read; EAGLE-3 drafts need them."
        )
    return stream[::per_layer]


def sliding_window(config: PretrainedConfig) -> int | None:
    """Rows that sliding layers look back, if there are such layers.

    Args:
        config: of the text model.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None:
        return window if "sliding_attention" in kinds else None
    return window if getattr(config, "use_sliding_window", True) else None


def tables_of(embedding: np.ndarray, head: np.ndarray, bias: np.ndarray | None) -> Tables:
    """Tables for a draft from arrays (V, H), (V, H) and (V,): without copies, and tied where they are equal."""
    first, second = torch.from_numpy(embedding), torch.from_numpy(head)
    if first.shape == second.shape and torch.equal(first, second):
        second = first
    return Tables(first, second, None if bias is None else torch.from_numpy(bias))


def stored_generation_config(name: str | Path, config: PretrainedConfig, **hub_kwargs: Any) -> GenerationConfig:
    """The generation_config.json beside a stored model, or what its config says."""
    try:
        return GenerationConfig.from_pretrained(name, **hub_kwargs)
    except OSError:
        return GenerationConfig.from_model_config(config)


class StoredTarget(GenerationMixin):
    """A stored model with transformers' `generate`, with or without a draft, run by an engine of ours.

    Plain generation runs through the same loop as drafted generation.
    """

    main_input_name = "input_ids"
    _is_stateful = False
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, config: PretrainedConfig, engine: Any, generation_config: GenerationConfig) -> None:
        self.config, self.dovetail_engine, self.generation_config = config, engine, generation_config

    def can_generate(self) -> bool:
        """True: transformers asks."""
        return True

    def num_parameters(self) -> int:
        """Numbers in the graph's matrices."""
        return self.dovetail_engine.num_parameters()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Logits (1, T, V) of a text from scratch; `generate` does not come here."""
        engine = self.dovetail_engine
        session = engine.session(
            engine.cache(None), max_length=0, max_nodes=1, prefill_chunk=input_ids.shape[1], model_kwargs={}
        )
        with session as target:
            return CausalLMOutput(logits=target.score_text(input_ids, attention_mask))

    __call__ = forward

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Tells transformers by its arguments what `generate` takes; our loop builds its inputs itself."""
        return {"input_ids": input_ids, "past_key_values": past_key_values, **kwargs}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """No cache of transformers' making."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        return generate_plainly(self, *args, **kwargs)

    _beam_search = _sample  # refuses it
