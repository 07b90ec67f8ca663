"""How often nodes of each draft probability are accepted, measured on held-out text; the prior of `acceptance.py`.

Nodes are what a tree along the text would hold: at every row the likeliest tokens of each pass, below the text's own
tokens. A greedy target accepts a node if every token down to it is the target's likeliest; a sampling one accepts it
with the product of the target's probabilities.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..drafts.calibration import BINS, EDGES
from ..drafts.model import DovetailDraft
from ..policy.acceptance import prior
from .data import Batch
from .losses import roll_out

CHILDREN = 8
"""Likeliest tokens of a row that count as nodes."""

RULE_WEIGHT = 5.0
"""Nodes that the rule of thumb counts as much as, in each bin: some bins see hardly any."""


@dataclass
class Calibration:
    """Sums by bin of draft probability; `add` batches, then `rates`."""

    nodes: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    greedy: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    sampling: np.ndarray = field(default_factory=lambda: np.zeros(BINS))

    @torch.no_grad()
    def add(self, draft: DovetailDraft, features: Tensor, batch: Batch, *, passes: int) -> None:
        """Arguments as `losses.draft_losses`."""
        target = draft.head(features[:, 1:-1]).float()
        target_logprobs, best = target.log_softmax(-1), target.argmax(-1)
        written = batch.input_ids[:, 2:]  # the token that each row's prediction is about
        path = torch.zeros_like(target_logprobs[..., 0])  # log-probabilities of the text since the first pass
        path_target, path_greedy = path, torch.ones_like(path)
        for done in roll_out(draft, features, batch, passes=passes):
            logprobs = done.logits.log_softmax(-1)
            likeliest, tokens = logprobs.topk(min(CHILDREN, logprobs.shape[-1]), dim=-1)
            accepted = (path_target[..., None] + target_logprobs.gather(-1, tokens)).exp()
            hit = path_greedy[..., None] * (tokens == best[..., None])
            self._count(path[..., None] + likeliest, hit, accepted, done.counted)
            # The next pass stands one row further on, below this row's written token.
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
        """For `DovetailConfig.calibration`."""
        weights = self.nodes + RULE_WEIGHT
        return {
            name: ((hits + RULE_WEIGHT * prior(None, temperature)) / weights).round(4).tolist()
            for name, hits, temperature in (("greedy", self.greedy, 0.0), ("sampling", self.sampling, 1.0))
        }


def _shift(rows: Tensor) -> Tensor:
    """(B, R): each row gets what the one before it had."""
    return torch.cat([rows[:, :1], rows[:, :-1]], dim=1)
