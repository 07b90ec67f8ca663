"""OpenVINO targets: a stored IR, or an optimum `OVModelForCausalLM`, verifies drafts on the CPU.

```python
from dovetail_plugin.adapters.openvino import OpenVINOTarget

target = OpenVINOTarget.from_pretrained("directory-or-hub-id-of-an-IR")
out = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
```

The key/value cache is the state of one inference request. Rows of rejected nodes stay in it as holes that the
mask hides, until there are so many that they are taken out; positions are given explicitly, so a row does not
care where it lies. Optimum is needed only for optimum's own model objects.
"""

import logging
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file

from dovetail_plugin.engine import Tables
from dovetail_plugin.modeling import DovetailDraft
from dovetail_plugin.target import TargetOutput
from dovetail_plugin.tree import DraftTree

from . import openvino_graph as graph
from .common import (
    NO_BIAS,
    PREFILL_ROWS,
    StoredTarget,
    seen_and_positions,
    sliding_window,
    state_name,
    stored_generation_config,
    tables_of,
    tree_bias,
)
from .openvino_graph import ov
from .openvino_states import expose_states

logger = logging.getLogger(__name__)

FREE_HOLES = 128
"""Holes that are let be whatever the length of the text; see `OpenVINOSession.keep`."""

NO_TOKEN = np.array([[-1]], dtype=np.int64)
"""Left as input when a session ends: whoever runs the request next puts its own there."""

MODEL_FILE = "openvino_model.xml"

DRAFT_WEIGHTS = ("int4", "int8", "f32")
"""Of a draft that runs as a graph beside the target; see `openvino_draft.draft_graph`."""


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
        engine: "OpenVINOEngine",
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
        for start in range(first, total, self._chunk):
            rows = slice(start, min(start + self._chunk, total))
            ids = input_ids[0, rows.start - first : rows.stop - first].numpy()
            logits, hidden = self._infer(ids, seen[rows], positions[rows], first_logit_row=len(ids) - 1)
            features.append(torch.from_numpy(hidden))
            cache.tokens += len(ids)
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


