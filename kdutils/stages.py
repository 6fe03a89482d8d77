"""The way of the data: scene folder -> frames -> pair predictions -> labels -> students -> metrics.

Every arrow is one function here, every artefact one well-known file, and a stage whose manifest still matches is
skipped. Notebooks call these and show what comes out.
"""

from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from kdutils import alignment, artefacts, evaluation, figures, labelling, pairs, rooms, scenes, teachers, training
from kdutils.settings import ARMS, Study

Labels = namedtuple("Labels", "points confidence valid depth report digest")
Labels.__doc__ = """World pointmaps (N, H, W, 3) in metres, confidence and valid (N, H, W), depth along z (N, H, W)."""


class MissingStage(RuntimeError):
    """A stage that has to come before was not run; the message says which notebook runs it."""


def scene_folder(study):
    """The scene's folder; a sample room that is not there yet is rendered.

    Raises:
        scenes.SceneError: neither a folder, nor a downloaded scene, nor a sample room has this name.
    """
    for folder in (Path(study.given), study.data / "scenes" / study.scene):
        if (folder / "info.txt").exists() and not (folder / "room.json").exists():
            return folder
    kind, _, room_seed = study.scene.partition("-")
    if kind not in rooms.KINDS or not (room_seed or "0").isdecimal():
        raise scenes.SceneError(
            f"{study.given}: no such scene. Give the folder of a scene in the 12Scenes layout, download one with "
            f"`python -m kdutils.download`, or use a sample room: {', '.join(rooms.KINDS)}, or one with another seed "
            f"such as {rooms.KINDS[0]}-7."
        )
    folder = study.workspace / "scenes" / study.scene
    return rooms.write_room(folder, kind, int(room_seed or 0), every=study.preset.render_every, device=study.device,
                            progress=Bar(f"render {study.scene}", "frame"))  # fmt: skip


def prepare(study):
    """Stage 01: the scene's usable frames, decoded once at the study's image size."""
    scene = scenes.Scene.open(scene_folder(study), study.scene)
    preset = study.preset
    return scenes.prepare(scene, study.frames_folder, preset.size, preset.most_train, preset.most_test,
                          progress=partial(tqdm, desc="decode", unit="frame"))  # fmt: skip


def frames(study):
    """What stage 01 prepared."""
    return scenes.Frames.load(study.frames_folder)


def label(study, checkpoint="auto"):
    """Stage 02: the teacher over the pair graph, streamed to disk; ``checkpoint`` is for DUSt3R."""
    scene_frames = frames(study)
    edges = pairs.sequence_pairs(scene_frames.sequence, study.preset.pair_graph, study.preset.window)
    inputs = artefacts.file_digest(study.frames_folder / scenes.MANIFEST)
    teacher = teachers.build(study, scene_frames, checkpoint)
    return labelling.label_pairs(teacher, edges, scene_frames.size, study.labels_folder, inputs,
                                 progress=partial(tqdm, desc=f"{teacher.name} labels", unit="shard"))  # fmt: skip


def align(study):
    """Stage 03: one world pointmap an image, from all pair predictions and the known poses."""
    shards = labelling.PairShards(study.labels_folder)
    manifest = study.labels_folder / "labels.json"
    settings = {"pairs": shards.manifest["settings"], "min_confidence": study.preset.min_confidence}
    if not artefacts.manifest_matches(manifest, settings):
        scene_frames = frames(study)
        aligned = alignment.align_shards(shards, scene_frames.intrinsics, scene_frames.poses,
                                         partial(tqdm, desc="align", unit="shard"))  # fmt: skip
        valid = aligned.valid & (aligned.confidence >= study.preset.min_confidence)
        artefacts.discard(manifest)
        artefacts.write_tensors(
            study.labels_folder / "labels.safetensors",
            {"depth": aligned.depth, "confidence": aligned.confidence.astype(np.float16), "valid": valid},
        )
        artefacts.write_json(manifest, {"settings": settings, "report": aligned.report})
    return labels(study)


def labels(study):
    """What stage 03 aligned."""
    if not (study.labels_folder / "labels.json").exists():
        raise MissingStage(f"{study.labels_folder}: no labels. Run notebook 03 for scene {study.scene} first.")
    manifest = artefacts.read_json(study.labels_folder / "labels.json")
    kept = artefacts.read_tensors(study.labels_folder / "labels.safetensors")
    scene_frames = frames(study)
    intrinsics = np.broadcast_to(scene_frames.intrinsics, (len(scene_frames), 3, 3))
    points = alignment.world_points(kept["depth"], intrinsics, scene_frames.poses)
    return Labels(points, kept["confidence"], np.array(kept["valid"]), kept["depth"], manifest["report"],
                  artefacts.digest(manifest["settings"]))  # fmt: skip


def depth_points(study):
    """The depth camera's own answer: world points ``(N, H, W, 3)`` in metres, and where it has one ``(N, H, W)``."""
    scene_frames = frames(study)
    intrinsics = np.broadcast_to(scene_frames.intrinsics, (len(scene_frames), 3, 3))
    points = alignment.world_points(np.asarray(scene_frames.depth), intrinsics, scene_frames.poses)
    return points, np.asarray(scene_frames.depth) > 0


