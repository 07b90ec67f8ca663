"""Chooses what runs a draft's steps, and caches what takes long to prepare.

That is CUDA graphs on a GPU; on a CPU graphs of the target's engine, or packed weights.

A cached runner is freed with its draft. It is replaced if the draft was moved, cast or given other weights. All calls
that use a draft share its runner, also calls of several threads. A thread that needs a runner which another one is
making waits for it; others do not.
"""

import logging
import threading
import weakref
from typing import Any

import torch

from ..errors import InputError
from ..kernels.library import library
from ..runner import DraftRunner
from ..targets.base import Engine
from .cuda_graphs import GraphRunner
from .network import DraftNetwork
from .packed_runner import PackedRunner, can_be_packed
from .torch_runner import TorchRunner

logger = logging.getLogger(__name__)

_graphs: "weakref.WeakKeyDictionary[DraftNetwork, GraphRunner]" = weakref.WeakKeyDictionary()
_prepared: "weakref.WeakKeyDictionary[DraftNetwork, weakref.WeakKeyDictionary[Engine, _Kept]]" = (
    weakref.WeakKeyDictionary()
)


_lock = threading.RLock()  # guards the dictionaries; it is not held while a runner is compiled


class _Kept:
    """Runner beside an engine, or None for the draft's own modules, and the weights that it was made from.

    Attributes:
        lock: held while a runner is compiled, so that it is compiled once.
    """

    def __init__(self) -> None:
        self.runner: DraftRunner[Any] | None = None
        self.version: tuple[int, ...] | None = None
        self.lock = threading.RLock()


def runner_for(draft: DraftNetwork, engine: Engine, *, plainly: bool = False) -> DraftRunner[Any]:
    """Return what runs the steps of an attached draft fastest.

    CUDA graphs on an NVIDIA GPU. On a CPU, the target's engine if it can run drafts, or packed weights if the
    kernels are there. Else the draft's own modules: on every other kind of device too (mps, xpu, AMD GPUs under ROCm).

    Args:
        draft: attached to its target.
        engine: runs the target.
        plainly: use the draft's own modules in any case.
    """
    device = next(draft.parameters()).device
    if plainly:
        return TorchRunner(draft)
    if device.type == "cuda" and torch.version.hip is None:
        return graph_runner_for(draft)
    found = _prepared_for(draft, engine) if device.type == "cpu" else None
    return found or TorchRunner(draft)


def graph_runner_for(draft: DraftNetwork) -> GraphRunner:
    """Return the draft's `GraphRunner`, so that a generation replays what earlier ones captured."""
    weight = next(draft.parameters())
    with _lock:
        kept = _graphs.get(draft)
        if kept is None or (kept.device, kept.dtype) != (weight.device, weight.dtype):
            kept = _graphs[draft] = GraphRunner(draft)
        return kept


def _prepared_for(draft: DraftNetwork, engine: Engine) -> DraftRunner[Any] | None:
    with _lock:
        kept = _prepared.setdefault(draft, weakref.WeakKeyDictionary()).setdefault(engine, _Kept())
    with kept.lock:
        version = _version_of(draft)
        if kept.version != version:
            kept.runner, kept.version = engine.draft_runner(draft) or _packed_for(draft, engine), version
        return None if isinstance(kept.runner, PackedRunner) and not can_be_packed(draft) else kept.runner


def _packed_for(draft: DraftNetwork, engine: Engine) -> PackedRunner | None:
    if library() is None or not can_be_packed(draft):
        return None
    try:
        return PackedRunner(draft, engine.packed_head())
    except InputError:
        logger.warning("the draft runs in torch, which is slower here: weights are not finite or too large to pack.")
        return None


def _version_of(draft: DraftNetwork) -> tuple[int, ...]:
    """Numbers that change when weights are replaced or changed in place, but in inference mode and through `.data`."""
    tables = (draft.embed_weight, draft.head_weight, draft.head_bias)
    weights = [weight for weight in (*draft.parameters(), *tables) if weight is not None]
    versions = (0 if weight.is_inference() else weight._version for weight in weights)
    return (*(weight.data_ptr() for weight in weights), *versions)
