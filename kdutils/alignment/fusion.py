"""Second pass: every pixel's depth, from all that the pairs say of it, robustly.

An image's predictions wait until all have come, at most ``MOST_WAITING`` of them; then the one that most others
support is the start of a reweighted mean, which single gross errors do not reach. Memory grows with the images.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.ndimage import median_filter

from kdutils import geometry
from kdutils.alignment.sketches import log_confidence

MOST_WAITING = 16
MOST_FINISHING = 4  # images that wait for the thread that reduces them
NEIGHBOURS_COUNT = 1.5  # what the surrounding pixels' depth counts for, in predictions of that pixel
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
        self.to_rays = np.linalg.inv(intrinsics).astype(np.float32)
        self.u, self.v = np.arange(size[1], dtype=np.float32) + 0.5, np.arange(size[0], dtype=np.float32)[:, None] + 0.5
        shape = (len(poses), *size)
        self.depth, self.confidence = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        self.valid = np.zeros(shape, bool)
        self.waiting = {}
        self.finisher, self.finishing = ThreadPoolExecutor(1), []

    def add(self, scale, pair, points_i, points_j, confidence_i, confidence_j):
        """Take in one pair's prediction, ``(H, W, ...)``, with its scale."""
        i, j = pair
        relative = geometry.invert(self.poses[j]) @ self.poses[i]
        relative[:3, :3] *= scale
        self._add(i, np.diag([scale, scale, scale, 1.0]), points_i, confidence_i)
        self._add(j, relative, points_j, confidence_j)

    def _add(self, image, transform, points, confidence):
        depth, off = self._depth_and_error(image, transform.astype(np.float32), points)
        weight = log_confidence(confidence)
        weight = np.where(off < np.inf, weight / (1 + off) ** 2, np.float32(0))
        waiting = self.waiting.setdefault(image, _Waiting())
        waiting.depths.append(depth)
        waiting.weights.append(weight)
        waiting.count += 1
        if waiting.count == self.expected[image]:
            self.finishing.append(self.finisher.submit(self._finish, image, self.waiting.pop(image)))
            if len(self.finishing) > MOST_FINISHING:
                self.finishing.pop(0).result()
        elif len(waiting.depths) == MOST_WAITING:
            waiting.reduce(self.noise)

    @np.errstate(invalid="ignore", over="ignore")  # of points that are not finite
    def _depth_and_error(self, image, transform, points):
        """Depth ``(H, W)`` of points in the image's camera, and their distance from the rays, squared, in deviations.

        The distance is infinite, and the depth 1, where a point is not finite or not in front of the camera.
        """
        x, y, z = (points.reshape(-1, 3) @ transform[:3, :3].T).T.reshape(3, *points.shape[:2])
        x, y, z = (a + b for a, b in zip((x, y, z), transform[:3, 3]))
        front = (z > 0) & (z < np.inf)
        z = np.where(front, z, np.float32(1))
        (a, b, c), (d, e, f), _ = self.to_rays[image]
        off = (x / z - (a * self.u + b * self.v + c)) ** 2 + (y / z - (d * self.u + e * self.v + f)) ** 2
        off = np.minimum(off / np.float32((3 * self.ray_noise) ** 2), np.float32(1e12))  # its square stays finite
        return z, np.where(front & np.isfinite(off), off, np.float32(np.inf))

    def finish(self):
        """Wait for the images still being worked on."""
        with self.finisher:
            for image in self.finishing:
                image.result()

    def _finish(self, image, waiting):
        waiting.reduce(self.noise)
        self.depth[image] = np.where(waiting.weights[0] > 0, waiting.depths[0], 0)
        self.confidence[image] = np.exp(waiting.weights[0] / waiting.count)
        clear = (waiting.agreeing > waiting.total / 2) | (waiting.votes >= LEAST_AGREEING)
        self.valid[image] = clear & (self.confidence[image] > 1) & (self.depth[image] > 0)


class _Waiting:
    """An image's predictions so far; once reduced, the first of them stands for several."""

    def __init__(self):
        self.depths, self.weights, self.count = [], [], 0
        self.reduced = False
        self.total = self.agreeing = self.votes = None  # (H, W): weight of all, of those that agree, and their number

    def reduce(self, noise):
        depths, weights = np.stack(self.depths), np.stack(self.weights)
        votes = np.ones(depths.shape, np.float32)
        if self.reduced:
            votes[0] = self.votes
            self.total = self.total + weights[1:].sum(0)
        else:
            self.total = weights.sum(0)
        self.reduced = True
        depth, inlier = robust_mean(depths, weights, noise)
        self.agreeing = (inlier * weights).sum(0)
        self.votes = (inlier * votes).sum(0)
        self.depths, self.weights = [depth], [self.agreeing]


def robust_mean(depths, weights, noise):
    """Weighted mean ``(H, W)`` of the depths ``(K, H, W)`` near the best supported one, and who is near it.

    Args:
        noise: deviation of a depth, as a share of it.

    Where nothing has weight the mean is 1.
    """
    logs = np.log(depths)
    support = weights.copy()
    for k in range(len(logs)):
        for m in range(k):
            near = 1 / (1 + ((logs[k] - logs[m]) / np.float32(2 * noise)) ** 2)
            support[k] += weights[m] * near
            support[m] += weights[k] * near
    support[weights == 0] = 0
    first = np.take_along_axis(logs, support.argmax(0)[None], 0)[0]
    # Where few predictions agree by chance, the pixels around tell which: gross errors seldom continue the surface.
    around = median_filter(first, 3, mode="nearest")
    near = 1 / (1 + ((logs - around) / np.float32(4 * noise)) ** 2)
    support += np.float32(NEIGHBOURS_COUNT * weights.mean()) * near
    support[weights == 0] = 0
    centre = np.take_along_axis(depths, support.argmax(0)[None], 0)[0]
    for width in WIDTHS:
        off = np.minimum(np.abs(depths / centre - 1) / np.float32(width * noise), 30) ** 2
        robust = np.where(off < 4, weights / (1 + off**4), 0)
        total = robust.sum(0)
        centre = np.where(total > 0, (robust * depths).sum(0) / np.where(total > 0, total, 1), centre)
    return np.where(total > 0, centre, 1), (off < 1) & (weights > 0)
