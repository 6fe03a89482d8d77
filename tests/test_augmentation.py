"""Other views of a frame: whatever is drawn, each pixel keeps the world point that is seen there."""

import os
import sys

import numpy as np
import pytest
import torch
from conftest import HIGH, LOW, box_world, examples_of, rotation
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from kdutils import artefacts, augmentation
from kdutils.augmentation import DRAWS, Examples

pytestmark = pytest.mark.usefixtures("one_thread")
FAR = {"rotation": 15, "zoom": 0.3, "shift": 0.1}
NOVEL = {"travel": 0.3, "look": 8}
STILL = {"rotation": 0, "zoom": 0, "shift": 0}
COUNT, SIZE = 3, (14, 20)
ANY_DRAWS = st.lists(st.floats(-1, 1, width=32), min_size=COUNT * DRAWS, max_size=COUNT * DRAWS).map(
    lambda numbers: torch.tensor(numbers).view(COUNT, DRAWS)
)


def drawn(count, seed=0):
    return 2 * torch.rand(count, DRAWS, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.fixture(scope="module")
def world():
    return box_world(COUNT, SIZE)


@pytest.fixture(scope="module")
def half_labelled(world):
    """The world with two labels in three, whose confidence says where each is from."""
    confidence = np.arange(world.depth.size, dtype=np.float32).reshape(world.depth.shape)
    return examples_of(world, np.random.default_rng(0).random(world.depth.shape) < 0.67, confidence)


def rays_of(count, height, width):
    """Frames at the world's origin whose world points are their own pixel coordinates, (u, v, 1)."""
    images = np.zeros((count, height, width, 3), np.uint8)
    ones = np.ones(images.shape[:3], np.float32)
    return Examples.of(images, ones, ones > 0, ones, np.eye(3), np.tile(np.eye(4), (count, 1, 1)))


def to_pixels(batch):
    """Where a batch's points appear in the frames as they were taken, in double precision; depth along z."""
    poses, intrinsics = batch.poses.double().numpy(), batch.intrinsics.double().numpy()
    from_centre = batch.points.double().numpy() - poses[:, :3, 3, None, None]
    seen = np.einsum("bij,bjhw->bihw", intrinsics @ poses[:, :3, :3].swapaxes(1, 2), from_centre)
    return seen[:, :2] / np.where(batch.mask, seen[:, 2:], 1), seen[:, 2:]


# As they were taken


def test_frames_as_they_were_taken_have_the_worlds_points(world):
    batch = examples_of(world).batch()
    assert batch.mask.all()
    assert_allclose(batch.points.permute(0, 2, 3, 1), world.points, atol=2e-5)
    assert_allclose(batch.images.permute(0, 2, 3, 1), world.image / 255, atol=1e-6)
    columns, rows = np.meshgrid(np.arange(SIZE[1]) + 0.5, np.arange(SIZE[0]) + 0.5)
    assert_allclose(batch.pixels, np.broadcast_to([columns, rows], (COUNT, 2, *SIZE)), atol=1e-4)


def test_a_batch_keeps_masks_confidences_and_cameras(world, half_labelled):
    chosen = half_labelled[[2, 0]]
    batch = chosen.batch()
    assert len(chosen) == 2 and chosen.size == SIZE
    assert torch.equal(batch.mask[:, 0], half_labelled.mask[[2, 0]]) and 0.5 < batch.mask.float().mean() < 0.8
    assert_allclose(batch.confidence[:, 0], half_labelled.confidence[[2, 0]])
    assert_allclose(batch.poses, world.poses[[2, 0]], atol=1e-6)
    assert_allclose(batch.intrinsics, np.tile(world.intrinsics, (2, 1, 1)), rtol=1e-6)


def test_shapes_and_types_are_those_promised(half_labelled):
    for batch in (half_labelled.batch(), half_labelled.augmented(drawn(COUNT))):
        shapes = [tuple(tensor.shape[1:]) for tensor in batch]
        assert shapes == [(3, *SIZE), (3, *SIZE), (1, *SIZE), (1, *SIZE), (2, *SIZE), (3, 3), (4, 4)]
        assert batch.mask.dtype == torch.bool
        assert {tensor.dtype for name, tensor in batch._asdict().items() if name != "mask"} == {torch.float32}


def test_each_frame_may_have_intrinsics_of_its_own(world):
    intrinsics = world.intrinsics * np.array([1.0, 1.5, 2])[:, None, None]
    intrinsics[:, 2, 2] = 1
    examples = Examples.of(world.image, world.depth, world.depth > 0, world.depth, intrinsics, world.poses)
    wide, narrow = examples.batch(), examples_of(world).batch()
    assert_allclose(wide.points[0], narrow.points[0], atol=1e-6)
    assert float((wide.points[1] - narrow.points[1]).abs().max()) > 0.1
    assert_allclose(to_pixels(wide)[0], wide.pixels, atol=1e-3)


@given(factor=st.sampled_from([1, 2, 4]), depth=st.floats(0.2, 8))
def test_reduced_depth_is_of_one_surface(factor, depth):
    depths, known = np.full((2, 8, 12), depth, np.float32), np.ones((2, 8, 12), bool)
    known[0, 3, 5] = False
    depths[1, :, 7:] *= 1.5  # an edge
    confidence = np.arange(2 * 8 * 12, dtype=np.float32).reshape(2, 8, 12)
    images, poses = np.zeros((2, 8, 12, 3), np.uint8), np.tile(np.eye(4), (2, 1, 1))
    reduced = Examples.of(images, depths, known, confidence, np.eye(3), poses).reduced(factor)
    left_out = ~known
    left_out[1, :, 6:8] = factor > 1
    assert reduced.size == (8 // factor, 12 // factor) and len(reduced) == 2
    for number, row, column in np.ndindex(*reduced.mask.shape):
        block = number, slice(factor * row, factor * (row + 1)), slice(factor * column, factor * (column + 1))
        assert reduced.mask[number, row, column] == (not left_out[block].any())
        assert not reduced.mask[number, row, column] or reduced.depth[number, row, column] == pytest.approx(
            depths[block].mean()
        )
        assert reduced.confidence[number, row, column] == confidence[block].min()


def test_reduced_frames_see_what_the_frames_see():
    frames = examples_of(box_world(COUNT, (48, 64)))
    batch = frames.reduced(2).batch()
    points = batch.points.permute(0, 2, 3, 1)[batch.mask[:, 0]].numpy()
    walls = np.minimum(abs(points - LOW), abs(points - HIGH)).min(-1)
    assert np.percentile(walls, 90) < 0.001 and walls.max() < 0.03  # two walls' mean is off both
    assert batch.mask.float().mean() > 0.9
    seen = batch.images.permute(0, 2, 3, 1)[batch.mask[:, 0]].numpy()
    assert_allclose(seen, (points - LOW) / (HIGH - LOW), atol=0.02)


def test_labelled_points_are_the_labelled_ones_in_order(world):
    mask = np.zeros(world.depth.shape, bool)
    mask[1, 2, 3] = mask[2, 4, 5] = mask[2, 4, 1] = True
    examples = examples_of(world, mask)
    assert_allclose(examples.labelled_points(), world.points[[1, 2, 2], [2, 4, 4], [3, 1, 5]], rtol=1e-5)
    assert len(examples[torch.tensor([2])].labelled_points()) == len(examples.labelled_points([2])) == 2


def test_labelled_points_are_thinned_evenly(world):
    every, few = examples_of(world).labelled_points(), examples_of(world).labelled_points(most=52)
    assert len(every) == world.depth.size == 840
    assert torch.equal(few, every.view(COUNT, -1, 3)[:, ::16].reshape(-1, 3))  # the same from each frame


# Augmented


@pytest.mark.parametrize("novel", [{}, NOVEL], ids=["as taken", "novel views"])
@given(draws=ANY_DRAWS)
def test_points_project_to_their_pixels_whatever_is_drawn(half_labelled, novel, draws):
    batch = half_labelled.augmented(draws, **FAR, **novel)
    mask = batch.mask.numpy()
    pixels, depth = to_pixels(batch)
    assert mask.any() and (depth[mask] > 0).all()
    wrong = np.abs(pixels - batch.pixels.numpy())[np.broadcast_to(mask, pixels.shape)]
    assert wrong.max() < 0.01


@pytest.mark.parametrize("novel", [{}, NOVEL], ids=["as taken", "novel views"])
@given(draws=ANY_DRAWS)
def test_labels_are_those_of_the_pixel_they_come_from(half_labelled, novel, draws):
    batch = half_labelled.augmented(draws, **FAR, **novel)
    pixels, (height, width) = batch.pixels.numpy(), SIZE
    columns, rows = np.floor(pixels[:, 0]).astype(int), np.floor(pixels[:, 1]).astype(int)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    clear = (np.abs(pixels - np.round(pixels)) > 1e-3).all(1)  # not where two pixels meet
    frames = np.arange(COUNT)[:, None, None]
    columns, rows = columns.clip(0, width - 1), rows.clip(0, height - 1)
    expected = half_labelled.mask.numpy()[frames, rows, columns] & inside
    there = clear & batch.mask[:, 0].numpy()
    assert (there <= expected).all() if novel else (there == clear & expected).all()  # not all of it is seen from there
    depth = to_pixels(batch)[1][:, 0]
    assert_allclose(depth[there], half_labelled.depth.numpy()[frames, rows, columns][there], rtol=1e-4)
    confidence = half_labelled.confidence.numpy()[frames, rows, columns]
    assert (batch.confidence[:, 0].numpy() == confidence)[there].all()


@given(ANY_DRAWS)
def test_images_stay_in_range_and_points_in_the_room(half_labelled, draws):
    batch = half_labelled.augmented(draws, **FAR, **NOVEL, colour=0.5, blur=1.0)
    assert 0 <= float(batch.images.min()) and float(batch.images.max()) <= 1
    points = batch.points.permute(0, 2, 3, 1)[batch.mask[:, 0]].numpy()
    # A pixel's depth is that of its middle, so that a point may lie a little behind its wall.
    assert (points > LOW - 0.5).all() and (points < HIGH + 0.5).all()


def test_augmented_colours_still_match_their_points():
    examples = examples_of(box_world(6, (96, 128)))
    batch = examples.augmented(drawn(6), rotation=8, zoom=0.2, shift=0.1, colour=0)
    low, high = (torch.tensor(bound, dtype=torch.float32)[:, None, None] for bound in (LOW, HIGH))
    wrong = ((batch.points - low) / (high - low) - batch.images).abs().amax(1, keepdim=True)[batch.mask]
    assert float(wrong.max()) < 0.02 and batch.mask.float().mean() > 0.7  # one pixel's step in colour is 0.015
    moved = (batch.images - examples.batch().images).abs().mean((1, 2, 3))
    assert (moved > 0.01).all()


@pytest.mark.parametrize("size", [(60, 100), (100, 60)])
def test_augmentation_turns_zooms_and_shifts_but_never_mirrors(size):
    height, width = size
    centre = np.array([width / 2, height / 2])
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1) - centre
    batch = rays_of(60, *size).augmented(drawn(60, 1), rotation=8, zoom=0.2, shift=0.1)
    angles, zooms, shifts = [], [], []
    for found, seen in zip(batch.points[:, :2].permute(0, 2, 3, 1).numpy(), batch.mask[:, 0].numpy()):
        design = np.c_[grid[seen], np.ones(seen.sum())]
        (a, b), (c, d), shift = np.linalg.lstsq(design, found[seen] - centre, rcond=None)[0]
        assert_allclose([a, b], [d, -c], atol=1e-3)  # a similarity: no shear, whatever the image's shape
        residual = design @ [[a, b], [c, d], shift] - (found[seen] - centre)
        assert np.abs(residual).max() < 1e-3  # points lie on the pixels' own rays, not on their neighbours'
        assert a * d - b * c > 0
        angles.append(np.degrees(np.arctan2(b, a)))
        zooms.append(np.log(np.hypot(a, b)))
        shifts.append(shift / centre)
    assert 6 < np.abs(angles).max() <= 8.001 and min(angles) < 0 < max(angles)
    assert 0.15 < np.abs(zooms).max() <= 0.2001 and min(zooms) < 0 < max(zooms)
    assert 0.08 < np.abs(shifts).max() <= 0.1001


def test_pixels_from_outside_have_no_label():
    batch = rays_of(8, 40, 40).augmented(drawn(8), rotation=0, zoom=0, shift=0.5)
    assert (~batch.mask).any() and batch.mask.any()
    for found, seen in zip(batch.points, batch.mask[:, 0]):
        step = found[0][:, 1:] - found[0][:, :-1]
        assert_allclose(step[seen[:, 1:] & seen[:, :-1]], 1, atol=1e-4)  # a pure shift
        assert seen.sum() == seen.any(0).sum() * seen.any(1).sum() < 1600  # a rectangle
        assert float(found[:2][:, seen].min()) >= 0 and float(found[:2][:, seen].max()) <= 40


def test_pixels_without_a_label_get_none():
    examples = rays_of(8, 40, 40)
    examples.mask[:, :, 20:] = False
    batch = examples.augmented(drawn(8), **FAR)
    assert batch.mask.any() and float(batch.points[:, :1][batch.mask].max()) < 20.001


def test_zero_draws_show_the_frames_as_they_were_taken(half_labelled):
    zero = half_labelled.augmented(torch.zeros(COUNT, DRAWS), **FAR, **NOVEL, colour=1, blur=1)
    taken = half_labelled.batch()
    assert torch.equal(zero.mask, taken.mask) and torch.equal(zero.confidence, taken.confidence)
    for name in ("images", "points", "pixels"):
        torch.testing.assert_close(getattr(zero, name), getattr(taken, name), atol=1e-4, rtol=0)


def test_no_change_allowed_is_no_change_whatever_is_drawn(half_labelled):
    taken, still = half_labelled.batch(), half_labelled.augmented(drawn(COUNT), **STILL, colour=0, blur=0)
    assert torch.equal(still.mask, taken.mask)
    torch.testing.assert_close(still.images, taken.images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", [{"colour": 0.25}, {"colour": 0, "blur": 0.7}], ids=["colour", "blur"])
def test_colour_and_blur_change_the_image_alone(half_labelled, change):
    draws = drawn(COUNT)
    plain = half_labelled.augmented(draws, **FAR, colour=0)._asdict()
    changed = half_labelled.augmented(draws, **FAR, **change)._asdict()
    difference = (changed.pop("images") - plain.pop("images")).abs().mean((1, 2, 3))
    assert (difference > 1e-4).all() and (difference < 0.2).all()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in changed.items())


def test_colours_change_by_about_as_much_as_is_allowed():
    examples = examples_of(box_world(20, (16, 20)))
    images = examples.batch().images
    small, large = ((examples.augmented(drawn(20), **STILL, colour=colour).images - images).abs().mean()
                    for colour in (0.05, 0.25))  # fmt: skip
    assert 0.02 < large < 0.2 and 3 < large / small < 6


def test_blur_softens_or_sharpens(half_labelled):
    draws = torch.zeros(2, 7)
    draws[:, -1] = torch.tensor([1.0, -1.0])
    noise = torch.rand(1, 3, 16, 16).expand(2, 3, 16, 16) * 0.4 + 0.3
    soft, sharp = augmentation.recoloured(noise, draws, 0, 0.7).var((1, 2, 3))
    assert soft < 0.5 * noise[0].var() and sharp > 1.5 * noise[0].var()
    flat = torch.full((2, 3, 8, 8), 0.4)
    torch.testing.assert_close(augmentation.recoloured(flat, draws, 0, 0.7), flat)  # up to the border


def test_the_same_draws_show_the_same_view(half_labelled):
    first, again, other = (half_labelled.augmented(drawn(COUNT, seed), **NOVEL) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.images, other.images) and not torch.equal(first.pixels, other.pixels)


def test_a_view_does_not_depend_on_its_batch(half_labelled):
    draws = drawn(COUNT)
    together, alone = half_labelled.augmented(draws, **NOVEL), half_labelled[[1]].augmented(draws[[1]], **NOVEL)
    assert torch.equal(together.mask[1:2], alone.mask)
    for name in ("images", "points", "pixels"):
        torch.testing.assert_close(getattr(together, name)[1:2], getattr(alone, name), atol=1e-4, rtol=0)


# Novel views


def moving(count, seed=0):
    """Draws of cameras that all move."""
    draws = drawn(count, seed)
    draws[:, 11] = 1
    return draws


@pytest.mark.parametrize("cut_out", [False, True])
def test_a_novel_view_is_that_of_a_camera_that_moved(cut_out):
    world, draws = box_world(8, (48, 64)), moving(8)
    if cut_out:  # a board before the wall, behind which the frame shows nothing
        world.depth[:, 12:36, 20:44] = 1.2
    batch = examples_of(world).augmented(draws, **STILL, **NOVEL)
    travel, look = 0.3 * draws[:, 12:15].double(), 8 * draws[:, 15:17]
    points = torch.linalg.solve(batch.poses.double(), torch.nn.functional.pad(
        batch.points.double(), (0, 0, 0, 0, 0, 1), value=1).flatten(2))[:, :3]  # fmt: skip
    seen = batch.intrinsics.double() @ augmentation.turn(look).double() @ (points - travel[:, :, None])
    pixels = (seen[:, :2] / seen[:, 2:]).unflatten(2, (48, 64))
    rows, columns = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    wrong = (pixels - torch.stack([columns, rows])).norm(dim=1, keepdim=True)[batch.mask]
    moved = (batch.pixels - torch.stack([columns, rows])).norm(dim=1, keepdim=True)[batch.mask]
    assert 0.6 < batch.mask.float().mean() < 0.95 and moved.mean() > 3
    assert wrong.mean() < 0.05 and wrong.quantile(0.99) < 0.5 and wrong.max() < (4 if cut_out else 0.5)


def test_colours_of_a_novel_view_match_their_points():
    batch = examples_of(box_world(8, (96, 128))).augmented(moving(8), **FAR, **NOVEL, colour=0)
    low, high = (torch.tensor(bound, dtype=torch.float32)[:, None, None] for bound in (LOW, HIGH))
    wrong = ((batch.points - low) / (high - low) - batch.images).abs().amax(1, keepdim=True)[batch.mask]
    assert float(wrong.max()) < 0.03 and batch.mask.float().mean() > 0.5


def test_a_quarter_of_the_cameras_stay(half_labelled):
    draws = drawn(COUNT)
    draws[:, 11] = torch.tensor([-0.51, -0.49, 1])
    plain, novel = half_labelled.augmented(draws), half_labelled.augmented(draws, **NOVEL)
    difference = (plain.pixels - novel.pixels).abs().amax((1, 2, 3))
    assert difference[0] < 1e-3 and (difference[1:] > 0.5).all()
    assert torch.equal(plain.mask[0], novel.mask[0])


def test_a_hole_in_the_labels_does_not_hide_the_image():
    world = box_world(4, (24, 32))
    mask = np.ones(world.depth.shape, bool)
    mask[:, 8:16, 10:20] = False
    whole = examples_of(world).augmented(moving(4), **STILL, **NOVEL)
    holed = examples_of(world, mask).augmented(moving(4), **STILL, **NOVEL)
    assert (whole.mask & ~holed.mask).any() and (holed.mask & ~whole.mask).float().mean() < 0.02
    assert (whole.images - holed.images).abs().mean() < 0.02
    assert torch.isfinite(holed.images).all()


@pytest.mark.parametrize("nothing", [0.0, 1e6, float("nan")])
def test_depth_without_a_label_plays_no_part(nothing):
    world = box_world(4, (24, 32))
    mask = np.random.default_rng(1).random(world.depth.shape) < 0.8
    depth = np.where(mask, world.depth, np.float32(nothing))
    expected = examples_of(world, mask).augmented(moving(4), **FAR, **NOVEL)
    found = examples_of(world._replace(depth=depth), mask).augmented(moving(4), **FAR, **NOVEL)
    assert torch.equal(found.mask, expected.mask) and torch.equal(found.images, expected.images)
    assert torch.equal(found.points[found.mask.expand_as(found.points)],
                       expected.points[expected.mask.expand_as(expected.points)])  # fmt: skip


def test_a_frame_without_any_label_is_a_view_without_any(world):
    batch = examples_of(world, np.zeros(world.depth.shape, bool)).augmented(moving(COUNT), **FAR, **NOVEL)
    assert not batch.mask.any() and torch.isfinite(batch.images).all()


@given(st.floats(0.5, 10), st.tuples(*[st.floats(-0.3, 0.3)] * 2))
def test_flow_before_a_wall_closed_form(depth, travel):
    intrinsics = torch.tensor([[[30.0, 0, 16], [0, 40, 12], [0, 0, 1]]])
    wall, moved = torch.full((1, 1, 24, 32), depth), torch.tensor([[*travel, 0]])
    flow = augmentation.view_flow(wall, intrinsics, moved, torch.eye(3)[None])
    expected = -torch.tensor([30 * travel[0] / depth / 16, 40 * travel[1] / depth / 12])
    torch.testing.assert_close(flow, expected[None, :, None, None].expand(1, 2, 24, 32), atol=1e-4, rtol=1e-4)


def test_flow_of_a_turn_does_not_depend_on_depth():
    intrinsics = torch.tensor([[[30.0, 0, 16], [0, 30, 12], [0, 0, 1]]])
    sideways = augmentation.turn(torch.tensor([[5.0, 0.0]]))
    near, far = (augmentation.view_flow(torch.full((1, 1, 24, 32), depth), intrinsics, torch.zeros(1, 3), sideways)
                 for depth in (1.0, 7.0))  # fmt: skip
    torch.testing.assert_close(near, far, atol=1e-4, rtol=0)
    centre = near[0, 0, 11:13, 15:17].mean() * 16
    assert abs(float(centre)) == pytest.approx(30 * np.tan(np.radians(5)), rel=0.01)
    assert near[0, 1, 11:13, 15:17].mean().abs() < 0.01


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_turns_are_rotations_by_their_angle(about_y, about_x):
    found = augmentation.turn(torch.tensor([[about_y, about_x]], dtype=torch.float64))[0].numpy()
    assert_allclose(found @ found.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(found) == pytest.approx(1)
    assert np.trace(found) == pytest.approx(1 + 2 * np.cos(np.radians(np.hypot(about_y, about_x))), abs=1e-9)


@given(st.integers(0, 50), st.floats(0.05, 1), st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_holes_in_the_depth_are_filled_from_around_them(seed, share, size):
    generator = torch.Generator().manual_seed(seed)
    depth = 1 + 5 * torch.rand(2, 1, *size, generator=generator)
    known = (torch.rand(2, 1, *size, generator=generator) < share).float()
    known[..., 0, 0] = 1
    found = augmentation.filled(depth * known, known)
    for one, before, there in zip(found, depth, known > 0):
        assert torch.equal(one[there], before[there])
        assert one.min() >= before[there].min() - 1e-4 and one.max() <= before[there].max() + 1e-4


# World points


@settings(max_examples=30)
@given(st.tuples(*[st.floats(-3, 3)] * 3), st.tuples(*[st.floats(-5, 5)] * 3), st.floats(0.1, 20))
def test_world_points_closed_form(axis_angle, place, depth):
    pose, intrinsics = np.eye(4), np.array([[50.0, 0, 11], [0, 40, 7], [0, 0, 1]])
    pose[:3, :3], pose[:3, 3] = rotation(np.array(axis_angle)), place
    pixels = np.random.default_rng(0).uniform(-5, 25, (1, 2, 4, 6))
    rays = np.stack([(pixels[0, 0] - 11) / 50, (pixels[0, 1] - 7) / 40, np.ones((4, 6))])
    expected = np.einsum("ij,jhw->ihw", pose[:3, :3], depth * rays) + pose[:3, 3, None, None]
    tensors = (torch.tensor(array) for array in (pixels, np.full((1, 1, 4, 6), depth), intrinsics[None], pose[None]))
    assert_allclose(augmentation.world_points(*tensors)[0], expected, atol=1e-9)


# Arrays from the disk


@pytest.fixture
def kept(world, tmp_path):
    """The world's arrays in a file, mapped read-only."""
    arrays = {"image": world.image, "depth": world.depth, "mask": world.depth > 2.5,
              "confidence": world.depth.astype(np.float16), "poses": world.poses}  # fmt: skip
    artefacts.write_tensors(tmp_path / "kept.safetensors", arrays)
    mapped = artefacts.read_tensors(tmp_path / "kept.safetensors")
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in mapped.values())
    return mapped, arrays, tmp_path / "kept.safetensors"


def of_kept(mapped, intrinsics):
    arrays = [mapped[name] for name in ("image", "depth", "mask", "confidence")]
    return Examples.of(*arrays, intrinsics, mapped["poses"])


PARTS = (..., slice(1, 3), slice(2, None), slice(None, None, 2), slice(None, None, -1))


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_parts_of_mapped_arrays_are_read_right(world, kept, part):
    mapped, arrays, _ = kept
    examples = of_kept({name: array[part] for name, array in mapped.items()}, world.intrinsics)
    assert_allclose(examples.images, arrays["image"][part])
    assert_allclose(examples.depth, arrays["depth"][part])
    assert (examples.mask.numpy() == arrays["mask"][part]).all()
    assert_allclose(examples.confidence, arrays["confidence"][part])
    assert_allclose(examples.poses, arrays["poses"][part], rtol=1e-6)
    assert_allclose(examples.batch().points.permute(0, 2, 3, 1), world.points[part], atol=2e-5)


def test_mapped_arrays_are_read_right(world, kept):
    mapped, arrays, _ = kept
    examples = of_kept(mapped, world.intrinsics)
    for name, tensor in (("image", examples.images), ("depth", examples.depth), ("mask", examples.mask),
                         ("confidence", examples.confidence)):  # fmt: skip
        assert (tensor.numpy() == arrays[name]).all()
    assert_allclose(examples.poses, arrays["poses"], rtol=1e-6)


def test_nothing_is_ever_written_to_the_file(world, kept):
    mapped, arrays, path = kept
    before = path.read_bytes()
    examples = of_kept(mapped, world.intrinsics)
    for tensor in (examples.images, examples.depth, examples.mask):
        tensor.zero_()
    examples.augmented(drawn(COUNT))
    assert path.read_bytes() == before
    assert_allclose(artefacts.read_tensors(path)["depth"], arrays["depth"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory map from /proc")
def test_mapped_arrays_are_used_without_a_copy(world, kept):
    mapped, _, path = kept
    examples = of_kept(mapped, world.intrinsics)
    ranges = []
    for line in open("/proc/self/maps"):
        if line.rstrip().endswith(os.fspath(path)):
            ranges.append([int(end, 16) for end in line.split()[0].split("-")])
    for tensor in (examples.images, examples.depth, examples.mask, examples.confidence):
        assert any(low <= tensor.data_ptr() < high for low, high in ranges)


def test_single_precision_and_own_arrays(world):
    examples = examples_of(world)
    assert world.poses.dtype == world.intrinsics.dtype == np.float64
    assert examples.poses.dtype == examples.intrinsics.dtype == examples.depth.dtype == torch.float32
    assert examples.images.dtype == torch.uint8 and examples.mask.dtype == torch.bool
    assert examples.intrinsics.shape == (COUNT, 3, 3)
