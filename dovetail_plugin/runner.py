"""The contract of what runs a draft's steps: a pass in, predictions out.

A `DraftRunner` runs one draft on one engine: torch, CUDA graphs, OpenVINO, or a small language model. It serves any
number of texts at a time, so it keeps no state of a text: that lies in the `RowStorage` that it makes for each. This
module knows nothing of trees or targets.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class RowStorage(Protocol):
    """Keys and values of one text.

    Attributes:
        length: rows in use. Setting it back drops the rows behind it.
    """

    length: int


@dataclass(frozen=True)
class Pass:
    """One step of a draft over n rows, after the rows that a text has already.

    Attributes:
        features: (n, H) float, projected features of the target or predictions fed back, on the runner's device.
        tokens: (n,) int64, the token after each feature, on the runner's device.
        position: text position of the first row.
        is_level: True if the rows are one level of a tree, all at `position`; False if they follow each other.
        mask: (n, m) additive over the m rows after appending; None means causal, with nothing before the n rows.
        logits_from: first row whose logits are wanted; those before it are not computed.
    """

    features: Tensor
    tokens: Tensor
    position: int
    is_level: bool = False
    mask: Tensor | None = None
    logits_from: int = 0

    @property
    def rows(self) -> int:
        """Number of rows (n)."""
        return self.tokens.shape[0]

    def positions(self) -> Tensor:
        """Text position of each row: (n,) int64 on the tokens' device."""
        if self.is_level:
            return torch.full_like(self.tokens, self.position)
        return torch.arange(self.position, self.position + self.rows, device=self.tokens.device)


@dataclass(frozen=True)
class Predicted:
    """Result of a pass.

    Attributes:
        features: (n, H) predictions of the target's next features; (n, 0) from a runner that predicts none.
        logits: (n - logits_from, V) of the last rows.
    """

    features: Tensor
    logits: Tensor


Rows = TypeVar("Rows", bound=RowStorage)


class DraftRunner(Protocol[Rows]):
    """Runs the steps of one draft.

    Attributes:
        device: where passes run and their inputs must lie.
        dtype: of features, masks and logits.
        weights: name of the weights' storage type where it is not `dtype`, for example "int4"; else None.
        runs_in_torch: whether passes need torch's threads.
    """

    device: torch.device
    dtype: torch.dtype
    weights: str | None
    runs_in_torch: bool

    def new_rows(self, capacity: int) -> Rows:
        """Make empty storage for one text, with room for `capacity` rows before it has to grow."""

    def run(self, step: Pass, rows: Rows) -> Predicted:
        """Run one step and append its n rows to `rows`."""
