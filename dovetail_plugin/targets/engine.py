"""Finds the engine of a model: torch for transformers' own models, an adapter for those of other libraries."""

import importlib
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from .base import Engine
from .transformers_model import TorchEngine

ADAPTERS = {
    "optimum.intel.openvino": "dovetail_plugin.adapters.openvino",
    "optimum.onnxruntime": "dovetail_plugin.adapters.onnxruntime",
}
"""Package of a model's class -> our module with `engine_for(model)`, which is imported when it is needed."""

_lock = threading.Lock()
_engines: weakref.WeakKeyDictionary[Any, "Engine"] = weakref.WeakKeyDictionary()


def engine_of(model: Any) -> Engine:
    """Return the engine of a model, the same one every time."""
    with _lock:  # two engines of one model would edit its graph twice
        engine = _engines.get(model)
        if engine is None:
            engine = _engines[model] = _find_engine(model)
        return engine


def _find_engine(model: Any) -> Engine:
    own = getattr(model, "dovetail_engine", None)
    if own is not None:
        return own
    for base in type(model).__mro__:
        for package, adapter in ADAPTERS.items():
            if base.__module__.startswith(package):
                return importlib.import_module(adapter).engine_for(model)
    return TorchEngine(model)


@torch.no_grad()
def next_logits(model: Any, input_ids: Tensor) -> Tensor:
    """Run the model plainly over `input_ids` (1, T) from scratch and return the logits (1, V) of the last row."""
    engine = engine_of(model)
    with engine.session(engine.cache(None), max_nodes=1) as session:
        return session.prefill(input_ids, None).logits
