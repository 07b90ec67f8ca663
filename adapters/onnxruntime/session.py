"""A text's keys and values in buffers of ours, and one generation over them, for ONNX Runtime targets.

The runtime reads the buffers where they are. Their free rows are hidden by the mask, and positions are given
explicitly. Of a pass only the new rows come back, and those of the kept path are written into the buffers: that is
all that is copied on our side. Inside the graph the old rows and the new ones are joined, one layer at a time; an
export has them joined, so one copy of the cache a pass is its price.
"""

from typing import Protocol

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor
from transformers import PretrainedConfig

from dovetail_plugin.targets.base import TargetOutput
from dovetail_plugin.tree import DraftTree

from ..stored_target import NO_BIAS, PREFILL_ROWS, seen_and_positions, state_name, tree_bias
from . import graph

STEP = 64
"""Rows by which buffers grow. Attention runs over their free rows too, so there are never more than this."""


class RunsPasses(Protocol):
    """What a session needs of its engine."""

    text_config: PretrainedConfig
    takes_positions: bool
    same_kernels: bool
    exact: bool
    window: int | None

    def run(self, inputs: dict[str, "ort.OrtValue"], features: list[str]) -> list[np.ndarray]:
        """One pass: logits (1, n, V), features (1, n, .) by name, new rows of every layer."""


