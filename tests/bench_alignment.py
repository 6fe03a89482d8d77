"""Benchmark of the alignment: accuracy and time beside the published optimiser, and time and memory at scale.

    python tests/bench_alignment.py accuracy [SCENE]    20 images, 108 pairs, 3 % smooth noise; with the optimiser
    python tests/bench_alignment.py scale [IMAGES ...]  10 pairs an image, known poses, shards made as they are read

SCENE is a folder in the 12Scenes layout; by default a synthetic room. Nothing here is collected by pytest.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from alignment_problems import Scene, errors, problem, smooth_field  # noqa: E402
from conftest import box_world  # noqa: E402

from kdutils import alignment, geometry, pairs, registration, scenes  # noqa: E402
from kdutils.alignment import sketches, starting_point  # noqa: E402
from kdutils.teachers import PairPointmaps  # noqa: E402

SIZE = (96, 128)


def real_scene(folder, count=20):
    """Evenly spaced frames of a real scene."""
    with tempfile.TemporaryDirectory() as out:
        frames = scenes.prepare(scenes.Scene.open(folder), out, SIZE, most_train=count, most_test=1)
        keep = np.flatnonzero(~frames.is_test)
        return Scene(np.array(frames.depth[keep]), np.array(frames.poses[keep]), np.array(frames.intrinsics))


def synthetic_scene(count=20):
    """Cameras that look around in a box-shaped room."""
    world = box_world(count, SIZE, step=2 / count)
    return Scene(world.depth, world.poses, world.intrinsics)


def published_optimiser(arrays, count, iterations=300, rate=0.01):
    """The recipe of DUSt3R's global alignment, in PyTorch: Adam over a camera pose, focal and log-depth map an image
    and a similarity a pair, on the log-confidence-weighted L1 distance between each image's world points and the
    pairs' transformed predictions, from a maximum spanning tree.

    Returns:
        World points ``(N, H, W, 3)`` and the seconds it took.
    """
    edges, *predictions = arrays
    start = time.perf_counter()
    poses, depth, focal, scale = _start_of_optimiser(arrays, count)
    # Sums of scales would otherwise shrink to 0: their logarithms' mean is held, as published.
    rotation = torch.tensor(Rotation.from_matrix(poses[:, :3, :3]).as_quat(), dtype=torch.float32)
    variables = {
        "rotation": rotation, "centre": torch.tensor(poses[:, :3, 3], dtype=torch.float32),
        "depth": torch.tensor(np.log(depth), dtype=torch.float32), "focal": torch.tensor(np.log(focal)).float(),
        "pair_rotation": rotation[edges[:, 0]].clone(),
        "pair_centre": torch.tensor(poses[edges[:, 0], :3, 3], dtype=torch.float32),
        "pair_scale": torch.tensor(np.log(scale), dtype=torch.float32),
    }  # fmt: skip
    for v in variables.values():
        v.requires_grad_(True)
    optimiser = torch.optim.Adam(variables.values(), lr=rate, betas=(0.9, 0.9))
    points = [torch.tensor(p, dtype=torch.float32) for p in predictions[:2]]
    weights = [torch.log(torch.tensor(c, dtype=torch.float32)) for c in predictions[2:]]
    height, width = SIZE
    grid = torch.tensor(geometry.pixel_grid(height, width) - (width / 2, height / 2), dtype=torch.float32)

    def world_points():
        z = variables["depth"].exp()[..., None]
        local = torch.cat([grid * z / variables["focal"].exp()[:, None, None, None], z], -1)
        return _rotated(variables["rotation"], local) + variables["centre"][:, None, None]

    for k in range(iterations):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - k / iterations)
        optimiser.zero_grad()
        world, loss = world_points(), 0
        factor = (variables["pair_scale"] - variables["pair_scale"].mean()).exp()[:, None, None, None]
        for view in (0, 1):
            moved = _rotated(variables["pair_rotation"], factor * points[view])
            moved = moved + variables["pair_centre"][:, None, None]
            loss = loss + (weights[view] * (world[edges[:, view]] - moved).norm(dim=-1)).mean()
        loss.backward()
        optimiser.step()
    return world_points().detach().numpy(), time.perf_counter() - start


def _rotated(quaternion, points):
    """Rotate points ``(B, H, W, 3)`` by quaternions ``(B, 4)``, scalar last."""
    x, y, z, w = torch.nn.functional.normalize(quaternion, dim=-1).unbind(-1)
    matrix = torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                          2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                          2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1)  # fmt: skip
    return (points.flatten(1, 2) @ matrix.view(-1, 3, 3).mT).view_as(points)


def _start_of_optimiser(arrays, count):
    """Maximum spanning tree over the pairs' confidence: registers pair after pair to the images placed so far."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    edges, points_i, points_j, confidence_i, confidence_j = arrays
    score = confidence_i.mean((1, 2)) * confidence_j.mean((1, 2))
    graph = coo_array((1 / score, edges.T), (count, count)).tocsr()
    tree = minimum_spanning_tree(graph)
    order, parent = breadth_first_order(tree + tree.T, 0, directed=False)
    focal = starting_point.focals(sketches.sketch([PairPointmaps(*arrays)]), count)
    world, poses = {}, np.tile(np.eye(4), (count, 1, 1))
    for image in order:
        if parent[image] < 0:
            world[image] = points_i[np.flatnonzero(edges[:, 0] == image)[0]].reshape(-1, 3).astype(float)
            continue
        pair = np.flatnonzero((edges == (parent[image], image)).all(1))[0]
        move = registration.similarity(points_i[pair].reshape(-1, 3), world[parent[image]], confidence_i[pair].ravel())
        world[image] = geometry.transform(move, points_j[pair].reshape(-1, 3))
    scale = np.ones(len(edges))
    depth = np.ones((count, *SIZE))
    for pair, (i, _) in enumerate(edges):
        move = registration.similarity(points_i[pair].reshape(-1, 3), world[i], confidence_i[pair].ravel())
        scale[pair] = registration.decompose(move)[0]
        poses[i] = registration.move_poses(move, np.eye(4))
        depth[i] = np.maximum(scale[pair] * points_i[pair][..., 2], 1e-3)
    unit = np.exp(np.log(scale).mean())
    poses[:, :3, 3] /= unit
    return poses, depth / unit, focal, scale / unit


