"""Union-find over numpy arrays: connected components of a graph whose edges are all known."""
from typing import Sequence, Tuple

import numpy as np

__all__ = ['Edges', 'components', 'in_component_of']

Edges = Tuple[np.ndarray, np.ndarray]  # edge i joins node first[i] to node second[i]


def components(roots: np.ndarray, edges: Sequence[Edges]) -> np.ndarray:
    """Add edges to a graph.

    All edges are processed at once, by hooking and pointer jumping (Shiloach and Vishkin, 1982): for each edge between
    two components, the larger root is hooked under the smaller one; then every node is pointed at its new root.

    >>> components(np.arange(6), [(np.array([1, 2]), np.array([4, 5])), (np.array([4]), np.array([0]))])
    array([0, 0, 2, 3, 0, 2])

    Args:
        roots: The smallest node of each node's component before, shape (nodes,). Not changed.
        edges: The new edges.

    Returns:
        The smallest node of each node's component, shape (nodes,).
    """
    roots = roots.copy()
    if not edges:
        return roots
    a = np.concatenate([first for first, _ in edges])
    b = np.concatenate([second for _, second in edges])
    while True:
        a, b = roots[a], roots[b]
        apart = a != b
        if not apart.any():
            return roots
        a, b = a[apart], b[apart]
        np.minimum.at(roots, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(shorter := roots[roots], roots):
            roots = shorter


def in_component_of(roots: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Which nodes are in the same component as one of ``nodes``: a mask of shape (nodes in the graph,)."""
    hit = np.zeros(len(roots), dtype=bool)
    hit[roots[nodes]] = True
    return hit[roots]
