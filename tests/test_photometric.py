"""Photometric refinement: on painted walls depths come back, on plain ones they stay, and nothing else is touched."""

import numpy as np
import pytest
import torch
from conftest import box_world, painted_world
from hypothesis import given, settings
from hypothesis import strategies as st

from kdutils import pairs
from kdutils.alignment import photometric
from kdutils.teachers import DepthTeacher, PairPointmaps

WORLD = box_world(6, (72, 96), seed=3, step=0.2)
PAIRS = pairs.complete_pairs(6)
pytestmark = pytest.mark.usefixtures("one_thread")


def painted(seed=0):
    return painted_world(WORLD, seed)


def off_by(share, seed=0):
    """Depths that are wrong by up to about so much, smoothly over each image."""
    rng = np.random.default_rng(seed)
    waves = np.array([np.outer(np.sin(np.linspace(a, a + 3, 72)), np.cos(np.linspace(b, b + 3, 96)))
                      for a, b in rng.uniform(0, 6, (len(WORLD.depth), 2))])  # fmt: skip
    return (WORLD.depth * np.exp(share * waves)).astype(np.float32)


def refined(depth, images, edges=PAIRS, **options):
    return photometric.refine(depth, images, WORLD.intrinsics, WORLD.poses, edges, **options)


def error(depth, where=slice(None)):
    return np.median(np.abs(depth / WORLD.depth - 1)[where])


@settings(max_examples=5)
@given(st.floats(0.03, 0.12), st.integers(0, 5))
def test_depths_come_back_where_there_is_something_to_see(share, seed):
    wrong = off_by(share, seed)
    assert error(refined(wrong, painted(seed))) < max(0.25 * error(wrong), 0.004)


def test_right_depths_stay():
    assert error(refined(WORLD.depth, painted())) < 0.003


def test_light_and_exposure_do_not_matter():
    images, wrong = painted(), off_by(0.08)
    darker = (images * np.linspace(0.5, 1, 6)[:, None, None, None] + 10).astype(np.uint8)
    assert error(refined(wrong, darker)) < 1.5 * error(refined(wrong, images)) + 1e-3


def test_plain_walls_keep_the_teachers_depth():
    wrong = off_by(0.05)
    plain = np.full((*WORLD.depth.shape, 3), 120, np.uint8)
    assert np.abs(refined(wrong, plain) / wrong - 1).max() < 0.01


@pytest.mark.parametrize("holes", ["a block", "scattered"])
def test_what_has_no_depth_gets_none_and_spoils_nothing_around(holes):
    wrong = off_by(0.08)
    if holes == "a block":
        wrong[:, 20:28, 30:38] = 0
    else:
        wrong[np.random.default_rng(0).random(wrong.shape) < 0.2] = 0
    after = refined(wrong, painted())
    assert np.array_equal(after == 0, wrong == 0)
    assert error(after, wrong > 0) < 0.25 * error(wrong, wrong > 0)


def test_an_image_in_no_pair_stays_and_the_input_is_not_written_to():
    wrong = off_by(0.08)
    before = wrong.copy()
    after = refined(wrong, painted(), PAIRS[(PAIRS != 5).all(1)])
    assert np.array_equal(after[5], wrong[5]) and not np.array_equal(after[4], wrong[4])
    assert np.array_equal(wrong, before)


def test_batches_of_images_make_no_difference(monkeypatch):
    wrong, images, batches = off_by(0.08), painted(), []
    uneven = np.array([[0, 1], [1, 0], [1, 2], [2, 3], [4, 5]])
    together = refined(wrong, images, uneven)
    monkeypatch.setattr(photometric, "PIXELS_AT_ONCE", 1)
    alone = refined(wrong, images, uneven, progress=lambda parts: batches.extend(parts) or iter(parts))
    assert len(batches) == 6
    assert np.abs(together / alone - 1).max() < 1e-3


def test_neighbours_are_those_paired_with_and_then_theirs():
    chain = np.array([[0, 1], [1, 2], [3, 2], [4, 5]])
    found = [others.tolist() for others in photometric.neighbours(chain, 7)]
    assert [sorted(others) for others in found] == [[1, 2], [0, 2, 3], [0, 1, 3], [1, 2], [5], [4], []]
    assert found[0] == [1, 2] and found[3] == [2, 1]  # paired ones first


