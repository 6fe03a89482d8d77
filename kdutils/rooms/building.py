"""Kitchens and offices: where things stand, and the scene that they make."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from kdutils.rooms.furniture import Maker, Solid, box, drum, put, turn
from kdutils.rooms.light import bake_light
from kdutils.rooms.solids import BOX, Scene
from kdutils.rooms.textures import PATTERNS, noise_table

KINDS = ("kitchen", "office")


@dataclass(frozen=True)
class Room:
    """A furnished room.

    Attributes:
        size: width (x), depth (y), height (z), metres.
        lamps: (K, 7) position, RGB strength, radius.
        ring: half axes (x, y) of the ellipse around the origin that is free for a walker's head, metres.
        scene: the solids as tensors, with their light.
    """

    kind: str
    seed: int
    size: tuple
    lamps: np.ndarray
    ring: tuple
    scene: Scene


class Plan:
    """Puts furniture along the walls of a room; a mirrored plan swaps left and right."""

    def __init__(self, width, depth, mirrored):
        self.half, self.mirror, self.solids = (width / 2, depth / 2), -1 if mirrored else 1, []

    def along(self, wall, s, solids, z=0.0, gap=0.0):
        """Back to a wall (0 north, 1 west, 2 south, 3 east), s metres along it from the wall's middle."""
        if self.mirror < 0:
            wall, s = (0, 3, 2, 1)[wall], -s
        x, y = turn(wall * math.pi / 2)[:2, :2] @ (s, self.half[wall % 2 == 0] - gap)
        self.solids += put(solids, x, y, z, wall * math.pi / 2)

    def free(self, x, y, solids, z=0.0, yaw=0.0):
        self.solids += put(solids, self.mirror * x, y, z, self.mirror * yaw)


def _kitchen(make, width, depth):
    plan = Plan(width, depth, make.chance(0.5))
    run = width - 0.62 - 0.25
    modules = list(make.rng.permutation(["drawers", "oven", "doors", "sink", "doors", "drawers"]))
    along = plan.along
    along(
        0, 0.36, make.counter(run, modules, ("kettle", "toaster", "bottle", "jar", "mug", "carton", "plates", "bowl"))
    )
    along(0, -width / 2 + 0.37, make.fridge())
    cook = 0.36 - run / 2 + (modules.index("oven") + 0.5) * run / 6
    for low, high in ((0.36 - run / 2, cook - 0.34), (cook + 0.34, 0.36 + run / 2)):
        if high - low > 0.35:
            along(0, (low + high) / 2, make.wall_cabinets(high - low - 0.01), z=1.46)
    steel = make.paint("steel")
    along(0, cook, [box(0, -0.22, 0, 0.6, 0.44, 0.1, steel), box(0, -0.15, 0.1, 0.26, 0.26, 0.9, steel)], z=1.6)
    along(1, 0.1, make.window(make.between(1.1, 1.5)), z=1.0)
    along(1, 0.1, make.radiator())
    along(1, -depth / 2 + 0.35, make.plant(2.2), gap=0.3)
    along(1, depth / 2 - 1.05, make.picture(0.3, 0.4, "poster"), z=1.25)
    along(2, width / 2 - 0.75, make.shelf(1.0))
    along(2, -0.15, make.sideboard(1.4))
    along(
        2,
        -0.15 - make.between(0.2, 0.3),
        make.picture(make.between(0.6, 0.8), make.between(0.5, 0.65), "painting"),
        z=1.35,
    )
    along(2, 0.45, make.clock(), z=1.75, gap=0.02)
    along(2, -width / 2 + 0.45, make.boxes())
    along(2, -width / 2 + 0.5, make.wall_shelf(0.8), z=1.35)
    along(3, depth / 2 - 0.75, make.door())
    along(3, -0.1, make.wall_shelf(1.0), z=1.3)
    along(
        3,
        -0.1,
        make.table(0.9, 0.4, 0.72) + put(make.microwave(), -0.15, -0.2, 0.72) + put(make.jar(), 0.3, -0.2, 0.72),
    )
    along(3, -0.15, make.picture(0.5, 0.42), z=1.78)
    along(3, -depth / 2 + 1.15, make.bin())
    along(3, 0.6, make.picture(0.28, 0.38, "poster"), z=1.3)
    w, d, tilt = make.between(1.1, 1.35), make.between(0.75, 0.85), make.between(-0.15, 0.15)
    group = put(make.table(w, d), 0, d / 2)
    group += put(make.bowl(), 0.1, 0.05, 0.75) + put(
        make.scatter(w - 0.2, 0.3, 3, ("mug", "plates", "bottle", "carton")), 0, 0.38, 0.75
    )
    group += put(make.scatter(w - 0.2, 0.3, 3, ("mug", "plates", "sheets")), 0, -0.1, 0.75)
    for x in (-0.28, 0.28):
        group += put(make.chair(), x + make.between(-0.04, 0.04), -d / 2 - 0.25, 0, math.pi + make.between(-0.3, 0.3))
        group += put(make.chair(), x + make.between(-0.04, 0.04), d / 2 + 0.25, 0, make.between(-0.3, 0.3))
    plan.free(0, 0, group, yaw=tilt)
    plan.free(0, 0, [box(0, 0, 0, w + 0.7, d + 0.75, 0.008, make.paint("rug"))], yaw=tilt)
    plan.free(0, 0, make.pendant(), z=1.85)
    return plan


