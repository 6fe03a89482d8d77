"""Camera poses from the pair predictions alone: a start for the joint solution, and the world they are stated in.

Every pair (i, j) tells camera j's pose relative to camera i in the pair's own unit, because view j's points are given
in frame i and lie on the rays of j's pixels. A spanning tree grows over the pairs that most others confirm; then
rotations, log-scales and positions are averaged over all pairs in turn, robustly, which closes the loops.
"""

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu
from scipy.spatial.transform import Rotation

from kdutils import geometry, registration
from kdutils.alignment.joint import State, kernel, moved, row_median
from kdutils.alignment.starting_point import shapes

MOST_DISAGREEMENT = 10  # degrees: rotations of pairs that confirm each other differ by less
RESECTION_ROUNDS, AVERAGING_ROUNDS = 10, 20
LEAST_RAY_NOISE = 5e-4  # radians


def from_unknown_poses(sketches, rays, usable, count):
    """Poses, log-scales and depths to start from; in every piece of the graph one image has the identity as its pose.

    Args:
        sketches: ``Sketches``.
        rays: ``(N, M, 2)`` the sampled pixels' x/z and y/z in every image.
        usable: ``(P,)`` pairs to believe.
        count: number of images N.

    Returns:
        The ``State``, and how far the tree alone had drifted from it: its rotations ``(N,)`` in degrees.
    """
    i, j = sketches.pairs.T
    own = sketches.log_depth_i
    shape, _ = shapes(own, i, usable, count)
    relative = resect(sketches, rays[j], shape[j])
    seen_j = geometry.transform_each(relative, sketches.points_j)[..., 2]
    in_front = (sketches.weight_j > 0) & (seen_j > 1e-6)
    other = np.where(in_front, np.log(np.where(in_front, seen_j, 1)), np.nan)
    shape, offset = shapes(np.concatenate([own, other]), np.concatenate([i, j]), np.tile(usable, 2), count)
    offset_i, offset_j = np.split(offset, 2)
    trust = np.where(usable & np.isfinite(offset_i) & np.isfinite(offset_j), sketches.weight_j.mean(1), 0)
    tree = grow_tree(sketches.pairs, relative[:, :3, :3], trust, count)
    rotations = average_rotations(sketches.pairs, relative[:, :3, :3], tree, trust)
    off = rotations[j] @ np.swapaxes(rotations[i], 1, 2) @ np.swapaxes(relative[:, :3, :3], 1, 2)
    trust = np.where(geometry.rotation_angle(off) < MOST_DISAGREEMENT, trust, 0)
    log_unit = average(sketches.pairs, np.nan_to_num(offset_j - offset_i)[:, None], trust, count)[:, 0]
    log_scale = np.nan_to_num((log_unit[i] - offset_i + log_unit[j] - offset_j) / 2)
    towards_j = geometry.invert(relative)[:, :3, 3] * np.exp(log_scale)[:, None]
    between = (np.swapaxes(rotations[i], 1, 2) @ towards_j[..., None])[..., 0]
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = np.swapaxes(rotations, 1, 2)
    poses[:, :3, 3] = average(sketches.pairs, between, trust, count)
    drift = geometry.rotation_angle(np.swapaxes(rotations, 1, 2) @ tree)
    return State(poses, log_scale, (shape + log_unit[:, None]).astype(np.float32)), drift


def resect(sketches, rays_j, log_depth_j):
    """View j's pose from its pixels' points: motions ``(P, 4, 4)`` from frame i to frame j, in the pair's unit.

    A robust similarity to image j's own depths starts it (only its points' distances from camera i where image j is
    view 1 of no pair), reweighted Gauss-Newton on the distances from the rays follows.

    Args:
        rays_j: ``(P, M, 2)``.
        log_depth_j: ``(P, M)`` image j's log-depth up to a constant, NaN where unknown.
    """
    points = np.asarray(sketches.points_j, np.float64)
    rays = np.concatenate([rays_j, np.ones((*rays_j.shape[:2], 1))], axis=-1)
    known = np.isfinite(log_depth_j) & (sketches.weight_j > 0)
    plenty = known.sum(1) >= 8
    guessed = np.linalg.norm(points, axis=-1) / np.linalg.norm(rays, axis=-1)
    depth = np.where(plenty[:, None], np.where(known, np.exp(np.nan_to_num(log_depth_j)), 1), guessed)
    weight = np.where(known | ~plenty[:, None], sketches.weight_j, 0) / np.maximum(depth, 1e-6)
    target = depth[..., None] * rays
    robust = weight
    for _ in range(RESECTION_ROUNDS):
        fitted = registration.similarity(points, target, robust)
        error = np.linalg.norm(geometry.transform_each(fitted, points) - target, axis=-1)
        robust = weight / (0.02 + error / np.maximum(np.linalg.norm(target, axis=-1), 1e-6))
    fitted[~(np.linalg.det(fitted) > 1e-15)] = np.eye(4)  # too few points, which the joint solution will not believe
    scale, rotation, translation = registration.decompose(fitted)
    motion = np.tile(np.eye(4), (len(points), 1, 1))
    motion[:, :3, :3] = rotation
    motion[:, :3, 3] = translation / scale[:, None]
    for _ in range(RESECTION_ROUNDS):
        motion = geometry.invert(moved(geometry.invert(motion), _resection_step(points, rays_j, sketches, motion)))
    return motion


