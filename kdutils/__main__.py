"""Run the study's notebooks in order: ``python -m kdutils [SCENE ...]``.

Every notebook is executed by papermill with the parameters given here, and its executed copy is kept. A notebook whose
copy, inputs, outputs and code are unchanged is skipped, so a run that was killed goes on where it was.
"""

import argparse
import logging
import sys
import time
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError

from kdutils import artefacts, evaluation, scenes, shipped, stages
from kdutils.settings import CNN_ARMS, PRESETS, REPOSITORY, TEACHERS, VIT_ARMS, Study

NOTEBOOKS = REPOSITORY / "notebooks"
SCENE_NOTEBOOKS = ("01_scenes", "02_dust3r_labels", "03_alignment", "04_cnn_students", "05_vit_students")
SUMMARIES = {"06_results": "results.json", "07_compact_teacher": "compact_teacher.json"}  # of all scenes at once


class StageFailed(RuntimeError):
    """A notebook stopped; the message names notebook, scene, cell and cause."""


def main(argv=None):
    options = parse(argv)
    given = options.scenes or PRESETS[options.preset].scenes
    names = list(dict.fromkeys(name for scene in given for name in expand(scene)))
    print(f"{len(names)} scene(s), preset {options.preset}: {', '.join(given)}", flush=True)
    started, failures, done, places = time.time(), [], [], set()
    total = len(SCENE_NOTEBOOKS) * len(names) + len(SUMMARIES)
    for number, scene in enumerate(names):
        with noted(failures):
            study = Study(scene, options.preset, options.teacher, options.device, options.seed)
            if study.scene in places:
                raise StageFailed(f"{scene}: left out, as this run has another scene called {study.scene}. Rename one "
                                  "of the two folders.")  # fmt: skip
            places.add(study.scene)
            print(stages.settle_teacher(study, _path(options.checkpoint)), flush=True)
            run_scene(study, options, number * len(SCENE_NOTEBOOKS), total)
            done.append(study)
    for name in SUMMARIES if done else ():
        with noted(failures):
            run_summary(name, done, options, total)
    summarise(done, failures, time.time() - started)
    return 1 if failures else 0


@contextmanager
def noted(failures):
    """A failure ends its scene, not the study."""
    try:
        yield
    except (StageFailed, ValueError) as failure:
        failures.append(str(failure))
        print(f"FAILED  {failure}", file=sys.stderr, flush=True)


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
    parser.add_argument("--verbose", action="store_true", help="show what the notebooks print")
    return parser.parse_args(argv)


def expand(scene):
    """A name as it is; a folder as the scenes in it, by paths that do not depend on where they were typed."""
    folder = Path(scene).resolve()
    if not folder.is_dir():
        return [scene]
    return [str(found) for found in scenes.find_scenes(folder)] or [str(folder)]


def run_scene(study, options, number, total):
    """Notebooks 01 to 05 for one scene."""
    parameters = {"scene": study.given, **_common(study)}
    extra = {"02_dust3r_labels": {"checkpoint": _path(options.checkpoint)},
             "04_cnn_students": {"weights": _path(options.weights)},
             "05_vit_students": {"weights": _path(options.weights)}}  # fmt: skip
    described = {**study.describe(), "files": stages.files_digest(study)}
    inputs = []
    for place, name in enumerate(SCENE_NOTEBOOKS, number + 1):
        outputs = outputs_of(study, name)
        copy = study.notebooks_folder / f"{name}.ipynb"
        run_notebook(f"[{place}/{total}] {study.scene}: {name}", name, {**parameters, **extra.get(name, {})}, copy,
                     inputs, outputs, described, options.verbose)  # fmt: skip
        inputs = outputs if place <= number + 3 else inputs