def test_no_image_is_compared_with_very_many():
    found = photometric.neighbours(pairs.complete_pairs(40), 40)
    assert {len(others) for others in found} == {photometric.MOST_VIEWS}
    assert all(k not in others for k, others in enumerate(found))


def test_a_picture_seen_through_the_true_depth_is_alike():
    shown = photometric.normalised(torch.from_numpy(painted()))
    motion = torch.from_numpy(np.linalg.inv(WORLD.poses[1]) @ WORLD.poses[0]).float()[None]
    tried = torch.from_numpy(WORLD.depth[:1, None]) * torch.tensor([0.8, 1, 1.2])[:, None, None]
    camera = torch.from_numpy(WORLD.intrinsics).float()
    unlike, inside = photometric.differences(tried, shown[:1], shown[1:2], motion, camera)
    low, right, high = (float(unlike[0, k][inside[0]].median()) for k in range(3))
    assert right < 0.5 * low and right < 0.5 * high


class Shards(list):
    """Answers in shards, as they come from the disk."""

    pairs = PAIRS

    def answer(self, number):
        return PairPointmaps(*(array[number % 3][None] for array in self[number // 3]))


def answers(metres, seed=0):
    """Depths that are a little wrong, in a unit of so many metres, three pairs a shard."""
    said = DepthTeacher(WORLD)(PAIRS)
    depth = off_by(0.03, seed)[PAIRS[:, 0]] / metres
    points = np.concatenate([said.points_i[..., :2], depth[..., None]], -1).astype(np.float32)
    said = said._replace(points_i=points, confidence_i=np.full_like(depth, 3))
    return Shards(PairPointmaps(*(array[k : k + 3] for array in said)) for k in range(0, len(PAIRS), 3))


def unit(shards, images, poses=WORLD.poses, telling=None):
    telling = np.ones(6, bool) if telling is None else telling
    return photometric.unit(shards, images, WORLD.intrinsics, poses, telling)


@settings(max_examples=5)
@given(st.floats(0.02, 5), st.integers(0, 3))
def test_the_pictures_tell_the_unit(metres, seed):
    assert unit(answers(metres, seed), painted(seed)) == pytest.approx(metres, rel=0.02)


def test_only_the_images_that_may_tell_the_unit_are_asked():
    wrong = answers(1.0)
    for shard in wrong:
        shard.points_i[np.isin(shard.pairs[:, 0], (0, 3))] *= 2
    assert unit(wrong, painted(), telling=~np.isin(np.arange(6), (0, 3))) == pytest.approx(1, rel=0.02)
    assert unit(wrong, painted(), telling=np.isin(np.arange(6), (0, 3))) == pytest.approx(0.5, rel=0.02)


def test_points_that_are_not_finite_have_no_say_in_the_unit():
    spoilt = answers(1.0)
    for shard in spoilt:
        shard.points_i[:, ::7], shard.points_i[:, 3::11] = np.nan, np.inf
    assert unit(spoilt, painted()) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("case", ["plain", "still", "nobody"])
def test_pictures_that_do_not_tell_the_unit_are_told(case):
    images = np.full((*WORLD.depth.shape, 3), 120, np.uint8) if case == "plain" else painted()
    poses = np.repeat(WORLD.poses[:1], 6, axis=0) if case == "still" else WORLD.poses
    with pytest.raises(ValueError, match="do not tell.*teacher depth"):
        unit(answers(1.0), images, poses, np.zeros(6, bool) if case == "nobody" else None)


def test_where_another_view_ends_is_told_by_the_middle_depth():
    motion = np.eye(4, dtype=np.float32)[None]
    motion[0, 0, 3] = -0.3  # the other camera stands 0.3 m to the right, so the left edge is out of its sight
    camera = torch.from_numpy(WORLD.intrinsics).float()
    blank = torch.zeros(1, *WORLD.depth.shape[1:])
    tried = torch.tensor([0.7, 2.0, 6.0])[None, :, None, None].expand(1, 3, *blank.shape[1:])
    _, inside = photometric.differences(tried, blank, blank, torch.from_numpy(motion), camera)
    unseen = 0.3 / 2.0 * WORLD.intrinsics[0, 0]  # columns
    assert np.array_equal(inside[0].all(0).numpy(), np.arange(blank.shape[2]) + 0.5 > unseen)
