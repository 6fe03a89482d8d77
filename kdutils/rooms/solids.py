"""Rays and solids: boxes, cylinders and ellipsoids, in torch.

Every primitive is an affine image of a unit shape in [-1, 1]^3, so that one slab test serves all of them; primitive 0
is the room itself, a box seen from inside.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

BOX, CYLINDER, BALL = range(3)
TILE = 16
NEAR = 0.02  # metres; the camera keeps farther from everything
FACES = 6  # -x, +x, -y, +y, -z, +z; a cylinder's side and a ball are face 0
FACE_AXES = ((1, 2), (1, 2), (0, 2), (0, 2), (0, 1), (0, 1))  # which local axes run along a face's u and v


@dataclass
class Scene:
    """A room as tensors: P primitives of six faces each, M materials, K lamps, L light texels. World frame, metres."""

    shape: torch.Tensor  # (P,) BOX, CYLINDER or BALL
    centre: torch.Tensor  # (P, 3)
    rotation: torch.Tensor  # (P, 3, 3) local to world
    half: torch.Tensor  # (P, 3) half extents
    seed: torch.Tensor  # (P,) int32, drives the textures
    material: torch.Tensor  # (P, 6) row of the material tables for each face
    pattern: torch.Tensor  # (M,) which of PATTERNS
    colours: torch.Tensor  # (M, 2, 3) linear RGB
    cells: torch.Tensor  # (M, 2) period of the pattern along u and v, metres
    shiny: torch.Tensor  # (M,) share of depth readings lost
    glow: torch.Tensor  # (M,) 0 is lit by the lamps, 1 shines by itself
    noise: torch.Tensor  # (1, 3, S, S) periodic noise that all textures read
    lamps: torch.Tensor  # (K, 7) position, colour, radius
    light_grid: torch.Tensor  # (P * 6, 3) first texel, columns, rows
    light: torch.Tensor  # (L, 3) RGB

    def to(self, device):
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def unit_map(self):
        """Matrices ``(P, 3, 3)`` and offsets ``(P, 3)`` that take world points into the unit shapes."""
        matrix = self.rotation.transpose(1, 2) / self.half[:, :, None]
        return matrix, -(matrix * self.centre[:, None]).sum(-1)


def entry(shape, origin, direction):
    """Ray parameter ``(N, R)`` at which rays enter N unit shapes: inf for a miss, 0 for a start inside.

    Args:
        shape: ``(N,)``.
        origin, direction: ``(N, 3, R)`` or ``(N, 3, 1)``, in the frame of each unit shape.
    """
    enter, leave = _slab(origin[:, 0], direction[:, 0])
    for axis in (1, 2):
        low, high = _slab(origin[:, axis], direction[:, axis])
        enter, leave = torch.maximum(enter, low), torch.minimum(leave, high)
    rows = (shape != BOX).nonzero()[:, 0]
    if len(rows):
        # A cylinder or ball is what its own quadric leaves of the unit box.
        low, high = _quadric(origin[rows], direction[rows], (shape[rows] == BALL).float()[:, None])
        enter[rows] = torch.maximum(enter[rows], low)
        leave[rows] = torch.minimum(leave[rows], high)
    return torch.where((enter < leave) & (leave > 1e-4), enter.clamp_min(0), torch.inf)


def _slab(origin, direction):
    inverse = 1 / direction
    middle, reach = -origin * inverse, inverse.abs()
    return middle - reach, middle + reach


def _quadric(origin, direction, ball):
    """Both ends of the chord in x^2 + y^2 + ball z^2 < 1; entry > exit for a miss."""
    weight = torch.stack([torch.ones_like(ball), torch.ones_like(ball), ball], 1)
    a = (direction * direction * weight).sum(1) + 1e-12
    b = (origin * direction * weight).sum(1)
    c = (origin * origin * weight).sum(1) - 1
    discriminant = b * b - a * c
    root = discriminant.clamp_min(0).sqrt()
    miss = torch.where(discriminant < 0, torch.inf, 0.0)
    return (-b - root) / a + miss, (-b + root) / a - miss


def leaving(origin, direction):
    """Ray parameter ``(N, R)`` at which rays leave unit boxes that they start in; arguments as in `entry`."""
    return torch.stack([_slab(origin[:, k], direction[:, k])[1] for k in range(3)]).amin(0)


def screen_boxes(scene, rotation, position, intrinsics):
    """Bounds of each primitive in each of F images.

    Returns:
        ``(F, P, 4)`` left, top, right, bottom in pixels (an empty interval when out of sight) and the nearest depth
        ``(F, P)``, metres.
    """
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).to(scene.half)
    corners = scene.centre[:, None] + (signs * scene.half[:, None]) @ scene.rotation.transpose(1, 2)
    corners = (corners[None] - position[:, None, None]) @ rotation[:, None]
    pairs = [(i, j) for i in range(8) for j in range(i) if (i ^ j).bit_count() == 1]
    a, b = corners[:, :, [i for i, _ in pairs]], corners[:, :, [j for _, j in pairs]]
    # Edges that cross the near plane are cut there, so the bounds hold for primitives beside the camera as well.
    share = (NEAR - a[..., 2:]) / (b[..., 2:] - a[..., 2:])
    cut = torch.where((share > 0) & (share < 1), a + share * (b - a), torch.nan)
    cut[..., 2] = torch.where(cut[..., 2].isnan(), torch.nan, NEAR)
    points = torch.cat([torch.where(corners[..., 2:] >= NEAR, corners, torch.nan), cut], 2)
    pixels = points[..., :2] / points[..., 2:] * intrinsics.diagonal()[:2] + intrinsics[:2, 2]
    low = pixels.nan_to_num(torch.inf).amin(2)
    high = pixels.nan_to_num(-torch.inf).amax(2)
    return torch.cat([low, high], -1), corners[..., 2].amin(2).clamp_min(NEAR)


def trace(scene, poses, intrinsics, size, twice=False):
    """Depth ``(F, H, W)`` along z and the primitive ``(F, H, W)`` that each ray sees; for `twice` see `pixel_rays`.

    Primitives are binned to screen tiles and taken from near to far; a tile is done as soon as the next one begins
    behind all it has seen.
    """
    height, width = size
    rows, columns = -(-height // TILE), -(-width // TILE)
    frames, tiles = len(poses), rows * columns
    rotation, position = poses[:, :3, :3], poses[:, :3, 3]
    rays = tile_rays(intrinsics, rows, columns, twice)  # (tiles, 3, TILE^2)
    matrix, offset = scene.unit_map()
    matrix, offset = matmul3(matrix, rotation[:, None]), (matrix * position[:, None, None]).sum(-1) + offset
    bounds, nearest = screen_boxes(scene, rotation, position, intrinsics)
    if twice:
        bounds = bounds * torch.tensor([1, 2, 1, 2], device=bounds.device) + torch.tensor(
            [-1, 0, 1, 0], device=bounds.device
        )
    bounds[:, 0] = torch.inf  # the room itself is the background, not a candidate
    nearest, order = nearest.sort(dim=1, stable=True)
    bounds = (bounds.gather(1, order[..., None].expand(-1, -1, 4)) / TILE).permute(2, 0, 1)[..., None]
    x, y = (torch.arange(n, device=rays.device) for n in (columns, rows))
    across = (x + 1 > bounds[0]) & (x < bounds[2])  # (F, P, columns)
    down = (y + 1 > bounds[1]) & (y < bounds[3])
    inside = (down[..., None] & across[:, :, None]).permute(0, 2, 3, 1).reshape(frames * tiles, -1)
    counts, candidates = inside.sum(1), inside.nonzero()[:, 1]
    first = counts.cumsum(0) - counts
    frame = torch.arange(frames, device=rays.device).repeat_interleave(tiles)
    tile = torch.arange(tiles, device=rays.device).repeat(frames)

    best = leaving(offset[frame, 0][..., None], _rotate_rays(matrix[frame, 0], rays[tile]))
    seen = torch.zeros(best.shape, dtype=torch.int32, device=best.device)
    farthest = best.amax(1)
    active, rank = torch.arange(frames * tiles, device=rays.device), 0
    while True:
        active = active[counts[active] > rank]
        candidate = candidates[first[active] + rank]
        worth = nearest[frame[active], candidate] < farthest[active]
        active, candidate = active[worth], candidate[worth]
        if not len(active):
            break
        f, p = frame[active], order[frame[active], candidate]
        depth = entry(scene.shape[p], offset[f, p][..., None], _rotate_rays(matrix[f, p], rays[tile[active]]))
        so_far = best[active]
        best[active] = torch.minimum(depth, so_far)
        seen[active] = torch.where(depth < so_far, p.int()[:, None], seen[active])
        farthest[active] = best[active].amax(1)
        rank += 1

    def untile(values):
        grid = values.reshape(frames, rows, columns, TILE, TILE).transpose(2, 3)
        return grid.reshape(frames, rows * TILE, columns * TILE)[:, :height, :width]

    return untile(best), untile(seen).long()


def pixel_rays(intrinsics, height, width, twice):
    """Rays ``(3, H, W)``, camera frame, z = 1: through the pixel centres or, `twice`, two to a pixel.

    The two lie on the pixel's diagonal and take a row each, so H counts them both; `intrinsics` are the pixels' own.
    """
    v, u = torch.meshgrid(*(torch.arange(n, device=intrinsics.device) + 0.5 for n in (height, width)), indexing="ij")
    if twice:
        u, v = u + 0.5 * (v.floor() % 2 - 0.5), v / 2
    return torch.stack(
        [(u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1], torch.ones_like(u)]
    )


def tile_rays(intrinsics, rows, columns, twice):
    """The same in tiles, ``(rows * columns, 3, TILE^2)``."""
    rays = pixel_rays(intrinsics, rows * TILE, columns * TILE, twice)
    return rays.reshape(3, rows, TILE, columns, TILE).permute(1, 3, 0, 2, 4).reshape(rows * columns, 3, -1)


def _rotate_rays(matrix, rays):
    """``(N, 3, 3)`` times ``(N, 3, R)``; rays have z = 1."""
    return torch.addcmul(
        torch.addcmul(matrix[:, :, 2:], matrix[:, :, :1], rays[:, :1]), matrix[:, :, 1:2], rays[:, 1:2]
    )


def matmul3(a, b):
    # Not a library product: its rounding may depend on the batch, and frames must not depend on their neighbours.
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def face_sizes(scene):
    """Half extents in metres ``(P, 6, 2)`` of every face along its u and v."""
    half = torch.stack([scene.half[:, list(axes)] for axes in FACE_AXES], 1)
    around = scene.half[:, :2].mean(1) * math.pi
    curved = (scene.shape != BOX)[:, None]
    side = torch.stack([around, scene.half[:, 2]], -1)
    half[:, 0] = torch.where(curved, side, half[:, 0])
    return half


def locate(shape, unit):
    """Face ``(N,)`` and coordinates ``(2, N)`` in [-1, 1] along it of points ``(3, N)`` on unit shapes ``(N,)``."""
    x, y, z = unit
    ax, ay, az = unit.abs()
    on_x, on_z = (ax >= ay) & (ax >= az), (az > ax) & (az > ay)
    face = torch.where(on_z, 4 + (z > 0).long(), torch.where(on_x, (x > 0).long(), 2 + (y > 0).long()))
    uv = torch.stack([torch.where(on_x, y, x), torch.where(on_z, y, z)])
    curved = (shape != BOX).nonzero()[:, 0]
    if len(curved):
        x, y, z = unit[:, curved]
        cap = (shape[curved] == CYLINDER) & (z.abs() > (x * x + y * y).sqrt())
        face[curved] = torch.where(cap, face[curved], 0)
        angle = torch.atan2(y, x) / math.pi
        uv[:, curved] = torch.where(cap, torch.stack([x, y]), torch.stack([angle, z]))
    return face, uv


def face_point(scene, primitive, face, uv):
    """World points and outward normals ``(N, 3)`` for coordinates on faces; the room's own normals point inside."""
    axis, sign = face // 2, (face % 2 * 2 - 1).float()
    rows = torch.arange(len(face), device=face.device)
    axes = torch.tensor(FACE_AXES, device=face.device)[face]
    unit = torch.zeros(len(face), 3, device=face.device)
    unit[rows, axes[:, 0]], unit[rows, axes[:, 1]] = uv[:, 0], uv[:, 1]
    unit[rows, axis] = sign
    normal = torch.zeros_like(unit)
    normal[rows, axis] = sign
    shape = scene.shape[primitive]
    angle, z = uv[:, 0] * math.pi, uv[:, 1]
    radius = torch.where(shape == BALL, (1 - z * z).clamp_min(0).sqrt(), 1.0)
    curved = torch.stack([radius * angle.cos(), radius * angle.sin(), z], 1)
    on_side = ((shape != BOX) & (face == 0))[:, None]
    unit = torch.where(on_side, curved, unit)
    flat = torch.where(shape == BALL, 1.0, 0.0)[:, None] * curved[:, 2:]
    normal = torch.where(on_side, torch.cat([curved[:, :2], flat], 1), normal)
    half, rotation = scene.half[primitive], scene.rotation[primitive]
    point = scene.centre[primitive] + (rotation * (unit * half)[:, None]).sum(-1)
    normal = F.normalize((rotation * (normal / half)[:, None]).sum(-1), dim=1)
    return point, torch.where(primitive[:, None] == 0, -normal, normal)
