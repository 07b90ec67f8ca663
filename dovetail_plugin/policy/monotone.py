"""Isotonic regression, for numbers that may not fall: seconds by row count, acceptance by draft probability."""

import numpy as np


def rising(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the nearest sequence that never falls, in weighted squares (pool adjacent violators).

    Args:
        values: (N,) numbers.
        weights: (N,) 0 or more; a value of weight 0 follows its neighbors.
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
