"""Labels for what neither a teacher nor other views' labels tell: stereo between a scene's own images.

A small teacher is unsure of what it sees from near, and so are all its views of it: there completion finds nothing to
take. Where cameras are known, pictures alone can tell: every depth that the scene has is tried (a plane sweep, as of
COLMAP or MVSNet), and the one is taken at which other images show the same. Labels that are there stay, and hold the
smooth surfaces around them. What two other views do not bear out is dropped.
"""

import numpy as np
import torch

from . import consistency, photometric

VERSION = 1  # raise it when the same labels are filled otherwise: those on disk are then made anew
MOST_VIEWS = 20  # that an image is compared with
DEPTHS = 64  # tried, in even steps of the inverse depth: some pixels of 128 columns each, which ``PASSES`` make finer
NEAREST = 0.3  # metres
FARTHEST = 0.999, 1.15  # this quantile of the labels' depth, and a little more
LEAST_VIEWS = 2  # that show a place
UNSEEN = 1e-3  # likeness of a depth at which fewer do: less than of any that is seen
DRIFT, MOST_DRIFT = 0.1, 0.4  # what each step away from a label costs, and what it costs at most
PASSES = ((0.04, 9),)  # then finer, see ``photometric.PASSES``


@torch.inference_mode()
def filled(depth, known, pictures, intrinsics, poses, pairs, sources, device="cpu", progress=None):
    """Labels where there were none.

    Args:
        depth: ``(N, H, W)`` along z in metres. known: ``(N, H, W)`` bool, where that is a label. pictures: ``(N, H, W,
            3)`` uint8. intrinsics: ``(3, 3)`` in pixels. poses: ``(N, 4, 4)`` camera-to-world, metres.
        pairs: ``(P, 2)`` pairs of images; an image is compared with its ``photometric.neighbours`` in that graph.
        sources: ``(N,)`` bool, the images that are filled, by one another: no test images, for these must not teach.
        progress: called with the images' numbers, e.g. ``tqdm``.

    Returns:
        Depth ``(N, H, W)`` float32, as before where nothing new was found, and where something was ``(N, H, W)`` bool.
    """
    depth, pairs = np.array(depth, np.float32), np.asarray(pairs)[np.asarray(sources)[pairs].all(1)]
    views = photometric.neighbours(pairs, len(depth), MOST_VIEWS)
    chosen = np.array([len(others) >= LEAST_VIEWS for others in views])
    if not known[chosen].any():
        return depth, np.zeros_like(known)
    tried = _swept_all(depth, known, pictures, intrinsics, poses, views, chosen, device, progress or iter)
    refined = photometric.refine(tried, pictures, intrinsics, poses, pairs, device, passes=PASSES)
    refined = np.where(known, depth, refined)
    fused, kept = consistency.fused(refined, known | chosen[:, None, None], intrinsics, poses, pairs, device)
    found = kept & ~known
    return np.where(found, fused, depth), found


def _swept_all(depth, known, pictures, intrinsics, poses, views, chosen, device, progress):
    """Depth ``(N, H, W)`` with a guess wherever the chosen images have no label."""
    quantile, more = FARTHEST
    farthest = max(more * float(np.quantile(depth[chosen][known[chosen]], quantile)), 2 * NEAREST)
    steps = torch.linspace(1 / NEAREST, 1 / farthest, DEPTHS, device=device)
    shown, tried = photometric.normalised_all(pictures, device), depth.copy()
    camera = torch.tensor(intrinsics, dtype=torch.float32, device=device)
    for image in progress(np.flatnonzero(chosen).tolist()):
        others = views[image]
        motions = torch.as_tensor(np.linalg.inv(poses[others]) @ poses[image], dtype=torch.float32, device=device)
        label = torch.tensor(np.where(known[image], depth[image], 0), device=device)
        found = swept(steps, label, shown[image].float(), shown[others].float(), motions, camera)
        tried[image] = torch.where(label > 0, label, found).cpu().numpy()
    return tried


def swept(steps, label, own, others, motions, camera):
    """The depth ``(H, W)`` in metres at which K other pictures show most nearly what a picture's pixels show.

    Args:
        steps: ``(S,)`` inverse depths, evenly spaced. label: ``(H, W)`` metres, 0 where there is none. own: ``(H, W)``
            and others: ``(K, H, W)``, normalised pictures. motions: ``(K, 4, 4)`` from own camera to the others.
            camera: ``(3, 3)`` intrinsics of all.
    """
    tried = (1 / steps)[None, :, None, None].expand(1, -1, *own.shape)
    alike, seen = torch.zeros(tried.shape, device=own.device), torch.zeros(tried.shape, device=own.device)
    for other, motion in zip(others, motions):
        x, y, z = photometric.projected(tried, motion[None], camera)
        inside = photometric.inside(x, y, z)
        alike += inside * photometric.unlike(x, y, own[None], other[None]).div_(-photometric.LENIENCE).exp_()
        seen += inside
    # By the root of their number: a sum would favour depths that many views could show, a mean those of a chance few.
    alike = torch.where(seen >= LEAST_VIEWS, alike / seen.clamp(min=1).sqrt(), UNSEEN)
    cost = -photometric.LENIENCE * alike.log()
    away = (steps[:, None, None] - 1 / torch.where(label > 0, label, 1)).abs() / (steps[0] - steps[1])
    held = cost.amin(1, keepdim=True) + (DRIFT * away).clamp(max=MOST_DRIFT)
    place = photometric.lowest(photometric.smoothed(torch.where(label > 0, held, cost)))[0]
    return 1 / (steps[0] + (steps[1] - steps[0]) * place)
