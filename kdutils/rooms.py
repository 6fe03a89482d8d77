"""Sample rooms: furnished kitchens and offices, endless by seed, written in the 12Scenes layout.

A room is a list of solids (see `render`) that furniture functions put together; everything random about it comes from
its kind and seed. World frame: z up, floor at z = 0, origin at the centre of the floor, metres.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import render as caster
from .render import BALL, BOX, CYLINDER

KINDS = ("kitchen", "office")
VERSION = 1  # raise it when the same seed gives other pictures: rooms on disk are then written anew
UNUSABLE_POSE = "\n".join(["-1.#INF -1.#INF -1.#INF -1.#INF"] * 4) + "\n"

# name: pattern, two linear colours, period along u and v (metres), share of depth readings lost, glow
MATERIALS = {
    "plaster": ("plaster", (0.72, 0.68, 0.60), (0.48, 0.42, 0.34), (1, 1), 0, 0),
    "wallpaper": ("wallpaper", (0.62, 0.60, 0.50), (0.42, 0.46, 0.40), (0.22, 0.26), 0, 0),
    "ceiling": ("plaster", (0.80, 0.79, 0.76), (0.66, 0.64, 0.60), (1, 1), 0, 0),
    "oak": ("wood", (0.46, 0.27, 0.12), (0.24, 0.12, 0.05), (1, 1), 0, 0),
    "birch": ("wood", (0.66, 0.50, 0.31), (0.50, 0.34, 0.18), (1, 1), 0, 0),
    "walnut": ("wood", (0.20, 0.10, 0.05), (0.09, 0.045, 0.025), (1, 1), 0, 0),
    "lacquer": ("plain", (0.68, 0.66, 0.60), (0.60, 0.57, 0.50), (1, 1), 0, 0),
    "planks": ("planks", (0.42, 0.24, 0.11), (0.25, 0.13, 0.06), (1.1, 0.14), 0, 0),
    "checker": ("checker", (0.62, 0.58, 0.50), (0.12, 0.14, 0.16), (0.33, 0.33), 0, 0),
    "floor tiles": ("tiles", (0.50, 0.36, 0.26), (0.30, 0.17, 0.10), (0.30, 0.30), 0, 0),
    "wall tiles": ("tiles", (0.70, 0.74, 0.72), (0.16, 0.36, 0.44), (0.10, 0.10), 0.05, 0),
    "carpet": ("fabric", (0.20, 0.24, 0.30), (0.12, 0.14, 0.19), (0.5, 0.5), 0, 0),
    "fabric": ("fabric", (0.40, 0.10, 0.09), (0.16, 0.05, 0.06), (0.11, 0.11), 0, 0),
    "rug": ("rug", (0.48, 0.12, 0.10), (0.62, 0.50, 0.32), (0.05, 0.05), 0, 0),
    "door fronts": ("panel", (0.60, 0.57, 0.48), (0.54, 0.50, 0.41), (0.42, 0.75), 0, 0),
    "drawers": ("panel", (0.60, 0.57, 0.48), (0.54, 0.50, 0.41), (0.62, 0.21), 0, 0),
    "door": ("door", (0.58, 0.52, 0.42), (0.48, 0.41, 0.31), (1, 1), 0, 0),
    "oven": ("oven", (0.42, 0.42, 0.43), (0.30, 0.30, 0.31), (1, 1), 0.25, 0),
    "fridge": ("fridge", (0.62, 0.64, 0.64), (0.48, 0.50, 0.51), (1, 1), 0.05, 0),
    "steel": ("steel", (0.50, 0.50, 0.51), (0.30, 0.30, 0.31), (1, 1), 0.3, 0),
    "black": ("plain", (0.030, 0.030, 0.034), (0.06, 0.058, 0.056), (1, 1), 0.12, 0),
    "white": ("plain", (0.76, 0.75, 0.72), (0.62, 0.60, 0.56), (1, 1), 0, 0),
    "granite": ("stone", (0.20, 0.19, 0.18), (0.36, 0.32, 0.28), (1, 1), 0, 0),
    "glass": ("outdoors", (0.42, 0.68, 1.05), (0.10, 0.22, 0.06), (1, 1), 0.7, 0.85),
    "screen": ("screen", (0.05, 0.05, 0.05), (0.7, 0.7, 0.7), (1, 1), 0.5, 0.75),
    "books": ("books", (0.42, 0.36, 0.26), (0.72, 0.66, 0.48), (0.062, 1), 0, 0),
    "paper": ("paper", (0.80, 0.79, 0.75), (0.10, 0.10, 0.12), (1, 1), 0, 0),
    "poster": ("poster", (0.78, 0.76, 0.70), (0.86, 0.84, 0.80), (1, 1), 0, 0),
    "painting": ("framed", (0.26, 0.15, 0.06), (0.2, 0.1, 0.05), (1, 1), 0, 0),
    "leaf": ("leaf", (0.035, 0.13, 0.025), (0.16, 0.36, 0.07), (1, 1), 0, 0),
    "clay": ("plain", (0.46, 0.20, 0.10), (0.33, 0.13, 0.06), (1, 1), 0, 0),
    "keyboard": ("keyboard", (0.04, 0.04, 0.045), (0.22, 0.22, 0.23), (1, 1), 0.1, 0),
    "label": ("label", (0.60, 0.55, 0.42), (0.75, 0.30, 0.12), (1, 1), 0, 0),
    "cardboard": ("label", (0.42, 0.29, 0.16), (0.36, 0.24, 0.13), (1, 1), 0, 0),
    "clock": ("clock", (0.82, 0.80, 0.75), (0.03, 0.03, 0.03), (1, 1), 0, 0),
    "radiator": ("ribs", (0.74, 0.73, 0.70), (0.30, 0.29, 0.27), (0.06, 1), 0, 0),
    "cork": ("pinboard", (0.42, 0.25, 0.12), (0.30, 0.17, 0.08), (1, 1), 0, 0),
    "whiteboard": ("pinboard", (0.80, 0.81, 0.82), (0.60, 0.61, 0.62), (1, 1), 0.15, 0),
    "lamp": ("plain", (1.9, 1.75, 1.4), (1.7, 1.5, 1.15), (1, 1), 0.3, 1),
}
SHADES = {
    "plaster": 0.16,
    "wallpaper": 0.16,
    "fabric": 0.5,
    "label": 0.5,
    "rug": 0.4,
    "carpet": 0.2,
    "cardboard": 0.04,
    "wall tiles": 0.3,
    "door fronts": 0.25,
    "drawers": 0.25,
    "glass": 0.03,
    "leaf": 0.03,
    "lacquer": 0.2,
}


@dataclass(frozen=True)
class Solid:
    """One primitive. Centre and half extents in metres; `faces` are six materials in the order of `render.FACES`."""

    shape: int
    centre: np.ndarray
    half: np.ndarray
    rotation: np.ndarray
    faces: tuple

    def moved(self, rotation, shift):
        return Solid(self.shape, rotation @ self.centre + shift, self.half, rotation @ self.rotation, self.faces)


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
    scene: caster.Scene


# ------------------------------------------------------------------------------------------------- solids


def turn(angle, axis="z"):
    c, s = math.cos(angle), math.sin(angle)
    if axis == "z":
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    return np.array([[1.0, 0, 0], [0, c, -s], [0, s, c]])


def box(x, y, z, w, d, h, skin, front=None, yaw=0.0, lean=0.0, top=None):
    """Box of width, depth, height with its bottom's centre at (x, y, z); its front is the -y side."""
    faces = (skin, skin, front or skin, skin, skin, top or skin)
    return Solid(BOX, np.array([x, y, z + h / 2]), np.array([w, d, h]) / 2, turn(yaw) @ turn(lean, "x"), faces)


