"""Where a camera stands, from the world points that a student predicts for its image: PnP inside LO-RANSAC (PoseLib).

The paper's open question: can the students localise? Each pixel and its predicted point are one correspondence; three
give a pose (P3P), many vote for the best one, and all that agree refine it.
"""

import importlib.util
import time

import numpy as np

from kdutils import geometry
from kdutils.parallel import in_threads

MOST_POINTS = 2000  # correspondences of one image
CERTAIN_SHARE = 0.6  # of the pixels, by the student's uncertainty
INLIER_SHARE = 0.015  # largest reprojection error of an inlier, as a share of the focal length
RANSAC = {"min_iterations": 100, "max_iterations": 1000, "max_prosac_iterations": 1000, "seed": 0}
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

    pixels, chosen = _correspondences(points, mask, log_scale)
    if len(pixels) < 4:
        return None
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


def locate_all(points, intrinsics, masks=None, log_scales=None):
    """``locate`` for images ``(N, H, W, 3)``: poses ``(N, 4, 4)``, NaN where there is none, and milliseconds an image.

    ``intrinsics`` are ``(3, 3)`` or ``(N, 3, 3)``.
    """
    intrinsics, poses = np.broadcast_to(intrinsics, (len(points), 3, 3)), np.full((len(points), 4, 4), np.nan)

    def place(number):
        started = time.perf_counter()
        mask = None if masks is None else masks[number]
        pose = locate(points[number], intrinsics[number], mask, None if log_scales is None else log_scales[number])
        poses[number] = np.nan if pose is None else pose
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


def _correspondences(points, mask, log_scale):
    """Pixel centres ``(M, 2)`` and points ``(M, 3)``, thinned evenly, the surest first."""
    height, width = points.shape[:2]
    rows, columns = np.nonzero(np.isfinite(points).all(-1) & (True if mask is None else mask))
    if log_scale is None:
        chosen = np.linspace(0, len(rows) - 1, min(len(rows), MOST_POINTS)).astype(int)
    else:
        surest = np.argsort(log_scale[rows, columns], kind="stable")[: max(4, int(CERTAIN_SHARE * len(rows)))]
        chosen = surest[np.linspace(0, len(surest) - 1, min(len(surest), MOST_POINTS)).astype(int)]
    rows, columns = rows[chosen], columns[chosen]
    return np.stack([columns, rows], -1) + 0.5, points[rows, columns].astype(np.float64)
