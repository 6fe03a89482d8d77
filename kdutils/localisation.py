"""Where a camera stands, from the world points that a student predicts for its image, and what that says of the points.

The paper's open question: can the students localise? Each pixel and its predicted point are one correspondence; three
give a pose (P3P), many vote for the best one (PnP inside LO-RANSAC: PoseLib), and all move it to where their rays pass
nearest to their points (``settle``). Every pixel's point then lies on a known ray (``on_rays``).
"""

import importlib.util
import time

import numpy as np
from scipy.spatial.transform import Rotation

from kdutils import geometry
from kdutils.parallel import in_threads

MOST_POINTS = 2000  # correspondences of one image
CERTAIN_SHARE = 0.6  # of the pixels, by the student's uncertainty
INLIER_SHARE = 0.015  # largest reprojection error of an inlier, as a share of the focal length
RANSAC = {"min_iterations": 100, "max_iterations": 1000, "max_prosac_iterations": 1000, "seed": 0}
SETTLING_ROUNDS, SETTLED = 20, 1e-4  # at most; metres and radians
TYPICAL = 0.25  # quantile of the squared distances from the rays from which on points count less
BANDS = {"within_5cm_5deg": (0.05, 5.0), "within_2cm_2deg": (0.02, 2.0)}  # metres, degrees
FIGURES = ("translation", "rotation", *BANDS)


def available():
    """Whether PoseLib is installed; everything else works without it."""
    return importlib.util.find_spec("poselib") is not None


def locate(points, intrinsics, mask=None, log_scale=None):
    """Camera-to-world pose of one image from the world points of its pixels.

    Args:
        points: ``(H, W, 3)`` in metres. intrinsics: ``(3, 3)``. mask: ``(H, W)`` bool, pixels that may be used.
        log_scale: ``(H, W)`` logarithm of the points' uncertainty: only the surest pixels vote, and the surer the
            earlier they are drawn (PROSAC).

    Returns:
        ``(4, 4)``, or None where no pose was found.
    """
    import poselib

    rows, columns = _correspondences(points, mask, log_scale)
    if len(rows) < 4:
        return None
    pixels, chosen = np.stack([columns, rows], -1) + 0.5, points[rows, columns].astype(np.float64)
    camera = {"model": "PINHOLE", "width": points.shape[1], "height": points.shape[0],
              "params": [intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]]}  # fmt: skip
    threshold = INLIER_SHARE * intrinsics[0, 0]
    ransac = {"max_reproj_error": threshold, "progressive_sampling": log_scale is not None, **RANSAC}
    pose, found = poselib.estimate_absolute_pose(pixels, chosen, camera, ransac,
                                                 {"loss_type": "CAUCHY", "loss_scale": threshold / 4})  # fmt: skip
    inliers = np.asarray(found["inliers"], bool)
    if inliers.sum() < 4:
        return None
    world_to_camera = np.eye(4)
    world_to_camera[:3] = pose.Rt
    return np.linalg.inv(world_to_camera)


def settle(pose, points, intrinsics, mask=None, log_scale=None):
    """The pose near ``pose`` whose rays pass nearest to the points.

    A point that is off by as much in all directions is likeliest under the pose that makes its distance from its ray
    small in metres (the object-space error of Lu, Hager, Mjolsness, PAMI 2000). PnP counts pixels, and the same error
    is more pixels at a near point. Points far off their rays count less (Cauchy); it takes a majority that is right.

    Args:
        pose: ``(4, 4)`` camera-to-world, as from ``locate``. points: ``(H, W, 3)``, world, metres; ``MOST_POINTS`` of
            them count, spread evenly over the image. intrinsics, mask: as in ``locate``.
        log_scale: ``(H, W)`` logarithm of the points' uncertainty: each counts by the inverse of its square.
    """
    rows, columns = _correspondences(points, mask)
    chosen, pose = points[rows, columns].astype(np.float64), pose.copy()
    rays = _unit(geometry.pixel_rays(intrinsics, *points.shape[:2])[rows, columns])
    precision = 1.0 if log_scale is None else np.exp(-2 * log_scale[rows, columns].astype(np.float64))
    for _ in range(SETTLING_ROUNDS):  # Gauss-Newton with the weights of the round before
        along = rays @ pose[:3, :3].T
        seen = chosen - pose[:3, 3]
        depth = (seen * along).sum(-1)
        off = seen - depth[:, None] * along
        error = precision * (off**2).sum(-1)
        weight = precision / (1 + error / max(np.quantile(error, TYPICAL), 1e-12))
        # Moving the camera takes (I - a a^T) from ``off``, turning it adds depth [a]x: their products, summed up.
        moving, turning = (each.sum() * np.eye(3) - along.T * each @ along for each in (weight, weight * depth**2))
        both = np.cross(weight * depth @ along, np.eye(3))
        pull = np.concatenate([weight @ off, weight * depth @ np.cross(along, off)])
        step = np.linalg.lstsq(np.block([[moving, both], [both.T, turning]]), pull)[0]
        pose[:3, 3] += step[:3]
        pose[:3, :3] = Rotation.from_rotvec(step[3:]).as_matrix() @ pose[:3, :3]
        if np.abs(step).max() < SETTLED:
            break
    return pose


