"""ONNX Runtime targets: a directory that optimum's ONNX exporter wrote verifies drafts on the CPU.

```python
from dovetail_plugin.adapters.onnxruntime import OnnxRuntimeTarget

target = OnnxRuntimeTarget.from_pretrained("directory-with-model.onnx-and-config.json")
out = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
```

Works with `onnxruntime` and `onnx` beside any transformers of ours. What is copied in a pass is told in
`onnxruntime_session`, where the weights are in `onnxruntime_weights`, what is edited in `onnxruntime_graph`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME

try:
    import onnxruntime as ort
except ImportError as error:  # the message is what a user reads first
    raise ImportError(
        "ONNX Runtime targets need the `onnxruntime` package: pip install 'dovetail-plugin[onnxruntime]'."
    ) from error

from dovetail_plugin.compat import find_file, require_file
from dovetail_plugin.targets.base import Tables

from ..stored_target import StoredTarget, sliding_window, stored_generation_config, tables_of
from . import graph, weights
from .graph import onnx
from .session import OnnxRuntimeCache, OnnxRuntimeSession
from .states import expose_states

MODEL_FILE = "model.onnx"

NOT_OPTIMUMS = (
    "optimum's ORTModelForCausalLM objects are not taken: optimum-onnx wants a transformers older than any that "
    "Dovetail runs with, and its models refuse further inputs. Pass the directory that they were loaded from to "
    "OnnxRuntimeTarget.from_pretrained."
)


class OnnxRuntimeEngine:
    """An inference session over an edited graph; implements `Engine`.

    Args:
        stored: the graph, after `graph.prepare`, and where its weights are.
        prepared: what `graph.prepare` answered.
        config: of the transformers model that was exported.
        options: of the session; must come from `weights.session_options`.
        same_kernels, exact: see `OnnxRuntimeTarget.from_pretrained`.

    Attributes:
        takes_positions: whether the graph has position ids; else a row's place in the cache is its position.
        window: rows that sliding layers look back, if there are such layers.
        rounding: as `Engine.rounding`.
    """

    runs_in_torch = False

    def __init__(
        self,
        stored: weights.Stored,
        prepared: graph.Prepared,
        config: PretrainedConfig,
        options: "ort.SessionOptions",
        *,
        same_kernels: bool = False,
        exact: bool = False,
    ) -> None:
        self.config = config
        self.text_config = config.get_text_config(decoder=True)
        self.takes_positions = prepared.takes_positions
        self.exact, self.same_kernels = exact, same_kernels or exact
        self.window = sliding_window(self.text_config)
        self.rounding = torch.float32 if exact else _rounding(prepared)
        self._stored, self._prepared, self._options = stored, prepared, options
        self._rows = [each.new for each in prepared.rows]
        self._session = self._load()

    def _load(self) -> "ort.InferenceSession":
        """The graph as it is now, ready to run."""
        graph_bytes = self._stored.model.SerializeToString()
        return ort.InferenceSession(graph_bytes, self._options, providers=["CPUExecutionProvider"])

    def check(self) -> None:
        """As `Engine.check`; the graph was looked at when it was loaded."""

    def tables(self) -> Tables:
        """As `Engine.tables`: float32, decompressed if the graph stores them in fewer bits."""
        found = weights.tables(self._stored)
        return tables_of(found.embedding, found.head, found.bias)

    def cache(self, given: Any) -> OnnxRuntimeCache:
        """As `Engine.cache`."""
        if given is None:
            return OnnxRuntimeCache(self._prepared.rows, self._prepared.dtype)
        if not isinstance(given, OnnxRuntimeCache) or given.layout != self._prepared.rows:
            what = f"past_key_values ({type(given).__name__})"
            raise ValueError(f"{what} is not of this target; pass what its own `generate` returned.")
        return given

    def draft_runner(self, draft: nn.Module) -> None:
        """Return None: the draft runs in torch."""

    def session(
        self,
        cache: OnnxRuntimeCache,
        *,
        max_length: int,  # noqa: ARG002 - buffers grow by themselves
        max_nodes: int,
        prefill_chunk: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> OnnxRuntimeSession:
        """As `Engine.session`; the first session that reads single layers loads the graph once more.

        Raises:
            ValueError: an argument of the forward pass that the graph has no input for; layers that cannot be read.
        """
        if model_kwargs:
            raise ValueError(f"the graph has no input for {', '.join(sorted(model_kwargs))}.")
        count = self.text_config.num_hidden_layers
        if feature_layers is not None and expose_states(self._stored.model, feature_layers, count):
            self._session = self._load()
        return OnnxRuntimeSession(
            self, cache, max_nodes=max_nodes, prefill_chunk=prefill_chunk, feature_layers=feature_layers
        )

    def num_parameters(self) -> int:
        """Numbers in the graph's matrices."""
        return weights.num_parameters(self._stored.model)

    def run(self, inputs: dict[str, "ort.OrtValue"], features: list[str]) -> list[np.ndarray]:
        """One pass: logits, the named features, new rows of every layer."""
        outputs = ["logits", *features, *self._rows]
        return [value.numpy() for value in self._session.run_with_ort_values(outputs, inputs)]


