"""Which images end up in the world of the result, and in which unit and frame."""

import numpy as np

from kdutils import geometry, registration
from kdutils import pairs as graphs
from kdutils.alignment import joint, pose_graph

MOST_SCALE_VARIANCE = 0.2**2  # a scale that the rays tell no better than to a fifth is not known
STILL = "too little camera motion in all pairs connected to it to read off a scale"


class Worlds:
    """The pieces of the pair graph that hold together after the joint solution.

    Attributes:
        poses: ``(N, 4, 4)`` camera-to-world in the world of the result; NaN for images outside it.
        scales: ``(P,)`` of its units per unit of the pair; NaN for pairs that are rejected or outside it.
        rejected: pair -> reason.
        piece: ``(N,)`` the piece of each image, the largest is 0; -1 for an image that nothing connects.
        frame: what the world of the result is, in words.
        outside: image -> reason.
    """

    def __init__(self, sketches, rays, state, silent):
        self.sketches, self.rays, self.state = sketches, rays, state
        self.rejected = dict(sorted((state.rejected | silent).items()))
        self.poses = state.poses.copy()
        self.scales = np.exp(state.log_scale) / sketches.unit
        self.scales[list(self.rejected)] = np.nan
        self.piece = self._pieces(np.isfinite(self.scales))
        self.outside = {int(k): "no pair that is not rejected" for k in np.flatnonzero(self.piece < 0)}
        self.frame, self.world_error = "that of the given poses", None

    def _pieces(self, kept):
        pairs, count = self.sketches.pairs, len(self.poses)
        _, label = graphs.components(pairs[kept], count)
        size = np.bincount(label)
        first = np.array([np.flatnonzero(label == k)[0] for k in range(len(size))])
        rank = np.empty(len(size), int)
        rank[np.lexsort((first, -size))] = np.arange(len(size))
        alone = np.bincount(pairs[kept].ravel(), minlength=count) == 0
        return np.where(alone, -1, rank[label])

    def require_scale(self):
        """With known poses: pieces whose cameras hardly move have no scale, and their pairs are rejected."""
        evidence, _ = joint.scale_evidence(self.sketches, self.rays, self.state)
        piece = self.piece[self.sketches.pairs[:, 0]]
        kept = np.isfinite(self.scales)
        told = np.bincount(piece[kept], evidence[kept], self.piece.max(initial=0) + 1)
        lost = kept & (told[piece] < 1 / MOST_SCALE_VARIANCE)
        self.scales[lost] = np.nan
        self.rejected = dict(sorted((self.rejected | {int(p): STILL for p in np.flatnonzero(lost)}).items()))
        for image in np.flatnonzero((self.piece >= 0) & (told[self.piece] < 1 / MOST_SCALE_VARIANCE)):
            self.outside[int(image)] = STILL

    def scale_drift(self):
        """How far each image's scale is from what its pairs' rays alone tell, ``(N,)``; NaN where they tell none."""
        evidence, shift = joint.scale_evidence(self.sketches, self.rays, self.state)
        kept, count = np.isfinite(self.scales), len(self.poses)
        images = self.sketches.pairs[kept].T.ravel()
        evidence, shift = np.tile(evidence[kept], 2), np.tile(shift[kept], 2)
        total = np.bincount(images, evidence, count)
        told = total > 1 / MOST_SCALE_VARIANCE
        return np.where(told, np.bincount(images, evidence * shift, count) / np.where(told, total, 1), np.nan)

    def settle(self, world_poses):
        """With estimated poses: the pieces that some known poses reach go into their world, or the largest upright."""
        pieces = range(self.piece.max(initial=-1) + 1)
        known = np.zeros(len(self.poses), bool)
        if world_poses is not None:
            known = np.isfinite(world_poses).all(axis=(1, 2))
        moves = {k: pose_graph.to_world(self.poses[known & (self.piece == k)], world_poses[known & (self.piece == k)])
                 for k in pieces if (known & (self.piece == k)).sum() > 1}  # fmt: skip
        moves = {k: move for k, move in moves.items() if move is not None}
        self.frame = "that of the given world poses"
        if not moves and len(pieces):
            moves = {0: self._upright()}
            self.frame = "its own: y down along gravity, first camera at the origin, mean pair scale 1"
        for k in pieces:
            self._move(np.flatnonzero(self.piece == k), moves.get(k))
        self.poses[self.piece < 0] = np.nan
        if known.any() and self.frame.startswith("that"):
            self._compare(world_poses, known)

    def _upright(self):
        images = np.flatnonzero(self.piece == 0)
        inside = self.scales[np.isfinite(self.scales) & np.isin(self.sketches.pairs[:, 0], images)]
        unit = np.diag([*[float(np.exp(-np.log(inside).mean()))] * 3, 1.0])
        return unit @ pose_graph.upright(self.poses[images])

    def _move(self, images, move):
        pairs = np.isin(self.sketches.pairs[:, 0], images)
        if move is None:
            self.poses[images], self.scales[pairs] = np.nan, np.nan
            reason = "in a piece of the pair graph that nothing connects to the world of the result"
            self.outside |= {int(k): reason for k in images}
            return
        self.poses[images] = registration.move_poses(move, self.poses[images])
        self.scales[pairs] *= registration.decompose(move)[0]

    def _compare(self, world_poses, known):
        known = known & np.isfinite(self.poses).all(axis=(1, 2))
        apart = np.linalg.norm(self.poses[known, :3, 3] - world_poses[known, :3, 3], axis=1)
        turned = geometry.rotation_angle(np.swapaxes(self.poses[known, :3, :3], 1, 2) @ world_poses[known, :3, :3])
        self.world_error = {"images": int(known.sum()), "position_median": float(np.median(apart)),
                            "position_max": float(apart.max()), "degrees_median": float(np.median(turned)),
                            "degrees_max": float(turned.max())}  # fmt: skip
