"""Pictures from arrays: matplotlib for paper-like plots, plotly for 3D in the notebook, open3d for files and viewer.

Every interactive view has a static twin, because not every place that shows a notebook runs its scripts.
"""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from kdutils import geometry
from kdutils.settings import ARMS

MOST_POINTS = 20_000  # of an interactive cloud: a third of a megabyte in the notebook
_LEVELS = 6  # grey levels a channel of the colours that an interactive cloud uses
TEST, TRAIN = "#d1495b", "#30638e"
BACKBONE_COLOURS = {"cnn": "#8a6d9b", "mobilenet": "#edae49", "vit16": "#30638e", "vit32": "#3fa7d6",
                    "vit64": "#1b998b", "anchornet": "#d1495b", "anchorvit": "#f08a8a",
                    "original": "#8d99ae"}  # fmt: skip
FILLINGS = {"unfrozen": "full", "frozen": "none", "scratch": "left"}


def frame_grid(images, depths, titles, width=2.4):
    """Images ``(H, W, 3)`` above their depth ``(H, W)`` in metres; pixels without a reading stay white."""
    figure, axes = plt.subplots(2, len(images), figsize=(width * len(images), 1.75 * width), layout="constrained",
                                squeeze=False)  # fmt: skip
    farthest = max(np.percentile(depth, 99.5) for depth in depths)
    for column, (image, depth, title) in enumerate(zip(images, depths, titles)):
        axes[0, column].imshow(image)
        axes[0, column].set_title(title, fontsize=9)
        shown = axes[1, column].imshow(np.where(depth > 0, depth, np.nan), vmin=0, vmax=farthest, cmap="viridis_r")
    figure.colorbar(shown, ax=axes[1, :].tolist(), label="depth in m", shrink=0.9)
    return _bare(figure, axes)


def maps(rows, labels, value="", cmap="plasma", width=2.4, least=0, most=np.inf, titles=()):
    """Pictures in rows: RGB ``(H, W, 3)`` as they are, ``(H, W)`` in colour on one scale with a colour bar.

    Args:
        rows: lists of arrays, all of one length. labels: one for each row. value: what the colour bar measures.
        least, most: the scale begins at the one, and ends at the other at the latest. titles: of the columns.
    """
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(width * len(rows[0]), 0.8 * width * len(rows)),
                                layout="compressed", squeeze=False)  # fmt: skip
    scalars = [a[np.isfinite(a)] for row in rows for a in row if a.ndim == 2]
    highest = min(most, np.percentile(np.concatenate(scalars), 98)) if scalars else 1
    shown, last = None, None
    for line, row, label in zip(axes, rows, labels):
        for axis, array in zip(line, row):
            if array.ndim == 3:
                axis.imshow(array)
            else:
                shown, last = axis.imshow(array, vmin=least, vmax=highest, cmap=cmap), line
        line[0].set_ylabel(label)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    if shown is not None:
        figure.colorbar(shown, ax=list(last), label=value, shrink=0.9, extend="max")
    return _bare(figure, axes)


def panels(arrays, titles, scales=None, width=3.4):
    """Pictures in one row, each ``(H, W)`` with a colour bar of its own.

    Args:
        arrays, titles: of the pictures. scales: for each a dict of ``imshow``'s options, such as ``vmax``.
    """
    figure, axes = plt.subplots(1, len(arrays), figsize=(width * len(arrays), 0.8 * width), layout="constrained",
                                squeeze=False)  # fmt: skip
    for axis, array, title, scale in zip(axes[0], arrays, titles, scales or [{}] * len(arrays)):
        shown = axis.imshow(array, **scale)
        if array.ndim == 2:
            figure.colorbar(shown, ax=axis, shrink=0.8)
        axis.set_title(title, fontsize=9)
    return _bare(figure, axes)


