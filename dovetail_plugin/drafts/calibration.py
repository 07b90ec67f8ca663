"""Bins of draft probability. A checkpoint stores an acceptance rate for each of them."""

import numpy as np

EDGES = np.array([0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])
"""Boundaries between the bins."""

BINS = len(EDGES) + 1
"""Number of bins."""

CENTERS = np.concatenate([[0.001], (EDGES[:-1] + EDGES[1:]) / 2, [0.985]])
"""Draft probability that represents each bin."""
