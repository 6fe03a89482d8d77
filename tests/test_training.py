"""Training: the loss, the augmentation, and runs that are repeatable, resumable and honest about failing."""

import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import HIGH, LOW, ROOT, box_world
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from kdutils import artefacts, students, training
from kdutils.settings import ARMS, PRESETS, Study

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = training.Plan(steps=100, batch=5, learning_rate=2e-3, weight_decay=0.01, validate_every=10, seed=3)


def examples_of(world, mask=None):
    mask = np.ones(world.depth.shape, bool) if mask is None else mask
    return training.Examples.of(world.image, world.points.astype(np.float32), mask)


def run(folder, seed=0, kill_at=None, change=None, arm="cnn-scratch", inputs="same", seen=None, **plan):
    """Train on a small box room; from step ``kill_at`` on the process kills itself, and ``seen`` collects the steps."""

    def progress(step, steps, text):
        if seen is not None:
            seen.append(step)
        if kill_at is not None and step >= kill_at:
            signal.raise_signal(signal.SIGKILL)

    study = Study("kitchen", "smoke", "depth", "cpu", seed)
    plan = {"size": (32, 48), "steps": 6, "batch": 4, "validate_every": 2, **plan}
    study.preset, study.workspace = replace(study.preset, **plan), folder
    world = box_world(24, study.preset.size)
    examples = examples_of(world)
    if change:
        change(examples)
    train, validation = training.split_validation(world.sequence, 0.2)
    return *training.run_arm(study, ARMS[arm], examples, train, validation, inputs, progress=progress), examples


def arm_folder(folder, arm="cnn-scratch"):
    return folder / "runs" / "kitchen" / "depth" / arm


def weights_of(folder, arm="cnn-scratch"):
    return (arm_folder(folder, arm) / "student.safetensors").read_bytes()


# The loss


def test_masked_mse_of_a_constant_offset():
    points = torch.rand(2, 3, 4, 5)
    predicted = points + torch.tensor([1.0, 2, 3])[:, None, None]
    mask = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    mask[0, 0, 1, 2] = mask[1, 0, 3, 3] = True
    assert float(training.masked_mse(predicted, points, mask)) == pytest.approx(14 / 3)


def test_masked_mse_looks_at_labelled_pixels_only():
    points, mask = torch.zeros(1, 3, 2, 2), torch.tensor([[[[True, True], [True, False]]]])
    predicted = torch.zeros(1, 3, 2, 2, requires_grad=True)
    points[..., 1, 1], points[0, 0, 0, 0] = 1e6, 3
    loss = training.masked_mse(predicted, points, mask)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(9 / 9)
    assert (predicted.grad != 0).nonzero().tolist() == [[0, 0, 0, 0]]


def test_masked_mse_without_labels_is_zero():
    assert float(training.masked_mse(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2) > 0)) == 0


# Examples


def test_examples_keep_what_is_where():
    world = box_world(3, (6, 8))
    mask = np.zeros(world.depth.shape, bool)
    mask[1, 2, 3] = mask[2, 4, 5] = True
    examples = examples_of(world, mask)
    assert len(examples) == 3 and examples.images.dtype == torch.uint8
    assert_allclose(examples.points[1, :, 2, 3], world.points[1, 2, 3], rtol=1e-6)
    assert examples.images[1, :, 2, 3].tolist() == world.image[1, 2, 3].tolist()
    assert_allclose(examples.labelled_points(), [world.points[1, 2, 3], world.points[2, 4, 5]], rtol=1e-6)
    assert len(examples[torch.tensor([2])].labelled_points()) == 1


@given(st.lists(st.integers(2, 30), min_size=2, max_size=5), st.floats(0.05, 0.5))
def test_validation_is_the_end_of_each_training_sequence(lengths, share):
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    train, validation = training.split_validation(sequence, share)
    assert sorted([*train, *validation]) == np.flatnonzero(sequence > 0).tolist()
    for name in range(1, len(lengths)):
        ours, held = (part[sequence[part] == name] for part in (train, validation))
        assert len(ours) and len(held) and ours.max() < held.min()
        assert abs(len(held) - share * lengths[name]) <= 1


