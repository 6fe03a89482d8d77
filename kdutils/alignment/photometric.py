"""Photometric scale and depth: where poses are known, those for which a scene's views look alike.

A small network is off by some percent of the depth, smoothly over a patch. Where its cameras are known, two views tell
depth to a fraction of a pixel, if it is known about where to look. So multiples of every pixel's depth are tried (a
plane sweep along the teacher's own surfaces), and the one is kept at which its neighbours in the pair graph show the
same; semi-global smoothing (Hirschmüller, PAMI 2008) decides where walls are plain. The first pass looks further, the
second finer. What the teacher did not see stays unseen, and confidences stay the teacher's.

Before that, the same comparison tells how many metres the network's unit has: one multiple for the whole scene.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array

VERSION = 2  # raise it when the same labels are refined otherwise: those on disk are then made anew
MOST_VIEWS = 10  # that an image is compared with
PASSES = ((0.18, 13), (0.06, 9))  # how far the logarithm of the depth is searched to both sides, and how many are tried
WINDOW, LEAST_CONTRAST = 5, 0.01  # pixels around, by whose mean and deviation (of 1) a picture is normalised
MOST_DIFFERENCE = 1.0  # of normalised pictures; more is another surface, or a reflection
LENIENCE = 0.15  # a view whose difference is so much above the best ones' counts for a third: it may not see the place
PRIOR_WEIGHT, PRIOR = 0.03, 0.12  # what the teacher's depth counts for, and its deviation in logarithms
BEND, BREAK = 0.05, 0.2  # what one step between neighbouring pixels costs, and what more than one
NEAREST = 0.05  # metres before a camera
UNITS, ROOMS = 81, (0.4, 20.0)  # how many units are tried, such that the scene is so many metres away
LOOKED_AT = 12  # images that tell the unit, at most
LEAST_PEAK = 0.05  # by how much the logarithm of likeness has to rise above its median over all units
PIXELS_AT_ONCE = 2**17


@torch.inference_mode()
def unit(shards, images, intrinsics, poses, telling, device="cpu"):
    """Metres in one unit of a network that gives nearly the same unit to every pair.

    Args:
        shards: ``labelling.PairShards``.
        images, intrinsics, poses: see ``refine``.
        telling: ``(N,)`` bool, the images whose answers are looked at; test images should not be.

    Raises:
        ValueError: the pictures do not tell, as those of plain walls or of a camera that stands still.
    """
    others = neighbours(shards.pairs, len(images))
    said = _some_depths(shards, np.asarray(telling))
    middle = np.median([np.median(z[weight > 0]) for z, weight in said.values() if weight.any()] or [np.nan])
    units = torch.tensor(np.geomspace(*ROOMS, UNITS) / middle, dtype=torch.float32, device=device)
    camera = torch.tensor(intrinsics, dtype=torch.float32, device=device)
    total = torch.zeros(UNITS, device=device)
    for image, (z, weight) in said.items():
        shown = normalised(torch.tensor(images[[image, *others[image]]], device=device))
        motions = torch.tensor(np.linalg.inv(poses[others[image]]) @ poses[image], dtype=torch.float32, device=device)
        tried = torch.tensor(z, device=device) * units[:, None, None]
        alike = sum((differences(tried[None], shown[:1], other[None], motion[None], camera)[0] / -LENIENCE).exp()[0]
                    for other, motion in zip(shown[1:], motions))  # fmt: skip
        weight = torch.tensor(weight, device=device)
        total += (alike.log() * weight).sum((1, 2)) / weight.sum().clamp(min=1e-6)
    if not total.max() > total.median() + LEAST_PEAK:
        raise ValueError("the pictures do not tell how many metres the teacher's unit has: look whether the poses are "
                         "right and the camera moves, or use the teacher depth")  # fmt: skip
    place = lowest(-total[None, :, None, None])[0, 0, 0]
    return float(units[0] * (units[1] / units[0]) ** place)


def _some_depths(shards, telling):
    """Depth ``(H, W)`` in the network's unit and weight ``(H, W)`` of ``LOOKED_AT`` of the images, by image."""
    images, places = np.unique(shards.pairs[:, 0], return_index=True)
    images, places = images[telling[images]], places[telling[images]]
    every, said = max(1, math.ceil(len(images) / LOOKED_AT)), {}
    for image, place in zip(images[::every].tolist(), places[::every]):
        answer = shards.answer(place)
        points, confidence = answer.points_i[0], answer.confidence_i[0]
        there = np.isfinite(points).all(-1) & np.isfinite(confidence) & (points[..., 2] > 0)
        said[image] = np.where(there, points[..., 2], 1), np.log(np.where(there, confidence, 1))
    return said


