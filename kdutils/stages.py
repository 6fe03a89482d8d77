"""The way of the data, first half: scene folder -> frames -> pair predictions -> labels (notebooks 01 to 03).

Every arrow is one function here, every artefact one well-known file, and a stage whose manifest still matches is
skipped. Notebooks call these and show what comes out. The second half is in ``classroom``.
"""

from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from kdutils import alignment, artefacts, dust3r, labelling, pairs, rooms, scenes
from kdutils.alignment import completion, consistency, photometric, stereo
from kdutils.alignment.posing import Posed
from kdutils.settings import is_folder

LABELS = "labels.safetensors"  # what ``align`` leaves, in the study's labels folder

Labels = namedtuple("Labels", "points confidence valid completed depth earlier report digest")
Labels.__doc__ = """World pointmaps (N, H, W, 3) in metres; confidence, valid, completed, depth along z, each (N, H, W).

``valid`` is where the teacher has a label. ``completed`` is where other views' labels or stereo stand in for one:
students learn from these too, and are not judged by them.

``earlier`` has the depth as it was "aligned", before the pictures corrected it, and then "refined", before views that
agree were fused; it is empty for teachers whose labels are as they were aligned.
"""


class MissingStage(RuntimeError):
    """A stage that has to come before was not run; the message says which notebook runs it."""


def scene_folder(study):
    """The scene's folder; a sample room that is not there yet is rendered.

    Raises:
        scenes.SceneError: neither a folder, nor a downloaded scene, nor a sample room has this name.
    """
    if given := _given_folder(study):
        return given
    kind, _, room_seed = study.scene.partition("-")
    if kind not in rooms.KINDS or not (room_seed or "0").isdecimal():
        raise scenes.SceneError(
            f"{study.given}: no such scene. Give the folder of a scene in the 12Scenes layout, download one with "
            f"`python -m kdutils.download`, or use a sample room: {', '.join(rooms.KINDS)}, or one with another seed "
            f"such as {rooms.KINDS[0]}-7."
        )
    folder = study.workspace / "scenes" / study.scene
    with artefacts.alone(folder):
        return rooms.write_room(folder, kind, int(room_seed or 0), every=study.preset.render_every,
                                device=study.device, progress=Bar(f"render {study.scene}", "frame"))  # fmt: skip


def files_digest(study):
    """Digest of a given scene's files; None for a rendered room, and for a scene that ``prepare`` will complain of."""
    folder = _given_folder(study)
    try:
        return folder and scenes.Scene.open(folder).input_digest()
    except scenes.SceneError:
        return None


def _given_folder(study):
    given = Path(study.given)
    if is_folder(given) and not given.resolve().is_relative_to(study.data):
        return given  # opening it says what it lacks
    for folder in (given, study.data / "scenes" / study.scene):
        if (folder / "info.txt").exists() and not (folder / "room.json").exists():
            return folder
    return None


def prepare(study):
    """Stage 01: the scene's usable frames, decoded once at the study's image size."""
    scene = scenes.Scene.open(scene_folder(study), study.scene)
    preset = study.preset
    with artefacts.alone(study.frames_folder):
        return scenes.prepare(scene, study.frames_folder, preset.size, preset.most_train, preset.most_test,
                              progress=partial(tqdm, desc="decode", unit="frame"))  # fmt: skip


def frames(study):
    """What stage 01 prepared."""
    return scenes.Frames.load(study.frames_folder)


def settle_teacher(study, checkpoint="auto"):
    """Whether the teacher asked for can be had; if its checkpoint cannot, the preset's other one takes its place.

    The later stages follow, as the choice is kept beside the labels. Only a checkpoint left to ``auto`` is replaced.

    Returns:
        One line that says which teacher it is, and if need be why.

    Raises:
        dust3r.CheckpointError: a checkpoint that was named cannot be had.
    """
    if study.asked_teacher == "dust3r":
        try:
            dust3r.locate_checkpoint(checkpoint)
        except dust3r.CheckpointError as error:
            if checkpoint != "auto":
                artefacts.discard(study.substitution)
                raise
            # Written over the old one: other processes of this run never find none.
            artefacts.write_json(study.substitution, {"teacher": study.preset.other_teacher, "reason": str(error)})
            return f"TEACHER {study.teacher} INSTEAD OF dust3r: {error}"
    artefacts.discard(study.substitution)
    is_rendered = study.scene.partition("-")[0] in rooms.KINDS
    if study.teacher != "compact" or is_rendered:
        return f"teacher {study.teacher}"
    return "teacher compact, which has seen rendered rooms only: in a real scene trust the teachers depth and dust3r"


def label(study, teacher):
    """Stage 02: the teacher over the pair graph, streamed to disk; see ``teachers.build``."""
    scene_frames = frames(study)
    edges = pairs.scene_pairs(scene_frames, study.preset.pair_graph, study.preset.window)
    if not len(edges):
        raise ValueError(f"{study.scene}: no two frames make a pair. Neighbouring frames of a sequence must show the "
                         "same places from different ones.")  # fmt: skip
    inputs = artefacts.file_digest(study.frames_folder / scenes.MANIFEST)
    with artefacts.alone(study.labels_folder):
        return labelling.label_pairs(teacher, edges, scene_frames.size, study.labels_folder, inputs,
                                     progress=partial(tqdm, desc=f"{teacher.name} labels", unit="pair"))  # fmt: skip


