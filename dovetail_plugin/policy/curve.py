"""Seconds as a function of a row count.

`Curve` starts from measured counts and is corrected with the errors of single rounds. The module computes with numbers
only and reads no clock.
"""

import numpy as np

from .settings import PolicySettings

KNOTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
"""Row counts with separate averages, besides the measured ones. They are dense where kernels differ most."""


class Curve:
    """A function that is linear between knots and never decreases. Each knot averages its latest rounds.

    Args:
        measured: row count -> seconds, at least one entry.
        settings: constants of the averages.
    """

    def __init__(self, measured: dict[int, float], settings: PolicySettings) -> None:
        known = np.array(sorted(measured), dtype=float)
        seconds = np.array([measured[int(count)] for count in known])
        seconds = np.maximum(rising(seconds, np.ones(len(seconds))), 1e-7)
        self._knots = np.array(sorted({*KNOTS, *measured}), dtype=float)
        self._seconds = straight(self._knots, known, seconds)
        self._settings = settings
        self._rounds = np.where(np.isin(self._knots, known), float(settings.rounds_of_count), 0.0)  # at each knot

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """Return the seconds of each count; beyond the last knot the last line is continued."""
        return straight(counts, self._knots, self._seconds)

    def observe(self, count: int, error: float) -> None:
        """Correct the curve with the error log(seen / expected) of one round with this count.

        All knots are corrected by the same share of the error, because a machine changes as a whole. The knots next to
        the count are corrected by more, and by the whole error if they were not seen before. Unseen knots between them
        and the nearest seen ones are corrected by a part that decreases with the distance in octaves.
        """
        follow, index = self._settings.follow, np.arange(len(self._knots))
        own = np.maximum(1.0 - np.abs(index - np.interp(count, self._knots, index)), 0.0)
        octaves, seen = np.log2(self._knots), (self._rounds > 0) & (own == 0)
        below, above = octaves[seen & (self._knots < count)][-1:], octaves[seen & (self._knots > count)][:1]
        ends = np.concatenate([below, [np.log2(count)], above])
        near = np.interp(octaves, ends, np.array([0.0, 1.0, 0.0])[1 - len(below) : 2 + len(above)])
        local = np.where(self._rounds > 0, own, near) / (self._rounds + 1.0)
        moved = np.log(self._seconds) + error * (follow + (1.0 - follow) * local)
        self._rounds = np.minimum(self._rounds + own, self._settings.rounds_of_count)
        self._seconds = np.exp(rising(moved, self._rounds))


def straight(counts: np.ndarray, known: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Interpolate linearly between known counts: the last line continues, and below the first count it is constant."""
    found = np.interp(counts, known, seconds)
    if len(known) == 1:
        return found
    (x0, x1), (y0, y1) = known[-2:], seconds[-2:]
    return np.where(counts > x1, y1 + (counts - x1) * (y1 - y0) / (x1 - x0), found)


def rising(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the non-decreasing sequence with the least weighted squared error (pool adjacent violators).

    Args:
        values: (N,) numbers.
        weights: (N,) not negative. A value with weight 0 follows its neighbors.
    """
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
