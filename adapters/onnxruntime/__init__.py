"""ONNX Runtime targets: a model that optimum's ONNX exporter wrote, which verifies drafts on the CPU.

```python
from dovetail_plugin.adapters.onnxruntime import OnnxRuntimeTarget

target = OnnxRuntimeTarget.from_pretrained("directory-with-model.onnx-and-config.json")
out = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
```

`graph` edits the graph, `weights` finds its weights on disk, `session` runs a generation. The packages `onnxruntime`
and `onnx` are needed, optimum is not.
"""

import threading
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME

from dovetail_plugin.compat import find_file, require_file
from dovetail_plugin.drafts.checkpoints.claims import model_config
from dovetail_plugin.drafts.checkpoints.files import is_inside
from dovetail_plugin.targets.base import Tables

from ..stored_graph import missing_package
from ..stored_target import GraphTraits, StoredTarget, feature_outputs, refuse_model_kwargs, stored_generation_config

try:
    import onnxruntime as ort
except ImportError as error:  # a user reads this message first
    raise ImportError(missing_package("ONNX Runtime targets", "onnxruntime", extra="onnxruntime")) from error

from . import graph, weights
from .graph import onnx
from .session import OnnxRuntimeCache, OnnxRuntimeSession
from .states import expose_states

MODEL_FILE = "model.onnx"

NOT_OPTIMUMS = (
    "optimum's ORTModelForCausalLM objects are not supported: optimum-onnx needs an older transformers than Dovetail, "
    "and its models refuse further inputs. Pass the directory that the model was loaded from to "
    "OnnxRuntimeTarget.from_pretrained."
)