def drum(x, y, z, radius, h, skin, top=None):
    """Upright cylinder on (x, y, z)."""
    return Solid(
        CYLINDER,
        np.array([x, y, z + h / 2]),
        np.array([radius, radius, h / 2]),
        np.eye(3),
        (skin,) * 5 + (top or skin,),
    )


def ball(x, y, z, rx, ry, rz, skin):
    """Ellipsoid around (x, y, z)."""
    return Solid(BALL, np.array([x, y, z]), np.array([rx, ry, rz]), np.eye(3), (skin,) * 6)


def put(solids, x=0.0, y=0.0, z=0.0, yaw=0.0):
    """Furniture turned about its own origin, then moved."""
    rotation, shift = turn(yaw), np.array([x, y, z])
    return [solid.moved(rotation, shift) for solid in solids]


class Maker:
    """Furniture, in its own frame: back at y = 0, front towards -y, standing on z = 0.

    Colours, sizes and clutter differ from piece to piece; all draws come from one generator.
    """

    def __init__(self, rng):
        self.rng = rng
        self.wood = self.paint(self.pick("oak", "birch", "walnut"))
        self.second_wood = self.paint(self.pick("oak", "birch", "walnut", "lacquer"))
        hue = self.paint("door fronts")
        self.fronts = {"door fronts": hue, "drawers": ("panel", *hue[1:3], (0.62, 0.21), 0, 0)}

    def pick(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def between(self, low, high):
        return self.rng.uniform(low, high)

    def chance(self, share):
        return self.rng.random() < share

    def paint(self, name):
        """A material of the table in a shade of its own."""
        pattern, a, b, *rest = MATERIALS[name]
        spread = SHADES.get(name, 0.08)
        tint = np.exp(self.rng.normal(0, spread, 3) + self.rng.normal(0, 0.08))
        if spread >= 0.3 and self.chance(0.5):
            tint = tint[::-1] * np.roll(np.array([1.6, 0.9, 0.7]), self.rng.integers(3))
        return (pattern, tuple(np.array(a) * tint), tuple(np.array(b) * tint), *rest)

    # --- small things: origin at the centre of their bottom

    def mug(self):
        skin = self.paint(self.pick("label", "clay", "white", "fabric"))
        h = self.between(0.09, 0.12)
        return [drum(0, 0, 0, 0.042, h, skin, self.paint("black")), box(0.052, 0, 0.02, 0.03, 0.012, h - 0.04, skin)]

    def bottle(self):
        skin, h = self.paint("label"), self.between(0.18, 0.28)
        r = self.between(0.032, 0.045)
        return [
            drum(0, 0, 0, r, h * 0.68, skin),
            ball(0, 0, h * 0.68, r, r, 0.04, skin),
            drum(0, 0, h * 0.7, 0.014, h * 0.3, self.paint("black")),
        ]

    def jar(self):
        r, h = self.between(0.04, 0.065), self.between(0.1, 0.2)
        return [drum(0, 0, 0, r, h, self.paint("label")), drum(0, 0, h, r * 0.9, 0.02, self.paint("steel"))]

    def carton(self):
        w, d, h = self.between(0.07, 0.2), self.between(0.05, 0.12), self.between(0.14, 0.3)
        return [box(0, 0, 0, w, d, h, self.paint("label"), yaw=self.between(-0.4, 0.4))]

    def bowl(self):
        solids = [drum(0, 0, 0, 0.06, 0.02, self.paint("clay")), drum(0, 0, 0.02, 0.13, 0.05, self.paint("label"))]
        for k in range(4):
            x, y = 0.065 * math.cos(1.6 * k), 0.065 * math.sin(1.6 * k)
            solids.append(ball(x, y, 0.1, 0.042, 0.042, 0.04, self.paint(self.pick("fabric", "clay", "leaf"))))
        return solids

    def plates(self):
        return [
            drum(0, 0, 0.012 * k, 0.12 - 0.012 * k, 0.01, self.paint("label"), self.paint("white")) for k in range(3)
        ]

    def sheets(self):
        return [
            box(
                self.between(-0.08, 0.08),
                self.between(-0.06, 0.06),
                0.004 * k,
                0.21,
                0.29,
                0.004,
                self.paint("paper"),
                yaw=self.between(-0.6, 0.6),
            )
            for k in range(3)
        ]

    def pile(self):
        """A lying stack of books."""
        solids, z = [], 0.0
        for _ in range(self.rng.integers(2, 5)):
            h = self.between(0.02, 0.045)
            skin = self.paint(self.pick("label", "fabric"))
            solids.append(
                box(
                    0,
                    0,
                    z,
                    self.between(0.2, 0.27),
                    self.between(0.15, 0.2),
                    h,
                    skin,
                    yaw=self.between(-0.3, 0.3),
                    top=self.paint("poster"),
                )
            )
            z += h
        return solids

    def plant(self, scale=1.0):
        pot = 0.09 * scale
        solids = [drum(0, 0, 0, pot, 1.6 * pot, self.paint(self.pick("clay", "label", "white")), self.paint("black"))]
        for k in range(11):
            lean, length = 0.15 + 0.09 * k + self.between(-0.1, 0.1), pot * self.between(1.3, 2.0)
            stand = turn(2.4 * k) @ turn(lean, "x")
            blade = Solid(
                BALL,
                np.array([0, 0, length]),
                np.array([0.42 * pot, 0.1 * pot, length]),
                np.eye(3),
                (self.paint("leaf"),) * 6,
            )
            solids.append(blade.moved(stand, np.array([0, 0, 1.5 * pot])))
        return solids

    def kettle(self):
        skin, black = self.paint(self.pick("steel", "fabric")), self.paint("black")
        return [
            drum(0, 0, 0, 0.08, 0.03, black),
            drum(0, 0, 0.03, 0.075, 0.15, skin),
            ball(0, 0, 0.18, 0.07, 0.07, 0.03, skin),
            box(0.1, 0, 0.06, 0.025, 0.02, 0.14, black),
        ]

    def toaster(self):
        return [
            box(0, 0, 0, 0.28, 0.17, 0.18, self.paint(self.pick("steel", "fabric")), top=self.paint("radiator")),
            box(0.145, 0, 0.08, 0.02, 0.03, 0.03, self.paint("black")),
        ]

    def microwave(self):
        return [box(0, 0, 0, 0.46, 0.34, 0.27, self.paint(self.pick("black", "white", "steel")), self.paint("oven"))]

    def desk_lamp(self):
        metal = self.paint(self.pick("black", "fabric"))
        return [
            drum(0, 0, 0, 0.08, 0.02, metal),
            box(0, 0, 0.02, 0.02, 0.02, 0.36, metal),
            box(0, -0.09, 0.37, 0.025, 0.2, 0.02, metal),
            drum(0, -0.17, 0.3, 0.07, 0.08, metal),
        ]

    def monitor(self):
        black, w = self.paint("black"), self.between(0.48, 0.62)
        return [
            box(0, 0, 0, 0.24, 0.17, 0.015, black),
            box(0, 0.02, 0.01, 0.05, 0.03, 0.18, black),
            box(0, -0.01, 0.11, w, 0.035, 0.34, black, self.paint("screen")),
        ]

    def laptop(self):
        grey = self.paint("steel")
        return [
            box(0, 0, 0, 0.33, 0.23, 0.016, grey, top=self.paint("keyboard")),
            box(0, 0.15, 0.005, 0.33, 0.01, 0.22, grey, self.paint("screen"), lean=-0.28),
        ]

    def keyboard(self):
        return [
            box(0, 0, 0, 0.43, 0.14, 0.02, self.paint("black"), top=self.paint("keyboard")),
            ball(0.3, -0.01, 0.012, 0.03, 0.05, 0.018, self.paint("black")),
        ]

    def scatter(self, width, depth, count, things):
        """`count` small things side by side on a surface of width x depth around (0, -depth / 2)."""
        solids, step = [], width / count
        for k in range(count):
            thing = getattr(self, self.pick(*things))()
            x = -width / 2 + (k + self.between(0.35, 0.65)) * step
            solids += put(thing, x, -depth * self.between(0.35, 0.65), yaw=self.between(-0.3, 0.3))
        return solids

    # --- furniture: back at y = 0

    def table(self, w, d, h=0.75):
        top, leg = self.wood, self.second_wood
        legs = [
            box(sx * (w / 2 - 0.06), -d / 2 + sy * (d / 2 - 0.06), 0, 0.06, 0.06, h - 0.04, leg)
            for sx in (-1, 1)
            for sy in (-1, 1)
        ]
        return [
            box(0, -d / 2, h - 0.035, w, d, 0.035, top),
            box(0, -d / 2, h - 0.11, w - 0.14, d - 0.14, 0.075, leg),
        ] + legs

    def chair(self):
        """Its back is at y = 0: whoever sits looks along -y."""
        wood, seat = self.second_wood, self.paint("fabric")
        legs = [box(sx * 0.18, -0.03 - sy * 0.36, 0, 0.035, 0.035, 0.44, wood) for sx in (-1, 1) for sy in (0, 1)]
        posts = [box(sx * 0.18, -0.02, 0.44, 0.035, 0.03, 0.46, wood) for sx in (-1, 1)]
        return (
            legs
            + posts
            + [
                box(0, -0.21, 0.43, 0.42, 0.42, 0.045, seat),
                box(0, -0.02, 0.78, 0.4, 0.025, 0.13, wood),
                box(0, -0.02, 0.6, 0.4, 0.02, 0.07, wood),
            ]
        )

    def office_chair(self):
        black, seat = self.paint("black"), self.paint("fabric")
        foot = [box(0, -0.25, 0.04, 0.56, 0.05, 0.04, black, yaw=a) for a in (0.3, 1.35, 2.4)]
        return foot + [
            drum(0, -0.25, 0.06, 0.03, 0.36, black),
            box(0, -0.25, 0.42, 0.48, 0.46, 0.08, seat),
            box(0, -0.03, 0.55, 0.44, 0.06, 0.5, seat),
            box(0.26, -0.25, 0.62, 0.05, 0.26, 0.03, black),
            box(-0.26, -0.25, 0.62, 0.05, 0.26, 0.03, black),
            box(0, 0.0, 0.45, 0.06, 0.03, 0.3, black),
        ]

    def shelf(self, w=0.9, d=0.32, h=1.95, levels=5, things=("jar", "bottle", "carton", "plates", "mug")):
        """Bookcase with rows of books and things."""
        skin = self.pick(self.wood, self.second_wood)
        solids = [box(sx * (w / 2 - 0.01), -d / 2, 0, 0.025, d, h, skin) for sx in (-1, 1)]
        solids += [box(0, -0.006, 0, w, 0.012, h, self.second_wood)]
        step = (h - 0.06) / levels
        for k in range(levels + 1):
            solids.append(box(0, -d / 2, 0.03 + k * step, w - 0.03, d, 0.025, skin))
        for k in range(levels):
            solids += put(self._row(w - 0.08, d, step - 0.06, things), z=0.055 + k * step)
        return solids

    def _row(self, w, d, h, things):
        split = self.between(0.35, 0.65)
        left, right = w * split, w * (1 - split)
        parts = []
        for width, x in ((left, -w / 2 + left / 2), (right, w / 2 - right / 2)):
            if self.chance(0.62):
                tall, deep = h * self.between(0.72, 0.97), d * self.between(0.6, 0.85)
                parts.append(box(x, -d * 0.5, 0, width * 0.94, deep, tall, self.paint("paper"), self.paint("books")))
            else:
                parts += put(self.scatter(width, d, max(1, int(width / 0.16)), things), x)
        return parts

    def counter(self, w, modules, things):
        """Kitchen run: fronts from left to right by name, worktop, tiles behind and a line of things on top."""
        solids = [
            box(0, -0.27, 0, w, 0.5, 0.1, self.paint("black")),
            box(0, -0.31, 0.86, w + 0.02, 0.64, 0.04, self.paint("granite")),
            box(0, -0.006, 0.9, w, 0.012, 0.55, self.paint("wall tiles")),
        ]
        step = w / len(modules)
        for k, name in enumerate(modules):
            x = -w / 2 + (k + 0.5) * step
            front = (
                self.paint("oven") if name == "oven" else self.fronts["drawers" if name == "drawers" else "door fronts"]
            )
            solids.append(box(x, -0.29, 0.1, step - 0.004, 0.58, 0.76, self.second_wood, front))
            if name == "sink":
                solids += self.sink(x)
            elif name == "oven":
                solids += [
                    drum(x + dx, -0.31 + dy, 0.9, 0.085, 0.012, self.paint("black"))
                    for dx in (-0.13, 0.13)
                    for dy in (-0.13, 0.13)
                ]
                solids += [
                    drum(x - 0.13, -0.18, 0.912, 0.095, 0.13, self.paint("steel")),
                    box(x - 0.13, -0.33, 1.0, 0.025, 0.16, 0.02, self.paint("black")),
                ]
            else:
                solids += put(self.scatter(step, 0.4, 2, things), x, z=0.9)
        return solids

    def sink(self, x):
        steel = self.paint("steel")
        return [
            box(x, -0.31, 0.9, 0.48, 0.42, 0.008, steel, top=self.paint("black")),
            drum(x, -0.08, 0.9, 0.018, 0.28, steel),
            box(x, -0.17, 1.16, 0.025, 0.2, 0.025, steel),
            box(x + 0.3, -0.3, 0.9, 0.1, 0.06, 0.05, self.paint("fabric")),
        ]

    def wall_cabinets(self, w, h=0.68):
        return [box(0, -0.17, 0, w, 0.34, h, self.second_wood, self.fronts["door fronts"])]

    def wall_shelf(self, w):
        """A board with things on it, and hooks with cloths below."""
        board = [box(0, -0.1, 0, w, 0.2, 0.03, self.wood)]
        return board + put(self.scatter(w, 0.2, int(w / 0.15), ("jar", "bottle", "carton", "mug", "jar")), z=0.03)

    def fridge(self):
        top = put(self.scatter(0.5, 0.5, 2, ("carton", "bowl")), z=1.75)
        return [box(0, -0.32, 0.03, 0.62, 0.62, 1.72, self.paint("lacquer"), self.paint("fridge"))] + top

    def sideboard(self, w, h=0.82, things=("bowl", "pile", "bottle", "plant", "jar", "carton")):
        body = [
            box(0, -0.2, 0.08, w, 0.4, h - 0.1, self.wood, self.fronts[self.pick("door fronts", "drawers")]),
            box(0, -0.2, h - 0.02, w + 0.04, 0.44, 0.03, self.second_wood),
        ]
        return body + put(self.scatter(w, 0.4, max(2, int(w / 0.24)), things), z=h + 0.01)

    def window(self, w, h=1.15):
        """Hangs with its sill at z = 0: panes, frame, sill with plants, curtains."""
        white, cloth = self.paint("white"), self.paint("fabric")
        bars = [box(sx * w / 2, -0.035, 0, 0.06, 0.07, h, white) for sx in (-1, 0, 1)]
        bars += [box(0, -0.035, z, w, 0.06, 0.06, white) for z in (0, h - 0.06)]
        curtains = [
            box(sx * (w / 2 + 0.17), -0.09, -0.25, 0.3, 0.07, h + 0.4, cloth, ("ribs", *cloth[1:3], (0.075, 1), 0, 0))
            for sx in (-1, 1)
        ]
        sill = [
            box(0, -0.1, -0.05, w + 0.1, 0.2, 0.04, white),
            box(0, -0.08, h + 0.14, w + 0.8, 0.02, 0.02, self.second_wood),
        ]
        panes = [box(0, -0.012, 0, w, 0.02, h, self.paint("glass"))]
        return panes + bars + curtains + sill + put(self.scatter(w, 0.2, 3, ("plant", "jar", "plant", "mug")), z=-0.01)

    def radiator(self, w=0.9):
        return [box(0, -0.07, 0.12, w, 0.09, 0.55, self.paint("radiator"))]

    def door(self):
        frame = self.paint("white")
        return [
            box(0, -0.012, 0, 0.86, 0.03, 2.03, self.paint("door")),
            box(0, -0.01, 2.03, 1.02, 0.05, 0.09, frame),
        ] + [box(sx * 0.47, -0.01, 0, 0.09, 0.05, 2.05, frame) for sx in (-1, 1)]

    def picture(self, w, h, name=None):
        name = name or self.pick("poster", "painting", "painting")
        return [box(0, -0.012, 0, w, 0.024, h, self.wood, self.paint(name))]

    def clock(self):
        face = self.paint("clock")
        disc = drum(0, 0, 0, 0.15, 0.03, self.paint("black"), face)
        return [Solid(CYLINDER, np.zeros(3), disc.half, turn(math.pi / 2, "x"), disc.faces)]

    def desk(self, w=1.3):
        extra = ("pile", "sheets", "mug", "bottle", "plant")
        solids = self.table(w, 0.68, 0.74) + put(self.monitor(), -0.12, -0.2, 0.74, self.between(-0.2, 0.2))
        if self.chance(0.5):
            solids += put(self.monitor(), 0.42, -0.24, 0.74, self.between(-0.5, -0.2))
        solids += put(self.keyboard(), -0.12, -0.48, 0.74, self.between(-0.1, 0.1)) + put(
            self.desk_lamp(), w / 2 - 0.14, -0.12, 0.74
        )
        solids += put(self.scatter(0.3, 0.5, 1, extra), -w / 2 + 0.18, -0.05, 0.74) + put(
            self.sheets(), 0.35, -0.5, 0.74
        )
        solids += [
            box(w / 2 - 0.26, -0.3, 0, 0.4, 0.5, 0.6, self.second_wood, self.fronts["drawers"]),
            box(-w / 2 + 0.2, -0.25, 0.05, 0.19, 0.42, 0.42, self.paint("black"), self.paint("radiator")),
        ]
        return solids + put(self.office_chair(), self.between(-0.2, 0.1), -0.95, yaw=math.pi + self.between(-0.5, 0.5))

    def coats(self):
        """A rail with coats and a bag."""
        hooks = [box(0, -0.015, 1.65, 0.8, 0.03, 0.09, self.wood)]
        coats = []
        for x in (-0.25, 0.1):
            cloth, z = self.paint("fabric"), self.between(0.72, 0.85)
            body = Solid(
                CYLINDER,
                np.array([x, -0.1, (z + 1.5) / 2]),
                np.array([0.15, 0.085, (1.5 - z) / 2]),
                np.eye(3),
                (cloth,) * 6,
            )
            coats += [body, ball(x, -0.1, 1.5, 0.15, 0.085, 0.14, cloth)]
        return hooks + coats + [box(0.32, -0.08, 1.15, 0.26, 0.1, 0.32, self.paint("fabric"))]

    def boxes(self):
        """A stack of cardboard boxes."""
        return [
            box(0, -0.24, 0, 0.5, 0.4, 0.34, self.paint("cardboard"), yaw=self.between(-0.2, 0.2)),
            box(0.03, -0.24, 0.34, 0.4, 0.32, 0.27, self.paint("cardboard"), yaw=self.between(-0.4, 0.4)),
            box(0, -0.24, 0.61, 0.24, 0.2, 0.06, self.paint("label"), yaw=self.between(-0.9, 0.9)),
        ]

    def bin(self):
        return [
            drum(0, -0.18, 0, 0.15, 0.36, self.paint(self.pick("fabric", "steel", "label")), self.paint("black")),
            ball(0.03, -0.2, 0.35, 0.08, 0.07, 0.05, self.paint("paper")),
        ]

    def pendant(self):
        shade = self.paint("fabric")
        return [
            drum(0, 0, 0.2, 0.008, 0.5, self.paint("black")),
            drum(0, 0, 0, 0.17, 0.2, shade),
            ball(0, 0, 0.02, 0.06, 0.06, 0.06, self.paint("lamp")),
        ]


# ------------------------------------------------------------------------------------------------- rooms


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
    workers = _workers(device) if workers is None else workers
    return replace(room, scene=caster.bake_light(room.scene.to(device), workers=workers).to("cpu"))


def furnish(kind, seed):
    """The same room in the dark: all its solids, which takes a fraction of the time."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of room {kind!r}; known: {', '.join(KINDS)}")
    rng = _generator(kind, seed, 0)
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


def _workers(device):
    # As many processes as torch would have used threads: that number knows of limits that the count of cores does not.
    return min(4, torch.get_num_threads()) if torch.device(device).type == "cpu" else 0


def _generator(kind, seed, *stream):
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
    names = [pattern.__name__ for pattern in caster.PATTERNS]

    def floats(rows):
        return torch.tensor(np.array(rows), dtype=torch.float32)

    return caster.Scene(
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
        noise=caster.noise_table(),
        lamps=floats(lamps),
        light_grid=torch.zeros(0, 3, dtype=torch.long),
        light=torch.zeros(0, 3),
    )


# ------------------------------------------------------------------------------------------------- views


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
    rng = _generator(room.kind, seed, 1, sequence)
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
    scene, poses, intrinsics = _on(device, room, poses, intrinsics)
    return caster.picture(scene, poses, intrinsics, size), caster.trace(scene, poses, intrinsics, size)[0]


def _on(device, room, poses, intrinsics):
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


# ------------------------------------------------------------------------------------------------- files


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
    for done in caster.parallel_map(write, starts, _workers(device)):
        if progress:
            progress(done, len(poses))


def _write_batch(data, room, poses, settings, device, batch, start):
    """Render and write the frames from `start` on; returns the number of the frame after them."""
    end = min(start + batch, len(poses))
    color, depth = (intrinsics_for(settings[f"{camera}_size"], camera) for camera in ("color", "depth"))
    scene, on_device, k_color = _on(device, room, poses[start:end], color)
    images = caster.picture(scene, on_device, k_color, settings["color_size"]).cpu().numpy()
    depths, lost = _depth_and_loss(room, poses[start:end], depth, settings["depth_size"], device)
    for k in range(end - start):
        rng = _generator(settings["kind"], settings["seed"], 2, start + k)
        _write_frame(data, start + k, images[k], depths[k], lost[k], rng, depth[0, 0])
    return end


def _depth_and_loss(room, poses, intrinsics, size, device):
    """True depth and the share of readings that each pixel's material loses, both ``(B, H, W)`` arrays."""
    scene, poses, intrinsics = _on(device, room, poses, intrinsics)
    depth, primitive = caster.trace(scene, poses, intrinsics, size)
    rays = caster.pixel_rays(intrinsics, *size, twice=False)
    faces = [caster.surface_points(scene, *view)[0] for view in zip(poses, [rays] * len(poses), depth, primitive)]
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