def _office(make, width, depth):
    plan = Plan(width, depth, make.chance(0.5))
    along = plan.along
    along(0, -width / 4 - 0.02, make.desk(1.35))
    along(0, width / 4 + 0.02, make.desk(1.3))
    along(0, -width / 4, make.picture(0.9, 0.65, "cork"), z=1.3)
    along(0, 0.15, make.picture(0.36, 0.5, "poster"), z=1.45)
    along(0, width / 4 + 0.25, make.wall_shelf(1.1), z=1.5)
    along(1, 0.1, make.window(make.between(1.2, 1.6)), z=1.0)
    along(1, 0.3, make.radiator(1.0))
    along(1, -depth / 2 + 0.4, make.plant(2.6), gap=0.3)
    along(1, depth / 2 - 0.95, make.picture(0.32, 0.45, "poster"), z=1.2)
    case = ("pile", "jar", "plant", "carton", "pile")
    along(2, width / 2 - 0.6, make.shelf(0.95, things=case))
    along(2, width / 2 - 1.6, make.shelf(0.9, h=make.between(1.5, 1.95), things=case))
    along(2, -0.5, make.sideboard(1.0, 0.72, ("pile", "plant", "carton", "mug")))
    along(2, -0.5, make.picture(make.between(0.6, 0.85), make.between(0.5, 0.7)), z=1.3)
    along(2, -width / 2 + 0.45, make.boxes())
    along(2, -width / 2 + 0.45, make.picture(0.5, 0.7, "poster"), z=1.2)
    along(3, depth / 2 - 0.75, make.door())
    along(3, -0.2, make.picture(1.2, 0.8, "whiteboard"), z=1.0)
    along(3, -0.3, make.sideboard(0.9, 0.7, ("microwave", "mug", "plant")))
    along(3, -depth / 2 + 0.55, make.coats())
    along(3, 0.72, make.bin())
    along(3, -0.1, make.clock(), z=2.1, gap=0.02)
    r = make.between(0.5, 0.6)
    group = [
        drum(0, 0, 0.72, r, 0.03, make.wood),
        drum(0, 0, 0.02, 0.05, 0.7, make.paint("steel")),
        drum(0, 0, 0, 0.3, 0.02, make.paint("black")),
    ]
    group += put(make.laptop(), -0.1, -0.2, 0.75, make.between(2.6, 3.6)) + put(make.sheets(), 0.2, 0.15, 0.75)
    group += (
        put(make.mug(), 0.3, -0.2, 0.75)
        + put(make.pile(), -0.25, 0.2, 0.75, 0.7)
        + put(make.bottle(), 0.05, 0.36, 0.75)
    )
    for k in range(3):
        angle = 2.1 * k + make.between(-0.2, 0.2)
        group += put(
            make.chair(), -(r + 0.3) * math.sin(angle), (r + 0.3) * math.cos(angle), 0, angle + make.between(-0.3, 0.3)
        )
    plan.free(0, 0, group, yaw=make.between(0, 2))
    plan.free(0, 0, [box(0, 0, 0, 2.0, 1.7, 0.008, make.paint("rug"))], yaw=make.between(-0.1, 0.1))
    return plan


