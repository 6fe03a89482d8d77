"""Labels that other views bear out, and their mean: what multi-view stereo does with its depth maps.

A label is a point in the room. Put into another view it lies where that view has a label of its own: near it, and the
two agree; well in front of it, and that view looks through the point; well behind it, and something else may hide it.
As in MVSNet (arXiv 1804.02505, its depth maps' filter and fusion) a label is kept if two other views agree with it, and
here if fewer look through it; and it moves to the mean of what those that agree say.
"""

import numpy as np
import torch
import torch.nn.functional as F

from .photometric import NEAREST, neighbours, projected

VERSION = 1  # raise it when the same labels are fused otherwise: those on disk are then made anew
MOST_VIEWS = 24  # that an image is compared with
TOLERANCE = 0.03  # share of the depth by which views that agree may differ
LEAST_AGREEING = 2
LEAST_SLOPE = 0.2  # of a point's depth there by its depth here: in views at right angles one says nothing of the other
PASSES = 2  # the second is between labels that the first has kept


@torch.inference_mode()
def fused(depth, valid, intrinsics, poses, pairs, device="cpu"):
    """Labels on which views agree.

    Args:
        depth: ``(N, H, W)`` along z in metres. valid: ``(N, H, W)`` bool, where there is a label.
        intrinsics: ``(3, 3)`` in pixels. poses: ``(N, 4, 4)`` camera-to-world, metres.
        pairs: ``(P, 2)`` pairs of images; an image is compared with its ``photometric.neighbours`` in that graph.

    Returns:
        Depth ``(N, H, W)`` float32, as before where nothing is kept, and what is kept ``(N, H, W)`` bool: labels that
        two views agree with, or the only one that an image is paired with. Images in no pair stay as they are.
    """
    views, found, kept = neighbours(pairs, len(depth), MOST_VIEWS), np.array(depth, np.float32), np.array(valid)
    camera = torch.tensor(intrinsics, dtype=torch.float32, device=device)
    for _ in range(PASSES):
        known = torch.tensor(np.where(kept, found, 0), device=device)
        for image, others in enumerate(views):
            if not len(others):
                continue
            motions = torch.as_tensor(np.linalg.inv(poses[others]) @ poses[image], dtype=torch.float32, device=device)
            mean, agreeing, looking_through = compared(known[image], known[others], motions, camera)
            borne_out = (agreeing >= min(LEAST_AGREEING, len(others))) & (agreeing > looking_through)
            kept[image] = borne_out.cpu().numpy()
            found[image] = mean.cpu().numpy()
    return np.where(kept, found, depth).astype(np.float32), kept


def compared(own, others, motions, camera):
    """A view's labels and what K others have in their place.

    Args:
        own: ``(H, W)`` and others: ``(K, H, W)`` metres along z, 0 where there is no label. motions: ``(K, 4, 4)`` from
            own camera to the others. camera: ``(3, 3)`` intrinsics of all.

    Returns:
        Three of ``(H, W)``: the mean depth of own labels and those that agree with them; how many agree; and how many
        look through.
    """
    x, y, z = (place[:, 0] for place in projected(own.expand(len(others), 1, *own.shape), motions, camera))
    there = F.grid_sample(others[:, None], torch.stack([x, y], -1), mode="nearest", align_corners=False)[:, 0]
    both = (own > 0) & (there > 0) & (z > NEAREST)
    agreeing = both & ((z - there).abs() < TOLERANCE * there)
    # z = slope * own + ahead, and so the depth at which z would be what the other view has.
    ahead = motions[:, 2, 3, None, None]
    slope = (z - ahead) / own.clamp(min=NEAREST)
    telling = agreeing & (slope > LEAST_SLOPE)
    said = torch.where(telling, (there - ahead) / slope.clamp(min=LEAST_SLOPE), 0)
    mean = (own + said.sum(0)) / (1 + telling.sum(0))
    return mean, agreeing.sum(0), (both & (z < (1 - TOLERANCE) * there)).sum(0)
