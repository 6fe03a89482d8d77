"""Furniture as lists of solids; everything random about it comes from one generator."""

import math
from dataclasses import dataclass

import numpy as np

from kdutils.rooms.materials import MATERIALS, SHADES
from kdutils.rooms.solids import BALL, BOX, CYLINDER


@dataclass(frozen=True)
class Solid:
    """One primitive. Centre and half extents in metres; `faces` are six materials in the order of `solids.FACES`."""

    shape: int
    centre: np.ndarray
    half: np.ndarray
    rotation: np.ndarray
    faces: tuple

    def moved(self, rotation, shift):
        return Solid(self.shape, rotation @ self.centre + shift, self.half, rotation @ self.rotation, self.faces)


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
