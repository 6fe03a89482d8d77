"""Pair graphs: which images the teacher sees together. Every edge is kept in both directions."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kdutils import overlap


def window_pairs(count, window, cyclic=False):
    """``swin-k``: each image with the next ``window`` ones."""
    return _offset_pairs(count, range(1, window + 1), cyclic)


def log_window_pairs(count, window, cyclic=False):
    """``logwin-k``: each image with those 1, 2, 4, ... 2^(window-1) further on."""
    return _offset_pairs(count, (2**k for k in range(window)), cyclic)


def reference_pairs(count, reference=0):
    """``oneref``: one image with all others."""
    return _both_directions((reference, other) for other in range(count) if other != reference)


def complete_pairs(count):
    """``complete``: each image with all others."""
    return _offset_pairs(count, range(1, count))


GRAPHS = {
    "swin": window_pairs,
    "logwin": log_window_pairs,
    "oneref": lambda count, window=None: reference_pairs(count),
    "complete": lambda count, window=None: complete_pairs(count),
}


def sequence_pairs(sequence, graph="swin", window=3):
    """Pair graph within each sequence, so that no test image takes part in a training label.

    Args:
        sequence: ``(N,)`` sequence number of each image, images in the order of their capture.

    Returns:
        Directed pairs ``(P, 2)`` of indices into the images.

    Raises:
        ValueError: an unknown graph; the message names the known ones.
    """
    if graph not in GRAPHS:
        raise ValueError(f"unknown pair graph {graph!r}: use one of overlap, {', '.join(GRAPHS)}")
    members = [np.flatnonzero(sequence == name) for name in np.unique(sequence)]
    return np.concatenate([images[GRAPHS[graph](len(images), window)] for images in members])


def scene_pairs(frames, graph="overlap", window=3):
    """Pair graph of a scene's frames; test and training images are never in one pair.

    Args:
        frames: `scenes.Frames`.
        graph: ``overlap`` pairs by what the views share, see ``overlap.overlap_graph``; the others by the order of
            capture, see `sequence_pairs`.

    Returns:
        Directed pairs ``(P, 2)`` of indices into the frames.
    """
    if graph != "overlap":
        return sequence_pairs(frames.sequence, graph, window)
    parts = [np.flatnonzero(part) for part in (frames.is_test, ~frames.is_test)]
    edges = []
    for images in parts:
        depth = (frames.depth[image] for image in images)  # one at a time: a whole scene's would fill the memory
        chosen = overlap.overlap_graph(frames.poses[images], frames.intrinsics, frames.size, depth)
        edges += map(tuple, images[chosen.images].tolist())
    return _both_directions(edges)


def components(pairs, count):
    """Number of connected pieces of the graph, and the piece ``(count,)`` that each image belongs to."""
    edges = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(edges, directed=False)


def _offset_pairs(count, offsets, cyclic=False):
    edges = ((i, i + step) for step in offsets for i in range(count))
    if cyclic:
        return _both_directions((i, j % count) for i, j in edges if i != j % count)
    return _both_directions((i, j) for i, j in edges if j < count)


def _both_directions(edges):
    unique = sorted({(min(edge), max(edge)) for edge in edges})
    both = [pair for i, j in unique for pair in ((i, j), (j, i))]
    return np.array(both, dtype=np.int64).reshape(-1, 2)