class OpenVINOEngine:
    """A compiled graph with its one request; implements `Engine`.

    Args:
        model: the graph after `graph.prepare`.
        compile_model: compiles it as it is when called, and gives a request of that.
        config: of the transformers model that was exported.

    Attributes:
        exact: chains only, and no hole outlives a round. Then every row of the state lies where plain
            generation puts it, sums run in the same order and results are the same to the bit; otherwise
            they differ by a rounding of float32, which int8 activations can make a visible one.
        draft_weights: of a draft that runs as a graph beside this: "int4", "int8", "f32"; None chooses by the CPU.
    """

    runs_in_torch = False

    def __init__(
        self,
        model: "ov.Model",
        compile_model: "Callable[[], ov.InferRequest]",
        config: PretrainedConfig,
    ) -> None:
        self.exact = False
        self.draft_weights: str | None = None
        self._compile = compile_model
        request = compile_model()
        self.rounding = graph.rounding(model, request)
        self.config = config
        self.text_config = config.get_text_config(decoder=True)
        self.request = request
        self.takes_positions = "position_ids" in graph.input_names(model)
        self.row_axis = graph.row_axis(model)
        self.window = sliding_window(self.text_config)
        self._model = model
        self._current: weakref.ref[OpenVINOCache] | None = None
        self._runners: weakref.WeakKeyDictionary[DovetailDraft, Any] = weakref.WeakKeyDictionary()
        threads = request.get_compiled_model().get_property("INFERENCE_NUM_THREADS")
        self._draft_properties = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self.set_neutral()
        rows = request.get_compiled_model().get_property("KV_CACHE_PRECISION")
        if rows.bitwidth < 16:
            warnings.warn(
                f"the key/value cache holds {rows.to_string()}, which moves logits by some hundredths: texts with and "
                'without a draft may part. Load the target with KV_CACHE_PRECISION "f32" (or leave it out).'
            )

    def check(self) -> None:
        """As `Engine.check`; the graph was looked at when it was loaded."""

    def tables(self) -> Tables:
        """As `Engine.tables`: float32 copies, decompressed if the graph stores them in fewer bits."""
        found = graph.tables(self._model)
        return tables_of(found.embedding, found.head, found.bias)

    def cache(self, given: Any) -> OpenVINOCache:
        """As `Engine.cache`."""
        if given is None or (isinstance(given, tuple) and not any(given)):  # optimum's way of saying none
            return OpenVINOCache()
        if not isinstance(given, OpenVINOCache):
            raise ValueError(
                f"past_key_values ({type(given).__name__}) is not this target's; pass what its own `generate` returned."
            )
        return given

    def draft_runner(self, draft: DovetailDraft) -> Any:
        """As `Engine.draft_runner`: the draft as a graph, compiled once; None without nncf."""
        if draft not in self._runners:
            try:
                from .openvino_draft import OpenVINORunner
            except ImportError as error:
                logger.warning(f"the draft runs in torch, which is slower here: {error}")
                self._runners[draft] = None
            else:
                self._runners[draft] = OpenVINORunner(draft, self.draft_weights, self._draft_properties)
        return self._runners[draft]

    def session(
        self,
        cache: OpenVINOCache,
        *,
        max_length: int,  # noqa: ARG002 - the state grows by itself
        max_nodes: int,
        prefill_chunk: int | None,
        model_kwargs: dict[str, Any],
        feature_layers: tuple[int, ...] | None = None,
    ) -> OpenVINOSession:
        """As `Engine.session`; the first session that reads single layers compiles the graph once more.

        Raises:
            ValueError: an argument of the forward pass that the graph has no input for; layers that cannot be read.
        """
        if model_kwargs:
            raise ValueError(f"the graph has no input for {', '.join(sorted(model_kwargs))}.")
        if feature_layers is not None:
            self._expose(feature_layers)
        return OpenVINOSession(
            self, cache, max_nodes=max_nodes, prefill_chunk=prefill_chunk, feature_layers=feature_layers
        )

    def _expose(self, layers: tuple[int, ...]) -> None:
        """Make hidden states outputs of the compiled graph, if they are not yet."""
        outputs = len(self._model.outputs)
        expose_states(self._model, layers, self.text_config.num_hidden_layers)
        if len(self._model.outputs) > outputs:
            self.request = self._compile()
            self._current = None  # rows of earlier texts went with the request before
            self.set_neutral()

    def claim(self, cache: OpenVINOCache) -> None:
        """Give the request's state to `cache`; a new cache begins with an empty state.

        Raises:
            ValueError: the state has been used for another text since.
        """
        if cache.slots == 0:
            self.request.reset_state()
            self._current = weakref.ref(cache)
        elif self._current is None or self._current() is not cache or self._was_run_by_others():
            raise ValueError(
                "past_key_values is from an earlier generation, and its rows are gone: an OpenVINO target holds one "
                "text at a time. Pass the whole text without past_key_values."
            )

    def num_parameters(self) -> int:
        """Numbers in the graph's matrices."""
        return graph.num_parameters(self._model)

    def set_neutral(self) -> None:
        """Inputs that leave the graph's function as it was, for whoever runs the request next."""
        self.request.set_tensor(graph.TREE_BIAS, ov.Tensor(NO_BIAS))
        self.request.set_tensor(graph.FIRST_LOGIT_ROW, ov.Tensor(np.zeros(1, dtype=np.int64)))
        self.request.set_tensor("input_ids", ov.Tensor(NO_TOKEN))

    def _was_run_by_others(self) -> bool:
        """Whether the request, which an optimum model shares, has run since `set_neutral`."""
        return not np.array_equal(self.request.get_tensor("input_ids").data, NO_TOKEN)