def run_summary(name, studies, options, total):
    """Notebook 06 or 07, once for all the scenes."""
    study = studies[0]
    is_default = [s.scene for s in studies] == list(study.preset.scenes)
    scene = "all" if is_default else ",".join(s.given for s in studies)
    inputs = [path for s in studies for earlier in SCENE_NOTEBOOKS[3:] for path in outputs_of(s, earlier)]
    copy = study.workspace / "runs" / "notebooks" / f"{name}.ipynb"
    outputs = [study.figures_folder("all" if is_default else "+".join(s.scene for s in studies)) / SUMMARIES[name]]
    place = total - len(SUMMARIES) + 1 + list(SUMMARIES).index(name)
    run_notebook(f"[{place}/{total}] {name}", name, {"scene": scene, **_common(study)}, copy, inputs, outputs,
                 [s.describe() for s in studies], options.verbose)  # fmt: skip


def outputs_of(study, notebook):
    """The manifests that a notebook leaves for the stages after it."""
    arms = {"04_cnn_students": CNN_ARMS, "05_vit_students": VIT_ARMS}.get(notebook, ())
    return {
        "01_scenes": [study.frames_folder / scenes.MANIFEST],
        "02_dust3r_labels": [study.labels_folder / "pairs.json"],
        "03_alignment": [study.labels_folder / "labels.json"],
    }.get(notebook) or [study.run_folder(arm) / "metrics.json" for arm in arms if arm in study.arms]


def run_notebook(title, name, parameters, copy, inputs, outputs, described, verbose=False):
    """Execute one notebook, or skip it when its copy, inputs and outputs are those of a finished run.

    Raises:
        StageFailed: a cell failed; the message says which and why, and the copy holds the whole story.
    """
    source, stamp = NOTEBOOKS / f"{name}.ipynb", copy.with_suffix(".json")
    settings = {"notebook": code_digest(source), "package": package_digest(), "parameters": parameters,
                "study": described, "inputs": _digests(inputs)}  # fmt: skip
    if copy.exists() and artefacts.manifest_matches(stamp, settings):
        if artefacts.read_json(stamp)["outputs"] == _digests(outputs):
            print(f"{title}: finished before, skipped", flush=True)
            return
    print(title, flush=True)
    copy.parent.mkdir(parents=True, exist_ok=True)
    artefacts.discard(stamp)
    started = time.time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            papermill.execute_notebook(source, copy, parameters, cwd=NOTEBOOKS, progress_bar=sys.stderr.isatty(),
                                       log_output=verbose, kernel_name="python3")  # fmt: skip
    except PapermillExecutionError as error:
        raise StageFailed(f"{name}.ipynb, cell {error.cell_index + 1}: {error.ename}: {error.evalue}\n"
                          f"        executed so far: {copy}") from None  # fmt: skip
    missing = [str(path) for path in outputs if not path.exists()]
    if missing:
        raise StageFailed(f"{name}.ipynb ran but left out {', '.join(missing)}")
    artefacts.write_json(stamp, {"settings": settings, "outputs": _digests(outputs)})
    print(f"        {time.time() - started:.0f} s", flush=True)


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
    rows = [row for study in studies for row in evaluation.collect(study)]
    print(f"\n{'scene':<18}{'arm':<22}{'MSE m²':>10}{'median cm':>11}{'to depth cm':>13}{'MB':>7}")
    for row in rows:
        print(f"{row['scene']:<18}{row['arm']:<22}{row['mse']:>10.4f}{100 * row['median']:>11.1f}"
              f"{100 * row['depth_median']:>13.1f}{row['megabytes']:>7.1f}")  # fmt: skip
    unpretrained = [row for row in rows if row["unpretrained"]]
    if unpretrained:
        print(f"{len(unpretrained)} pretrained arm(s) started from RANDOM WEIGHTS: notebooks 04, 05 say why.")
    for study in studies[:1]:
        print(f"teacher {study.teacher}, seed {study.seed}, {evaluation.machine(study.device)}")
    print(f"{seconds / 60:.1f} minutes, {len(failures)} failure(s)")


def _common(study):
    return {"preset": study.preset_name, "teacher": study.teacher, "device": str(study.device), "seed": study.seed}


def _digests(paths):
    return {str(path): artefacts.file_digest(path) if path.exists() else None for path in paths}


def _path(text):
    return str(Path(text).resolve()) if Path(text).exists() else text


if __name__ == "__main__":
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the same call goes on from here")