def two_clouds(before, after, poses, titles, units=("m", "m"), names=("one", "other")):
    """Two clouds on top of each other, from above: once as they were and once as they are, each in its own unit."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    a, b = _views(poses)[0]
    for axis, clouds, title, unit in zip(axes, (before, after), titles, units):
        for points, colour in zip(clouds, (TRAIN, TEST)):
            points, _ = thin(points, points, 8000)
            axis.scatter(points[:, a], points[:, b], s=0.6, color=colour, linewidths=0, rasterized=True)
        (cameras,) = axis.plot(poses[:, a, 3], poses[:, b, 3], "k^", ms=6, label="cameras")
        axis.set(title=title, xlabel=f"{'xyz'[a]} in {unit}", ylabel=f"{'xyz'[b]} in {unit}", aspect="equal")
    patches = [Patch(color=colour, label=name) for colour, name in zip((TRAIN, TEST), names)]
    figure.legend(handles=[*patches, cameras], loc="outside lower center", ncols=3, frameon=False)
    return figure


def scene_coordinates(points, low, high, mask=None):
    """World points ``(..., 3)`` as colours, one for every place in the room; white says that there is no point."""
    colours = 0.85 * np.clip((points - low) / (high - low), 0, 1)
    return colours if mask is None else np.where(mask[..., None], colours, 1.0)


def camera_path(poses, is_test, points=None):
    """Camera centres from above and from the side, with a thin cloud ``(M, 3)`` of the room behind them."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, (a, b) in zip(axes, _views(poses)):
        if points is not None:
            axis.scatter(points[:, a], points[:, b], s=0.3, color="#c9ced6", linewidths=0, rasterized=True)
        for members, colour, name in ((~is_test, TRAIN, "training"), (is_test, TEST, "test")):
            axis.plot(poses[members, a, 3], poses[members, b, 3], ".", ms=4, color=colour, label=name)
        axis.set_xlabel(f"{'xyz'[a]} in m")
        axis.set_ylabel(f"{'xyz'[b]} in m")
        axis.set_aspect("equal")
    _upright(axes[1], world_up(poses))
    axes[0].legend(frameon=False)
    return figure


def pair_graphs(graphs, loop=30, bounds=None):
    """Pair graphs over the camera centres, seen from above; below, what every edge's two views share.

    Args:
        graphs: scene's name -> poses ``(N, 4, 4)`` and ``overlap.Edges``.
        loop: frames between two images from which on their edge closes a loop.
        bounds: least and most part of a view that is shared, and least angle in degrees; drawn as lines.
    """
    figure, axes = plt.subplots(2, len(graphs), figsize=(4.8 * len(graphs), 7), layout="constrained", squeeze=False)
    for (above, below), (name, (poses, edges)) in zip(axes.T, graphs.items()):
        a, b = _views(poses)[0]
        is_loop = np.diff(edges.images, axis=1)[:, 0] >= loop
        for which, colour, label in ((~is_loop, TRAIN, "neighbours in time"), (is_loop, TEST, "loop closures")):
            ends = poses[edges.images[which]][:, :, [a, b], 3]
            lines = np.concatenate([ends, np.full((len(ends), 1, 2), np.nan)], axis=1).reshape(-1, 2)
            above.plot(*lines.T, color=colour, lw=0.4, alpha=0.5, label=label)
            below.plot(100 * edges.shared[which], edges.angle[which], ".", color=colour, ms=2.5, label=label)
        above.plot(poses[:, a, 3], poses[:, b, 3], ".", ms=3, color="black")
        above.set(title=name, xlabel=f"{'xyz'[a]} in m", ylabel=f"{'xyz'[b]} in m", aspect="equal")
        below.set(xlabel="shared part of the views in %", ylabel="triangulation angle in °", xlim=(0, 100))
        if bounds:
            for position in bounds[:2]:
                below.axvline(100 * position, color="grey", ls="--", lw=0.8)
            below.axhline(bounds[2], color="grey", ls="--", lw=0.8)
    axes[1, 0].legend(frameon=False, markerscale=4)
    return figure


