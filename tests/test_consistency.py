"""Labels held against one another: what views agree on stays and gets better, what only one of them says goes."""

import numpy as np
import pytest
import torch
from conftest import box_world
from hypothesis import given, settings
from hypothesis import strategies as st

from kdutils import pairs
from kdutils.alignment import consistency

COUNT, SIZE = 8, (36, 48)
WORLD = box_world(COUNT, SIZE, seed=3)
EVERYWHERE = np.ones((COUNT, *SIZE), bool)
PAIRS = pairs.complete_pairs(COUNT)
pytestmark = pytest.mark.usefixtures("one_thread")


def fused(depth, valid=EVERYWHERE, edges=PAIRS):
    return consistency.fused(depth.astype(np.float32), valid, WORLD.intrinsics, WORLD.poses, edges)


SEEN = fused(WORLD.depth)[1]  # by two other cameras


def off(depth, where):
    return np.abs(depth / WORLD.depth - 1)[where]


def test_true_labels_stay():
    depth, kept = fused(WORLD.depth)
    assert kept.mean() > 0.96 and depth.dtype == np.float32
    assert np.median(off(depth, kept)) < 0.001 and off(depth, kept).max() < consistency.TOLERANCE


@settings(max_examples=10)
@given(st.integers(0, 100))
def test_errors_that_views_do_not_share_shrink(seed):
    wrong = WORLD.depth * np.exp(np.random.default_rng(seed).normal(0, 0.008, WORLD.depth.shape))
    depth, kept = fused(wrong)
    assert kept.mean() > 0.95
    assert np.sqrt(np.mean(off(depth, kept) ** 2)) < 0.6 * np.sqrt(np.mean(off(wrong, kept) ** 2))


@pytest.mark.parametrize("share", [0.6, 0.9, 1.1, 1.6])
def test_what_one_view_alone_says_is_dropped(share):
    wrong = WORLD.depth.copy()
    wrong[4, 10:20, 10:20] *= share
    depth, kept = fused(wrong)
    assert not kept[4, 11:19, 11:19].any()
    elsewhere = np.ones(SIZE, bool)
    elsewhere[9:21, 9:21] = False
    assert (kept[4] == SEEN[4])[elsewhere].all() and (kept == SEEN)[[0, 1, 2, 6, 7]].mean() > 0.98
    assert np.array_equal(depth[~kept], wrong[~kept].astype(np.float32))


def test_views_agree_or_look_through_or_are_blocked():
    """Wall to wall, each at one depth; the fifth camera stands half a metre further ahead."""
    camera = torch.tensor([[40.0, 0, 24], [0, 40, 18], [0, 0, 1]])
    motions = torch.eye(4).repeat(5, 1, 1)
    motions[4, 2, 3] = -0.5
    says = torch.tensor([2.02, 1.0, 3.0, 0.0, 1.53])  # agrees, is blocked, looks through, has no label, agrees
    walls = says[:, None, None].expand(5, *SIZE)
    mean, agreeing, looking_through = consistency.compared(torch.full(SIZE, 2.0), walls, motions, camera)
    middle = slice(12, 24), slice(16, 32)  # which the camera ahead sees too
    torch.testing.assert_close(mean[middle], torch.full_like(mean[middle], (2 + 2.02 + 2.03 - 1e-9) / 3))
    assert (agreeing[middle] == 2).all() and (looking_through == 1).all()
    assert agreeing[0, 0] == 1 and mean[0, 0] == pytest.approx(2.01)


def test_no_label_comes_from_nowhere():
    valid = np.random.default_rng(0).random((COUNT, *SIZE)) < 0.7
    depth = np.where(valid, WORLD.depth, np.nan)
    found, kept = fused(depth, valid)
    assert not kept[~valid].any() and kept[valid].mean() > 0.9
    assert np.isnan(found[~valid]).all() and np.isfinite(found[valid]).all()


def test_as_many_have_to_agree_as_there_are_at_most_two():
    wrong = WORLD.depth.copy()
    wrong[1] *= 1.2
    _, kept = fused(wrong, edges=np.array([[0, 1], [2, 3], [5, 6], [6, 7], [5, 7]]))
    assert not kept[:2].any()  # they contradict each other, and there is no third
    assert kept[2:4].mean() > 0.9 and kept[5:].mean() > 0.9
    assert kept[4].all()  # is in no pair
