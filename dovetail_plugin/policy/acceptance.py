"""How likely a drafted node is accepted: the draft's own probability in, the probability of acceptance out.

The two differ: a greedy target always takes its likeliest token, drafts are over- or underconfident, and both change
with the text. `AcceptanceCurve` starts from what training measured (or from a rule of thumb) and follows what is
accepted. Pure numbers.
"""

import numpy as np

from ..drafts.calibration import BINS, CENTERS, EDGES
from .monotone import rising
from .settings import PolicySettings

CALIBRATED = np.concatenate([[0.0], CENTERS, [1.0]])
"""(BINS + 2,) draft probabilities between which acceptance is a straight line."""


class AcceptanceCurve:
    """Draft probability -> probability of acceptance, never falling.

    Args:
        prior: (BINS,) acceptance by bin before anything was observed.
        settings: how fast the curve learns and forgets.
    """

    def __init__(self, prior: np.ndarray, settings: PolicySettings) -> None:
        assert prior.shape == (BINS,)
        self._prior, self._settings = prior, settings
        self._hits, self._trials = np.zeros(BINS), np.zeros(BINS)
        self._rounds = 0
        self._rates = self._fit()

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return acceptance probabilities of nodes with cumulative log-probabilities `scores`, in the same shape."""
        return np.interp(np.exp(scores), CALIBRATED, self._rates)

    def observe(self, scores: np.ndarray, accepted: np.ndarray) -> None:
        """Learn from one round.

        Args:
            scores: (N - 1,) cumulative log-probabilities of the drafted nodes, without the root.
            accepted: (N - 1,) bool.
        """
        bins, memory = np.searchsorted(EDGES, np.exp(scores)), self._settings.acceptance_memory
        self._hits = memory * self._hits + np.bincount(bins, accepted, minlength=BINS)
        self._trials = memory * self._trials + np.bincount(bins, minlength=BINS)
        self._rounds += 1
        if self._rounds < self._settings.refit_from or self._rounds % self._settings.refit_every == 0:
            self._rates = self._fit()

    def fade(self) -> None:
        """Forget most of what was accepted, since the text may have changed."""
        left = self._settings.acceptance_after_rest
        self._hits, self._trials, self._rounds = left * self._hits, left * self._trials, 0
        self._rates = self._fit()

    def _fit(self) -> np.ndarray:
        prior_weight = self._settings.acceptance_prior_weight
        weights = self._trials + prior_weight
        rates = rising((self._hits + prior_weight * self._prior) / weights, weights)
        return np.concatenate([[0.0], rates, [rates[-1]]])


def prior(
    calibration: dict[str, list[float]] | None, temperature: float, settings: PolicySettings | None = None
) -> np.ndarray:
    """Return (BINS,) acceptance by bin before anything was accepted.

    Args:
        calibration: rates by bin under "greedy" and "sampling", from the checkpoint; None takes rules of thumb.
        temperature: 0 is greedy; between 0 and 1 the two are mixed in proportion, above 1 sampling's are used.
        settings: the rules of thumb.
    """
    known, settings = calibration or {}, settings or PolicySettings()
    greedy = np.array(known.get("greedy", 1.0 - (1.0 - CENTERS) ** settings.greedy_exponent), dtype=np.float64)
    sampling = np.array(known.get("sampling", CENTERS * settings.sampling_share), dtype=np.float64)
    share = min(temperature, 1.0)
    return (1.0 - share) * greedy + share * sampling
