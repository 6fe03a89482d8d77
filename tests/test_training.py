"""Training: what is held out, the schedule, and runs that are repeatable, resumable and honest about failing."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, box_world, examples_of
from hypothesis import given
from hypothesis import strategies as st

from kdutils import artefacts, losses, students, training
from kdutils.settings import ARMS, RECIPES, Recipe, Study

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(2e-3)
PLAN = training.Plan(RECIPE, steps=100, seconds=None, batch=5, validations=10, seed=3)


def small_study(folder, seed=0, **preset):
    study = Study("kitchen", "smoke", "depth", "cpu", seed)
    preset = {"size": (32, 48), "steps": 6, "batch": 4, "validations": 3, **preset}
    study.preset, study.workspace = replace(study.preset, **preset), folder
    return study


def run(folder, seed=0, kill_at=None, change=None, arm="cnn-scratch", inputs="same", seen=None, recipe=None,
        weights="auto", validated=None, **preset):  # fmt: skip
    """Train on a small box room; ``seen`` collects how far each validation was.

    From the validation at ``kill_at`` on the process kills itself before it is kept; ``validated`` is called there.
    """

    def progress(done, total, text):
        if "validation" in text:
            if seen is not None:
                seen.append(done)
            if validated is not None:
                validated(examples, done)
            if kill_at is not None and done >= kill_at:
                signal.raise_signal(signal.SIGKILL)

    study = small_study(folder, seed, **preset)
    world = box_world(24, study.preset.size)
    examples = examples_of(world)
    if change:
        change(examples)
    train, validation = training.split_validation(world.sequence, 0.2)
    plan = training.plan_for(study, ARMS[arm])
    plan = replace(plan, recipe=replace(plan.recipe, **recipe)) if recipe else None
    found = training.run_arm(study, ARMS[arm], examples, train, validation, inputs, weights, progress, plan)
    return *found, examples


def arm_folder(folder, arm="cnn-scratch"):
    return folder / "runs" / "kitchen" / "depth" / arm


def weights_of(folder, arm="cnn-scratch"):
    return (arm_folder(folder, arm) / "student.safetensors").read_bytes()


def plain(manifest):
    """A manifest as it is in its file."""
    return json.loads(json.dumps(manifest))


def names_in(folder, arm="cnn-scratch"):
    return sorted(path.name for path in arm_folder(folder, arm).iterdir())


@given(st.lists(st.integers(4, 60), min_size=2, max_size=5), st.floats(0.05, 0.4))
def test_validation_is_even_stretches_of_each_training_sequence(lengths, share):
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    train, validation = training.split_validation(sequence, share)
    assert sorted([*train, *validation]) == np.flatnonzero(sequence > 0).tolist()
    for name in range(1, len(lengths)):
        ours, held = (part[sequence[part] == name] for part in (train, validation))
        ends = held[~np.isin(held + 1, held)]  # of the stretches
        assert len(ours) and abs(len(held) - share * lengths[name]) <= 1
        assert len(ends) == min(training.STRETCHES, len(held)) and ends[-1] == max(*ours, *held)
        assert len(ends) == 1 or np.ptp(np.diff(ends)) <= 1


def test_a_sequence_of_two_frames_has_one_for_each():
    train, validation = training.split_validation(np.array([0, 0, 1, 1]), 0.15)
    assert train.tolist() == [2] and validation.tolist() == [3]


def test_a_sequence_of_one_frame_is_learned_from():
    train, validation = training.split_validation(np.array([0, 1, 2, 2]), 0.15)
    assert train.tolist() == [1, 2] and validation.tolist() == [3]
    train, validation = training.split_validation(np.array([0, 1]), 0.15)
    assert train.tolist() == [1] and validation.tolist() == []


# The schedule


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [training.learning_rate(RECIPE, done / 1000) for done in range(1001)]
    assert max(rates) == rates[50] == pytest.approx(2e-3)
    assert rates[0] > 0 and np.diff(rates[:51]) == pytest.approx(rates[1] - rates[0])  # straight
    assert rates[525] == pytest.approx(1e-3)
    assert rates[700] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 650 / 950)))
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert sorted(rates[50:], reverse=True) == rates[50:]


def test_constant_learning_rate():
    recipe = replace(RECIPE, schedule="constant")
    assert {training.learning_rate(recipe, done) for done in (0, 0.01, 0.5, 1)} == {2e-3}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_learning_rate_of_the_shortest_runs(steps):
    assert all(0 < training.learning_rate(RECIPE, step / steps) <= 2e-3 for step in range(steps))


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


@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
def test_plans_follow_the_arm(arm):
    preset, plan = Study().preset, training.plan_for(Study(), arm)
    has_own = arm.start == "scratch" and arm.backbone in ("mobilenet", "vit")
    recipe = RECIPES["frozen" if arm.start == "frozen" else arm.backbone + "-scratch" * has_own]
    assert plan.recipe == replace(recipe, loss=arm.loss or recipe.loss)
    assert plan.steps == round(arm.budget * preset.steps) and plan.batch == preset.batch
    assert plan.augmentation == (None if arm.name.startswith("original") else preset.augmentation)


def test_weights_from_scratch_have_rates_of_their_own():
    rates = {arm: training.plan_for(Study(), ARMS[arm]).recipe.learning_rate for arm in ARMS}
    assert (rates["mobilenet-scratch"], rates["mobilenet-unfrozen"], rates["mobilenet-frozen"]) == (6e-3, 2e-3, 5e-3)
    assert (rates["vit16-scratch"], rates["vit64-unfrozen"], rates["vit16-long"]) == (4e-3, 2e-3, 2e-3)
    assert rates["anchornet-scratch"] == rates["anchornet-long"] == 6e-3


def test_budget_in_seconds_follows_the_arm():
    study = Study()
    assert training.plan_for(study, ARMS["anchornet-long"]).seconds is None
    study.preset = replace(study.preset, seconds=60, steps=3)
    plans = [training.plan_for(study, replace(ARMS["anchornet-scratch"], budget=budget)) for budget in (1, 8, 0.125)]
    assert [plan.seconds for plan in plans] == [60, 480, 7.5]
    assert [plan.steps for plan in plans] == [3, 24, 1]


# Runs


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory):
    """Folder, student and manifest of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    student, manifest, _ = run(folder)
    return folder, student, manifest


