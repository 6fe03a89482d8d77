"""Run the study's notebooks in order: ``python -m kdutils [SCENE ...]``.

Every notebook is executed by papermill with the parameters given here, and its executed copy is kept. A notebook whose
copy, inputs, outputs and code are unchanged is skipped, so a run that was killed goes on where it was. Notebooks that
need nothing of one another run side by side on a CPU: two networks on a core each learn more than one on both.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import papermill
import psutil
import torch
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from kdutils import artefacts, evaluation, reporting, scenes, shipped, stages
from kdutils.settings import CNN_ARMS, PRESETS, REPOSITORY, TEACHERS, VIT_ARMS, Study, is_folder

NOTEBOOKS = REPOSITORY / "notebooks"
SCENE_NOTEBOOKS = ("01_scenes", "02_dust3r_labels", "03_alignment", "04_cnn_students", "05_vit_students")
SUMMARIES = {  # of all scenes at once
    "07_compact_teacher": "compact_teacher.json",
    "06_results": "results.json",
    "08_open_questions": "open_questions.json",
}
NEEDS = {
    "01_scenes": (),
    "02_dust3r_labels": ("01_scenes",),
    "03_alignment": ("02_dust3r_labels",),
    "04_cnn_students": ("03_alignment",),
    "05_vit_students": ("03_alignment",),
    "06_results": ("04_cnn_students", "05_vit_students"),
    "07_compact_teacher": ("01_scenes",),
    "08_open_questions": ("04_cnn_students", "05_vit_students"),
}


class StageFailed(RuntimeError):
    """A notebook stopped; the message names notebook, scene, cell and cause."""


def main(argv=None):
    options = parse(argv)
    options.checkpoint, options.weights = _path(options.checkpoint), _path(options.weights)
    if os.environ.get("KDUTILS_DATA"):  # kernels start elsewhere
        os.environ["KDUTILS_DATA"] = str(Path(os.environ["KDUTILS_DATA"]).resolve())
    given = options.scenes or PRESETS[options.preset].scenes
    names = list(dict.fromkeys(name for scene in given for name in expand(scene)))
    print(f"{len(names)} scene(s), preset {options.preset}: {', '.join(given)}", flush=True)
    started, failures = time.time(), []
    studies = studies_of(names, options, failures)
    with notebook_threads(options.jobs or jobs_for(studies)) as pool:
        done = run_all(studies, options, failures, pool)
    summarise(done, failures, time.time() - started)
    return 1 if failures else 0


def studies_of(names, options, failures):
    """The study of each scene, or None where there can be none."""
    studies = []
    for scene in names:
        study = None
        with noted(failures):
            if "," in scene:
                raise StageFailed(f"{scene}: notebooks take a list of scenes with commas between them. Rename the "
                                  "folder.")  # fmt: skip
            found = Study(scene, options.preset, options.teacher, options.device, options.seed)
            if found.scene in [other.scene for other in studies if other]:
                raise StageFailed(f"{scene}: left out, as this run has another scene called {found.scene}. Rename one "
                                  "of the two folders.")  # fmt: skip
            print(stages.settle_teacher(found, options.checkpoint), flush=True)
            study = found
        studies.append(study)
    return studies


@contextmanager
def notebook_threads(jobs):
    """So many threads to run a notebook each. An interrupt ends their kernels, which hear nothing of it themselves."""
    if jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // jobs))  # of a notebook's kernel
    pool = ThreadPoolExecutor(jobs)
    try:
        with chdir(NOTEBOOKS):  # where kernels start; papermill's own way there would move all threads to and fro
            yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        raise
    pool.shutdown()


def jobs_for(studies):
    """Notebooks at a time: one where a GPU does the work, or where an arm has so many seconds of the whole machine."""
    alone = any(study and (study.device.type != "cpu" or study.preset.seconds) for study in studies)
    return 1 if alone else min(2, torch.get_num_threads())


@contextmanager
def noted(failures):
    """A failure ends what needs it, not the study."""
    try:
        yield
    except (StageFailed, ValueError, OSError) as failure:
        failures.append(str(failure))
        say(f"FAILED  {failure}", sys.stderr)


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m kdutils", description="Run the study from scenes to results.")
    parser.add_argument("scenes", nargs="*", metavar="SCENE",
                        help="names, or folders in the 12Scenes layout; by default the preset's")  # fmt: skip
    parser.add_argument("--preset", choices=PRESETS, default="sample")
    parser.add_argument("--teacher", choices=("auto", *TEACHERS), default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", default="auto", help="DUSt3R's: hub id, folder or file")
    parser.add_argument("--weights", default="auto", help="of backbones: timm, shipped, random, a folder or a file")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), metavar="N",
                        help="notebooks at a time; by default two on a CPU, if budgets are in steps")  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="show what the notebooks print")
    return parser.parse_args(argv)


def expand(scene):
    """A name as it is; a folder as the scenes in it, by paths that do not depend on where they were typed."""
    folder = Path(scene).resolve()
    found = scenes.find_scenes(folder) if folder.is_dir() else []
    return [str(each) for each in found] or [str(folder) if is_folder(scene) else scene]


def run_all(studies, options, failures, pool):
    """All notebooks, each after those that it needs. Returns the studies in which all went well."""
    total = len(SCENE_NOTEBOOKS) * len(studies) + len(SUMMARIES)
    places = {study: len(SCENE_NOTEBOOKS) * number for number, study in enumerate(studies) if study}
    ended = {}  # by study and notebook: a future that tells whether it went well

    def attempt(title, name, study):
        with noted(failures):
            if all([ended[study, need].result() for need in NEEDS[name]]):
                run_for_scene(title, name, study, options)
                return True
        return False

    def summary(name, number):
        there = [study for study in places if all([ended[study, need].result() for need in NEEDS[name]])]
        if there:
            with noted(failures):
                run_summary(f"[{number}/{total}] {name}", name, there, options)

    for number, name in enumerate(SCENE_NOTEBOOKS, 1):  # in this order none waits for one that waits behind it
        for study, before in places.items():
            title = f"[{before + number}/{total}] {study.scene}: {name}"
            ended[study, name] = pool.submit(attempt, title, name, study)
    summaries = [pool.submit(summary, name, number)
                 for number, name in enumerate(SUMMARIES, total - len(SUMMARIES) + 1)]  # fmt: skip
    for future in summaries:
        future.result()
    return [study for study in places if all([ended[study, name].result() for name in SCENE_NOTEBOOKS])]


def run_for_scene(title, name, study, options):
    """One of the notebooks 01 to 05."""
    extra = {"02_dust3r_labels": {"checkpoint": options.checkpoint},
             "04_cnn_students": {"weights": options.weights},
             "05_vit_students": {"weights": options.weights}}  # fmt: skip
    parameters = {"scene": study.given, **_common(study), **extra.get(name, {})}
    inputs = [path for need in NEEDS[name] for path in outputs_of(study, need)]
    described = {**study.describe(), "files": stages.files_digest(study)}
    run_notebook(title, name, parameters, study.notebooks_folder / f"{name}.ipynb", inputs,
                 partial(outputs_of, study, name), described, options.verbose)  # fmt: skip


def run_summary(title, name, studies, options):
    """Notebook 06, 07 or 08, once for all the scenes."""
    study = studies[0]
    is_default = [s.scene for s in studies] == list(study.preset.scenes)
    extra = {"08_open_questions": {"weights": options.weights}}
    parameters = {"scene": "all" if is_default else ",".join(s.given for s in studies), **_common(study),
                  **extra.get(name, {})}  # fmt: skip
    inputs = [path for s in studies for need in NEEDS[name] for path in outputs_of(s, need)]
    if name == "06_results":  # shows what other seeds change
        inputs += sorted(study.runs_folder.glob("*/metrics.json"))
    chosen = "all" if is_default else "+".join(s.scene for s in studies)
    folder, copies = study.figures_folder(chosen), study.workspace / "runs" / "notebooks" / study.title(chosen)
    run_notebook(title, name, parameters, copies / f"{name}.ipynb", inputs,
                 lambda: [folder / SUMMARIES[name]], [s.describe() for s in studies], options.verbose)  # fmt: skip


def outputs_of(study, notebook):
    """The manifests and tensors that a notebook leaves for the stages after it."""
    arms = {"04_cnn_students": CNN_ARMS, "05_vit_students": VIT_ARMS}.get(notebook, ())
    return {
        "01_scenes": [study.frames_folder / scenes.MANIFEST, study.frames_folder / scenes.TENSORS],
        "02_dust3r_labels": [study.labels_folder / "pairs.json", *sorted(study.labels_folder.glob("pairs-*"))],
        "03_alignment": [study.labels_folder / "labels.json", study.labels_folder / stages.LABELS],
    }.get(notebook) or [study.run_folder(arm) / name for arm in arms if arm in study.arms
                        for name in ("metrics.json", "student.safetensors", evaluation.PREDICTIONS)]  # fmt: skip


def run_notebook(title, name, parameters, copy, inputs, outputs, described, verbose=False):
    """Execute one notebook, or skip it when its copy, inputs and outputs are those of a finished run.

    ``outputs`` is asked for their paths before the notebook runs and afterwards.

    Raises:
        StageFailed: a cell failed; the message says which and why, and the copy holds the whole story.
    """
    source, stamp = NOTEBOOKS / f"{name}.ipynb", copy.with_suffix(".json")
    settings = {"notebook": code_digest(source), "package": package_digest(), "parameters": parameters,
                "study": described, "inputs": _digests(inputs)}  # fmt: skip
    if copy.exists() and artefacts.manifest_matches(stamp, settings):
        if artefacts.read_json(stamp)["outputs"] == _digests(outputs()):
            say(f"{title}: finished before, skipped")
            return
    say(title)
    copy.parent.mkdir(parents=True, exist_ok=True)
    artefacts.discard(stamp)
    started = time.time()
    try:
        papermill.execute_notebook(source, copy, parameters, progress_bar=sys.stderr.isatty(), log_output=verbose,
                                   kernel_name="python3")  # fmt: skip
    except PapermillExecutionError as error:
        raise StageFailed(f"{name}.ipynb, cell {error.cell_index + 1}: {error.ename}: {error.evalue}\n"
                          f"        executed so far: {copy}") from None  # fmt: skip
    except Exception as error:  # a kernel that died, say for want of memory
        raise StageFailed(f"{name}.ipynb: {type(error).__name__}: {error}\n"
                          f"        executed so far: {copy}") from error  # fmt: skip
    missing = [str(path) for path in outputs() if not path.exists()]
    if missing:
        raise StageFailed(f"{name}.ipynb ran but left out {', '.join(missing)}")
    artefacts.write_json(stamp, {"settings": settings, "outputs": _digests(outputs())})
    say(f"{title}: {time.time() - started:.0f} s")


def say(text, file=None):
    """Print a line whole, whatever other threads print, and above their progress bars."""
    tqdm.write(text, file=file)
    (file or sys.stdout).flush()


def code_digest(notebook):
    """Digest of a notebook's code, so that neither prose nor outputs make a stage stale."""
    cells = artefacts.read_json(notebook)["cells"]
    return artefacts.digest(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])