def _rounding(prepared: graph.Prepared) -> torch.dtype:
    """The coarsest float type that stands for the graph's roundings; eight bits are about as coarse as bfloat16."""
    if prepared.rounds:
        return torch.bfloat16
    return torch.float32 if prepared.dtype == np.float32 else torch.float16


def engine_for(model: Any) -> OnnxRuntimeEngine:
    """No engine: this refuses optimum's model objects.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{type(model).__name__}: {NOT_OPTIMUMS}")


def _stored(name: str, file_name: str, hub_kwargs: dict[str, Any]) -> weights.Stored:
    """The graph of a directory or hub id, with all files that its weights are in at hand."""
    file = Path(require_file(name, file_name, **hub_kwargs))
    model = onnx.load(file, load_external_data=False)
    for beside in weights.external_files(model):
        require_file(name, str(Path(file_name).parent / beside), **hub_kwargs)
    return weights.point_to_files(model, file)


class OnnxRuntimeTarget(StoredTarget):
    """A stored ONNX model with transformers' `generate`, with or without a draft. No optimum needed.

    Made by `from_pretrained`. Optimum's own model objects (`ORTModelForCausalLM`) are not taken: optimum-onnx wants
    transformers below 4.58, Dovetail 5.5 or later.
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
        **hub_kwargs: Any,
    ) -> "OnnxRuntimeTarget":
        """Load what `optimum-cli export onnx --task text-generation-with-past` wrote. The files are only read.

        Weights are not loaded twice: the edited graph refers to them where they lie in the user's files, and
        ONNX Runtime maps those, so the files must stay as they are while the target is in use.

        Args:
            file_name: the graph's, within the directory, such as "onnx/model_q4.onnx".
            same_kernels: run single rows as two. ONNX Runtime multiplies one row by another kernel than several, so
                a plain step rounds otherwise than a tree. The price is that a plain step costs what two rows cost;
                trees cost nothing more. By itself it removes one of two causes; `exact` removes both.
            exact: drafted text equals plain text to the bit, with packed weights too: single rows run as two, drafts
                are chains, and the runtime gets its keys and values without free rows, so every sum runs in the
                order of plain decoding. The price is the acceptance of trees and a copy of the cache every pass.
                Without it sums differ by a rounding of float32, which activations in eight bits can make a visible
                one: texts of such models may part at ties.
            threads: CPU threads of the engine; default: ONNX Runtime's choice.
            options: further entries of the session's configuration, such as
                {"session.intra_op.allow_spinning": "0"}.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

        Raises:
            OSError: there is no config.json, no graph, or a file with weights is missing.
            ValueError: the graph is not one of a decoder-only language model with past keys and values.
        """
        if not isinstance(pretrained_model_name_or_path, (str, Path)):
            raise ValueError(f"got {type(pretrained_model_name_or_path).__name__}: {NOT_OPTIMUMS}")
        name = str(pretrained_model_name_or_path)
        if find_file(name, CONFIG_NAME, **hub_kwargs) is None:
            raise OSError(f"{name} has no {CONFIG_NAME}. Copy it from the model that was exported.")
        config = AutoConfig.from_pretrained(name, **hub_kwargs)
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
