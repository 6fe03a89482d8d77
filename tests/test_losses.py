"""The losses against closed forms, at what is masked, and where a gradient could break."""

import math

import numpy as np
import pytest
import torch
from conftest import box_world, examples_of
from hypothesis import given
from hypothesis import strategies as st

from kdutils import losses
from kdutils.augmentation import DRAWS
from kdutils.settings import ABLATION_LOSSES, ARMS, RECIPES
from kdutils.students import Prediction

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = st.floats(1e-3, 5)
OF_LABELS = [name for name in losses.LOSSES if name != "ray"]


@pytest.fixture(scope="module")
def batch():
    """Two augmented views of a box room; half of the pixels have a label, of confidence 1, 2 or 3."""
    world = box_world(2, (16, 20))
    rng = np.random.default_rng(0)
    confidence = rng.integers(1, 4, world.depth.shape).astype(np.float32)
    examples = examples_of(world, rng.random(world.depth.shape) < 0.5, confidence)
    return examples.augmented(2 * torch.rand(2, DRAWS, generator=torch.Generator().manual_seed(0)) - 1, rotation=15)


def off_by(batch, length, log_scale=None):
    """A prediction that lies ``length`` metres (a number, or one for each pixel) beside every label."""
    direction = torch.tensor([2.0, -1, 2])[:, None, None] / 3
    scale = None if log_scale is None else torch.full_like(batch.confidence, log_scale)
    return Prediction(batch.points + length * direction, scale)


def value(name, prediction, batch):
    return float(losses.choose(name)(prediction, batch))


def to_pixels(batch, points):
    """Where world points ``(B, 3, H, W)`` appear, worked out in double precision: pixels and depth."""
    poses, intrinsics = batch.poses.double().numpy(), batch.intrinsics.double().numpy()
    from_centre = points.double().numpy() - poses[:, :3, 3, None, None]
    seen = np.einsum("bij,bjhw->bihw", intrinsics @ poses[:, :3, :3].swapaxes(1, 2), from_centre)
    return seen[:, :2] / seen[:, 2:], seen[:, 2:]


# Closed forms


@given(LENGTH)
def test_a_constant_offset_costs(batch, length):
    prediction = off_by(batch, length)
    assert value("mse", prediction, batch) == pytest.approx(length**2 / 3, rel=1e-3, abs=1e-6)
    assert value("l1", prediction, batch) == pytest.approx(length, rel=1e-3, abs=1e-4)
    assert value("confidence", prediction, batch) == pytest.approx(length, rel=1e-3, abs=1e-4)
    huber = length**2 / 0.2 if length < 0.1 else length - 0.05
    assert value("huber", prediction, batch) == pytest.approx(huber, rel=2e-3, abs=1e-4)


def test_huber_has_no_step_at_its_threshold(batch):
    below, above = (value("huber", off_by(batch, length), batch) for length in (0.0999, 0.1001))
    assert 0 < above - below < 5e-4


@pytest.mark.parametrize("name", ["mse", "l1", "confidence", "huber"])
def test_the_truth_costs_nothing(batch, name):
    assert value(name, off_by(batch, 0.0), batch) < 2e-4


def test_losses_are_means_over_labelled_pixels(batch):
    length = torch.linspace(0.2, 3, batch.mask.numel()).view(batch.mask.shape)
    prediction, labelled, confidence = off_by(batch, length), length[batch.mask], batch.confidence[batch.mask]
    assert 0.2 < batch.mask.float().mean() < 0.6
    assert value("mse", prediction, batch) == pytest.approx(float((labelled**2).mean()) / 3, rel=1e-4)
    assert value("l1", prediction, batch) == pytest.approx(float(labelled.mean()), rel=1e-4)
    assert value("huber", prediction, batch) == pytest.approx(float(labelled.mean()) - 0.05, rel=1e-4)
    weighted = float((labelled * confidence).sum() / confidence.sum())
    assert value("confidence", prediction, batch) == pytest.approx(weighted, rel=1e-4)
    assert abs(weighted - float(labelled.mean())) > 1e-3