def histogram(errors, label):
    """Distribution of errors in centimetres."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.hist(errors, bins=80, color=TRAIN)
    axis.set(xlabel=f"{label} in cm", ylabel="pixels")
    return figure


def by_image(values, numbers, is_test, label):
    """One value an image over the frames' numbers, test and training apart; NaN is left out."""
    figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
    for members, colour, name in ((~is_test, TRAIN, "training"), (is_test, TEST, "test")):
        axis.plot(numbers[members], values[members], ".", ms=4, color=colour, label=name)
    axis.set(xlabel="frame", ylabel=label, ylim=(0, None))
    axis.legend(frameon=False)
    return figure


def training_curves(histories, baseline=None):
    """Validation error by step of several arms on one logarithmic axis; ``histories`` maps a name to its history."""
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for name, history in histories.items():
        steps, mse = zip(*((row["step"], row["validation_mse"]) for row in history))
        axis.plot(steps, mse, _line_style(name), color=_colour(name), label=name)
    if baseline is not None:
        axis.axhline(baseline, color="black", lw=0.8, label="mean point")
    axis.set(xlabel="step", ylabel="validation MSE in m² per coordinate", yscale="log")
    axis.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def pretraining_curves(log):
    """A teacher's validation by minutes, from its log: relative errors on the left, the camera's rotation right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    minutes = [entry["seconds"] / 60 for entry in log]
    for name, colour in (("depth", TRAIN), ("points", TEST)):
        left.plot(minutes, [100 * entry[name] for entry in log], color=colour, label=name)
    right.plot(minutes, [entry["rotation"] for entry in log], color=TRAIN)
    for axis, label in ((left, "median error in %"), (right, "median rotation error in degrees")):
        axis.set(xlabel="minutes", ylabel=label, yscale="log")
        axis.grid(alpha=0.3, which="both")
        plain_ticks(axis.yaxis)
    left.legend()
    return figure


def matches(image1, image2, patches1, patches2, patch):
    """Two views side by side; lines join patches of the first, numbered row by row, with their places in the second."""
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    width = image1.shape[1]
    axis.imshow(np.concatenate([image1, image2], axis=1))
    for k, (a, b) in enumerate(zip(np.asarray(patches1), np.asarray(patches2))):
        rows, columns = np.divmod([a, b], width // patch)
        x, y = (columns + 0.5) * patch + [0, width], (rows + 0.5) * patch
        axis.plot(x, y, color=f"C{k}", marker="s", markersize=14, markerfacecolor="none")
    axis.axis("off")
    return figure


def results(rows, baseline=None, paper=None):
    """Test MSE of every arm on a logarithmic axis; a cross where pretrained weights could not be had.

    Args:
        rows: see ``reporting.collect``. baseline: MSE of the mean point. paper: the paper's MSE on such rooms.
    """
    rows = sorted(rows, key=lambda row: row["mse"])
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        axis.plot(row["mse"], place, **(_look(row["arm"]) | ({"marker": "X"} if row["unpretrained"] else {})))
        axis.annotate(f"{row['mse']:.4f}", (row["mse"], place), (8, 0), textcoords="offset points", va="center",
                      fontsize=8, bbox={"color": "white", "pad": 0.5})  # fmt: skip
    axis.grid(axis="y", color="#e3e6ea", lw=0.8)
    axis.set_axisbelow(True)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axis.invert_yaxis()  # best first, as in the tables
    for value, name, style in ((baseline, "mean point", ":"), (paper, "paper's ViT", "--")):
        if value:
            axis.axvline(value, color="black", lw=0.9, ls=style, label=name)
    axis.set(xlabel="test MSE in m² per coordinate, against the teacher", xscale="log")
    lowest = min([row["mse"] for row in rows] + [value for value in (baseline, paper) if value])
    axis.set_xlim(lowest / 2, axis.get_xlim()[1] * 1.6)
    axis.legend(handles=[*axis.get_legend_handles_labels()[0], *_legend(rows)], frameon=False, fontsize=8,
                loc="upper left", bbox_to_anchor=(1.01, 1))  # fmt: skip
    return figure


def cost_against_error(rows):
    """Each student's size and latency against its median error to the depth camera, all axes logarithmic.

    Arms of one network are the same to run, so that the fewest milliseconds of them are the latency of all.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained", sharey=True)
    networks = [(ARMS[row["arm"]].backbone, ARMS[row["arm"]].patch) for row in rows]
    for row, network in zip(rows, networks):
        latency = min(other["latency_ms"] for other, its in zip(rows, networks) if its == network)
        for axis, cost in zip(axes, (row["megabytes"], latency)):
            axis.plot(cost, 100 * row["depth_median"], **_look(row["arm"]))
    axes[0].set(xlabel="size in MB at 32 bits", ylabel="median error to depth in cm", xscale="log", yscale="log")
    axes[1].set(xlabel="latency in ms for one image", xscale="log")
    for scale in (axes[0].xaxis, axes[0].yaxis, axes[1].xaxis):
        plain_ticks(scale)
    axes[1].legend(handles=_legend(rows), frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def open_questions(pruned, apart, limit):
    """Two panels: fewer weights, and images of other rooms.

    Args:
        pruned: maps arms to test MSEs in m² by the share of weights that is left out. apart: maps places to distances
            from the rays in cm, one an image. limit: the distance above which an image counts as of elsewhere.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
    for arm, by_share in pruned.items():
        shares = [100 * share for share in by_share]
        left.plot(shares, list(by_share.values()), "o-", ms=4, color=_colour(arm), label=arm)
    left.set(xlabel="weights left out in %", ylabel="test MSE in m² per coordinate", yscale="log")
    left.legend(frameon=False, fontsize=8)
    for (place, distances), shade in zip(apart.items(), np.linspace(0.13, 0.8, len(apart))):
        right.ecdf(distances, label=place, color=str(shade), lw=2)
    right.axvline(limit, color=TEST, lw=1, ls="--", label="limit")
    right.set(xlabel="an image's points off their rays: median in cm", ylabel="share of the images below",
              xscale="log")  # fmt: skip
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    for scale in (left.yaxis, right.xaxis):
        plain_ticks(scale)
    return figure


def plain_ticks(axis):
    """Ticks of a logarithmic axis as plain numbers: 2, 3, 5, 7, 10, 15 instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def ablations(groups):
    """Test MSE on a logarithmic axis, one panel a group; see ``reporting.ablation_groups``."""
    counts = [len(group) for group in groups.values()]
    figure, axes = plt.subplots(len(groups), 1, figsize=(7.5, 0.27 * sum(counts) + 0.45 * len(groups) + 0.8),
                                layout="constrained", squeeze=False, sharex=True, height_ratios=counts)  # fmt: skip
    for axis, (title, group) in zip(axes[:, 0], groups.items()):
        for setting, by_start in group.items():
            for start, mse in by_start.items():
                axis.plot([mse], [setting], **_start_look(start))
            if len(by_start) == 1:
                axis.annotate(f"{mse:.3f}", (mse, setting), (8, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color="#e3e6ea", lw=0.8)
        axis.set_axisbelow(True)
        axis.set_ylim(len(group) - 0.4, -0.6)
    starts = dict.fromkeys(start for group in groups.values() for by_start in group.values() for start in by_start)
    figure.legend(handles=[Line2D([], [], label=start, **_start_look(start)) for start in starts], frameon=False,
                  fontsize=8, loc="outside upper right", ncols=len(starts))  # fmt: skip
    axes[-1, 0].set(xlabel="test MSE in m² per coordinate", xscale="log")
    axes[-1, 0].margins(x=0.15)
    return figure


def _start_look(start):
    """A marker whose filling tells the start; a cross for random weights that stay as they are."""
    look = {"color": TRAIN, "marker": "o", "ls": "", "markersize": 6, "markerfacecoloralt": "white"}
    return look | ({"fillstyle": FILLINGS[start]} if start in FILLINGS else {"marker": "x"})


def thin(points, colours, most=MOST_POINTS, seed=0):
    """At most ``most`` of the points ``(M, 3)`` and their colours ``(M, 3)`` uint8, drawn evenly by a fixed seed."""
    if len(points) <= most:
        return points, colours
    chosen = np.sort(np.random.default_rng(seed).choice(len(points), most, replace=False))
    return points[chosen], colours[chosen]


def cloud(points, colours, poses=None, intrinsics=None, size=None, title="", most=MOST_POINTS):
    """An interactive cloud with camera frustums (plotly).

    Args:
        points, colours: ``(M, 3)`` in metres and uint8; thinned to ``most``.
        poses: ``(N, 4, 4)`` camera-to-world, drawn as frustums; needs ``intrinsics (3, 3)`` and ``size`` (h, w).
    """
    import plotly.graph_objects as go

    points, colours = thin(points, colours, most)
    traces = [_point_trace(go, points.astype(np.float32), colours)]
    if poses is not None:
        x, y, z = frustum_lines(poses, intrinsics, size).T.astype(np.float32)
        traces.append(go.Scatter3d(x=x, y=y, z=z, mode="lines", line={"color": TEST, "width": 2}, hoverinfo="skip"))
    up = world_up(poses) if poses is not None else np.array([0.0, 0.0, 1.0])
    axis = {"showbackground": False, "showgrid": False, "zeroline": False, "title": {"text": ""}}
    return go.Figure(traces).update_layout(
        title=title, height=520, margin={"l": 0, "r": 0, "t": 30 if title else 0, "b": 0}, showlegend=False,
        template="plotly_white",
        scene={"aspectmode": "data", "xaxis": axis, "yaxis": axis, "zaxis": axis, "camera": _overview(up)},
    )  # fmt: skip


def frustum_lines(poses, intrinsics, size, depth=0.15):
    """Outlines of camera pyramids ``depth`` metres deep, as one line ``(M, 3)`` broken by NaN."""
    height, width = size
    corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]]) @ np.linalg.inv(intrinsics).T
    apex, corners = np.zeros(3), corners * depth
    outline = [apex, corners[0], corners[1], apex, corners[2], corners[3], apex]
    ring = [corners[0], corners[3], corners[2], corners[1]]
    broken = np.full((1, 3), np.nan)
    parts = [part for pose in poses for path in (outline, ring)
             for part in (geometry.transform(pose, np.array(path)), broken)]  # fmt: skip
    return np.concatenate(parts)