class Classroom:
    """One scene's frames and labels, loaded once for all the arms that learn from them."""

    def __init__(self, study, weights="auto"):
        self.study, self.weights = study, weights
        self.labels, self.frames = labels(study), frames(study)
        self.truth, self.measured = depth_points(study)
        self.test = np.flatnonzero(self.frames.is_test)
        share = study.preset.validation_share
        self.train, self.validation = training.split_validation(np.asarray(self.frames.sequence), share)
        self.examples = training.Examples.of(self.frames.image, self.labels.points, self.labels.valid, study.device)

    def teach(self, name):
        """Stages 04 and 05: train one arm, predict the test frames once, and measure."""
        study, arm, folder = self.study, ARMS[name], self.study.run_folder(name)
        student, manifest = training.run_arm(study, arm, self.examples, self.train, self.validation,
                                             self.labels.digest, self.weights, Bar(name, "step"))  # fmt: skip
        settings = {"student": manifest["settings"], "preset": study.describe()}
        if not artefacts.manifest_matches(folder / "metrics.json", settings):
            evaluation.keep_predictions(student, self.examples.images[self.test], folder / "predictions.safetensors")
            metrics = {"settings": settings, **self.measure(name, student, manifest)}
            artefacts.write_json(folder / "metrics.json", metrics)
        return artefacts.read_json(folder / "metrics.json")

    def measure(self, name, student, manifest):
        """The metrics of one trained arm on the test frames, against the labels and against the depth camera."""
        study, test = self.study, self.test
        points = self.predictions(name)
        train_points = self.labels.points[self.train][self.labels.valid[self.train]]
        valid, measured = self.labels.valid[test], self.measured[test]
        return {
            **{key: study.describe()[key] for key in ("scene", "teacher", "preset", "seed")},
            "arm": name,
            "weights": manifest["weights_origin"],
            "weights_note": manifest["settings"]["weights"],
            "against_teacher": evaluation.point_errors(points, self.labels.points[test], valid),
            "against_depth": evaluation.point_errors(points, self.truth[test], measured),
            "mean_point": evaluation.mean_point_errors(train_points, self.labels.points[test], valid),
            "size": evaluation.size_of(student),
            "timing": {"latency_ms": evaluation.latency(student, study.preset.size),
                       "train_seconds": manifest["seconds"]},
            "machine": evaluation.machine(study.device),
        }  # fmt: skip

    def predictions(self, name):
        """World points ``(N, H, W, 3)`` that a trained arm predicts for the test frames."""
        return evaluation.read_predictions(self.study.run_folder(name) / "predictions.safetensors")


def side_by_side(classroom, arm, chosen, low, high):
    """Four rows of pictures for some test frames: image, teacher's and student's scene coordinates, error in metres.

    Args:
        classroom, arm: a scene, and one of its trained arms. chosen: places among the test frames.
        low, high: world points ``(3,)`` that become black and white, see ``figures.scene_coordinates``.
    """
    test = classroom.test[chosen]
    taught, said = classroom.labels.points[test], classroom.predictions(arm)[chosen]
    valid = classroom.labels.valid[test]
    error = np.where(valid, np.linalg.norm(said - taught, axis=-1), np.nan)
    coordinates = [figures.scene_coordinates(points, low, high, valid) for points in (taught, said)]
    return [list(classroom.frames.image[test]), *map(list, coordinates), list(error)]


def keep_results(folder, rows, claims, studies):
    """The results' plots, the claims, and last the tables ``results.csv`` and ``results.json``."""
    for study in studies:
        found = [row for row in rows if row["scene"] == study.scene]
        figure = figures.results(found, found[0]["mean_point_mse"])
        figure.axes[0].set_title(f"{study.scene}, teacher {study.teacher}")
        figure.savefig(folder / f"results_{study.scene.replace('/', '_')}.png", dpi=110)
    figures.size_against_error(rows).savefig(folder / "size_against_error.png", dpi=110)
    artefacts.write_json(folder / "claims.json", claims)
    evaluation.write_table(rows, folder / "results")


def history(study, name):
    """Training and validation error by step of a trained arm."""
    return artefacts.read_json(study.run_folder(name) / "student.json")["history"]


def finished(study, chosen="all"):
    """Studies like this one that have results: of the preset's scenes, or of some ``chosen``, comma between them.

    Raises:
        MissingStage: none has.
    """
    names = study.preset.scenes if chosen == "all" else chosen.split(",")
    siblings = [Study(name, study.preset_name, study.teacher, str(study.device), study.seed) for name in names]
    done = [sibling for sibling in siblings if evaluation.collect(sibling)]
    if not done:
        raise MissingStage(f"no student of {', '.join(names)} is trained: run notebooks 04 and 05 first.")
    return done


class Bar:
    """A progress bar that appears with the first step, so that a stage that is skipped shows none."""

    def __init__(self, name, unit):
        self.name, self.unit, self.bar = name, unit, None

    def __call__(self, done, total, text=""):
        self.bar = self.bar or tqdm(desc=self.name, unit=self.unit, total=total)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