# Augmentation

STRONG = {"rotation": 8, "zoom": 0.2, "shift": 0.1}


def augmented(examples, seed=0, **options):
    return training.augment(examples, torch.Generator().manual_seed(seed), **options)


def pixel_examples(count, height, width):
    """Images whose labels are their own pixel coordinates."""
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    points = torch.stack([u, v, torch.zeros_like(u)]).expand(count, 3, height, width)
    images = torch.zeros(count, 3, height, width, dtype=torch.uint8)
    return training.Examples(images, points, torch.ones(count, 1, height, width, dtype=torch.bool))


def test_augmented_colours_still_match_their_points():
    world = box_world(6, (96, 128))
    examples = examples_of(world)
    images, points, mask = augmented(examples, colour=0, **STRONG)
    low, high = (torch.tensor(bound, dtype=torch.float32)[:, None, None] for bound in (LOW, HIGH))
    wrong = ((points - low) / (high - low) - images).abs().amax(1, keepdim=True)[mask]
    assert float(wrong.max()) < 0.02 and mask.float().mean() > 0.7  # one pixel's step in colour is 0.015
    moved = (images - examples.images / 255).abs().mean((1, 2, 3))
    assert (moved > 0.01).all()


@pytest.mark.parametrize("size", [(60, 100), (100, 60)])
def test_augmentation_turns_zooms_and_shifts_but_never_mirrors(size):
    height, width = size
    centre = np.array([width / 2, height / 2])
    _, points, mask = augmented(pixel_examples(60, *size), seed=1, **STRONG)
    angles, zooms, shifts = [], [], []
    grid = pixel_examples(1, *size).points[0, :2].permute(1, 2, 0).numpy() - centre
    for found, seen in zip(points[:, :2].permute(0, 2, 3, 1).numpy(), mask[:, 0].numpy()):
        design = np.c_[grid[seen], np.ones(seen.sum())]
        (a, b), (c, d), shift = np.linalg.lstsq(design, found[seen] - centre, rcond=None)[0]
        assert_allclose([a, b], [d, -c], atol=0.02)  # a similarity: no shear, whatever the image's shape
        residual = design @ [[a, b], [c, d], shift] - (found[seen] - centre)
        assert np.abs(residual).max() < 0.71  # labels are the nearest pixel's
        assert a * d - b * c > 0
        angles.append(np.degrees(np.arctan2(b, a)))
        zooms.append(np.log(np.hypot(a, b)))
        shifts.append(shift / centre)
    assert 6 < np.abs(angles).max() < 8.1
    assert 0.15 < np.abs(zooms).max() < 0.21
    assert 0.08 < np.abs(shifts).max() < 0.11


def test_pixels_from_outside_have_no_label():
    examples = pixel_examples(8, 40, 40)
    _, points, mask = augmented(examples, rotation=0, zoom=0, shift=0.5)
    assert (~mask).any() and mask.any()
    for found, seen in zip(points, mask[:, 0]):
        columns, rows = found[0][seen], found[1][seen]
        step = found[0][:, 1:] - found[0][:, :-1]
        assert (step[seen[:, 1:] & seen[:, :-1]] == 1).all()  # a pure shift
        expected = (len(columns.unique()), len(rows.unique()))
        assert seen.sum() == expected[0] * expected[1] < 1600


def test_pixels_without_a_label_get_none():
    examples = pixel_examples(8, 40, 40)
    examples.mask[:, :, :, 20:] = False
    _, points, mask = augmented(examples, **STRONG)
    assert mask.any() and float(points[:, :1][mask].max()) < 20


