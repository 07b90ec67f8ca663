"""One generation on an OpenVINO request: its rows, and the passes over them. `openvino.py` has the engine.

Rows of rejected nodes stay in the request's state as holes that the mask hides, until there are so many that they are
taken out; positions are given explicitly, so a row does not care where it lies.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from dovetail_plugin.targets.base import TargetOutput
from dovetail_plugin.tree import DraftTree

from ..stored_target import NO_BIAS, PREFILL_ROWS, seen_and_positions, state_name, tree_bias
from . import graph
from .graph import ov

FREE_HOLES = 128
"""Holes that are let be whatever the length of the text; see `OpenVINOSession.keep`."""

BLOCK, REST = 64, 48
"""Rows that OpenVINO multiplies together, and how many more are better run by themselves: 65 rows of an int8 target
take half as long again as 64 (420 ms and 288), 64 and then one a fifth less than that."""


def prompt_passes(rows: int, most: int) -> list[int]:
    """Rows of each pass over a prompt of `rows`, `most` at a time: whole blocks, and a short rest by itself."""
    passes = [most] * (rows // most)
    last = rows % most
    rest = last % BLOCK
    if last > BLOCK and 0 < rest <= REST:
        passes.append(last - rest)
        last = rest
    return passes + [last] * (last > 0)


class HoldsRequest(Protocol):
    """What a session needs of its engine; see `OpenVINOEngine`."""

    text_config: PretrainedConfig
    request: "ov.InferRequest"
    takes_positions: bool
    row_axis: int
    window: int | None
    exact: bool

    def claim(self, cache: "OpenVINOCache") -> None:
        """Give the request's state to `cache`."""

    def set_neutral(self) -> None:
        """Inputs that leave the graph's function as it was."""


class OpenVINOCache:
    """The rows of a request's state, as `past_key_values` of a later turn. Valid until another text is begun.

    slots: rows of the state, holes included.
    seen: (capacity,) int64, 1 where rows may look; 0 at padding and holes.
    held: (capacity,) bool, True at tokens of the text, padding included; False at holes.
    tokens: tokens of the text, padding included. position: of the next token.
    """

    def __init__(self) -> None:
        self.slots = self.tokens = self.position = 0
        self.seen = np.zeros(1024, dtype=np.int64)
        self.held = np.zeros(1024, dtype=bool)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.tokens

    @property
    def holes(self) -> int:
        """Rows of the state that no token needs."""
        return self.slots - self.tokens

    def append(self, seen: np.ndarray) -> None:
        """Add rows (n,) that hold tokens."""
        end = self.slots + len(seen)
        if end > len(self.seen):
            self.seen = np.concatenate([self.seen, np.zeros(end, dtype=np.int64)])
            self.held = np.concatenate([self.held, np.zeros(end, dtype=bool)])
        self.seen[self.slots : end] = seen
        self.held[self.slots : end] = True
        self.slots = end


