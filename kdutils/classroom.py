"""The way of the data, second half: labels -> students -> metrics -> figures (notebooks 04 to 06)."""

import argparse
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from kdutils import artefacts, evaluation, figures, localisation, losses, reporting, stages, teachers, training
from kdutils.augmentation import Examples
from kdutils.settings import ABLATION_ARMS, ARMS, PRESETS, Study


class Classroom:
    """One scene's frames and labels, loaded once for all the arms that learn from them."""

    def __init__(self, study, weights="auto"):
        self.study, self.weights = study, weights
        self.labels, self.frames = stages.labels(study), stages.frames(study)
        self.truth, self.measured = stages.depth_points(study)
        self.test = np.flatnonzero(self.frames.is_test)
        labelled = self.labels.valid.any((1, 2))
        split = training.split_validation(np.asarray(self.frames.sequence), study.preset.validation_share)
        self.train, self.validation = (part[labelled[part]] for part in split)
        self._check(labelled)
        self.taught = np.array(self.labels.valid)
        self.taught[self.train] |= self.labels.completed[self.train]  # validation judges by the teacher's alone
        self.examples = Examples.of(self.frames.image, self.labels.depth, self.taught, self.labels.confidence,
                                    self.frames.intrinsics, self.frames.poses, study.device)  # fmt: skip

    def _check(self, labelled):
        parts = {"training": self.train, "validation": self.validation, "test": self.test[labelled[self.test]]}
        if missing := [name for name, part in parts.items() if not len(part)]:
            raise training.TrainingError(
                f"{self.study.scene}: no {' and no '.join(missing)} frame has a label of the teacher "
                f"{self.study.teacher}. Each sequence needs several frames that overlap one another; see "
                f"'images_without_labels' in {self.study.labels_folder / 'labels.json'}."
            )

    def teach(self, name):
        """Stages 04 and 05: train one arm, predict the test frames once, and measure."""
        # The processes that torchrun starts train one student together; the first has the folder.
        with artefacts.alone(self.study.run_folder(name)) if training.RANK == 0 else nullcontext():
            return self._teach(name)

    def _teach(self, name):
        study, arm, folder = self.study, ARMS[name], self.study.run_folder(name)
        student, manifest = training.run_arm(study, arm, self.examples, self.train, self.validation,
                                             self.labels.digest, self.weights, stages.Bar(name, ""))  # fmt: skip
        if training.RANK > 0:
            return None
        settings = {"student": manifest["settings"], "preset": study.describe(), "measured_by": evaluation.VERSION}
        if not self._is_measured(folder, settings):
            artefacts.discard(folder / "metrics.json")
            evaluation.keep_predictions(student, self.examples.images[self.test], folder / evaluation.PREDICTIONS)
            metrics = {"settings": settings, **self.measure(name, student, manifest)}
            artefacts.write_json(folder / "metrics.json", metrics)
        metrics = artefacts.read_json(folder / "metrics.json")
        print(f"{name}: {metrics['training']['steps']} steps in {metrics['timing']['train_seconds']:.0f} s, "
              f"test MSE {metrics['against_teacher']['mse']:.4f} m²")  # fmt: skip
        return metrics

    @staticmethod
    def _is_measured(folder, settings):
        """Whether predictions and metrics are there, the camera included where it can be located by now."""
        metrics = folder / "metrics.json"
        if not artefacts.manifest_matches(metrics, settings) or not artefacts.is_whole(folder / evaluation.PREDICTIONS):
            return False
        located = artefacts.read_json(metrics)["localisation"]
        return not (located and np.isnan(located["translation"]) and localisation.available())

    def measure(self, name, student, manifest):
        """The metrics of one trained arm on the test frames, against the labels and against the depth camera."""
        study, test = self.study, self.test
        points, log_scale = self.predictions(name, with_scale=True)
        measured = self.measured[test]
        # An ablation is asked for its error alone: finding cameras takes as long as half of its training.
        located = {} if name in ABLATION_ARMS else self.localise(points, None, log_scale)
        return {
            **{key: study.describe()[key] for key in ("scene", "teacher", "preset", "seed")},
            "arm": name,
            "weights": manifest["weights_origin"],
            "weights_note": manifest["settings"]["weights"],
            "against_teacher": self.errors(points),
            "where_shown": self._errors_where_shown(points),
            "on_rays": self._errors_on_rays(points, located.get("poses")),
            "against_depth": evaluation.point_errors(points, self.truth[test], measured),
            "mean_point": self.baseline,
            "localisation": {name: located[name] for name in localisation.FIGURES if located},
            "size": evaluation.size_of(student),
            "training": {"steps": manifest["steps"],
                         "batch": min(manifest["settings"]["plan"]["batch"], len(self.train)),
                         "loss": manifest["settings"]["plan"]["recipe"]["loss"]},
            "timing": {"latency_ms": evaluation.latency(student, self.frames.size),
                       **({"localised_milliseconds": located["milliseconds"]} if located else {}),
                       "train_seconds": manifest["seconds"],
                       "train_images_per_second": manifest["images_per_second"]},
            "machine": evaluation.machine(study.device),
        }  # fmt: skip

    def errors(self, points):
        """Of world points ``(N, H, W, 3)`` for the test frames, against the labels; see ``evaluation.point_errors``."""
        return evaluation.point_errors(points, self.labels.points[self.test], self.labels.valid[self.test])

    def _errors_where_shown(self, points):
        """Against the labels in those pixels whose place some training image has a label for, and their share."""
        valid = self.labels.valid[self.test]
        mask = valid & self.shown
        errors = evaluation.point_errors(points, self.labels.points[self.test], mask) if mask.any() else {}
        return {"share": float(mask.sum() / valid.sum()), **errors}

    def _errors_on_rays(self, points, poses):
        """Against labels and depth, once the points lie on the rays of the cameras that they place there."""
        if poses is None:
            return {}
        moved, test = localisation.on_rays(points, poses, self.frames.intrinsics), self.test
        to_depth = evaluation.point_errors(moved, self.truth[test], self.measured[test])
        return {f"{of}{name}": found[name] for of, found in (("", self.errors(moved)), ("depth_", to_depth))
                for name in ("mse", "median")}  # fmt: skip

    @cached_property
    def shown(self):
        """Test pixels ``(N, H, W)`` whose labelled place a training image has a label for, see ``evaluation.shown``."""
        points, train, test = self.labels.points, self.train, self.test
        return evaluation.shown(points[test], points[train], self.taught[train])

    def mean_point(self, frames):
        """Errors in some frames of the mean labelled training point, said for every pixel."""
        return evaluation.mean_point_errors(self._mean_point, self.labels.points[frames], self.labels.valid[frames])

    @cached_property
    def baseline(self):
        """``mean_point`` of the test frames, which every student must beat."""
        return self.mean_point(self.test)

    @cached_property
    def _mean_point(self):
        points = self.labels.points[self.train][self.labels.valid[self.train]]
        return points.mean(0, keepdims=True, dtype=np.float64)  # float32 loses the count of a hundred million

    @cached_property
    def span(self):
        """World points ``(2, 3)`` that become black and white in pictures, see ``figures.scene_coordinates``."""
        return np.percentile(self.labels.points[self.train][self.labels.valid[self.train]], [1, 99], axis=0)

    def localise(self, points, masks=None, log_scales=None):
        """How well world points ``(N, H, W, 3)`` locate the test frames' cameras; see ``localisation.pose_errors``.

        ``masks (N, H, W)`` are True where there is a point, ``log_scales (N, H, W)`` the logarithms of the points'
        uncertainty in metres. The ``poses (N, 4, 4)`` come along. Figures are NaN, and it says so, where PoseLib is not
        installed.
        """
        if not localisation.available():
            print("PoseLib is not installed: cameras are not located")
            return dict.fromkeys((*localisation.FIGURES, "milliseconds"), np.nan)
        poses, milliseconds = localisation.locate_all(points, self.frames.intrinsics, masks, log_scales)
        errors = localisation.pose_errors(poses, self.frames.poses[self.test])
        return {**errors, "milliseconds": milliseconds, "poses": poses}

    def predictions(self, name, with_scale=False):
        """World points ``(N, H, W, 3)`` that a trained arm predicts for the test frames.

        On request the logarithm of their uncertainty comes along; None where there is none, or nothing taught it.
        """
        folder = self.study.run_folder(name)
        points, log_scale = evaluation.read_predictions(folder / evaluation.PREDICTIONS)
        if not with_scale:
            return points
        loss = artefacts.read_json(folder / "student.json")["settings"]["plan"]["recipe"]["loss"]
        return points, log_scale if losses.needs_uncertainty(loss) else None

    def on_rays(self, name):
        """The same points, on the rays of the cameras that they place; see ``localisation.on_rays``."""
        points, log_scale = self.predictions(name, with_scale=True)
        return localisation.on_rays(points, self.localise(points, None, log_scale)["poses"], self.frames.intrinsics)

    def error_maps(self, points, chosen):
        """Distances in metres of points ``(N, H, W, 3)`` from the labels of some test frames; NaN without a label."""
        test = self.test[chosen]
        distance = np.linalg.norm(points[chosen] - self.labels.points[test], axis=-1)
        return list(np.where(self.labels.valid[test], distance, np.nan))


