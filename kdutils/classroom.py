"""The way of the data, second half: labels -> students -> metrics -> figures (notebooks 04 to 06)."""

import numpy as np

from kdutils import artefacts, evaluation, figures, stages, training
from kdutils.settings import ARMS, Study


class Classroom:
    """One scene's frames and labels, loaded once for all the arms that learn from them."""

    def __init__(self, study, weights="auto"):
        self.study, self.weights = study, weights
        self.labels, self.frames = stages.labels(study), stages.frames(study)
        self.truth, self.measured = stages.depth_points(study)
        self.test = np.flatnonzero(self.frames.is_test)
        share = study.preset.validation_share
        self.train, self.validation = training.split_validation(np.asarray(self.frames.sequence), share)
        self.examples = training.Examples.of(self.frames.image, self.labels.points, self.labels.valid, study.device)

    def teach(self, name):
        """Stages 04 and 05: train one arm, predict the test frames once, and measure."""
        with artefacts.alone(self.study.run_folder(name)):
            return self._teach(name)

    def _teach(self, name):
        study, arm, folder = self.study, ARMS[name], self.study.run_folder(name)
        student, manifest = training.run_arm(study, arm, self.examples, self.train, self.validation,
                                             self.labels.digest, self.weights, stages.Bar(name, "step"))  # fmt: skip
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
        figure = figures.results(found, found[0]["mean_point_mse"], evaluation.paper_mse(study.scene))
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
        raise stages.MissingStage(f"no student of {', '.join(names)} is trained: run notebooks 04 and 05 first.")
    return done