def test_a_pixel_weighs_by_its_confidence(batch):
    points = batch.points.clone().requires_grad_()
    losses.confidence(Prediction(points + 0.5, None), batch).backward()
    pull, labelled = points.grad.norm(dim=1, keepdim=True)[batch.mask], batch.confidence[batch.mask]
    torch.testing.assert_close(pull / labelled, torch.full_like(pull, float(1 / labelled.sum())), rtol=1e-3, atol=0)


# Laplace


@given(LENGTH)
def test_laplace_asks_for_the_distance_as_uncertainty(batch, length):
    there = math.log(length)
    scales = [there + step for step in (-1, -0.3, -0.1, 0, 0.1, 0.3, 1)]
    costs = [value("laplace", off_by(batch, length, scale), batch) for scale in scales]
    assert np.argmin(costs) == 3
    assert sorted(costs[:4], reverse=True) == costs[:4] and sorted(costs[3:]) == costs[3:]


def test_laplace_has_a_flat_place_where_the_uncertainty_is_the_distance(batch):
    length = torch.linspace(0.2, 3, batch.mask.numel()).view(batch.mask.shape)
    for shift, sign in ((0, 0), (0.2, 1), (-0.2, -1)):
        log_scale = (length.log() + shift).requires_grad_()
        losses.laplace(Prediction(off_by(batch, length).points, log_scale), batch).backward()
        slopes = log_scale.grad[batch.mask] * batch.mask.sum()
        assert (slopes.abs() < 1e-3).all() if sign == 0 else (sign * slopes > 0.01).all()


def test_laplace_is_the_likelihood_of_its_distribution_beside_the_distance(batch):
    def apart(length, one, other):
        first, second = (value("laplace", off_by(batch, length, scale), batch) for scale in (one, other))
        return first - second

    def likelihood(length, scale):
        return length * math.exp(-scale) + scale

    weight = apart(1.0, 1.0, 0.0) / (likelihood(1, 1) - likelihood(1, 0))
    assert weight > 0
    for length, one, other in ((0.3, -2.0, 0.5), (2.0, 1.0, -1.0), (0.05, -3.0, -1.0)):
        expected = weight * (likelihood(length, one) - likelihood(length, other))
        assert apart(length, one, other) == pytest.approx(expected, rel=1e-3)


def test_laplace_gives_up_no_pixel(batch):
    points = off_by(batch, 2.0).points.requires_grad_()
    losses.laplace(Prediction(points, torch.full_like(batch.confidence, 20.0)), batch).backward()
    pull = points.grad.norm(dim=1, keepdim=True)[batch.mask] * batch.mask.sum()
    assert (pull > 0.5).all()


def test_laplace_needs_a_student_with_uncertainty(batch):
    with pytest.raises(ValueError, match="'laplace' needs a student that predicts its uncertainty"):
        losses.laplace(off_by(batch, 1.0), batch)
    with pytest.raises(ValueError, match="uncertainty"):
        losses.choose("l1+0.1*laplace")(off_by(batch, 1.0), batch)


# Reprojection


def test_the_truth_reprojects_to_its_pixel_in_augmented_views(batch):
    height, width = batch.images.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    moved = (batch.pixels - torch.stack([columns, rows])).norm(dim=1, keepdim=True)[batch.mask]
    assert moved.mean() > 0.5  # the views are not as they were taken
    assert value("reprojection", off_by(batch, 0.0), batch) < 0.02


@given(st.floats(0.1, 4))
def test_reprojection_says_nothing_of_the_distance_along_the_ray(batch, share):
    camera = batch.poses[:, :3, 3, None, None]
    prediction = Prediction(camera + share * (batch.points - camera), None)
    assert value("reprojection", prediction, batch) < 0.02