def side_by_side(classroom, arm, chosen):
    """Four rows of pictures for some test frames: image, teacher's and student's scene coordinates, error in metres.

    The teacher has no label where it was not sure, which stays white; a student says a point for every pixel.

    Args:
        classroom, arm: a scene, and one of its trained arms. chosen: places among the test frames.
    """
    test, said, span = classroom.test[chosen], classroom.predictions(arm), classroom.span
    taught = figures.scene_coordinates(classroom.labels.points[test], *span, classroom.labels.valid[test])
    return [list(classroom.frames.image[test]), list(taught), list(figures.scene_coordinates(said[chosen], *span)),
            classroom.error_maps(said, chosen)]  # fmt: skip


def comparison(classroom, arms, most=1, with_rays=False):
    """Pictures of five test frames: the images, the teacher's scene coordinates, each arm's, and its error.

    Args:
        classroom, arms: a scene, and some of its trained arms. most: metres at which the scale of the errors ends.
        with_rays: below each arm's error that of its points on the rays of the cameras that they place.
    """
    chosen = np.linspace(0, len(classroom.test) - 1, 5).astype(int)
    rows = side_by_side(classroom, arms[0], chosen)[:2]
    names = ["image", "teacher"]
    for arm in arms:
        rows += side_by_side(classroom, arm, chosen)[2:]
        names += [arm.replace("-", "\n", 1), "its error"]
        if with_rays:
            rows.append(classroom.error_maps(classroom.on_rays(arm), chosen))
            names.append("on rays")
    return figures.maps(rows, names, "error in m", most=most)


