"""The notebooks as a reader meets them: executed, run by papermill, checked by nbval, in a browser, after a kill."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import papermill.parameterize
import psutil
import pytest
from browser import needs_browser, screenshot
from papermill.iorw import load_notebook_node
from plotly.io import from_json

from kdutils import alignment, evaluation, stages
from kdutils.alignment import completion
from kdutils.settings import ARMS, PRESETS, Study

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
PARAMETERS = {"scene", "preset", "teacher", "device", "seed", "checkpoint", "weights"}
MINUTES = 60
PLOTLY = "application/vnd.plotly.v1+json"


def by_name(path):
    return path.stem


def code_cells(notebook):
    return [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]


def environment(data):
    return {**os.environ, "KDUTILS_DATA": str(data), "PYTHONPATH": str(REPOSITORY)}


def driver(data, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "kdutils", "--preset", "smoke", "--device", "cpu", *arguments],
        cwd=REPOSITORY, env=environment(data), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
    )  # fmt: skip


def finish(process, minutes=14):
    output, _ = process.communicate(timeout=minutes * MINUTES)
    return process.returncode, output


def metrics_of(data):
    """All metrics below a data folder, without what a clock decided."""
    found = {}
    for path in sorted((data / "smoke" / "runs").rglob("metrics.json")):
        metrics = json.loads(path.read_text())
        del metrics["timing"], metrics["settings"]  # the settings hold digests of file times
        found[path.parent.name] = metrics
    return found


def stamps_of(data):
    return {path: path.stat().st_mtime_ns for path in sorted(data.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """One end-to-end run at the smoke preset, with the printed log."""
    data = tmp_path_factory.mktemp("study")
    code, log = finish(driver(data))
    assert code == 0, log
    return data, log


def executed(data):
    runs = data / "smoke" / "runs"
    return sorted(runs.glob("kitchen/compact/notebooks/*.ipynb")) + sorted(runs.glob("notebooks/*/*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=by_name)
class TestCommitted:
    def test_is_small_and_executed_in_order_without_errors_and_bars(self, notebook):
        cells = code_cells(notebook)
        assert notebook.stat().st_size < 2_000_000
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        assert not [output for output in outputs if any("widget" in kind for kind in output.get("data", {}))]

    def test_has_one_parameters_cell_with_the_agreed_names(self, notebook):
        tagged = [cell.source for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
        assert len(tagged) == 1
        assert set(re.findall(r"^(\w+) =", tagged[0], re.MULTILINE)) <= PARAMETERS

    def test_has_short_cells_and_more_text_than_steps(self, notebook):
        cells = nbformat.read(notebook, 4).cells
        assert statistics.median(len(cell.source.splitlines()) for cell in code_cells(notebook)) < 8
        assert 14 <= len(cells) <= 32
        assert not any(re.search(r"^\s*def ", cell.source, re.MULTILINE) for cell in code_cells(notebook))

    def test_has_a_checked_cell(self, notebook):
        assert any("NBVAL_CHECK_OUTPUT" in cell.source for cell in code_cells(notebook))

    def test_carries_no_path_of_a_machine(self, notebook):
        said = [output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs]
        written = [cell.source for cell in nbformat.read(notebook, 4).cells]
        assert not re.search(r"/(home|root|work|tmp|Users)/", "\n".join(said + written))


def test_study_trains_every_arm_and_writes_the_results(study):
    data, _ = study
    rows = json.loads((data / "figures" / "smoke-compact-seed0-all" / "results.json").read_text())
    assert {row["arm"] for row in rows} == set(PRESETS["smoke"].first_scene_arms)
    assert all(np.isfinite(row["mse"]) and row["megabytes"] > 0 and row["latency_ms"] > 0 for row in rows)
    assert {row["teacher"] for row in rows} == {"compact"}


def test_labels_come_nearer_to_the_room_with_each_step(study, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(study[0]))
    kitchen = Study("kitchen", "smoke")
    labels, frames, (truth, measured) = stages.labels(kitchen), stages.frames(kitchen), stages.depth_points(kitchen)
    confident = (labels.confidence >= kitchen.preset.min_confidence) & (labels.depth > 0)
    assert not (labels.valid & ~confident).any() and labels.valid.sum() > 0.5 * confident.sum()
    cameras = np.broadcast_to(frames.intrinsics, (len(frames), 3, 3)), frames.poses
    steps = [(alignment.world_points(depth, *cameras), confident) for depth in labels.earlier.values()]
    steps.append((labels.points, labels.valid))
    errors = [evaluation.point_errors(points, truth, where & measured) for points, where in steps]
    for before, after in zip(errors, errors[1:]):
        assert after["median"] < 0.8 * before["median"] and after["mse"] < 0.8 * before["mse"]


def test_holes_are_completed_by_training_images_alone(study, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(study[0]))
    kitchen = Study("kitchen", "smoke")
    labels, frames = stages.labels(kitchen), stages.frames(kitchen)
    given = labels.depth, labels.valid, frames.image, frames.intrinsics, frames.poses
    depth, found = completion.completed(*given, ~frames.is_test)
    assert found.any() and np.array_equal(found, labels.completed) and np.array_equal(depth, labels.depth)
    assert not np.array_equal(found, completion.completed(*given, np.ones(len(frames), bool))[1])


def test_stereo_adds_to_what_training_images_learn_from_alone(study, tmp_path, monkeypatch):
    shutil.copytree(study[0] / "smoke" / "labels", tmp_path / "smoke" / "labels")
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    kitchen = Study("kitchen", "smoke", device="cpu")
    frames, before = stages.frames(kitchen), stages.labels(kitchen)
    kitchen.preset = replace(kitchen.preset, stereo=True)
    after = stages.align(kitchen)
    assert after.digest != before.digest and np.array_equal(after.valid, before.valid)
    new = after.completed & ~before.completed
    assert new.any() and not new[frames.is_test].any() and not (before.completed & ~after.completed).any()
    assert np.array_equal(after.depth[~new], before.depth[~new])
    truth, measured = stages.depth_points(kitchen)
    assert evaluation.point_errors(after.points, truth, new & measured)["median"] < 0.1


def test_study_says_which_arms_had_no_pretrained_weights(study):
    data, log = study
    asking = [name for name, arm in ARMS.items() if arm.start != "scratch" and arm.weights != "random"]
    pretrained = [metrics for metrics in metrics_of(data).values() if metrics["arm"] in asking]
    assert pretrained
    assert ("RANDOM WEIGHTS" in log) == any(metrics["weights"] == "random" for metrics in pretrained)


def test_second_run_repeats_nothing(study):
    data, _ = study
    before = stamps_of(data)
    code, log = finish(driver(data))
    assert code == 0, log
    assert log.count("finished before, skipped") == len(NOTEBOOKS)
    assert stamps_of(data) == before


@pytest.mark.timeout(26 * MINUTES)  # of two waits and two runs
def test_killed_and_interrupted_study_finishes_with_the_same_results(study, tmp_path):
    reference, _ = study
    # Most students are found as they were left, which takes a third of the time of teaching all of them again.
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    again = ("cnn-scratch", "mobilenet-frozen", "vit16-frozen", "anchornet-unfrozen", "notebooks")
    lost = [f"runs/kitchen/compact/{name}" for name in again]
    for folder in ("labels", "runs/notebooks", *lost):
        shutil.rmtree(tmp_path / "smoke" / folder)
    process = driver(tmp_path)
    wait_for(tmp_path / "smoke" / "labels/kitchen/compact/started.json", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # its kernel lives on for a second or more, and the next run waits for it
    process = driver(tmp_path)
    wait_for(tmp_path / "smoke" / "runs/kitchen/compact/mobilenet-frozen/training.pt", process)
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    code, log = finish(process, minutes=1)
    assert code == 130 and log.splitlines()[-1] == "interrupted: the same call goes on from here"
    assert "Traceback" not in log and "Kernel" not in log and "FAILED" not in log
    assert kernels and not [kernel for kernel in psutil.wait_procs(kernels, 10)[1] if kernel.status() != "zombie"]
    frames = tmp_path / "smoke" / "labels" / "kitchen" / "frames" / "frames.safetensors"
    prepared = frames.stat().st_mtime_ns
    code, log = finish(driver(tmp_path))
    assert code == 0, log
    assert "01_scenes: finished before, skipped" in log
    assert frames.stat().st_mtime_ns == prepared
    assert metrics_of(tmp_path) == metrics_of(reference)


def wait_for(path, process, minutes=5):
    deadline = time.time() + minutes * MINUTES
    while not path.exists():
        assert process.poll() is None, f"the run ended before {path.name} appeared:\n{process.stdout.read()}"
        assert time.time() < deadline, f"{path} never appeared"
        time.sleep(0.05)


def test_unknown_scene_is_one_clear_failure(tmp_path):
    code, log = finish(driver(tmp_path, "attic"))
    assert code == 1
    assert "01_scenes.ipynb" in log and "attic: no such scene" in log and "kitchen" in log


@pytest.fixture(scope="session")
def smoke_copies(study, tmp_path_factory):
    """The committed notebooks, outputs and all, set to the smoke preset, beside a finished study."""
    folder = tmp_path_factory.mktemp("copies")
    for path in NOTEBOOKS:
        notebook = papermill.parameterize.parameterize_notebook(
            load_notebook_node(str(path)), {"preset": "smoke", "device": "cpu"}
        )
        nbformat.write(notebook, folder / path.name)
    return study[0], folder


def nbval(data, *notebooks):
    """Run the notebooks from a fresh kernel and compare the checked cells with their committed outputs."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300",
         "-p", "no:cacheprovider", "--rootdir", str(notebooks[0].parent), *map(str, notebooks)],
        env=environment(data), capture_output=True, text=True, timeout=12 * MINUTES,
    )  # fmt: skip