def align(study):
    """Stage 03: one world pointmap an image, from all pair predictions and the known poses."""
    shards = labelling.PairShards(study.labels_folder)
    manifest = study.labels_folder / "labels.json"
    assisted = study.teacher in study.preset.assisted and [photometric.VERSION, consistency.VERSION, completion.VERSION]
    if assisted and study.preset.stereo:
        assisted.append(stereo.VERSION)
    settings = {"pairs": shards.manifest["settings"], "min_confidence": study.preset.min_confidence,
                "alignment": alignment.VERSION, "assisted": assisted}  # fmt: skip
    with artefacts.alone(study.labels_folder):
        whole = artefacts.is_whole(study.labels_folder / LABELS)
        if not (whole and artefacts.manifest_matches(manifest, settings)):
            _align(study, shards, manifest, settings)
    return labels(study)


def _align(study, shards, manifest, settings):
    scene_frames = frames(study)
    pictures, cameras = scene_frames.image, (scene_frames.intrinsics, scene_frames.poses)
    answers, report = shards, {}
    if settings["assisted"]:
        report["unit"] = photometric.unit(shards, pictures, *cameras, ~scene_frames.is_test, study.device)
        answers = Posed(shards, *cameras, report["unit"])
    aligned = alignment.align_shards(answers, *cameras, partial(tqdm, desc="align", unit="shard"))
    valid = aligned.valid & (aligned.confidence >= study.preset.min_confidence)
    tensors = {"depth": aligned.depth, "confidence": aligned.confidence.astype(np.float16), "valid": valid}
    if settings["assisted"]:
        refined = photometric.refine(aligned.depth, pictures, *cameras, shards.pairs, study.device,
                                     partial(tqdm, desc="refine", unit="batch"))  # fmt: skip
        tensors |= {"aligned": aligned.depth.astype(np.float16), "refined": refined.astype(np.float16)}
        fused, tensors["valid"] = consistency.fused(refined, valid, *cameras, shards.pairs, study.device)
        tensors["depth"], tensors["completed"] = completion.completed(
            fused, tensors["valid"], pictures, *cameras, ~scene_frames.is_test, study.device
        )
        if study.preset.stereo:
            tensors["depth"], found = stereo.filled(
                tensors["depth"], tensors["valid"] | tensors["completed"], pictures, *cameras, shards.pairs,
                ~scene_frames.is_test, study.device, partial(tqdm, desc="stereo", unit="image"),
            )  # fmt: skip
            tensors["completed"] |= found
    artefacts.discard(manifest)
    artefacts.write_tensors(study.labels_folder / LABELS, tensors)
    artefacts.write_json(manifest, {"settings": settings, "report": {**aligned.report, **report}})


def labels(study):
    """What stage 03 aligned."""
    if not (study.labels_folder / "labels.json").exists():
        raise MissingStage(f"{study.labels_folder}: no labels. Run notebook 03 for scene {study.scene} first.")
    manifest, taken = artefacts.read_json(study.labels_folder / "labels.json"), frames(study)
    if manifest["settings"]["pairs"]["inputs"] != artefacts.file_digest(study.frames_folder / scenes.MANIFEST):
        raise MissingStage(f"{study.labels_folder}: these labels are of other frames than those that notebook 01 left. "
                           f"Run notebooks 02 and 03 for scene {study.scene} again.")  # fmt: skip
    kept = artefacts.read_tensors(study.labels_folder / LABELS)
    earlier = {name: kept[name] for name in ("aligned", "refined") if name in kept}
    valid = np.array(kept["valid"])
    completed = np.array(kept["completed"]) if "completed" in kept else np.zeros_like(valid)
    return Labels(_in_world(taken, kept["depth"]), kept["confidence"], valid, completed, kept["depth"],
                  earlier, manifest["report"], artefacts.digest(manifest["settings"]))  # fmt: skip


def depth_points(study):
    """The depth camera's own answer: world points ``(N, H, W, 3)`` in metres, and where it has one ``(N, H, W)``."""
    scene_frames = frames(study)
    return _in_world(scene_frames, np.asarray(scene_frames.depth)), np.asarray(scene_frames.depth) > 0


def _in_world(scene_frames, depth):
    intrinsics = np.broadcast_to(scene_frames.intrinsics, (len(scene_frames), 3, 3))
    return alignment.world_points(depth, intrinsics, scene_frames.poses)


class Bar:
    """A progress bar that appears with the first step, as a skipped stage shows none; another total is another bar."""

    def __init__(self, name, unit):
        self.name, self.unit, self.bar = name, unit, None

    def __call__(self, done, total, text=""):
        if self.bar is None or self.bar.total != total:
            self.bar = tqdm(desc=self.name, unit=self.unit, total=total)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
