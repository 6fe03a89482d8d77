"""Camera poses from world points: exact, noisy, with outliers, and where there is no answer."""

import warnings

import numpy as np
import pytest
from conftest import box_world, rotation
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from kdutils import localisation

pytest.importorskip("poselib")
SIZE = (48, 64)


@pytest.fixture(scope="module")
def world():
    return box_world(5, SIZE, step=0.3)


def apart(pose, truth):
    """Metres and degrees between two poses."""
    turn = pose[:3, :3].T @ truth[:3, :3]
    sine = np.linalg.norm([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2
    return np.linalg.norm(pose[:3, 3] - truth[:3, 3]), np.degrees(np.arctan2(sine, (np.trace(turn) - 1) / 2))


def spoiled(points, share, noise=0.0, seed=0):
    """Points with noise in metres, of which a share lies anywhere in the room; and where those are."""
    rng = np.random.default_rng(seed)
    outliers = rng.random(points.shape[:-1]) < share
    noisy = points + rng.normal(scale=noise, size=points.shape)
    return np.where(outliers[..., None], rng.uniform([-2, -1.5, -3], [2.5, 1, 3], points.shape), noisy), outliers


# Poses


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_exact_points_give_the_pose(world, dtype):
    for points, truth in zip(world.points, world.poses):
        metres, degrees = apart(localisation.locate(points.astype(dtype), world.intrinsics), truth)
        assert metres < 1e-3 and degrees < 0.05


def test_poses_are_rigid(world):
    pose = localisation.locate(spoiled(world.points[1], 0.3, 0.02)[0], world.intrinsics)
    assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
    assert_array_equal(pose[3], [0, 0, 0, 1])


@pytest.mark.parametrize("seed", range(4))
def test_noise_and_outliers_are_borne(world, seed):
    for points, truth in zip(world.points, world.poses):
        points, outliers = spoiled(points, 0.4, 0.02, seed)
        assert 0.35 < outliers.mean() < 0.45
        metres, degrees = apart(localisation.locate(points, world.intrinsics), truth)
        assert metres < 0.05 and degrees < 5


def test_intrinsics_count(world):
    other = world.intrinsics.copy()
    other[0, 2] += 8
    metres, degrees = apart(localisation.locate(world.points[0], other), world.poses[0])
    assert metres > 0.05 or degrees > 2


def test_mask_leaves_pixels_out(world):
    points, outliers = spoiled(world.points[2], 0.9, seed=1)
    found = localisation.locate(points, world.intrinsics, mask=~outliers)
    metres, degrees = apart(found, world.poses[2])
    assert metres < 1e-3 and degrees < 0.05


@pytest.mark.parametrize(("share", "noise", "bound"), [(0.8, 0.05, 0.4), (0.9, 0.02, 0.1)])
def test_uncertainty_that_knows_the_outliers_helps(world, share, noise, bound):
    errors = {"without": [], "with": []}
    for seed in range(10):
        points, outliers = spoiled(world.points[seed % 5], share, noise, seed)
        log_scale = np.where(outliers, 0, -3) + np.random.default_rng(seed).normal(scale=0.5, size=outliers.shape)
        for name, scale in (("without", None), ("with", log_scale.astype(np.float32))):
            pose = localisation.locate(points, world.intrinsics, log_scale=scale)
            errors[name].append(np.inf if pose is None else apart(pose, world.poses[seed % 5])[0])
    assert np.median(errors["with"]) < 0.5 * np.median(errors["without"])
    assert max(errors["with"]) < bound


def test_the_least_certain_pixels_have_no_vote(world):
    points = world.points[0].copy()
    points[30:] = points[30:] + [0.5, 0, 0]  # a consistent lie, of fewer pixels than the certain ones
    log_scale = np.where(np.arange(48)[:, None] >= 30, 1.0, -2.0) * np.ones(SIZE)
    metres, degrees = apart(localisation.locate(points, world.intrinsics, log_scale=log_scale), world.poses[0])
    assert metres < 1e-3 and degrees < 0.05


def test_the_same_points_give_the_same_pose(world):
    points, outliers = spoiled(world.points[3], 0.6, 0.05)
    for scale in (None, np.where(outliers, 0.0, -2.0)):
        first, again = (localisation.locate(points.copy(), world.intrinsics, log_scale=scale) for _ in range(2))
        assert_array_equal(first, again)


def test_points_are_left_as_they_were(world):
    points, log_scale = world.points[0].copy(), np.zeros(SIZE)
    localisation.locate(points, world.intrinsics, log_scale=log_scale)
    assert_array_equal(points, world.points[0])
    assert not log_scale.any()


# The pose whose rays pass nearest, and the points on them


def test_a_pose_nearby_settles_at_the_true_one(world):
    for points, truth, start in zip(world.points, world.poses, moved(world.poses, 0.1, 5)):
        metres, degrees = apart(localisation.settle(start, points, world.intrinsics), truth)
        assert metres < 1e-4 and degrees < 0.01


def test_settling_makes_the_distance_from_the_rays_least(world):
    points, pose = spoiled(world.points[1], 0, 0.1)[0], world.poses[1]
    settled = localisation.settle(pose, points, world.intrinsics)
    assert apart(settled, pose)[0] > 1e-3

    def cost(pose):
        """Cauchy's, with the scale of the settled pose."""
        squared = [((localisation.on_rays(points[None], one[None], world.intrinsics)[0] - points) ** 2).sum(-1)
                   for one in (settled, pose)]  # fmt: skip
        return np.log1p(squared[1] / np.quantile(squared[0], localisation.TYPICAL)).mean()

    others = [moved(settled[None], metres, degrees)[0] for metres, degrees in ((0.02, 0), (-0.02, 0), (0, 1), (0, -1))]
    assert cost(settled) < min(map(cost, (pose, *others)))


def test_settled_poses_are_nearer_than_those_by_reprojection(world):
    errors = {"by reprojection": [], "settled": []}
    for seed in range(20):
        points, truth = spoiled(world.points[seed % 5], 0.1, 0.1, seed)[0], world.poses[seed % 5]
        pose = localisation.locate(points, world.intrinsics)
        errors["by reprojection"].append(apart(pose, truth)[0])
        errors["settled"].append(apart(localisation.settle(pose, points, world.intrinsics), truth)[0])
    assert np.median(errors["settled"]) < 0.5 * np.median(errors["by reprojection"])


def test_settling_trusts_the_points_that_are_sure(world):
    rng, errors = np.random.default_rng(0), {"alike": [], "weighted": []}
    for number, (points, truth) in enumerate(zip(world.points, world.poses)):
        scale = np.where(rng.random(SIZE) < 0.15, 0.02, 0.3)
        noisy = points + scale[..., None] * rng.normal(size=points.shape)
        for name, log_scale in (("alike", None), ("weighted", np.log(scale))):
            settled = localisation.settle(world.poses[number], noisy, world.intrinsics, log_scale=log_scale)
            errors[name].append(apart(settled, truth)[0])
    assert np.mean(errors["weighted"]) < 0.5 * np.mean(errors["alike"])


def test_settling_leaves_masked_pixels_and_its_arguments_alone(world):
    points, outliers = spoiled(world.points[2], 0.9, seed=1)
    points[0, 0], start = np.nan, moved(world.poses, 0.05, 2)[2]
    given = start, points, world.intrinsics, ~outliers, np.where(outliers, 0.0, -1.0)
    kept = [each.copy() for each in given]
    assert max(apart(localisation.settle(*given), world.poses[2])) < 0.01
    for before, now in zip(kept, given):
        assert_array_equal(before, now)


@pytest.mark.parametrize("with_scale", [False, True])
def test_settled_poses_bear_outliers(world, with_scale):
    points, outliers = spoiled(world.points, 0.4, 0.02)
    scales = np.where(outliers, 0.0, -3.0) if with_scale else None
    for found, truth in zip(localisation.locate_all(points, world.intrinsics, log_scales=scales)[0], world.poses):
        metres, degrees = apart(found, truth)
        assert metres < 0.03 and degrees < 1


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_points_on_their_rays_stay(world, dtype):
    points = world.points.astype(dtype)
    found = localisation.on_rays(points, world.poses, world.intrinsics)
    assert found.dtype == dtype and found is not points
    assert_allclose(found, points, atol=1e-5)


@given(st.integers(0, 4), st.floats(0.01, 0.3), st.integers(0, 99))
def test_on_the_true_rays_a_third_of_the_squared_error_is_left(world, number, noise, seed):
    points = spoiled(world.points[number], 0, noise, seed)[0]
    found = localisation.on_rays(points[None], world.poses[[number]], world.intrinsics)[0]
    before, after = (((said - world.points[number]) ** 2).sum(-1) for said in (points, found))
    assert after.sum() / before.sum() == pytest.approx(1 / 3, rel=0.08)
    assert (after <= before + 1e-12).all()


@given(st.integers(0, 4), st.floats(0.01, 0.2), st.integers(0, 99))
def test_rays_of_the_camera_that_the_points_place_do_nearly_as_well(world, number, noise, seed):
    points = spoiled(world.points[number], 0, noise, seed)[0]
    poses, _ = localisation.locate_all(points[None], world.intrinsics)
    found = localisation.on_rays(points[None], poses, world.intrinsics)[0]
    before, after = (((said - world.points[number]) ** 2).sum() for said in (points, found))
    assert after / before == pytest.approx(1 / 3, rel=0.15)


def test_each_image_has_its_own_rays(world):
    wider = np.stack([world.intrinsics] * 4 + [world.intrinsics * [[0.5, 1, 1], [1, 1, 1], [1, 1, 1]]])
    found = localisation.on_rays(world.points, world.poses, wider)
    assert_allclose(found[:4], world.points[:4], atol=1e-9)
    assert np.abs(found[4] - world.points[4]).max() > 0.1


def test_no_point_gets_behind_its_camera(world):
    behind = 2 * world.poses[:, None, None, :3, 3] - world.points
    found = localisation.on_rays(behind, world.poses, world.intrinsics)
    assert_allclose(found, np.broadcast_to(world.poses[:, None, None, :3, 3], found.shape), atol=1e-9)


def test_images_without_a_pose_keep_their_points(world):
    poses, noisy = world.poses.copy(), spoiled(world.points, 0, 0.1)[0]
    poses[[1, 3]] = np.nan
    found = localisation.on_rays(noisy, poses, world.intrinsics)
    assert [np.array_equal(*both) for both in zip(found, noisy)] == [False, True, False, True, False]


# Where there is no answer


def test_points_that_are_no_numbers_are_left_out(world):
    points = world.points[4].copy()
    points[:, ::2] = np.nan
    points[::3, 1, 2] = np.inf
    metres, degrees = apart(localisation.locate(points, world.intrinsics), world.poses[4])
    assert metres < 1e-3 and degrees < 0.05


@pytest.mark.parametrize("with_scale", [False, True])
def test_points_that_are_no_numbers_take_no_others_place(world, monkeypatch, with_scale):
    monkeypatch.setattr(localisation, "MOST_POINTS", 40)
    points = np.full_like(world.points[4], np.nan)
    points[4::10, 3::10] = world.points[4, 4::10, 3::10]  # 35 pixels of 3072
    scale = np.random.default_rng(0).random(SIZE) if with_scale else None
    assert max(apart(localisation.locate(points, world.intrinsics, log_scale=scale), world.poses[4])) < 0.05


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("left", [0, 1, 3])
def test_too_few_points_give_no_pose(world, left, with_scale):
    points = np.full_like(world.points[0], np.nan)
    points.reshape(-1, 3)[:left] = world.points[0].reshape(-1, 3)[:left]
    scale = np.zeros(SIZE) if with_scale else None
    assert localisation.locate(points, world.intrinsics, log_scale=scale) is None
    assert localisation.locate(world.points[0], world.intrinsics, np.isfinite(points[..., 0]), scale) is None


@pytest.mark.parametrize("with_scale", [False, True])
def test_four_points_are_enough_to_be_asked(world, with_scale):
    mask = np.zeros(SIZE, bool)
    mask[[2, 5, 40, 44], [3, 60, 8, 55]] = True
    found = localisation.locate(world.points[0], world.intrinsics, mask, np.zeros(SIZE) if with_scale else None)
    assert found is None or max(apart(found, world.poses[0])) < 0.5


LINE, NOISE = np.linspace(0, 1, SIZE[0] * SIZE[1]).reshape(*SIZE, 1), np.random.default_rng(0).random((*SIZE, 3))
DEGENERATE = {
    "one point": np.ones((*SIZE, 3)),
    "zeros": np.zeros((*SIZE, 3)),
    "a line": LINE * [1.0, 2, 3],
    "a plane of noise": NOISE * [1.0, 1, 0],
    "noise": NOISE,
    "huge": 1e12 * NOISE,
    "tiny": 1e-12 * NOISE,
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("with_scale", [False, True])
def test_points_that_tell_no_pose_break_nothing(world, kind, with_scale):
    scale = np.zeros(SIZE) if with_scale else None
    found = localisation.locate(DEGENERATE[kind], world.intrinsics, log_scale=scale)
    if found is not None:
        for pose in (found, localisation.settle(found, DEGENERATE[kind], world.intrinsics, log_scale=scale)):
            assert pose.shape == (4, 4) and np.isfinite(pose).all()
            assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-6)


def test_all_images_at_once(world):
    points, masks = world.points.copy(), np.ones(world.depth.shape, bool)
    points[1], masks[3] = np.nan, False
    own = np.tile(world.intrinsics, (5, 1, 1))
    for intrinsics in (world.intrinsics, own):
        poses, milliseconds = localisation.locate_all(points, intrinsics, masks, np.zeros(world.depth.shape))
        assert poses.shape == (5, 4, 4) and milliseconds > 0
        assert np.isnan(poses[[1, 3]]).all()
        assert_allclose(poses[[0, 2, 4]], world.poses[[0, 2, 4]], atol=1e-3)
    poses, _ = localisation.locate_all(points[:1], world.intrinsics)
    assert_allclose(poses, world.poses[:1], atol=1e-3)


def test_each_image_has_its_own_intrinsics_mask_and_uncertainty(world):
    other = world.intrinsics * [[1.5, 1, 1], [1, 1, 1], [1, 1, 1]]
    intrinsics = np.stack([world.intrinsics, other, world.intrinsics, world.intrinsics])
    points, outliers = spoiled(world.points[0], 0.7)  # of nine in ten ``settle`` is no longer sure
    masks, scales = np.ones((4, *SIZE), bool), np.zeros((4, *SIZE))
    masks[2], scales[3] = ~outliers, np.where(outliers, 1.0, -1.0)
    poses, _ = localisation.locate_all(np.stack([world.points[0]] * 2 + [points] * 2), intrinsics, masks, scales)
    assert max(max(apart(poses[k], world.poses[0])) for k in (0, 2, 3)) < 0.05 < max(apart(poses[1], world.poses[0]))


# Errors


def moved(poses, metres, degrees):
    """Poses that stand ``metres`` away and are turned by ``degrees`` about a skew axis."""
    poses = poses.copy()
    axis = np.array([1.0, 2, 2]) / 3
    poses[:, :3, :3] = poses[:, :3, :3] @ rotation(np.radians(degrees) * axis)
    poses[:, :3, 3] += metres * np.array([2.0, -1, 2]) / 3
    return poses


@given(st.floats(0.001, 3), st.floats(0.1, 179))
def test_error_of_a_known_motion(world, metres, degrees):
    found = localisation.pose_errors(moved(world.poses, metres, degrees), world.poses)
    assert found["translation"] == pytest.approx(metres) and found["rotation"] == pytest.approx(degrees, abs=1e-4)


def test_no_error_at_the_truth(world):
    found = localisation.pose_errors(world.poses, world.poses)
    assert found["translation"] == 0 and found["rotation"] < 1e-4
    assert found["within_5cm_5deg"] == found["within_2cm_2deg"] == 1


def test_medians_and_shares_of_known_errors(world):
    motions = [(0.01, 1.0), (0.03, 1.0), (0.01, 4.0), (0.04, 6.0), (0.2, 0.5)]
    poses = np.concatenate([moved(world.poses[[k]], *motion) for k, motion in enumerate(motions)])
    found = localisation.pose_errors(poses, world.poses)
    assert found["translation"] == pytest.approx(0.03) and found["rotation"] == pytest.approx(1.0)
    assert found["within_5cm_5deg"] == pytest.approx(3 / 5) and found["within_2cm_2deg"] == pytest.approx(1 / 5)


def test_poses_that_were_not_found_are_infinitely_far(world):
    poses = world.poses.copy()
    poses[[1, 2]] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = localisation.pose_errors(poses, world.poses)
        assert found["translation"] == 0 and found["within_5cm_5deg"] == pytest.approx(3 / 5)
        poses[3] = np.nan
        found = localisation.pose_errors(poses, world.poses)
    assert found["translation"] == found["rotation"] == np.inf
    assert found["within_2cm_2deg"] == pytest.approx(2 / 5)
