"""Which views of a scene with known poses are worth a pair: they share much, seen from places far enough apart.

Two views of one camera standing still agree on everything and measure nothing, and two that share little leave the
teacher to guess. So a pair needs overlap *and* a baseline; pictures far apart in time that look at the same place close
the loops.
"""

from dataclasses import dataclass

import numpy as np

from kdutils import geometry

SHARED = (0.2, 0.9)  # part of each of the two views that the other one sees as well
# Degrees between the two rays to a point that both see: below it depth cannot be triangulated, above it the two views
# show the place from different sides.
LEAST_ANGLE, MOST_ANGLE = 2.0, 60.0
GOOD_ANGLES = (10.0, 30.0)  # degrees: wide enough for depth, and not so wide that the views look different
MOST_NEIGHBOURS = 6  # of an image, so at most twice as many directed pairs
ASSUMED_DEPTH = 2.0  # metres from camera to room, where no depth is known
SAMPLES = (4, 6)  # rows and columns of pixels that stand for a view
MOST_OFFSETS = 800  # steps along the sequence that are looked at, so that time grows with the number of images only
CHUNK = 4096  # edges that are measured together: they stay in the processor's cache


@dataclass(frozen=True)
class Edges:
    """E undirected edges of a pair graph.

    Attributes:
        images: ``(E, 2)``, the smaller index first.
        shared: ``(E,)`` part of the view that the other one sees as well, the smaller of the two.
        angle: ``(E,)`` triangulation angle in degrees, at the middle of what both see.
    """

    images: np.ndarray
    shared: np.ndarray
    angle: np.ndarray

    def __len__(self):
        return len(self.images)

    def __getitem__(self, which):
        return Edges(self.images[which], self.shared[which], self.angle[which])

    @property
    def quality(self):
        """``(E,)`` what an edge is worth: much overlap, from a baseline neither short nor wide."""
        least, most = GOOD_ANGLES
        return self.shared * np.minimum(self.angle / least, 1) * np.minimum(most / np.maximum(self.angle, most), 1)

    def admissible(self):
        """Those that overlap, though not altogether, and can be triangulated."""
        low, high = SHARED
        overlaps = (self.shared >= low) & (self.shared <= high)
        return self[overlaps & (self.angle >= LEAST_ANGLE) & (self.angle <= MOST_ANGLE)]


class Views:
    """The views of one scene; measures what any two of them share.

    Args:
        poses: ``(N, 4, 4)`` camera-to-world, metres.
        intrinsics: ``(3, 3)`` in pixels.
        size: (height, width) in pixels.
        depth: ``(N, H, W)``, or an iterable of N ``(H, W)``, along z in metres, 0 where unknown; without it everything
            is ``ASSUMED_DEPTH`` away.
    """

    def __init__(self, poses, intrinsics, size, depth=None):
        poses = np.asarray(poses)
        at = np.ix_(*(((np.arange(n) + 0.5) * side / n).astype(int) for side, n in zip(size, SAMPLES)))
        rays = geometry.pixel_rays(intrinsics, *size)[at].reshape(-1, 3)
        z = np.full((len(poses), 1), ASSUMED_DEPTH) if depth is None else np.stack([d[at].ravel() for d in depth])
        points = np.einsum("nab,nsb->nsa", poses[:, :3, :3], z[..., None] * rays) + poses[:, None, :3, 3]
        self.size, self.known = size, np.broadcast_to(z > 0, points.shape[:2])
        self.points, self.centres = points.astype(np.float32), poses[:, :3, 3].astype(np.float32)
        self.projections = (intrinsics @ geometry.invert(poses)[:, :3]).astype(np.float32)

    def measure(self, images):
        """`Edges` for ``images`` ``(E, 2)``."""
        parts = [self._measure(images[k : k + CHUNK]) for k in range(0, len(images), CHUNK)]
        shared, angle = np.concatenate(parts, axis=1) if parts else np.empty((2, 0), np.float32)
        return Edges(images, shared, angle)

    def _measure(self, images):
        i, j = images.T
        seen = self._seen(i, j)
        shared = np.minimum(self._part(seen, i), self._part(self._seen(j, i), j))
        angle = np.zeros_like(shared)
        some = np.flatnonzero(shared >= SHARED[0])
        angle[some] = self._angle(i[some], j[some], seen[some])
        return shared, angle

    def _seen(self, i, j):
        """Which sampled points of views i the views j have inside their image, ``(E, samples)``."""
        x, y, z = np.moveaxis(self.points[i], -1, 0)
        p = self.projections[j][..., None]
        u, v, w = (p[:, k, 0] * x + p[:, k, 1] * y + p[:, k, 2] * z + p[:, k, 3] for k in range(3))
        height, width = self.size
        return (w > 0) & (u >= 0) & (u < width * w) & (v >= 0) & (v < height * w) & self.known[i]

    def _part(self, seen, i):
        return (seen.sum(axis=1) / np.maximum(self.known[i].sum(axis=1), 1)).astype(np.float32)

    def _angle(self, i, j, seen):
        """Angle at the mean of the points of view i that both see."""
        weight = (seen / np.maximum(seen.sum(axis=1, keepdims=True), 1)).astype(np.float32)
        middle = np.einsum("es,esa->ea", weight, self.points[i])
        first, second = middle - self.centres[i], middle - self.centres[j]
        sine = np.linalg.norm(np.cross(first, second), axis=1)
        return np.degrees(np.arctan2(sine, np.einsum("ea,ea->e", first, second)))


def overlap_graph(poses, intrinsics, size, depth=None):
    """The pair graph of a scene with known poses; see `Views` for the arguments.

    No image has more than ``MOST_NEIGHBOURS`` neighbours. A spanning forest of the best edges comes first, so that the
    graph is connected where the views allow it, loops included; then each image gets its best remaining ones.

    Returns:
        The `Edges` that were chosen.
    """
    views = Views(poses, intrinsics, size, depth)
    found = views.measure(candidates(len(poses))).admissible()
    return choose(found, len(poses))


def candidates(count):
    """Edges to look at ``(E, 2)``: the nearest neighbours of each image, and evenly spread steps to all others."""
    near = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    even = np.linspace(1, count - 1, MOST_OFFSETS).round().astype(int) if count > 1 else []
    offsets = sorted({int(step) for step in (*near, *even) if step < count})
    edges = [np.stack([np.arange(count - step), np.arange(step, count)], axis=1) for step in offsets]
    return np.concatenate(edges) if edges else np.empty((0, 2), int)


def choose(edges, count):
    """A part of the edges in which no image has too many; it connects what they connect, where that can be."""
    edges = edges[np.argsort(-edges.quality, kind="stable")]
    pairs = edges.images.tolist()
    group, degree, chosen = list(range(count)), [0] * count, set()

    def root(i):
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    def take(most, joins_only):
        for k, (i, j) in enumerate(pairs):
            if degree[i] < most and degree[j] < most and k not in chosen:
                first, second = root(i), root(j)
                if first != second or not joins_only:
                    group[first] = second
                    degree[i] += 1
                    degree[j] += 1
                    chosen.add(k)

    # A forest that spares the popular images, then whatever still joins two pieces, then the best for everyone.
    for most, joins_only in ((3, True), (MOST_NEIGHBOURS, True), (4, False), (MOST_NEIGHBOURS, False)):
        take(most, joins_only)
    return edges[np.array(sorted(chosen), int)]
