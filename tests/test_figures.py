"""Pictures: the geometry and colours behind them, and that each one draws without a complaint."""

import json
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import HIGH, LOW, box_world, rotation
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from numpy.testing import assert_allclose, assert_array_equal

from kdutils import figures, geometry, overlap, reporting
from kdutils.settings import ARMS

K = np.array([[100.0, 0, 16], [0, 90, 12], [0, 0, 1]])


@pytest.fixture(scope="module")
def world():
    return box_world(6, (12, 16), test=2)


@pytest.fixture
def draw():
    """Draw a figure to its last pixel; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield lambda figure: figure.canvas.draw() or figure
    plt.close("all")


def coloured(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 3)), rng.integers(0, 256, (count, 3), dtype=np.uint8)


# Points and colours


@given(st.integers(0, 60), st.integers(1, 40), st.integers(0, 9))
def test_thinning_keeps_at_most_so_many_and_each_point_its_colour(count, most, seed):
    points = np.arange(count)[:, None] * np.ones(3)
    kept, colours = figures.thin(points, points.astype(np.uint8), most, seed)
    assert len(kept) == min(count, most)
    assert_array_equal(kept, colours)
    assert (np.diff(kept[:, 0]) > 0).all()  # in order, none twice
    assert_array_equal(kept, figures.thin(points, points.astype(np.uint8), most, seed)[0])


def test_thinning_is_even():
    kept, _ = figures.thin(np.arange(10_000), np.zeros(10_000), 1000)
    assert np.histogram(kept, 5, (0, 10_000))[0].min() > 150


def test_scene_coordinates_closed_form():
    points = np.array([LOW, HIGH, (LOW + HIGH) / 2, HIGH + 1])
    mask = np.array([True, True, True, False])
    assert_allclose(figures.scene_coordinates(points, LOW, HIGH), [[0] * 3, [0.85] * 3, [0.425] * 3, [0.85] * 3])
    points[0, 0] = np.nan
    assert_array_equal(figures.scene_coordinates(points, LOW, HIGH, mask)[3], [1, 1, 1])


def palette_colours(figure):
    """The colours that the browser shows, from the figure's own JSON-ready data."""
    marker = figure.data[0].marker
    scale = {round(place * marker.cmax): colour for place, colour in marker.colorscale}
    return np.array([[int(c) for c in scale[int(k)][4:-1].split(",")] for k in marker.color])


def test_cloud_colours_are_true_within_a_level():
    points, colours = coloured(3000)
    colours[:2] = [[0, 0, 0], [255, 255, 255]]
    found = palette_colours(figures.cloud(points, colours))
    assert np.abs(found - colours.astype(int)).max() <= 255 / (figures._LEVELS - 1)
    assert_array_equal(found[:2], colours[:2])


def test_cloud_has_its_points_and_is_small():
    points, colours = coloured(50_000)
    world = box_world(100, (12, 16))
    figure = figures.cloud(points, colours, world.poses, world.intrinsics, (12, 16), "a room")
    kept, _ = figures.thin(points, colours)
    assert len(kept) == 20_000
    assert_allclose(np.stack([figure.data[0][name] for name in "xyz"], -1), kept, rtol=1e-6)
    text = figure.to_json()
    assert len(text) < 600_000 and json.loads(text)["layout"]["title"]["text"] == "a room"


def test_cloud_without_poses_is_upright():
    figure = figures.cloud(*coloured(10))
    assert len(figure.data) == 1
    assert figure.layout.scene.camera.up.to_plotly_json() == {"x": 0, "y": 0, "z": 1}


def test_cloud_looks_from_above(world):
    camera = figures.cloud(*coloured(10), world.poses, world.intrinsics, (12, 16)).layout.scene.camera
    assert camera.up.to_plotly_json() == {"x": 0, "y": -1, "z": 0}  # these cameras start upright, and y is down
    assert camera.eye.y < 0


# Cameras


