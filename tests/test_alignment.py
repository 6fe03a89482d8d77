"""Pair predictions of worlds with a known answer, brought back into one metric world."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from alignment_problems import Scene, errors, problem
from conftest import box_world, rotation, smooth_poses
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from kdutils import alignment, geometry, labelling, pairs, registration, scenes, teachers
from kdutils.alignment import fusion, pose_graph

REDKITCHEN = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "redkitchen"
CONTRADICTION = "its depths contradict the other pairs'"


class Said(NamedTuple):
    """What a perfect teacher says of a world, and the metres per unit that alignment has to find."""

    arrays: tuple  # pairs, pts_i, pts_j, conf_i, conf_j
    scales: np.ndarray


def say(world, graph=None, seed=0, noise=0.0, confidence=3.0):
    """Predictions for a world: exact, or off by ``noise`` times the distance, in every direction."""
    graph = pairs.sequence_pairs(world.sequence, "swin", 2) if graph is None else np.array(graph)
    rng = np.random.default_rng(seed)
    scales = 2 ** rng.uniform(-2, 2, len(graph))
    into = np.linalg.inv(world.poses)[graph[:, 0]]
    views = []
    for side in (0, 1):
        points = np.einsum("pab,phwb->phwa", into[:, :3, :3], world.points[graph[:, side]])
        points += into[:, None, None, :3, 3]
        distance = np.linalg.norm(points, axis=-1, keepdims=True)
        views.append((points + noise * distance * rng.normal(size=points.shape)) / scales[:, None, None, None])
    sure = np.full(views[0].shape[:3], confidence)
    return Said((graph, *views, sure, sure.copy()), scales)


def align(world, said):
    return alignment.align(*said.arrays, world.intrinsics, world.poses)


def wavy_world(count, size, seed):
    """Cameras on a smooth path, each before a surface of its own: no structure that helps."""
    rng = np.random.default_rng(seed)
    world = box_world(count, size)
    v, u = np.mgrid[: size[0], : size[1]] / max(size)
    a, b, c = rng.uniform(1, 9, (3, count, 1, 1))
    depth = 2.5 + np.sin(a * u + c) * np.cos(b * v) + 0.5 * np.sin(c * u * v)
    poses = smooth_poses(count, rng, step=rng.uniform(0.05, 0.4), turn=rng.uniform(0, 0.2))
    points = alignment.world_points(depth, np.broadcast_to(world.intrinsics, (count, 3, 3)), poses)
    return world._replace(depth=depth, points=points.astype(float), poses=poses)


@pytest.fixture(scope="module")
def world():
    return box_world(6, (16, 20), seed=3)


def test_box_room_comes_back(world):
    said = say(world)
    aligned = align(world, said)
    assert_allclose(aligned.pair_scales, said.scales, rtol=1e-3)
    assert_allclose(aligned.depth, world.depth, rtol=1e-4)
    assert_allclose(aligned.points, world.points, atol=1e-3)
    assert aligned.valid.all() and aligned.rejected_pairs == {}
    assert_allclose(aligned.confidence, 3, rtol=1e-5)
    assert_array_equal(aligned.poses, world.poses)
    assert aligned.report["valid_share"] == 1 and aligned.report["images_without_labels"] == []
    assert aligned.report["residual_median"] < 1e-6


@settings(max_examples=15)
@given(st.integers(3, 6), st.integers(0, 2**32 - 1), st.sampled_from(["swin", "logwin", "oneref", "complete"]))
def test_any_smooth_world_comes_back(count, seed, graph):
    world = wavy_world(count, (8, 10), seed)
    said = say(world, pairs.sequence_pairs(world.sequence, graph, 2), seed)
    aligned = align(world, said)
    assert_allclose(aligned.pair_scales, said.scales, rtol=1e-3)
    assert_allclose(aligned.depth, world.depth, rtol=1e-3)


def test_intrinsics_may_differ_by_image():
    world = box_world(4, (16, 20))
    intrinsics = np.stack([world.intrinsics * [[1 + k / 10], [1 + k / 10], [1]] for k in range(4)])
    intrinsics[:, :2, 2] = world.intrinsics[:2, 2]
    points = alignment.world_points(world.depth, intrinsics, world.poses).astype(float)
    said = say(world._replace(points=points))
    aligned = alignment.align(*said.arrays, intrinsics, world.poses)
    assert_allclose(aligned.pair_scales, said.scales, rtol=1e-3)
    assert_allclose(aligned.points, points, atol=1e-3)


def test_holes_are_no_labels_and_disturb_nothing(world):
    said = say(world)
    _, pts_i, pts_j, conf_i, conf_j = said.arrays
    for images, points, confidence in ((said.arrays[0][:, 0], pts_i, conf_i), (said.arrays[0][:, 1], pts_j, conf_j)):
        points[images == 2, :6] = 17
        confidence[images == 2, :6] = 1
    aligned = align(world, said)
    expected = np.ones(world.depth.shape, bool)
    expected[2, :6] = False
    assert_array_equal(aligned.valid, expected)
    assert_allclose(aligned.depth[expected], world.depth[expected], rtol=1e-4)
    assert aligned.report["valid_share"] == pytest.approx(expected.mean())


def test_confidence_is_the_mean_of_those_that_agree(world):
    said = say(world, [[0, 1], [0, 2], [1, 0], [2, 0]])
    said.arrays[3][0], said.arrays[3][1] = np.e**3, np.e  # log-confidences 3 and 1, and log 3 twice as view 2
    said.arrays[1][1][:8, :3] *= 3  # of which the second is far off in a corner
    aligned = align(world, said)
    agreeing = np.full(world.depth.shape[1:], np.exp((3 + 1 + 2 * np.log(3)) / 4))
    agreeing[:8, :3] = np.exp((3 + 0 + 2 * np.log(3)) / 4)
    assert_allclose(aligned.confidence[0], agreeing, rtol=1e-5)
    assert_allclose(aligned.depth[0], world.depth[0], rtol=1e-4)


def test_confident_predictions_weigh_more():
    depths = np.stack([np.full((4, 5), 2.0), np.full((4, 5), 2.01)]).astype(np.float32)
    weights = np.stack([np.full((4, 5), 3.0), np.full((4, 5), 1.0)]).astype(np.float32)
    mean, agreeing = fusion.robust_mean(depths, weights, noise=0.01)
    assert_allclose(mean, (3 * 2 + 2.01) / 4, rtol=1e-5)
    assert agreeing.all()


def test_pixels_on_which_two_predictions_contradict_each_other_are_no_labels(world):
    said = say(world, [[0, 1], [0, 2], [1, 2], [2, 1]])
    said.arrays[1][1][:8, :4] *= 1.5
    aligned = align(world, said)
    assert not aligned.valid[0, :8, :4].any()
    assert aligned.valid[0, 8:].all() and aligned.valid[1:3].all()


def test_images_out_of_reach_are_named(world):
    aligned = align(world, say(world, [[0, 1], [1, 0], [1, 2], [2, 1]]))
    assert aligned.report["images_without_labels"] == [3, 4, 5]
    assert not aligned.valid[3:].any() and aligned.valid[:3].all()


@pytest.mark.parametrize("odd", [3, 5, 8, 10])  # all of image 2's pairs: none of them is the measure of the others
def test_pair_that_contradicts_its_siblings_is_rejected(world, odd):
    said = say(world)
    assert (said.arrays[0][[3, 5, 8, 10], 0] == 2).all()
    said.arrays[1][odd] *= np.linspace(1, 4, world.depth.shape[2])[:, None]  # still on the rays
    aligned = align(world, said)
    assert aligned.rejected_pairs == {odd: CONTRADICTION}
    assert aligned.report["rejected_pairs"] == {str(odd): CONTRADICTION}
    assert np.isnan(aligned.pair_scales[odd]) and np.isfinite(np.delete(aligned.pair_scales, odd)).all()
    assert_allclose(aligned.depth, world.depth, rtol=1e-4)


@pytest.mark.parametrize("side", [1, 2])
def test_pair_whose_points_leave_the_rays_is_rejected(world, side):
    said = say(world)
    said.arrays[side][4] = said.arrays[side][4] @ rotation(np.array([0.3, 0.5, -0.2])).T
    aligned = align(world, said)
    assert aligned.rejected_pairs == {4: f"the points of its view {side} do not lie on that camera's rays"}
    assert_allclose(aligned.depth, world.depth, rtol=1e-4)


def test_pair_without_a_confident_pixel_is_rejected(world):
    said = say(world)
    said.arrays[3][4] = 1
    aligned = align(world, said)
    assert aligned.rejected_pairs == {4: "no confident pixel in view 1"}
    assert_allclose(aligned.depth, world.depth, rtol=1e-4)


@settings(max_examples=8)
@given(st.randoms(use_true_random=False))
def test_order_of_the_pairs_does_not_matter(random):
    world = box_world(5, (8, 10), seed=1)
    said = say(world, noise=0.01)
    order = list(range(len(said.scales)))
    random.shuffle(order)
    aligned, shuffled = align(world, said), align(world, Said(tuple(a[order] for a in said.arrays), said.scales[order]))
    # Sums in another order, and rounds that stop at a small step: nothing else.
    assert_allclose(shuffled.pair_scales, aligned.pair_scales[order], rtol=1e-3)
    assert_allclose(shuffled.depth, aligned.depth, rtol=2e-3)


@settings(max_examples=8)
@given(st.tuples(*[st.floats(-3, 3)] * 3), st.tuples(*[st.floats(-9, 9)] * 3), st.floats(0.3, 4))
def test_turning_moving_and_growing_the_world_does_the_same_to_the_points(axis_angle, place, scale):
    world = box_world(4, (8, 10), seed=2)
    said = say(world)
    turn = rotation(np.array(axis_angle))
    poses = world.poses.copy()
    poses[:, :3, :3] = turn @ poses[:, :3, :3]
    poses[:, :3, 3] = scale * world.poses[:, :3, 3] @ turn.T + place
    moved = alignment.align(*said.arrays, world.intrinsics, poses)
    assert_allclose(moved.points, scale * world.points @ turn.T + place, atol=2e-3 * scale)


@pytest.mark.parametrize("step", [0.03, 0.1, 0.3])
def test_two_percent_of_noise_leaves_the_scales_right(step):
    world = box_world(8, (24, 32), step=step)
    said = say(world, pairs.sequence_pairs(world.sequence, "logwin", 3), noise=0.02)
    aligned = align(world, said)
    assert_allclose(np.median(aligned.pair_scales / said.scales), 1, atol=0.01)
    error = np.abs(aligned.depth / world.depth - 1)
    assert np.median(error) < 0.01  # less than each prediction's 0.013, because several are fused
    assert aligned.report["residual_median"] < 0.05


def test_more_noise_is_a_larger_error(world):
    errors = []
    for noise in (0, 0.01, 0.02, 0.05):
        aligned = align(world, say(world, noise=noise))
        errors.append(np.median(np.abs(aligned.depth / world.depth - 1)))
    assert errors == sorted(errors) and errors[-1] < 0.05


def test_pose_that_is_not_finite_is_an_error(world):
    poses = world.poses.copy()
    poses[1, 0, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        alignment.align(*say(world).arrays, world.intrinsics, poses)


def test_no_pairs_is_an_error(world):
    with pytest.raises(ValueError, match="no pairs"):
        align(world, say(world, np.zeros((0, 2), int)))


@pytest.mark.parametrize("noise", [0, 0.02])
def test_camera_that_stands_still_has_no_scale(noise):
    world = box_world(4, (8, 10), step=0)
    aligned = align(world, say(world, noise=noise))
    assert not aligned.valid.any() and np.isnan(aligned.pair_scales).all()
    assert aligned.report["images_without_labels"] == [0, 1, 2, 3]
    assert all("too little camera motion" in reason for reason in aligned.rejected_pairs.values())
    assert len(aligned.rejected_pairs) == len(aligned.pair_scales)


def test_still_stretch_takes_its_scale_from_the_moving_one():
    world = box_world(5, (8, 10))
    poses = world.poses.copy()
    poses[3, :3, 3] = poses[2, :3, 3]
    points = alignment.world_points(world.depth, np.broadcast_to(world.intrinsics, (5, 3, 3)), poses)
    world = world._replace(poses=poses, points=points.astype(float))
    said = say(world)
    aligned = align(world, said)
    assert_allclose(aligned.pair_scales, said.scales, rtol=1e-3)
    assert_allclose(aligned.depth, world.depth, rtol=1e-3)


def test_shards_give_what_arrays_give(world, tmp_path):
    frames = scenes.Frames(world.image, world.depth, world.poses, world.intrinsics, np.arange(6), world.sequence, {})
    teacher, graph = teachers.DepthTeacher(frames), pairs.sequence_pairs(world.sequence, "swin", 2)
    shards = labelling.label_pairs(teacher, graph, frames.size, tmp_path, "same", pairs_per_shard=4)
    parts = list(shards)
    arrays = (np.concatenate(column) for column in zip(*parts))
    whole = alignment.align(*arrays, world.intrinsics, world.poses)
    streamed = alignment.align_shards(shards, world.intrinsics, world.poses, progress=iter)
    assert_array_equal(streamed.depth, whole.depth)
    assert_array_equal(streamed.confidence, whole.confidence)
    assert_array_equal(streamed.pair_scales, whole.pair_scales)
    assert_allclose(streamed.depth, world.depth, rtol=2e-3)


@pytest.mark.skipif(not REDKITCHEN.is_dir(), reason="the real scene is not at hand")
def test_real_scene_comes_back_from_the_depth_teacher(tmp_path):
    scene = scenes.Scene.open(REDKITCHEN)
    frames = scenes.prepare(scene, tmp_path / "frames", (96, 128), most_train=40, most_test=10)
    graph = pairs.sequence_pairs(frames.sequence, "logwin", 3)
    shards = labelling.label_pairs(teachers.DepthTeacher(frames), graph, frames.size, tmp_path / "labels", "same")
    aligned = alignment.align_shards(shards, frames.intrinsics, frames.poses)
    error = np.abs(aligned.depth - frames.depth)[aligned.valid]
    assert np.median(error) < 0.01 and np.percentile(error, 99) < 0.05
    assert aligned.report["images_without_labels"] == []
    assert_array_equal(aligned.valid, np.asarray(frames.depth) > 0)
    assert_allclose(aligned.pair_scales * teachers.pair_scale(shards.pairs), 1, rtol=0.01)


# Unknown poses, and teachers of several faults. One scene, 12 images that look around in the box room.


@pytest.fixture(scope="module")
def scene():
    world = box_world(12, (36, 48), seed=5, step=0.15)
    return Scene(world.depth, world.poses, world.intrinsics)


RING = pairs.window_pairs(12, 3)
EITHER = pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])


def solve(scene, trial, known, **options):
    return alignment.align(*trial.arrays, *((scene.intrinsics, scene.poses) if known else ()), **options)


@EITHER
def test_noise_averages_out(scene, known):
    trial = problem(scene, RING, noise=0.03)
    rmse, median, cover = errors(solve(scene, trial, known), scene, fitted=not known)
    assert rmse < 3.2 and median < 2.2 and cover == 1  # one prediction alone: 3 % of 2.6 m, 8 cm


@EITHER
@pytest.mark.parametrize("rotate", ["both", "j"])
def test_wrong_pairs_are_rejected_and_no_others(scene, known, rotate):
    trial = problem(scene, RING, wrong=0.2, rotate=rotate, seed=2)
    aligned = solve(scene, trial, known)
    assert sorted(aligned.rejected_pairs) == trial.wrong.tolist() and len(trial.wrong)
    assert errors(aligned, scene, fitted=not known)[0] < 4


@EITHER
def test_confident_outliers_do_little_harm(scene, known):
    trial = problem(scene, RING, outliers=0.3, seed=3)
    aligned = solve(scene, trial, known)
    rmse, median, cover = errors(aligned, scene, fitted=not known)
    assert aligned.rejected_pairs == {}
    assert median < 2.6 and rmse < 9 and cover > 0.97


@EITHER
def test_noise_off_the_rays_does_not_shrink_the_scales(scene, known):
    trial = problem(scene, RING, noise=0, isotropic=0.03, seed=4)
    aligned = solve(scene, trial, known)
    assert errors(aligned, scene, fitted=not known)[1] < 2.2
    ratio = aligned.pair_scales / trial.scales
    assert_allclose(ratio / (1 if known else np.median(ratio)), 1, rtol=0.02)
    assert_allclose(aligned.intrinsics[:, 0, 0], scene.intrinsics[0, 0], rtol=0.01)


def test_exact_predictions_give_exact_poses_and_focals(scene):
    trial = problem(scene, RING, noise=0)
    aligned = solve(scene, trial, known=False)
    move = registration.similarity(aligned.poses[:, :3, 3], scene.poses[:, :3, 3])
    poses = registration.move_poses(move, aligned.poses)
    assert_allclose(poses, scene.poses, atol=1e-3)
    assert_allclose(aligned.intrinsics, np.broadcast_to(scene.intrinsics, (12, 3, 3)), rtol=1e-3)
    assert_allclose(aligned.pair_scales * np.cbrt(np.linalg.det(move)), trial.scales, rtol=1e-3)


def test_own_world_is_upright_and_of_unit_scale(scene):
    aligned = solve(scene, problem(scene, RING), known=False)
    assert "own" in aligned.report["world"]
    assert_allclose(np.log(aligned.pair_scales).mean(), 0, atol=1e-6)
    assert_allclose(aligned.poses[0, :3, 3], 0, atol=1e-9)
    assert aligned.poses[:, 1, 1].mean() > 0.9  # the cameras' y axes point down


def test_upright_finds_gravity_from_level_cameras_that_look_down():
    rng = np.random.default_rng(0)
    tilted = rotation(np.array([0.4, -0.3, 0.2]))
    poses = np.tile(np.eye(4), (9, 1, 1))
    for pose, yaw in zip(poses, rng.uniform(-3, 3, 9)):
        pose[:3, :3] = tilted @ rotation(np.array([0, yaw, 0])) @ rotation(np.array([-0.5, 0, 0]))
    moved = pose_graph.upright(poses) @ poses
    assert_allclose(moved[:, 1, 0], 0, atol=5e-3)  # x axes are level
    assert (moved[:, 1, 1] > 0.8).all()
    assert_allclose(moved[0, 0, 2], 0, atol=1e-6)  # the first camera looks along z


def test_long_loop_is_closed():
    world = box_world(1, (18, 24))
    count = 60
    angle = 2 * np.pi * np.arange(count) / count
    poses = np.tile(np.eye(4), (count, 1, 1))
    for pose, a in zip(poses, angle):
        pose[:3, :3], pose[:3, 3] = rotation(np.array([0, a, 0])), (np.sin(a), 0, np.cos(a))
    rays = geometry.pixel_rays(world.intrinsics, 18, 24) @ np.swapaxes(poses[:, None, :3, :3], 2, 3)
    walls = np.where(rays > 0, [2.5, 1.0, 3.0], [-2.0, -1.5, -3.0])
    circle = Scene(((walls - poses[:, None, None, :3, 3]) / rays).min(-1), poses, world.intrinsics)
    trial = problem(circle, pairs.window_pairs(count, 2, cyclic=True), noise=0.03, isotropic=0.02)
    aligned = solve(circle, trial, known=False)
    assert errors(aligned, circle, fitted=True)[1] < 5
    assert aligned.report["drift"]["tree_degrees_max"] > 0.5


PIECES = RING[(RING < 5).all(1) | (RING >= 5).all(1)]


def test_pieces_without_known_poses_are_named_and_the_largest_is_the_result(scene):
    aligned = solve(scene, problem(scene, PIECES), known=False)
    assert aligned.report["pieces"] == [list(range(5, 12)), list(range(5))]
    assert aligned.report["images_without_labels"] == list(range(5))
    assert "piece" in aligned.report["rejected_images"]["0"]
    assert np.isnan(aligned.poses[:5]).all() and np.isfinite(aligned.poses[5:]).all()
    assert not aligned.valid[:5].any() and aligned.valid[5:].all()
    assert errors(aligned, scene, fitted=True)[1] < 3


def test_pieces_meet_in_the_world_of_a_few_known_poses(scene):
    some = [0, 3, 4, 6, 9, 11]
    world_poses = np.full((12, 4, 4), np.nan)
    world_poses[some] = scene.poses[some]
    aligned = solve(scene, problem(scene, PIECES), known=False, world_poses=world_poses)
    rmse, median, cover = errors(aligned, scene, fitted=False)
    assert median < 3.5 and cover == 1
    assert_allclose(aligned.poses[:, :3, 3], scene.poses[:, :3, 3], atol=0.01)
    assert aligned.report["world_error"]["images"] == 6 and aligned.report["world_error"]["position_max"] < 0.01


@EITHER
def test_images_that_nothing_connects_are_named(scene, known):
    graph = RING[(RING != 11).all(1)]
    trial = problem(scene, graph)
    aligned = solve(scene, trial, known, **({} if known else {"world_poses": np.full((12, 4, 4), np.nan)}))
    assert aligned.report["images_without_labels"] == [11]
    assert "no pair" in aligned.report["rejected_images"]["11"]
    assert not aligned.valid[11].any() and np.isnan(aligned.poses[11]).all() != known


@EITHER
@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_or_not_confident_does_not_hurt(scene, known):
    trial = problem(scene, RING, seed=6)
    clean = errors(solve(scene, trial, known), scene, fitted=not known)[0]
    rng = np.random.default_rng(0)
    for points in trial.arrays[1:3]:
        for bad in (np.nan, np.inf, -np.inf, 0, 1e30):
            points[rng.random(points.shape[:3]) < 0.02] = bad
    for confidence in trial.arrays[3:]:
        for bad in (np.nan, np.inf, 0, -3, 1):
            confidence[rng.random(confidence.shape) < 0.02] = bad
    aligned = solve(scene, trial, known)
    rmse, _, cover = errors(aligned, scene, fitted=not known)
    assert rmse < 1.3 * clean and cover > 0.99 and aligned.rejected_pairs == {}


@EITHER
def test_same_input_gives_the_same_bits(scene, known):
    trial = problem(scene, RING, outliers=0.1, wrong=0.1)
    one, two = solve(scene, trial, known), solve(scene, trial, known)
    for name in ("points", "depth", "confidence", "valid", "poses", "intrinsics", "pair_scales", "pair_residuals"):
        assert_array_equal(getattr(one, name), getattr(two, name))
    assert json.dumps(one.report) == json.dumps(two.report) and one.rejected_pairs == two.rejected_pairs


def test_many_predictions_of_an_image_are_reduced_in_turns(scene, monkeypatch):
    trial = problem(scene, pairs.complete_pairs(12), outliers=0.1)
    whole = errors(solve(scene, trial, True), scene, fitted=False)
    monkeypatch.setattr(fusion, "MOST_WAITING", 6)  # of 22
    turns = errors(solve(scene, trial, True), scene, fitted=False)
    assert turns[1] < 1.2 * whole[1] and turns[2] > 0.99


def test_memory_maps_give_what_arrays_give(scene, tmp_path):
    trial = problem(scene, RING)
    for k, array in enumerate(trial.arrays):
        np.save(tmp_path / f"{k}.npy", array)
    mapped = trial._replace(arrays=tuple(np.load(tmp_path / f"{k}.npy", mmap_mode="r") for k in range(5)))
    assert_array_equal(solve(scene, mapped, True).depth, solve(scene, trial, True).depth)


@pytest.mark.parametrize("change, message", [
    (lambda a: a.update(pairs=a["pairs"][:, 0]), r"pairs must be integers \(P, 2\)"),
    (lambda a: a.update(pairs=a["pairs"] * 1.0), "pairs must be integers"),
    (lambda a: a.update(pairs=a["pairs"][:-1]), "points of view i must be"),
    (lambda a: a.update(pairs=np.full_like(a["pairs"], 3)), "one image twice"),
    (lambda a: a.update(pairs=a["pairs"] + 5), "names image 16, but there are 12"),
    (lambda a: a.update(pts_j=a["pts_j"][:, :-1]), "points_j must be"),
    (lambda a: a.update(conf_i=a["conf_i"][..., None]), "confidence_i must be"),
    (lambda a: a.update(intrinsics=np.eye(4)), "intrinsics must be"),
    (lambda a: a.update(intrinsics=np.tile(np.eye(3), (5, 1, 1))), "different numbers of images"),
    (lambda a: a.update(poses=a["poses"][:, :3]), r"poses must be \(N, 4, 4\)"),
    (lambda a: a.update(world_poses=a["poses"]), "not both"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_errors(scene, change, message):
    names = ("pairs", "pts_i", "pts_j", "conf_i", "conf_j")
    arguments = dict(zip(names, problem(scene, RING).arrays), intrinsics=scene.intrinsics, poses=scene.poses)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        alignment.align(**arguments)


def test_shards_that_can_be_read_only_once_are_an_error(scene):
    shard = teachers.PairPointmaps(*problem(scene, RING).arrays)
    with pytest.raises(ValueError, match="read twice"):
        alignment.align_shards(iter([shard]), scene.intrinsics, scene.poses)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    if not REDKITCHEN.is_dir():
        pytest.skip("the real scene is not at hand")
    frames = scenes.prepare(
        scenes.Scene.open(REDKITCHEN), tmp_path_factory.mktemp("kitchen"), (96, 128), most_train=20, most_test=1
    )
    keep = np.flatnonzero(~frames.is_test)
    return Scene(np.array(frames.depth[keep]), np.array(frames.poses[keep]), np.array(frames.intrinsics))


@EITHER
@pytest.mark.parametrize("faults", [{}, {"wrong": 0.2}, {"outliers": 0.3}, {"noise": 0.1}], ids=str)
def test_real_rooms_are_as_good_as_the_mean_with_true_scales(kitchen, known, faults):
    trial = problem(kitchen, pairs.window_pairs(20, 3), seed=1, **faults)
    aligned = solve(kitchen, trial, known)
    rmse, median, cover = errors(aligned, kitchen, fitted=not known)
    i, j = trial.arrays[0].T
    relative = geometry.invert(kitchen.poses[j]) @ kitchen.poses[i]
    relative[:, :3, :3] *= trial.scales[:, None, None]
    total, count = np.zeros(kitchen.depth.shape), np.zeros(20)
    clean = problem(kitchen, pairs.window_pairs(20, 3), seed=1, noise=faults.get("noise", 0.03)).arrays
    for p in range(len(i)):
        total[i[p]] += trial.scales[p] * clean[1][p, ..., 2]
        total[j[p]] += geometry.transform(relative[p], clean[2][p])[..., 2]
        count[[i[p], j[p]]] += 1
    mean = total / count[:, None, None]
    plain = alignment.world_points(mean, aligned.intrinsics, kitchen.poses)[kitchen.depth > 0]
    apart = 100 * np.linalg.norm(plain - kitchen.points[kitchen.depth > 0], axis=1)
    slack = 1.25 if faults.keys() & {"wrong", "outliers"} else 1.05
    assert median < slack * np.median(apart) and cover > 0.99
    assert rmse < (1.6 if "outliers" in faults else slack) * np.sqrt((apart**2).mean())
    assert sorted(aligned.rejected_pairs) == trial.wrong.tolist()


@EITHER
def test_nothing_said_at_all_is_no_label_and_no_error(scene, known):
    trial = problem(scene, RING[:8])
    for confidence in trial.arrays[3:]:
        confidence[:] = 1
    aligned = solve(scene, trial, known)
    assert not aligned.valid.any() and len(aligned.rejected_pairs) == 8
    assert len(aligned.report["images_without_labels"]) == len(aligned.valid)
    json.dumps(aligned.report)


@EITHER
def test_one_pair_is_enough(scene, known):
    aligned = solve(scene, problem(scene, [[0, 2]], noise=0), known)
    assert aligned.valid[[0, 2]].all() and aligned.rejected_pairs == {}
    part = Scene(scene.depth[:3], scene.poses[:3], scene.intrinsics)
    assert errors(aligned, scene if known else part, fitted=not known)[0] < 1


def test_report_says_how_sure_the_scales_are(scene):
    quiet, loud = (solve(scene, problem(scene, RING, noise=n, along="frame"), True).report for n in (0.01, 0.1))
    assert 0 < quiet["drift"]["scale_median"] < loud["drift"]["scale_median"] < 0.1
    assert quiet["depth_noise"] == pytest.approx(0.01, rel=0.4) and loud["depth_noise"] == pytest.approx(0.1, rel=0.4)
    assert sum(quiet["residual_histogram"]["pairs"]) == quiet["pairs_used"] == len(RING)
    assert quiet["residual_median"] < 0.012
