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
MOST_POINTS = 250  # of all labels that may be taken, for each pixel of an image; more are thinned evenly
LEAST_AGREEING = 3
ALIKE = 0.04  # largest mean difference of red, green and blue, each from 0 to 1
STEPS_A_METRE = 10_000  # of the depth in the sort key, which is pixel and depth in one integer


@torch.inference_mode()
def completed(depth, kept, pictures, intrinsics, poses, sources, device="cpu"):
    """Labels where there were none.

    Args:
        depth: ``(N, H, W)`` along z in metres. kept: ``(N, H, W)`` bool, where that is a label. pictures: ``(N, H, W,
            3)`` uint8. intrinsics: ``(3, 3)`` in pixels. poses: ``(N, 4, 4)`` camera-to-world, metres.
        sources: ``(N,)`` bool, images whose labels the others may take: no test images, for these must not teach.

    Returns:
        Depth ``(N, H, W)`` float32, as before where nothing new was found, and where something was ``(N, H, W)`` bool.
    """
    device = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
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
        depth[image].flat[chosen] = surface[alike].cpu().numpy()
        found[image].flat[chosen] = True
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
    end = torch.searchsorted(
        order, pixel[begin] * span + (STEPS_A_METRE * (1 + TOLERANCE) * z[begin]).long(), right=True
    )
    count = (end - begin)[:, None]
    summed = F.pad(torch.cat([z[:, None], colours], 1).cumsum(0), (0, 0, 1, 0))
    mean = (summed[end] - summed[begin]) / count
    return pixel[begin], mean[:, 0].float(), mean[:, 1:].float()


def _cloud(depth, chosen, pictures, intrinsics, poses):
    """World points ``(M, 3)`` of the chosen pixels, and their colours ``(M, 3)`` from 0 to 1."""
    every = max(1, math.ceil(np.count_nonzero(chosen) / (MOST_POINTS * depth[0].size)))
    points, colours = [np.zeros((0, 3), np.float32)], [np.zeros((0, 3), np.uint8)]
    for image in np.flatnonzero(chosen.any((1, 2))):  # one by one: all points of a large scene are gigabytes
        places = np.flatnonzero(chosen[image])[::every]
        points.append(world_points(depth[[image]], intrinsics[None], poses[[image]]).reshape(-1, 3)[places])
        colours.append(pictures[image].reshape(-1, 3)[places])
    return np.concatenate(points).astype(np.float32), np.concatenate(colours).astype(np.float32) / 255
