"""Endless rendered rooms to pretrain on: a pool of rooms on the device whose oldest gives way to a new one.

Room number n is a kitchen or an office by turns. Its seed lies in a range that neither the sample rooms (seed 0) nor
rooms that a person asks for by a small number come near, and the rooms held out for validation have a range apart.
"""

from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from kdutils import artefacts, overlap, rooms
from kdutils.parallel import in_processes

TRAINING_SEEDS, HELD_OUT_SEEDS = 10_000_000, 20_000_000  # the first of each range
SEQUENCES, WALK = (0, 1, 2), 90  # every room's three walks, and the frames of a whole walk
VIEWS = 48  # of a room, evenly spread over its walks


@dataclass
class RoomViews:
    """F views of one room, without sensor noise: what is seen, how far it is, from where.

    ``images (F, H, W, 3)`` uint8; ``depth (F, H, W)`` half precision, metres along z; ``poses (F, 4, 4)``
    camera-to-world; ``intrinsics (3, 3)``; ``edges (E, 2)`` pairs of views that overlap by 20 to 90 % with a baseline
    that can be triangulated (see ``overlap``), the smaller index first, always on the CPU, where they are drawn.
    """

    images: torch.Tensor
    depth: torch.Tensor
    poses: torch.Tensor
    intrinsics: torch.Tensor
    edges: torch.Tensor

    def to(self, device):
        return RoomViews(**{name: tensor if name == "edges" else tensor.to(device)
                            for name, tensor in vars(self).items()})  # fmt: skip


def kind_and_seed(number, held_out=False):
    """Which room number ``number`` is, for ``rooms.build_room``."""
    return rooms.KINDS[number % len(rooms.KINDS)], (HELD_OUT_SEEDS if held_out else TRAINING_SEEDS) + number


@torch.no_grad()
def render_room(number, size, device="cpu", held_out=False):
    """The ``RoomViews`` of room ``number`` in images of ``size`` (height, width), rendered on the device."""
    kind, seed = kind_and_seed(number, held_out)
    room = rooms.build_room(kind, seed, device, workers=0)
    paths = [rooms.camera_path(room, WALK, sequence, seed) for sequence in SEQUENCES]
    few = np.linspace(0, WALK - 1, VIEWS // len(SEQUENCES)).round().astype(int)
    poses = np.concatenate([path[few] for path in paths])
    images, depth = _seen(room, poses, size, device)
    intrinsics = rooms.intrinsics_for(size, "color")
    views = overlap.Views(poses, intrinsics, size, depth.float().cpu().numpy())
    every = np.stack(np.triu_indices(len(poses), 1), axis=1)
    return RoomViews(images, depth, torch.tensor(poses, dtype=torch.float32, device=device),
                     torch.tensor(intrinsics, dtype=torch.float32, device=device),
                     torch.tensor(views.measure(every).admissible().images))  # fmt: skip


def _seen(room, poses, size, device):
    """Images of four rays to a pixel (a camera's pictures are reduced from finer ones) and true depth."""
    height, width = size
    scene = room.scene.to(device)
    poses = torch.tensor(poses, dtype=torch.float32, device=device)
    plain = torch.tensor(rooms.intrinsics_for(size, "color"), dtype=torch.float32, device=device)
    wide = torch.diag(plain.new_tensor([2, 1, 1])) @ plain  # pixels half as wide
    images, depth = [], []
    for part in poses.split(16):
        fine = rooms.picture(scene, part, wide, (height, 2 * width))
        images.append(fine.unflatten(2, (width, 2)).float().mean(3).round().byte())
        depth.append(rooms.trace(scene, part, plain, size)[0].half())
    return torch.cat(images), torch.cat(depth)


class RoomPool:
    """``count`` rooms at a time: at turn t the rooms t to t + count - 1, so that a resumed run finds the same ones.

    Args:
        count: rooms that are there together.
        size: (height, width) of the images in pixels.
        device: where they are.
        folder: keeps rendered rooms for other runs; without it nothing is written.
        turn: where to begin.
    """

    def __init__(self, count, size, device="cpu", folder=None, turn=0):
        self.count, self.turn = count, turn
        self.arriving = rooms_of(range(turn, 2**31), size, device, folder)
        self.rooms = []

    def advance(self, turn, progress=None):
        """Let rooms give way until it is turn ``turn``; the first call fills the pool."""
        while self.turn + len(self.rooms) < turn + self.count:
            self.rooms += islice(self.arriving, 1)
            if progress:
                progress(len(self.rooms), self.count, "rooms")
        self.rooms = self.rooms[turn - self.turn :]
        self.turn = turn


def rooms_of(numbers, size, device="cpu", folder=None, held_out=False):
    """Yields the ``RoomViews`` of these rooms on the device, in order; processes of their own render them on the CPU.

    A room is some 300,000 small operations, which would keep a GPU both waiting and from learning.
    """
    room = partial(room_views, size=tuple(size), folder=folder, held_out=held_out)
    on_cpu = torch.device(device).type == "cpu"
    workers = 1 if on_cpu else max(1, min(torch.get_num_threads() - 1, len(numbers)))  # which knows of limits
    arrays = in_processes(partial(_arrays_of, room), numbers, workers)
    return (RoomViews(*map(torch.from_numpy, fields)).to(device) for fields in arrays)


def _arrays_of(room, number):
    # Tensors would travel between processes as open files, of which there may not be very many.
    return [tensor.numpy() for tensor in vars(room(number)).values()]


def room_views(number, size, folder=None, held_out=False):
    """``render_room``, or what an earlier call kept in ``folder``."""
    if folder is None:
        return render_room(number, size, held_out=held_out)
    kind, seed = kind_and_seed(number, held_out)
    path = Path(folder) / f"{kind}-{seed}-{size[0]}x{size[1]}-v{rooms.VERSION}.safetensors"
    if not path.exists():
        rendered = render_room(number, size, held_out=held_out)
        artefacts.write_tensors(path, {name: tensor.numpy() for name, tensor in vars(rendered).items()})
    kept = artefacts.read_tensors(path)
    return RoomViews(**{name: torch.from_numpy(np.array(array)) for name, array in kept.items()})
