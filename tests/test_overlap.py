"""Pairs by overlap and baseline: what is measured against closed forms, what is chosen against its promises."""

import time

import numpy as np
import pytest
from conftest import ROOT, box_world, rotation
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from kdutils import overlap, pairs, scenes

PATHS = ROOT.parent / "shared" / "data" / "12scenes_poses"
SIZE, FOCAL = (480, 640), 550.0
INTRINSICS = np.array([[FOCAL, 0, 320], [0, FOCAL, 240], [0, 0, 1]])
LOW, HIGH = overlap.SHARED


def cameras(*moves, turns=None):
    poses = np.tile(np.eye(4), (len(moves), 1, 1))
    poses[:, :3, 3] = moves
    if turns is not None:
        poses[:, :3, :3] = [rotation(np.array(turn)) for turn in turns]
    return poses


def measure(poses, images=((0, 1),), depth=None):
    return overlap.Views(poses, INTRINSICS, SIZE, depth).measure(np.array(images))


@given(st.floats(0, 2.3), st.floats(1, 5))
def test_sideways_motion_before_a_wall(part, distance):
    """Moved by a part of what the image shows, two views share the rest; the angle is the baseline's there."""
    width = 640 / FOCAL * distance
    depth = np.full((2, *SIZE), distance)
    found = measure(cameras((0, 0, 0), (part * width, 0, 0)), depth=depth)
    assert_allclose(found.shared[0], max(0, 1 - part), atol=0.5 / overlap.SAMPLES[1] + 1e-6)
    if found.shared[0] >= LOW:
        middle = part * width / 2  # of what both see, seen from either
        assert_allclose(found.angle[0], 2 * np.degrees(np.arctan2(middle, distance)), rtol=0.2, atol=0.5)


def test_turning_on_the_spot_measures_nothing():
    found = measure(cameras((0, 0, 0), (0, 0, 0), turns=[(0, 0, 0), (0, 0.3, 0)]))
    assert LOW < found.shared[0] < HIGH and found.angle[0] < 0.01 and len(found.admissible()) == 0


def test_back_to_back_views_share_nothing():
    found = measure(cameras((0, 0, 0), (0, 0, 1), turns=[(0, 0, 0), (0, np.pi, 0)]))
    assert found.shared[0] == 0


def test_pixels_without_depth_do_not_count():
    depth = np.full((2, *SIZE), 2.0)
    depth[:, :, :320] = 0
    seen = measure(cameras((0, 0, 0), (1, 0, 0)), depth=depth).shared
    assert seen[0] == 0  # the right half, where depth is, has left one of the views
    assert measure(cameras((0, 0, 0), (0.1, 0, 0)), depth=np.zeros((2, *SIZE))).shared[0] == 0


def test_both_directions_have_to_see():
    poses = cameras((0, 0, 0), (0, 0, 1.6))  # the second is near the wall: it sees a part of what the first sees
    found = measure(poses, [(0, 1), (1, 0)], np.stack([np.full(SIZE, 2.0), np.full(SIZE, 0.4)]))
    assert found.shared[0] == found.shared[1] < LOW


def degrees(edges, count):
    return np.bincount(edges.images.ravel(), minlength=count)


@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_chosen_edges_keep_their_promises(count, seed):
    rng = np.random.default_rng(seed)
    every = np.stack(np.triu_indices(count, 1), axis=1)
    some = overlap.Edges(every, rng.uniform(0, 1, len(every)), rng.uniform(0, 40, len(every))).admissible()
    some = some[np.sort(rng.permutation(len(some))[: 4 * count])]
    chosen = overlap.choose(some, count)
    assert degrees(chosen, count).max() <= overlap.MOST_NEIGHBOURS
    assert {tuple(edge) for edge in chosen.images.tolist()} <= {tuple(edge) for edge in some.images.tolist()}
    assert len(np.unique(chosen.images, axis=0)) == len(chosen)


def test_ring_of_cameras_is_closed():
    """Cameras on a circle that look outwards see only their neighbours' walls."""
    angles = np.arange(24) / 24 * 2 * np.pi
    poses = cameras(*np.stack([np.sin(angles), 0 * angles, np.cos(angles)], axis=1), turns=[(0, a, 0) for a in angles])
    edges = overlap.overlap_graph(poses, INTRINSICS, SIZE)
    assert pairs.components(edges.images, 24)[0] == 1
    steps = (edges.images[:, 1] - edges.images[:, 0]) % 24
    assert any(np.minimum(steps, 24 - steps) < 4) and (edges.images[:, 1] - edges.images[:, 0] > 18).any()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_very_few_images(count):
    poses = cameras(*[(0.4 * k, 0, 0) for k in range(count)]) if count else np.empty((0, 4, 4))
    assert overlap.overlap_graph(poses, INTRINSICS, SIZE).images.tolist() == ([[0, 1]] if count == 2 else [])


def test_frames_are_paired_within_test_and_training_only():
    world = box_world(16, (24, 32), seed=1, test=6, step=0.06)
    frames = scenes.Frames(world.image, world.depth, world.poses, world.intrinsics, np.arange(16),
                           np.array([0] * 6 + [1] * 5 + [2] * 5), {})  # fmt: skip
    found = pairs.scene_pairs(frames)
    assert (frames.is_test[found[:, 0]] == frames.is_test[found[:, 1]]).all()
    assert (np.array(frames.sequence)[found[:, 0]] != np.array(frames.sequence)[found[:, 1]]).any()
    directed = {tuple(pair) for pair in found.tolist()}
    assert len(directed) == len(found) and directed == {(j, i) for i, j in directed}
    assert pairs.scene_pairs(frames, "swin", 2).tolist() == pairs.sequence_pairs(frames.sequence, "swin", 2).tolist()


@pytest.mark.parametrize("file", sorted(PATHS.glob("*/*.txt")) or [None], ids=lambda file: file and str(file)[-30:])
def test_real_camera_paths(file):
    """Every published path of 12Scenes: one piece, few neighbours, overlap and baseline as promised, and fast."""
    if file is None:
        pytest.skip(f"{PATHS} is not there: it is no part of the repository")
    _, poses, focal = scenes.read_camera_path(file)
    intrinsics = np.array([[focal[0], 0, 648], [0, focal[0], 484], [0, 0, 1]])
    started = time.process_time()
    edges = overlap.overlap_graph(poses, intrinsics, (968, 1296))
    assert time.process_time() - started < 15  # 1.5 s on quiet cores
    degree = degrees(edges, len(poses))
    assert degree.max() <= 6 and degree.mean() > 5
    assert pairs.components(edges.images, len(poses))[0] == 1
    assert (edges.shared >= LOW).all() and (edges.shared <= HIGH).all() and (edges.angle >= overlap.LEAST_ANGLE).all()