class OnnxRuntimeCache:
    """Keys and values of one text, as `past_key_values` of a later turn. Several may be held at a time.

    rows: (1, heads, capacity, head_dim) each, keys and values of every layer; rows from `tokens` on are free.
    seen: (capacity,) int64, 1 where rows may look; 0 at padding and free rows.
    tokens: tokens of the text, padding included. position: of the next token.
    """

    def __init__(self, layout: list[graph.Rows], dtype: np.dtype) -> None:
        self.layout = layout
        self.rows = [np.zeros((1, each.heads, 0, each.head_dim), dtype=dtype) for each in layout]
        self.values = [ort.OrtValue.ortvalue_from_numpy(rows) for rows in self.rows]  # the same memory
        self.seen = np.zeros(0, dtype=np.int64)
        self.tokens = self.position = 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.tokens

    @property
    def capacity(self) -> int:
        """Rows of the buffers."""
        return len(self.seen)

    def append(self, new: list[np.ndarray], seen: np.ndarray) -> None:
        """Add rows, (1, heads, n, head_dim) for each buffer, that are tokens of the text; seen: (n,) int64."""
        end = self.tokens + len(seen)
        if end > self.capacity:
            self._grow(-(-end // STEP) * STEP)
        for rows, added in zip(self.rows, new, strict=True):
            rows[:, :, self.tokens : end] = added
        self.seen[self.tokens : end] = seen
        self.tokens = end

    def _grow(self, capacity: int) -> None:
        for index, old in enumerate(self.rows):  # one by one, so there is never a second cache
            self.rows[index] = np.zeros((*old.shape[:2], capacity, old.shape[3]), dtype=old.dtype)
            self.rows[index][:, :, : self.tokens] = old[:, :, : self.tokens]
            self.values[index] = ort.OrtValue.ortvalue_from_numpy(self.rows[index])
        self.seen = np.concatenate([self.seen, np.zeros(capacity - self.capacity, dtype=np.int64)])


class OnnxRuntimeSession:
    """One generation on an engine's inference session; implements `Target`. Use as a context manager."""

    def __init__(
        self,
        engine: "RunsPasses",
        cache: OnnxRuntimeCache,
        *,
        max_nodes: int,
        prefill_chunk: int | None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> None:
        self._engine, self._cache, self._max_nodes = engine, cache, max_nodes
        self._features = [state_name(layer) for layer in feature_layers or ()] or [graph.FEATURES]
        self._chunk = prefill_chunk or PREFILL_ROWS
        self.max_length: int | None = getattr(engine.text_config, "max_position_embeddings", None)
        self._new: list[np.ndarray] = []  # rows of the latest tree

    def __enter__(self) -> "OnnxRuntimeSession":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._new = []

    def _counts_rows(self, new: int) -> bool:
        """Whether the graph takes a row's place in the cache for its place in the text, in a pass of `new` rows.

        So it is where the graph has no positions, and where a sliding window could reach into the text; and an exact
        engine wants it so. There the runtime gets copies of the buffers without their free rows, and drafts are
        chains.
        """
        engine = self._engine
        near_window = engine.window is not None and self._cache.capacity + new >= engine.window
        return near_window or engine.exact or not engine.takes_positions

    @property
    def supports_tree(self) -> bool:
        """False where the graph counts rows: chains are exact there, trees are not."""
        return not self._counts_rows(self._max_nodes)

    # --- Target protocol -----------------------------------------------------------------------

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None) -> TargetOutput:
        """As `Target.prefill`, in chunks."""
        cache, first = self._cache, self._cache.tokens
        total = first + input_ids.shape[1]
        seen, positions = seen_and_positions(total, attention_mask, tokens=first, position=cache.position)
        features, logits = [], np.empty(0)
        for start in range(first, total, self._chunk):
            rows = slice(start, min(start + self._chunk, total))
            ids = input_ids[0, rows.start - first : rows.stop - first].numpy()
            logits, hidden = self._run(ids, seen[rows], positions[rows], last_only=True)
            features.append(torch.from_numpy(hidden))
            cache.append(self._new, seen[rows])
            cache.position = int(positions[rows.stop - 1]) + 1  # right at every chunk: a prompt may be interrupted
        return TargetOutput(torch.from_numpy(logits), torch.cat(features))

    def score(self, tree: DraftTree) -> TargetOutput:
        """As `Target.score`."""
        slots = self._cache.tokens if self._counts_rows(len(tree)) else self._cache.capacity
        positions = self._cache.position + tree.depths.numpy()
        ones = np.ones(len(tree), dtype=np.int64)
        logits, hidden = self._run(tree.tokens.numpy(), ones, positions, tree_bias(tree, slots))
        return TargetOutput(torch.from_numpy(logits), torch.from_numpy(hidden))

    def keep(self, path: list[int]) -> None:
        """As `Target.keep`: the path's rows go into the buffers, nothing else is touched."""
        self._cache.append([rows[:, :, path] for rows in self._new], np.ones(len(path), dtype=np.int64))
        self._cache.position += len(path)

    def score_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits (1, T, V) of every row of a text, in one pass that the cache does not keep."""
        seen, positions = seen_and_positions(input_ids.shape[1], attention_mask, tokens=0, position=0)
        logits, _ = self._run(input_ids[0].numpy(), seen, positions)
        return torch.from_numpy(logits)[None]

    # --- one pass ------------------------------------------------------------------------------

    def _run(
        self,
        ids: np.ndarray,
        seen: np.ndarray,
        positions: np.ndarray,
        bias: np.ndarray | None = None,
        last_only: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score n rows behind the cache: logits (n or 1, V), features (n, F), float32; keeps their keys and values."""
        engine, rows = self._engine, len(ids)
        wanted = 1 if last_only else rows
        if rows == 1 and engine.same_kernels:  # nobody sees the second row, and it is dropped again
            ids, seen, positions = np.repeat(ids, 2), np.repeat(seen, 2), np.repeat(positions, 2)
        elif engine.same_kernels:
            wanted = max(wanted, 2)  # the head, too, has a kernel for one row
        past, old_seen = self._past(len(ids))
        inputs = {
            "input_ids": ids[None],
            "attention_mask": np.concatenate([old_seen, seen])[None],
            graph.TREE_BIAS: NO_BIAS if bias is None else bias,
            graph.FIRST_LOGIT_ROW: np.array([rows - wanted], dtype=np.int64),
        }
        if engine.takes_positions:
            inputs[graph.POSITIONS] = positions[None].astype(np.int64)
        values = {name: ort.OrtValue.ortvalue_from_numpy(given) for name, given in inputs.items()}
        found = engine.run(values | past, self._features)
        kinds = 1 + len(self._features)
        self._new = [new[:, :, :rows] for new in found[kinds:]]
        logits = found[0][0][:wanted].astype(np.float32, copy=False)
        features = np.concatenate([each[0][:rows] for each in found[1:kinds]], axis=-1)
        return logits[-1:] if last_only else logits, features

    def _past(self, new: int) -> tuple[dict[str, "ort.OrtValue"], np.ndarray]:
        """What the cache holds as inputs of the graph, and its mask: in place, or without the free rows."""
        cache, names = self._cache, [each.past for each in self._cache.layout]
        if not self._counts_rows(new):
            return dict(zip(names, cache.values, strict=True)), cache.seen
        held = [np.ascontiguousarray(rows[:, :, : cache.tokens]) for rows in cache.rows]
        values = [ort.OrtValue.ortvalue_from_numpy(rows) for rows in held]
        return dict(zip(names, values, strict=True)), cache.seen[: cache.tokens]
