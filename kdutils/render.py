"""A small ray caster: boxes, cylinders and ellipsoids with procedural textures and baked light, in torch.

Every primitive is an affine image of a unit shape in [-1, 1]^3, so that one slab test serves all of them; primitive 0
is the room itself, a box seen from inside. Light does not depend on the view, so it is computed once per room on a
coarse grid over every face (shadows, contact darkening and one bounce included) and only looked up per pixel.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

BOX, CYLINDER, BALL = range(3)
TILE = 16
NEAR = 0.02  # metres; the camera keeps farther from everything
REACH = 0.9  # metres within which a surface darkens its neighbours
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


# ---------------------------------------------------------------------------------------------------- intersection


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
    matrix, offset = _matmul3(matrix, rotation[:, None]), (matrix * position[:, None, None]).sum(-1) + offset
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


def _matmul3(a, b):
    # Not a library product: its rounding may depend on the batch, and frames must not depend on their neighbours.
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


# ------------------------------------------------------------------------------------------------------ light


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
    light[order] = torch.from_numpy(np.concatenate(list(parallel_map(partial(_light_at, scene), chunks, workers)))).to(
        light
    )
    return replace(scene, light_grid=torch.cat([first[:, None], count], 1), light=light)


def _as_is(result):
    return result


class _Calls(torch.utils.data.Dataset):
    def __init__(self, function, items):
        self.function, self.items = function, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        with torch.inference_mode():
            return self.function(self.items[index])


def parallel_map(function, items, workers):
    """Results of ``function(item)`` in order, from worker processes.

    Their torch runs on one thread each: the many small operations here lose more than they gain when each is split
    over threads, most of all on a machine with other work.
    """
    if not workers:
        return (function(item) for item in items)
    # Without a generator of its own the loader would draw on the caller's random numbers.
    return iter(
        torch.utils.data.DataLoader(
            _Calls(function, items),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            generator=torch.Generator(),
        )
    )


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


# ---------------------------------------------------------------------------------------------------- textures


def noise_table(size=256):
    """Periodic noise ``(1, 3, S + 1, S + 1)`` in about [0, 1]: clouds of all scales, blobs, fine grain."""
    rng = np.random.default_rng(12)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size) * size, np.fft.fftfreq(size) * size))
    frequency[0, 0] = np.inf
    shapes = [
        frequency**-1.3 * (frequency > 2),
        np.exp(-(((frequency - 9) / 3) ** 2)),
        np.exp(-(((frequency - 60) / 40) ** 2)),
    ]
    table = np.stack([np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * s).real for s in shapes])
    table = 0.5 + 0.22 * table / table.std(axis=(1, 2), keepdims=True)
    return torch.tensor(np.pad(table, ((0, 0), (0, 1), (0, 1)), mode="wrap"), dtype=torch.float32)[None]


class Spots:
    """N points of one pattern: where they lie on their faces and what drives their colours."""

    def __init__(self, noise, uv, half, seed, colours, cells):
        self.table, self.seed = noise, seed
        self.u, self.v = uv * half  # metres from the face's centre
        self.hu, self.hv = half
        self.s, self.t = uv  # the same in [-1, 1]
        self.a, self.b = colours[:3], colours[3:]  # (3, N)
        self.cu, self.cv = cells.unbind(1)

    def rand(self, *cells):
        """Hash of the primitive's seed and integer cells, in [0, 1)."""
        h = self.seed
        for cell in cells:
            h = (h ^ (cell.int() if torch.is_tensor(cell) else cell)) * 668265261
            h = h ^ ((h >> 15) & 0x1FFFF)
        h = h * 73244475
        return ((h >> 9) & 0xFFFF).float() / 65536

    def noise(self, per_u, per_v=None, u=None, v=None):
        """Noise channels ``(3, N)`` with the given table periods per metre along u and v."""
        x = (self.u if u is None else u) * per_u + self.rand(91)
        y = (self.v if v is None else v) * (per_u if per_v is None else per_v) + self.rand(92)
        grid = torch.stack([x - x.floor(), y - y.floor()], -1) * 2 - 1
        return F.grid_sample(self.table, grid[None, None], align_corners=True)[0, :, 0]

    def edge(self):
        """Distance to the face's edge, metres."""
        return torch.minimum(self.hu - self.u.abs(), self.hv - self.v.abs())


