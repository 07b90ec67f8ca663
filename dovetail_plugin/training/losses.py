"""Losses of one batch: what the draft predicts against what the target really had.

Alignment, for a sequence x_0 .. x_{T-1} with target features f_0 .. f_{T-1}:

    row             0        1      ...    T-3
    feature in     f_0      f_1            f_{T-3}
    token in       x_1      x_2            x_{T-2}
    target out     f_1      f_2            f_{T-2}
    counts if the target wrote x_2, x_3, ..., x_{T-1}   (the token that f_1, f_2, ... decide)

The first pass reads true features. In pass s > 1 row p reads the prediction that pass s - 1 made at row
p - 1, and attends true rows up to p - s + 1 and predicted rows after that: exactly what a node at depth
s - 1 of a tree sees (HASS, Zhang et al. 2024; EAGLE-3's training-time test).
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
    """feature, token: () means of SmoothL1 and soft cross-entropy over the counted rows of each pass, averaged.

    agreement: (passes,) share of counted rows whose likeliest token is the target's.
    Where the batch is a part of a step, the parts' losses add up to those of the step.
    """

    feature: Tensor
    token: Tensor
    agreement: Tensor


class GrowingRows:
    """`KVRows` for training: concatenates instead of writing in place, so gradients flow."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._keys.append(keys)
        self._values.append(values)

    @property
    def keys(self) -> Tensor:
        return torch.cat(self._keys, dim=2)

    @property
    def values(self) -> Tensor:
        return torch.cat(self._values, dim=2)


def rollout_mask(length: int, passes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What rows of the last pass see: (length, passes * length) additive.

    Row p of pass s sees true rows 0 .. p - s + 1, then of pass r = 2 .. s the row p - s + r.
    """
    rows = torch.arange(length, device=device)
    behind = rows[:, None] - rows[None]
    blocks = [behind >= passes - 1] + [behind == passes - r for r in range(2, passes + 1)]
    seen = torch.cat(blocks, dim=1)
    seen[:, 0] |= ~seen.any(1)  # rows before the pass can start see something, and are never counted
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def count_rows(sequences: list[Sequence], passes: int) -> Tensor:
    """(passes,) float32: rows that count in each pass over all of these sequences."""
    return torch.tensor([float(sum(int(s.written[p + 1 :].sum()) for s in sequences)) for p in range(1, passes + 1)])


@dataclass(frozen=True)
class Pass:
    """One pass over a batch; R = T - 2 rows, aligned as in the module docstring.

    number: from 1. predicted: (B, R, H). logits: (B, R, V) of the draft. counted: (B, R) bool.
    """

    number: int
    predicted: Tensor
    logits: Tensor
    counted: Tensor


def roll_out(
    draft: DovetailDraft, features: Tensor, batch: Batch, *, passes: int, noise: Tensor | None = None
) -> Iterator[Pass]:
    """Run the draft `passes` times over a batch; arguments as `draft_losses`."""
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
        # Pass s + 1 reads at row p what pass s predicted at row p - 1; row 0 has nothing before it.
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
    """Run the draft `passes` times over a batch.

    Args:
        features: (B, T, H) of the target, on the draft's device.
        batch: tokens and mask, on the same device.
        passes: see the module docstring; at least 1.
        noise: (B, T, H) added to the features that the first pass reads, or None.
        row_counts: (passes,) from `count_rows` of the whole step that this batch is a part of; None if it
            is no part of anything.
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
    """Tokens a verification of a greedy chain would give: 1 + a_1 + a_1 a_2 + ... for agreements a (passes,)."""
    return 1.0 + float(agreement.double().cumprod(0).sum())
