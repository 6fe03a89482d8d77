"""What several test modules share: a small world with a known answer, and repeatable randomness."""

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
matplotlib.use("Agg")


class World(NamedTuple):
    """N cameras on a smooth path through a box-shaped room, whose every point has its own colour."""

    image: np.ndarray  # (N, H, W, 3) uint8, the colour of the world point
    depth: np.ndarray  # (N, H, W) float32 along z
    points: np.ndarray  # (N, H, W, 3) world
    poses: np.ndarray  # (N, 4, 4) camera-to-world
    intrinsics: np.ndarray  # (3, 3)
    sequence: np.ndarray  # (N,), 0 is the test sequence


LOW, HIGH = np.array([-2.0, -1.5, -3.0]), np.array([2.5, 1.0, 3.0])


def rotation(axis_angle):
    """Rodrigues' formula: rotation ``(3, 3)`` about a vector by its length in radians."""
    angle = np.linalg.norm(axis_angle)
    x, y, z = axis_angle / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def smooth_poses(count, rng, step=0.08, turn=0.05):
    """Camera-to-world poses along a random smooth path that starts near the origin."""
    poses = np.tile(np.eye(4), (count, 1, 1))
    direction, spin = rng.normal(size=(2, 3))
    direction, spin = step * direction / np.linalg.norm(direction), turn * spin / np.linalg.norm(spin)
    for k in range(count):
        poses[k, :3, :3] = rotation(spin * k + 0.3 * turn * np.sin(k + np.arange(3)))
        poses[k, :3, 3] = direction * k + 0.3 * step * np.sin(2 * k + np.arange(3))
    return poses


def box_world(count=8, size=(24, 32), seed=0, test=0, step=0.08):
    """The world seen by ``count`` cameras, of which the first ``test`` are the test sequence."""
    poses = smooth_poses(count, np.random.default_rng(seed), step)
    intrinsics = np.array([[0.8 * size[1], 0, size[1] / 2], [0, 0.8 * size[1], size[0] / 2], [0, 0, 1.0]])
    u, v = np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5)
    rays = np.stack([(u - size[1] / 2) / intrinsics[0, 0], (v - size[0] / 2) / intrinsics[1, 1], np.ones_like(u)], -1)
    rays = np.einsum("nab,hwb->nhwa", poses[:, :3, :3], rays)
    centre = poses[:, None, None, :3, 3]
    depth = ((np.where(rays > 0, HIGH, LOW) - centre) / rays).min(-1)
    points = centre + depth[..., None] * rays
    image = np.round(255 * np.clip((points - LOW) / (HIGH - LOW), 0, 1)).astype(np.uint8)
    sequence = np.where(np.arange(count) < test, 0, 1)
    return World(image, depth.astype(np.float32), points, poses, intrinsics, sequence)


def painted_world(world, seed=0):
    """Pictures ``(N, H, W, 3)`` of the world with waves of several lengths, none shorter than some pixels, on it."""
    rng = np.random.default_rng(seed)
    light = np.zeros(world.depth.shape)
    for length in (1.2, 0.8, 0.5, 0.35):  # metres
        wave = rng.normal(size=(3, 3))
        wave *= 2 * np.pi / length / np.linalg.norm(wave, axis=1, keepdims=True)
        light += np.sin(world.points @ wave.T + rng.uniform(0, 6, 3)).sum(-1)
    return np.repeat((128 + 11 * light).clip(0, 255).round().astype(np.uint8)[..., None], 3, axis=-1)


def examples_of(world, mask=None, confidence=None):
    """The world as examples for a student, labelled by its true depth, on the CPU."""
    from kdutils.augmentation import Examples  # late, because it imports torch

    mask = np.ones(world.depth.shape, bool) if mask is None else mask
    confidence = np.ones(world.depth.shape, np.float32) if confidence is None else confidence
    return Examples.of(world.image, world.depth, mask, confidence, world.intrinsics, world.poses)


def pytest_collection_modifyitems(items):
    """The longest file first: it takes as long as all others together, which another process runs meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(scope="module")
def one_thread():
    """Torch on one thread: small tensors are fastest so, and sums come out alike bit for bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