@pytest.mark.parametrize("arm", ["cnn-scratch", "anchornet-scratch"])
def test_a_student_learns_the_room(tmp_path, arm):
    student, manifest, examples = run(tmp_path, arm=arm, steps=60)
    train, validation = training.split_validation(np.ones(24, int), 0.2)
    mean = examples[train].labelled_points().mean(0)
    held_out = examples[validation].batch()
    baseline = float(losses.masked_mse(mean[:, None, None], held_out.points, held_out.mask))
    assert manifest["best_validation_mse"] < 0.25 * baseline
    said = training.predict(student, examples.images[validation])
    found = float(losses.masked_mse(said.points, held_out.points, held_out.mask))
    assert found == pytest.approx(manifest["best_validation_mse"], rel=1e-4)  # the best, not the last
    assert training.validation_mse(student, examples, validation) == pytest.approx(found, rel=1e-4)
    history = manifest["history"]
    assert [row["step"] for row in history] == [20, 40, 60] and manifest["steps"] == 60
    assert manifest["best_validation_mse"] == min(row["validation_mse"] for row in history)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert manifest["images_per_second"] > 0 < manifest["seconds"]


@pytest.mark.parametrize("arm", ["vit64-frozen", "anchornet-scratch", "mobilenet-frozen-laplace"])
def test_a_trained_student_is_loaded_from_its_folder(tmp_path, arm):
    student, _, examples = run(tmp_path, arm=arm, steps=2)
    loaded = students.load(arm_folder(tmp_path, arm))
    said, again = (training.predict(each, examples.images[:2]) for each in (student, loaded))
    torch.testing.assert_close(again.points, said.points, atol=1e-5, rtol=0)
    assert (again.log_scale is None) == (said.log_scale is None)
    (arm_folder(tmp_path, arm) / "student.json").unlink()
    with pytest.raises(artefacts.ArtefactError, match="student.json"):
        students.load(arm_folder(tmp_path, arm))