def test_augmentation_is_a_function_of_the_generator():
    examples = examples_of(box_world(3, (16, 20)))
    first, again, other = augmented(examples), augmented(examples), augmented(examples, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])


def test_colours_change_by_gain_and_stay_in_range():
    examples = examples_of(box_world(20, (16, 20)))
    images, *_ = augmented(examples, rotation=0, zoom=0, shift=0, colour=0.25)
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    difference = (images - examples.images / 255).abs()
    assert 0.02 < difference.mean() < 0.2
    still, points, mask = augmented(examples, rotation=0, zoom=0, shift=0, colour=0)
    torch.testing.assert_close(still, examples.images / 255, atol=1e-5, rtol=0)
    assert torch.equal(points, examples.points) and mask.all()


# The schedule


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [training.learning_rate(PLAN, step) for step in range(PLAN.steps + 1)]
    assert rates[:5] == pytest.approx([2e-3 * k / 5 for k in range(1, 6)])
    assert rates[5] == pytest.approx(2e-3)
    assert rates[52] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 47 / 95)))
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert sorted(rates[5:], reverse=True) == rates[5:]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_learning_rate_of_the_shortest_runs(steps):
    plan = replace(PLAN, steps=steps)
    rates = [training.learning_rate(plan, step) for step in range(steps)]
    assert rates[0] == pytest.approx(2e-3) and min(rates) > 0


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_an_epoch_has_each_example_at_most_once_and_all_but_a_rest(count, batch, seed):
    plan = replace(PLAN, batch=batch, seed=seed)
    size = min(batch, count)
    for epoch in (0, 1):
        steps = range(epoch * (count // size), (epoch + 1) * (count // size))
        drawn = torch.cat([training._batch(count, plan, step) for step in steps])
        assert len(drawn) == len(drawn.unique()) == count - count % size
        assert 0 <= drawn.min() and drawn.max() < count


def test_epochs_are_shuffled_differently():
    first, second = training._batch(40, replace(PLAN, batch=40), 0), training._batch(40, replace(PLAN, batch=40), 1)
    assert not torch.equal(first, second) and not torch.equal(first, torch.arange(40))


def test_every_arm_and_seed_has_a_plan_of_its_own():
    plans = [training.plan_for(Study(seed=seed), arm) for seed in (0, 1) for arm in ARMS.values()]
    assert len({plan.seed for plan in plans}) == 2 * len(ARMS)
    preset = PRESETS["sample"]
    frozen = training.plan_for(Study(), ARMS["vit16-frozen"])
    rates = preset.learning_rates
    assert frozen.learning_rate == rates["frozen"] != plans[0].learning_rate == rates["cnn"]


# Runs


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory):
    """Folder, student and manifest of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    student, manifest, _ = run(folder)
    return folder, student, manifest


def test_a_student_learns_the_room(tmp_path):
    student, manifest, examples = run(tmp_path, steps=60, batch=4, validate_every=20)
    train, validation = training.split_validation(np.ones(24, int), 0.2)
    mean = examples[train].labelled_points().mean(0)
    held_out = examples[validation]
    baseline = float(training.masked_mse(mean[:, None, None], held_out.points, held_out.mask))
    assert manifest["best_validation_mse"] < 0.25 * baseline
    found = training.masked_mse(training.predict(student, held_out.images), held_out.points, held_out.mask)
    assert float(found) == pytest.approx(manifest["best_validation_mse"], rel=1e-4)  # the best, not the last
    history = manifest["history"]
    assert [row["step"] for row in history] == [20, 40, 60]
    assert manifest["best_validation_mse"] == min(row["validation_mse"] for row in history)
    assert history[-1]["train_mse"] < history[0]["train_mse"]


def test_student_is_placed_at_the_training_points(tmp_path):
    student, _, examples = run(tmp_path, steps=2)
    train, _ = training.split_validation(np.ones(24, int), 0.2)
    torch.testing.assert_close(student.centre, examples[train].labelled_points().mean(0))


def test_seed_decides_everything(tmp_path, whole):
    for seed in (0, 1):
        run(tmp_path, seed=seed)
    assert weights_of(tmp_path) == weights_of(whole[0])
    assert weights_of(tmp_path, "cnn-scratch-seed1") != weights_of(whole[0])


KILLED = """
import sys, pathlib, torch, test_training
torch.set_num_threads(1)
test_training.run(pathlib.Path(sys.argv[1]), kill_at=4)
"""


def test_killed_run_ends_bit_for_bit_like_a_whole_one(tmp_path, whole):
    env, code = {**os.environ, "PYTHONPATH": str(ROOT)}, [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(code, cwd=ROOT / "tests", env=env, capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in arm_folder(tmp_path).iterdir()] == ["training.pt"]
    seen = []
    _, resumed, _ = run(tmp_path, seen=seen)
    assert seen == [4, 6]  # step 2 was kept, step 4 not yet
    assert weights_of(tmp_path) == weights_of(whole[0])
    assert resumed["history"] == whole[2]["history"]
    names = sorted(path.name for path in arm_folder(tmp_path).iterdir())
    assert names == ["student.json", "student.safetensors"]


def test_finished_run_is_not_repeated(whole):
    folder, student, manifest = whole
    before = {path: path.stat().st_mtime_ns for path in arm_folder(folder).iterdir()}
    seen = []
    again, found, _ = run(folder, seen=seen)
    assert seen == [] and found == manifest == artefacts.read_json(arm_folder(folder) / "student.json")
    assert {path: path.stat().st_mtime_ns for path in arm_folder(folder).iterdir()} == before
    kept = again.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("changed", [{"inputs": "other"}, {"learning_rates": {"cnn": 1e-4}}])
def test_changed_settings_train_anew(tmp_path, whole, changed):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    seen = []
    run(tmp_path, seen=seen, **changed)
    assert seen == [2, 4, 6]
    # The same examples teach the same, whatever their digest says.
    assert (weights_of(tmp_path) == weights_of(whole[0])) == (changed == {"inputs": "other"})


def spoil(examples):
    examples.points[:, :, 5, 5] = torch.nan


@pytest.mark.parametrize(
    "cause", [{"change": spoil}, {"learning_rates": {"cnn": 1e30}}], ids=["nan label", "huge rate"]
)
def test_loss_that_is_not_finite_is_an_error(tmp_path, cause):
    with pytest.raises(training.TrainingError, match="cnn-scratch: .*no longer finite at step 2.*learning rate"):
        run(tmp_path, **cause)
    assert list(arm_folder(tmp_path).iterdir()) == []
    _, manifest, _ = run(tmp_path, steps=2)
    assert math.isfinite(manifest["best_validation_mse"])


def test_frozen_arm_trains_its_head_only(tmp_path, capsys):
    torch.manual_seed(0)
    student, _ = students.build(ARMS["mobilenet-scratch"], (32, 48))
    full = students.timm.create_model(students.TIMM_MODELS["mobilenet"])
    file = tmp_path / "weights.safetensors"
    training.save_file(full.state_dict(), file)
    study = Study("kitchen", "smoke", "depth", "cpu")
    study.preset, study.workspace = replace(study.preset, size=(32, 48), steps=2, batch=4), tmp_path
    examples = examples_of(box_world(12, (32, 48)))
    trained, manifest = training.run_arm(study, ARMS["mobilenet-frozen"], examples, np.arange(8), np.arange(8, 12),
                                         "same", weights=file)  # fmt: skip
    own, given = trained.backbone.body.state_dict(), full.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in own.items())
    assert not torch.equal(trained.head.mix[0].weight, student.head.mix[0].weight)
    assert manifest["weights_origin"] == "file" and "starts from pretrained" in capsys.readouterr().out