def test_frustum_of_one_camera_closed_form():
    lines = figures.frustum_lines(np.eye(4)[None], K, (24, 32), depth=0.5)
    x, y = 0.5 * 16 / 100, 0.5 * 12 / 90
    corners = np.array([[-x, -y, 0.5], [x, -y, 0.5], [x, y, 0.5], [-x, y, 0.5]])
    found = {tuple(point) for point in np.round(lines[np.isfinite(lines[:, 0])], 9).tolist()}
    assert found == {(0, 0, 0), *map(tuple, np.round(corners, 9).tolist())}
    edges = {frozenset(map(tuple, np.round(pair, 9).tolist())) for pair in zip(lines, lines[1:])
             if np.isfinite(pair).all()}  # fmt: skip
    assert len(edges) == 8  # four from the apex, four around the picture


@given(st.tuples(*[st.floats(-3, 3)] * 3), st.tuples(*[st.floats(-5, 5)] * 3))
def test_frustums_follow_their_poses(axis_angle, place):
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation(np.array(axis_angle)), place
    still = figures.frustum_lines(np.eye(4)[None], K, (24, 32))
    both = figures.frustum_lines(np.stack([np.eye(4), pose]), K, (24, 32))
    assert_allclose(both, np.concatenate([still, geometry.transform(pose, still)]), atol=1e-9)


UPRIGHT = {
    "y down": (np.eye(3), [0, -1, 0]),
    "y up": (np.diag([1.0, -1, -1]), [0, 1, 0]),
    "z up": (np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]), [0, 0, 1]),
    "z down": (np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]), [0, 0, -1]),
    "x up": (np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]), [1, 0, 0]),
}


def looking_around(axes):
    """Cameras that turn about the vertical and nod a little, in a world of these axes."""
    poses = np.tile(np.eye(4), (12, 1, 1))
    for k, pose in enumerate(poses):
        pose[:3, :3] = axes @ rotation(np.array([0, k / 2, 0])) @ rotation(np.array([0.3, 0, 0]))
        pose[:3, 3] = axes @ [np.sin(k), 0, np.cos(k)]
    return poses


@pytest.mark.parametrize("name", UPRIGHT)
def test_up_is_found_in_any_world(name):
    axes, up = UPRIGHT[name]
    assert_array_equal(figures.world_up(looking_around(axes)), up)


@pytest.mark.parametrize("name", UPRIGHT)
def test_still_cloud_shows_from_above_what_is_highest(name):
    axes, up = UPRIGHT[name]
    points = np.array([[0.0, 0, 0], up])[[1, 0, 1]] + [[0, 0, 0], [0, 0, 0], np.array(up) * -2.0]  # heights 1, 0, -1
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    figure = figures.cloud_still(points, colours, looking_around(axes))
    drawn = figure.axes[0].collections[0].get_facecolors()[:, :3]
    assert_array_equal(drawn, np.eye(3)[::-1])  # the highest is drawn last, over the others
    low, high = figure.axes[1].get_ylim()
    assert (high > low) == (sum(up) > 0)  # up is up in the view from the side
    plt.close("all")


# Every plot


def test_frames_and_their_depth(world, draw):
    depth = world.depth.copy()
    depth[0, :3] = 0
    figure = draw(figures.frame_grid(world.image[:3], depth[:3], "abc"))
    assert [axis.get_title() for axis in figure.axes[:3]] == ["a", "b", "c"]
    shown = figure.axes[3].images[0].get_array()
    assert np.ma.getmaskarray(np.ma.masked_invalid(shown))[:3].all() and shown[3:].min() > 0


def test_maps_share_one_scale(world, draw):
    depth = world.depth[:2].copy()
    depth[0, 0] = np.nan
    figure = draw(figures.maps([list(world.image[:2]), list(depth)], ["image", "depth"], "m"))
    for axis in figure.axes[2:4]:
        assert axis.images[0].get_clim() == pytest.approx((0, np.nanpercentile(depth, 98)))
    draw(figures.maps([list(world.image[:2])], ["image"]))


def test_camera_path_keeps_test_and_training_apart(world, draw):
    is_test = world.sequence == 0
    figure = draw(figures.camera_path(world.poses, is_test, world.points.reshape(-1, 3)))
    training, test = figure.axes[0].lines
    assert len(training.get_xdata()) == 4 and len(test.get_xdata()) == 2
    assert_allclose(test.get_xydata(), world.poses[is_test][:, [0, 2], 3])  # seen along y
    draw(figures.camera_path(world.poses, is_test))


