"""Stereo fills what has no label: right where other images bear it out, not elsewhere; and nothing else is touched."""

import numpy as np
import pytest
import torch
from conftest import box_world, painted_world
from hypothesis import given, settings
from hypothesis import strategies as st

from kdutils import pairs
from kdutils.alignment import stereo

COUNT, SIZE = 6, (72, 96)
WORLD = box_world(COUNT, SIZE, seed=3, step=0.2)
PAIRS = pairs.complete_pairs(COUNT)
ALL = np.ones(COUNT, bool)
BAND = np.s_[:, 20:50, 30:70]  # of all images, so that no view has what another lacks
pytestmark = pytest.mark.usefixtures("one_thread")


def with_band():
    """What is labelled where all images have a hole, and depth that is wrong in it."""
    known, depth = np.ones((COUNT, *SIZE), bool), WORLD.depth.copy()
    known[BAND], depth[BAND] = False, 9.0
    return depth, known


def filled(depth, known, pictures, edges=PAIRS, sources=ALL):
    return stereo.filled(depth, known, pictures, WORLD.intrinsics, WORLD.poses, edges, sources)


@settings(max_examples=3)
@given(st.integers(0, 100))
def test_a_hole_of_all_views_is_filled(seed):
    depth, found = filled(*with_band(), painted_world(WORLD, seed))
    off = np.abs(depth / WORLD.depth - 1)[found]
    assert found[BAND].mean() > 0.7 and np.median(off) < 0.01 and np.mean(off < 0.05) > 0.95


def test_labels_that_are_there_stay():
    before, known = with_band()
    depth, found = filled(before, known, painted_world(WORLD))
    assert found.any() and not (found & known).any() and np.array_equal(depth[~found], before[~found])


def test_pictures_that_do_not_agree_fill_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, *SIZE, 3), np.uint8)
    right = filled(*with_band(), painted_world(WORLD))[1][BAND].mean()
    assert filled(*with_band(), noise)[1][BAND].mean() < 0.3 * right


def test_only_sources_are_filled_and_asked():
    pictures, (depth, known) = painted_world(WORLD), with_band()
    sources = np.arange(COUNT) != 2
    expected = filled(depth, known, pictures, sources=sources)
    spoilt, wrong = pictures.copy(), depth.copy()
    spoilt[2], wrong[2] = 255 - pictures[2, ::-1], 1.0
    said = filled(wrong, known, spoilt, sources=sources)
    assert not said[1][2].any() and said[1][sources].any()
    assert np.array_equal(said[1], expected[1]) and np.array_equal(said[0][sources], expected[0][sources])


def test_an_image_in_no_pair_is_left_alone():
    edges = PAIRS[(PAIRS != 5).all(1)]
    _, found = filled(*with_band(), painted_world(WORLD), edges)
    assert not found[5].any() and found[:5].any((1, 2)).all()


def test_two_images_alone_are_no_witnesses():
    edges = np.concatenate([PAIRS[(PAIRS < 4).all(1)], [[4, 5], [5, 4]]])
    _, found = filled(*with_band(), painted_world(WORLD), edges)
    assert not found[4:].any() and found[:4].any((1, 2)).all()


def test_without_labels_or_pairs_nothing_is_filled():
    depth, known = with_band()
    for nothing in (filled(depth, np.zeros_like(known), painted_world(WORLD)),
                    filled(depth, known, painted_world(WORLD), PAIRS[:0]),
                    filled(depth, known, painted_world(WORLD), sources=~ALL)):  # fmt: skip
        assert not nothing[1].any() and np.array_equal(nothing[0], depth)


def test_a_depth_that_one_view_alone_could_show_is_not_taken():
    behind = torch.eye(4)
    behind[2, 3] = -2.5  # steps forward by 2.5 m: what is nearer than that lies behind it
    steps = torch.linspace(1.0, 0.25, 9)  # 1 to 4 m
    camera = torch.tensor([[8.0, 0, 4], [0, 8.0, 4], [0, 0, 1]])
    own, others = torch.zeros(8, 8), torch.zeros(2, 8, 8)
    others[1] = 0.3  # not quite the same: nearer depths, which the first view alone shows, would be the more alike
    depth = stereo.swept(steps, torch.zeros(8, 8), own, others, torch.stack([torch.eye(4), behind]), camera)
    assert (depth[3:5, 3:5] > 2.5).all()


def test_a_label_holds_the_plain_surface_around_it():
    steps, plain = torch.linspace(1.0, 0.25, 31), torch.zeros(24, 24)
    label = torch.zeros(24, 24)
    label[:, :8] = label[:, 20:] = 2.0  # at the picture's edge the depths that other views show decide
    moved = torch.eye(4).repeat(2, 1, 1)
    moved[:, 0, 3] = torch.tensor([0.05, -0.05])
    camera = torch.tensor([[24.0, 0, 12], [0, 24.0, 12], [0, 0, 1]])
    depth = stereo.swept(steps, label, plain, plain.expand(2, 24, 24), moved, camera)
    assert (depth - 2).abs().max() < 0.1