def engine_for(model: Any) -> OpenVINOEngine:
    """The engine of an optimum `OVModelForCausalLM`, whose own graph is edited and compiled anew: one copy of weights.

    Raises:
        ValueError: the model is no stateful export, or was loaded compiled.
    """
    if not isinstance(getattr(model, "model", None), ov.Model):
        raise ValueError(
            "the optimum model was loaded with compile_only=True; load it without, so its graph can be edited."
        )
    if not graph.is_prepared(model.model):
        graph.prepare(model.model)
        model.ov_config = precision_properties(**_given_precisions(model.ov_config)) | model.ov_config
    held = weakref.ref(model)  # the engine is remembered by its model and must not keep it alive

    def compile_model() -> "ov.InferRequest":
        model = held()
        assert model is not None
        model.clear_requests()
        model.compile()
        return model.request

    return OpenVINOEngine(model.model, compile_model, model.config)


def precision_properties(
    inference_precision: str | None = None, kv_cache_precision: str | None = None
) -> dict[str, str]:
    """Properties of the CPU plugin that decide what is computed; see `OpenVINOTarget.from_pretrained`."""
    inference = inference_precision or "f32"
    return {"INFERENCE_PRECISION_HINT": inference, "KV_CACHE_PRECISION": kv_cache_precision or inference}


def _given_precisions(ov_config: dict[str, Any]) -> dict[str, Any]:
    names = {"INFERENCE_PRECISION_HINT": "inference_precision", "KV_CACHE_PRECISION": "kv_cache_precision"}
    return {ours: ov_config[theirs] for theirs, ours in names.items() if theirs in ov_config}


class OpenVINOTarget(StoredTarget):
    """A stored OpenVINO model with transformers' `generate`, with or without a draft. No optimum needed.

    Made by `from_pretrained`.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        inference_precision: str = "f32",
        kv_cache_precision: str | None = None,
        threads: int | None = None,
        exact: bool = False,
        draft_weights: str | None = None,
        ov_config: dict[str, Any] | None = None,
        **hub_kwargs: Any,
    ) -> "OpenVINOTarget":
        """Load what `dovetail export --to openvino`, optimum-cli or the hub has: an IR and a config.json.

        Args:
            inference_precision: "f32", or "bf16" on CPUs with that: faster, and ties may fall otherwise.
            kv_cache_precision: default: as the inference precision. "u8" moves logits by some hundredths.
            threads: CPU threads of the engine; default: OpenVINO's choice.
            exact: drafted text equals plain text to the bit with int8 weights too, at the price of trees and
                of copying the state every round; see `OpenVINOEngine`.
            draft_weights: of a draft that runs beside it on the CPU: "int4", "int8" or "f32"; default: "int4" on CPUs
                with VNNI or AMX, "int8" elsewhere. They decide how much is accepted, never what the text is.
            ov_config: further properties of the CPU plugin.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

        Raises:
            OSError: there is no config.json or no IR.
            ValueError: the IR is not one of a decoder-only language model with a state; unknown `draft_weights`.
        """
        if draft_weights not in (None, *DRAFT_WEIGHTS):
            raise ValueError(f"draft_weights must be one of {', '.join(DRAFT_WEIGHTS)}, got {draft_weights!r}.")
        name = str(pretrained_model_name_or_path)
        config = AutoConfig.from_pretrained(name, **hub_kwargs)
        file = cached_file(name, MODEL_FILE, **hub_kwargs)
        cached_file(name, MODEL_FILE.replace(".xml", ".bin"), **hub_kwargs)  # a hub's snapshot keeps them together
        core = ov.Core()
        model = core.read_model(file)
        try:
            graph.prepare(model)
        except graph.GraphError as error:
            raise ValueError(f"{name}: {error}") from error
        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        properties |= precision_properties(inference_precision, kv_cache_precision)
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        properties |= ov_config or {}
        engine = OpenVINOEngine(
            model, lambda: core.compile_model(model, "CPU", properties).create_infer_request(), config
        )
        engine.exact, engine.draft_weights = exact, draft_weights
        return cls(config, engine, stored_generation_config(name, config, **hub_kwargs))