def test_pair_graphs_draw_every_edge(world, draw):
    edges = overlap.Edges(np.array([[0, 1], [2, 5]]), np.array([0.4, 0.6]), np.array([3.0, 12.0]))
    figure = draw(figures.pair_graphs({"room": (world.poses, edges)}, loop=3, bounds=(0.2, 0.9, 2)))
    near, far, centres = figure.axes[0].lines
    assert np.isnan(near.get_xdata()).sum() == np.isnan(far.get_xdata()).sum() == 1 and len(centres.get_xdata()) == 6
    assert_allclose(far.get_xydata()[:2], world.poses[[2, 5]][:, [0, 2], 3])
    assert figure.axes[1].lines[1].get_xydata().tolist() == [[60, 12]]


def test_by_image_shows_every_image(world, draw):
    values = np.arange(6.0)
    figure = draw(figures.by_image(values, 10 * np.arange(6), world.sequence == 0, "error"))
    training, test = figure.axes[0].lines
    shown = np.concatenate([training.get_xydata(), test.get_xydata()])
    assert sorted(map(tuple, shown)) == [(10.0 * k, float(k)) for k in range(6)]


def test_histogram_counts_all(draw):
    figure = draw(figures.histogram(np.arange(200) / 10, "error"))
    assert sum(patch.get_height() for patch in figure.axes[0].patches) == 200


def test_training_curves(draw):
    history = [{"step": step, "train_loss": -1.0, "validation_mse": mse} for step, mse in ((5, 0.5), (9, 2.0))]
    arms = ("cnn-scratch", "mobilenet-frozen", "vit64-unfrozen", "anchornet-scratch", "original-cnn")
    figure = draw(figures.training_curves({arm: history for arm in arms}, baseline=1.5))
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == [*arms, "mean point"]
    assert_array_equal(lines[0].get_xydata(), [[5, 0.5], [9, 2]])
    assert len({(line.get_color(), line.get_linestyle()) for line in lines[:5]}) == 5


def test_pretraining_curves(draw):
    log = [{"seconds": 60 * k, "depth": 0.2 / k, "points": 0.4 / k, "rotation": 30 / k} for k in (1, 2)]
    errors, angles = draw(figures.pretraining_curves(log)).axes
    assert_allclose(errors.lines[1].get_xydata(), [[1, 40], [2, 20]])
    assert_allclose(angles.lines[0].get_xydata(), [[1, 30], [2, 15]])


def test_matches_join_the_middles_of_patches(draw):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    figure = draw(figures.matches(*images, [0, 3], [3, 2], 16))  # two patches a row
    assert_allclose(figure.axes[0].lines[0].get_xydata(), [[8, 8], [32 + 24, 24]])
    assert_allclose(figure.axes[0].lines[1].get_xydata(), [[24, 24], [32 + 8, 24]])


def row(arm, mse, unpretrained=False, scene="kitchen"):
    label = arm + " (random weights)" * unpretrained
    return {"arm": arm, "mse": mse, "label": label, "unpretrained": unpretrained, "scene": scene, "megabytes": 5.0,
            "depth_median": 0.03, "weights": "random", "latency_ms": 20.0}  # fmt: skip


@pytest.mark.parametrize("bounds", [{}, {"baseline": 2.0}, {"baseline": 2.0, "paper": 0.0011}])
def test_results_are_sorted_and_missing_pretraining_is_crossed(draw, bounds):
    rows = [row("vit16-frozen", 0.5, True), row("cnn-scratch", 0.1), row("mobilenet-scratch", 0.3)]
    axis = draw(figures.results(rows, **bounds)).axes[0]
    students, lines = axis.lines[:3], axis.lines[3:]
    assert [line.get_xdata()[0] for line in students] == [0.1, 0.3, 0.5]
    assert [line.get_marker() for line in students] == ["o", "o", "X"]
    assert [line.get_fillstyle() for line in students] == ["left", "left", "none"]
    assert [text.get_text() for text in axis.get_yticklabels()][-1] == "vit16-frozen (random weights)"
    assert [line.get_xdata()[0] for line in lines] == list(bounds.values())


