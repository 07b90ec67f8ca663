"""How likely a drafted node is accepted: the draft's own probability of it in, an honest probability out.

A draft's cumulative probability is not the probability of being accepted: greedy targets take the likeliest token
always, drafts are over- or underconfident, and both change with the text. `AcceptanceCurve` starts from what
training measured (or from a rule of thumb) and follows what is really accepted. Pure numbers.
"""

import numpy as np

from ..drafts.calibration import BINS, CENTERS, EDGES
from .curve import rising

PRIOR_WEIGHT = 6.0
"""Nodes that a bin's prior counts as much as."""

FORGET = 0.995
"""What a round leaves of the weight of those before it: some two hundred rounds are remembered."""

FADE = 0.2
"""What `fade` leaves."""

REFIT_FROM, REFIT_EVERY = 16, 4
"""Rounds after which the curve is not fitted anew every round, and how often then: a fit takes a while."""

GREEDY = 1.0 - (1.0 - CENTERS) ** 1.8
"""Rule of thumb for greedy targets: likely tokens are taken more often than the draft believes (a fit)."""

SAMPLING = CENTERS * 0.9
"""Rule of thumb at temperature 1: as likely as the draft believes, a little less for its errors."""


class AcceptanceCurve:
    """Draft probability -> probability of acceptance, never falling.

    Args:
        prior: (BINS,) acceptance by bin.
    """

    def __init__(self, prior: np.ndarray) -> None:
        assert prior.shape == (BINS,)
        self._prior = prior
        self._hits, self._trials = np.zeros(BINS), np.zeros(BINS)
        self._rounds = 0
        self._rates = self._fit()

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Acceptance probabilities of nodes with cumulative log-probabilities `scores`, same shape."""
        return np.interp(np.exp(scores), self._centers, self._rates)

    _centers = np.concatenate([[0.0], CENTERS, [1.0]])

    def observe(self, scores: np.ndarray, accepted: np.ndarray) -> None:
        """Learn from one round: drafted nodes, without the root, and which of them were accepted (bool)."""
        bins = np.searchsorted(EDGES, np.exp(scores))
        self._hits = FORGET * self._hits + np.bincount(bins, accepted, minlength=BINS)
        self._trials = FORGET * self._trials + np.bincount(bins, minlength=BINS)
        self._rounds += 1
        if self._rounds < REFIT_FROM or self._rounds % REFIT_EVERY == 0:
            self._rates = self._fit()

    def fade(self) -> None:
        """Forget most of what was accepted: the text may be another one by now."""
        self._hits, self._trials, self._rounds = FADE * self._hits, FADE * self._trials, 0
        self._rates = self._fit()

    def _fit(self) -> np.ndarray:
        weights = self._trials + PRIOR_WEIGHT
        rates = rising((self._hits + PRIOR_WEIGHT * self._prior) / weights, weights)
        return np.concatenate([[0.0], rates, [rates[-1]]])


def prior(calibration: dict[str, list[float]] | None, temperature: float) -> np.ndarray:
    """(BINS,) acceptance by bin before anything was accepted.

    Args:
        calibration: of the checkpoint, rates by bin under "greedy" and "sampling"; None takes rules of thumb.
        temperature: 0 is greedy; in between, and above 1, the two are mixed in proportion.
    """
    known = calibration or {}
    greedy = np.array(known.get("greedy", GREEDY), dtype=np.float64)
    sampling = np.array(known.get("sampling", SAMPLING), dtype=np.float64)
    share = min(temperature, 1.0)
    return (1.0 - share) * greedy + share * sampling