def accuracy(scene, seed=1):
    """Both ways of aligning and the published optimiser, side by side."""
    graph = pairs.window_pairs(len(scene.depth), 3)
    trial = problem(scene, graph, noise=0.03, seed=seed)
    print(f"{len(scene.depth)} images, {len(graph)} pairs, {SIZE[1]}x{SIZE[0]}; 3 % smooth noise, random scales")
    world, baseline = published_optimiser(trial.arrays, len(scene.depth))
    seen = scene.depth > 0
    found = geometry.transform(registration.similarity(world[seen], scene.points[seen]), world[seen])
    distance = 100 * np.linalg.norm(found - scene.points[seen], axis=1)
    print(f"published optimiser  {baseline:7.2f} s  RMSE {np.sqrt((distance**2).mean()):5.2f} cm  "
          f"median {np.median(distance):5.2f} cm")  # fmt: skip
    for name, known in (("poses unknown", ()), ("poses known", (scene.intrinsics, scene.poses))):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            aligned = alignment.align(*trial.arrays, *known)
            seconds.append(time.perf_counter() - start)
        rmse, median, cover = errors(aligned, scene, fitted=not known)
        print(f"{name:19s}  {min(seconds):7.2f} s  RMSE {rmse:5.2f} cm  median {median:5.2f} cm  "
              f"{baseline / min(seconds):.0f} times as fast, {cover:.1%} of the pixels")  # fmt: skip


class LazyShards:
    """Shards of predictions made as they are read, through half precision like those on disk."""

    def __init__(self, scene, graph, seed=0, size=64):
        self.scene, self.graph, self.size = scene, graph, size
        rng = np.random.default_rng(seed)
        self.noise = [np.float32(1 + 0.03 * smooth_field(rng, SIZE)) for _ in range(23)]
        self.scales = np.exp(rng.uniform(-1, 1, len(graph)))
        self.rays = geometry.pixel_rays(scene.intrinsics, *SIZE).astype(np.float32)

    def __iter__(self):
        for first in range(0, len(self.graph), self.size):
            numbers = range(first, min(first + self.size, len(self.graph)))
            points = [np.stack([self._view(p, side) for p in numbers]) for side in (0, 1)]
            sure = np.full(points[0].shape[:3], 5, np.float32)
            yield PairPointmaps(self.graph[first : first + self.size], *points, sure, sure)

    def _view(self, pair, side):
        i, image = self.graph[pair, 0], self.graph[pair, side]
        depth = self.scene.depth[image] * self.noise[(7 * pair + 3 * side) % len(self.noise)]
        to_i = (geometry.invert(self.scene.poses[i]) @ self.scene.poses[image]).astype(np.float32)
        points = (depth[..., None] * self.rays).reshape(-1, 3) @ to_i[:3, :3].T + to_i[:3, 3]
        return (points / np.float32(self.scales[pair])).reshape(*SIZE, 3).astype(np.float16).astype(np.float32)


def orbit_scene(count):
    """Cameras on a circle inside the box room: its depth does not run out however many they are."""
    world = box_world(1, SIZE)
    angle = 2 * np.pi * np.arange(count) / count
    turn = Rotation.from_rotvec(np.stack([0 * angle, angle, 0 * angle], 1)).as_matrix()
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = turn, np.stack([np.sin(angle), 0 * angle, np.cos(angle)], 1)
    low, high = np.array([-2.0, -1.5, -3.0]), np.array([2.5, 1.0, 3.0])
    rays = geometry.pixel_rays(world.intrinsics, *SIZE)
    depth = np.empty((count, *SIZE), np.float32)
    for k, pose in enumerate(poses):
        across = rays @ pose[:3, :3].T
        depth[k] = ((np.where(across > 0, high, low) - pose[:3, 3]) / across).min(-1)
    return Scene(depth, poses, world.intrinsics)


def scale(counts, known=True):
    """Time and memory of known poses; the shards' making is timed by itself and taken off too."""
    print("images   pairs  seconds  of which shards  us a pair  peak GB  median error, per mille of the depth")
    for count in counts:
        scene = orbit_scene(count)
        shards = LazyShards(scene, pairs.window_pairs(count, 5, cyclic=True))
        start = time.perf_counter()
        for _ in shards:
            pass
        made = 2 * (time.perf_counter() - start)
        start = time.perf_counter()
        aligned = alignment.align_shards(shards, scene.intrinsics, *((scene.poses,) if known else ()))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        off = np.median(np.abs(aligned.depth / scene.depth / np.median(aligned.depth / scene.depth) - 1))
        each = 1e6 * seconds / len(shards.graph)
        row = f"{count:6d} {len(shards.graph):7d} {seconds:8.1f} {made:16.1f} {each:10.0f} {peak:8.2f} {1e3 * off:6.2f}"
        print(row, flush=True)


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or ["accuracy"]
    if command == "accuracy":
        accuracy(real_scene(rest[0]) if rest else synthetic_scene())
    else:
        scale([int(n) for n in rest if n.isdecimal()] or [125, 250, 500, 1000], known="unknown" not in rest)