def mix(a, b, share):
    return torch.addcmul(a, b - a, share.clamp(0, 1))


def vivid(h):
    """A lively colour ``(3, N)`` for each number in [0, 1)."""
    phase = torch.stack([h, h + 0.36, h + 0.69]) * 2 * math.pi
    return (0.29 + 0.2 * phase.cos()) * (0.35 + 0.9 * (h * 7.13 % 1))


def only(mask, value, otherwise):
    """`value` where the mask holds, with colours given as tuples or ``(3, N)``."""
    if isinstance(value, tuple):
        value = torch.tensor(value, device=mask.device)[:, None]
    return torch.where(mask, value, otherwise)


def cell_of(x, size):
    """Number of the cell, and the place in it in [0, 1)."""
    k = (x / size).floor()
    return k, x / size - k


def plain(s):
    cloud, _, grain = s.noise(0.9)
    return mix(s.a, s.b, 0.9 * (cloud - 0.25) + 0.25 * (grain - 0.5))


def plaster(s):
    cloud, blob, _ = s.noise(0.33)
    _, dabs, grain = s.noise(2.1)
    stain = (blob - 0.72).clamp_min(0) * 2.2 + 0.9 * (cloud - 0.5) + 0.14 * (dabs - 0.5) + 0.16 * (grain - 0.5)
    return mix(s.a, s.b, 0.35 + stain)


def wallpaper(s):
    k, x = cell_of(s.u + s.hu, s.cu)
    row, y = cell_of(s.v + (k % 2) * s.cv / 2, s.cv)
    motif = ((x - 0.5) * s.cu) ** 2 + ((y - 0.5) * s.cv) ** 2 < (s.cu * (0.16 + 0.12 * s.rand(k, row))) ** 2
    base = mix(plaster(s), s.b, 0.35 * (k % 2))
    return only(motif, mix(s.b, vivid(s.rand(k, row, 3)), torch.full_like(x, 0.35)), base)


def wood(s):
    along, across = torch.where(s.hu > s.hv, s.u, s.v), torch.where(s.hu > s.hv, s.v, s.u)
    return _grain(s, along, across)


def _grain(s, along, across):
    cloud, _, _ = s.noise(0.25, 1.1, along, across)
    _, _, fine = s.noise(0.35, 3.2, along, across)
    rings = 0.5 + 0.5 * torch.sin((cloud * 9 + across * 14) * 2 * math.pi)
    return mix(s.a, s.b, 0.45 * rings + 0.5 * fine)


def planks(s):
    row, y = cell_of(s.v + s.hv, s.cv)
    column, x = cell_of(s.u + s.rand(row) * s.cu, s.cu)
    tone = s.rand(row, column, 5)
    gap = torch.minimum(torch.minimum(y, 1 - y) * s.cv, torch.minimum(x, 1 - x) * s.cu)
    board = _grain(s, s.u + 7 * tone, s.v + 3 * tone) * (0.65 + 0.6 * tone)
    return board * (0.35 + 0.65 * (gap / 0.004).clamp(0, 1))


def tiles(s):
    column, x = cell_of(s.u + s.hu, s.cu)
    row, y = cell_of(s.v + s.hv, s.cv)
    tone = s.rand(row, column)
    cloud, _, grain = s.noise(1.3)
    tile = mix(s.a, s.b, 0.5 * tone + 0.5 * (cloud - 0.4) + 0.2 * (grain - 0.5))
    tile = only(tone > 0.93, s.b * 0.8, tile)
    radius = ((x - 0.5) ** 2 + (y - 0.5) ** 2).sqrt()
    tile = only((tone > 0.8) & ((radius - 0.25 - 0.3 * (tone - 0.8)).abs() < 0.05), vivid(s.rand(3)), tile)
    gap = torch.minimum(torch.minimum(y, 1 - y) * s.cv, torch.minimum(x, 1 - x) * s.cu)
    return only(gap < 0.004, s.a * 0.45, tile)


