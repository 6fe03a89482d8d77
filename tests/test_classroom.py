"""The second half of the study, on a scene of files: what a student sees of it, and says."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import HIGH, LOW, box_world
from numpy.testing import assert_allclose
from PIL import Image
from scipy.spatial import cKDTree
from test_scenes import frame_file, info_text, split_text

from kdutils import artefacts, classroom, settings, stages, teachers, training

SIZE, TEST, TRAINING = (48, 64), 6, 9


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A box's inside in the 12Scenes layout."""
    folder = tmp_path_factory.mktemp("scenes") / "box"
    world = box_world(TEST + TRAINING, SIZE, test=TEST)
    (folder / "data").mkdir(parents=True)
    (folder / "info.txt").write_text(info_text(SIZE, SIZE, world.intrinsics, world.intrinsics))
    (folder / "split.txt").write_text(split_text(TEST, TRAINING))
    for number, (image, depth, pose) in enumerate(zip(world.image, world.depth, world.poses)):
        Image.fromarray(image).save(frame_file(folder, number, "color.jpg"), quality=95)
        Image.fromarray(np.round(1000 * depth).astype(np.uint16)).save(frame_file(folder, number, "depth.png"))
        np.savetxt(frame_file(folder, number, "pose.txt"), pose, fmt="%.9f")
    return folder


def align(study):
    """Stages 01 to 03."""
    stages.prepare(study)
    stages.label(study, teachers.build(study, stages.frames(study)))
    stages.align(study)