def test_nbval_passes_on_all_notebooks(smoke_copies):
    data, folder = smoke_copies
    result = nbval(data, *sorted(folder.glob("*.ipynb")))
    assert result.returncode == 0, result.stdout[-5000:]


def test_nbval_notices_a_wrong_number_and_a_broken_cell(smoke_copies, tmp_path):
    data, folder = smoke_copies
    notebook = nbformat.read(folder / "01_scenes.ipynb", 4)
    checked = next(cell for cell in notebook.cells if "NBVAL_CHECK_OUTPUT" in cell.source)
    text = checked.outputs[0]["text"]
    checked.outputs[0]["text"] = text.replace("514x384", "515x384")
    assert checked.outputs[0]["text"] != text
    broken = next(cell for cell in notebook.cells if "stages.prepare(study)" in cell.source)
    broken.source = broken.source.replace("stages.prepare", "stages.prepair")
    nbformat.write(notebook, tmp_path / "01_scenes.ipynb")
    result = nbval(data, tmp_path / "01_scenes.ipynb")
    assert result.returncode != 0
    assert "515x384" in result.stdout and "prepair" in result.stdout


@needs_browser
def test_notebooks_3d_views_draw_in_a_browser(study, tmp_path):
    views = 0
    for path in executed(study[0]):
        outputs = [output.get("data", {}) for cell in code_cells(path) for output in cell.outputs]
        figures = [data[PLOTLY] for data in outputs if PLOTLY in data]
        for figure in figures[-1:]:  # a browser takes ten seconds for each
            page = tmp_path / f"{path.stem}.html"
            from_json(json.dumps({k: figure[k] for k in ("data", "layout")})).write_html(page)
            drawn = screenshot(page, page.with_suffix(".png")).min(-1) < 200
            assert drawn.mean() > 0.005, path.name  # an empty scene: 0.002
            views += 1
    assert views >= 4


def test_notebook_without_its_stage_before_names_the_one_to_run(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", "from kdutils import stages, settings; stages.align(settings.Study(preset='smoke'))"],
        env=environment(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0 and "Run notebook 02" in result.stderr
