"""OpenVINO targets: a stored IR, or an optimum `OVModelForCausalLM`, verifies drafts on the CPU.

```python
from dovetail_plugin.adapters.openvino import OpenVINOTarget

target = OpenVINOTarget.from_pretrained("directory-or-hub-id-of-an-IR")
out = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
```

The key/value cache is the state of one inference request (`openvino_session.py`). Optimum is needed only for optimum's
own model objects.
"""

import logging
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from dovetail_plugin.compat import require_file
from dovetail_plugin.drafts.network import DraftNetwork
from dovetail_plugin.runner import DraftRunner
from dovetail_plugin.targets.base import Tables

from ..stored_target import NO_BIAS, StoredTarget, sliding_window, stored_generation_config, tables_of
from . import graph
from .graph import ov
from .session import OpenVINOCache, OpenVINOSession
from .states import expose_states

logger = logging.getLogger(__name__)

NO_TOKEN = np.array([[-1]], dtype=np.int64)
"""Left as input when a session ends: whoever runs the request next puts its own there."""

MODEL_FILE = "openvino_model.xml"

DRAFT_WEIGHTS = ("int4", "int8", "f32")
"""Of a draft that runs as a graph beside the target; see `openvino_draft.draft_graph`."""


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

    def draft_runner(self, draft: nn.Module) -> DraftRunner[Any] | None:
        """Compile the draft as a graph, which takes seconds; None without nncf."""
        try:
            from .draft import OpenVINORunner
        except ImportError as error:
            logger.warning(f"the draft runs in torch, which is slower here: {error}")
            return None
        return OpenVINORunner(cast(DraftNetwork, draft), self.draft_weights, self._draft_properties)

    def session(
        self,
        cache: OpenVINOCache,
        *,
        max_length: int,  # noqa: ARG002 - the state grows by itself
        max_nodes: int,
        prefill_chunk: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
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
        file = require_file(name, MODEL_FILE, **hub_kwargs)
        require_file(name, MODEL_FILE.replace(".xml", ".bin"), **hub_kwargs)  # a hub's snapshot keeps them together
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