def on_rays(points, poses, intrinsics):
    """Points moved to the nearest places on their pixels' rays.

    A point lies on its pixel's ray, so this takes away its error across the ray: under the right pose two thirds of a
    squared error that is alike in all directions.

    Args:
        points: ``(N, H, W, 3)``, world, metres. poses: ``(N, 4, 4)`` camera-to-world; images without one (NaN) stay as
            they are. intrinsics: ``(3, 3)`` or ``(N, 3, 3)``.
    """
    moved, intrinsics = points.copy(), np.broadcast_to(intrinsics, (len(points), 3, 3))
    for number in np.flatnonzero(np.isfinite(poses).all((1, 2))):
        rays = _unit(geometry.pixel_rays(intrinsics[number], *points.shape[1:3]))
        along, centre = rays @ poses[number, :3, :3].T, poses[number, :3, 3]
        depth = ((points[number] - centre) * along).sum(-1, keepdims=True)
        moved[number] = centre + np.maximum(depth, 0) * along
    return moved


def _unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def locate_all(points, intrinsics, masks=None, log_scales=None):
    """Settled poses ``(N, 4, 4)`` of images ``(N, H, W, 3)``, NaN where there is none, and milliseconds an image.

    ``intrinsics`` are ``(3, 3)`` or ``(N, 3, 3)``.
    """
    intrinsics, poses = np.broadcast_to(intrinsics, (len(points), 3, 3)), np.full((len(points), 4, 4), np.nan)

    def place(number):
        started = time.perf_counter()
        mask, log_scale = (None if each is None else each[number] for each in (masks, log_scales))
        pose = locate(points[number], intrinsics[number], mask, log_scale)
        if pose is not None:
            poses[number] = settle(pose, points[number], intrinsics[number], mask, log_scale)
        return time.perf_counter() - started

    seconds = sum(in_threads(place, range(len(points))))
    return poses, 1000 * seconds / max(1, len(points))


def pose_errors(poses, truth):
    """How far camera-to-world ``poses (N, 4, 4)`` lie from the true ones; a pose that was not found is infinitely far.

    Returns:
        A dict: medians ``translation`` in metres and ``rotation`` in degrees, and the shares of images that lie
        ``within_5cm_5deg`` and ``within_2cm_2deg``.
    """
    translation = np.linalg.norm(poses[:, :3, 3] - truth[:, :3, 3], axis=-1)
    rotation = geometry.rotation_angle(poses[:, :3, :3].swapaxes(1, 2) @ truth[:, :3, :3])
    translation, rotation = (np.where(np.isfinite(error), error, np.inf) for error in (translation, rotation))
    shares = [np.mean((translation <= metres) & (rotation <= degrees)) for metres, degrees in BANDS.values()]
    return dict(zip(FIGURES, map(float, (np.median(translation), np.median(rotation), *shares))))


def _correspondences(points, mask=None, log_scale=None):
    """Rows and columns of pixels that have a point, thinned evenly; by their uncertainty the surest alone, in order."""
    rows, columns = np.nonzero(np.isfinite(points).all(-1) & (True if mask is None else mask))
    if log_scale is None:
        chosen = np.linspace(0, len(rows) - 1, min(len(rows), MOST_POINTS)).astype(int)
    else:
        surest = np.argsort(log_scale[rows, columns], kind="stable")[: max(4, int(CERTAIN_SHARE * len(rows)))]
        chosen = surest[np.linspace(0, len(surest) - 1, min(len(surest), MOST_POINTS)).astype(int)]
    return rows[chosen], columns[chosen]