@cache
def package_digest():
    """Digest of kdutils and of the weights that come with it. Notebooks run anew redo only what it really changes."""
    files = [*sorted((REPOSITORY / "kdutils").rglob("*.py")), *sorted(shipped.WEIGHTS.glob(f"*/{shipped.CARD}"))]
    return artefacts.digest([artefacts.file_digest(file) for file in files])


def summarise(studies, failures, seconds):
    """What came out: one line an arm, and where to look."""
    rows = [row for study in studies for row in reporting.collect(study)]
    wide = 2 + max((len(row["arm"]) for row in rows), default=20)
    print(f"\n{'scene':<18}{'arm':<{wide}}{'MSE m²':>10}{'median cm':>11}{'to depth cm':>13}{'MB':>7}")
    for row in rows:
        print(f"{row['scene']:<18}{row['arm']:<{wide}}{row['mse']:>10.4f}{100 * row['median']:>11.1f}"
              f"{100 * row['depth_median']:>13.1f}{row['megabytes']:>7.1f}")  # fmt: skip
    unpretrained = [row for row in rows if row["unpretrained"]]
    if unpretrained:
        print(f"{len(unpretrained)} pretrained arm(s) started from RANDOM WEIGHTS: notebooks 04, 05 say why.")
    for row in rows[:1]:
        print(f"teacher {row['teacher']}, seed {row['seed']}, {row['machine']}")
    print(f"{seconds / 60:.1f} minutes, {len(failures)} failure(s)")


def _common(study):
    return {"preset": study.preset_name, "teacher": study.teacher, "device": str(study.device), "seed": study.seed}


def _digests(paths):
    """What tells whether files are the same: their bytes, or of tensors, which are large, whether they are there."""
    return {str(path): path.exists() and (path.suffix == ".safetensors" or artefacts.file_digest(path))
            for path in paths}  # fmt: skip


def _path(text):
    return str(Path(text).resolve()) if Path(text).exists() else text


if __name__ == "__main__":
    logging.getLogger("papermill").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # papermill's libraries warn of one another
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: the same call goes on from here", file=sys.stderr, flush=True)
        os._exit(130)  # at once, whatever the threads are at: all files are written aside and renamed
