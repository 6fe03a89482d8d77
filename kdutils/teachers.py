"""The teacher's interface: a pair of images in; two pointmaps in view 1's frame and two confidences out, scale free.

A teacher is built for one scene's frames and called with pairs ``(P, 2)`` of indices into them. It returns a
``PairPointmaps`` whose unit of length is arbitrary and differs from pair to pair, as DUSt3R's does. Its answer about a
pair depends on the pairs of the same call only. ``settings()`` names what the answers depend on, and
``scratch_bytes(images)`` the disk space that asking about these images may take for a while.
"""

from typing import NamedTuple

import numpy as np

from kdutils import geometry


class PairPointmaps(NamedTuple):
    """What a teacher says of P pairs (i, j): both views' points in view i's camera frame, confidences from 1 up."""

    pairs: np.ndarray  # (P, 2)
    points_i: np.ndarray  # (P, H, W, 3)
    points_j: np.ndarray  # (P, H, W, 3)
    confidence_i: np.ndarray  # (P, H, W)
    confidence_j: np.ndarray  # (P, H, W)


class DepthTeacher:
    """The depth camera dressed as a teacher: the control of the study, and its upper bound.

    Points are the depth camera's, moved into view 1's frame through the known poses and multiplied by a random scale
    per pair, so that the alignment has the same work to do as with DUSt3R. A pixel without a reading gets a made-up
    point at the scene's median depth and the lowest confidence, 1.
    """

    name = "depth"

    def __init__(self, frames):
        self.frames = frames
        readings = frames.depth[frames.depth > 0]
        self.median_depth = float(np.median(readings)) if readings.size else 1.0

    def settings(self):
        return {"teacher": self.name}

    def scratch_bytes(self, images):
        return 0

    def __call__(self, pairs):
        frames, (i, j) = self.frames, np.asarray(pairs).T
        own_i, own_j = self._camera_points(i), self._camera_points(j)
        i_from_j = geometry.invert(frames.poses[i]) @ frames.poses[j]
        j_in_i = np.einsum("pab,phwb->phwa", i_from_j[:, :3, :3], own_j) + i_from_j[:, None, None, :3, 3]
        scale = pair_scale(pairs)[:, None, None, None]
        return PairPointmaps(
            np.asarray(pairs),
            (own_i * scale).astype(np.float32),
            (j_in_i * scale).astype(np.float32),
            self._confidence(i),
            self._confidence(j),
        )

    def _camera_points(self, images):
        depth = self.frames.depth[images]
        depth = np.where(depth > 0, depth, self.median_depth)
        return geometry.unproject(depth, self.frames.intrinsics)

    def _confidence(self, images):
        depth = self.frames.depth[images].astype(np.float32)
        # A structured-light camera's error grows with the square of the distance (Khoshelham and Elberink, 2012).
        return np.where(depth > 0, 1 + 10 / (1 + depth**2), 1).astype(np.float32)


def pair_scale(pairs):
    """A scale in [0.5, 2] for each pair ``(P, 2)``, a fixed function of the pair, so that a resumed run repeats it."""
    phase = np.sin(12.9898 * pairs[:, 0] + 78.233 * pairs[:, 1] + 1) * 43758.5453
    return 2.0 ** (2 * (phase - np.floor(phase)) - 1)


def build(study, frames, checkpoint="auto"):
    """The study's teacher for these frames; ``checkpoint`` is DUSt3R's, see ``dust3r.load_checkpoint``.

    The teacher ``compact`` is a small DUSt3R that comes with the study; it needs no checkpoint.
    """
    if study.teacher == "depth":
        return DepthTeacher(frames)
    from kdutils import dust3r, inference, shipped

    if study.teacher == "compact":
        checkpoint = shipped.locate(shipped.TEACHER).parent
    model = dust3r.load_checkpoint(checkpoint, study.device)
    return inference.DUSt3RTeacher(frames, model, folder=study.labels_folder, name=study.teacher)
