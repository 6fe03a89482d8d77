"""Scales, depths and, if they are not known, poses of all images from all pairs at once, robustly, on the sketches.

Every sampled pixel of a pair (i, j) gives four residuals. View j's point, taken into camera j, has to fall on its
pixel's ray (two) and at the depth that image j has there; view i's has to lie at image i's depth. Iteratively
reweighted Gauss-Newton over one log-scale a pair, one log-depth shift an image and, where wanted, six of a pose; the
coarse depths themselves are refreshed between the steps. A pair's scale occurs in its own residuals only and is
eliminated, so what is factored is sparse and grows with the images.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu
from scipy.spatial.transform import Rotation

from kdutils import geometry

ROUNDS, FINAL_ROUNDS = 12, 4  # at most
SETTLED = 3e-4  # a step below this is the last of its kind: shares of a scale, radians
LEAST_RAY_NOISE, LEAST_DEPTH_NOISE = 5e-4, 1e-3  # half precision's: radians, and share of the depth
KERNEL = 3.0  # residuals beyond so many deviations hardly count
MOST_RAY_ERROR = 0.1  # radians: a pair whose median error is larger than this and than MOST_TIMES the scene's is wrong
MOST_DEPTH_ERROR = 0.15  # the same for its log-depths' disagreement with the other pairs'
MOST_TIMES = 5.0
BLOCK = 512  # pairs whose derivatives are held at once
INDEPENDENT = 20  # pixels of a pair whose errors count as independent of each other: predictions' errors are smooth
BEHIND = 10.0  # a residual for points behind the camera


@dataclass
class State:
    """What is solved for; lengths in the world's unit."""

    poses: np.ndarray  # (N, 4, 4) camera-to-world
    log_scale: np.ndarray  # (P,) of world units per unit of the pair's sketch
    log_depth: np.ndarray  # (N, M) of every sampled pixel; NaN where no pair says anything
    ray_noise: float = 0.0  # deviation of the points from their rays, radians
    depth_noise: float = 0.0  # deviation of a prediction from the others, as a share of the depth
    rejected: dict = field(default_factory=dict)  # pair -> reason
    ray_error: np.ndarray = None  # (P,) median of view j's points from their rays, radians
    depth_error: np.ndarray = None  # (P,) median disagreement with the images' log-depths