def _resection_step(points, rays, sketches, motion):
    seen = geometry.transform_each(motion, points)
    front = seen[..., 2] > 1e-2 * np.linalg.norm(seen, axis=-1)
    z = np.where(front, seen[..., 2], 1.0)
    x, y = seen[..., 0] / z, seen[..., 1] / z
    off = np.stack([x - rays[..., 0], y - rays[..., 1]], axis=2)
    distance = np.linalg.norm(off, axis=2)
    noise = np.fmax(row_median(distance, front & (sketches.weight_j > 0)) / 1.1774, LEAST_RAY_NOISE)[:, None]
    weight = np.where(front, sketches.weight_j, 0) * kernel(distance / noise)
    zero, inverse = np.zeros_like(x), 1 / z
    slopes_x = np.stack([-x * y, 1 + x * x, -y, inverse, zero, -x * inverse], axis=1)
    slopes_y = np.stack([-1 - y * y, x * y, x, zero, inverse, -y * inverse], axis=1)
    normal = (slopes_x * weight[:, None]) @ np.swapaxes(slopes_x, 1, 2)
    normal += (slopes_y * weight[:, None]) @ np.swapaxes(slopes_y, 1, 2)
    gradient = (slopes_x * (weight * off[..., 0])[:, None]).sum(2) + (slopes_y * (weight * off[..., 1])[:, None]).sum(2)
    normal += 1e-6 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(6) + 1e-12 * np.eye(6)
    return -np.linalg.solve(normal, gradient[..., None])[..., 0]


def grow_tree(pairs, relative, weight, count):
    """World-to-camera rotations ``(N, 3, 3)`` along a spanning tree, image by image.

    Each pair between a placed image and another says how that other one is turned. The image comes next whose pairs
    confirm each other with the most weight, and is turned as these say, so that a wrong pair is a branch only where
    nothing contradicts it.
    """
    i, j = pairs[weight > 0].T
    given, weight = relative[weight > 0], weight[weight > 0]
    # Both directions of every pair: image `ends` seen from image `starts`.
    starts, ends = np.concatenate([i, j]), np.concatenate([j, i])
    turns = np.concatenate([given, np.swapaxes(given, 1, 2)])
    weight = np.concatenate([weight, weight])
    into = [np.flatnonzero(ends == k) for k in range(count)]
    out_of = [np.unique(ends[starts == k]) for k in range(count)]
    strength = np.bincount(ends, weight, count)
    rotations, placed, support = np.tile(np.eye(3), (count, 1, 1)), np.zeros(count, bool), np.zeros(count)
    proposed = rotations.copy()
    while not placed.all():
        reachable = np.where(placed, 0, support)
        if reachable.max() > 0:
            image = int(reachable.argmax())
            rotations[image] = proposed[image]
        else:  # a new piece of the graph starts at its best seen image
            image = int(np.where(placed, -1, strength).argmax())
        placed[image] = True
        for other in out_of[image][~placed[out_of[image]]]:
            arriving = into[other][placed[starts[into[other]]]]
            hypotheses = turns[arriving] @ rotations[starts[arriving]]
            proposed[other], support[other] = _most_confirmed(hypotheses, weight[arriving])
    return rotations


def _most_confirmed(rotations, weight):
    cosine = (np.einsum("aij,bij->ab", rotations, rotations) - 1) / 2
    agree = cosine > np.cos(np.radians(MOST_DISAGREEMENT))
    support = agree @ weight
    best = support.argmax()
    mean = Rotation.from_matrix(rotations[agree[best]]).mean(weight[agree[best]]).as_matrix()
    return mean, support[best]


