"""What is known of the cameras, put into a small network's answers before they are aligned.

A small network tells the shapes of both views well, and how the camera moved less well: it is off by some degrees, and
timid, its motions are too short. That is more than the parallax which a pair's scale is read off, so where poses are
known, the network need not be believed. The camera of view j is found from the pair's own points (PnP), the points are
taken into it, and come back by the known motion.

Its length in the network's unit takes one number more: how many metres the unit has. A network that was trained on
rooms of one kind gives nearly the same unit to every pair; how many metres that is the pictures tell (``photometric``).
"""

import numpy as np

from kdutils import geometry, localisation
from kdutils.parallel import in_threads

EVERY = 3  # pixels along both axes that the camera is found from
LEAST_CONFIDENCE = 1.2


class Posed:
    """Re-iterable shards of ``PairPointmaps`` whose views j stand as their cameras are known to.

    Args:
        shards: re-iterable of ``PairPointmaps``.
        intrinsics: ``(3, 3)`` in pixels. poses: ``(N, 4, 4)`` camera-to-world, metres.
        unit: metres in one unit of the pairs, about.

    Raises:
        RuntimeError: PoseLib is not installed.
    """

    def __init__(self, shards, intrinsics, poses, unit):
        if not localisation.available():
            raise RuntimeError("the teacher compact's labels take PoseLib to align: install it with requirements.txt's "
                               "version, or use the teacher depth")  # fmt: skip
        self.shards, self.intrinsics, self.poses, self.unit = shards, np.asarray(intrinsics), np.asarray(poses), unit
        self._found = {}

    def __len__(self):
        return len(self.shards)

    def __iter__(self):
        return map(self._posed, self.shards)

    def _posed(self, shard):
        points, confidence = np.array(shard.points_j, np.float32), np.array(shard.confidence_j, np.float32)
        pairs = list(map(tuple, shard.pairs.tolist()))
        new = [k for k, pair in enumerate(pairs) if pair not in self._found]
        found = in_threads(lambda k: self._correction(*pairs[k], points[k], confidence[k]), new)
        self._found.update(zip((pairs[k] for k in new), found))
        for k, pair in enumerate(pairs):
            if self._found[pair] is None:
                confidence[k] = 1  # no information
            else:
                points[k] = geometry.transform(self._found[pair].astype(np.float32), points[k])
        return shard._replace(points_j=points, confidence_j=confidence)

    def _correction(self, i, j, points, confidence):
        """Motion ``(4, 4)`` of view j's points, in view i's frame and the pair's unit; None without a camera."""
        some = np.zeros(confidence.shape, bool)
        some[EVERY // 2 :: EVERY, EVERY // 2 :: EVERY] = True
        said = localisation.locate(points, self.intrinsics, some & (confidence > LEAST_CONFIDENCE))
        if said is None:
            return None
        known = geometry.invert(self.poses[i]) @ self.poses[j]
        known[:3, 3] /= self.unit
        return known @ geometry.invert(said)
