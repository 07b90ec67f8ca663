"""Runs a draft's steps with its own modules, on whatever device they are; implements `DraftRunner`."""

import torch

from ..runner import Pass, Predicted
from .kv_rows import KVRows
from .network import DraftNetwork


class LayerRows:
    """Key/value rows of one text in all layers; implements `RowStorage`.

    Args:
        layers: number of layers.
        capacity: rows to make room for at once.

    Attributes:
        layers: one `KVRows` for each layer.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.layers = [KVRows(capacity) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Rows in use."""
        return self.layers[0].length

    @length.setter
    def length(self, length: int) -> None:
        for rows in self.layers:
            rows.length = length


class TorchRunner:
    """A draft's own modules.

    Args:
        draft: attached to its target.
    """

    runs_in_torch = True
    weights: str | None = None

    def __init__(self, draft: DraftNetwork) -> None:
        self._draft = draft
        weight = next(draft.parameters())
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype

    def new_rows(self, capacity: int) -> LayerRows:
        """Make rows for each block."""
        return LayerRows(len(self._draft.layers), capacity)

    def run(self, step: Pass, rows: LayerRows) -> Predicted:
        """Run the draft's modules over the pass."""
        rope = self._draft.rope_for(step, self.dtype)
        predicted = self._draft.step(step.features[None], step.tokens[None], rope, rows.layers, step.mask)[0]
        return Predicted(predicted, self._draft.head(predicted[step.logits_from :]))