def checker(s):
    column, x = cell_of(s.u, s.cu)
    row, y = cell_of(s.v, s.cv)
    cloud, _, grain = s.noise(1.5)
    share = ((column + row) % 2) * 0.85 + 0.3 * (s.rand(row, column) - 0.5) + 0.5 * (cloud - 0.5) + 0.2 * (grain - 0.5)
    gap = torch.minimum(torch.minimum(y, 1 - y) * s.cv, torch.minimum(x, 1 - x) * s.cu)
    return mix(s.a, s.b, share) * (0.55 + 0.45 * (gap / 0.004).clamp(0, 1))


def fabric(s):
    _, _, weave = s.noise(6.0)
    cloud, _, _ = s.noise(0.8)
    column, x = cell_of(s.u, s.cu)
    row, y = cell_of(s.v, s.cv)
    plaid = 0.35 * (x < 0.35) + 0.35 * (y < 0.35)
    return mix(s.a, s.b, plaid + 0.7 * (weave - 0.5) + 0.6 * (cloud - 0.5))


def rug(s):
    ring, _ = cell_of(s.edge(), s.cu)
    zigzag, _ = cell_of(s.u + 0.5 * (s.v / 0.3 - (s.v / 0.3).floor() - 0.5).abs(), 0.14)
    middle = mix(s.a, s.b, (zigzag % 2) * 0.8)
    middle = only(s.rand(zigzag, 8) > 0.7, vivid(s.rand(zigzag, 9)), middle)
    rug = only(ring < 3, mix(s.b, vivid(s.rand(ring, 4)), (ring % 2) * 0.9), middle)
    _, _, weave = s.noise(5.0)
    cloud, _, _ = s.noise(0.7)
    return rug * (0.55 + 0.5 * weave + 0.4 * cloud)


def books(s):
    k, x = cell_of(s.u, s.cu)
    split = 0.3 + 0.4 * s.rand(k)
    second = x > split
    k = 2 * k + second
    width = torch.where(second, 1 - split, split)
    x = torch.where(second, x - split, x) / width
    height = 1 - 0.28 * s.rand(k, 1) ** 2
    y = (s.t + 1) / 2 / height
    cover = mix(vivid(s.rand(k, 2)), s.a, 0.5 * s.rand(k, 3))
    title = (x > 0.3) & (x < 0.7) & (y > 0.35) & (y < 0.8) & (s.rand((s.v / 0.012).floor(), k, 6) > 0.35)
    band = ((y - 0.12 - 0.12 * s.rand(k, 4)).abs() < 0.035) | ((y - 0.9).abs() < 0.02)
    cover = only(title | (band & (s.rand(k, 7) > 0.3)), mix(cover, s.b, torch.full_like(x, 0.75)), cover)
    rounding = 0.45 + 0.75 * (1 - (2 * x - 1) ** 2).clamp_min(0).sqrt()
    return only(y > 1, (0.02, 0.017, 0.015), cover * rounding)


def text(s, x, y, line=0.02):
    """Where words are printed, for coordinates in metres."""
    row, in_row = cell_of(y, line)
    word, in_word = cell_of(x + 0.3 * s.rand(row), line * 2.2)
    return (in_row > 0.3) & (in_row < 0.75) & (in_word < 0.35 + 0.6 * s.rand(row, word)) & (s.rand(row, word, 2) > 0.2)


def paper(s):
    printed = text(s, s.u, s.v, 0.018) & (s.edge() > 0.02)
    picture = (s.s - 0.3 * (s.rand(1) - 0.5)).abs().maximum((s.t - s.rand(2)).abs()) < 0.35
    sheet = only(printed, s.b, s.a)
    return only(picture & (s.rand(3) > 0.4), vivid(s.rand((s.u / 0.03).floor(), (s.v / 0.03).floor())), sheet)


