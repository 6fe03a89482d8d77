"""The driver's own decisions: which scenes, which parameters, where results go."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from test_scenes import write_scene

from kdutils import __main__ as driver
from kdutils import dust3r, scenes, shipped, stages
from kdutils.settings import (
    ABLATION_ARMS,
    ARMS,
    LONG_ARMS,
    ORIGINAL_ARMS,
    OWN_ARMS,
    PAPER_ARMS,
    PRESETS,
    REPOSITORY,
    Study,
)


def test_a_folder_of_scenes_stands_for_its_scenes(tmp_path):
    for name in ("b", "a"):
        (tmp_path / "apt1" / name / "data").mkdir(parents=True)
        (tmp_path / "apt1" / name / "info.txt").touch()
    (tmp_path / "apt1" / "README").touch()
    assert [Path(path).name for path in driver.expand(tmp_path / "apt1")] == ["a", "b"]
    assert driver.expand("kitchen-7") == ["kitchen-7"]


def test_a_folder_called_like_a_sample_room_takes_its_place_only_if_a_scene_is_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kitchen").mkdir()
    assert driver.expand("kitchen") == ["kitchen"] and Study("kitchen").scene == "kitchen"
    (tmp_path / "kitchen" / "info.txt").touch()
    assert driver.expand("kitchen") == [str(tmp_path / "kitchen")]
    assert Study("kitchen").scene == f"{tmp_path.name}-kitchen"


def test_a_folder_that_is_no_scene_is_told_what_it_lacks(tmp_path):
    with pytest.raises(scenes.SceneError, match="info.txt"):
        stages.prepare(Study(tmp_path))


@pytest.mark.parametrize("wrong", ["/no/such/room", "../room", "apt1/../../room"])
def test_the_path_of_no_folder_is_refused_and_nothing_is_written(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path / "data"))
    assert driver.main([wrong]) == 1
    assert f"{wrong}: no such folder. Give" in capsys.readouterr().err
    assert not any(tmp_path.iterdir()) and not Path("/no").exists()


def test_copies_of_summaries_lie_apart_and_a_lost_file_makes_a_notebook_run_again(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    ran = []

    def execute(source, copy, parameters, **_):
        ran.append((source.stem, parameters["scene"], parameters["seed"]))
        study = Study("kitchen", seed=parameters["seed"])
        if source.stem in driver.SUMMARIES:
            chosen = "all" if parameters["scene"] == "all" else "kitchen"
            paths = [study.figures_folder(chosen) / driver.SUMMARIES[source.stem]]
        else:
            paths = driver.outputs_of(study, source.stem)
            if source.stem == "02_dust3r_labels":  # how many there will be nobody knows before
                paths = [*paths, study.labels_folder / "pairs-00000.safetensors"]
        for path in (copy, *paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")

    monkeypatch.setattr(driver.papermill, "execute_notebook", execute)
    monkeypatch.setattr(driver.reporting, "collect", lambda study: [])  # what is empty has no rows
    for seed in ("0", "1"):
        assert driver.main(["kitchen", "--jobs", "1", "--seed", seed]) == 0
    assert len(ran) == 16 and len(list(tmp_path.glob("runs/notebooks/*/06_results.ipynb"))) == 2
    ran.clear()
    (Study("kitchen").labels_folder / "pairs-00000.safetensors").unlink()
    assert driver.main(["kitchen", "--jobs", "1"]) == 0
    assert ran[0] == ("02_dust3r_labels", "kitchen", 0) and "01_scenes" not in {name for name, *_ in ran}
    ran.clear()
    (Study("kitchen").run_folder("cnn-scratch") / "student.safetensors").unlink()
    assert driver.main(["kitchen", "--jobs", "1"]) == 0
    assert ran[0][0] == "04_cnn_students" and not {"02_dust3r_labels", "05_vit_students"} & {name for name, *_ in ran}


def test_a_comma_in_a_scenes_name_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "flat 2, kitchen").mkdir()
    assert driver.main([str(tmp_path / "flat 2, kitchen")]) == 1
    said = capsys.readouterr()
    assert "a list of scenes with commas" in said.err and "01_scenes" not in said.out


def test_rooms_of_two_buildings_stay_apart(tmp_path):
    for building in ("apt1", "apt2"):
        (tmp_path / building / "living").mkdir(parents=True)
        assert Study(tmp_path / building / "living").scene == f"{building}-living"


def test_a_scene_that_would_write_over_another_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    folders = [tmp_path / place / "room" for place in ("here", "there")]
    for folder in folders:
        folder.mkdir(parents=True)
    ran = []

    def run_for_scene(title, name, study, options):
        ran.append(study.given)
        raise driver.StageFailed("it failed half way")  # what it has written is still its own

    monkeypatch.setattr(driver, "run_for_scene", run_for_scene)
    assert driver.main([*map(str, folders), str(folders[0]), "--teacher", "depth", "--jobs", "1"]) == 1
    said = capsys.readouterr().err
    assert ran == [str(folders[0])] and f"{folders[1]}: left out" in said and f"{folders[0]}: left out" not in said
    assert said.count("it failed half way") == 1  # and not once more for each stage that needs it


def test_notebooks_run_side_by_side_but_never_before_what_they_need(tmp_path, monkeypatch, capsys):
    """Each notebook notes what is done when it begins, and waits a while for company; paths lead where they did."""
    monkeypatch.chdir(tmp_path)
    Path("weights").touch()
    monkeypatch.setenv("KDUTILS_DATA", "data")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done, together, running, titles = [], [], [], []
    lock = threading.Lock()

    def run_notebook(title, name, parameters, *_):
        mine = (name, parameters["scene"])
        with lock:
            assert os.environ["KDUTILS_DATA"] == str(tmp_path / "data") and Path.cwd() == driver.NOTEBOOKS
            assert parameters.get("weights") == (str(tmp_path / "weights") if name[:2] in ("04", "05", "08") else None)
            scenes = ("kitchen", "office") if name in driver.SUMMARIES else mine[1:]
            needed = {(need, scene) for need in driver.NEEDS[name] for scene in scenes}
            assert needed <= set(done), f"{title} began too early"
            running.append(mine)
            titles.append(title.partition("]")[0])
        time.sleep(0.05)
        with lock:
            together.append(len(running))
            running.remove(mine)
            done.append(mine)

    monkeypatch.setattr(driver, "run_notebook", run_notebook)
    assert driver.main(["kitchen", "office", "--jobs", "2", "--weights", "weights"]) == 0, capsys.readouterr().err
    assert max(together) == 2 and len(done) == len(set(done)) == 13
    assert sorted(titles) == sorted(f"[{number}/13" for number in range(1, 14))
    assert {name for name, _ in done} == set(driver.NEEDS) == {path.stem for path in driver.NOTEBOOKS.glob("*.ipynb")}
    for jobs in ("1", "5"):
        together.clear(), done.clear()
        assert driver.main(["kitchen", "office", "--jobs", jobs, "--weights", "weights"]) == 0
        assert len(done) == 13 and (max(together) == 1) == (jobs == "1")


def test_a_kernel_that_died_and_a_full_disk_fail_what_needs_them_and_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ran = []

    def execute(source, copy, parameters, **_):
        ran.append((source.stem, parameters["scene"]))
        if ran[-1] == ("02_dust3r_labels", "kitchen"):
            raise RuntimeError("Kernel died")
        results = [Study().figures_folder("all") / driver.SUMMARIES.get(source.stem, "none")]
        is_summary = source.stem in driver.SUMMARIES
        for path in results if is_summary else driver.outputs_of(Study(parameters["scene"]), source.stem):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        copy.write_text("{}")

    def write(path, content):
        if path.stem == "05_vit_students":
            raise OSError("no space left")
        path.write_text("{}")

    monkeypatch.setattr(driver.papermill, "execute_notebook", execute)
    monkeypatch.setattr(driver.artefacts, "write_json", write)
    assert driver.main(["kitchen", "office", "--jobs", "2"]) == 1
    said = capsys.readouterr().err
    assert said.count("FAILED") == 2 and "02_dust3r_labels.ipynb: RuntimeError: Kernel died" in said
    assert "no space left" in said
    assert {name for name, scene in ran if scene == "kitchen"} == {"01_scenes", "02_dust3r_labels"}
    assert {name for name, scene in ran if scene == "office"} == set(driver.SCENE_NOTEBOOKS)


def test_budgets_in_seconds_and_gpus_are_not_shared(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    assert driver.jobs_for([Study(device="cpu"), None]) == 2
    assert driver.jobs_for([Study(preset="hour", device="cpu")]) == 1
    study = Study(device="cpu")
    study.device = torch.device("cuda")
    assert driver.jobs_for([study]) == 1
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert driver.jobs_for([Study(device="cpu")]) == 1


def test_scene_of_ones_own_never_takes_a_sample_rooms_place(tmp_path):
    (tmp_path / "flat" / "kitchen").mkdir(parents=True)
    assert Study(tmp_path / "flat" / "kitchen").scene == "flat-kitchen"
    assert Study("kitchen").scene == "kitchen"


def test_only_the_default_study_writes_to_the_figures_of_the_readme(monkeypatch):
    monkeypatch.delenv("KDUTILS_DATA", raising=False)
    figures = REPOSITORY / "figures"
    assert Study("kitchen").figures_folder("all") == figures
    others = [Study(seed=1), Study(preset="smoke"), Study(teacher="dust3r")]
    folders = [study.figures_folder("all") for study in others] + [Study().figures_folder("redkitchen")]
    assert len(set(folders)) == 4 and all(folder.parent == figures for folder in folders)


def test_seeds_presets_and_budgets_keep_apart():
    folders = {Study(preset=preset, seed=seed, seconds=seconds).run_folder("cnn-scratch")
               for preset in PRESETS for seed in (0, 1) for seconds in (None, 60, 0.5)}  # fmt: skip
    assert len(folders) == 6 * len(PRESETS)


def test_an_empty_data_folder_is_the_repositorys(monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", "")
    assert Study().data == REPOSITORY / "data"


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that nobody answers for, an empty cache, and a workspace of one's own."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path / "data"))


def test_without_a_checkpoint_the_other_teacher_is_named_and_used(no_hub):
    study = Study("kitchen", "study")
    assert study.teacher == study.asked_teacher == "dust3r"
    said = stages.settle_teacher(study)
    assert said.startswith("TEACHER depth INSTEAD OF dust3r") and "by hand" in said
    for later in (study, Study("kitchen", "study"), Study("kitchen", "study", "dust3r")):
        assert later.teacher == later.describe()["teacher"] == "depth"
        assert later.labels_folder.name == later.runs_folder.name == "depth"
    assert Study("office", "study").teacher == "dust3r"  # settled for each scene


def test_a_checkpoint_that_turns_up_is_used(no_hub, tmp_path):
    study = Study("kitchen", "study")
    stages.settle_teacher(study)
    (tmp_path / "model.safetensors").touch()
    assert stages.settle_teacher(study, str(tmp_path)) == "teacher dust3r" == f"teacher {study.teacher}"


def test_a_checkpoint_that_was_named_is_not_replaced(no_hub, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        stages.settle_teacher(Study("kitchen", "study"), str(tmp_path / "typo.safetensors"))
    assert stages.settle_teacher(Study("kitchen-7")) == "teacher compact"


def test_the_small_teacher_is_doubted_in_a_real_scene(tmp_path):
    room = write_scene(tmp_path / "kitchen")
    assert "rendered rooms only" in stages.settle_teacher(Study(room))
    assert "rendered" not in stages.settle_teacher(Study(room, teacher="depth"))


@pytest.mark.parametrize("wrong", [{"preset": "huge"}, {"teacher": "mast3r"}, {"device": "abacus"}, {"seconds": 0.0}])
def test_unknown_choices_are_named(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Study(**wrong)


@pytest.mark.parametrize("preset", PRESETS.values())
def test_every_teacher_and_student_suits_a_presets_size(preset):
    dust3r.check_size(preset.size)
    assert not any(side % preset.reduction for side in preset.size)


@pytest.mark.parametrize("preset", PRESETS)
def test_first_scene_and_ones_own_have_the_most_arms(preset):
    first, *others = PRESETS[preset].scenes
    arms = set(Study(first, preset).arms)
    assert Study("somewhere", preset).arms == Study(first, preset).arms == PRESETS[preset].first_scene_arms
    assert {"cnn-scratch", "anchornet-scratch", "original-mobilenet"} <= arms <= set(ARMS)
    assert preset == "hour" or set(PAPER_ARMS) <= arms
    for scene in others:
        assert "anchornet-scratch" in Study(scene, preset).arms and set(Study(scene, preset).arms) < arms


def test_the_study_preset_leaves_no_arm_out():
    assert set(PRESETS["study"].first_scene_arms) == set(ARMS)
    parts = (PAPER_ARMS, OWN_ARMS, LONG_ARMS, ORIGINAL_ARMS, ABLATION_ARMS)
    assert sum(map(len, parts)) == len(ARMS) and all(arm.name == name for name, arm in ARMS.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_notebooks_share_the_arms(preset):
    study = Study(PRESETS[preset].scenes[0], preset)
    found = [path.parent.name for name in ("04_cnn_students", "05_vit_students")
             for path in driver.outputs_of(study, name)]  # fmt: skip
    assert sorted(set(found)) == sorted(study.arms)


def test_an_edited_scene_other_code_and_other_weights_make_stages_stale(tmp_path, monkeypatch):
    scene = write_scene(tmp_path / "mine")
    study = Study(scene)
    before = stages.files_digest(study)
    assert before and before == stages.files_digest(study) and stages.files_digest(Study("kitchen")) is None
    (scene / "split.txt").write_text((scene / "split.txt").read_text() + "\n")
    assert stages.files_digest(study) != before
    (scene / "info.txt").write_text("nothing")  # notebook 01 says what is wrong with it
    assert stages.files_digest(study) is None

    shutil.copytree(REPOSITORY / "kdutils", tmp_path / "kdutils")
    shutil.copytree(shipped.WEIGHTS / "vit16", tmp_path / "weights" / "vit16")
    monkeypatch.setattr(driver, "REPOSITORY", tmp_path)
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path / "weights")
    digests = [driver.package_digest.__wrapped__()]
    for file in (tmp_path / "kdutils" / "alignment" / "posing.py", tmp_path / "weights" / "vit16" / shipped.CARD):
        file.write_text(file.read_text() + "\n")
        digests.append(driver.package_digest.__wrapped__())
    assert len(set(digests)) == 3


def test_prose_and_outputs_make_no_stage_stale_but_code_does(tmp_path):
    source = REPOSITORY / "notebooks" / "01_scenes.ipynb"
    copy = tmp_path / "copy.ipynb"
    shutil.copy(source, copy)
    text = copy.read_text()
    copy.write_text(text.replace("What does a student get to see", "What is there to see"))
    assert copy.read_text() != text and driver.code_digest(copy) == driver.code_digest(source)
    copy.write_text(text.replace("stages.prepare(study)", "stages.frames(study)"))
    assert driver.code_digest(copy) != driver.code_digest(source)
