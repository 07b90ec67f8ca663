"""Measures on held-out text how often nodes of each draft probability are accepted. The policy starts from the result.

The nodes are those of a tree along the text: in each row of each pass, the draft's likeliest tokens, below the text's
own tokens. In greedy generation a node is accepted if every token down to it is the target's likeliest token; in
sampling it is accepted with the product of the target's probabilities.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..drafts.config import BINS, EDGES
from ..drafts.model import DovetailDraft
from ..policy.acceptance import prior
from .data import Batch
from .losses import roll_out

CHILDREN = 8
"""Number of likeliest tokens of a row that count as nodes."""

RULE_WEIGHT = 5.0
"""Weight of the prior in each bin, in nodes, because some bins have hardly any nodes."""


@dataclass
class Calibration:
    """Counts by bin of draft probability. Call `add` for each batch and then `rates`.

    Attributes:
        nodes: (BINS,) float64, number of nodes.
        greedy: (BINS,) float64, number of nodes accepted in greedy generation.
        sampling: (BINS,) float64, expected number of nodes accepted in sampling.
    """

    nodes: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    greedy: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    sampling: np.ndarray = field(default_factory=lambda: np.zeros(BINS))

    @torch.no_grad()
    def add(self, draft: DovetailDraft, features: Tensor, batch: Batch, *, passes: int) -> None:
        """Count the nodes of one batch.

        Args:
            draft: the trained draft.
            features: (B, T, H) float features of the target, on the draft's device.
            batch: tokens and mask, on the same device.
            passes: depth to which nodes are counted.
        """
        target = draft.head(features[:, 1:-1]).float()
        target_logprobs, best = target.log_softmax(-1), target.argmax(-1)
        written = batch.input_ids[:, 2:]  # the token that each row predicts
        path = torch.zeros_like(target_logprobs[..., 0])  # (B, R) log-probability of the text since the first pass
        path_target, path_greedy = path, torch.ones_like(path)
        for done in roll_out(draft, features, batch, passes=passes):
            logprobs = done.logits.log_softmax(-1)
            likeliest, tokens = logprobs.topk(min(CHILDREN, logprobs.shape[-1]), dim=-1)
            accepted = (path_target[..., None] + target_logprobs.gather(-1, tokens)).exp()
            hit = path_greedy[..., None] * (tokens == best[..., None])
            self._count(path[..., None] + likeliest, hit, accepted, done.counted)
            # The next pass is one row further on, below the written token of this row.
            own = written[..., None]
            path = _shift(path + logprobs.gather(-1, own)[..., 0])
            path_target = _shift(path_target + target_logprobs.gather(-1, own)[..., 0])
            path_greedy = _shift(path_greedy * (written == best))

    def _count(self, scores: Tensor, hit: Tensor, accepted: Tensor, counted: Tensor) -> None:
        at = counted[..., None].expand(scores.shape)
        bins = np.searchsorted(EDGES, scores[at].exp().double().cpu().numpy())
        self.nodes += np.bincount(bins, minlength=BINS)
        self.greedy += np.bincount(bins, hit[at].cpu().numpy(), minlength=BINS)
        self.sampling += np.bincount(bins, accepted[at].cpu().numpy(), minlength=BINS)

    def rates(self) -> dict[str, list[float]]:
        """Acceptance rates by bin, greedy and sampling, for `DovetailConfig.calibration`."""
        weights = self.nodes + RULE_WEIGHT
        return {
            name: ((hits + RULE_WEIGHT * prior(None, temperature)) / weights).round(4).tolist()
            for name, hits, temperature in (("greedy", self.greedy, 0.0), ("sampling", self.sampling, 1.0))
        }


def _shift(rows: Tensor) -> Tensor:
    """(B, R): move each value to the next row. The first row keeps its value."""
    return torch.cat([rows[:, :1], rows[:, :-1]], dim=1)