def screen(s):
    sheet = mix(vivid(s.rand(1)), vivid(s.rand(2)), (s.t + 1) / 2)
    for k in range(3):
        x, y = s.s - (s.rand(k, 3) - 0.5) * 0.9, s.t - (s.rand(k, 4) - 0.5) * 0.8
        width, height = 0.35 + 0.35 * s.rand(k, 5), 0.4 + 0.35 * s.rand(k, 6)
        dark = s.rand(k, 7) > 0.5
        page = only(dark, (0.02, 0.025, 0.03), torch.full_like(s.a, 0.75))
        ink = mix(vivid(s.rand((s.v / 0.014).floor(), k)), page, torch.full_like(x, 0.15))
        page = only(text(s, s.u + k, s.v, 0.014) & (x.abs() < width * 0.9) & (y < height * 0.75), ink, page)
        page = only(y > height * 0.86, (0.15, 0.22, 0.35), page)
        sheet = only((x.abs() < width) & (y.abs() < height), page, sheet)
    return only(s.edge() < 0.012, (0.01, 0.01, 0.012), sheet)


def poster(s):
    sheet = mix(vivid(s.rand(1)), vivid(s.rand(2)), (s.t + 1) / 2 + 0.3 * s.s)
    for k in range(7):
        x, y = s.s - 1.5 * (s.rand(k, 3) - 0.5), s.t - 1.5 * (s.rand(k, 4) - 0.5)
        width, kind = 0.12 + 0.4 * s.rand(k, 5), s.rand(k, 6)
        disc = x * x + y * y * (s.hv / s.hu) ** 2 < width**2
        block = x.abs().maximum(y.abs() * 2) < width
        stripe = ((x + (kind - 0.8) * 6 * y).abs() < 0.3 * width) & (y.abs() < 0.6)
        mask = torch.where(kind < 0.45, disc, torch.where(kind < 0.75, block, stripe))
        sheet = only(mask, vivid(s.rand(k, 7)) * 1.3, sheet)
    sheet = only((s.t < -0.62) & text(s, s.u, s.v, 0.05) & (s.s.abs() < 0.8), s.b, sheet)
    return only(s.edge() < 0.025, s.a, sheet)


def painting(s):
    cloud, blob, dabs = s.noise(1.1)
    sheet = mix(vivid(s.rand(1)) + 0.35, vivid(s.rand(2)) + 0.15, (s.t + 1) / 2 + 0.8 * (cloud - 0.5))
    for k in range(4):
        ridge, hump, _ = s.noise(0.8 + 0.3 * k, 0.0, s.u + 1.7 * k, s.v)
        level = 0.45 - 0.4 * k + 0.8 * (ridge - 0.5) + 0.2 * (hump - 0.5)
        hill = vivid(s.rand(k, 3)) * (0.5 + 0.6 * blob + 0.4 * dabs)
        sheet = only(s.t < level, hill, sheet)
    return sheet


def framed(s):
    mat = only(s.edge() < 0.075, (0.75, 0.73, 0.68), painting(s))
    return only(s.edge() < 0.03, s.a * (0.7 + 0.6 * (s.edge() / 0.03).clamp(0, 1)), mat)


def panel(s):
    """Cabinet doors or drawers: bevelled fields with a gap around and a handle each."""
    columns, rows = (2 * s.hu / s.cu).round().clamp_min(1), (2 * s.hv / s.cv).round().clamp_min(1)
    column, x = cell_of(s.s + 1, 2 / columns)
    row, y = cell_of(s.t + 1, 2 / rows)
    width, height = 2 * s.hu / columns, 2 * s.hv / rows
    inset = torch.minimum(torch.minimum(x, 1 - x) * width, torch.minimum(y, 1 - y) * height)
    face = wood(s)
    bevel = ((inset - 0.055).abs() < 0.008).float() * torch.where(y + x > 1, -0.35, 0.25)
    face = face * (1 + bevel)
    low = height < 0.3
    side = torch.where(column % 2 == 0, 0.88, 0.12)
    bar = torch.where(
        low,
        ((x - 0.5).abs() * width < 0.07) & ((y - 0.72).abs() * height < 0.010),
        ((x - side).abs() * width < 0.010) & ((y - 0.7).abs() * height < 0.07),
    )
    shadow = torch.where(
        low,
        ((x - 0.5).abs() * width < 0.07) & ((y - 0.72).abs() * height < 0.022),
        ((x - side).abs() * width < 0.020) & ((y - 0.7).abs() * height < 0.08),
    )
    face = only(bar, (0.45, 0.45, 0.46), only(shadow, face * 0.6, face))
    return only(inset < 0.005, (0.015, 0.013, 0.012), face)