def test_student_is_placed_at_the_training_points(tmp_path):
    student, _, examples = run(tmp_path, steps=2)
    train, _ = training.split_validation(np.ones(24, int), 0.2)
    torch.testing.assert_close(student.centre, examples[train].labelled_points().mean(0))


def test_few_images_at_once_are_predicted_and_validated_alike(monkeypatch):
    student, examples = students.build(ARMS["anchornet-scratch"], (16, 16))[0], examples_of(box_world(5, (16, 16)))
    student.place(examples.labelled_points())
    whole = training.validation_mse(student, examples, np.arange(5))
    at_once = training.predict(student, examples.images)
    monkeypatch.setattr(training, "_frames_at_once", lambda size: 2)
    assert training.validation_mse(student, examples, np.arange(5)) == pytest.approx(whole, rel=1e-4)
    for part, all_of_it in zip(training.predict(student, examples.images), at_once):
        torch.testing.assert_close(part, all_of_it, atol=1e-4, rtol=1e-4)


def test_large_images_are_taken_one_by_one():
    assert [training._frames_at_once(size) for size in ((96, 128), (384, 512), (3000, 4000))] == [32, 10, 1]


def test_predictions_come_in_the_images_order(monkeypatch):
    monkeypatch.setattr(training, "_frames_at_once", lambda size: 2)
    student = students.build(ARMS["anchornet-scratch"], (16, 16))[0]
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    points, log_scale = training.predict(student, images)
    assert points.shape == (5, 3, 16, 16) and log_scale.shape == (5, 1, 16, 16)
    alone = student(images[3:4].permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(points[3:4], alone.points.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(log_scale[3:4], alone.log_scale.detach(), atol=1e-5, rtol=1e-4)
    assert training.predict(students.build(ARMS["cnn-scratch"], (16, 16))[0], images).log_scale is None


def test_seed_decides_everything(tmp_path, whole):
    for seed in (0, 1):
        run(tmp_path, seed=seed)
    assert weights_of(tmp_path) == weights_of(whole[0])
    assert weights_of(tmp_path, "cnn-scratch-seed1") != weights_of(whole[0])


KILLED = """
import sys, pathlib, torch, test_training
torch.set_num_threads(1)
test_training.run(pathlib.Path(sys.argv[1]), arm=sys.argv[2], kill_at=int(sys.argv[3]), reduction=int(sys.argv[4]))
"""


# The second has a running mean of its weights from step 3 on, and anchors; the third learns from small images first.
@pytest.mark.parametrize(
    ("arm", "kill_at", "reduction"), [("cnn-scratch", 4, 1), ("anchornet-scratch", 6, 1), ("anchornet-scratch", 4, 2)]
)
def test_killed_run_ends_bit_for_bit_like_a_whole_one(tmp_path, arm, kill_at, reduction):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, manifest, _ = run(whole, arm=arm, reduction=reduction)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(killed), arm, str(kill_at), str(reduction)]
    done = subprocess.run(command, cwd=ROOT / "tests", env=env, capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names_in(killed, arm) == ["training.pt"]
    seen = []
    _, resumed, _ = run(killed, arm=arm, seen=seen, reduction=reduction)
    assert seen == list(range(kill_at, 7, 2))  # that validation was not yet kept, the one before it was
    assert weights_of(killed, arm) == weights_of(whole, arm)
    assert resumed["history"] == manifest["history"]
    assert names_in(killed, arm) == ["student.json", "student.safetensors"]


def test_coarse_images_come_first_and_the_student_is_one_of_whole_images(tmp_path):
    """Whole images show more of an error here, so that the validations on smaller ones have the best figures."""

    def spoil_single_pixels(examples):
        examples.depth[:, ::8, ::8] += 5.0

    sizes = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, images: sizes.append(images[0].shape[-2:]) if type(module) is students.Student else None
    )
    with hook:
        student, manifest, examples = run(tmp_path, recipe={"coarse": 0.5, "learning_rate": 0.0}, steps=4, batch=24,
                                          validations=4, reduction=2, change=spoil_single_pixels)  # fmt: skip
    small, whole = (16, 24), (32, 48)
    assert sizes == [small, small, small, whole, whole, whole, whole, whole]  # learned from and judged by, in turns
    errors = [validation["validation_mse"] for validation in manifest["history"]]
    assert errors[0] < 0.9 * min(errors[1:]) and manifest["best_step"] > 1
    _, validation = training.split_validation(np.ones(24, int), 0.2)
    assert manifest["best_validation_mse"] == pytest.approx(training.validation_mse(student, examples, validation))


def test_running_mean_of_the_second_half(tmp_path):
    """With a constant rate, a shorter run goes the same way; the mean of 5 steps takes in the weights after 4 and 5."""

    def weights_after(steps, averaged):
        student, *_ = run(tmp_path / f"{steps} {averaged}", steps=steps, validations=1,
                          recipe={"schedule": "constant", "averaged": averaged})  # fmt: skip
        return {name: tensor for name, tensor in student.state_dict().items() if tensor.is_floating_point()}

    fourth, fifth, mean = weights_after(4, False), weights_after(5, False), weights_after(5, True)
    assert any(not torch.equal(fourth[name], fifth[name]) for name in fourth)
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, fourth[name] / 11 + fifth[name] * 10 / 11, atol=1e-6, rtol=1e-5)


