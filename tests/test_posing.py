"""Known cameras put into a network's answers: what is right stays, a turned camera comes back, silence stays silent."""

import numpy as np
import pytest
from conftest import box_world, rotation
from hypothesis import given
from hypothesis import strategies as st

from kdutils import alignment, geometry, pairs
from kdutils.alignment.posing import Posed
from kdutils.teachers import DepthTeacher

pytest.importorskip("poselib")
WORLD = box_world(6, (48, 64), step=0.15)
PAIRS = pairs.complete_pairs(6)


UNIT = 0.4  # metres


def answers():
    """Perfect ones, all in one unit."""
    said = DepthTeacher(WORLD)(PAIRS)
    alike = np.full_like(said.confidence_i, 3)
    scale = np.array([np.median(WORLD.depth[i] / z) for (i, _), z in zip(PAIRS, said.points_i[..., 2])]) / UNIT
    points = [points * scale[:, None, None, None].astype(np.float32) for points in (said.points_i, said.points_j)]
    return said._replace(points_i=points[0], points_j=points[1], confidence_i=alike, confidence_j=alike.copy())


def turned(said, degrees, seed=0):
    """The same answers, each with view j turned about its own camera by so much."""
    rng, points = np.random.default_rng(seed), said.points_j.copy()
    for k, (i, j) in enumerate(said.pairs):
        axis = rng.normal(size=3)
        turn = rotation(np.radians(degrees) * axis / np.linalg.norm(axis))
        centre = (geometry.invert(WORLD.poses[i]) @ WORLD.poses[j])[:3, 3]
        points[k] = (said.points_j[k] - centre / UNIT) @ turn.T + centre / UNIT
    return said._replace(points_j=points.astype(np.float32))


def posed(said):
    return next(iter(Posed([said], WORLD.intrinsics, WORLD.poses, UNIT)))


def test_what_is_right_stays():
    said = answers()
    assert np.abs(posed(said).points_j - said.points_j).max() < 2e-3 * np.abs(said.points_j).max()
    assert np.array_equal(posed(said).points_i, said.points_i)


@given(st.floats(1, 20), st.integers(0, 20))
def test_a_turned_camera_comes_back(degrees, seed):
    said = answers()
    wrong = turned(said, degrees, seed)
    off = [np.abs(answer.points_j - said.points_j).max() for answer in (wrong, posed(wrong))]
    assert off[1] < 0.05 * off[0] + 2e-3 * np.abs(said.points_j).max()


def test_a_motion_that_is_too_short_is_lengthened():
    said, points = answers(), answers().points_j.copy()
    for k, (i, j) in enumerate(said.pairs):
        points[k] -= 0.3 * (geometry.invert(WORLD.poses[i]) @ WORLD.poses[j])[:3, 3] / UNIT
    timid = said._replace(points_j=points.astype(np.float32))
    assert np.abs(posed(timid).points_j - said.points_j).max() < 2e-3 * np.abs(said.points_j).max()


def test_alignment_of_turned_answers_needs_it():
    wrong = turned(answers(), 8)
    errors = []
    for shards in ([wrong], Posed([wrong], WORLD.intrinsics, WORLD.poses, UNIT)):
        aligned = alignment.align_shards(shards, WORLD.intrinsics, WORLD.poses)
        off = np.abs(aligned.depth / WORLD.depth - 1)
        errors.append(np.median(np.where(aligned.valid, off, 1)))
    assert errors[1] < 0.01 < errors[0]


def test_an_answer_that_shows_no_camera_says_nothing_from_then_on():
    said = answers()
    points, confidence = said.points_j.copy(), said.confidence_j.copy()
    points[0], confidence[1] = np.random.default_rng(0).normal(size=points[0].shape), 1
    found = posed(said._replace(points_j=points, confidence_j=confidence))
    assert (found.confidence_j[1] == 1).all() and (found.confidence_j[2:] == 3).all()


def test_without_poselib_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr("kdutils.localisation.available", lambda: False)
    with pytest.raises(RuntimeError, match="PoseLib.*teacher depth"):
        posed(answers())


def test_shards_can_be_read_twice_and_come_out_alike():
    shards = Posed([turned(answers(), 5)], WORLD.intrinsics, WORLD.poses, UNIT)
    first, second = (next(iter(shards)) for _ in range(2))
    assert len(shards) == 1 and np.array_equal(first.points_j, second.points_j)
