"""The parts of a stored target that do not depend on its engine.

Holds the masks and positions of a pass, and `StoredTarget`, the class that users call `generate` on. This module knows
trees and transformers' generation, but no engine and no graph.
"""

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from dovetail_plugin import compat
from dovetail_plugin.generation.attached import sample
from dovetail_plugin.generation.generate import generate_plainly
from dovetail_plugin.targets.base import Engine, TargetSession, TextCache
from dovetail_plugin.tree import DraftTree, ancestor_mask

from .stored_graph import FEATURES, HIDDEN, state_name

PREFILL_ROWS = 512
"""Prompt rows per pass, which bounds the memory of activations and masks."""


OF_SESSIONS = {"attention_mask", "use_cache", "logits_to_keep"}
"""Arguments of a forward pass that sessions of stored targets see to themselves."""


def seen_and_positions(
    total: int, attention_mask: Tensor | None, *, tokens: int, position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mask and position ids of `total` tokens from the start of the text, both (total,) int64.

    Args:
        total: number of tokens.
        attention_mask: (1, total), 0 at padding; None without padding.
        tokens: number of tokens that the cache holds.
        position: position of the first token that the cache does not hold.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return np.ones(total, dtype=np.int64), np.arange(total) + position - tokens
    seen = attention_mask[0].numpy().astype(np.int64)
    return seen, np.maximum(seen.cumsum() - 1, 0)


def tree_bias(tree: DraftTree, slots: int) -> np.ndarray | None:
    """Return a bias (1, 1, N, slots + N) float32 that hides nodes other than ancestors; None for a chain.

    Args:
        tree: N nodes.
        slots: columns of the mask in front of the tree's, one for each row of the cache.
    """
    nodes = len(tree)
    if np.array_equal(tree.parents.numpy(), np.arange(nodes) - 1):
        return None
    bias = np.zeros((1, 1, nodes, slots + nodes), dtype=np.float32)
    ancestors = ancestor_mask(tree.parents, int(tree.depths.max())).numpy()
    bias[0, 0, :, slots:] = np.where(ancestors, 0.0, HIDDEN)
    return bias


@dataclass(frozen=True)
class GraphTraits:
    """Properties of a stored graph that a session has to respect.

    Attributes:
        takes_positions: whether position ids are an input. If not, the graph takes a row's place in the cache for its
            position.
        window: rows that sliding layers attend to, or None without such layers.
        max_length: positions of the model, or None if it has no limit.
    """

    takes_positions: bool
    window: int | None
    max_length: int | None

    @classmethod
    def of(cls, config: PretrainedConfig, *, takes_positions: bool) -> "GraphTraits":
        """Read the traits that stand in the config of a text model."""
        return cls(takes_positions, sliding_window(config), getattr(config, "max_position_embeddings", None))


def feature_outputs(layers: tuple[int, ...] | None) -> list[str]:
    """Return the names of the outputs that features are read from; see `Draft.feature_layers`."""
    return [state_name(layer) for layer in layers or ()] or [FEATURES]


def refuse_model_kwargs(model_kwargs: dict[str, Any] | None) -> None:
    """Refuse arguments of the forward pass that a stored graph has no inputs for.

    Raises:
        ValueError: there are such arguments.
    """
    given = model_kwargs or {}
    foreign = given.keys() - OF_SESSIONS
    if "position_ids" in foreign and _are_usual(given["position_ids"], given.get("attention_mask")):
        foreign -= {"position_ids"}  # `generate` made them for the forward method of an optimum model
    if foreign:
        raise ValueError(f"the graph has no input for {', '.join(sorted(foreign))}. Leave it out.")


def _are_usual(position_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Return whether position ids (1, T) count the tokens of a text from 0, as sessions do."""
    total = position_ids.shape[-1]
    seen = torch.ones(1, total, dtype=torch.int64) if attention_mask is None else attention_mask.long()
    if position_ids.shape != seen.shape:
        return False
    return bool(((position_ids == seen.cumsum(-1) - 1) | (seen == 0)).all())


def sliding_window(config: PretrainedConfig) -> int | None:
    """Return the number of rows that sliding layers attend to, or None without such layers.

    Args:
        config: config of the text model.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None:
        return window if "sliding_attention" in kinds else None
    return window if getattr(config, "use_sliding_window", True) else None


def stored_generation_config(name: str | Path, config: PretrainedConfig, **hub_kwargs: Any) -> GenerationConfig:
    """Read generation_config.json beside a stored model, or derive it from the model's config if there is none."""
    try:
        return GenerationConfig.from_pretrained(name, **hub_kwargs)
    except OSError:
        return GenerationConfig.from_model_config(config)


class OneAtATime:
    """Refuses a second session on one cache while the first is open, because a cache holds one text."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Note that a session uses the cache.

        Raises:
            ValueError: another session does.
        """
        if not self._lock.acquire(blocking=False):
            raise ValueError(
                "past_key_values is in use by another call of generate, and a cache holds one text. Wait for that "
                "call, or pass the whole text without past_key_values."
            )

    def end(self) -> None:
        """Note that the session has ended."""
        self._lock.release()


class StoredSession(TargetSession, Protocol):
    """A session that can also score a whole text."""

    def score_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Run a whole text in one pass. The session's cache is empty before it and holds no tokens after it.

        Args:
            input_ids: (1, T) int64.
            attention_mask: (1, T), 0 at padding; None without padding.

        Returns:
            Logits (1, T, V) float32 of every row.
        """


class StoredEngine(Engine, Protocol):
    """An engine whose sessions can score a whole text."""

    def session(
        self,
        cache: Any,
        *,
        max_nodes: int,
        prefill_chunk: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> AbstractContextManager[StoredSession]:
        """Open a session; see `Engine.session`."""


class StoredTarget(GenerationMixin):
    """A stored model with transformers' `generate`, with or without a draft, run by an engine.

    Plain generation runs through the same loop as drafted generation. Any number of threads may generate at once: each
    text has its own keys and values, and the weights are shared.

    Args:
        config: config of the model.
        engine: engine that runs the model.
        generation_config: defaults of `generate`.
    """

    main_input_name = "input_ids"
    _is_stateful = False
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, config: PretrainedConfig, engine: StoredEngine, generation_config: GenerationConfig) -> None:
        self.config, self.dovetail_engine, self.generation_config = config, engine, generation_config

    def can_generate(self) -> bool:
        """Return True. transformers asks this before it generates."""
        return True

    def num_parameters(self) -> int:
        """Return the number of weights in the graph's matrices."""
        return self.dovetail_engine.num_parameters()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Run a whole text without a cache. `generate` does not use this.

        Args:
            input_ids: (1, T) int64.
            attention_mask: (1, T), 0 at padding; None without padding.

        Returns:
            Logits (1, T, V) float32 of every row.
        """
        engine = self.dovetail_engine
        rows = input_ids.shape[1]
        with engine.session(engine.cache(None), max_nodes=1, prefill_chunk=rows) as session:
            return CausalLMOutput(logits=session.score_text(input_ids, attention_mask))

    __call__ = forward

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: TextCache | None = None, cache: TextCache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments. transformers reads from the signature what `generate` accepts."""
        return {"input_ids": input_ids, "past_key_values": past_key_values, "cache": cache, **kwargs}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Make no cache, because the engine makes its own."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        arguments = compat.bound_arguments(generate_plainly, (self, *args), kwargs, compat.LOOP_ARGUMENTS)
        del arguments["model"]
        return sample(self, lambda: generate_plainly(self, *args, **kwargs), arguments)

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        return generate_plainly(self, *args, **kwargs)  # `check_options` refuses beams