def test_reprojection_is_the_distance_in_pixels_bounded(batch):
    points = off_by(batch, 0.3).points
    pixels, depth = to_pixels(batch, points)
    mask = batch.mask.numpy()
    assert (depth[mask] > losses.NEAREST).all()
    error = np.linalg.norm(pixels - batch.pixels.numpy(), axis=1, keepdims=True)[mask]
    expected = (losses.FARTHEST * np.tanh(error / losses.FARTHEST)).mean()
    assert error.max() > 1
    assert value("reprojection", Prediction(points, None), batch) == pytest.approx(expected, rel=1e-2)


def test_reprojection_never_costs_more_than_its_bound(batch):
    far = batch.points + 1e4 * batch.poses[:, :3, :1, None]  # to the camera's right
    cost = value("reprojection", Prediction(far, None), batch)
    assert 0.99 * losses.FARTHEST < cost <= losses.FARTHEST


@pytest.mark.parametrize("depth", [0.0, -2.0, 1e-3])
def test_points_behind_the_camera_do_not_count_and_break_no_gradient(batch, depth):
    camera, forward = batch.poses[:, :3, 3, None, None], batch.poses[:, :3, 2, None, None]
    behind = batch.mask & (torch.arange(20) < 10)
    points = torch.where(behind, camera + depth * forward, batch.points + 0.2).requires_grad_()
    cost = losses.reprojection(Prediction(points, None), batch)
    cost.backward()
    assert torch.isfinite(points.grad).all() and not points.grad[behind.expand_as(points)].any()
    in_front = batch._replace(mask=batch.mask & ~behind)
    assert behind.any() and in_front.mask.any()
    assert float(cost.detach()) == pytest.approx(value("reprojection", Prediction(points.detach(), None), in_front))


def test_reprojection_pulls_towards_the_ray(batch):
    points = off_by(batch, 0.3).points.requires_grad_()
    before = losses.reprojection(Prediction(points, None), batch)
    before.backward()
    after = losses.reprojection(Prediction(points - points.grad, None), batch)
    assert float(after.detach()) < float(before.detach())


# The pixel's ray


def test_the_distance_along_the_ray_costs_nothing(batch):
    camera = batch.poses[:, :3, 3, None, None]
    for share in (0.2, 1, 5):
        assert value("ray", Prediction(camera + share * (batch.points - camera), None), batch) < 1e-3


@given(st.floats(0.01, 20))
def test_ray_is_the_distance_from_it(batch, length):
    camera = batch.poses[:, :3, 3, None, None]
    beside = torch.linalg.cross(batch.points - camera, batch.poses[:, :3, 0, None, None].expand_as(batch.points), dim=1)
    prediction = Prediction(batch.points + length * beside / beside.norm(dim=1, keepdim=True), None)
    assert value("ray", prediction, batch) == pytest.approx(length, rel=1e-3)


def test_rays_need_no_labels(batch):
    prediction = off_by(batch, 0.5)
    nothing = batch._replace(points=batch.points * math.nan, mask=batch.mask & False)
    assert value("ray", prediction, nothing) == value("ray", prediction, batch) > 0.1


def test_what_a_view_shows_beyond_its_frame_has_no_ray(batch):
    left = torch.arange(20) < 10
    points = torch.where(left, 1e6, off_by(batch, 0.5).points).requires_grad_()
    outside = batch._replace(pixels=torch.where(left, 21.0, batch.pixels))
    losses.ray(Prediction(points, None), outside).backward()
    assert not points.grad[..., :10].any() and points.grad[..., 10:].any()


def test_behind_the_camera_the_rays_beginning_counts(batch):
    camera, forward = batch.poses[:, :3, 3, None, None], batch.poses[:, :3, 2, None, None]
    points = (camera - 2 * forward).expand_as(batch.points).clone().requires_grad_()
    cost = losses.ray(Prediction(points, None), batch)
    cost.backward()
    assert 2 < float(cost.detach()) < 2.2 and torch.isfinite(points.grad).all()


# What is masked


