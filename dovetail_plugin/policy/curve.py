"""Seconds as a function of a count, learnt: measurements in, then errors of single rounds. Pure numbers."""

import bisect

import numpy as np

KNOTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
"""Counts whose seconds a `Curve` learns, beside the measured ones."""

# What a `Curve` takes for granted of its seconds, as standard deviations of their logarithm.
SPREAD, REACH, ROUGHNESS = 0.4, 1.5, 0.03
"""Of the truth from the straight line between measured counts, far from both; how far apart, in octaves, two counts
have little to do with each other; and of one count from the smooth curve through its neighbours. So what lies between
measured neighbours is believed, and what lies in a gap of several octaves is learnt."""
NOISE_OF_PROBE, NOISE_OF_ROUND = 0.06, 0.2
"""Of a measured count, and of one round."""
SPREAD_OF_SWITCH = 0.1
"""Of what a pass takes more when its count is not that of the pass before."""
DRIFT_OF_MACHINE, DRIFT_OF_COUNT = 0.05, 0.005
"""From round to round: of all counts alike, and of each for itself."""


class Curve:
    """Seconds as a function of a count: straight between knots, and on beyond the last two.

    It begins as the straight line through what was measured and follows rounds as a Kalman filter over the logarithms
    of its knots' seconds. An error is put down to the machine (all counts alike), to its count and to counts near it,
    in proportion to what is not known of each: a count that was never measured is learnt from its first rounds. One
    more number is learnt beside them: the logarithm of how much longer a count takes when another one came before it.

    Args:
        measured: count -> seconds, one entry or more; of a count after itself.
    """

    def __init__(self, measured: dict[int, float]) -> None:
        known = np.array(sorted(measured), dtype=float)
        # More rows never take less time for good; where they seemed to, both get the mean.
        seconds = np.array([measured[int(count)] for count in known])
        seconds = np.maximum(rising(seconds, np.ones(len(seconds))), 1e-7)
        knots = np.array(sorted({*KNOTS, *measured}), dtype=float)
        self._counts = knots.tolist()
        self._seconds: list[float] = _straight(knots, known, seconds).tolist()
        octaves = np.log2(knots)
        apart = (octaves[:, None] - octaves) / REACH
        alike = SPREAD**2 * np.exp(-0.5 * apart**2) + ROUGHNESS**2 * np.eye(len(knots))
        at = np.isin(knots, known).nonzero()[0]
        seen = alike[np.ix_(at, at)] + NOISE_OF_PROBE**2 * np.eye(len(at))
        self._covariance = _with_switch(alike - alike[:, at] @ np.linalg.solve(seen, alike[at]), SPREAD_OF_SWITCH**2)
        self._drift = _with_switch(DRIFT_OF_MACHINE**2 + DRIFT_OF_COUNT**2 * np.eye(len(knots)), 0.0)
        self._switch = 0.0

    def __call__(self, count: float) -> float:
        """Seconds for one count. Plain Python: a round of a small model takes a few milliseconds."""
        left, share = self._place(count)
        return self._seconds[left] + share * (self._seconds[left + 1] - self._seconds[left])

    @property
    def switch(self) -> float:
        """Logarithm, 0 or more, of what a count takes after another one to what it takes after itself."""
        return max(self._switch, 0.0)

    def _place(self, count: float) -> tuple[int, float]:
        """The knot at or before a count, and how far it is to the next one as a share; above 1 beyond the last."""
        counts = self._counts
        left = min(max(bisect.bisect_right(counts, count) - 1, 0), len(counts) - 2)
        return left, (count - counts[left]) / (counts[left + 1] - counts[left])

    def many(self, counts: np.ndarray) -> np.ndarray:
        """Seconds for each of `counts`."""
        return _straight(counts, np.array(self._counts), np.array(self._seconds))

    def observe(self, count: int, error: float, switched: bool = False) -> None:
        """Take over an error, log(seen / expected) at `count`; `switched`: after another count, as expected."""
        left, share = self._place(count)
        share = min(share, 1.0)
        covariance = self._covariance + self._drift
        parts = np.zeros(len(covariance))
        parts[left], parts[left + 1], parts[-1] = 1.0 - share, share, float(switched)
        shared = covariance @ parts
        variance = float(shared @ parts) + NOISE_OF_ROUND**2
        self._covariance = covariance - np.outer(shared, shared) / variance
        moves = shared * (error / variance)
        self._switch += float(moves[-1])
        logs = np.log(self._seconds) + moves[:-1]
        # More rows still never take less time: where they seem to, both get what is known better.
        self._seconds = np.exp(rising(logs, 1.0 / self._covariance.diagonal()[:-1])).tolist()


def _with_switch(covariance: np.ndarray, variance: float) -> np.ndarray:
    """Room for one more number that has nothing to do with the others."""
    wider = np.pad(covariance, ((0, 1), (0, 1)))
    wider[-1, -1] = variance
    return wider


def _straight(counts: np.ndarray, known: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Straight between known counts and on beyond the last two; flat before the first."""
    found = np.interp(counts, known, seconds)
    if len(known) == 1:
        return found
    (x0, x1), (y0, y1) = known[-2:], seconds[-2:]
    return np.where(counts > x1, y1 + (counts - x1) * (y1 - y0) / (x1 - x0), found)


def rising(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The nearest sequence that never falls, in weighted squares (pool adjacent violators)."""
    pools: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pools.append([value, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, weight, length = pools.pop()
            last = pools[-1]
            total = last[1] + weight
            last[0] = (last[0] * last[1] + mean * weight) / total if total else last[0]
            last[1], last[2] = total, last[2] + length
    return np.repeat([mean for mean, _, _ in pools], [int(length) for _, _, length in pools])