def door(s):
    column, x = cell_of(s.s + 1, 1.0)
    row, y = cell_of(s.t + 1, 2 / 3)
    inset = torch.minimum(torch.minimum(x, 1 - x) * s.hu, torch.minimum(y, 1 - y) * s.hv * 2 / 3)
    leaf = wood(s) * (1 + ((inset - 0.09).abs() < 0.014).float() * torch.where(y + x > 1, -0.4, 0.25))
    knob = (s.u - 0.82 * s.hu) ** 2 + (s.v + 0.02) ** 2 < 0.03**2
    plate = ((s.u - 0.82 * s.hu).abs() < 0.022) & ((s.v + 0.03).abs() < 0.1)
    leaf = only(plate, (0.5, 0.42, 0.22), leaf)
    return only(knob, (0.75, 0.65, 0.4), only(s.edge() < 0.012, s.a * 0.4, leaf))


def oven(s):
    sheet = plain(s)
    k, x = cell_of(s.s + 1, 0.4)
    knob = ((x - 0.5) * 0.4 * s.hu) ** 2 + (s.v - 0.83 * s.hv) ** 2 < 0.022**2
    glass = (s.s.abs() < 0.8) & (s.t > -0.75) & (s.t < 0.45)
    cloud, blob, _ = s.noise(0.8)
    sheet = only(glass, (0.03, 0.028, 0.03), sheet)
    sheet = only(glass & ((s.t * 5).frac().abs() < 0.08), mix(s.a * 0.2, s.a * 0.5, cloud), sheet)
    sheet = only((s.s.abs() < 0.8) & ((s.t - 0.58).abs() < 0.035), (0.6, 0.6, 0.62), sheet)
    sheet = only((s.s.abs() < 0.18) & ((s.t - 0.83).abs() < 0.09), (0.02, 0.25, 0.12), sheet)
    return only(knob & (k != 2), s.b * 0.3, only((s.t - 0.68).abs() < 0.008, (0.02, 0.02, 0.02), sheet))


def steel(s):
    _, blob, brushed = s.noise(4.0, 0.12)
    cloud, _, _ = s.noise(0.4)
    return mix(s.a, s.b, 0.5 * brushed + 0.9 * (cloud - 0.3))


def fridge(s):
    """Painted or steel front with a split, handles, magnets and notes."""
    sheet = steel(s)
    column, x = cell_of(s.u, 0.15)
    row, y = cell_of(s.v - 0.1, 0.17)
    there = (s.rand(row, column) > 0.5) & (s.v > -0.1) & (s.edge() > 0.1) & (s.u < s.hu - 0.16)
    x, y = x - 0.45 - 0.15 * s.rand(row, column, 1), y - 0.5 - 0.1 * s.rand(row, column, 2)
    note = there & (x.abs() < 0.22 + 0.15 * s.rand(row, column, 3)) & (y.abs() < 0.2 + 0.2 * s.rand(row, column, 4))
    ink = text(s, s.u, s.v, 0.022)
    tone = s.rand(row, column, 5)
    colour = only(tone > 0.5, (0.8, 0.78, 0.7), vivid(tone * 2))
    sheet = only(note, only(ink, colour * 0.3, colour), sheet)
    handle = ((s.u - s.hu + 0.06).abs() < 0.014) & ((s.v - 0.02).abs() > 0.06) & ((s.v - 0.02).abs() < 0.4)
    sheet = only(handle, (0.25, 0.25, 0.26), sheet)
    return only(((s.v - 0.02).abs() < 0.006) | (s.edge() < 0.006), (0.02, 0.02, 0.02), sheet)


def stone(s):
    cloud, _, grain = s.noise(1.4)
    _, speckle, fine = s.noise(4.0)
    base = mix(s.a, s.b, 0.9 * (cloud - 0.2) + 0.7 * (grain - 0.5))
    return only(speckle > 0.78, s.b * 1.5 + 0.05, only(fine < 0.2, s.a * 0.4, base))


