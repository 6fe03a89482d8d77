"""A sample room on disk, in the 12Scenes layout."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdutils.parallel import in_processes
from kdutils.rooms.building import KINDS, build_room, fitting_workers, generator
from kdutils.rooms.pictures import picture, surface_points
from kdutils.rooms.solids import pixel_rays, trace
from kdutils.rooms.views import camera_path, intrinsics_for, on_device, sensed_depth

VERSION = 1  # raise it when the same seed gives other pictures: rooms on disk are then written anew
UNUSABLE_POSE = "\n".join(["-1.#INF -1.#INF -1.#INF -1.#INF"] * 4) + "\n"


def write_room(
    folder,
    kind,
    seed=0,
    sequences=(60, 90, 90),
    every=1,
    color_size=(240, 320),
    depth_size=(120, 160),
    device="cpu",
    progress=None,
):
    """Write a sample room in the 12Scenes layout, unless the folder holds it already.

    Args:
        folder: where to; written beside it first and renamed at the end, so it is whole or not there.
        kind: one of KINDS, else ValueError.
        seed: any integer; another seed is another room.
        sequences: frames of each sequence; the first is the test sequence.
        every: keep each every-th frame of the same paths, numbered without gaps.
        color_size, depth_size: (height, width) in pixels.
        device: where to compute.
        progress: called with (frames done, frames in total).

    Returns:
        The folder.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of room {kind!r}; known: {', '.join(KINDS)}")
    folder = Path(folder)
    settings = {
        "version": VERSION,
        "kind": kind,
        "seed": int(seed),
        "sequences": list(sequences),
        "every": every,
        "frames": sum(-(-n // every) for n in sequences),
        "color_size": list(color_size),
        "depth_size": list(depth_size),
    }
    if _settings(folder) == settings:
        return folder
    if folder.exists() and any(folder.iterdir()) and _settings(folder) is None:
        raise FileExistsError(f"{folder} holds something else than a sample room; move it away first")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    _write_frames(partial / "data", settings, device, progress)
    (partial / "info.txt").write_text(_info(settings))
    (partial / "split.txt").write_text(_split(settings))
    (partial / "room.json").write_text(json.dumps(settings, indent=1) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return folder


def _settings(folder):
    try:
        return json.loads((folder / "room.json").read_text())
    except (OSError, ValueError):
        return None


def _write_frames(data, settings, device, progress, batch=2):
    kind, seed, every = settings["kind"], settings["seed"], settings["every"]
    room = build_room(kind, seed, device)
    paths = [camera_path(room, n, k, seed)[::every] for k, n in enumerate(settings["sequences"])]
    _write_poses(data, paths)
    poses = np.concatenate(paths)
    starts = range(0, len(poses), batch)
    write = partial(_write_batch, data, room, poses, settings, device, batch)
    for done in in_processes(write, starts, fitting_workers(device)):
        if progress:
            progress(done, len(poses))


def _write_batch(data, room, poses, settings, device, batch, start):
    """Render and write the frames from `start` on; returns the number of the frame after them."""
    end = min(start + batch, len(poses))
    color, depth = (intrinsics_for(settings[f"{camera}_size"], camera) for camera in ("color", "depth"))
    scene, seen_from, k_color = on_device(device, room, poses[start:end], color)
    images = picture(scene, seen_from, k_color, settings["color_size"]).cpu().numpy()
    depths, lost = _depth_and_loss(room, poses[start:end], depth, settings["depth_size"], device)
    for k in range(end - start):
        rng = generator(settings["kind"], settings["seed"], 2, start + k)
        _write_frame(data, start + k, images[k], depths[k], lost[k], rng, depth[0, 0])
    return end


def _depth_and_loss(room, poses, intrinsics, size, device):
    """True depth and the share of readings that each pixel's material loses, both ``(B, H, W)`` arrays."""
    scene, poses, intrinsics = on_device(device, room, poses, intrinsics)
    depth, primitive = trace(scene, poses, intrinsics, size)
    rays = pixel_rays(intrinsics, *size, twice=False)
    faces = [surface_points(scene, *view)[0] for view in zip(poses, [rays] * len(poses), depth, primitive)]
    lost = scene.shiny[scene.material.reshape(-1)[torch.stack(faces)]].reshape(depth.shape)
    return depth.cpu().numpy(), lost.cpu().numpy()


def _write_frame(data, number, image, depth, lost, rng, focal):
    grain = rng.normal(0, 1.2, image.shape[:2])[..., None]
    image = np.clip(image + grain + 0.5, 0, 255).astype(np.uint8)
    Image.fromarray(image).save(data / f"frame-{number:06d}.color.jpg", quality=92)
    Image.fromarray(sensed_depth(depth, lost, rng, focal)).save(
        data / f"frame-{number:06d}.depth.png", compress_level=2
    )


def _write_poses(data, paths):
    """Pose files; one frame of the test sequence and one or two of the others are unusable, as in 12Scenes."""
    number = 0
    for k, path in enumerate(paths):
        unusable = {0: len(path) // 2, 1: len(path) // 3, 2: 2 * len(path) // 3}.get(k) if len(path) > 3 else None
        for i, pose in enumerate(path):
            text = "\n".join(" ".join(f"{x:.12f}" for x in row) for row in pose) + "\n"
            (data / f"frame-{number:06d}.pose.txt").write_text(UNUSABLE_POSE if i == unusable else text)
            number += 1


def _info(settings):
    def numbers(matrix):
        padded = np.eye(4)
        padded[: len(matrix), : len(matrix)] = matrix
        return " ".join(f"{x:.6f}" if x % 1 else f"{x:.0f}" for x in padded.ravel())

    lines = {"m_versionNumber": 4, "m_sensorName": f"sample {settings['kind']}"}
    for camera in ("color", "depth"):
        height, width = settings[f"{camera}_size"]
        lines |= {f"m_{camera}Width": width, f"m_{camera}Height": height}
    lines["m_depthShift"] = 1000
    for camera in ("color", "depth"):
        lines[f"m_calibration{camera.title()}Intrinsic"] = numbers(intrinsics_for(settings[f"{camera}_size"], camera))
        lines[f"m_calibration{camera.title()}Extrinsic"] = numbers(np.eye(4))
    lines["m_frames.size"] = settings["frames"]
    return "".join(f"{key} = {value}\n" for key, value in lines.items())


def _split(settings):
    lines, start = [], 0
    for k, n in enumerate(-(-n // settings["every"]) for n in settings["sequences"]):
        lines.append(f"sequence{k} [frames={n}]  [start={start} ; end={start + n - 1}]\n")
        start += n
    return "".join(lines)
