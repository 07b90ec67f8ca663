"""What stored targets of several engines share: masks, positions, tables, and the class that `generate` is called on.

This module knows trees and transformers' generation, but no engine.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from dovetail_plugin.generation.generate import generate_plainly
from dovetail_plugin.targets.base import Engine, Tables, TargetSession
from dovetail_plugin.tree import DraftTree, ancestor_mask

HIDDEN = float(np.finfo(np.float16).min)
"""Added to a mask where a row must not attend. It fits the half precision in which some graphs keep masks."""

NO_BIAS = np.zeros((1, 1, 1, 1), dtype=np.float32)
"""The tree bias of a pass without a tree."""

PREFILL_ROWS = 512
"""Prompt rows per pass, which bounds the memory of activations and masks."""


def seen_and_positions(
    total: int, attention_mask: Tensor | None, *, tokens: int, position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mask and position ids of `total` tokens from the start of the text, both (total,) int64.

    Args:
        total: number of tokens.
        attention_mask: (1, total), 0 at padding; None without padding.
        tokens: how many of them the cache holds.
        position: of the first token that it does not hold.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return np.ones(total, dtype=np.int64), np.arange(total) + position - tokens
    seen = attention_mask[0].numpy().astype(np.int64)
    return seen, np.maximum(seen.cumsum() - 1, 0)


def tree_bias(tree: DraftTree, slots: int) -> np.ndarray | None:
    """Return a bias (1, 1, N, slots + N) float32 that hides nodes other than ancestors; None for a chain.

    Args:
        tree: N nodes.
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
    """Return the name of a graph's output for a hidden state, in transformers' numbering."""
    return f"hidden_state.{layer}"


def states_before_layers(stream: list[Any], count: int) -> list[Any]:
    """Return the hidden state before each of `count` layers.

    Args:
        stream: values of a graph's residual stream, in order, without the last one.
        count: number of layers.

    Raises:
        ValueError: there are not one or two values for each layer.
    """
    per_layer, rest = divmod(len(stream), count)
    if rest or per_layer not in (1, 2):
        raise ValueError(
            f"expected one or two residual Add nodes in each of {count} layers and found {len(stream)} in all, so "
            "hidden states of single layers cannot be read. EAGLE-3 drafts need them."
        )
    return stream[::per_layer]


def sliding_window(config: PretrainedConfig) -> int | None:
    """Return the number of rows that sliding layers attend to, or None without such layers.

    Args:
        config: of the text model.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None:
        return window if "sliding_attention" in kinds else None
    return window if getattr(config, "use_sliding_window", True) else None


def tables_of(embedding: np.ndarray, head: np.ndarray, bias: np.ndarray | None) -> Tables:
    """Make tables from arrays (V, H), (V, H) and (V,) without copies; equal ones become tied."""
    first, second = torch.from_numpy(embedding), torch.from_numpy(head)
    if first.shape == second.shape and torch.equal(first, second):
        second = first
    return Tables(first, second, None if bias is None else torch.from_numpy(bias))


def stored_generation_config(name: str | Path, config: PretrainedConfig, **hub_kwargs: Any) -> GenerationConfig:
    """Read generation_config.json beside a stored model; without one, take what the model's config says."""
    try:
        return GenerationConfig.from_pretrained(name, **hub_kwargs)
    except OSError:
        return GenerationConfig.from_model_config(config)


class StoredSession(TargetSession, Protocol):
    """A session that can also score a whole text."""

    def score_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return logits (1, T, V) of every row of a text (1, T), in one pass."""


class StoredEngine(Engine, Protocol):
    """An engine whose sessions can score a whole text."""

    def session(
        self,
        cache: Any,
        *,
        max_length: int,
        max_nodes: int,
        prefill_chunk: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> AbstractContextManager[StoredSession]:
        """Open a session; see `Engine.session`."""


class StoredTarget(GenerationMixin):
    """A stored model with transformers' `generate`, with or without a draft, run by an engine.

    Plain generation runs through the same loop as drafted generation.

    Args:
        config: of the model.
        engine: runs the model.
        generation_config: defaults of `generate`.
    """

    main_input_name = "input_ids"
    _is_stateful = False
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, config: PretrainedConfig, engine: StoredEngine, generation_config: GenerationConfig) -> None:
        self.config, self.dovetail_engine, self.generation_config = config, engine, generation_config

    def can_generate(self) -> bool:
        """Return True, for transformers."""
        return True

    def num_parameters(self) -> int:
        """Return the number of weights in the graph's matrices."""
        return self.dovetail_engine.num_parameters()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Return logits (1, T, V) of a text from scratch. `generate` does not use this."""
        engine = self.dovetail_engine
        rows = input_ids.shape[1]
        with engine.session(engine.cache(None), max_length=rows, max_nodes=1, prefill_chunk=rows) as session:
            return CausalLMOutput(logits=session.score_text(input_ids, attention_mask))

    __call__ = forward

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, cache: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Tell transformers by these parameters what `generate` accepts. The loop builds its inputs itself."""
        return {"input_ids": input_ids, "past_key_values": past_key_values, "cache": cache, **kwargs}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Make no cache: the engine has its own kind."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        return generate_plainly(self, *args, **kwargs)

    _beam_search = _sample  # `check_options` refuses beams