class OpenVINOSession:
    """One generation on an engine's request; implements `Target`. Use as a context manager."""

    def __init__(
        self,
        engine: HoldsRequest,
        cache: OpenVINOCache,
        *,
        max_nodes: int,
        prefill_chunk: int | None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> None:
        names = None if feature_layers is None else [state_name(layer) for layer in feature_layers]
        self._features = names or [graph.FEATURES]
        self._engine, self._cache, self._max_nodes = engine, cache, max_nodes
        self._chunk = prefill_chunk or PREFILL_ROWS
        self.max_length: int | None = getattr(engine.text_config, "max_position_embeddings", None)
        self._base = 0  # slot of the latest tree's root

    def __enter__(self) -> "OpenVINOSession":
        self._engine.claim(self._cache)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._engine.set_neutral()

    @property
    def _near_window(self) -> bool:
        """Whether a sliding window could reach into the text: the graph counts its rows, not positions."""
        window = self._engine.window
        return window is not None and self._cache.slots + self._max_nodes >= window

    @property
    def supports_tree(self) -> bool:
        """False where the window counts rows: chains are exact there, trees are not."""
        return self._engine.takes_positions and not self._near_window and not self._engine.exact

    # --- Target protocol -----------------------------------------------------------------------

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None) -> TargetOutput:
        """As `Target.prefill`, in chunks."""
        cache, first = self._cache, self._cache.tokens
        total = first + input_ids.shape[1]
        seen, positions = seen_and_positions(total, attention_mask, tokens=first, position=cache.position)
        if self._engine.window is not None:
            self._compact()
        features, logits = [], np.empty(0)
        start = first
        for count in prompt_passes(total - first, self._chunk):
            rows = slice(start, start + count)
            ids = input_ids[0, start - first : start - first + count].numpy()
            logits, hidden = self._infer(ids, seen[rows], positions[rows], first_logit_row=count - 1)
            features.append(torch.from_numpy(hidden))
            cache.tokens += count
            start += count
        cache.position = int(positions[-1]) + 1
        return TargetOutput(torch.from_numpy(logits), torch.cat(features))

    def score(self, tree: DraftTree) -> TargetOutput:
        """As `Target.score`."""
        if self._near_window:
            self._compact()
        cache, nodes = self._cache, len(tree)
        bias = tree_bias(tree, cache.slots)
        self._base = cache.slots
        ones = np.ones(nodes, dtype=np.int64)
        logits, hidden = self._infer(tree.tokens.numpy(), ones, cache.position + tree.depths.numpy(), bias)
        return TargetOutput(torch.from_numpy(logits), torch.from_numpy(hidden))

    def keep(self, path: list[int]) -> None:
        """As `Target.keep`: the other rows become holes, taken out when they are half as many as the tokens.

        Until then a hole costs what a row of the cache costs, which is little beside the weights, while taking
        out copies every layer's state through the host.
        """
        cache = self._cache
        kept = [self._base + node for node in path]
        for rows in (cache.seen, cache.held):
            rows[self._base : cache.slots] = 0
            rows[kept] = 1
        cache.tokens += len(path)
        cache.position += len(path)
        if self._engine.exact or cache.holes > FREE_HOLES + cache.tokens // 2:
            self._compact()

    def score_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits (1, T, V) of every row of a text, in one pass."""
        seen, positions = seen_and_positions(input_ids.shape[1], attention_mask, tokens=0, position=0)
        logits, _ = self._infer(input_ids[0].numpy(), seen, positions)
        return torch.from_numpy(logits)[None]

    # --- one pass ------------------------------------------------------------------------------

    def _infer(
        self,
        ids: np.ndarray,
        seen: np.ndarray,
        positions: np.ndarray,
        bias: np.ndarray | None = None,
        first_logit_row: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Append n rows: logits (n, V) of those from `first_logit_row` on, features (n, F); both copies."""
        cache = self._cache
        cache.append(seen)
        inputs = {
            "input_ids": ids[None],
            "attention_mask": cache.seen[None, : cache.slots],
            "beam_idx": np.zeros(1, dtype=np.int32),
            graph.TREE_BIAS: NO_BIAS if bias is None else bias,
            graph.FIRST_LOGIT_ROW: np.array([first_logit_row], dtype=np.int64),
        }
        if self._engine.takes_positions:
            inputs["position_ids"] = positions[None].astype(np.int64)
        request = self._engine.request
        request.infer(inputs, share_inputs=True)  # tensors of our own each time: others may have left theirs
        features = [request.get_tensor(name).data[0] for name in self._features]
        return request.get_tensor("logits").data[0].copy(), np.concatenate(features, axis=-1)  # copies

    def _compact(self) -> None:
        """Take the holes out of the state."""
        cache = self._cache
        if not cache.holes:
            return
        kept = np.flatnonzero(cache.held[: cache.slots])
        for state in self._engine.request.query_state():
            rows = np.take(state.state.data, kept, axis=self._engine.row_axis)
            state.state = ov.Tensor(np.ascontiguousarray(rows))
        cache.seen[: len(kept)], cache.held[: len(kept)] = cache.seen[kept], True
        cache.slots = len(kept)