def outdoors(s):
    """What the window shows: sky, a skyline, trees, and the window's own cross bars."""
    cloud, blob, leaves = s.noise(0.6)
    sky = mix(s.a, torch.full_like(s.a, 1.15), 2.2 * (cloud - 0.45))
    k, x = cell_of(s.u, 0.17)
    tower = s.t < -0.1 + 0.6 * (s.rand(k) - 0.4)
    lit = (cell_of(s.u, 0.034)[1] > 0.45) & (cell_of(s.v, 0.05)[1] > 0.45)
    view = only(
        tower, only(lit, vivid(s.rand(k, 2)) * 0.6, mix(vivid(s.rand(k, 2)), sky, torch.full_like(x, 0.4))), sky
    )
    ridge, hump, _ = s.noise(0.9, 0.0)
    tree = s.t < -0.5 + 0.7 * (ridge - 0.5) + 0.5 * (hump - 0.5)
    return only(tree, mix(s.b * 0.4, s.b * 1.8, leaves + blob - 0.5), view)


def leaf(s):
    cloud, blob, grain = s.noise(2.5)
    return mix(s.a, s.b, 1.6 * (blob - 0.4) + 0.8 * (grain - 0.4)) * (0.5 + cloud)


def keyboard(s):
    column, x = cell_of(s.u + 0.5 * (s.v / 0.02).floor() * 0.007, 0.02)
    row, y = cell_of(s.v, 0.02)
    key = (x > 0.15) & (y > 0.15) & (s.edge() > 0.008)
    return only(key, s.b * (0.6 + 0.5 * s.rand(row, column)), s.a)


def label(s):
    """Cans, boxes, bottles: a printed band around plain colour."""
    band = s.t.abs() < 0.55
    disc = (s.s * 2 - (s.s * 2).round()) ** 2 * 5 + s.t**2 < 0.12
    stripes = ((s.t * 9).floor() % 2 == 0) & (s.t.abs() > 0.35)
    art = only(disc, vivid(s.rand(1)), only(stripes, vivid(s.rand(2)), s.b))
    return only(band, only(text(s, s.u, s.v, 0.016) & ~disc, s.a * 0.4, art), plain(s))


def clock(s):
    radius, angle = (s.s**2 + s.t**2).sqrt(), torch.atan2(s.s, s.t)
    tick = ((angle * 6 / math.pi - (angle * 6 / math.pi).round()).abs() < 0.09) & (radius > 0.68) & (radius < 0.84)
    hour, minute = s.rand(1) * 2 * math.pi, s.rand(2) * 2 * math.pi
    hands = (((angle - hour + 3 * math.pi) % (2 * math.pi) - math.pi).abs() * radius < 0.06) & (radius < 0.45)
    hands |= (((angle - minute + 3 * math.pi) % (2 * math.pi) - math.pi).abs() * radius < 0.04) & (radius < 0.65)
    return only(tick | hands | (radius > 0.92), s.b, s.a)


def ribs(s):
    _, x = cell_of(s.u, s.cu)
    return mix(s.a, s.b, (2 * x - 1).abs() ** 2) * (0.9 + 0.2 * (s.t > -0.9))


def pinboard(s):
    """Cork or white board with notes at odd places and a scribble."""
    column, x = cell_of(s.u, 0.23)
    row, y = cell_of(s.v, 0.21)
    there, tone = s.rand(row, column) > 0.3, s.rand(row, column, 1)
    x, y = (x - 0.35 - 0.3 * s.rand(row, column, 2)) * 0.23, (y - 0.35 - 0.3 * s.rand(row, column, 3)) * 0.21
    x, y = x + (tone - 0.5) * 0.5 * y, y - (tone - 0.5) * 0.5 * x
    note = there & (x.abs() < 0.045 + 0.04 * tone) & (y.abs() < 0.045 + 0.04 * s.rand(row, column, 4))
    sheet = only(tone > 0.55, (0.78, 0.76, 0.68), vivid(tone * 1.8) * 1.5)
    sheet = only(text(s, s.u, s.v, 0.02), sheet * 0.35, sheet)
    wavy, hump, _ = s.noise(1.3, 0.2)
    scribble = ((s.t * 3 - 2 * wavy - hump).frac().abs() < 0.045) & (cell_of(s.u, 0.5)[1] < 0.6)
    board = only(scribble & (s.a[0] > 0.6), vivid(s.rand((s.t * 3).floor())), plain(s))
    board = only(note, sheet, board)
    board = only(there & (x * x + (y - 0.04) ** 2 < 0.007**2), (0.7, 0.05, 0.05), board)
    return only(s.edge() < 0.025, s.b * 0.5, board)


