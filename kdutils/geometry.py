"""The one convention for geometry, and the few functions that every room of the study shares.

Camera poses are camera-to-world, axes are OpenCV's (x right, y down, z forward), lengths are metres, pixel centres
lie at integer + 0.5 (so a centred principal point is W/2, H/2), and a pointmap is an array ``(H, W, 3)``.
"""

import numpy as np


def pixel_grid(height, width):
    """Pixel centres ``(H, W, 2)`` as (u, v), in pixels."""
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.stack([u, v], axis=-1)


def pixel_rays(intrinsics, height, width):
    """Rays ``(H, W, 3)`` through the pixel centres, camera frame, scaled so that z = 1."""
    uv1 = np.concatenate([pixel_grid(height, width), np.ones((height, width, 1))], axis=-1)
    return uv1 @ np.linalg.inv(intrinsics).T


def unproject(depth, intrinsics):
    """Depth along z ``(..., H, W)`` in metres to points ``(..., H, W, 3)`` in the camera frame."""
    return depth[..., None] * pixel_rays(intrinsics, *depth.shape[-2:])


def project(points, intrinsics):
    """Camera-frame points ``(..., 3)`` to pixels ``(..., 2)`` and depth along z ``(...)``; behind the camera is NaN."""
    z = points[..., 2]
    in_front = np.where(z > 0, z, np.nan)
    homogeneous = points @ np.asarray(intrinsics).T
    return homogeneous[..., :2] / in_front[..., None], z


def transform(pose, points):
    """Apply a rigid motion or similarity ``(4, 4)`` to points ``(..., 3)``."""
    return points @ pose[:3, :3].T + pose[:3, 3]


def transform_each(poses, points):
    """Apply P motions ``(P, 4, 4)``, each to its own points ``(P, M, 3)``."""
    return points @ np.swapaxes(poses[:, :3, :3], 1, 2) + poses[:, None, :3, 3]


def invert(pose):
    """Inverse of rigid poses ``(..., 4, 4)``: camera-to-world becomes world-to-camera and back."""
    rotation_t = np.swapaxes(pose[..., :3, :3], -1, -2)
    inverse = np.zeros_like(pose)
    inverse[..., :3, :3] = rotation_t
    inverse[..., :3, 3] = -(rotation_t @ pose[..., :3, 3:])[..., 0]
    inverse[..., 3, 3] = 1
    return inverse


def resize_and_crop(intrinsics, size, new_size):
    """Resize to cover ``new_size``, then crop the centre; the intrinsics follow both.

    Args:
        intrinsics: ``(3, 3)`` of the image of ``size``.
        size, new_size: (height, width) before and after, in pixels.

    Returns:
        The new intrinsics ``(3, 3)``, the size (height, width) after the resize, and the crop's (top, left).
    """
    scale = max(new_size[0] / size[0], new_size[1] / size[1])
    resized = tuple(max(new, round(old * scale)) for old, new in zip(size, new_size))
    top, left = ((r - n) // 2 for r, n in zip(resized, new_size))
    return rescale(intrinsics, size, resized, (top, left)), resized, (top, left)


def rescale(intrinsics, size, resized, corner=(0, 0)):
    """Intrinsics ``(3, 3)`` after a resize from ``size`` to ``resized`` and a crop that begins at ``corner``.

    Args:
        size, resized: (height, width) in pixels; the rounded size, not the ideal scale, is what a library resizes by.
        corner: (top, left) of the crop, in resized pixels.
    """
    new = np.diag([resized[1] / size[1], resized[0] / size[0], 1.0]) @ intrinsics
    new[:2, 2] -= corner[::-1]
    return new


def rotation_angle(rotation):
    """Angle in degrees of rotations ``(..., 3, 3)``, exact for small ones too; a similarity's scale does not matter."""
    off = [rotation[..., 2, 1] - rotation[..., 1, 2], rotation[..., 0, 2] - rotation[..., 2, 0],
           rotation[..., 1, 0] - rotation[..., 0, 1]]  # fmt: skip
    scale = np.linalg.norm(rotation, axis=(-2, -1)) / np.sqrt(3)
    cosine = np.trace(rotation, axis1=-2, axis2=-1) - scale  # both are times 2 and the scale
    return np.degrees(np.arctan2(np.linalg.norm(off, axis=0), cosine))