def test_finished_run_is_not_repeated(whole):
    folder, student, manifest = whole
    before = {path: path.stat().st_mtime_ns for path in arm_folder(folder).iterdir()}
    seen = []
    again, found, _ = run(folder, seen=seen)
    assert seen == [] and plain(found) == plain(manifest)
    assert plain(found) == artefacts.read_json(arm_folder(folder) / "student.json")
    assert {path: path.stat().st_mtime_ns for path in arm_folder(folder).iterdir()} == before
    kept = again.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in student.state_dict().items())


def test_a_run_killed_while_it_keeps_its_weights_leaves_no_manifest_of_others(tmp_path, whole, monkeypatch):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    (arm_folder(tmp_path) / "metrics.json").write_text("{}")

    def killed(student, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_student", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, inputs="other")
    assert names_in(tmp_path) == ["student.safetensors", "training.pt"]


CHANGED = [{"inputs": "other"}, {"recipe": {"learning_rate": 1e-4}}, {"recipe": {"loss": "l1"}},
           {"recipe": {"weight_decay": 0.5}}, {"batch": 3}]  # fmt: skip


@pytest.mark.parametrize("changed", CHANGED, ids=str)
def test_changed_settings_train_anew(tmp_path, whole, changed):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    seen = []
    run(tmp_path, seen=seen, **changed)
    assert seen == [2, 4, 6]
    # The same examples teach the same, whatever their digest says.
    assert (weights_of(tmp_path) == weights_of(whole[0])) == (changed == {"inputs": "other"})


def test_state_of_a_run_with_other_settings_is_not_resumed(tmp_path, whole):
    def interrupt(examples, done):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, recipe={"learning_rate": 1e-4}, validated=interrupt)
    assert names_in(tmp_path) == ["training.pt"]
    seen = []
    run(tmp_path, seen=seen)
    assert seen == [2, 4, 6] and weights_of(tmp_path) == weights_of(whole[0])


