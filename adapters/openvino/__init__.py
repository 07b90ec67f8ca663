"""OpenVINO targets: a stored IR, or an optimum `OVModelForCausalLM`, that verifies drafts on the CPU.

```python
from dovetail_plugin.adapters.openvino import OpenVINOTarget

target = OpenVINOTarget.from_pretrained("directory-or-hub-id-of-an-IR")
out = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
```

`graph` edits the graph, `session` runs a generation, `draft` runs a draft on the same engine. The package optimum is
needed only for optimum's own model objects.
"""

import logging
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PretrainedConfig

from dovetail_plugin.compat import require_file
from dovetail_plugin.drafts.checkpoints.claims import model_config
from dovetail_plugin.drafts.network import DraftNetwork
from dovetail_plugin.targets.base import Tables

from ..stored_target import GraphTraits, StoredTarget, feature_outputs, refuse_model_kwargs, stored_generation_config
from . import graph
from .graph import ov
from .session import OpenVINOCache, OpenVINOSession, has_outputs, set_neutral
from .states import expose_states

if TYPE_CHECKING:
    from .draft import OpenVINORunner

logger = logging.getLogger(__name__)

MODEL_FILE = "openvino_model.xml"

DRAFT_WEIGHTS = ("int4", "int8", "f32")
"""Storage types of the weights of a draft that runs on OpenVINO; see `draft.draft_graph`."""