def keep_rows(path, study, arms):
    """Add the rows of trained arms to those in a JSON file; one of the same arm, labels and minutes gives way."""
    names = ("scene", "teacher", "stereo", "preset", "seed", "arm")
    with artefacts.alone(path):
        rows = artefacts.read_json(path) if path.exists() else []
        rows += [row for row in reporting.without_ablations(reporting.collect(study)) if row["arm"] in arms]
        by_run = {(*(row.get(name, False) for name in names), round(row["train_seconds"] / 60)): row for row in rows}
        artefacts.write_json(path, list(by_run.values()))


def keep_results(folder, rows, claims, over_seeds, studies):
    """Plots, claims and answers, ``reporting.over_seeds``, and last ``results.csv`` and ``results.json``."""
    for study in studies:
        found = [row for row in rows if row["scene"] == study.scene]
        _keep(results_plot(study, found), folder / f"results_{study.scene.replace('/', '_')}.png")
    first = studies[0].scene  # which has the ablations
    there = [row for row in rows if row["scene"] == first]
    groups = reporting.ablation_groups(there)
    if groups:
        _keep(figures.ablations(groups), folder / f"ablations_{first.replace('/', '_')}.png")
    _keep(figures.cost_against_error(reporting.without_ablations(there)), folder / "cost_against_error.png")
    artefacts.write_json(folder / "claims.json", claims)
    artefacts.write_json(folder / "seeds.json", over_seeds)
    reporting.write_table(rows, folder / "results")


def results_plot(study, rows):
    """The test MSE of a scene's arms, beside that of the mean point and the paper's."""
    proper = reporting.without_ablations(rows)
    figure = figures.results(proper, rows[0]["mean_point_mse"], reporting.paper_mse(study.scene))
    figure.axes[0].set_title(f"{study.scene}, teacher {study.teacher}")
    return figure


def _keep(figure, path, dpi=110):
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
    plt.close(figure)  # or a notebook shows it once more


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
    done = [sibling for sibling in siblings if reporting.collect(sibling)]
    if not done:
        raise stages.MissingStage(f"no student of {', '.join(names)} is trained: run notebooks 04 and 05 first.")
    return done


def main(argv=None):
    """Stages 01 to 05 without notebooks, for machines that have neither papermill nor plotly, and for torchrun."""
    parser = argparse.ArgumentParser(prog="python -m kdutils.classroom", description=main.__doc__)
    parser.add_argument("scene", help="name, or folder in the 12Scenes layout")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="by default the preset's")
    parser.add_argument("--preset", choices=PRESETS, default="study")
    parser.add_argument("--teacher", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="an arm's budget; a long arm has eight times that")
    parser.add_argument("--checkpoint", default="auto", help="DUSt3R's: hub id, folder or file")
    parser.add_argument("--weights", default="auto", help="of backbones: timm, shipped, random, a path")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="add the arms' rows to this JSON file")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="test images, and what the arms say of them")
    options = parser.parse_args(argv)
    study = Study(options.scene, options.preset, options.teacher, options.device, options.seed, options.seconds)
    print(stages.settle_teacher(study, options.checkpoint))
    stages.prepare(study)
    stages.label(study, teachers.build(study, stages.frames(study), options.checkpoint))
    stages.align(study)
    room, arms = Classroom(study, options.weights), options.arms or study.arms
    for arm in arms:
        room.teach(arm)
    if training.RANK == 0:
        print(reporting.table(reporting.collect(study)))
        if options.keep:
            keep_rows(options.keep, study, arms)
        if options.picture:
            _keep(comparison(room, arms, 0.2, localisation.available()), options.picture, 75)


if __name__ == "__main__":
    main()
