"""Losses of one batch: the features that the draft predicts against the features of the target.

Alignment, for a sequence x_0 .. x_{T-1} with target features f_0 .. f_{T-1}:

    row             0        1      ...    T-3
    feature in     f_0      f_1            f_{T-3}
    token in       x_1      x_2            x_{T-2}
    target out     f_1      f_2            f_{T-2}
    counts if the target wrote x_2, x_3, ..., x_{T-1}   (the token that f_1, f_2, ... predict)

The first pass reads true features. In pass s > 1, row p reads the prediction that pass s - 1 made at row p - 1, and
attends to true rows up to p - s + 1 and to predicted rows after that. This is exactly what a node at depth s - 1 of a
tree sees (HASS, Zhang et al. 2024; training-time test of EAGLE-3).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..drafts.model import DovetailDraft
from .data import Batch, Sequence


@dataclass(frozen=True)
class Losses:
    """Losses of a batch. If the batch is a part of a step, the losses of all parts add up to those of the step.

    Attributes:
        feature: () float, SmoothL1 loss: mean over the counted rows of each pass, averaged over passes.
        token: () float, soft cross-entropy, averaged in the same way.
        agreement: (passes,) float, share of counted rows whose likeliest token is the target's likeliest token.
    """

    feature: Tensor
    token: Tensor
    agreement: Tensor


class GrowingRows:
    """Key/value rows for training. Rows are concatenated instead of written in place, so that gradients flow."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows: keys and values (B, K, T, head_dim)."""
        self._keys.append(keys)
        self._values.append(values)

    @property
    def keys(self) -> Tensor:
        """(B, K, all rows, head_dim)."""
        return torch.cat(self._keys, dim=2)

    @property
    def values(self) -> Tensor:
        """(B, K, all rows, head_dim)."""
        return torch.cat(self._values, dim=2)


def rollout_mask(length: int, passes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Attention mask of the last pass.

    Row p of pass s sees true rows 0 .. p - s + 1, and row p - s + r of each pass r = 2 .. s.

    Args:
        length: rows of each pass.
        passes: number of the last pass.
        dtype: of the mask.
        device: of the mask.

    Returns:
        (length, passes * length), 0 for rows that are seen and -inf for the others.
    """
    rows = torch.arange(length, device=device)
    behind = rows[:, None] - rows[None]
    blocks = [behind >= passes - 1] + [behind == passes - r for r in range(2, passes + 1)]
    seen = torch.cat(blocks, dim=1)
    seen[:, 0] |= ~seen.any(1)  # rows before the start of the pass are never counted but must see something
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def count_rows(sequences: list[Sequence], passes: int) -> Tensor:
    """Number of counted rows of each pass over all of these sequences: (passes,) float32."""
    return torch.tensor([float(sum(int(s.written[p + 1 :].sum()) for s in sequences)) for p in range(1, passes + 1)])


@dataclass(frozen=True)
class Pass:
    """One pass over a batch. It has R = T - 2 rows, aligned as in the module docstring.

    Attributes:
        number: number of the pass, from 1.
        predicted: (B, R, H) float, predicted features.
        logits: (B, R, V) float32 logits of the draft.
        counted: (B, R) bool, rows that count in losses.
    """

    number: int
    predicted: Tensor
    logits: Tensor
    counted: Tensor


def roll_out(
    draft: DovetailDraft, features: Tensor, batch: Batch, *, passes: int, noise: Tensor | None = None
) -> Iterator[Pass]:
    """Run the draft `passes` times over a batch; see `draft_losses` for the arguments."""
    inputs = features if noise is None else features + noise
    inputs, tokens = inputs[:, :-2], batch.input_ids[:, 1:-1]
    rows = torch.arange(tokens.shape[1], device=tokens.device)
    counted = batch.written[:, 2:] & (rows[None] + 2 < batch.lengths[:, None])
    rope = draft.rope_at(rows[None], inputs.dtype)
    caches = [GrowingRows() for _ in draft.layers]
    for number in range(1, passes + 1):
        mask = None if number == 1 else rollout_mask(len(rows), number, inputs.dtype, inputs.device)
        predicted = draft.step(inputs, tokens, rope, caches, mask)  # type: ignore[arg-type]
        yield Pass(number, predicted, draft.head(predicted).float(), counted & (rows >= number - 1))
        # Row p of the next pass reads what this pass predicted at row p - 1. Row 0 has no row before it.
        inputs = torch.cat([inputs[:, :1], predicted[:, :-1]], dim=1)


def draft_losses(
    draft: DovetailDraft,
    features: Tensor,
    batch: Batch,
    *,
    passes: int,
    noise: Tensor | None = None,
    row_counts: Tensor | None = None,
) -> Losses:
    """Run the draft `passes` times over a batch and compute its losses.

    Args:
        draft: attached to the target.
        features: (B, T, H) float features of the target, on the draft's device.
        batch: tokens and mask, on the same device.
        passes: number of passes, at least 1; see the module docstring.
        noise: (B, T, H) float, added to the features that the first pass reads. None adds nothing.
        row_counts: (passes,) float from `count_rows` of the whole step, if this batch is a part of a step. None if the
            batch stands alone.
    """
    wanted = features[:, 1:-1]
    with torch.no_grad():
        target_logits = draft.head(wanted).float()
        target_probs, target_best = target_logits.softmax(-1), target_logits.argmax(-1)
    totals, agreements = [], []
    for done in roll_out(draft, features, batch, passes=passes, noise=noise):
        at = done.counted
        share = 1.0 / (at.sum() if row_counts is None else row_counts[done.number - 1]).clamp(min=1)
        feature = F.smooth_l1_loss(done.predicted.float(), wanted.float(), reduction="none").mean(-1)
        logprobs = done.logits.log_softmax(-1)
        token = -(target_probs * logprobs).sum(-1)
        totals.append(torch.stack([(feature * at).sum(), (token * at).sum()]) * share)
        agreements.append(((logprobs.argmax(-1) == target_best) & at).sum() * share)
    feature, token = torch.stack(totals).mean(0)
    return Losses(feature, token, torch.stack(agreements).detach())


def expected_acceptance_length(agreement: Tensor) -> float:
    """Expected tokens per round of a greedy chain: 1 + a_1 + a_1 a_2 + ...

    Args:
        agreement: (passes,) float, the agreements a_1, a_2, ...
    """
    return 1.0 + float(agreement.double().cumprod(0).sum())