def solve(sketches, rays, state, ray_error_i, free_poses):
    """Refine a state, and tell the pairs that fit no other.

    Args:
        sketches: ``Sketches``.
        rays: ``(N, M, 2)`` the sampled pixels' x/z and y/z in every image.
        state: where to start; its ``log_depth`` may be NaN, its poses may not.
        ray_error_i: ``(P,)`` median distance of view i's points from their own rays, radians.
        free_poses: whether the poses are refined too.
    """
    for rounds, final in ((ROUNDS, False), (FINAL_ROUNDS, True)):
        for step in range(rounds):
            residuals = _agree(sketches, rays, state, ray_error_i, by_median=step < (1 if final else rounds // 2))
            trust = _trust(state, ray_error_i)
            if final:
                state.rejected = reject(state, ray_error_i)
                trust[list(state.rejected)] = 0
            change = _gauss_newton(sketches, rays, state, residuals, trust, free_poses)
            if change < SETTLED and step > 2:
                break
    _agree(sketches, rays, state, ray_error_i, by_median=False)
    state.rejected = reject(state, ray_error_i)
    return state


def _agree(sketches, rays, state, ray_error_i, by_median):
    """Refresh the depths that the images' predictions agree on, and how far the pairs are from them."""
    residuals = _residuals(sketches, rays, state)
    predicted, weight = _predictions(sketches, residuals, state, ray_error_i)
    state.log_depth = consensus(sketches.pairs, predicted, weight, state, by_median)
    _measure(sketches, residuals, predicted, state)
    return residuals


def reject(state, ray_error_i):
    """Pairs that are wrong altogether: index -> reason."""
    tests = (
        (ray_error_i, MOST_RAY_ERROR, "the points of its view 1 do not lie on that camera's rays"),
        (state.ray_error, MOST_RAY_ERROR, "the points of its view 2 do not lie on that camera's rays"),
        (state.depth_error, MOST_DEPTH_ERROR, "its depths contradict the other pairs'"),
    )
    reasons = {}
    for error, least, reason in tests:
        reasons |= {int(p): reason for p in np.flatnonzero(error > limit(error, least)) if int(p) not in reasons}
    return reasons


def limit(error, least):
    """The largest of the errors ``(P,)`` to accept: ``least``, or several times the scene's median if that is more."""
    return max(least, MOST_TIMES * _median(error[np.isfinite(error)]))


def row_median(values, mask):
    """Median of the masked values of every row ``(P, M)``, the lower one of two; NaN where there are none."""
    ordered = np.sort(np.where(mask, values, np.inf), axis=1)
    count = mask.sum(1)
    return np.where(count > 0, ordered[np.arange(len(values)), np.maximum(count - 1, 0) // 2], np.nan)


def consensus(pairs, predicted, weight, state, by_median):
    """Log-depths ``(N, M)`` that an image's predictions agree on: their median, or a robust mean near the last one."""
    images = np.concatenate([pairs[:, 0], pairs[:, 1]])
    count = len(state.poses)
    if by_median:
        agreed = np.full((count, predicted.shape[1]), np.nan, np.float32)
        order = np.argsort(images, kind="stable")
        starts = np.searchsorted(images[order], np.arange(count + 1))
        for k in np.flatnonzero(np.diff(starts)):
            mine = order[starts[k] : starts[k + 1]]
            agreed[k] = row_median(predicted[mine].T, weight[mine].T > 0)
        return agreed
    with np.errstate(invalid="ignore"):
        off = (predicted - state.log_depth[images]) / max(state.depth_noise, LEAST_DEPTH_NOISE)
    weight = np.where(np.isfinite(off), weight * kernel(off), 0)
    ones = np.ones(len(images), np.float32)
    gather = sparse.csr_array((ones, (images, np.arange(len(images)))), (count, len(images)))
    total = gather @ weight
    with np.errstate(invalid="ignore"):
        agreed = gather @ (weight * np.where(weight > 0, predicted, 0)) / np.where(total > 0, total, np.nan)
    return np.where(np.isfinite(agreed), agreed, state.log_depth)


def scale_evidence(sketches, rays, state):
    """What each pair's rays alone tell of its scale: evidence ``(P,)`` and log-scale less the joint one's ``(P,)``.

    Evidence is 1 over the logarithm's variance, by parallax and noise.
    """
    i, j = sketches.pairs.T
    relative = geometry.invert(state.poses[j]) @ state.poses[i]
    off, depth, front = _residuals(sketches, rays, state)
    parallax = (relative[:, None, :2, 3] - rays[j] * relative[:, None, 2:3, 3]) / depth[..., None]
    seen = (sketches.weight_j > 0) & front
    square = np.where(seen, (parallax**2).sum(-1), 0)
    near = seen * kernel(np.hypot(off[..., 0], off[..., 1]) / state.ray_noise)
    shift = (near * (parallax * off).sum(-1)).sum(1) / np.maximum((near * square).sum(1), 1e-30)
    return INDEPENDENT * square.sum(1) / np.maximum(seen.sum(1), 1) / state.ray_noise**2, shift


def kernel(deviations):
    """Weight of a residual in units of its deviation (Geman and McClure): gross ones lose all theirs."""
    return 1 / (1 + np.clip(deviations / KERNEL, -1e3, 1e3) ** 2) ** 2


def _residuals(sketches, rays, state):
    """View j's points in camera j: off the ray ``(P, M, 2)``, depth ``(P, M)``, whether in front ``(P, M)``."""
    i, j = sketches.pairs.T
    relative = geometry.invert(state.poses[j]) @ state.poses[i]
    relative[:, :3, :3] *= np.exp(state.log_scale)[:, None, None]
    points = geometry.transform_each(relative.astype(np.float32), sketches.points_j)
    front = points[..., 2] > 1e-2 * np.sqrt((points**2).sum(-1))
    z = np.where(front, points[..., 2], np.float32(1))
    off = np.where(front[..., None], points[..., :2] / z[..., None] - rays[j], np.float32(BEHIND))
    return off, z, front


def _predictions(sketches, residuals, state, ray_error_i):
    """Log-depths that all pairs predict ``(2P, M)``, views i then views j, and their weights."""
    off, z, front = residuals
    own = sketches.log_depth_i + state.log_scale[:, None].astype(np.float32)
    log_z = np.where(front, np.log(z), np.float32(np.nan))
    distance = np.hypot(off[..., 0], off[..., 1])
    near = kernel(distance / _deviation(distance[front & (sketches.weight_j > 0)], LEAST_RAY_NOISE, 1.1774))
    sound = np.ones(len(own))
    sound[list(state.rejected) or ray_error_i > limit(ray_error_i, MOST_RAY_ERROR)] = 0
    weights = [np.where(np.isfinite(own), sketches.weight_i, 0), np.where(front, sketches.weight_j * near, 0)]
    return np.concatenate([own, log_z]), np.concatenate(weights) * np.tile(sound, 2)[:, None].astype(np.float32)


def _measure(sketches, residuals, predicted, state):
    """The errors of every pair, and from them the noise of the scene."""
    off, _, front = residuals
    i, j = sketches.pairs.T
    has_j = sketches.weight_j > 0
    distance = np.hypot(off[..., 0], off[..., 1])
    state.ray_error = row_median(distance, has_j)
    disagreement = np.abs(predicted - state.log_depth[np.concatenate([i, j])])
    count = len(i)
    errors = [row_median(d, np.isfinite(d)) for d in (disagreement[:count], disagreement[count:])]
    state.depth_error = np.fmax(*errors)
    good = np.ones(count, bool)
    good[list(reject(state, np.zeros(count)))] = False
    state.ray_noise = _deviation(distance[good][has_j[good]], LEAST_RAY_NOISE, 1.1774)
    both = disagreement[np.concatenate([good, good])]
    state.depth_noise = _deviation(both[np.isfinite(both)], LEAST_DEPTH_NOISE, 0.6745)


def _trust(state, ray_error_i):
    """Soft weight ``(P,)`` of whole pairs, so that one which looks wrong at first can come back."""
    trust = np.ones(len(state.log_scale))
    rays, depths = MOST_RAY_ERROR, MOST_DEPTH_ERROR
    for error, least in ((ray_error_i, rays), (state.ray_error, rays), (state.depth_error, depths)):
        trust *= 1 / (1 + (np.nan_to_num(error) / limit(error, least)) ** 4)
    return trust


def _gauss_newton(sketches, rays, state, residuals, trust, free_poses):
    """One step, and its size; the log-scale of each pair is eliminated (Schur complement) and found last."""
    i, j = sketches.pairs.T
    count = len(state.poses)
    width = 7 if free_poses else 1  # an image's unknowns: (rotation, translation,) log-depth shift
    blocks = [_normal(sketches.select(part), rays, state, [r[part] for r in residuals], trust[part], part, free_poses)
              for part in (slice(k, k + BLOCK) for k in range(0, len(i), BLOCK))]  # fmt: skip
    hessian, gradient, cross, own, own_gradient = (np.concatenate(column) for column in zip(*blocks))
    own = np.maximum(own, 1e-9)
    reduced = hessian - cross[:, :, None] * cross[:, None, :] / own[:, None, None]
    reduced_gradient = gradient - cross * (own_gradient / own)[:, None]
    index = np.concatenate([width * i[:, None] + np.arange(width), width * j[:, None] + np.arange(width)], axis=1)
    rows, columns = np.broadcast_arrays(index[:, :, None], index[:, None, :])
    matrix = sparse.coo_array((reduced.ravel(), (rows.ravel(), columns.ravel())), (width * count, width * count))
    right = np.bincount(index.ravel(), reduced_gradient.ravel(), width * count)
    # The world's own frame and unit are free: a little damping picks the step that leaves them alone.
    diagonal = matrix.diagonal()
    damping = 1e-7 * diagonal + 1e-9 * max(diagonal.max(), 1e-30)
    step = splu((matrix.tocsc() + sparse.diags_array(damping)).tocsc()).solve(-right).reshape(count, width)
    change = -(own_gradient + (cross * step[sketches.pairs].reshape(len(i), -1)).sum(1)) / own
    state.log_scale = state.log_scale + np.clip(change, -1, 1)
    state.log_depth = state.log_depth + np.clip(step[:, -1:], -1, 1).astype(np.float32)
    if free_poses:
        state.poses = moved(state.poses, step[:, :6])
    return max(np.abs(change).max(), np.abs(step).max())


def moved(poses, steps):
    """Camera-to-world poses whose world-to-camera is moved by small steps ``(N, 6)``: rotation vector, translation."""
    limit = np.minimum(1, 0.5 / np.maximum(np.linalg.norm(steps[:, :3], axis=1), 1e-12))[:, None]
    motion = np.tile(np.eye(4), (len(poses), 1, 1))
    motion[:, :3, :3] = Rotation.from_rotvec(limit * steps[:, :3]).as_matrix()
    motion[:, :3, 3] = limit * steps[:, 3:]
    return poses @ geometry.invert(motion)


def _normal(sketches, rays, state, residuals, trust, part, free_poses):
    """Normal equations of a block of pairs: in their images' unknowns ``(B, 2w, 2w)``, and their own log-scales."""
    i, j = sketches.pairs.T
    off, z, front = residuals
    relative = geometry.invert(state.poses[j]) @ state.poses[i]
    # Residuals and derivatives are at the depth that the images agree on, not at the pair's own: its noise would be in
    # both factors of the gradient, which makes scales and motions come out too small.
    agreed = np.isfinite(state.log_depth[j])
    depth = np.where(agreed, np.exp(np.where(agreed, state.log_depth[j], 0)), z)
    residual = np.stack([off[..., 0] * z / depth, off[..., 1] * z / depth, np.log(z / depth)], axis=1)
    off_own = sketches.log_depth_i + state.log_scale[part, None].astype(np.float32) - state.log_depth[i]
    trust = trust.astype(np.float32)[:, None]
    weight_j = np.where(front, sketches.weight_j, 0) * trust
    weight = np.empty_like(residual)
    weight[:, 0] = weight_j * kernel(np.hypot(residual[:, 0], residual[:, 1]) / state.ray_noise) / state.ray_noise**2
    weight[:, 1] = weight[:, 0]
    weight[:, 2] = np.where(agreed, weight_j * kernel(residual[:, 2] / state.depth_noise), 0) / state.depth_noise**2
    weight_own = np.nan_to_num(sketches.weight_i * trust * kernel(off_own / state.depth_noise)) / state.depth_noise**2
    slopes = _slopes(rays[j], depth, relative, free_poses)
    weighted = (slopes * weight[:, None]).reshape(*slopes.shape[:2], -1)
    # The pair's unknowns: its log-scale, the shifts of i and j, and the relative motion.
    rest = np.array([0, *range(2, slopes.shape[1] + 1)])
    normal = np.zeros((len(i), len(rest) + 1, len(rest) + 1))
    gradient = np.zeros((len(i), len(rest) + 1))
    normal[:, rest[:, None], rest] = weighted @ np.swapaxes(slopes.reshape(weighted.shape), 1, 2)
    gradient[:, rest] = (weighted @ residual.reshape(len(i), -1, 1))[..., 0]
    own, own_gradient = weight_own.sum(1), (weight_own * np.nan_to_num(off_own)).sum(1)
    normal[:, :2, :2] += own[:, None, None] * np.array([[1, -1], [-1, 1]])
    gradient[:, :2] += own_gradient[:, None] * np.array([1, -1])
    spread = _spread(relative, free_poses)
    hessian = spread @ normal[:, 1:, 1:] @ np.swapaxes(spread, 1, 2)
    cross = (spread @ normal[:, 1:, :1])[..., 0]
    return hessian, (spread @ gradient[:, 1:, None])[..., 0], cross, normal[:, 0, 0], gradient[:, 0]


def _slopes(rays, depth, relative, free_poses):
    """Derivatives ``(B, 2 + 6, 3, M)`` of view j's residuals by log-scale, shift of j, rotation and translation."""
    x, y = rays[..., 0], rays[..., 1]
    inverse = 1 / depth
    motion_x, motion_y, motion_z = (relative[:, k, 3, None].astype(np.float32) * inverse for k in range(3))
    slopes = np.zeros((len(x), 8 if free_poses else 2, 3, x.shape[1]), np.float32)
    slopes[:, 0, 0], slopes[:, 0, 1], slopes[:, 0, 2] = x * motion_z - motion_x, y * motion_z - motion_y, 1 - motion_z
    slopes[:, 1, 2] = -1
    if free_poses:
        slopes[:, 2, 0], slopes[:, 2, 1], slopes[:, 2, 2] = -x * y, -1 - y * y, y
        slopes[:, 3, 0], slopes[:, 3, 1], slopes[:, 3, 2] = 1 + x * x, x * y, -x
        slopes[:, 4, 0], slopes[:, 4, 1] = -y, x
        slopes[:, 5, 0] = slopes[:, 6, 1] = slopes[:, 7, 2] = inverse
        slopes[:, 7, 0], slopes[:, 7, 1] = -x * inverse, -y * inverse
    return slopes


def _spread(relative, free_poses):
    """From a pair's unknowns (shift of i, shift of j, relative motion) to its images' ``(B, 2w, 2 + 6)``."""
    count = len(relative)
    if not free_poses:
        return np.tile(np.eye(2), (count, 1, 1))
    spread = np.zeros((count, 14, 8))
    rotation, (x, y, z) = relative[:, :3, :3], relative[:, :3, 3].T
    cross = np.zeros((count, 3, 3))
    cross[:, 0, 1], cross[:, 0, 2], cross[:, 1, 2] = -z, y, -x
    cross[:, 1, 0], cross[:, 2, 0], cross[:, 2, 1] = z, -y, x
    # A motion of camera i moves the relative pose backwards, through the adjoint of that pose.
    adjoint = np.zeros((count, 6, 6))
    adjoint[:, :3, :3] = adjoint[:, 3:, 3:] = rotation
    adjoint[:, 3:, :3] = cross @ rotation
    spread[:, :6, 2:] = -np.swapaxes(adjoint, 1, 2)
    spread[:, 7:13, 2:] = np.eye(6)
    spread[:, 6, 0] = spread[:, 13, 1] = 1
    return spread


def _median(values):
    return float(np.median(values)) if len(values) else 0.0


def _deviation(sizes, least, median_of_unit):
    """Deviation behind the sizes of residuals, by their median; gross ones are left out, as they raise that too."""
    sizes = sizes[:: max(1, len(sizes) // 20000)]
    deviation = np.inf
    for _ in range(4):
        deviation = max(_median(sizes[sizes < KERNEL * deviation]) / median_of_unit, least)
    return deviation