def build_room(kind, seed, device="cpu", workers=None):
    """The room of a kind and integer seed, lit; raises ValueError for an unknown kind.

    The light is computed here, once, on `device`, by as many `workers` as suit it; the room itself comes back on the
    CPU.
    """
    room = furnish(kind, seed)
    workers = fitting_workers(device) if workers is None else workers
    return replace(room, scene=bake_light(room.scene.to(device), workers=workers).to("cpu"))


def furnish(kind, seed):
    """The same room in the dark: all its solids, which takes a fraction of the time."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of room {kind!r}; known: {', '.join(KINDS)}")
    rng = generator(kind, seed, 0)
    make = Maker(rng)
    size = (make.between(4.5, 4.9), make.between(4.1, 4.4), make.between(2.5, 2.7))
    width, depth, height = size
    plan = {"kitchen": _kitchen, "office": _office}[kind](make, width, depth)
    shell = _shell(make, kind, size)
    lamps = _lamps(make, plan, size)
    solids = (
        shell
        + _skirting(make, size)
        + plan.solids
        + [drum(x, y, height - 0.07, 0.2, 0.07, make.paint("lamp")) for x, y in lamps[:2, :2]]
    )
    return Room(kind, seed, size, lamps, (width / 2 - 1.2, depth / 2 - 1.05), _scene(solids, lamps, rng))


def fitting_workers(device):
    # As many processes as torch would have used threads: that number knows of limits that the count of cores does not.
    return min(4, torch.get_num_threads()) if torch.device(device).type == "cpu" else 0


def generator(kind, seed, *stream):
    return np.random.default_rng([KINDS.index(kind), seed & (2**64 - 1), *stream])


def _shell(make, kind, size):
    """The room's own box: four walls that differ, floor and ceiling."""
    base = make.paint("plaster")
    accent = make.paint(make.pick("wallpaper", "plaster", "wallpaper"))
    walls = [base, base, base, accent][:: make.pick(1, -1)]
    floor = make.paint(
        make.pick("planks", "checker", "floor tiles") if kind == "kitchen" else make.pick("planks", "carpet", "planks")
    )
    return [
        Solid(BOX, np.array([0, 0, size[2] / 2]), np.array(size) / 2, np.eye(3), (*walls, floor, make.paint("ceiling")))
    ]


def _skirting(make, size):
    width, depth, _ = size
    white = make.paint("white")
    return [box(0, s * (depth / 2 - 0.008), 0, width, 0.016, 0.09, white) for s in (-1, 1)] + [
        box(s * (width / 2 - 0.008), 0, 0, 0.016, depth, 0.09, white) for s in (-1, 1)
    ]


def _lamps(make, plan, size):
    """Two ceiling lamps and the daylight of the window, rows of position, colour, radius."""
    width, depth, height = size
    warm = np.array([1.0, make.between(0.80, 0.95), make.between(0.55, 0.85)])
    lamps = [
        (s * width / 4, make.between(-0.2, 0.2), height - 0.12, *(make.between(1.2, 1.9) * warm), 0.1) for s in (-1, 1)
    ]
    day = np.array([0.75, 0.92, 1.1]) * make.between(1.8, 3.4)
    lamps.append((-plan.mirror * (width / 2 - 0.4), plan.mirror * 0.1, 1.65, *day, 0.4))
    return np.array(lamps)


def _scene(solids, lamps, rng):
    materials = list(dict.fromkeys(face for solid in solids for face in solid.faces))
    row = {material: k for k, material in enumerate(materials)}
    names = [pattern.__name__ for pattern in PATTERNS]

    def floats(rows):
        return torch.tensor(np.array(rows), dtype=torch.float32)

    return Scene(
        shape=torch.tensor([s.shape for s in solids]),
        centre=floats([s.centre for s in solids]),
        rotation=floats([s.rotation for s in solids]),
        half=floats([s.half for s in solids]),
        seed=torch.tensor(rng.integers(1, 2**30, len(solids)), dtype=torch.int32),
        material=torch.tensor([[row[face] for face in s.faces] for s in solids]),
        pattern=torch.tensor([names.index(m[0]) for m in materials]),
        colours=floats([m[1:3] for m in materials]),
        cells=floats([m[3] for m in materials]),
        shiny=floats([m[4] for m in materials]),
        glow=floats([m[5] for m in materials]),
        noise=noise_table(),
        lamps=floats(lamps),
        light_grid=torch.zeros(0, 3, dtype=torch.long),
        light=torch.zeros(0, 3),
    )
