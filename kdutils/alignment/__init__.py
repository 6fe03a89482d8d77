"""Pair predictions brought into one world, with known camera poses or without.

Every pair's prediction has a unit of its own. A first pass keeps a sketch of each pair (``sketches``); on the
sketches the scales of all pairs, the images' depths and, where they are not known, focals and poses are solved for
jointly and robustly (``joint``, ``pose_graph``). A second pass fuses every pixel's depth from all pairs (``fusion``).
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from kdutils import geometry
from kdutils.alignment import joint, pose_graph, reporting, starting_point, worlds
from kdutils.alignment import sketches as sketching
from kdutils.alignment.fusion import Fusion
from kdutils.teachers import PairPointmaps

VERSION = 2  # raise it when the same pairs give other labels: those on disk are then made anew
CHUNK = 64  # pairs read at once from arrays or memory maps


@dataclass
class Alignment:
    """One world for a scene's N images."""

    depth: np.ndarray  # (N, H, W) along z
    confidence: np.ndarray  # (N, H, W), at least 1: geometric mean of the pairs', those that disagree counting as 1
    valid: np.ndarray  # (N, H, W) reached by a confident prediction, and not contradicted by as many others
    poses: np.ndarray  # (N, 4, 4) camera-to-world; NaN where unknown
    intrinsics: np.ndarray  # (N, 3, 3)
    pair_scales: np.ndarray  # (P,) world units per unit of the pair; NaN where rejected or in another world
    pair_residuals: np.ndarray  # (P,) median disagreement with the images' depths, as a share of them
    rejected_pairs: dict  # index of the pair -> reason
    report: dict = field(default_factory=dict)

    @property
    def points(self):
        """World pointmaps ``(N, H, W, 3)`` on the pixels' rays."""
        return world_points(self.depth, self.intrinsics, self.poses)


def world_points(depth, intrinsics, poses):
    """Depths ``(N, H, W)`` to world points ``(N, H, W, 3)`` on the pixels' rays."""
    points = np.empty((*depth.shape, 3), np.float32)
    for image, (d, k, pose) in enumerate(zip(depth, intrinsics, poses, strict=True)):
        rays = geometry.pixel_rays(k, *d.shape) @ pose[:3, :3].T
        points[image] = d[..., None] * rays + pose[:3, 3]
    return points


def align(pairs, pts_i, pts_j, conf_i, conf_j, intrinsics=None, poses=None, world_poses=None):
    """Align pair predictions given as arrays or memory maps; see ``align_shards``.

    Args:
        pairs: ``(P, 2)`` directed pairs of image indices.
        pts_i, pts_j: ``(P, H, W, 3)`` points of both views in view i's frame, scale free.
        conf_i, conf_j: ``(P, H, W)`` confidences; 1, the least, and what is not finite count as no information.
        intrinsics, poses, world_poses: as for ``align_shards``.
    """
    arrays = PairPointmaps(np.asarray(pairs), pts_i, pts_j, conf_i, conf_j)
    sketching.check_shapes(arrays)
    return align_shards(_Chunks(arrays), intrinsics, poses, world_poses=world_poses)


class _Chunks:
    def __init__(self, arrays):
        self.arrays = arrays

    def __iter__(self):
        for k in range(0, len(self.arrays.pairs), CHUNK):
            yield PairPointmaps(*(np.asarray(a[k : k + CHUNK]) for a in self.arrays))