class OpenVINOEngine:
    """A compiled graph, with a request for each text; implements `StoredEngine`. Any number of threads may use it.

    Args:
        model: the graph after `graph.prepare`.
        compile_model: compiles `model` as it is at the time of the call.
        config: config of the transformers model that was exported.

    Attributes:
        exact: draft chains only, and remove holes from the state in every round. Every row of the state then lies
            where plain generation puts it, sums run in the same order and results are equal to the bit. Otherwise
            they differ by a rounding of float32, which int8 activations can turn into a visible difference.
        draft_weights: storage type of the weights of a draft that runs on this engine, one of `DRAFT_WEIGHTS`; None
            chooses by the CPU.
        rounding: see `Engine.rounding`.
    """

    runs_in_torch = False

    def __init__(
        self,
        model: ov.Model,
        compile_model: Callable[[], ov.CompiledModel],
        config: PretrainedConfig,
    ) -> None:
        self.exact = False
        self.draft_weights: str | None = None
        self.config = config
        self._model, self._compile = model, compile_model
        self._identity = object()  # known to the caches of this target, which do not keep it alive
        self._lock = threading.RLock()  # guards the graph, which is edited when layers are read for the first time
        self.compiled = compiled = compile_model()
        self._row_axis = graph.row_axis(model)
        self.rounding = graph.rounding(model, compiled)
        text_config = config.get_text_config(decoder=True)
        self._layers: int = text_config.num_hidden_layers
        self._traits = GraphTraits.of(text_config, takes_positions="position_ids" in graph.input_names(model))
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        self._draft_properties = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        kept_as = compiled.get_property("KV_CACHE_PRECISION")
        if kept_as.bitwidth < 16:
            warnings.warn(
                f"the key/value cache holds {kept_as.to_string()}, which changes logits by some hundredths, so texts "
                'with and without a draft can differ. Load the target with KV_CACHE_PRECISION "f32", or without that '
                "option."
            )

    def check(self) -> None:
        """Do nothing: the graph was checked when it was loaded."""

    def tables(self) -> Tables:
        """Return float32 copies, decompressed if the graph stores them in fewer bits."""
        with self._lock:
            return graph.tables(self._model)

    def cache(self, given: Any) -> OpenVINOCache:
        """Return the cache to generate with; see `Engine.cache`.

        Raises:
            ValueError: `given` is a cache of another kind or of another target.
        """
        if given is None or (isinstance(given, tuple) and not any(given)):  # optimum passes an empty tuple for None
            return OpenVINOCache()
        if not isinstance(given, OpenVINOCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}, which an OpenVINO target cannot read. Pass what its own "
                "`generate` returned."
            )
        if given.target not in (None, self._identity):
            raise ValueError("past_key_values is from another target. Pass the whole text without past_key_values.")
        return given

    def packed_head(self) -> None:
        """Return None: this engine holds the head."""

    def draft_runner(self, draft: nn.Module) -> "OpenVINORunner | None":
        """Compile the draft as a graph, which takes seconds. Return None without the package nncf."""
        try:
            from .draft import OpenVINORunner
        except ImportError as error:
            logger.warning(f"the draft runs in torch, which is slower here. {error}")
            return None
        return OpenVINORunner(cast(DraftNetwork, draft), self.draft_weights, self._draft_properties)

    def session(
        self,
        cache: OpenVINOCache,
        *,
        max_nodes: int,
        prefill_chunk: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> OpenVINOSession:
        """Open a session; the first one that reads certain layers compiles the graph once more.

        Meanwhile others that read such layers wait, and those that read none do not.

        Raises:
            ValueError: the graph has no input for an argument of the forward pass, or layers cannot be read.
        """
        refuse_model_kwargs(model_kwargs)
        compiled = self.compiled if feature_layers is None else self._compiled_with(feature_layers)
        cache.target = self._identity
        return OpenVINOSession(
            compiled,
            self._row_axis,
            cache,
            self._traits,
            exact=self.exact,
            max_nodes=max_nodes,
            prefill_chunk=prefill_chunk,
            feature_layers=feature_layers,
        )

    @property
    def position_limit(self) -> int | None:
        """Positions of the model; None if its config names no number."""
        return self._traits.max_length

    def _compiled_with(self, layers: tuple[int, ...]) -> ov.CompiledModel:
        """Return the compiled graph with outputs for these layers. Sessions that are open keep the graph they have."""
        with self._lock:
            expose_states(self._model, layers, self._layers)
            if not has_outputs(self.compiled, feature_outputs(layers)):
                self.compiled = self._compile()
            return self.compiled

    def num_parameters(self) -> int:
        """Return the number of weights in the graph's matrices."""
        with self._lock:
            return graph.num_parameters(self._model)


def engine_for(model: Any) -> OpenVINOEngine:
    """Make the engine of an optimum `OVModelForCausalLM`.

    The model's own graph is edited and compiled again, so there is one copy of the weights. optimum's own loop goes on
    using the model's own request, which holds one text at a time.

    Raises:
        ValueError: the model is not a stateful export, or was loaded with `compile_only=True`.
    """
    if not isinstance(getattr(model, "model", None), ov.Model):
        raise ValueError(
            "the optimum model was loaded with compile_only=True, so its graph cannot be edited. Load it without that "
            "option."
        )
    if not graph.is_prepared(model.model):
        graph.prepare(model.model)
        model.ov_config = precision_properties(**_given_precisions(model.ov_config)) | model.ov_config
    held = weakref.ref(model)  # the engine is remembered by its model and must not keep it alive

    def compile_model() -> ov.CompiledModel:
        model = held()
        assert model is not None
        model.clear_requests()
        model.compile()
        set_neutral(model.request)
        return model.request.get_compiled_model()

    return OpenVINOEngine(model.model, compile_model, model.config)


def precision_properties(
    inference_precision: str | None = None, kv_cache_precision: str | None = None
) -> dict[str, str]:
    """Return the properties of the CPU plugin that set precisions; see `OpenVINOTarget.from_pretrained`."""
    inference = inference_precision or "f32"
    return {"INFERENCE_PRECISION_HINT": inference, "KV_CACHE_PRECISION": kv_cache_precision or inference}


def _given_precisions(ov_config: dict[str, Any]) -> dict[str, Any]:
    """Return the precisions that the user gave to optimum, as arguments of `precision_properties`."""
    names = {"INFERENCE_PRECISION_HINT": "inference_precision", "KV_CACHE_PRECISION": "kv_cache_precision"}
    return {ours: ov_config[theirs] for theirs, ours in names.items() if theirs in ov_config}


class OpenVINOTarget(StoredTarget):
    """A stored OpenVINO model with transformers' `generate`, with or without a draft.

    Use `from_pretrained` to make one. The package optimum is not needed.
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
        trust_remote_code: bool = False,
        **hub_kwargs: Any,
    ) -> "OpenVINOTarget":
        """Load a stateful IR and its config.json, as `dovetail export --to openvino` or optimum-cli writes them.

        Args:
            pretrained_model_name_or_path: directory or hub id.
            inference_precision: "f32", or "bf16" on CPUs that have it, which is faster and can decide ties differently.
            kv_cache_precision: precision of the key/value cache; None takes the inference precision. "u8" changes
                logits by some hundredths.
            threads: CPU threads of the engine; None leaves the choice to OpenVINO.
            exact: drafted text equals plain text to the bit with int8 weights too. The price is that drafts are
                chains and that the state is copied in every round; see `OpenVINOEngine`.
            draft_weights: storage type of the weights of a draft that runs on this engine: "int4", "int8" or "f32".
                None takes "int4" on CPUs with VNNI or AMX and "int8" elsewhere. This changes how many drafted tokens
                are accepted, never the text.
            ov_config: further properties of the CPU plugin.
            trust_remote_code: whether code that comes with the model's config may run; nobody is asked.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

        Raises:
            OSError: there is no config.json or no IR.
            ValueError: the IR is not a stateful decoder-only language model, or `draft_weights` is not a valid choice.
        """
        if draft_weights not in (None, *DRAFT_WEIGHTS):
            raise ValueError(f"{draft_weights!r} is not a valid draft_weights. Use one of {', '.join(DRAFT_WEIGHTS)}.")
        name = str(pretrained_model_name_or_path)
        config = model_config(name, trust_remote_code=trust_remote_code, **hub_kwargs)
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
        engine = OpenVINOEngine(model, lambda: core.compile_model(model, "CPU", properties), config)
        engine.exact, engine.draft_weights = exact, draft_weights
        return cls(config, engine, stored_generation_config(name, config, **hub_kwargs))