class OnnxRuntimeEngine:
    """A graph loaded by ONNX Runtime; implements `StoredEngine`. Any number of threads may use it.

    Args:
        stored: the graph after `graph.prepare`, and the place of its weights.
        prepared: result of `graph.prepare`.
        config: config of the transformers model that was exported.
        options: options of the runtime's session, from `weights.session_options`.
        same_kernels: see `OnnxRuntimeTarget.from_pretrained`.
        exact: see `OnnxRuntimeTarget.from_pretrained`.

    Attributes:
        rounding: see `Engine.rounding`.
    """

    runs_in_torch = False

    def __init__(
        self,
        stored: weights.Stored,
        prepared: graph.Prepared,
        config: PretrainedConfig,
        options: ort.SessionOptions,
        *,
        same_kernels: bool = False,
        exact: bool = False,
    ) -> None:
        self.config = config
        self.exact, self.same_kernels = exact, same_kernels or exact
        self.rounding = torch.float32 if exact else _rounding(prepared)
        text_config = config.get_text_config(decoder=True)
        self._layers: int = text_config.num_hidden_layers
        self._traits = GraphTraits.of(text_config, takes_positions=prepared.takes_positions)
        self._stored, self._prepared, self._options = stored, prepared, options
        self._lock = threading.RLock()  # guards the graph, which is edited when layers are read for the first time
        self._runtime = self._load()

    def _load(self) -> ort.InferenceSession:
        """Load the graph as it is at the time of the call."""
        graph_bytes = self._stored.model.SerializeToString()
        return ort.InferenceSession(graph_bytes, self._options, providers=["CPUExecutionProvider"])

    def check(self) -> None:
        """Do nothing: the graph was checked when it was loaded."""

    def tables(self) -> Tables:
        """Return float32 tables, decompressed if the graph stores them in fewer bits."""
        with self._lock:
            return weights.tables(self._stored)

    def cache(self, given: Any) -> OnnxRuntimeCache:
        """Return the cache to generate with; see `Engine.cache`.

        Raises:
            ValueError: `given` is a cache of another kind or of another target.
        """
        if given is None:
            return OnnxRuntimeCache(self._prepared.rows, self._prepared.dtype)
        if not isinstance(given, OnnxRuntimeCache) or given.layout != self._prepared.rows:
            raise ValueError(
                f"past_key_values ({type(given).__name__}) does not belong to this target. Pass what its own "
                "`generate` returned."
            )
        return given

    def packed_head(self) -> None:
        """Return None: this engine holds the head."""

    def draft_runner(self, draft: nn.Module) -> None:
        """Return None: drafts run in torch."""

    def session(
        self,
        cache: OnnxRuntimeCache,
        *,
        max_nodes: int,
        prefill_chunk: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> OnnxRuntimeSession:
        """Open a session; the first one that reads certain layers loads the graph once more.

        Meanwhile others that read such layers wait, and those that read none do not.

        Raises:
            ValueError: the graph has no input for an argument of the forward pass, or layers cannot be read.
        """
        refuse_model_kwargs(model_kwargs)
        runtime = self._runtime if feature_layers is None else self._runtime_with(feature_layers)
        return OnnxRuntimeSession(
            runtime,
            cache,
            self._traits,
            exact=self.exact,
            same_kernels=self.same_kernels,
            max_nodes=max_nodes,
            prefill_chunk=prefill_chunk,
            feature_layers=feature_layers,
        )

    @property
    def position_limit(self) -> int | None:
        """Positions of the model; None if its config names no number."""
        return self._traits.max_length

    def _runtime_with(self, layers: tuple[int, ...]) -> ort.InferenceSession:
        """Return the graph with outputs for these layers. Sessions that are open keep the graph they have."""
        with self._lock:
            expose_states(self._stored.model, layers, self._layers)
            if not set(feature_outputs(layers)) <= {output.name for output in self._runtime.get_outputs()}:
                self._runtime = self._load()
            return self._runtime

    def num_parameters(self) -> int:
        """Return the number of weights in the graph's matrices."""
        with self._lock:
            return weights.num_parameters(self._stored.model)


def _rounding(prepared: graph.Prepared) -> torch.dtype:
    """Return the coarsest float dtype that results pass through. Eight bits are about as coarse as bfloat16."""
    if prepared.rounds:
        return torch.bfloat16
    return torch.float32 if prepared.dtype == np.float32 else torch.float16


def engine_for(model: Any) -> NoReturn:
    """Refuse optimum's model objects.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{type(model).__name__}: {NOT_OPTIMUMS}")


def _stored(name: str, file_name: str, hub_kwargs: dict[str, Any]) -> weights.Stored:
    """Find the graph of a directory or hub id, and make sure that all files with its weights are there."""
    file = Path(require_file(name, file_name, **hub_kwargs))
    model = onnx.load(file, load_external_data=False)
    for beside in weights.external_files(model):
        if not is_inside(beside):
            raise ValueError(f"{name}: {file_name} has weights in {beside!r}, outside the model's directory.")
        require_file(name, str(Path(file_name).parent / beside), **hub_kwargs)
    return weights.point_to_files(model, file)


class OnnxRuntimeTarget(StoredTarget):
    """A stored ONNX model with transformers' `generate`, with or without a draft.

    Use `from_pretrained` to make one. The package optimum is not needed, and its own model objects
    (`ORTModelForCausalLM`) are refused: optimum-onnx needs a transformers below 4.58, Dovetail needs 5.5 or later.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        file_name: str = MODEL_FILE,
        same_kernels: bool = False,
        exact: bool = False,
        threads: int | None = None,
        options: dict[str, str] | None = None,
        trust_remote_code: bool = False,
        **hub_kwargs: Any,
    ) -> "OnnxRuntimeTarget":
        """Load a model that `optimum-cli export onnx --task text-generation-with-past` wrote.

        The files are only read. Weights are not loaded twice: the edited graph refers to them in the user's files,
        which ONNX Runtime maps, so the files must not change while the target is in use.

        Args:
            pretrained_model_name_or_path: directory or hub id.
            file_name: file of the graph within the directory, such as "onnx/model_q4.onnx".
            same_kernels: run single rows as two. ONNX Runtime multiplies one row with another kernel than several
                rows, so a plain step rounds differently from a tree. The price is that a plain step costs as much as
                two rows; trees cost the same. This removes one of two causes of differences, `exact` removes both.
            exact: drafted text equals plain text to the bit, with packed weights too. Single rows run as two, drafts
                are chains, and the runtime gets keys and values without free rows, so every sum runs in the order of
                plain decoding. The price is that no trees are drafted and that each pass copies the cache. Without
                it sums differ by a rounding of float32, which activations in eight bits can turn into a visible
                difference, so texts of such models can differ at ties.
            threads: CPU threads of the engine; None leaves the choice to ONNX Runtime.
            options: further entries of the runtime's session configuration, such as
                {"session.intra_op.allow_spinning": "0"}.
            trust_remote_code: whether code that comes with the model's config may run; nobody is asked.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

        Raises:
            OSError: config.json, the graph or a file with weights is missing.
            ValueError: the graph is not a decoder-only language model with past keys and values.
        """
        if not isinstance(pretrained_model_name_or_path, (str, Path)):
            raise ValueError(f"got {type(pretrained_model_name_or_path).__name__}: {NOT_OPTIMUMS}")
        name = str(pretrained_model_name_or_path)
        if find_file(name, CONFIG_NAME, **hub_kwargs) is None:
            raise OSError(f"{name} has no {CONFIG_NAME}. Copy it from the model that was exported.")
        config = model_config(name, trust_remote_code=trust_remote_code, **hub_kwargs)
        try:
            stored = _stored(name, file_name, hub_kwargs)
            prepared = graph.prepare(stored.model)
        except graph.GraphError as error:
            raise ValueError(f"{name}: {error}") from error
        session_options = weights.session_options(stored.directory)
        if threads is not None:
            session_options.intra_op_num_threads = threads
        for key, value in (options or {}).items():
            session_options.add_session_config_entry(key, value)
        engine = OnnxRuntimeEngine(stored, prepared, config, session_options, same_kernels=same_kernels, exact=exact)
        return cls(config, engine, stored_generation_config(name, config, **hub_kwargs))
