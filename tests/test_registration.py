"""Registration of point sets against closed forms, and what must hold of any point sets."""

import numpy as np
import pytest
from conftest import rotation
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from kdutils import geometry, registration


def moving(axis_angle, place, factor):
    matrix = np.eye(4)
    matrix[:3, :3] = factor * rotation(np.array(axis_angle))
    matrix[:3, 3] = place
    return matrix


def cloud(seed, count=12):
    return np.random.default_rng(seed).normal(size=(count, 3))


vectors = st.tuples(*[st.floats(-3, 3)] * 3)
factors = st.floats(0.05, 20)
seeds = st.integers(0, 2**32 - 1)


@given(vectors, vectors, factors, seeds)
def test_similarity_comes_back(axis_angle, place, factor, seed):
    truth, source = moving(axis_angle, place, factor), cloud(seed)
    assert_allclose(registration.similarity(source, geometry.transform(truth, source)), truth, atol=1e-9 * (1 + factor))


@given(vectors, vectors, seeds)
def test_rigid_motion_comes_back(axis_angle, place, seed):
    truth, source = moving(axis_angle, place, 1), cloud(seed)
    assert_allclose(registration.rigid(source, geometry.transform(truth, source)), truth, atol=1e-9)


@given(factors, seeds)
def test_scale_comes_back(factor, seed):
    source = cloud(seed)
    assert_allclose(registration.scale(source, factor * source), np.diag([factor] * 3 + [1]), atol=1e-9 * factor)


def test_umeyamas_own_example():
    """The example of Umeyama's paper, in the plane z = 0: a mirror image, for which the best rotation is wanted."""
    source = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0]], float)
    target = np.array([[0, 0, 0], [-1, 0, 0], [0, 2, 0]], float)
    in_plane = registration.similarity(source, target)
    # In space half a turn about y explains the mirror image exactly.
    assert_allclose(in_plane, np.diag([-1.0, 1, -1, 1]), atol=1e-9)


def test_mirror_image_in_space_gives_a_rotation():
    source = cloud(0)
    fitted = registration.rigid(source, source * [-1, 1, 1])
    assert np.linalg.det(fitted[:3, :3]) == pytest.approx(1)


def test_rigid_fit_of_a_scaled_cloud_keeps_its_size():
    source = cloud(1)
    fitted = registration.rigid(source, 3 * source + [1, 2, 3])
    assert_allclose(fitted[:3, :3], np.eye(3), atol=1e-9)
    assert_allclose(geometry.transform(fitted, source.mean(0)), 3 * source.mean(0) + [1, 2, 3])


def test_scale_is_the_weighted_regression_through_the_origin():
    source, target = np.array([[1.0, 0, 0], [0, 2, 0]]), np.array([[2.0, 0, 0], [0, 6, 0]])
    assert registration.scale(source, target)[0, 0] == pytest.approx((1 * 2 + 2 * 6) / (1 + 4))
    assert registration.scale(source, target, np.array([4, 1]))[0, 0] == pytest.approx((4 * 2 + 12) / (4 + 4))


@given(seeds, vectors, vectors, factors)
def test_no_other_similarity_is_nearer(seed, axis_angle, place, factor):
    source, target = cloud(seed), cloud(seed + 1)
    weights = np.random.default_rng(seed).uniform(0.1, 1, len(source))

    def cost(transform):
        return (weights * ((geometry.transform(transform, source) - target) ** 2).sum(1)).sum()

    best = registration.similarity(source, target, weights)
    assert cost(best) <= cost(moving(axis_angle, place, factor)) + 1e-9
    nearby = best @ moving(np.array(axis_angle) / 300, np.array(place) / 300, 1 + (factor - 10) / 3000)
    assert cost(best) <= cost(nearby) + 1e-9


@given(seeds)
def test_weight_is_how_often_a_point_counts(seed):
    source, target = cloud(seed), cloud(seed + 1)
    weights = np.random.default_rng(seed).integers(0, 4, len(source))
    weights[:4] += 1
    often = np.repeat(source, weights, axis=0), np.repeat(target, weights, axis=0)
    for fit in (registration.similarity, registration.rigid, registration.scale):
        assert_allclose(fit(source, target, weights), fit(*often), atol=1e-8)


@given(seeds, vectors, factors)
def test_moving_the_target_moves_the_transform(seed, axis_angle, factor):
    source, target = cloud(seed), cloud(seed) + 0.1 * cloud(seed + 1)
    move = moving(axis_angle, (1, -2, 3), factor)
    moved = registration.similarity(source, geometry.transform(move, target))
    assert_allclose(moved, move @ registration.similarity(source, target), atol=1e-7 * (1 + factor))


def test_leading_dimensions_are_problems_of_their_own():
    source = np.stack([cloud(0), cloud(1)])
    target = np.stack([cloud(2), cloud(3)])
    for fit in (registration.similarity, registration.rigid, registration.scale):
        assert_allclose(fit(source, target), [fit(s, t) for s, t in zip(source, target)])


@given(seeds, vectors, factors, st.sampled_from(["similarity", "rigid", "scale"]))
def test_ransac_leaves_out_what_does_not_agree(seed, axis_angle, factor, kind):
    move = {"similarity": moving(axis_angle, (1, 2, 3), factor), "rigid": moving(axis_angle, (1, 2, 3), 1),
            "scale": moving((0, 0, 0), (0, 0, 0), factor)}[kind]  # fmt: skip
    source = cloud(seed, 60)
    target = geometry.transform(move, source)
    size = factor if kind != "rigid" else 1
    target[:20] += size * (3 + np.random.default_rng(seed).uniform(0, 9, (20, 3)))
    target[20] = np.nan
    found, agreeing = registration.ransac(source, target, 0.01 * size, kind)
    assert_array_equal(agreeing, np.arange(60) > 20)
    assert_allclose(found, move, atol=1e-7 * (1 + factor))


def test_ransac_is_repeatable_and_says_when_it_cannot():
    source, target = cloud(0), cloud(1)
    one, two = (registration.ransac(source, target, 0.5) for _ in range(2))
    assert_array_equal(one[0], two[0])
    with pytest.raises(ValueError, match="2 usable points do not determine a similarity"):
        registration.ransac(source[:2], target[:2], 1.0)
    with pytest.raises(ValueError, match="unknown kind"):
        registration.ransac(source, target, 1.0, "affine")


@pytest.mark.parametrize("source, target, weights, message", [
    (cloud(0), cloud(0)[:5], None, "must both be"),
    (cloud(0)[:, :2], cloud(0)[:, :2], None, "must both be"),
    (cloud(0), cloud(0), np.ones(5), "one a point"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_errors(source, target, weights, message):
    with pytest.raises(ValueError, match=message):
        registration.similarity(source, target, weights)


@given(vectors, vectors, factors, seeds)
def test_poses_move_with_their_points(axis_angle, place, factor, seed):
    move, points = moving(axis_angle, place, factor), cloud(seed)
    pose = moving((0.3, -0.2, 0.5), (4, 5, 6), 1)
    moved = registration.move_poses(move, pose)
    expected = geometry.transform(move, geometry.transform(pose, points))
    assert_allclose(geometry.transform(moved, factor * points), expected, atol=1e-8 * (1 + factor))
    assert_allclose(moved[:3, :3] @ moved[:3, :3].T, np.eye(3), atol=1e-9)
