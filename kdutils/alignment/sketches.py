"""First pass over the pair predictions: a small fixed-size sketch of each pair, every k-th pixel of both views.

All that is solved jointly (scales, focals, poses) is solved on the sketches, so that memory holds no pointmaps.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

PIXELS = 384  # of a view in a sketch, about: smooth errors have far fewer degrees of freedom
PIXELS_FOR_POSES = 768  # where poses are unknown too, and gross outliers have more to spoil
HUGE = 1e12  # coordinates that float32 can no longer square count as not finite, like NaN, for which < is false
NEAREST, FARTHEST = 0.02, 1e4  # median distances; points nearer or farther say nothing
LEAST_PIXELS = 8  # confident pixels of a sketch's view, below which nothing can be concluded from it


@dataclass
class Sketches:
    """M sampled pixels of P pairs; both views' points are in view i's frame, in units of the pair's median distance."""

    pairs: np.ndarray  # (P, 2)
    points_i: np.ndarray  # (P, M, 3) float32
    points_j: np.ndarray  # (P, M, 3)
    weight_i: np.ndarray  # (P, M) log-confidence; 0 where nothing is known
    weight_j: np.ndarray  # (P, M)
    unit: np.ndarray  # (P,) the pair's own units in one unit of the sketch
    pixels: np.ndarray  # (M, 2) pixel centres (u, v)
    size: tuple  # (height, width) of the whole pointmaps

    def __len__(self):
        return len(self.pairs)

    @property
    def log_depth_i(self):
        """Logarithm ``(P, M)`` of view i's depths; NaN where nothing is known."""
        depth = self.points_i[..., 2]
        seen = (self.weight_i > 0) & (depth > 0)
        return np.where(seen, np.log(np.where(seen, depth, 1)), np.float32(np.nan))

    def silence(self):
        """Take the weight of pairs that say too little of view 1 to be of use; their reasons."""
        silent = (self.weight_i > 0).sum(1) < min(LEAST_PIXELS, self.weight_i.shape[1])
        self.weight_i[silent] = self.weight_j[silent] = 0
        return {int(p): "no confident pixel in view 1" for p in np.flatnonzero(silent)}

    def select(self, which):
        """The sketches of some pairs only."""
        names = ("pairs", "points_i", "points_j", "weight_i", "weight_j", "unit")
        return replace(self, **{name: getattr(self, name)[which] for name in names})


def log_confidence(confidence):
    """What a prediction weighs: 0, no information, at confidence 1, the least, and where it is not finite."""
    sound = (confidence > 1) & (confidence < np.inf)
    return np.log(confidence, out=np.zeros(confidence.shape, np.float32), where=sound)


def sketch(shards, pixels=PIXELS):
    """Read all shards once.

    Args:
        shards: iterable of ``PairPointmaps``.
        pixels: of a view, about.

    Raises:
        ValueError: no pairs, or arrays whose shapes do not fit together.
    """
    parts, size, step = [], None, None
    for shard in shards:
        size = check_shapes(shard, size)
        step = _stride(size, pixels)
        if len(shard.pairs):
            parts.append(_sample(shard, step))
    if not parts:
        raise ValueError("no pairs to align")
    pairs, points_i, points_j, weight_i, weight_j = (np.concatenate(column) for column in zip(*parts))
    unit = _unit(points_i, weight_i)
    for points, weight in ((points_i, weight_i), (points_j, weight_j)):
        points /= unit.astype(np.float32)[:, None, None]
        reach = np.abs(points).max(-1)
        odd = (reach < NEAREST) | (reach > FARTHEST)
        points[odd], weight[odd] = 0, 0
    return Sketches(pairs, points_i, points_j, weight_i, weight_j, unit, _pixels(size, step), size)


def check_shapes(shard, size=None):
    """(height, width) of a shard's pointmaps; ValueError where its arrays do not fit together or ``size``."""
    pairs = np.asarray(shard.pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or (pairs.size and pairs.dtype.kind not in "iu"):
        raise ValueError(f"pairs must be integers (P, 2), not {pairs.dtype} {pairs.shape}")
    if pairs.size and (pairs.min() < 0 or (pairs[:, 0] == pairs[:, 1]).any()):
        raise ValueError("a pair holds a negative image index, or one image twice")
    given = np.shape(shard.points_i)
    if len(given) != 4 or given[0] != len(pairs) or given[3] != 3 or (size and given[1:3] != size):
        expected = f"({len(pairs)}, {size[0] if size else 'H'}, {size[1] if size else 'W'}, 3)"
        raise ValueError(f"points of view i must be {expected}, not {given}")
    for name, wanted in (("points_j", given), ("confidence_i", given[:3]), ("confidence_j", given[:3])):
        if np.shape(getattr(shard, name)) != wanted:
            raise ValueError(f"{name} must be {wanted} like points_i, not {np.shape(getattr(shard, name))}")
    return given[1:3]


def _stride(size, pixels):
    return max(1, round(math.sqrt(size[0] * size[1] / pixels)))


def _pixels(size, step):
    u, v = np.meshgrid(np.arange(step // 2, size[1], step), np.arange(step // 2, size[0], step))
    return np.stack([u.ravel(), v.ravel()], axis=-1) + 0.5


def _sample(shard, step):
    def sampled(array, *shape):
        some = np.asarray(array[:, step // 2 :: step, step // 2 :: step], dtype=np.float32)
        return some.reshape(len(some), -1, *shape)

    columns = [np.asarray(shard.pairs)]
    points = [sampled(p, 3) for p in (shard.points_i, shard.points_j)]
    weights = [np.where(np.abs(p).max(-1) < HUGE, log_confidence(sampled(c)), np.float32(0))
               for p, c in zip(points, (shard.confidence_i, shard.confidence_j))]  # fmt: skip
    columns += [np.where(w[..., None] > 0, p, 0) for p, w in zip(points, weights)]
    return columns + weights


def _unit(points, weight):
    distance = np.where(weight > 0, np.linalg.norm(points, axis=-1), np.nan)
    some = np.isfinite(distance).any(1)
    unit = np.ones(len(points))
    unit[some] = np.nanmedian(distance[some], axis=1)
    return np.where(unit > 0, unit, 1.0)
