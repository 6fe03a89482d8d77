"""Problems with a known answer for the alignment: what teachers of several faults say of a scene."""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import zoom

from kdutils import geometry, registration


class Scene(NamedTuple):
    """N posed depth images; depth 0 means no reading."""

    depth: np.ndarray  # (N, H, W) metres along z
    poses: np.ndarray  # (N, 4, 4) camera-to-world
    intrinsics: np.ndarray  # (3, 3)

    @property
    def points(self):
        rays = geometry.pixel_rays(self.intrinsics, *self.depth.shape[1:])
        return np.stack([geometry.transform(p, d[..., None] * rays) for d, p in zip(self.depth, self.poses)])


class Problem(NamedTuple):
    arrays: tuple  # pairs, pts_i, pts_j, conf_i, conf_j
    scales: np.ndarray  # (P,) metres per unit of the pair
    wrong: np.ndarray  # pairs that are wrong altogether


def smooth_field(rng, size, knots=(4, 5)):
    """A smooth random field ``size`` of mean 0 and deviation 1."""
    field = zoom(rng.normal(size=knots), np.array(size) / np.array(knots), order=3, mode="nearest", grid_mode=True)
    return (field - field.mean()) / field.std()


def random_rotation(rng):
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.linalg.det(q)


def problem(scene, pairs, noise=0.03, wrong=0.0, outliers=0.0, seed=0, along="rays", rotate="both", hole=1.0,
            isotropic=0.0):  # fmt: skip
    """Predictions of every pair, in a unit of its own.

    Args:
        noise: deviation of the smooth multiplicative noise of every prediction.
        wrong: share of the pairs whose prediction is turned by a random rotation.
        outliers: share of the pixels that are off by a random factor, at full confidence.
        along: noise moves points along their own camera's ``rays``, or from view i's centre (``frame``).
        rotate: a wrong prediction turns ``both`` pointmaps or only view ``j``'s.
        isotropic: deviation of white noise in all directions, as a share of the distance.
    """
    rng = np.random.default_rng(seed)
    pairs = np.asarray(pairs)
    count, (height, width) = len(pairs), scene.depth.shape[1:]
    rays = geometry.pixel_rays(scene.intrinsics, height, width)
    median = np.median(scene.depth[scene.depth > 0])
    scales = np.exp(rng.uniform(-1, 1, count))
    is_wrong = np.zeros(count, bool)
    is_wrong[rng.permutation(count)[: round(wrong * count)]] = True
    points = np.empty((2, count, height, width, 3), np.float32)
    confidence = np.empty((2, count, height, width), np.float32)
    for p, pair in enumerate(pairs):
        turn = random_rotation(rng)
        for side, image in enumerate(pair):
            depth = np.where(scene.depth[image] > 0, scene.depth[image], median)
            factor = 1 + noise * smooth_field(rng, (height, width))
            to_i = geometry.invert(scene.poses[pair[0]]) @ scene.poses[image]
            if along == "rays":
                view = geometry.transform(to_i, (depth * factor)[..., None] * rays)
            else:
                view = geometry.transform(to_i, depth[..., None] * rays) * factor[..., None]
            view = view + isotropic * np.linalg.norm(view, axis=-1, keepdims=True) * rng.normal(size=view.shape)
            if is_wrong[p] and (rotate == "both" or side == 1):
                view = view @ turn.T
            off = rng.random((height, width)) < outliers
            view = np.where(off[..., None], view * np.exp(rng.uniform(-1.2, 1.2, (height, width, 1))), view)
            points[side, p] = view / scales[p]
            confidence[side, p] = np.where(scene.depth[image] > 0, 5, hole)
    return Problem((pairs, points[0], points[1], confidence[0], confidence[1]), scales, np.flatnonzero(is_wrong))


def errors(aligned, scene, fitted):
    """RMSE and median in cm of the valid points' distances to the truth, after one similarity where ``fitted``."""
    seen = (scene.depth > 0) & aligned.valid
    found, truth = aligned.points[seen].astype(np.float64), scene.points[seen]
    if fitted:
        found = geometry.transform(registration.similarity(found, truth), found)
    distance = 100 * np.linalg.norm(found - truth, axis=-1)
    return float(np.sqrt(np.mean(distance**2))), float(np.median(distance)), float(seen.sum() / (scene.depth > 0).sum())
