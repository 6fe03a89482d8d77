"""Procedural textures: the colour of every point of a surface, from noise and whole numbers."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from kdutils.rooms.solids import FACES


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