def cloud_still(points, colours, poses, title="", most=60_000, unit="m"):
    """The static twin of an interactive cloud: seen from above and from one side; ``unit`` is that of its axes."""
    points, colours = thin(points, colours, most)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    up = world_up(poses)
    for axis, (a, b) in zip(axes, _views(poses)):
        hidden = next(k for k in range(3) if k not in (a, b))
        order = np.argsort(points[:, hidden] * (up[hidden] or 1))  # what is highest is drawn last
        axis.scatter(points[order, a], points[order, b], s=0.6, c=colours[order] / 255, linewidths=0, rasterized=True)
        axis.plot(poses[:, a, 3], poses[:, b, 3], ".", ms=2 if len(poses) > 2 else 14, color=TEST)
        axis.set(xlabel=f"{'xyz'[a]} in {unit}", ylabel=f"{'xyz'[b]} in {unit}", aspect="equal")
    _upright(axes[1], up)
    figure.suptitle(title)
    return figure


def save_interactive(figure, path):
    """A web page that draws the figure; plotly.js comes from its content network, so the page stays small."""
    figure.write_html(path, include_plotlyjs="cdn", full_html=True, div_id="cloud")


def write_ply(points, colours, path):
    """The cloud as a PLY file for any 3D program (open3d)."""
    open3d = _open3d()
    if not open3d.io.write_point_cloud(str(path), _open3d_cloud(open3d, points, colours)):
        raise OSError(f"{path}: open3d could not write it. Check that the folder exists and has space.")
    return Path(path)


