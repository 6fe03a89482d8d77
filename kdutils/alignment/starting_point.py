"""Where the joint solution starts: focals, the images' depths up to a factor, and with known poses their scale."""

import numpy as np

from kdutils import geometry
from kdutils.alignment.joint import State, row_median


def focals(sketches, count):
    """Focal length of every image, principal point centred, as DUSt3R's section 3.3 (Weiszfeld's algorithm).

    Of every pair by itself from its view i, then the weighted median of an image's pairs.

    Returns:
        ``(count,)`` in pixels; NaN for images that are view 1 of no pair with sound points.
    """
    height, width = sketches.size
    offset = sketches.pixels - (width / 2, height / 2)
    depth = sketches.points_i[..., 2]
    seen = (sketches.weight_i > 0) & (depth > 0)
    slope = np.where(seen[..., None], sketches.points_i[..., :2] / np.where(seen, depth, 1)[..., None], 0)
    weight = np.where(seen, sketches.weight_i, 0)
    # The inverse is solved for: pixels are exact, points are noisy, and a regression on what is noisy comes out small.
    inverse = np.full(len(sketches), 1.0 / max(sketches.size))
    for _ in range(12):
        distance = np.linalg.norm(slope - inverse[:, None, None] * offset, axis=-1)
        robust = weight / np.maximum(distance, 1e-4)
        product = (robust[..., None] * slope * offset).sum((1, 2))
        inverse = product / np.maximum((robust * (offset**2).sum(-1)).sum(1), 1e-12)
    focal = 1 / np.where(inverse > 0, inverse, np.inf)
    error = row_median(np.linalg.norm(offset - focal[:, None, None] * slope, axis=-1), seen)
    sound = (focal > 0.1 * max(sketches.size)) & (focal < 20 * max(sketches.size)) & np.isfinite(error)
    trust = np.where(sound, 1 / (np.nan_to_num(error) + 0.2) ** 2, 0)
    return np.array([weighted_median(focal[m], trust[m]) for m in members(sketches.pairs[:, 0], count)])


def members(keys, count):
    """For every key below ``count`` where it occurs, in order."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.searchsorted(keys[order], np.arange(1, count)))


def weighted_median(values, weights):
    """The lower weighted median of ``(M,)``; NaN where nothing has weight."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    if not len(total) or not total[-1] > 0:
        return np.nan
    return values[order][np.searchsorted(total, total[-1] / 2)]


def pixel_slopes(intrinsics, pixels):
    """x/z and y/z ``(N, M, 2)`` of the rays through pixels ``(M, 2)`` for intrinsics ``(N, 3, 3)``."""
    uv1 = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
    return (uv1 @ np.swapaxes(np.linalg.inv(intrinsics), 1, 2))[..., :2].astype(np.float32)


def error_of_view_i(sketches, rays):
    """Median distance ``(P,)``, in radians, of view i's points from their own pixels' rays; NaN without points."""
    points, seen = sketches.points_i, sketches.weight_i > 0
    own = np.concatenate([rays, np.ones_like(rays[..., :1])], axis=-1)[sketches.pairs[:, 0]]
    length = np.linalg.norm(points, axis=-1) * np.linalg.norm(own, axis=-1)
    cosine = (points * own).sum(-1) / np.where(length > 0, length, 1)
    sine = np.linalg.norm(np.cross(points, own), axis=-1) / np.where(length > 0, length, 1)
    return row_median(np.arctan2(sine, cosine), seen)


def shapes(log_depths, images, usable, count):
    """Log-depth of every image up to a constant, ``(count, M)``: the median of its predictions, each about its own.

    Args:
        log_depths: ``(Q, M)``, NaN where there is none.
        images: ``(Q,)`` whose they are.
        usable: ``(Q,)`` predictions to believe.

    Returns:
        The shapes, and every prediction's offset ``(Q,)`` from its image's.
    """
    middle = row_median(log_depths, np.isfinite(log_depths))
    around = log_depths - middle[:, None]
    shape = np.full((count, log_depths.shape[1]), np.nan, np.float32)
    for k, mine in enumerate(members(images, count)):
        mine = mine[usable[mine]]
        if len(mine):
            shape[k] = row_median(around[mine].T, np.isfinite(around[mine]).T)
    off = log_depths - shape[images]
    return shape, row_median(off, np.isfinite(off))


def from_known_poses(sketches, rays, poses, usable):
    """First scales from the ray equations of single pairs, the median over each image's pairs.

    Under the known motion t, ``x (a_z + t_z / s) = a_x + t_x / s`` for view j's points a and its rays' slopes x. It is
    solved for 1/s, as a regression on the motion: that is known, the points are noisy, and a regression on what is
    noisy comes out too small.
    """
    i, j = sketches.pairs.T
    count = len(poses)
    shape, offset = shapes(sketches.log_depth_i, i, usable, count)
    relative = geometry.invert(poses[j]) @ poses[i]
    turned = sketches.points_j @ np.swapaxes(relative[:, :3, :3], 1, 2).astype(np.float32)
    distance = np.maximum(np.linalg.norm(turned, axis=-1), 0.1)[..., None]  # of a median distance of 1
    across = (turned[..., :2] - rays[j] * turned[..., 2:]) / distance
    relative = relative.astype(np.float32)
    motion = (relative[:, None, :2, 3] - rays[j] * relative[:, None, 2:3, 3]) / distance
    weight = sketches.weight_j
    for _ in range(8):
        square = (weight[..., None] * motion**2).sum((1, 2))
        inverse = -(weight[..., None] * across * motion).sum((1, 2)) / np.maximum(square, 1e-30)
        error = np.linalg.norm(across + inverse[:, None, None] * motion, axis=-1)
        weight = sketches.weight_j / np.maximum(error, 1e-3)
    trust = np.where(usable & np.isfinite(offset), np.sqrt(square), 0)
    per_image_unit = inverse * np.exp(-np.nan_to_num(offset))
    overall = weighted_median(per_image_unit, trust)
    each = np.array([weighted_median(per_image_unit[m], trust[m]) for m in members(i, count)])
    each = np.where(each > 0.1 * overall, each, overall) if overall > 0 else np.ones(count)
    log_scale = -np.log(each)
    return State(np.array(poses), log_scale[i] - np.nan_to_num(offset), shape + log_scale[:, None].astype(np.float32))