def align_shards(shards, intrinsics=None, poses=None, progress=None, world_poses=None):
    """Align pair predictions that stream from disk; memory grows with images, not pairs.

    Given ``poses`` are held. Without, poses are estimated; the result is in the world of ``world_poses``, by one
    similarity, or, if these tell none, in a world of its own: the y axis down along gravity, the first camera at the
    origin, and in a unit in which the pairs' scales have the geometric mean 1. A pair graph in pieces then is as many
    worlds: those that the world poses reach are the result, or the largest, and the report names the others.

    Args:
        shards: re-iterable of ``PairPointmaps``; read twice.
        intrinsics: ``(3, 3)`` or ``(N, 3, 3)``, in pixels; focals are estimated by default, principal points centred.
        poses: ``(N, 4, 4)`` camera-to-world, metres.
        progress: called with the shards, e.g. ``tqdm``.
        world_poses: ``(N, 4, 4)`` poses of some images, NaN for the others; only where ``poses`` are not given.

    Raises:
        ValueError: shapes do not fit, a pose in ``poses`` is not finite, there are no pairs, or ``shards`` can be read
            only once.
    """
    if iter(shards) is shards:
        raise ValueError("the shards are read twice: give a list, or an object whose __iter__ starts anew")
    follow = progress or (lambda iterable: iterable)
    poses, world_poses = _checked_poses(poses, world_poses)
    pixels = sketching.PIXELS_FOR_POSES if poses is None else sketching.PIXELS
    sketches = sketching.sketch(_ahead(follow(shards)), pixels)
    count = _image_count(sketches.pairs, poses, world_poses, intrinsics)
    intrinsics, borrowed = _intrinsics(intrinsics, sketches, count)
    rays = starting_point.pixel_slopes(intrinsics, sketches.pixels)
    silent = sketches.silence()
    error_i = starting_point.error_of_view_i(sketches, rays)
    usable = ~(error_i > joint.limit(error_i, joint.MOST_RAY_ERROR)) & np.isfinite(error_i)
    if poses is None:
        start, drift = pose_graph.from_unknown_poses(sketches, rays, usable, count)
    else:
        start, drift = starting_point.from_known_poses(sketches, rays, poses, usable), None
    state = joint.solve(sketches, rays, start, error_i, free_poses=poses is None)
    world = worlds.Worlds(sketches, rays, state, silent)
    if poses is None:
        world.settle(world_poses)
    else:
        world.require_scale()
    fusion = _fuse(_ahead(follow(shards)), sketches.pairs, world.scales, intrinsics, world.poses, state, sketches.size)
    aligned = Alignment(fusion.depth, fusion.confidence, fusion.valid, world.poses, intrinsics, world.scales,
                        np.fmax(state.depth_error, 0), world.rejected)  # fmt: skip
    aligned.report = reporting.report(aligned, world, state, borrowed, drift)
    return aligned


def _checked_poses(poses, world_poses):
    if poses is not None and world_poses is not None:
        raise ValueError("give poses, which are then held, or world_poses, which only say where the world is; not both")
    checked = [None if p is None else np.array(p, dtype=np.float64) for p in (poses, world_poses)]
    for name, p in zip(("poses", "world_poses"), checked):
        if p is not None and (p.ndim != 3 or p.shape[1:] != (4, 4)):
            raise ValueError(f"{name} must be (N, 4, 4), not {p.shape}")
    if checked[0] is not None and not np.isfinite(checked[0]).all():
        raise ValueError("a camera pose is not finite: leave such frames out before the alignment, or let all poses be "
                         "estimated and give the known ones as world_poses")  # fmt: skip
    return checked


def _image_count(pairs, poses, world_poses, intrinsics):
    given = [len(a) for a in (poses, world_poses) if a is not None]
    if intrinsics is not None and np.ndim(intrinsics) == 3:
        given.append(len(intrinsics))
    count = max(given, default=int(pairs.max()) + 1)
    if len(set(given)) > 1:
        raise ValueError(f"poses and intrinsics are of different numbers of images: {sorted(set(given))}")
    if pairs.max() >= count:
        raise ValueError(f"a pair names image {pairs.max()}, but there are {count} images")
    return count


def _intrinsics(intrinsics, sketches, count):
    """Intrinsics ``(N, 3, 3)``, and the images whose focal is that of the others."""
    if intrinsics is not None:
        intrinsics = np.asarray(intrinsics, dtype=np.float64)
        if intrinsics.shape[-2:] != (3, 3) or intrinsics.ndim > 3 or not np.isfinite(intrinsics).all():
            raise ValueError(f"intrinsics must be finite, (3, 3) or (N, 3, 3), not {intrinsics.shape}")
        return np.broadcast_to(intrinsics, (count, 3, 3)), []
    focals = starting_point.focals(sketches, count)
    unknown = ~np.isfinite(focals)
    focals[unknown] = np.median(focals[~unknown]) if not unknown.all() else max(sketches.size)
    estimated = np.tile(np.eye(3), (count, 1, 1))
    estimated[:, 0, 0] = estimated[:, 1, 1] = focals
    estimated[:, :2, 2] = sketches.size[1] / 2, sketches.size[0] / 2
    return estimated, np.flatnonzero(unknown).tolist()


def _fuse(shards, pairs, scales, intrinsics, poses, state, size):
    kept = np.isfinite(scales)
    expected = np.bincount(pairs[kept].ravel(), minlength=len(poses))
    fusion = Fusion(intrinsics, poses, size, expected, state.depth_noise, state.ray_noise)
    number = 0
    for shard in shards:
        for pair in zip(*shard):
            if kept[number]:
                fusion.add(scales[number], *pair)
            number += 1
    fusion.finish()
    return fusion


def _ahead(shards):
    """The same shards, the next one read while this one is worked on."""
    with ThreadPoolExecutor(1) as reader:
        iterator = iter(shards)
        coming = reader.submit(next, iterator, None)
        while (shard := coming.result()) is not None:
            coming = reader.submit(next, iterator, None)
            yield shard
