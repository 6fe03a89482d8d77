"""Error figures against closed forms, sizes counted by hand, predictions and tables that survive the disk."""

import numpy as np
import pytest
import torch
from conftest import box_world, rotation
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose

from kdutils import evaluation, geometry, students, training
from kdutils.settings import ARMS
from kdutils.students import Prediction
from kdutils.teachers import DepthTeacher, PairPointmaps

pytestmark = pytest.mark.usefixtures("one_thread")
VECTOR = st.tuples(*[st.floats(-2, 2)] * 3).map(np.array)


def scene(seed=0, shape=(2, 6, 7)):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(*shape, 3)), rng.random(shape) < 0.6


@given(VECTOR, st.integers(0, 100))
def test_constant_offset(offset, seed):
    truth, mask = scene(seed)
    length = np.linalg.norm(offset)
    found = evaluation.point_errors(truth + offset, truth, mask)
    assert found["mse"] == pytest.approx(length**2 / 3, abs=1e-12)
    assert [found[name] for name in ("rmse", "median", "p90")] == pytest.approx([length] * 3, abs=1e-12)
    assert found["pixels"] == mask.sum()


def test_percentiles_and_bands_of_known_distances():
    truth = np.zeros((1, 1, 101, 3))
    predicted = truth.copy()
    predicted[0, 0, :, 1] = np.arange(101) / 500 + 0.0001  # 0 to 20 cm in steps of 2 mm, and a tenth
    found = evaluation.point_errors(predicted, truth, np.ones((1, 1, 101), bool))
    assert found["median"] == pytest.approx(0.1001) and found["p90"] == pytest.approx(0.1801)
    assert found["within_5cm"] == pytest.approx(25 / 101) and found["within_10cm"] == pytest.approx(50 / 101)


def test_pixels_outside_the_mask_do_not_count():
    truth, mask = scene()
    predicted = np.where(mask[..., None], truth, np.nan)
    assert evaluation.point_errors(predicted, truth, mask)["rmse"] == 0


def test_single_precision_does_not_blur_small_errors():
    truth = np.full((1, 500, 500, 3), 30, np.float32)
    predicted = truth + np.float32(0.001)
    found = evaluation.point_errors(predicted, truth, np.ones((1, 500, 500), bool))
    assert found["mse"] == pytest.approx(float(predicted.flat[0] - truth.flat[0]) ** 2, rel=1e-9)


def test_empty_mask_is_an_error():
    truth, mask = scene()
    with pytest.raises(ValueError, match="mask is empty"):
        evaluation.point_errors(truth, truth, mask & False)


@pytest.mark.parametrize("distance, expected", [(0.0, True), (0.049, True), (0.18, False), (3.0, False)])
def test_a_place_is_shown_where_a_training_label_is_near(distance, expected):
    rng = np.random.default_rng(0)
    taught = rng.uniform(-5, 5, (2, 3, 4, 3))
    masks = np.zeros((2, 3, 4), bool)
    masks[1, 2, 3] = True
    ways = rng.normal(size=(7, 5, 5, 3))
    points = taught[1, 2, 3] + distance * ways / np.linalg.norm(ways, axis=-1, keepdims=True)
    assert (evaluation.shown(points, taught, masks) == expected).all()


def test_no_label_shows_nothing():
    points = np.zeros((1, 2, 2, 3))
    assert not evaluation.shown(points, points, np.zeros((1, 2, 2), bool)).any()


@given(arrays(np.float64, (1, 4, 4, 3), elements=st.floats(-100, 100)), st.integers(0, 15))
def test_every_place_shows_itself(points, chosen):
    masks = np.zeros((1, 16), bool)
    masks[0, chosen] = True
    assert evaluation.shown(points, points, masks.reshape(1, 4, 4))[masks.reshape(1, 4, 4)].all()


def test_mean_point_baseline_is_the_variance_of_the_room():
    truth, mask = scene()
    points = truth[mask]
    found = evaluation.mean_point_errors(points, truth, mask)
    assert found["mse"] == pytest.approx(points.var(0).mean())
    far = evaluation.mean_point_errors(points + [3, 0, 0], truth, mask)
    assert far["mse"] == pytest.approx(points.var(0).mean() + 3)


WORLD = box_world(3)
BOTH_WAYS = np.array([[0, 1], [1, 0], [0, 2], [2, 0]])


def test_mean_point_of_many_points_is_not_rounded_away():
    many = np.full((1_000_000, 3), 100.1, np.float32)  # in single precision their sum stands still at times
    truth = many[:6].reshape(1, 2, 3, 3)
    assert evaluation.mean_point_errors(many, truth, np.ones((1, 2, 3), bool))["mse"] < 1e-9


def perfect(scale=1.0):
    """A teacher's answers without error, at any scale, and the arguments that go with them."""
    said = DepthTeacher(WORLD)(BOTH_WAYS)
    said = said._replace(points_i=scale * said.points_i, points_j=scale * said.points_j)
    return said, (geometry.unproject(WORLD.depth, WORLD.intrinsics), None, WORLD.poses)


@given(st.floats(0.1, 10))
def test_a_perfect_teacher_has_no_error_at_any_scale(scale):
    said, truth = perfect(scale)
    found = evaluation.pair_errors(said, *truth)
    assert found["pairs"] == 4
    assert max(found[name] for name in ("depth", "points", "sure", "unsure")) < 1e-5
    assert found["rotation"] < 0.01


