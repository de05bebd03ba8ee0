"""Connected components of a graph given as pairs of node numbers, in numpy alone.

The duplicate clusters of millions of rows and the ink blobs of a picture are the same question. Labels spread by taking
minima over the edges and are then followed to their root, so the number of rounds grows with the logarithm of the
longest chain, and memory stays at a few arrays of the size of the input.
"""

from __future__ import annotations

import numpy as np


def label_components(num_nodes: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each node the smallest node number of its component (int64, (num_nodes,)); `left[i]` and `right[i]` touch."""
    labels = np.arange(num_nodes, dtype=np.int64)
    a, b = np.asarray(left, dtype=np.int64), np.asarray(right, dtype=np.int64)
    while len(a):
        low, high = np.minimum(labels[a], labels[b]), np.maximum(labels[a], labels[b])
        open_ = low != high
        if not open_.any():
            break
        # An edge that is settled stays settled: both ends share a root from now on.
        a, b, low, high = a[open_], b[open_], low[open_], high[open_]
        np.minimum.at(labels, high, low)
        while True:
            parents = labels[labels]
            if np.array_equal(parents, labels):
                break
            labels = parents
    return labels
