"""The convention for geometry: closed forms, round trips, and what must hold for any camera."""

import numpy as np
import pytest
from conftest import rotation
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from kdutils import geometry

K = np.array([[100.0, 0, 16], [0, 90, 12], [0, 0, 1]])
VECTOR = st.tuples(*[st.floats(-3, 3)] * 3).map(np.array)
CAMERA = st.builds(
    lambda focal, ratio, cu, cv: np.array([[focal, 0, cu], [0, focal * ratio, cv], [0, 0, 1.0]]),
    st.floats(50, 2000), st.floats(0.8, 1.2), st.floats(5, 900), st.floats(5, 900),
)  # fmt: skip
SIDE = st.integers(8, 1300)


def pose_of(axis_angle, place):
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation(axis_angle), place
    return pose


def test_pixel_centres_lie_at_half():
    grid = geometry.pixel_grid(2, 3)
    assert grid.shape == (2, 3, 2)
    assert_array_equal(grid[1, 2], [2.5, 1.5])
    assert_array_equal(grid[0, 0], [0.5, 0.5])


def test_rays_of_a_centred_camera():
    rays = geometry.pixel_rays(K, 24, 32)
    assert_allclose(rays[0, 0], [-15.5 / 100, -11.5 / 90, 1])
    assert_allclose(rays.sum((0, 1)), [0, 0, 24 * 32], atol=1e-9)  # a principal point of W/2, H/2 is the centre


def test_unprojected_depth_is_z_and_not_distance():
    depth = np.linspace(1, 4, 24 * 32).reshape(24, 32)
    points = geometry.unproject(depth, K)
    assert_allclose(points[..., 2], depth)
    assert_allclose(points[3, 30], depth[3, 30] * np.array([14.5 / 100, -8.5 / 90, 1]))
    assert_allclose(geometry.unproject(depth[None], K)[0], points)


def test_projection_closed_form_and_behind_the_camera():
    pixels, depth = geometry.project(np.array([[0.5, -0.2, 2], [0.5, -0.2, -2], [0, 0, 0]]), K)
    assert_allclose(pixels[0], [16 + 100 * 0.25, 12 - 90 * 0.1])
    assert np.isnan(pixels[1:]).all()
    assert_array_equal(depth, [2, -2, 0])


@given(CAMERA, st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_unproject_then_project_is_the_pixel_grid(intrinsics, height, width, seed):
    depth = np.random.default_rng(seed).uniform(0.1, 10, (height, width))
    pixels, z = geometry.project(geometry.unproject(depth, intrinsics), intrinsics)
    assert_allclose(pixels, geometry.pixel_grid(height, width), rtol=1e-9, atol=1e-8)
    assert_allclose(z, depth)


def test_transform_turns_then_moves():
    pose = pose_of([0, 0, np.pi / 2], [1, 2, 3])  # a quarter turn takes x to y
    assert_allclose(geometry.transform(pose, np.array([1.0, 0, 0])), [1, 3, 3], atol=1e-12)
    assert geometry.transform(pose, np.zeros((4, 5, 3))).shape == (4, 5, 3)


@given(VECTOR, VECTOR, VECTOR)
def test_inverse_undoes_a_pose(axis_angle, place, point):
    pose = pose_of(axis_angle, place)
    assert_allclose(geometry.invert(pose), np.linalg.inv(pose), atol=1e-9)
    assert_allclose(geometry.transform(geometry.invert(pose), geometry.transform(pose, point)), point, atol=1e-9)


def test_inverse_of_a_stack():
    poses = np.stack([pose_of([0.1 * k, 0.2, -0.3], [k, 1, 2]) for k in range(6)]).reshape(2, 3, 4, 4)
    assert_allclose(geometry.invert(poses) @ poses, np.broadcast_to(np.eye(4), poses.shape), atol=1e-12)


@given(CAMERA, st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE), VECTOR)
def test_resize_and_crop_follows_a_point(intrinsics, size, new_size, sideways):
    new, resized, (top, left) = geometry.resize_and_crop(intrinsics, size, new_size)
    point = sideways + [0, 0, 4.0]
    (u, v), _ = geometry.project(point, intrinsics)
    expected = np.array([u * resized[1] / size[1] - left, v * resized[0] / size[0] - top])
    assert_allclose(geometry.project(point, new)[0], expected, rtol=1e-9, atol=1e-6)


@given(CAMERA, st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE))
def test_crop_is_centred_inside_the_resized_image(intrinsics, size, new_size):
    _, resized, offset = geometry.resize_and_crop(intrinsics, size, new_size)
    rest = np.subtract(resized, new_size) - 2 * np.array(offset)
    assert min(offset) >= 0 and set(rest.tolist()) <= {0, 1}
    assert min(np.subtract(resized, new_size)) == 0  # one side fits, so nothing more is cut than must be
    assert abs(resized[0] / size[0] - resized[1] / size[1]) <= 0.5 / min(size) + 1e-9


def test_resize_to_half_and_crop_closed_form():
    new, resized, corner = geometry.resize_and_crop(K, (24, 32), (12, 12))
    assert resized == (12, 16) and corner == (0, 2)
    assert_allclose(new, [[50, 0, 8 - 2], [0, 45, 6], [0, 0, 1]])


@pytest.mark.parametrize("degrees", [0, 1e-6, 1, 90, 179, 180])
@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 0.6, 0.8), (-1, 0, 0)])
def test_angle_of_a_rotation(axis, degrees):
    turned = rotation(np.radians(degrees) * np.array(axis))
    assert geometry.rotation_angle(turned) == pytest.approx(degrees, rel=1e-9, abs=1e-12)


def test_a_scale_does_not_change_the_angle():
    assert geometry.rotation_angle(0.3 * rotation(np.array([0.2, 0, 0]))) == pytest.approx(np.degrees(0.2))


def test_angles_of_many_rotations():
    turns = np.stack([rotation(np.array([0, 0.1 * k, 0])) for k in range(4)])
    assert_allclose(geometry.rotation_angle(turns), np.degrees([0, 0.1, 0.2, 0.3]), atol=1e-6)
