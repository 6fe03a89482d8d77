"""Second pass: every pixel's depth, from all that the pairs say of it, robustly.

An image's predictions wait until all have come, at most ``MOST_WAITING`` of them; then the one that most others
support is the start of a reweighted mean, which single gross errors do not reach. Memory grows with the images.
"""

import numpy as np

from kdutils import geometry
from kdutils.sketches import usable_weight

MOST_WAITING = 16
LEAST_NOISE = 0.003  # share of the depth, below which predictions count as agreeing however exact the others are
WIDTHS = (6.0, 4.0, 4.0)  # deviations at which a prediction has lost half its weight, round by round
LEAST_RAY_NOISE = 0.003  # radians
LEAST_AGREEING = 3  # predictions that agree make a label even where they are the minority


class Fusion:
    """Depth, confidence and validity ``(N, H, W)`` of N images.

    Args:
        intrinsics: ``(N, 3, 3)``.
        poses: ``(N, 4, 4)`` camera-to-world, in units of the scales.
        size: (height, width).
        expected: ``(N,)`` how many predictions of each image will be added.
        depth_noise, ray_noise: deviations of one prediction, as a share of the depth and in radians.
    """

    def __init__(self, intrinsics, poses, size, expected, depth_noise, ray_noise):
        self.poses, self.expected = poses, expected
        self.noise, self.ray_noise = max(depth_noise, LEAST_NOISE), max(ray_noise, LEAST_RAY_NOISE)
        self.slopes = _Slopes(intrinsics, size)
        shape = (len(poses), *size)
        self.depth, self.confidence = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        self.valid = np.zeros(shape, bool)
        self.waiting = {}

    def add(self, scale, pair, points_i, points_j, confidence_i, confidence_j):
        """Take in one pair's prediction, ``(H, W, ...)``, with its scale."""
        i, j = pair
        relative = geometry.invert(self.poses[j]) @ self.poses[i]
        relative[:3, :3] *= scale
        self._add(i, np.diag([scale, scale, scale, 1.0]), points_i, confidence_i)
        self._add(j, relative, points_j, confidence_j)

    def _add(self, image, transform, points, confidence):
        weight = usable_weight(points, confidence)
        moved = points.reshape(-1, 3) @ transform[:3, :3].T.astype(np.float32) + transform[:3, 3].astype(np.float32)
        x, y, z = moved.T.reshape(3, *weight.shape)
        front = (weight > 0) & (z > 0)
        z = np.where(front, z, np.float32(1))
        slope_x, slope_y = self.slopes[image]
        off = ((x / z - slope_x) ** 2 + (y / z - slope_y) ** 2) / np.float32((3 * self.ray_noise) ** 2)
        weight = np.where(front, weight / (1 + off) ** 2, np.float32(0))
        waiting = self.waiting.setdefault(image, _Waiting())
        waiting.depths.append(z)
        waiting.weights.append(weight)
        waiting.count += 1
        if waiting.count == self.expected[image]:
            self._finish(image, self.waiting.pop(image))
        elif len(waiting.depths) == MOST_WAITING:
            waiting.reduce(self.noise)

    def _finish(self, image, waiting):
        waiting.reduce(self.noise)
        self.depth[image] = waiting.depths[0]
        self.confidence[image] = np.exp(waiting.weights[0] / waiting.count)
        clear = (waiting.agreeing > waiting.total / 2) | (waiting.votes >= LEAST_AGREEING)
        self.valid[image] = clear & (self.confidence[image] > 1) & (self.depth[image] > 0)


class _Waiting:
    """An image's predictions so far; once reduced, the first of them stands for several."""

    def __init__(self):
        self.depths, self.weights, self.count = [], [], 0
        self.total, self.agreeing, self.votes = np.float32(0), np.float32(0), np.float32(0)

    def reduce(self, noise):
        depths, weights = np.stack(self.depths), np.stack(self.weights)
        votes = np.ones(depths.shape, np.float32)
        if self.total is not np.float32(0) and np.ndim(self.total):
            votes[0] = self.votes
            self.total = self.total + weights[1:].sum(0)
        else:
            self.total = weights.sum(0)
        depth, inlier = robust_mean(depths, weights, noise)
        self.agreeing = (inlier * weights).sum(0)
        self.votes = (inlier * votes).sum(0)
        self.depths, self.weights = [depth], [self.agreeing]


def robust_mean(depths, weights, noise):
    """Weighted mean ``(H, W)`` of the depths ``(K, H, W)`` near the best supported one, and who is near it.

    Args:
        noise: deviation of a depth, as a share of it.
    """
    logs = np.log(depths)
    support = weights.copy()
    for k in range(len(logs)):
        for m in range(k):
            near = 1 / (1 + ((logs[k] - logs[m]) / np.float32(2 * noise)) ** 2)
            support[k] += weights[m] * near
            support[m] += weights[k] * near
    support[weights == 0] = 0
    centre = np.take_along_axis(depths, support.argmax(0)[None], 0)[0]
    for width in WIDTHS:
        off = ((depths / centre - 1) / np.float32(width * noise)) ** 2
        robust = weights / (1 + off**4)
        total = robust.sum(0)
        centre = np.where(total > 0, (robust * depths).sum(0) / np.where(total > 0, total, 1), centre)
    return np.where(total > 0, centre, 0), off < 1


class _Slopes:
    """x/z and y/z ``(H, W)`` of an image's pixel rays; computed once where all images share a camera."""

    def __init__(self, intrinsics, size):
        self.intrinsics, self.size = intrinsics, size
        self.shared = self._of(0) if (intrinsics == intrinsics[:1]).all() else None

    def __getitem__(self, image):
        return self.shared or self._of(image)

    def _of(self, image):
        rays = geometry.pixel_rays(self.intrinsics[image], *self.size).astype(np.float32)
        return rays[..., 0].copy(), rays[..., 1].copy()
