"""Isotonic regression, for quantities that never decrease: seconds by row count, acceptance by probability."""

import numpy as np


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
