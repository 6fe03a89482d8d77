"""The way of the data: scene folder -> frames -> pair predictions -> labels -> students -> metrics.

Every arrow is one function here, every artefact one well-known file, and a stage whose manifest still matches is
skipped. Notebooks call these and show what comes out.
"""

from collections import namedtuple
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from kdutils import alignment, artefacts, evaluation, labelling, pairs, rooms, scenes, teachers, training
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
    with tqdm(desc=f"render {study.scene}", unit="frame") as bar:
        every = study.preset.render_every
        return rooms.write_room(folder, kind, int(room_seed or 0), every=every, device=study.device,
                                progress=lambda done, total: _advance(bar, done, total))  # fmt: skip


def prepare(study):
    """Stage 01: the scene's usable frames, decoded once at the study's image size."""
    scene = scenes.Scene.open(scene_folder(study), study.scene)
    preset = study.preset
    return scenes.prepare(scene, study.frames_folder, preset.size, preset.most_train, preset.most_test)


def frames(study):
    """What stage 01 prepared."""
    return scenes.Frames.load(study.frames_folder)


def label(study, checkpoint="auto"):
    """Stage 02: the teacher over the pair graph, streamed to disk; ``checkpoint`` is for DUSt3R."""
    scene_frames = frames(study)
    edges = pairs.sequence_pairs(scene_frames.sequence, study.preset.pair_graph, study.preset.window)
    inputs = artefacts.file_digest(study.frames_folder / scenes.TENSORS)
    teacher = teachers.build(study, scene_frames, checkpoint)
    bar = lambda chunks: tqdm(chunks, desc=f"{teacher.name} labels", unit="shard")  # noqa: E731
    return labelling.label_pairs(teacher, edges, scene_frames.size, study.labels_folder, inputs, progress=bar)


def align(study):
    """Stage 03: one world pointmap an image, from all pair predictions and the known poses."""
    shards = labelling.PairShards(study.labels_folder)
    manifest = study.labels_folder / "labels.json"
    settings = {"pairs": shards.manifest["settings"], "min_confidence": study.preset.min_confidence}
    if not artefacts.manifest_matches(manifest, settings):
        scene_frames = frames(study)
        aligned = alignment.align_shards(shards, scene_frames.intrinsics, scene_frames.poses,
                                         lambda s: tqdm(s, desc="align", unit="shard"))  # fmt: skip
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
        with tqdm(desc=name, total=study.preset.steps, unit="step") as bar:
            student, manifest = training.run_arm(
                study, arm, self.examples, self.train, self.validation, self.labels.digest, self.weights,
                lambda step, total, text: (_advance(bar, step, total), bar.set_postfix_str(text)),
            )  # fmt: skip
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


def history(study, name):
    """Training and validation error by step of a trained arm."""
    return artefacts.read_json(study.run_folder(name) / "student.json")["history"]


def finished_scenes(study):
    """Studies like this one, of every scene that has finished runs."""
    root = study.workspace / "runs"
    names = sorted({str(path.parents[2].relative_to(root)) for path in root.rglob("metrics.json")
                    if path.parents[1].name == study.teacher})  # fmt: skip
    return [Study(name, study.preset_name, study.teacher, study.device.type, study.seed) for name in names]


def _advance(bar, done, total):
    bar.total = total
    bar.update(done - bar.n)