@given(st.floats(0.5, 20), st.integers(0, 100))
def test_a_turned_second_view_is_a_rotation_error_and_no_depth_error(degrees, seed):
    said, truth = perfect()
    axis = np.random.default_rng(seed).normal(size=3)
    turn = rotation(np.radians(degrees) * axis / np.linalg.norm(axis))
    points_j = said.points_j.copy()
    points_j[0] = said.points_j[0] @ turn.T  # about view 1's camera, in the answer to (0, 1) alone
    one_way = PairPointmaps(*(array[:2] for array in said._replace(points_j=points_j)))
    found = evaluation.pair_errors(one_way, *truth)
    # Of the two motions that are read off, only the one of the turned answer is wrong: their median is half of it.
    assert found["rotation"] == pytest.approx(degrees / 2, abs=0.02)
    assert found["depth"] < 1e-5 < found["unsure"]


def test_errors_of_pairs_are_shares_of_the_true_distance():
    said, truth = perfect()
    stretched = said.points_i.copy()
    stretched[:, ::2] *= 1.2  # every other row too far: the scale that fits best is still 1
    found = evaluation.pair_errors(said._replace(points_i=stretched), *truth)
    assert found["sure"] + found["unsure"] == pytest.approx(0.1, rel=0.05)  # two halves, mean 0.05
    all_rows = said._replace(points_i=1.2 * said.points_i)
    assert evaluation.pair_errors(all_rows, *truth)["points"] == pytest.approx(11 / 120)  # scaled to the middle


def test_confidence_that_ranks_errors_tells_sure_from_unsure():
    said, truth = perfect()
    wrong = np.random.default_rng(0).random(said.confidence_i.shape) < 0.5
    points = np.where(wrong[..., None], 1.3, 1) * said.points_i
    ranked = np.where(wrong, 1.1, 4.0)
    said = said._replace(points_i=points, confidence_i=ranked, confidence_j=np.full_like(ranked, 3.0))
    found = evaluation.pair_errors(said, *truth)
    assert found["sure"] < 1e-5 < 0.1 < found["unsure"]


def test_pixels_without_truth_and_pairs_without_their_reverse():
    said, (own, _, poses) = perfect()
    known = np.zeros(WORLD.depth.shape, bool)
    known[:, 5:9, 5:9] = True
    spoilt = np.where(known[BOTH_WAYS[:, 0]][..., None], said.points_i, 50)
    alone = PairPointmaps(*(array[[0, 2]] for array in said._replace(points_i=spoilt)))
    found = evaluation.pair_errors(alone, own, known, poses)
    assert found["points"] < 1e-5 and np.isnan(found["rotation"])


def test_size_of_the_cnn_by_hand():
    student, _ = students.build(ARMS["cnn-scratch"], (96, 128))
    layers = [layer for layer in student.backbone.modules() if isinstance(layer, torch.nn.Conv2d)]
    widths, stride, hidden = (3, *(layer.out_channels for layer in layers)), 16, 256
    body = sum(25 * a * b + 2 * b for a, b in zip(widths, widths[1:]))  # 5x5 without bias, and the norm's two
    head = widths[-1] * hidden + 2 * hidden + (hidden + 1) * 3 * (stride // 4) ** 2  # to a quarter of the resolution
    refine = 3 * 3 * 9 + 3
    found = evaluation.size_of(student)
    assert found["parameters"] == body + head + refine
    buffers = 4 * (2 * sum(widths[1:]) + 2 * hidden + 3 + 1) + 8 * len(widths)  # norms' statistics, place, and counters
    assert found["megabytes"] == pytest.approx((4 * found["parameters"] + buffers) / 1e6)
    assert found["half_megabytes"] == found["megabytes"] / 2


def test_size_is_that_of_the_file(tmp_path):
    student, _ = students.build(ARMS["vit32-scratch"], (96, 128))
    training.save_student(student, tmp_path / "student.safetensors")
    written = (tmp_path / "student.safetensors").stat().st_size / 1e6
    assert evaluation.size_of(student)["megabytes"] == pytest.approx(written, rel=2e-3)  # but for the header


def test_latency_is_that_of_one_image():
    class Slow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.shapes = torch.nn.Parameter(torch.ones(1)), []

        def forward(self, image):
            self.shapes.append(tuple(image.shape))
            evaluation.time.sleep(0.02)
            return Prediction(image, None)

    slow = Slow()
    assert 20 <= evaluation.latency(slow, (8, 10), repeats=3) < 200
    assert slow.shapes == [(1, 3, 8, 10)] * 3


def test_machine_is_named():
    assert f"torch {torch.__version__}" in evaluation.machine(torch.device("cpu"))
    assert "1 threads" in evaluation.machine(torch.device("cpu"))
    assert evaluation.processor().strip()


@pytest.mark.parametrize(("arm", "channels"), [("cnn-scratch", 3), ("anchornet-scratch", 4)])
def test_predictions_survive_half_precision(tmp_path, arm, channels):
    student, _ = students.build(ARMS[arm], (32, 48))
    student.place(torch.randn(500, 3) + torch.tensor([40.0, -7, 2])).eval()
    images = torch.randint(0, 256, (5, 32, 48, 3), dtype=torch.uint8)
    evaluation.keep_predictions(student, images, tmp_path / "p.safetensors")
    said, log_scale = training.predict(student, images)
    said = said.permute(0, 2, 3, 1).numpy()
    found, scale = evaluation.read_predictions(tmp_path / "p.safetensors")
    offset = np.abs(said - student.centre.numpy())
    assert found.dtype == np.float32 and found.shape == (5, 32, 48, 3)
    assert (tmp_path / "p.safetensors").stat().st_size < 2.1 * channels * 5 * 32 * 48 + 500
    assert (np.abs(found - said) <= offset * 2**-11 + 1e-5).all()  # half precision of the offset, not of 40 m
    if log_scale is None:
        assert scale is None and channels == 3
    else:
        assert scale.dtype == np.float32 and channels == 4
        assert_allclose(scale, log_scale[:, 0], atol=2e-3, rtol=1e-3)
