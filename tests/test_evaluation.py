"""Error figures against closed forms, sizes counted by hand, predictions and tables that survive the disk."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import box_world, rotation
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from kdutils import artefacts, evaluation, geometry, students, training
from kdutils.settings import ABLATION_ARMS, ARMS, Study
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


def test_mean_point_baseline_is_the_variance_of_the_room():
    truth, mask = scene()
    points = truth[mask]
    found = evaluation.mean_point_errors(points, truth, mask)
    assert found["mse"] == pytest.approx(points.var(0).mean())
    far = evaluation.mean_point_errors(points + [3, 0, 0], truth, mask)
    assert far["mse"] == pytest.approx(points.var(0).mean() + 3)


WORLD = box_world(3)
BOTH_WAYS = np.array([[0, 1], [1, 0], [0, 2], [2, 0]])


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


def metrics(arm, mse, weights="random"):
    against = {"mse": mse, "rmse": 0.1, "median": 0.25, "p90": 0.3, "within_5cm": 0.4, "within_10cm": 0.5, "pixels": 9}
    return {
        "scene": "kitchen", "teacher": "depth", "preset": "smoke", "seed": 0, "arm": arm, "weights": weights,
        "weights_note": "", "against_teacher": against, "against_depth": {**against, "mse": 2 * mse},
        "mean_point": {**against, "mse": 1.0}, "size": {"parameters": 7, "megabytes": 28e-6, "half_megabytes": 14e-6},
        "localisation": {"translation": 0.07, "rotation": 2.5, "within_5cm_5deg": 0.3, "within_2cm_2deg": 0.1},
        "training": {"steps": round(200 * ARMS[arm].budget), "batch": 8, "loss": ARMS[arm].loss or "mse"},
        "timing": {"latency_ms": 1 / 3, "localised_milliseconds": 6.0, "train_seconds": 2.0,
                   "train_images_per_second": 800.0},
        "machine": "a machine",
    }  # fmt: skip


MEASURED = {"vit16-frozen": 0.5, "cnn-scratch": 0.123456789, "anchornet-long": 0.05, "anchornet-scratch": 0.1,
            "original-mobilenet": 0.7, "original-cnn": 0.6, "mobilenet-frozen-l1": 0.02,
            "mobilenet-frozen-mse": 0.2, "mobilenet-frozen-eighth": 0.4}  # fmt: skip


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    study = Study("kitchen", "smoke", "depth", "cpu")
    for arm, mse in MEASURED.items():
        found = metrics(arm, mse, "shipped" if arm.startswith("mobilenet") else "random")
        if arm in ABLATION_ARMS:  # whose cameras are not looked for
            found["localisation"] = {}
            del found["timing"]["localised_milliseconds"]
        path = study.run_folder(arm) / "metrics.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(found))
    return evaluation.collect(study)


def test_collected_rows_follow_the_arms(rows):
    assert [row["arm"] for row in rows] == [arm for arm in ARMS if arm in MEASURED]
    assert rows[0]["mse"] == 0.123456789 and rows[0]["depth_mse"] == 2 * 0.123456789
    assert rows[0]["mean_point_mse"] == 1 and rows[0]["latency_ms"] == 1 / 3 and rows[0]["parameters"] == 7
    assert rows[0]["localised_rotation"] == 2.5 and rows[0]["train_images_per_second"] == 800
    assert evaluation.located(rows[0]) == {**metrics("cnn-scratch", 1)["localisation"], "milliseconds": 6.0}


def test_arms_without_the_pretraining_they_ask_for_are_marked(rows):
    marked = {"vit16-frozen", "original-mobilenet"}  # all others begin with random weights by their own choice
    assert {row["arm"] for row in rows if row["unpretrained"]} == marked
    assert {row["label"] for row in rows} == {arm + " (random weights)" * (arm in marked) for arm in MEASURED}


def test_tables_agree(rows, tmp_path):
    evaluation.write_table(rows, tmp_path / "results")
    kept = json.loads((tmp_path / "results.json").read_text())
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert kept == rows and len(table) == len(rows)
    for short, row in zip(table, rows):
        assert {name for name, text in short.items() if text} <= set(row)
        assert ("localised_rotation" in row) == bool(short["localised_rotation"]) == (row["arm"] not in ABLATION_ARMS)
        for name, text in short.items():
            if not text:
                assert name not in row
            elif isinstance(row[name], (int, float)):
                assert_allclose(float(text), row[name], rtol=1e-5)
            else:
                assert text == row[name]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_has_the_arms_proper_best_first(rows):
    names, rule, *lines = cells(evaluation.table(rows))
    assert len({len(line) for line in (names, rule, *lines)}) == 1
    proper = [row["label"] for row in sorted(rows, key=lambda row: row["mse"]) if row["arm"] not in ABLATION_ARMS]
    assert [line[1] for line in lines] == [*proper, "*mean point*"]
    assert lines[0][names.index("MSE m²")] == "0.0500" and lines[0][names.index("camera cm")] == "7"
    assert lines[0][names.index("within 5 cm, 5°")] == "30%" and lines[-1][names.index("MSE m²")] == "1.0000"
    with_paper = cells(evaluation.table(rows, with_paper=True))
    assert len(with_paper) == len(lines) + 4 and with_paper[-1][2] == "0.0012"


def test_ablations_compare_what_was_trained(rows):
    assert evaluation.ablation_groups(rows) == {  # none with itself alone
        "MobileNet frozen, half the budget: loss": {"mse": 0.2, "l1": 0.02},
        "MobileNet frozen: steps": {"25": 0.4, "100": 0.2},
        "AnchorNet: steps": {"200": 0.1, "1600": 0.05},
    }


def test_spread_is_over_the_seeds_that_were_trained(rows, monkeypatch):
    for seed, mse in (7, 0.3), (11, 0.2):
        study = Study("kitchen", "smoke", "depth", "cpu", seed)
        artefacts.write_json(study.run_folder("anchornet-scratch") / "metrics.json", metrics("anchornet-scratch", mse))
    by_arm = evaluation.over_seeds(Study("kitchen", "smoke", "depth", "cpu", 7))
    assert len(by_arm) == 6 and by_arm["anchornet-scratch"] == {"0": 0.1, "7": 0.3, "11": 0.2}
    names, _, *lines = cells(evaluation.spread(by_arm))
    assert len(names) == 4 and [line[0] for line in lines][:3] == ["anchornet-long", "cnn-scratch", "anchornet-scratch"]
    assert lines[2] == ["anchornet-scratch", "3", "0.2000", "0.1000 to 0.3000"]
    assert lines[0] == ["anchornet-long", "1", "0.0500", "0.0500 to 0.0500"]


def test_frozen_backbones_are_compared_where_they_were_pretrained(rows):
    base = {**rows[0], "loss": "mse"}
    frozen = {**base, "arm": "vit16-frozen", "mse": 0.2, "weights": "shipped", "unpretrained": False}
    random = {**base, "arm": "vit16-frozen-random", "mse": 0.5, "weights": "random", "unpretrained": False}
    asked = "What is a pretrained backbone worth, frozen?"
    found = {answer["question"]: answer["found"] for answer in evaluation.open_questions([frozen, random])}
    assert found[asked].endswith("(shipped weights): vit16 2.5x")
    untaught = evaluation.open_questions([{**frozen, "unpretrained": True}, random])
    assert asked not in {answer["question"] for answer in untaught}
    groups = evaluation.ablation_groups([frozen, random])
    assert groups["Frozen backbone: pretrained or random"] == {"vit16": 0.2, "vit16, random": 0.5}
    assert not evaluation.ablation_groups([{**frozen, "unpretrained": True}, random])


def test_open_questions_are_answered_by_the_rows(rows):
    # Neither the best localiser nor the one nearest to the depth camera has to have the least MSE.
    other = {"cnn-scratch": {"localised_translation": 0.06}, "vit16-frozen": {"depth_median": 0.01}}
    rows = [{**row, **other.get(row["arm"], {})} for row in rows]
    found = {answer["question"]: answer["found"] for answer in evaluation.open_questions(rows)}
    assert found["Can a student localise the camera?"] == (
        "kitchen: cnn-scratch median 6.0 cm, 2.5°, 30% within 5 cm and 5°"
    )
    assert found["How far are students from the true depth?"] == "kitchen: vit16-frozen (random weights) median 1.0 cm"
    assert found["Is a network made for the task better, at the same steps and start?"] == (
        "kitchen: anchornet-scratch 0.1000 m² against 0.1235 (cnn-scratch)"
    )
    peers = found["And better than the original study's networks?"]
    assert "original-cnn has 6.0 times its MSE" in peers
    assert "original-mobilenet (random weights) has 7.0 times" in peers
    assert found["Do other distillation losses help?"] == (
        "kitchen: after 100 steps l1 is best with 0.0200 m², the paper's MSE gives 0.2000"
    )
    worse = [{**row, "mse": 0.3} if row["arm"] == "mobilenet-frozen-l1" else row for row in rows]
    found_then = {answer["question"]: answer["found"] for answer in evaluation.open_questions(worse)}
    assert found_then["Do other distillation losses help?"] == (
        "kitchen: after 100 steps mse is best with 0.2000 m², l1 gives 0.3000"
    )
    two = evaluation.open_questions([*rows, *({**row, "scene": "office"} for row in rows)])
    assert len(two) == len(found) and all(answer["found"].count("office: ") >= 1 for answer in two)