def test_half_precision_on_the_devices_that_the_preset_names_if_they_are_made_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    _, single, _ = run(tmp_path / "single", bfloat16=())
    run(tmp_path / "unable", bfloat16=("cpu",))
    assert weights_of(tmp_path / "unable") == weights_of(tmp_path / "single")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "arm64", "bf16": True})
    _, manifest, _ = run(tmp_path / "able", bfloat16=("cpu",))
    assert weights_of(tmp_path / "able") != weights_of(tmp_path / "single")
    assert manifest["best_validation_mse"] == pytest.approx(single["best_validation_mse"], rel=0.2)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_learns_the_same(tmp_path):
    results = [run(tmp_path / str(how), arm="anchornet-scratch", compile=how) for how in (False, True)]
    plain, compiled = (manifest["history"] for _, manifest, _ in results)
    for before, after in zip(plain, compiled, strict=True):
        assert after == pytest.approx(before, rel=0.02)


# Failing


def spoil(examples):
    examples.depth[:, 5, 5] = torch.nan


@pytest.mark.parametrize(
    "cause", [{"change": spoil}, {"recipe": {"learning_rate": 1e30}}], ids=["nan label", "huge rate"]
)
def test_loss_that_is_not_finite_is_an_error(tmp_path, cause):
    with pytest.raises(training.TrainingError, match="cnn-scratch: .*no longer finite at step 2.*learning rate"):
        run(tmp_path, **cause)
    assert names_in(tmp_path) == []
    _, manifest, _ = run(tmp_path, steps=2)
    assert math.isfinite(manifest["best_validation_mse"])


def test_loss_that_breaks_later_keeps_the_last_state(tmp_path, whole):
    with pytest.raises(training.TrainingError, match="at step 4.*the state of the last validation is kept"):
        run(tmp_path, validated=lambda examples, done: spoil(examples))
    assert names_in(tmp_path) == ["training.pt"]
    seen = []
    run(tmp_path, seen=seen)  # with the labels repaired
    assert seen == [4, 6] and weights_of(tmp_path) == weights_of(whole[0])


def test_held_out_labels_that_are_no_numbers_are_an_error(tmp_path):
    def spoil_held_out(examples):
        examples.depth[-3:, 5, 5] = torch.nan

    with pytest.raises(training.TrainingError, match="cnn-scratch: .*no longer finite at step 2.*labels"):
        run(tmp_path, change=spoil_held_out)


def test_a_batch_too_large_for_the_device_says_what_to_do_and_keeps_the_last_state(tmp_path):
    def fill_up(_examples, done):
        if done >= 4:
            raise torch.OutOfMemoryError("Tried to allocate 5.00 GiB")

    with pytest.raises(training.TrainingError, match="batches of 4 images of 48x32 do not fit .* lower"):
        run(tmp_path, validated=fill_up)
    assert names_in(tmp_path) == ["training.pt"]


def test_frames_without_labels_at_some_pixels_train_all_the_same(tmp_path):
    def holes(examples):
        examples.mask[:, 4:8] = False
        examples.depth[:, 4:8] = torch.nan

    _, manifest, _ = run(tmp_path, change=holes)
    assert all(math.isfinite(row["validation_mse"] + row["train_loss"]) for row in manifest["history"])


# A budget in seconds


def test_seconds_end_the_run(tmp_path):
    seen = []
    student, manifest, _ = run(tmp_path, steps=10**9, seconds=1.5, seen=seen)
    assert 1.5 <= manifest["seconds"] < 15  # one step and one validation more at most
    assert 0 < manifest["steps"] == manifest["history"][-1]["step"] < 10**6
    assert plain(manifest) == artefacts.read_json(arm_folder(tmp_path) / "student.json")
    assert seen[-1] == 1.5 and 1 <= len(seen) <= 3
    assert manifest["images_per_second"] >= 4 * manifest["steps"] / manifest["seconds"]  # learning, not validating


def test_steps_end_the_run_where_seconds_would_not(tmp_path):
    _, manifest, _ = run(tmp_path, seconds=1e6)
    assert manifest["steps"] == 6 and [row["step"] for row in manifest["history"]] == [2, 4, 6]


@pytest.fixture
def clock(monkeypatch):
    """A clock that ticks by a hundredth of a second whenever it is looked at, instead of the machine's."""
    ticks = count()
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 100))
    return ticks