def average_rotations(pairs, relative, rotations, weight):
    """World-to-camera rotations ``(N, 3, 3)`` that agree with all pairs, from some that agree with a tree.

    Reweighted steps in the tangent space (Chatterjee and Govindu, ICCV 2013).
    """
    i, j = pairs.T
    for _ in range(AVERAGING_ROUNDS):
        off = np.swapaxes(rotations[j], 1, 2) @ relative @ rotations[i]
        angles = Rotation.from_matrix(off).as_rotvec()
        size = np.linalg.norm(angles, axis=1)
        robust = weight / np.maximum(size, 0.002)
        step = solve_differences(pairs, angles, robust, len(rotations))
        rotations = rotations @ Rotation.from_rotvec(step).as_matrix()
    return rotations


def average(pairs, differences, weight, count):
    """Values ``(N, d)`` of the images whose differences, of j less of i, are near the pairs' ``(P, d)``; L1, robust."""
    robust = weight
    for _ in range(AVERAGING_ROUNDS):
        values = solve_differences(pairs, differences, robust, count)
        error = np.linalg.norm(values[pairs[:, 1]] - values[pairs[:, 0]] - differences, axis=1)
        robust = weight / np.maximum(error, 0.003)
    return values


def solve_differences(pairs, differences, weight, count):
    """Least squares of ``average``: a graph Laplacian; a piece's mean, which is free, stays near 0."""
    i, j = pairs.T
    incidence = sparse.coo_array(
        (np.concatenate([np.ones(len(i)), -np.ones(len(i))]), (np.tile(np.arange(len(i)), 2), np.concatenate([j, i]))),
        (len(i), count),
    ).tocsr()
    weighted = incidence.T @ sparse.diags_array(weight)
    damping = 1e-9 * max(weight.max(), 1e-12)
    return splu((weighted @ incidence + damping * sparse.eye_array(count)).tocsc()).solve(weighted @ differences)


def to_world(poses, world_poses):
    """The similarity ``(4, 4)`` from the poses' world to the one in which some of them are known.

    The rotation is the mean of what the known cameras' orientations say, which does not need them to stand apart; scale
    and translation follow from their positions.

    Args:
        poses, world_poses: ``(K, 4, 4)`` of the images known in both.

    Returns:
        None where the positions determine no scale: fewer than two, or all at one place.
    """
    turns = world_poses[:, :3, :3] @ np.swapaxes(poses[:, :3, :3], 1, 2)
    alike = np.einsum("aij,bij->ab", turns, turns) > 1 + 2 * np.cos(np.radians(2 * MOST_DISAGREEMENT))
    best = np.argmax(alike.sum(1))
    near = geometry.rotation_angle(turns @ turns[best].T) < 2 * MOST_DISAGREEMENT
    rotation = Rotation.from_matrix(turns[near]).mean().as_matrix()
    source, target = poses[near, :3, 3] @ rotation.T, world_poses[near, :3, 3]
    centre = np.median(source, 0), np.median(target, 0)
    weight = np.ones(len(source))
    for _ in range(AVERAGING_ROUNDS):
        middle = [(weight[:, None] * p).sum(0) / weight.sum() for p in (source, target)]
        factor = registration.scale(source - middle[0], target - middle[1], weight)[0, 0]
        error = np.linalg.norm(factor * (source - middle[0]) - (target - middle[1]), axis=1)
        weight = 1 / np.maximum(error, 1e-3 * np.ptp(target, axis=0).max() + 1e-12)
    spread = np.abs(source - centre[0]).max(initial=0), np.abs(target - centre[1]).max(initial=0)
    if min(spread) < 1e-9 or not factor > 0:
        return None
    transform = np.eye(4)
    transform[:3, :3] = factor * rotation
    transform[:3, 3] = middle[1] - factor * middle[0]
    return transform


def upright(poses):
    """The rigid motion ``(4, 4)`` to a world whose y axis points down, with its origin at the first camera.

    Cameras are mostly held level: down is the direction most at right angles to their x axes, and near their y axes.
    The z axis is the first camera's direction of view, made horizontal.
    """
    right, down = poses[:, :3, 0], poses[:, :3, 1].mean(0)
    down = down / max(np.linalg.norm(down), 1e-12)
    level = right.T @ right / len(right) + 0.01 * (np.eye(3) - np.outer(down, down))
    gravity = np.linalg.eigh(level)[1][:, 0]
    gravity = gravity if gravity @ down >= 0 else -gravity
    ahead = poses[0, :3, 2] - gravity * (poses[0, :3, 2] @ gravity)
    if np.linalg.norm(ahead) < 1e-3:  # the first camera looks straight up or down
        ahead = np.cross(poses[0, :3, 0], gravity)
    ahead = ahead / np.linalg.norm(ahead)
    motion = np.eye(4)
    motion[:3, :3] = np.stack([np.cross(gravity, ahead), gravity, ahead])
    motion[:3, 3] = -motion[:3, :3] @ poses[0, :3, 3]
    return motion