PATTERNS = (
    plain,
    plaster,
    wallpaper,
    wood,
    planks,
    tiles,
    checker,
    fabric,
    rug,
    books,
    paper,
    screen,
    poster,
    painting,
    framed,
    panel,
    door,
    oven,
    steel,
    fridge,
    stone,
    outdoors,
    leaf,
    keyboard,
    label,
    clock,
    ribs,
    pinboard,
)


def albedo(scene, face, uv, half, material):
    """Surface colour ``(3, N)``, linear RGB: each texture is evaluated for its own points only."""
    pattern = scene.pattern.to(torch.uint8).index_select(0, material)
    order = pattern.argsort(stable=True)
    ends = pattern[order].bincount(minlength=len(PATTERNS)).cumsum(0).tolist()
    colour = torch.empty(3, len(face), device=face.device)
    table = scene.colours.reshape(-1, 6).T.contiguous()
    for number, texture in enumerate(PATTERNS):
        rows = order[ends[number - 1] if number else 0 : ends[number]]
        if len(rows):
            m, f, at, size = (x.index_select(-1, rows) for x in (material, face, uv, half))
            # A box's faces must not repeat each other.
            seed = scene.seed.index_select(0, f // FACES) + (f % FACES).int() * 7919
            colours, cells = table.index_select(1, m), scene.cells.index_select(0, m)
            colour.index_copy_(1, rows, texture(Spots(scene.noise, at, size, seed, colours, cells)))
    return colour


# ---------------------------------------------------------------------------------------------------- pictures


def surface_points(scene, pose, rays, depth, primitive):
    """Where the rays of one view end on their primitives.

    Args:
        pose: ``(4, 4)``.
        rays: ``(3, H, W)``, camera frame, z = 1.
        depth, primitive: ``(H, W)``.

    Returns:
        Face ``(N,)`` as row of a (P * 6) table and coordinates in [-1, 1] along the face ``(2, N)``, N = H * W.
    """
    camera = (rays * depth).reshape(3, -1)
    primitive = primitive.reshape(-1)
    matrix, offset = scene.unit_map()
    matrix, offset = _matmul3(matrix, pose[:3, :3]), (matrix * pose[:3, 3]).sum(-1) + offset
    table = torch.cat([matrix, offset[..., None]], 2).reshape(-1, 12).T.contiguous()
    rows = table.index_select(1, primitive).reshape(3, 4, -1)
    unit = rows[:, 0] * camera[0] + rows[:, 1] * camera[1] + rows[:, 2] * camera[2] + rows[:, 3]
    face, uv = locate(scene.shape.index_select(0, primitive), unit)
    return primitive * FACES + face, uv


def shade(scene, pose, rays, depth, primitive):
    """Linear RGB ``(3, H, W)`` of one view; arguments as in `surface_points`."""
    face, uv = surface_points(scene, pose, rays, depth, primitive)
    half = face_sizes(scene).reshape(-1, 2).T.contiguous().index_select(1, face)
    material = scene.material.reshape(-1).index_select(0, face)
    light, glow = look_up_light(scene, face, uv), scene.glow.index_select(0, material)
    return (albedo(scene, face, uv, half, material) * (light + (1 - light) * glow)).reshape(3, *depth.shape)


def picture(scene, poses, intrinsics, size):
    """Images ``(F, H, W, 3)`` uint8, each pixel the mean of two rays."""
    height, width = size
    images = []
    rays = pixel_rays(intrinsics, 2 * height, width, True)
    for pose, depth, primitive in zip(poses, *trace(scene, poses, intrinsics, (2 * height, width), True)):
        linear = shade(scene, pose, rays, depth, primitive).reshape(3, height, 2, width).mean(2).permute(1, 2, 0)
        # A soft shoulder keeps lamps and windows from clipping flat.
        images.append((255 * (1 - (-1.55 * linear.clamp_min(0)).exp()) ** (1 / 2.2) + 0.5).clamp(0, 255).byte())
    return torch.stack(images)
