"""Labels for what a teacher was not sure of: what other views have there, if it looks alike.

Where an image has no label, at its borders and beside edges above all, other images mostly have one: they saw the place
in their middle. Their points are put into the image (splatted); the nearest that agree are the surface, unless
something hides it that none of them has labelled. That something nearly always has another colour.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from kdutils.alignment import world_points
from kdutils.alignment.consistency import TOLERANCE
from kdutils.alignment.photometric import NEAREST

VERSION = 1  # raise it when the same labels are completed otherwise: those on disk are then made anew
MOST_POINTS = 3_000_000  # of the other views' labels, thinned evenly
LEAST_AGREEING = 3
ALIKE = 0.04  # largest mean difference of red, green and blue, each from 0 to 1
STEPS_A_METRE = 10_000  # of depths as they are sorted


@torch.inference_mode()
def completed(depth, kept, pictures, intrinsics, poses, sources, device="cpu"):
    """Labels where there were none.

    Args:
        depth: ``(N, H, W)`` along z in metres. kept: ``(N, H, W)`` bool, where that is a label. pictures: ``(N, H, W,
            3)`` uint8. intrinsics: ``(3, 3)`` in pixels. poses: ``(N, 4, 4)`` camera-to-world, metres.
        sources: ``(N,)`` bool, images whose labels the others may take.

    Returns:
        Depth ``(N, H, W)`` float32, as before where nothing new was found, and where something was ``(N, H, W)`` bool.
    """
    depth, found = np.array(depth, np.float32), np.zeros(np.shape(kept), bool)
    points, colours = (torch.tensor(part, device=device) for part in _cloud(depth, kept & sources[:, None, None],
                                                                            pictures, intrinsics, poses))  # fmt: skip
    camera = torch.tensor(intrinsics, dtype=torch.float32, device=device)
    for image, pose in enumerate(torch.tensor(poses, dtype=torch.float32, device=device)):
        wanted = torch.tensor(~kept[image], device=device)
        pixels, surface, colour = seen(points, colours, pose, camera, wanted)
        own = torch.tensor(pictures[image], device=device).flatten(0, 1)[pixels] / 255
        alike = (colour - own).abs().mean(-1) < ALIKE
        chosen = pixels[alike].cpu().numpy()
        depth[image].reshape(-1)[chosen] = surface[alike].cpu().numpy()
        found[image].reshape(-1)[chosen] = True
    return depth, found


def seen(points, colours, pose, camera, wanted):
    """The surface that points make in some pixels of a view: the nearest that agree.

    Args:
        points: ``(M, 3)`` in the world. colours: ``(M, 3)``. pose: ``(4, 4)`` camera-to-world. camera: ``(3, 3)``.
        wanted: ``(H, W)`` bool.

    Returns:
        For K of the wanted pixels: their place in the flattened image ``(K,)``, mean depth ``(K,)`` and mean colour
        ``(K, 3)`` of the points that agree.
    """
    x, y, z = (camera @ pose[:3, :3].T @ (points - pose[:3, 3]).T).unbind(0)
    height, width = wanted.shape
    inside = torch.nonzero((z > NEAREST) & (x >= 0) & (x < width * z) & (y >= 0) & (y < height * z))[:, 0]
    x, y, z = x[inside], y[inside], z[inside]
    pixel = ((y / z).long().clamp(max=height - 1) * width) + (x / z).long().clamp(max=width - 1)
    holes = wanted.flatten()[pixel]
    z, pixel, colours = z[holes], pixel[holes], colours[inside[holes]]
    span = math.ceil(STEPS_A_METRE * float(z.max()) * (1 + TOLERANCE)) + 1 if len(z) else 1
    order, places = torch.sort(pixel * span + (STEPS_A_METRE * z).long())  # by pixel, and there the nearest first
    z, colours, pixel = z[places].double(), colours[places].double(), pixel[places]
    last = LEAST_AGREEING - 1
    agree = (pixel[last:] == pixel[: len(pixel) - last]) & (z[last:] < (1 + TOLERANCE) * z[: len(z) - last])
    begin = torch.nonzero(agree)[:, 0]
    _, times = pixel[begin].unique_consecutive(return_counts=True)
    begin = begin[times.cumsum(0) - times]  # the first of each pixel
    end = torch.searchsorted(order, pixel[begin] * span + (STEPS_A_METRE * (1 + TOLERANCE) * z[begin]).long())
    count = (end - begin)[:, None]
    summed = F.pad(torch.cat([z[:, None], colours], 1).cumsum(0), (0, 0, 1, 0))
    mean = (summed[end] - summed[begin]) / count
    return pixel[begin], mean[:, 0].float(), mean[:, 1:].float()


def _cloud(depth, chosen, pictures, intrinsics, poses):
    """World points ``(M, 3)`` of the chosen pixels, and their colours ``(M, 3)`` from 0 to 1."""
    points = world_points(depth, np.broadcast_to(intrinsics, (len(depth), 3, 3)), poses)[chosen]
    every = math.ceil(len(points) / MOST_POINTS) or 1
    return points[::every].astype(np.float32), pictures[chosen][::every].astype(np.float32) / 255
