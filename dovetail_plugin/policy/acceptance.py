"""Estimates how likely a drafted node is accepted, from the probability that the draft gave it.

The two probabilities differ: a greedy target always takes its most likely token, drafts are over- or underconfident,
and both depend on the text. `AcceptanceCurve` starts from rates that training measured, or from a rule of thumb, and is
updated with the nodes that are accepted. The module computes with numbers only and does not know models.
"""

import numpy as np

from ..drafts.config import BINS, CENTERS, EDGES
from .curve import rising
from .settings import PolicySettings

CALIBRATED = np.concatenate([[0.0], CENTERS, [1.0]])
"""(BINS + 2,) draft probabilities; acceptance is interpolated linearly between them."""


class AcceptanceCurve:
    """Maps the draft's probability of a node to the probability that it is accepted. The map never decreases.

    Args:
        prior: (BINS,) acceptance rate of each bin before any node was observed.
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
        """Forget most observations, because the text may have changed while drafting rested."""
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
    """Return the acceptance rate of each bin before any node was observed, (BINS,).

    Args:
        calibration: rates of the bins under "greedy" and "sampling", from the checkpoint. If None, rules of thumb are
            used.
        temperature: 0 is greedy decoding. Between 0 and 1 the greedy and sampling rates are mixed in proportion; above
            1 the sampling rates are used.
        settings: contains the rules of thumb; None uses the defaults.
    """
    known, settings = calibration or {}, settings or PolicySettings()
    greedy = np.array(known.get("greedy", 1.0 - (1.0 - CENTERS) ** settings.greedy_exponent), dtype=np.float64)
    sampling = np.array(known.get("sampling", CENTERS * settings.sampling_share), dtype=np.float64)
    share = min(temperature, 1.0)
    return (1.0 - share) * greedy + share * sampling
