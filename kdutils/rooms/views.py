"""Where the cameras go in a room, and what they measure there."""

import numpy as np
import torch

from kdutils.rooms.building import generator
from kdutils.rooms.pictures import picture
from kdutils.rooms.solids import trace


def camera_path(room, frames, sequence, seed):
    """Hand-held walk round the middle of the room, looking across it.

    Args:
        room: as built.
        frames: how many poses; a longer path goes on where a shorter one ends.
        sequence: sequences differ in phase, direction, height and where they look; 0 is the test sequence.
        seed: any integer.

    Returns:
        Camera-to-world poses ``(frames, 4, 4)``, float64.
    """
    rng = generator(room.kind, seed, 1, sequence)
    i = np.arange(frames)

    def wobble(amplitude, *periods):
        return amplitude * sum(np.sin(2 * np.pi * (i / p + rng.random())) for p in periods) / len(periods)

    forwards = -1 if sequence % 2 else 1
    phase = forwards * np.radians(rng.uniform(3.4, 3.9) * i) + rng.uniform(0, 2 * np.pi)
    # Heights keep their bands apart, so a test view never falls on a training view.
    reach, middle_height, aside, tilt = (
        (0.82, 1.45, 0.0, -0.24),
        (0.97, 1.27, 0.4, -0.16),
        (0.72, 1.63, -0.45, -0.42),
    )[sequence and 1 + (sequence - 1) % 2]
    reach = reach + wobble(0.06, 47, 23)
    height = middle_height + wobble(0.06, 53, 19)
    yaw = phase + np.pi + aside + wobble(0.35, 67, 41)
    pitch = tilt + wobble(0.14, 37, 29)
    roll = wobble(0.03, 31, 13)
    position = np.stack([room.ring[0] * reach * np.cos(phase), room.ring[1] * reach * np.sin(phase), height], -1)
    position += rng.normal(0, 0.002, position.shape)
    yaw, pitch, roll = np.stack([yaw, pitch, roll]) + rng.normal(0, np.radians(0.2), (3, frames))
    return _look(position, yaw, pitch, roll)


def _look(position, yaw, pitch, roll):
    """Poses ``(N, 4, 4)`` at positions ``(N, 3)``; angles in radians, yaw from world x, pitch upwards."""
    forward = np.stack([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)], -1)
    right = np.stack([np.sin(yaw), -np.cos(yaw), np.zeros_like(yaw)], -1)
    down = np.cross(forward, right)
    c, s = np.cos(roll)[:, None], np.sin(roll)[:, None]
    poses = np.tile(np.eye(4), (len(yaw), 1, 1))
    poses[:, :3, 0], poses[:, :3, 1] = c * right + s * down, c * down - s * right
    poses[:, :3, 2], poses[:, :3, 3] = forward, position
    return poses


def intrinsics_for(size, camera):
    """Intrinsics ``(3, 3)`` of the "color" or "depth" camera for a size (height, width): much alike, not the same."""
    focal, cx, cy = {"color": (0.905, 0.507, 0.494), "depth": (0.882, 0.496, 0.508)}[camera]
    height, width = size
    return np.array([[focal * width, 0, cx * width], [0, focal * width, cy * height], [0, 0, 1]])


def render(room, poses, intrinsics, size, device="cpu"):
    """True pictures of a room.

    Args:
        room: as built.
        poses: ``(B, 4, 4)`` camera-to-world.
        intrinsics: ``(3, 3)``.
        size: (height, width).
        device: where to compute.

    Returns:
        Images ``(B, H, W, 3)`` uint8 and depths ``(B, H, W)`` float32, metres along z, without noise or holes.
    """
    scene, poses, intrinsics = on_device(device, room, poses, intrinsics)
    return picture(scene, poses, intrinsics, size), trace(scene, poses, intrinsics, size)[0]


def on_device(device, room, poses, intrinsics):
    return (
        room.scene.to(device),
        *(torch.as_tensor(x, dtype=torch.float32, device=device) for x in (poses, intrinsics)),
    )


def sensed_depth(depth, lost, rng, focal):
    """What a Kinect would make of true depth: noise, shadows beside edges, holes on shiny and grazed surfaces.

    Args:
        depth: ``(H, W)`` metres.
        lost: ``(H, W)`` share of readings that the material loses.
        rng: generator.
        focal: pixels.

    Returns:
        ``(H, W)`` uint16 millimetres, 0 without a reading.
    """
    noisy = depth + rng.standard_normal(depth.shape) * (0.0012 + 0.0019 * (depth - 0.4) ** 2)
    # The projector sits 7.5 cm beside the camera, so a near edge hides a strip of what lies behind it.
    disparity = 0.075 * focal / depth
    hole = depth > 4.5 + 0.1 * rng.standard_normal(depth.shape)
    for shift in range(1, 5):
        hole[:, :-shift] |= disparity[:, shift:] - disparity[:, :-shift] > shift
    # The slope against the view: above 4, a surface is seen at less than about 14 degrees.
    steep = np.hypot(*np.gradient(depth)) * focal / depth
    hole |= steep > rng.uniform(4, 9, depth.shape)
    coarse = rng.random(tuple(-(-n // 4) + 1 for n in depth.shape)).repeat(4, 0).repeat(4, 1)
    down, right = rng.integers(4, size=2)
    patches = coarse[down : down + depth.shape[0], right : right + depth.shape[1]]
    hole |= 0.7 * patches + 0.3 * rng.random(depth.shape) < lost
    hole |= rng.random(depth.shape) < 0.004
    return np.where(hole, 0, np.round(noisy * 1000)).astype(np.uint16)