@pytest.mark.parametrize("name", [*OF_LABELS, "laplace+0.002*reprojection"])
@pytest.mark.parametrize("nothing", [math.nan, math.inf])
def test_labels_that_are_no_numbers_count_nowhere(batch, name, nothing):
    holes = torch.where(batch.mask, batch.points, nothing)
    confidence = torch.where(batch.mask, batch.confidence, nothing)
    clean, gradients, costs = off_by(batch, 0.5, -1.0), [], []
    for labels in (batch, batch._replace(points=holes, confidence=confidence)):
        points, log_scale = clean.points.clone().requires_grad_(), clean.log_scale.clone().requires_grad_()
        cost = losses.choose(name)(Prediction(points, log_scale), labels)
        cost.backward()
        costs.append(float(cost.detach()))
        gradients.append(torch.cat([part.grad if part.grad is not None else torch.zeros_like(part)
                                    for part in (points, log_scale)], 1))  # fmt: skip
    assert math.isfinite(costs[0]) and costs[0] > 0 and costs[1] == costs[0]
    assert torch.equal(*gradients) and torch.isfinite(gradients[0]).all()
    assert not gradients[1][(~batch.mask).expand_as(gradients[1])].any()


@pytest.mark.parametrize("name", OF_LABELS)
def test_a_batch_without_labels_costs_nothing(batch, name):
    prediction = Prediction(batch.points.clone().requires_grad_(), torch.zeros_like(batch.confidence))
    cost = losses.choose(name)(prediction, batch._replace(mask=batch.mask & False))
    cost.backward()
    assert float(cost.detach()) == 0 and not prediction.points.grad.any()


def test_masked_mse_of_a_constant_offset():
    points = torch.rand(2, 3, 4, 5)
    predicted = points + torch.tensor([1.0, 2, 3])[:, None, None]
    mask = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    mask[0, 0, 1, 2] = mask[1, 0, 3, 3] = True
    assert float(losses.masked_mse(predicted, points, mask)) == pytest.approx(14 / 3)


def test_masked_mse_looks_at_labelled_pixels_only():
    points, mask = torch.zeros(1, 3, 2, 2), torch.tensor([[[[True, True], [True, False]]]])
    predicted = torch.zeros(1, 3, 2, 2, requires_grad=True)
    points[..., 1, 1], points[0, 0, 0, 0] = 1e6, 3
    loss = losses.masked_mse(predicted, points, mask)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(9 / 9)
    assert (predicted.grad != 0).nonzero().tolist() == [[0, 0, 0, 0]]


def test_masked_mse_without_labels_is_zero():
    assert float(losses.masked_mse(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2) > 0)) == 0


# By name


def test_a_sum_is_chosen_with_its_weights(batch):
    prediction = off_by(batch, 0.3)
    parts = {name: value(name, prediction, batch) for name in ("mse", "l1", "reprojection")}
    chosen = value("l1+0.01*reprojection + 3*mse", prediction, batch)
    assert chosen == pytest.approx(parts["l1"] + 0.01 * parts["reprojection"] + 3 * parts["mse"])
    assert value("2*l1", prediction, batch) == pytest.approx(2 * parts["l1"])


@pytest.mark.parametrize("name", ["l2", "", "l1+", "l1+0.1*sine", "0.5", "L1"])
def test_unknown_losses_are_an_error_that_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="no such loss.*mse, l1, huber, confidence, laplace, reprojection"):
        losses.choose(name)


def test_every_loss_of_the_settings_is_known():
    named = {recipe.loss for recipe in RECIPES.values()} | {arm.loss for arm in ARMS.values() if arm.loss}
    assert named >= set(ABLATION_LOSSES)
    for name in named:
        assert callable(losses.choose(name))


def test_only_laplace_needs_uncertainty():
    assert {name for name in losses.LOSSES if losses.needs_uncertainty(name)} == {"laplace"}
    assert losses.needs_uncertainty("laplace+0.002*reprojection") and not losses.needs_uncertainty("l1+mse")
