"""Light that does not depend on the view: computed once a room, and looked up for each pixel.

It lies on a coarse grid over every face; shadows, contact darkening and one bounce are in it.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from kdutils.parallel import in_processes
from kdutils.rooms.solids import BALL, BOX, CYLINDER, FACES, entry, face_point, face_sizes

REACH = 0.9  # metres within which a surface darkens its neighbours


def bake_light(scene, spacing=0.13, workers=0):
    """The scene with its light grid filled: lamps with soft shadows, the room's own glow, contact darkening, bounce."""
    count = (2 * face_sizes(scene) / spacing).ceil().long().clamp(1, 64) + 1
    count[scene.shape != BOX, 0] = count[scene.shape != BOX, 0].clamp_min(
        7
    )  # a round side turns through all directions
    count[scene.shape == BALL, 1:] = 0
    count[scene.shape == CYLINDER, 1:4] = 0
    count = count.reshape(-1, 2)
    first = count.prod(1).cumsum(0) - count.prod(1)
    face = torch.arange(len(count), device=count.device).repeat_interleave(count.prod(1))
    index = torch.arange(len(face), device=count.device) - first[face]
    column, row = index % count[face, 0], index // count[face, 0]
    uv = torch.stack([column, row], 1) / (count[face] - 1) * 2 - 1
    point, normal = face_point(scene, face // FACES, face % FACES, uv * 0.97)
    # Neighbours share a chunk, so that most primitives can be left out for all of them at once.
    cell = (point / 0.6).floor()
    order = (cell @ torch.tensor([1.0, 64.0, 4096.0], device=cell.device)).argsort(stable=True)
    sizes = torch.unique_consecutive(cell[order], dim=0, return_counts=True)[1].tolist()
    chunks = list(zip(point[order].split(sizes), normal[order].split(sizes)))
    light = torch.empty_like(point)
    light[order] = torch.from_numpy(np.concatenate(list(in_processes(partial(_light_at, scene), chunks, workers)))).to(
        light
    )
    return replace(scene, light_grid=torch.cat([first[:, None], count], 1), light=light)


def _light_at(scene, spots):
    """RGB light, an array ``(N, 3)``, that falls on neighbouring points with their normals, both ``(N, 3)``."""
    point, normal = spots
    start = point + 2e-3 * normal
    light = torch.zeros_like(point)
    corners = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], device=point.device) / 3**0.5
    for lamp in scene.lamps:
        rays = lamp[:3] + corners[:, None] * lamp[6] - start  # (4, N, 3)
        distance = rays.norm(dim=2)
        facing = ((rays * normal).sum(2) / distance).clamp_min(0)
        if facing.any():
            reached = _first_hit(scene, start, rays, lamp[:3], lamp[6])[0] >= 1
            light += (reached * facing / (distance**2 + 0.3)).mean(0)[:, None] * lamp[3:6]
    depth, seen = _first_hit(scene, start, _dome(normal), start.mean(0), REACH)
    tint = scene.colours[scene.material[:, 2], 0]
    return (light + (0.24 * (depth / REACH).clamp_max(1)[..., None] + 0.22 * tint[seen]).mean(0)).cpu().numpy()


def _dome(normal, samples=16):
    """Unit rays ``(samples, N, 3)`` around normals, cosine-weighted: points of equal weight on a spiral."""
    side = F.normalize(
        normal.roll(1, 1) * torch.tensor([1.0, 1.0, -1.0], device=normal.device) + normal.roll(2, 1) * 0.5 + 1e-3, dim=1
    )
    side = F.normalize(side - (side * normal).sum(1, keepdim=True) * normal, dim=1)
    other = torch.linalg.cross(normal, side)
    k = torch.arange(samples, device=normal.device)[:, None, None]
    radius, angle = ((k + 0.5) / samples).sqrt(), k * 2.39996
    return (1 - radius**2).sqrt() * normal + radius * (angle.cos() * side + angle.sin() * other)


def _first_hit(scene, start, rays, target, spread):
    """Ray parameter and primitive, ``(S, N)`` each; where nothing is near, infinity and the room itself.

    Args:
        start: ``(N, 3)``, close together.
        rays: ``(S, N, 3)``, which all end within `spread` metres of `target` ``(3,)`` as far as they matter.
    """
    middle = start.mean(0)
    axis = target - middle
    away = scene.centre - middle
    share = ((away @ axis) / (axis @ axis + 1e-9)).clamp(0, 1)
    gap = (away - share[:, None] * axis).norm(dim=1) - scene.half.norm(dim=1)
    near = gap < spread + (start - middle).norm(dim=1).max() + 0.01
    near[0] = False
    near = near.nonzero()[:, 0]
    samples, spots, _ = rays.shape
    if not len(near):
        return torch.full((samples, spots), torch.inf).to(start), torch.zeros(samples, spots, dtype=torch.long).to(near)
    matrix, offset = (x[near] for x in scene.unit_map())
    origin = matrix @ start.T + offset[..., None]
    ways = matrix @ rays.reshape(-1, 3).T
    depth = entry(scene.shape[near], origin.repeat(1, 1, samples), ways)
    depth, hit = depth.min(0)
    seen = torch.where(depth < torch.inf, near[hit], 0)
    return depth.reshape(samples, spots), seen.reshape(samples, spots)


def look_up_light(scene, face, uv):
    """Light ``(3, N)``, interpolated between the texels of each face; arguments as `surface_points` gives them."""
    first, columns, rows = scene.light_grid.T.contiguous().index_select(1, face)
    x, y = (uv[0] + 1) / 2 * (columns - 1), (uv[1] + 1) / 2 * (rows - 1)
    x, y = torch.minimum(x.clamp_min(0), columns - 1.001), torch.minimum(y.clamp_min(0), rows - 1.001)
    corner = first + x.long() + y.long() * columns
    table = scene.light.T.contiguous()
    top, top_right, bottom, bottom_right = (
        table.index_select(1, corner + step) for step in (0, 1, columns, columns + 1)
    )
    across, down = x.frac(), y.frac()
    top, bottom = torch.addcmul(top, top_right - top, across), torch.addcmul(bottom, bottom_right - bottom, across)
    return torch.addcmul(top, bottom - top, down)