def test_a_classroom_has_the_rooms_points(scene, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    monkeypatch.setitem(settings.PRESETS, "smoke", replace(settings.PRESETS["smoke"], size=SIZE, reduction=2, steps=2))
    arms = ["cnn-scratch", "anchornet-scratch"]
    classroom.main([str(scene), "--preset", "smoke", "--teacher", "depth", "--arms", *arms])
    said = capsys.readouterr().out
    room = classroom.Classroom(settings.Study(str(scene), "smoke", "depth"))
    assert room.frames.size == room.examples.size == room.labels.valid.shape[1:] == SIZE
    for arm in arms:  # one of which learned from smaller images at first
        assert f"{arm}: 2 steps" in said and room.predictions(arm).shape == (TEST, *SIZE, 3)
    assert room.labels.confidence.shape == room.labels.valid.shape and room.labels.valid.mean() > 0.7
    walls = np.minimum(abs(room.truth - LOW), abs(room.truth - HIGH)).min(-1)
    assert_allclose(walls[room.measured], 0, atol=0.01)
    assert np.median(walls[room.measured]) < 0.001  # depth is in millimetres
    assert room.measured.mean() > 0.9
    said = room.localise(room.truth[room.test], room.measured[room.test])
    assert said["translation"] < 0.01 and said["rotation"] < 0.2


def without(metrics):
    """What an earlier version had not yet."""
    return {name: value for name, value in metrics.items() if name not in ("on_rays", "measured_by")}


def test_what_an_earlier_version_measured_is_measured_anew(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    monkeypatch.setitem(settings.PRESETS, "smoke", replace(settings.PRESETS["smoke"], size=SIZE, steps=1))
    given = [str(scene), "--preset", "smoke", "--teacher", "depth", "--arms", "anchornet-scratch"]
    classroom.main(given)
    folder = settings.Study(str(scene), "smoke", "depth").run_folder("anchornet-scratch")
    metrics, taught = artefacts.read_json(folder / "metrics.json"), (folder / "student.json").stat().st_mtime_ns
    assert metrics["on_rays"]["mse"] > 0 and metrics["on_rays"]["depth_median"] > 0
    artefacts.write_json(folder / "metrics.json", without({**metrics, "settings": without(metrics["settings"])}))
    classroom.main(given)
    assert artefacts.read_json(folder / "metrics.json")["on_rays"] == metrics["on_rays"]
    assert (folder / "student.json").stat().st_mtime_ns == taught


def test_files_that_went_missing_are_made_again(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    monkeypatch.setitem(settings.PRESETS, "smoke", replace(settings.PRESETS["smoke"], size=SIZE, steps=1))
    given = [str(scene), "--preset", "smoke", "--teacher", "depth", "--arms", "cnn-scratch"]
    classroom.main(given)
    study = settings.Study(str(scene), "smoke", "depth")
    run = study.run_folder("cnn-scratch")
    files = [study.frames_folder / "frames.json", study.labels_folder / "pairs-00000.safetensors",
             study.labels_folder / "labels.safetensors", run / "predictions.safetensors",
             run / "student.safetensors"]  # fmt: skip
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
        classroom.main(given)
    assert [file.read_bytes() for file in files] == before


def test_cameras_are_located_once_that_has_become_possible(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    monkeypatch.setitem(settings.PRESETS, "smoke", replace(settings.PRESETS["smoke"], size=SIZE, steps=1))
    given = [str(scene), "--preset", "smoke", "--teacher", "depth", "--arms", "cnn-scratch"]
    with monkeypatch.context() as without_poselib:
        without_poselib.setattr(classroom.localisation, "available", lambda: False)
        classroom.main(given)
    path = settings.Study(str(scene), "smoke", "depth").run_folder("cnn-scratch") / "metrics.json"
    assert np.isnan(artefacts.read_json(path)["localisation"]["translation"])
    classroom.main(given)
    assert artefacts.read_json(path)["localisation"]["translation"] > 0


def test_rows_are_kept_beside_those_of_other_runs(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(settings.PRESETS, "smoke", replace(settings.PRESETS["smoke"], size=SIZE, steps=1))
    path = tmp_path / "kept.json"
    run = {"scene": "box", "teacher": "depth", "preset": "smoke", "seed": 0, "arm": "cnn-scratch", "train_seconds": 0.0}
    replaced, others = run, [{**run, "scene": "elsewhere"}, {**run, "train_seconds": 120.0}]
    artefacts.write_json(path, [others[0], replaced, others[1]])
    arms = ["anchornet-scratch", "cnn-scratch", "mobilenet-frozen-mse"]
    classroom.main([str(scene), "--preset", "smoke", "--teacher", "depth", "--keep", str(path), "--arms", *arms])
    rows = {row["arm"]: row for row in classroom.reporting.collect(settings.Study(str(scene), "smoke", "depth"))}
    assert set(rows) == set(arms)  # the last one, an ablation, is not kept
    assert artefacts.read_json(path) == [others[0], rows["cnn-scratch"], others[1], rows["anchornet-scratch"]]


def test_test_images_and_what_arms_say_of_them_are_drawn(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(settings.PRESETS, "smoke", replace(settings.PRESETS["smoke"], size=SIZE, steps=1))
    given, heights = [str(scene), "--preset", "smoke", "--teacher", "depth"], []
    for arms in (["cnn-scratch"], ["cnn-scratch", "anchornet-scratch"]):
        classroom.main([*given, "--picture", str(tmp_path / "said.png"), "--arms", *arms])
        heights.append(Image.open(tmp_path / "said.png").height)
    assert heights[1] == pytest.approx(8 / 5 * heights[0], rel=0.01)  # two rows, and three for each arm


def test_an_arms_budget_of_seconds_can_be_given(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    monkeypatch.setitem(settings.PRESETS, "smoke", replace(settings.PRESETS["smoke"], size=SIZE))
    given = [str(scene), "--preset", "smoke", "--teacher", "depth", "--arms", "cnn-scratch", "--seconds", "0.5"]
    classroom.main(given)
    short, plain = (settings.Study(str(scene), "smoke", "depth", seconds=seconds) for seconds in (0.5, None))
    made = artefacts.read_json(short.run_folder("cnn-scratch") / "student.json")
    assert not plain.run_folder("cnn-scratch").exists()
    assert made["settings"]["plan"]["seconds"] == 0.5 and 0.5 <= made["seconds"] < 60
    assert 0 < made["steps"] < made["settings"]["plan"]["steps"] == 1_000_000


@pytest.mark.parametrize("part", ["test", "validation", "training"])
def test_frames_without_labels_are_noticed_before_a_student_learns(scene, tmp_path, monkeypatch, part):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    monkeypatch.setitem(settings.PRESETS, "smoke", replace(settings.PRESETS["smoke"], size=SIZE))
    study = settings.Study(str(scene), "smoke", "depth")
    align(study)
    room = classroom.Classroom(study)
    file = study.labels_folder / "labels.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in artefacts.read_tensors(file).items()}
    tensors["valid"][getattr(room, {"training": "train"}.get(part, part))] = False
    artefacts.write_tensors(file, tensors)
    with pytest.raises(training.TrainingError, match=f"no {part} frame has a label"):
        classroom.Classroom(study)


def test_what_other_views_completed_is_taught_and_not_judged(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    monkeypatch.setitem(settings.PRESETS, "smoke", replace(settings.PRESETS["smoke"], size=SIZE, steps=1))
    study = settings.Study(str(scene), "smoke", "depth")
    align(study)
    assert not classroom.Classroom(study).labels.completed.any()
    file = study.labels_folder / "labels.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in artefacts.read_tensors(file).items()}
    tensors["completed"] = tensors["valid"] & (np.arange(SIZE[1]) < 10)
    tensors["valid"] &= ~tensors["completed"]
    artefacts.write_tensors(file, tensors)
    room = classroom.Classroom(study)
    taught = tensors["valid"].copy()
    taught[room.train] |= tensors["completed"][room.train]
    assert tensors["completed"][room.train].any() and np.array_equal(room.examples.mask, taught)
    assert room.teach("cnn-scratch")["against_teacher"]["pixels"] == tensors["valid"][room.test].sum()


def test_errors_are_also_given_for_the_places_that_training_images_show(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    monkeypatch.setitem(settings.PRESETS, "smoke", replace(settings.PRESETS["smoke"], size=SIZE, steps=1))
    study = settings.Study(str(scene), "smoke", "depth")
    align(study)
    room = classroom.Classroom(study)
    found = room.teach("cnn-scratch")["where_shown"]
    valid, points = room.labels.valid, room.labels.points
    training_points = cKDTree(points[room.train][valid[room.train]])
    distance, _ = training_points.query(points[room.test][valid[room.test]])
    assert 0 < (distance < 0.05).sum() <= found["pixels"] <= (distance < 0.18).sum() < len(distance)
    assert found["share"] == found["pixels"] / len(distance)

    file = study.labels_folder / "labels.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in artefacts.read_tensors(file).items()}
    tensors["depth"][room.test] += 50
    artefacts.write_tensors(file, tensors)
    (study.run_folder("cnn-scratch") / "metrics.json").unlink()
    assert classroom.Classroom(study).teach("cnn-scratch")["where_shown"] == {"share": 0.0}


def test_labels_of_other_frames_are_not_taken(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(settings.PRESETS, "smoke", replace(settings.PRESETS["smoke"], size=SIZE))
    own = shutil.copytree(scene, tmp_path / "box")
    study = settings.Study(str(own), "smoke", "depth")
    align(study)
    (own / "split.txt").write_text(split_text(TEST, TRAINING - 2))
    stages.prepare(study)
    with pytest.raises(stages.MissingStage, match="other frames.*notebooks 02 and 03"):
        stages.labels(study)