@pytest.mark.parametrize("validations", [1, 3])
def test_a_run_ends_with_a_validation_whenever_its_time_runs_out(tmp_path, clock, validations):
    for offset in range(6):  # between any two looks at the clock
        _, manifest, _ = run(tmp_path / str(offset), steps=10**9, seconds=0.3 + offset / 100, validations=validations)
        assert manifest["history"][-1]["step"] == manifest["steps"]


def test_resumed_run_counts_the_seconds_already_spent(tmp_path, clock):
    seen = []

    def interrupt(examples, done):
        if len(seen) == 2:
            raise KeyboardInterrupt

    budget = {"steps": 10**9, "seconds": 1.5}
    _, undisturbed, _ = run(tmp_path / "undisturbed", **budget)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", validated=interrupt, seen=seen, **budget)
    state = torch.load(arm_folder(tmp_path / "resumed") / "training.pt", weights_only=True)
    assert len(state["history"]) == 1 and 0.5 <= state["seconds"] < 0.7
    before = next(clock)
    _, manifest, _ = run(tmp_path / "resumed", **budget)
    spent = (next(clock) - before) / 100
    assert manifest["history"][0] == state["history"][0] and len(manifest["history"]) == 3
    assert 1.5 <= manifest["seconds"] < 1.7
    assert spent == pytest.approx(manifest["seconds"] - state["seconds"], abs=0.1)
    assert manifest["steps"] == pytest.approx(undisturbed["steps"], rel=0.1)


# Pretrained weights


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A function that writes a file of pretrained weights, drawn by a seed, always under the same name."""
    file = tmp_path_factory.mktemp("pretrained") / "weights.safetensors"

    def write(seed):
        torch.manual_seed(seed)
        full = students.timm.create_model(students.TIMM_MODELS["mobilenet"])
        training.save_file(full.state_dict(), file)
        return file, full.state_dict()

    return write


def test_frozen_arm_trains_its_head_only(tmp_path, pretrained, capsys):
    torch.manual_seed(0)
    student, _ = students.build(ARMS["mobilenet-scratch"], (32, 48))
    file, given = pretrained(0)
    trained, manifest, _ = run(tmp_path, arm="mobilenet-frozen", steps=2, weights=file)
    own = trained.backbone.body.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in own.items())
    assert not torch.equal(trained.head.mix[0].weight, student.head.mix[0].weight)
    assert manifest["weights_origin"] == "file" and "starts from pretrained" in capsys.readouterr().out


def test_another_file_of_the_same_name_trains_anew(tmp_path, pretrained):
    trained, digests, seen = [], [], []
    for seed in (0, 0, 1):
        file, _ = pretrained(seed)
        run(tmp_path, arm="mobilenet-frozen", steps=1, validations=1, weights=file, seen=seen)
        trained.append(len(seen))
        digests.append(artefacts.read_json(arm_folder(tmp_path, "mobilenet-frozen") / "student.json")["settings"])
    assert trained == [1, 1, 2]
    assert digests[0] == digests[1] and digests[0]["weights"] == digests[2]["weights"]
    assert digests[2]["weights_digest"] == artefacts.file_digest(file) != digests[0]["weights_digest"]


def test_a_student_that_was_found_predicts_as_when_it_was_trained(tmp_path):
    trained, _, examples = run(tmp_path, arm="mobilenet-frozen", size=(96, 128))
    found, _, _ = run(tmp_path, arm="mobilenet-frozen", size=(96, 128))
    first, again = (training.predict(student, examples.images[:8]).points for student in (trained, found))
    assert torch.equal(first, again)
    # On several threads another memory layout rounds otherwise.
    assert layouts(found) == layouts(trained) == {True}


def layouts(student):
    wide = (tensor for tensor in student.state_dict().values() if tensor.ndim == 4 and min(tensor.shape[1:3]) > 1)
    return {tensor.is_contiguous(memory_format=torch.channels_last) for tensor in wide}
