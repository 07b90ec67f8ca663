"""Exports and sessions of the engine under test, and what torch computes for the same tokens."""

from pathlib import Path
from typing import Any

import engines
import torch
from families import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from dovetail_plugin.targets.engine import engine_of


def exported(model_type: str = "llama", kind: str = "f32", **fields: Any) -> tuple[PreTrainedModel, Path]:
    """A tiny model in torch and the directory of its export, which must not be written to."""
    model = tiny_model(model_type, **fields)
    return model, engines.current().exporter.path(model, kind)


def open_session(target: Any, cache: Any = None, max_nodes: int = 30) -> Any:
    """A session of the target's engine for texts of up to 500 tokens; use it in a `with` statement."""
    engine = engine_of(target)
    return engine.session(cache or engine.cache(None), max_nodes=max_nodes, prefill_chunk=None, model_kwargs={})


@torch.no_grad()
def torch_rows(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, V) and features (T, H) of all rows of a text (1, T)."""
    hidden = model.base_model(input_ids=ids).last_hidden_state
    return model(input_ids=ids).logits[0], hidden[0]


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """Equal up to the rounding of float32 in another order of operations."""
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