def test_cost_against_error(draw):
    rows = [row("vit16-frozen", 0.5), row("cnn-scratch", 0.1), row("original-cnn", 0.1)]
    rows.append({**row("vit16-scratch", 0.4), "latency_ms": 15.0})  # the same network, timed on a quieter machine
    size, latency = draw(figures.cost_against_error(rows)).axes
    assert [line.get_xydata().tolist() for line in size.lines] == [[[5, 3]]] * 4
    assert [line.get_xdata()[0] for line in latency.lines] == [15, 20, 20, 15]
    for axis in (size, latency):
        colours = [to_rgb(line.get_color()) for line in axis.lines[:3]]
        assert colours == [to_rgb(figures.BACKBONE_COLOURS[name]) for name in ("vit16", "cnn", "original")]
    named = {text.get_text() for text in latency.get_legend().get_texts()}
    assert named == {"vit16", "cnn", "original", "frozen", "scratch"}


def test_every_arm_has_a_colour_and_a_line(draw):
    history = [{"step": 1, "train_loss": 1.0, "validation_mse": 0.5}]
    arms = reporting.without_ablations([{"arm": arm} for arm in ARMS])
    curves = draw(figures.training_curves({row["arm"]: history for row in arms}, baseline=1.5))
    assert len(curves.axes[0].lines) == len(arms) + 1
    draw(figures.cost_against_error([row(arm, 0.5) for arm in ARMS]))


def test_ablations_have_a_panel_each(draw):
    groups = {"loss": {"mse": {"frozen": 0.2}, "l1": {"frozen": 0.1}}, "start": {"cnn": {"scratch": 0.3, "none": 0.4}}}
    figure = draw(figures.ablations(groups))
    assert [axis.get_title("left") for axis in figure.axes] == ["loss", "start"]
    assert [[line.get_xdata()[0] for line in axis.lines] for axis in figure.axes] == [[0.2, 0.1], [0.3, 0.4]]
    assert [line.get_fillstyle() for line in figure.axes[0].lines] == ["none", "none"]
    assert [line.get_marker() for line in figure.axes[1].lines] == ["o", "x"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.200", "0.100"] and not figure.axes[1].texts
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["frozen", "scratch", "none"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["mse", "l1"]


def test_open_questions_have_a_panel_each(draw):
    pruned = {"cnn-scratch": {0.0: 0.02, 0.5: 0.3}, "vit16-frozen": {0.0: 0.01, 0.5: 0.4}}
    apart = {"its own": np.linspace(4, 6, 9), **{f"room {k}": np.linspace(20, 40 + k, 9) for k in range(4)}}
    left, right = draw(figures.open_questions(pruned, apart, 7.5)).axes
    assert [line.get_xdata().tolist() for line in left.lines] == [[0, 50]] * 2
    assert [text.get_text() for text in right.get_legend().get_texts()] == [*apart, "limit"]
    assert [line.get_xdata()[-1] for line in right.lines] == [6, 40, 41, 42, 43, 7.5]
    assert len({line.get_color() for line in right.lines}) == 6


def test_still_cloud_and_two_clouds(world, draw):
    points, colours = world.points.reshape(-1, 3), world.image.reshape(-1, 3)
    figure = draw(figures.cloud_still(points, colours, world.poses, "room", most=100))
    assert len(figure.axes[0].collections[0].get_offsets()) == 100
    draw(figures.two_clouds([points, points + 1], [points, points], world.poses[:2], ["before", "after"]))


def test_panels(world, draw):
    figure = draw(figures.panels([world.image[0], world.depth[0]], ["image", "depth"]))
    assert len(figure.axes) == 3  # the picture in colour has no colour bar


# Files


def test_page_stays_small(tmp_path):
    figures.save_interactive(figures.cloud(*coloured(20_000)), tmp_path / "cloud.html")
    text = (tmp_path / "cloud.html").read_text()
    assert len(text) < 600_000 and "<html>" in text and "https://cdn.plot.ly" in text


def test_ply_round_trip(tmp_path):
    open3d = pytest.importorskip("open3d")
    points, colours = coloured(500)
    path = figures.write_ply(points, colours, tmp_path / "cloud.ply")
    read = open3d.io.read_point_cloud(str(path))
    assert_allclose(np.asarray(read.points), points)
    assert_array_equal(np.round(np.asarray(read.colors) * 255), colours)


def test_ply_that_cannot_be_written_is_an_error(tmp_path):
    pytest.importorskip("open3d")
    with pytest.raises(OSError, match="cloud.ply.*folder exists"):
        figures.write_ply(*coloured(5), tmp_path / "no-such-folder" / "cloud.ply")
