"""Pair predictions brought into one metric world, through known camera poses and intrinsics.

Every pair's prediction has a scale of its own. All predictions whose first view is image i share that camera's frame,
so their depths of image i differ by a factor only, read off as a median ratio. What remains is one scale an image:
the other views' points must fall on their own pixels' rays under the known relative poses, which is linear in it.
Fused, every pixel's depth is the confidence-weighted mean of what all pairs say of it.
"""

from dataclasses import dataclass, field

import numpy as np

from kdutils import geometry
from kdutils.teachers import PairPointmaps

MOST_SPREAD = 0.25  # a pair whose depths disagree by more than this (median, relative) with its siblings is rejected
LEAST_PARALLAX = 0.002  # metres of mean sideways motion, below which a scale cannot be read off


@dataclass
class Alignment:
    """One world for a scene's N images; lengths in metres, world frame of the given poses."""

    depth: np.ndarray  # (N, H, W) along z
    confidence: np.ndarray  # (N, H, W), at least 1: the geometric mean of the pairs'
    poses: np.ndarray  # (N, 4, 4) camera-to-world
    intrinsics: np.ndarray  # (N, 3, 3)
    pair_scales: np.ndarray  # (P,) metres per unit of the pair; NaN where rejected
    rejected_pairs: dict  # index of the pair -> reason
    report: dict = field(default_factory=dict)

    @property
    def valid(self):
        """Pixels ``(N, H, W)`` that at least one confident prediction reaches."""
        return (self.confidence > 1) & (self.depth > 0)

    @property
    def points(self):
        """World pointmaps ``(N, H, W, 3)``."""
        return world_points(self.depth, self.intrinsics, self.poses)


def world_points(depth, intrinsics, poses):
    """Depths ``(N, H, W)`` to world points ``(N, H, W, 3)`` on the pixels' rays."""
    return np.stack(
        [geometry.transform(pose, geometry.unproject(d, k)) for d, k, pose in zip(depth, intrinsics, poses)]
    ).astype(np.float32)


def align(pairs, pts_i, pts_j, conf_i, conf_j, intrinsics, poses):
    """Align pair predictions given as arrays; see ``align_shards``.

    Args:
        pairs: ``(P, 2)`` directed pairs of image indices.
        pts_i, pts_j: ``(P, H, W, 3)`` points of both views in view i's frame, scale free.
        conf_i, conf_j: ``(P, H, W)`` confidences, at least 1.
        intrinsics: ``(3, 3)`` or ``(N, 3, 3)``.
        poses: ``(N, 4, 4)`` camera-to-world.
    """
    return align_shards([PairPointmaps(np.asarray(pairs), pts_i, pts_j, conf_i, conf_j)], intrinsics, poses)


def align_shards(shards, intrinsics, poses, progress=None):
    """Align pair predictions that stream from disk; memory grows with images, not pairs.

    Args:
        shards: re-iterable of ``PairPointmaps``; read twice.
        intrinsics: ``(3, 3)`` or ``(N, 3, 3)``.
        poses: ``(N, 4, 4)`` camera-to-world, metres.
        progress: called with the shards, e.g. ``tqdm``.

    Raises:
        ValueError: a pose is not finite, or there are no pairs.
    """
    poses = np.asarray(poses, dtype=np.float64)
    if not np.isfinite(poses).all():
        raise ValueError("a camera pose is not finite: leave such frames out before the alignment")
    intrinsics = np.broadcast_to(np.asarray(intrinsics, dtype=np.float64), (len(poses), 3, 3))
    follow = progress or (lambda iterable: iterable)
    scales = _Scales(intrinsics, poses)
    for shard in follow(shards):
        for pair in zip(*shard):
            scales.add(*pair)
    if not scales.ratios:
        raise ValueError("no pairs to align")
    pair_scales = scales.solve()
    fusion = _Fusion(intrinsics, poses, scales.reference.shape)
    at = 0
    for shard in follow(shards):
        for pair in zip(*shard):
            if np.isfinite(pair_scales[at]):
                fusion.add(pair_scales[at], *pair)
            at += 1
    depth, confidence = fusion.result()
    aligned = Alignment(depth, confidence, poses, intrinsics, pair_scales, scales.rejected)
    aligned.report = _report(aligned, scales.residuals)
    return aligned