@torch.inference_mode()
def refine(depth, images, intrinsics, poses, pairs, device="cpu", progress=None, passes=PASSES):
    """Depths moved to where the views agree.

    Args:
        depth: ``(N, H, W)`` along z in metres, 0 where there is none.
        images: ``(N, H, W, 3)`` uint8.
        intrinsics: ``(3, 3)`` in pixels.
        poses: ``(N, 4, 4)`` camera-to-world, metres.
        pairs: ``(P, 2)`` directed pairs of images; an image is compared with its ``neighbours`` in that graph.
        progress: called with the batches of images, e.g. ``tqdm``. passes: see ``PASSES``.

    Returns:
        ``(N, H, W)`` float32; what has no depth, and images in no pair, stay as they are.
    """
    refined = np.array(depth, np.float32)
    others = neighbours(pairs, len(depth))
    paired = [image for image in range(len(depth)) if len(others[image])]
    at_once = max(1, PIXELS_AT_ONCE // depth[0].size)
    batches = [paired[k : k + at_once] for k in range(0, len(paired), at_once)]
    shown = normalised_all(images, device)
    camera = torch.tensor(intrinsics, dtype=torch.float32, device=device)
    for batch in (progress or iter)(batches):
        most = max(len(others[image]) for image in batch)
        sides = np.stack([np.resize(others[image], most) for image in batch])
        counts = np.stack([np.arange(most) < len(others[image]) for image in batch])  # what fills short lists does not
        motions = np.linalg.inv(poses[sides]) @ poses[batch][:, None]
        own, other = (shown[torch.as_tensor(index, device=device)].float() for index in (batch, sides))
        motions = torch.as_tensor(motions, dtype=torch.float32, device=device)
        before, counts = (torch.tensor(array, device=device) for array in (refined[batch], counts))
        refined[batch] = _swept(before, own, other, counts, motions, camera, passes).cpu().numpy()
    return refined


def neighbours(pairs, count, most=MOST_VIEWS):
    """For each of ``count`` images at most so many others: of its pairs, then with most partners in common."""
    ones = np.ones(len(pairs), np.float32)
    paired = coo_array((ones, tuple(np.transpose(pairs))), (count, count)).tocsr()
    paired = ((paired + paired.T) > 0).astype(np.float32)
    near = (count * paired + paired @ paired).tocsr()
    near.setdiag(0)
    near.eliminate_zeros()
    rows = (slice(*ends) for ends in zip(near.indptr, near.indptr[1:]))
    return [near.indices[row][np.argsort(-near.data[row], kind="stable")[:most]] for row in rows]


def normalised(images):
    """Grey pictures ``(B, H, W)`` of uint8 ``(B, H, W, 3)``, each pixel by mean and deviation of those around it.

    Light and exposure drop out; what is plain becomes nearly 0.
    """
    grey = images.float().mean(-1)[:, None] / 255
    mean = _blurred(grey)
    spread = (_blurred(grey**2) - mean**2).clamp(min=0)
    return ((grey - mean) / (spread + LEAST_CONTRAST**2).sqrt())[:, 0]


def normalised_all(images, device):
    """The same ``(N, H, W)`` of ``(N, H, W, 3)``, in half precision on the device, some images at a time."""
    at_once = max(1, PIXELS_AT_ONCE // images[0, ..., 0].size)
    return torch.cat([normalised(torch.tensor(images[k : k + at_once], device=device)).half()
                      for k in range(0, len(images), at_once)])  # fmt: skip


def _blurred(grey):
    weights = torch.exp(-((torch.arange(WINDOW, device=grey.device) - WINDOW // 2) / (WINDOW / 3.5)).square() / 2)
    grey = F.pad(grey, [WINDOW // 2] * 4, mode="replicate")
    for side in (2, 3):  # not as a convolution: a GPU's is too coarse for the small difference that the spread is
        grey = (grey.unfold(side, WINDOW, 1) * (weights / weights.sum())).sum(-1)
    return grey


def _swept(before, own, other, counts, motions, camera, passes):
    """Depths ``(B, H, W)`` after all passes.

    Args:
        before: ``(B, H, W)`` metres. own: ``(B, H, W)`` and other: ``(B, K, H, W)``, normalised. counts: ``(B, K)``
            bool, which others there are. motions: ``(B, K, 4, 4)`` from own camera to the others.
    """
    depth = before
    for reach, count in passes:
        shifts = torch.linspace(-reach, reach, count, device=before.device)
        tried = depth[:, None] * shifts.exp()[:, None, None]
        alike = torch.full_like(tried, 1e-6)
        for k in range(other.shape[1]):
            off, there = differences(tried, own, other[:, k], motions[:, k], camera)
            alike += (there & counts[:, k, None, None])[:, None] * off.div_(-LENIENCE).exp_()
        cost = -LENIENCE * alike.log()
        away = (tried / before[:, None].clamp(min=NEAREST)).clamp(min=1e-3).log()
        cost = smoothed(cost + PRIOR_WEIGHT / 2 * (away / PRIOR).square())
        depth = _median(depth * (shifts[1] - shifts[0]).mul(lowest(cost) - count // 2).exp())
        depth = torch.where(before > 0, depth, before)
    return depth


def differences(tried, own, other, motion, camera):
    """How unlike two pictures are where S depths of every pixel put it into the other one.

    Args:
        tried: ``(B, S, H, W)`` metres, S odd. own, other: ``(B, H, W)`` normalised. motion: ``(B, 4, 4)`` from own
            camera to the other. camera: ``(3, 3)`` intrinsics of both.

    Returns:
        Differences ``(B, S, H, W)``, and which pixels the other picture may show ``(B, H, W)``: those that the middle
        depth puts inside. If every depth had a say in this, those that end inside would win.
    """
    x, y, z = projected(tried, motion, camera)
    middle = tried.shape[1] // 2
    return unlike(x, y, own, other), inside(*(place[:, middle] for place in (x, y, z)))


def unlike(x, y, own, other):
    """Differences ``(B, S, H, W)``, averaged around each pixel, of a picture ``own (B, H, W)`` from what another one
    ``(B, H, W)`` has at the places ``x``, ``y`` ``(B, S, H, W)`` of ``projected``."""
    grid = torch.stack([x, y], -1).flatten(1, 2)
    shown = F.grid_sample(other[:, None], grid, padding_mode="border", align_corners=False)
    return _averaged((shown.view_as(x) - own[:, None]).abs_().clamp_(max=MOST_DIFFERENCE))


def inside(x, y, z):
    """Which of the places ``(B, S, H, W)`` of ``projected`` the other picture may show, bool of that shape."""
    return (z > NEAREST) & (x.abs() < 1) & (y.abs() < 1)


def projected(depth, motion, camera):
    """Where another view has the pixels of one.

    Args:
        depth: ``(B, S, H, W)`` metres along z. motion: ``(B, 4, 4)`` from own camera to the other. camera: ``(3, 3)``
            intrinsics of both.

    Returns:
        Three of ``(B, S, H, W)``: x and y from -1 to 1 inside that picture, and the depth there.
    """
    height, width = depth.shape[-2:]
    v, u = torch.meshgrid(*(torch.arange(side, device=depth.device) + 0.5 for side in (height, width)), indexing="ij")
    turned = camera @ motion[:, :3, :3] @ torch.linalg.inv(camera) @ torch.stack([u, v, torch.ones_like(u)]).flatten(1)
    x, y, z = (depth * turned[:, k].view(-1, 1, height, width) + (motion[:, :3, 3] @ camera[k]).view(-1, 1, 1, 1)
               for k in range(3))  # fmt: skip
    inverse = 1 / z.clamp(min=NEAREST)
    return 2 / width * x * inverse - 1, 2 / height * y * inverse - 1, z


def _averaged(x):
    """Mean of 3x3 pixels of ``(B, S, H, W)``: torch's pooling is several times slower on a CPU."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    return (x[..., :-2] + x[..., 1:-1] + x[..., 2:]) / 9


def smoothed(cost):
    """Costs ``(B, S, H, W)`` after semi-global aggregation from four sides."""
    total = torch.zeros_like(cost)
    for side in (2, 3):
        for backwards in (False, True):
            along = cost.movedim(side, 0)  # (L, B, S, M)
            along = along.flip(0) if backwards else along
            path = [along[0]]
            for here in along[1:]:
                last = F.pad(path[-1], (0, 0, 1, 1), value=torch.inf)
                least = path[-1].amin(1, keepdim=True)
                bent = torch.minimum(last[:, :-2], last[:, 2:]) + BEND
                path.append(here + torch.minimum(torch.minimum(path[-1], bent), least + BREAK) - least)
            aggregated = torch.stack(path)
            total += (aggregated.flip(0) if backwards else aggregated).movedim(0, side)
    return total / 4


def lowest(cost):
    """Where along S the costs ``(B, S, H, W)`` are lowest ``(B, H, W)``, between steps by a parabola."""
    at = cost.argmin(1, keepdim=True).clamp(1, cost.shape[1] - 2)
    before, here, after = (cost.gather(1, at + k)[:, 0] for k in (-1, 0, 1))
    return at[:, 0] + ((before - after) / (2 * (before - 2 * here + after)).clamp(min=1e-6)).clamp(-1, 1)


def _median(depth):
    """Median of 3x3 pixels, where that is a depth."""
    padded = F.pad(depth[:, None], (1, 1, 1, 1), mode="replicate")
    median = F.unfold(padded, 3).median(1).values.view_as(depth)
    return torch.where(median > 0, median, depth)
