"""Labels from other views: where an image has none, what others have there, if it looks alike."""

import numpy as np
import pytest
import torch
from conftest import box_world
from hypothesis import given, settings
from hypothesis import strategies as st

from kdutils.alignment import completion

COUNT, SIZE = 8, (36, 48)
WORLD = box_world(COUNT, SIZE, seed=3)
HOLE = np.s_[4, 10:24, 14:32]
ALL = np.ones(COUNT, bool)
pytestmark = pytest.mark.usefixtures("one_thread")


def with_hole():
    """What is labelled where the fifth image has a hole, and depth that is wrong in it."""
    kept, depth = np.ones((COUNT, *SIZE), bool), WORLD.depth.copy()
    kept[HOLE], depth[HOLE] = False, 9.0
    return depth, kept


def completed(depth, kept, pictures=WORLD.image, sources=ALL):
    return completion.completed(depth, kept, pictures, WORLD.intrinsics, WORLD.poses, sources)


def test_a_hole_takes_what_other_views_have_there():
    depth, found = completed(*with_hole())
    assert found[HOLE].mean() > 0.9 and depth.dtype == np.float32
    off = np.abs(depth / WORLD.depth - 1)[found]
    assert np.median(off) < 0.01 and off.max() < 0.05


def test_labels_that_are_there_stay():
    before, kept = with_hole()
    depth, found = completed(before, kept)
    assert not (found & kept).any() and np.array_equal(depth[~found], before[~found])


def test_what_looks_otherwise_hides_the_surface():
    pictures = WORLD.image.copy()
    pictures[4, 10:24, 14:23] = 255 - pictures[4, 10:24, 14:23]
    _, found = completed(*with_hole(), pictures)
    assert not found[4, 10:24, 14:23].any() and found[4, 10:24, 23:32].mean() > 0.9


@pytest.mark.parametrize("channels", [[0, 1, 2], [2]])
def test_colours_that_differ_a_little_more_than_they_may_are_others(channels):
    pictures = WORLD.image.astype(int)
    shift = round(255 * 1.5 * completion.ALIKE * 3 / len(channels))
    patch = pictures[4, 10:24, 14:23][..., channels]
    pictures[4, 10:24, 14:23][..., channels] = patch + np.where(patch > 127, -shift, shift)
    _, found = completed(*with_hole(), pictures.astype(np.uint8))
    assert found[4, 10:24, 14:22].mean() < 0.1 and found[4, 10:24, 24:32].mean() > 0.9


def test_points_are_thinned_with_their_colours(monkeypatch):
    monkeypatch.setattr(completion, "MOST_POINTS", COUNT // 2)
    depth, found = completed(*with_hole())
    assert 0.5 < found[HOLE].mean() < 1 and np.abs(depth / WORLD.depth - 1)[found].max() < 0.05


def test_only_sources_are_asked():
    depth, kept = with_hole()
    depth[:3] *= 1.5
    found_depth, found = completed(depth, kept, sources=np.arange(COUNT) >= 3)
    assert found[HOLE].mean() > 0.8 and np.abs(found_depth / WORLD.depth - 1)[found].max() < 0.05
    assert not completed(*with_hole(), sources=~ALL)[1].any()


def test_fewer_than_three_points_are_too_few():
    depth, kept = with_hole()
    kept[:] &= np.isin(np.arange(COUNT), [3, 4])[:, None, None]
    assert completed(depth, kept)[1][HOLE].mean() < 0.1


def test_no_labels_at_all_complete_nothing():
    depth, found = completed(WORLD.depth, np.zeros((COUNT, *SIZE), bool))
    assert not found.any() and np.array_equal(depth, WORLD.depth)


def seen(depths, pixels, wanted, least=completion.LEAST_AGREEING):
    """The surface in a row of pixels by definition, one after the other: ``{pixel: (depth, colour)}``."""
    surface = {}
    for pixel in np.flatnonzero(wanted):
        here = np.sort(depths[pixels == pixel])
        for nearest in here:
            agree = here[(here >= nearest) & (here < (1 + completion.TOLERANCE) * nearest)]
            if len(agree) >= least:
                surface[pixel] = agree.mean()
                break
    return surface


@settings(max_examples=50)
@given(st.integers(0, 10_000))
def test_the_nearest_that_agree_are_the_surface(seed):
    rng = np.random.default_rng(seed)
    width, count = 4, int(rng.integers(0, 60))
    depths, pixels = rng.choice([-1, 0.05, 1, 1.02, 1.5, 3], count), rng.integers(-1, width + 1, count)
    depths = depths * rng.uniform(1, 1.01, count)
    wanted = rng.random((1, width)) < 0.7
    points = np.stack([(pixels + 0.5) * depths, 0.5 * depths, depths], 1)
    colours = np.repeat(depths[:, None], 3, 1)  # so that the mean colour has to be the mean depth
    found, surface, colour = completion.seen(*(torch.tensor(part, dtype=torch.float32) for part in (points, colours)),
                                             torch.eye(4), torch.eye(3), torch.tensor(wanted))  # fmt: skip
    in_front = depths > completion.NEAREST
    expected = seen(depths[in_front], pixels[in_front], wanted[0])
    assert found.tolist() == list(expected)
    assert surface.tolist() == pytest.approx(list(expected.values()), rel=1e-4)
    assert torch.allclose(colour, surface[:, None].expand(-1, 3), rtol=1e-4)
