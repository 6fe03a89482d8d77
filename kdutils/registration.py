"""Closed-form registration of two point sets: similarity, rigid motion or scale alone, weighted, and against outliers.

All return ``(..., 4, 4)`` transforms that take ``source`` to ``target`` (``geometry.transform`` applies them). Leading
dimensions are problems of their own, solved together.
"""

import numpy as np

from kdutils import geometry

MINIMUM = {"similarity": 3, "rigid": 3, "scale": 1}  # points that determine a transform


def similarity(source, target, weights=None, scaled=True):
    """Least-squares scale, rotation and translation (Umeyama, PAMI 1991, equations 40 to 43).

    Args:
        source, target: ``(..., M, 3)`` corresponding points.
        weights: ``(..., M)``, not negative; all alike by default.
        scaled: whether the scale is free; otherwise it is 1 (Kabsch).
    """
    source, target, weights = _checked(source, target, weights)
    total = np.maximum(weights.sum(-1), 1e-30)[..., None]
    centre_s, centre_t = ((weights[..., None] * p).sum(-2) / total for p in (source, target))
    around_s, around_t = source - centre_s[..., None, :], target - centre_t[..., None, :]
    covariance = np.swapaxes(weights[..., None] * around_t, -1, -2) @ around_s / total[..., None]
    u, spread, vt = np.linalg.svd(covariance)
    # The last axis is turned round where the best orthogonal matrix would be a reflection.
    sign = np.ones(spread.shape)
    sign[..., 2] = np.where(np.linalg.det(u) * np.linalg.det(vt) < 0, -1, 1)
    rotation = (u * sign[..., None, :]) @ vt
    variance = (weights * (around_s**2).sum(-1)).sum(-1) / total[..., 0]
    extended = variance > 0  # one point, or none with weight, leaves the scale open: 1
    scale = np.where(extended & scaled, (spread * sign).sum(-1) / np.where(extended, variance, 1), 1.0)
    return _matrix(scale, rotation, centre_t - scale[..., None] * (rotation @ centre_s[..., None])[..., 0])


def rigid(source, target, weights=None):
    """Least-squares rotation and translation; arguments as in ``similarity``."""
    return similarity(source, target, weights, scaled=False)


def scale(source, target, weights=None):
    """Least-squares scale about the origin; arguments as in ``similarity``."""
    source, target, weights = _checked(source, target, weights)
    product = (weights[..., None] * source * target).sum((-1, -2))
    factor = product / np.maximum((weights[..., None] * source**2).sum((-1, -2)), 1e-300)
    return _matrix(factor, np.eye(3), np.zeros((*factor.shape, 3)))


def ransac(source, target, threshold, kind="similarity", weights=None, rounds=200, seed=0):
    """The transform that most points agree with, fitted to those (RANSAC, Fischler and Bolles 1981).

    Args:
        source, target: ``(M, 3)``; points that are not finite count as outliers.
        threshold: distance in the target's unit within which a point agrees.
        kind: ``similarity``, ``rigid`` or ``scale``.
        weights: ``(M,)``; points without weight are neither drawn nor counted.
        rounds: minimal samples drawn, all from ``seed``.

    Returns:
        The transform ``(4, 4)`` and the points that agree ``(M,)``, bool.

    Raises:
        ValueError: fewer usable points than determine the transform, or an unknown kind.
    """
    if kind not in MINIMUM:
        raise ValueError(f"unknown kind of registration {kind!r}: use one of {', '.join(MINIMUM)}")
    fit = {"similarity": similarity, "rigid": rigid, "scale": scale}[kind]
    source, target, weights = _checked(source, target, weights)
    finite = np.isfinite(source).all(-1) & np.isfinite(target).all(-1)
    usable = np.flatnonzero(finite & (weights > 0))
    if len(usable) < MINIMUM[kind]:
        raise ValueError(f"{len(usable)} usable points do not determine a {kind}: it takes {MINIMUM[kind]}")
    source, target = (np.where(finite[:, None], p, 0) for p in (source, target))
    weights = np.where(finite, weights, 0)
    rng = np.random.default_rng(seed)
    samples = usable[rng.random((rounds, len(usable))).argsort(axis=1)[:, : MINIMUM[kind]]]
    inliers = _agreeing(fit(source[samples], target[samples]), source, target, threshold) & (weights > 0)
    inliers = inliers[np.argmax((inliers * weights).sum(-1))]
    for _ in range(3):  # fitted to all that agree, more may agree
        if inliers.sum() < MINIMUM[kind]:
            break
        transform = fit(source, target, weights * inliers)
        inliers = _agreeing(transform[None], source, target, threshold)[0] & (weights > 0)
    else:
        return transform, inliers
    return fit(source, target, weights), np.zeros(len(source), bool)


def _agreeing(transforms, source, target, threshold):
    moved = source @ np.swapaxes(transforms[:, :3, :3], -1, -2) + transforms[:, None, :3, 3]
    return np.linalg.norm(moved - target, axis=-1) <= threshold


def _checked(source, target, weights):
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.shape != target.shape or source.shape[-1:] != (3,):
        raise ValueError(f"points to register must both be (..., M, 3), not {source.shape} and {target.shape}")
    weights = np.ones(source.shape[:-1]) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != source.shape[:-1]:
        raise ValueError(f"weights must be {source.shape[:-1]}, one a point, not {weights.shape}")
    return source, target, weights


def _matrix(scale, rotation, translation):
    matrix = np.zeros((*scale.shape, 4, 4))
    matrix[..., :3, :3] = scale[..., None, None] * rotation
    matrix[..., :3, 3] = translation
    matrix[..., 3, 3] = 1
    return matrix


def decompose(transform):
    """Scale ``(...)``, rotation ``(..., 3, 3)`` and translation ``(..., 3)`` of similarities ``(..., 4, 4)``."""
    scale = np.cbrt(np.linalg.det(transform[..., :3, :3]))
    return scale, transform[..., :3, :3] / scale[..., None, None], transform[..., :3, 3]


def move_poses(transform, poses):
    """Camera poses ``(..., 4, 4)`` in the world that a similarity ``(4, 4)`` leads to: still rigid, lengths scaled."""
    scale, rotation, _ = decompose(np.asarray(transform))
    moved = np.array(poses, dtype=np.float64)
    moved[..., :3, :3] = rotation @ moved[..., :3, :3]
    moved[..., :3, 3] = geometry.transform(transform, np.asarray(poses)[..., :3, 3])
    return moved