def show_on_desktop(points, colours):
    """Open open3d's viewer; needs a screen."""
    open3d = _open3d()
    open3d.visualization.draw_geometries([_open3d_cloud(open3d, points, colours)])


def world_up(poses):
    """The world axis, with its sign, nearest to the cameras' mean upward direction."""
    mean = -poses[:, :3, 1].mean(0)
    up = np.zeros(3)
    up[np.abs(mean).argmax()] = np.sign(mean[np.abs(mean).argmax()])
    return up


def _views(poses):
    """Axis pairs of the view from above and of the view from the side."""
    up = int(np.abs(world_up(poses)).argmax())
    level = [k for k in range(3) if k != up]
    return level, [level[0], up]


def _upright(axis, up):
    """Turn a view from the side the right way round where the world's axis points down."""
    if up.sum() < 0:
        axis.invert_yaxis()


def _overview(up):
    side = np.array([1.0, 0.6, 0.0]) if not up[0] else np.array([0.0, 1.0, 0.6])
    side = side if not up[1] else np.array([1.0, 0.0, 0.6])
    eye = 1.25 * side + 1.45 * up
    return {"up": dict(zip("xyz", up.tolist())), "eye": dict(zip("xyz", eye.tolist()))}


def _point_trace(go, points, colours):
    """A colour a point as an index into a fixed palette: one byte a point instead of a string of fifteen."""
    index = (colours.astype(int) * _LEVELS // 256) @ [_LEVELS**2, _LEVELS, 1]
    last = _LEVELS**3 - 1
    grey = np.arange(_LEVELS) * 255 // (_LEVELS - 1)
    palette = [[k / last, f"rgb({grey[k // _LEVELS**2]},{grey[k // _LEVELS % _LEVELS]},{grey[k % _LEVELS]})"]
               for k in range(last + 1)]  # fmt: skip
    marker = {"size": 1.6, "color": index.astype(np.uint8), "colorscale": palette, "cmin": 0, "cmax": last}
    x, y, z = points.T
    return go.Scatter3d(x=x, y=y, z=z, mode="markers", marker=marker, hoverinfo="skip")


def _open3d():
    """Imported late, because it needs system libraries, and without the web server that it starts in notebooks."""
    os.environ.setdefault("OPEN3D_DISABLE_WEB_VISUALIZER", "true")
    import open3d

    return open3d


def _open3d_cloud(open3d, points, colours):
    geometry_ = open3d.geometry.PointCloud()
    geometry_.points = open3d.utility.Vector3dVector(np.asarray(points, dtype=np.float64))
    geometry_.colors = open3d.utility.Vector3dVector(np.asarray(colours, dtype=np.float64) / 255)
    return geometry_


def _backbone(arm):
    return next(backbone for backbone in BACKBONE_COLOURS if arm.startswith(backbone))


def _colour(arm):
    return BACKBONE_COLOURS[_backbone(arm)]


def _look(arm):
    """An arm's marker: its colour tells the backbone, its filling the start."""
    look = {"color": _colour(arm), "marker": "o", "ls": "", "markersize": 7}
    return look | {"fillstyle": FILLINGS[ARMS[arm].start], "markerfacecoloralt": "white"}


def _legend(rows):
    """What colours and fillings stand for."""
    there = {_backbone(row["arm"]) for row in rows}
    colours = [Patch(color=colour, label=kind) for kind, colour in BACKBONE_COLOURS.items() if kind in there]
    starts = {ARMS[row["arm"]].start for row in rows}
    return [*colours, *(Line2D([], [], color="black", marker="o", ls="", fillstyle=filling, markerfacecoloralt="white",
                               label=start) for start, filling in FILLINGS.items() if start in starts)]  # fmt: skip


def _line_style(arm):
    return "-." if arm.endswith("-long") else {"frozen": ":", "scratch": "--"}.get(ARMS[arm].start, "-")


def _bare(figure, axes):
    for axis in np.ravel(axes):
        axis.set(xticks=[], yticks=[])
    return figure