class _Scales:
    """First pass: each pair's ratio to its first image's reference depth, and one scale an image."""

    def __init__(self, intrinsics, poses):
        self.poses, self.intrinsics = poses, intrinsics
        self.reference = self.rays = None
        self.seen = np.zeros(len(poses), dtype=bool)
        self.images, self.ratios, self.products, self.squares, self.parallax = [], [], [], [], []
        self.rejected, self.residuals = {}, np.array([])

    def add(self, pair, pts_i, pts_j, conf_i, conf_j):
        if self.reference is None:
            self.reference = np.ones((len(self.poses), *conf_i.shape), dtype=np.float32)
        i, j = pair
        number = len(self.ratios)
        ratio = self._ratio_to_reference(number, i, pts_i[..., 2], np.log(conf_i))
        product, square, parallax = _ray_equation(
            pts_j, np.log(conf_j), self.intrinsics[j], geometry.invert(self.poses[j]) @ self.poses[i]
        )
        self.images.append(i)
        self.ratios.append(ratio)
        # In the unit of image i's reference the pair's points are divided by its ratio.
        self.products.append(product / ratio)
        self.squares.append(square)
        self.parallax.append(parallax)

    def _ratio_to_reference(self, number, i, depth, weight):
        confident = (weight > 0) & (depth > 0)
        if not self.seen[i] and confident.any():
            self.reference[i] = np.where(confident, depth, 0)
            self.seen[i] = True
            return 1.0
        both = confident & (self.reference[i] > 0) & self.seen[i]
        if not both.any():
            self.rejected[number] = "no confident pixel in view 1"
            return np.nan
        ratios = depth[both] / self.reference[i][both]
        ratio = float(np.median(ratios))
        if np.median(np.abs(ratios / ratio - 1)) > MOST_SPREAD:
            self.rejected[number] = "its depths contradict the other pairs'"
            return np.nan
        return ratio

    def solve(self):
        """Metres per unit of each pair ``(P,)``; NaN where rejected."""
        images, ratios = np.array(self.images), np.array(self.ratios)
        good = np.isfinite(ratios)

        def per_image(values):
            return np.bincount(images[good], np.array(values)[good], len(self.poses))

        with np.errstate(divide="ignore", invalid="ignore"):
            image_scales = per_image(self.squares) / per_image(self.products)
        still = per_image(self.parallax) <= LEAST_PARALLAX * np.bincount(images[good], minlength=len(self.poses))
        image_scales[still | ~(image_scales > 0)] = np.nan
        for number in np.flatnonzero(good & ~np.isfinite(image_scales[images])):
            self.rejected[int(number)] = "too little camera motion in the pairs of its first image to read off a scale"
        with np.errstate(divide="ignore", invalid="ignore"):
            own = np.array(self.squares) / np.array(self.products)
            residuals = np.abs(own / image_scales[images] - 1)
        self.residuals = residuals[np.isfinite(residuals)]
        return image_scales[images] / ratios


def _ray_equation(points, weight, intrinsics, j_from_i):
    """Normal equation of the scale s for which s·points lie on view j's pixel rays, and the parallax behind it.

    For a unit ray r, points a = R·points and the motion t, ``r x (s a + t)`` must vanish. It is solved for 1/s, as a
    regression of ``r x a`` on ``r x t``: the motion is known, the points are noisy, and a regression on what is noisy
    comes out too small.
    """
    rays = geometry.pixel_rays(intrinsics, *weight.shape)
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    turned = points @ j_from_i[:3, :3].T
    across = np.cross(rays, turned)
    motion = np.cross(rays, j_from_i[:3, 3])
    weight = weight / max(weight.sum(), 1e-9)
    product = -np.sum(weight[..., None] * across * motion)
    square = np.sum(weight[..., None] * motion**2)
    parallax = np.sum(weight * np.linalg.norm(motion, axis=-1))
    return product, square, parallax


class _Fusion:
    """Second pass: the confidence-weighted mean depth of every pixel."""

    def __init__(self, intrinsics, poses, shape):
        self.intrinsics, self.poses = intrinsics, poses
        self.weighted, self.weights = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.count = np.zeros(len(poses))

    def add(self, scale, pair, pts_i, pts_j, conf_i, conf_j):
        i, j = pair
        j_from_i = geometry.invert(self.poses[j]) @ self.poses[i]
        self._add(i, scale * pts_i[..., 2], conf_i)
        self._add(j, scale * (pts_j @ j_from_i[2, :3]) + j_from_i[2, 3], conf_j)

    def _add(self, image, depth, confidence):
        weight = np.where(depth > 0, np.log(confidence), 0)
        self.weighted[image] += weight * depth
        self.weights[image] += weight
        self.count[image] += 1

    def result(self):
        depth = self.weighted / np.maximum(self.weights, 1e-9)
        confidence = np.exp(self.weights / np.maximum(self.count, 1)[:, None, None])
        return depth, confidence


def _report(aligned, residuals):
    valid = aligned.valid
    lost = [int(i) for i in np.flatnonzero(~valid.any(axis=(1, 2)))]
    return {
        "images": len(valid),
        "images_without_labels": lost,
        "pairs": len(aligned.pair_scales),
        "rejected_pairs": {str(k): reason for k, reason in aligned.rejected_pairs.items()},
        "valid_share": float(valid.mean()),
        "pair_scale_spread_median": float(np.median(residuals)) if residuals.size else None,
    }
