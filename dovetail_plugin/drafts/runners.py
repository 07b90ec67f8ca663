"""Chooses what runs a draft's steps, and caches what is expensive to prepare: CUDA graphs, compiled graphs.

A cached runner is freed with its draft. It is replaced if the draft was moved, cast or given other weights.
"""

import weakref
from typing import Any

import torch

from ..runner import DraftRunner
from ..targets.base import Engine
from .cuda_graphs import GraphRunner
from .network import DraftNetwork
from .torch_runner import TorchRunner

_graphs: "weakref.WeakKeyDictionary[DraftNetwork, GraphRunner]" = weakref.WeakKeyDictionary()
_compiled: "weakref.WeakKeyDictionary[DraftNetwork, weakref.WeakKeyDictionary[Engine, _Kept]]" = (
    weakref.WeakKeyDictionary()
)


class _Kept:
    """Runner of an engine, or None if the engine cannot run drafts, and the weights that it was made from."""

    def __init__(self, runner: DraftRunner[Any] | None, version: tuple[int, ...]) -> None:
        self.runner, self.version = runner, version


def runner_for(draft: DraftNetwork, engine: Engine, *, plainly: bool = False) -> DraftRunner[Any]:
    """Return what runs the steps of an attached draft fastest.

    CUDA graphs on an NVIDIA GPU, the target's engine on a CPU if it can run drafts, else the draft's own modules: on
    every other kind of device too (mps, xpu, AMD GPUs under ROCm).

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
    found = _compiled_for(draft, engine) if device.type == "cpu" else None
    return found or TorchRunner(draft)


def graph_runner_for(draft: DraftNetwork) -> GraphRunner:
    """Return the draft's `GraphRunner`, so that a generation replays what earlier ones captured."""
    weight, kept = next(draft.parameters()), _graphs.get(draft)
    if kept is None or (kept.device, kept.dtype) != (weight.device, weight.dtype):
        kept = _graphs[draft] = GraphRunner(draft)
    return kept


def _compiled_for(draft: DraftNetwork, engine: Engine) -> DraftRunner[Any] | None:
    of_engine = _compiled.setdefault(draft, weakref.WeakKeyDictionary())
    kept, version = of_engine.get(engine), _version_of(draft)
    if kept is None or kept.version != version:
        kept = of_engine[engine] = _Kept(engine.draft_runner(draft), version)
    return kept.runner


def _version_of(draft: DraftNetwork) -> tuple[int, ...]:
    """Numbers that change when weights are replaced, or changed in place outside of inference mode."""
    tables = (draft.embed_weight, draft.head_weight, draft.head_bias)
    weights = [weight for weight in (*draft.parameters(), *tables) if weight is not None]
    versions = (0 if weight.is_inference() else weight._version for weight in weights)
    return (*(weight.data_ptr() for weight in weights), *versions)
