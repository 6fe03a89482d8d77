"""What the arms' metrics say together: rows, tables, the paper's claims, and the questions that it left open."""

import csv
import io
import re
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path

import numpy as np

from kdutils import artefacts, evaluation
from kdutils.settings import ABLATION_ARMS, ARMS, ORIGINAL_ARMS, PAPER_ARMS, RECIPES, STARTS, Study
from kdutils.training import plan_for

PAPER = {"kitchen": 0.0011, "office": 0.0012}  # test MSE of the paper's best student (ViT), arXiv 2412.02039
COLUMNS = ("scene", "teacher", "preset", "seed", "arm", "weights", "mse", "mean_point_mse", "rmse", "median", "p90",
           "within_5cm", "within_10cm", "shown_share", "shown_mse", "depth_mse", "depth_rmse", "depth_median",
           "depth_p90", "depth_within_5cm", "depth_within_10cm", "rays_mse", "rays_median", "rays_depth_mse",
           "rays_depth_median", "localised_translation", "localised_rotation", "localised_within_5cm_5deg",
           "localised_within_2cm_2deg", "localised_milliseconds", "loss", "steps", "batch", "parameters", "megabytes",
           "half_megabytes", "latency_ms", "train_seconds", "train_images_per_second", "machine")  # fmt: skip
TABLE = ("scene", "student", "MSE m²", "on rays m²", "median cm", "within 10 cm", "to depth cm", "camera cm",
         "within 5 cm, 5°", "MB", "ms", "trained s")  # fmt: skip
RANDOM = "frozen, random weights"  # a start for comparison
BRIEF_TABLE = tuple(name for name in TABLE if name not in ("within 10 cm", "within 5 cm, 5°", "trained s"))


def paper_mse(scene):
    """The paper's figure for rooms of this scene's kind, None where its name tells none."""
    room = scene.replace("office1/lounge", "lounge")  # which is no office, though in an office building
    return next((mse for kind, mse in PAPER.items() if kind in room), None)


def collect(study):
    """The study's finished arms on its scene, one flat row each, in the order of ``settings.ARMS``.

    A student that learned by another plan than the study's or from other labels than those on disk, or was measured by
    an earlier version, does not count.
    """
    paths = {arm: study.run_folder(arm) / "metrics.json" for arm in ARMS}
    found = {arm: artefacts.read_json(path) for arm, path in paths.items() if path.exists()}
    labels = study.labels_folder / "labels.json"
    labels = artefacts.digest(artefacts.read_json(labels)["settings"]) if labels.exists() else None

    def is_current(arm, settings):
        plan = artefacts.digest(asdict(plan_for(study, ARMS[arm])))
        return (artefacts.digest(settings["student"]["plan"]) == plan
                and labels in (None, settings["student"].get("inputs"))
                and settings.get("measured_by") == evaluation.VERSION)  # fmt: skip

    return [_row(metrics) for arm, metrics in found.items() if is_current(arm, metrics["settings"])]


def over_seeds(study):
    """Test MSE in m² of the arms proper, under each seed that the scene was trained with: arm -> {seed: MSE}."""
    found = [re.fullmatch(r".+-seed(\d+)", folder.name) for folder in study.runs_folder.glob("*-seed*")]
    mse = {}
    for seed in sorted({0, *(int(match[1]) for match in found if match)}):
        sibling = Study(study.given, study.preset_name, study.teacher, str(study.device), seed)
        for row in without_ablations(collect(sibling)):
            mse.setdefault(row["label"], {})[str(seed)] = row["mse"]
    return mse


def spread(by_arm):
    """``over_seeds`` as a Markdown table, best mean first: what another seed changes in an arm's test MSE."""
    ranked = sorted(((arm, [*mse.values()]) for arm, mse in by_arm.items()), key=lambda item: np.mean(item[1]))
    lines = [[arm, str(len(mse)), f"{np.mean(mse):.4f}", f"{min(mse):.4f} to {max(mse):.4f}"] for arm, mse in ranked]
    return markdown(("student", "seeds", "MSE m², mean", "lowest to highest"), lines)


def beside(first, second, names):
    """Two of ``over_seeds``, called ``names``, as a Markdown table: mean test MSEs, and the second by the first.

    Best of the second first; arms and seeds that only one of the two has are left out.
    """
    seeds = {arm: first[arm].keys() & second[arm].keys() for arm in first.keys() & second.keys()}
    means = {arm: [np.mean([by_arm[arm][seed] for seed in same]) for by_arm in (first, second)]
             for arm, same in seeds.items() if same}  # fmt: skip
    lines = [[arm, f"{one:.4f}", f"{other:.4f}", f"{other / one:.2f}"]
             for arm, (one, other) in sorted(means.items(), key=lambda item: item[1][1])]  # fmt: skip
    return markdown(("student", *names, f"{names[1]} / {names[0]}"), lines)


def without_ablations(rows):
    """The rows of the arms proper."""
    return [row for row in rows if row["arm"] not in ABLATION_ARMS]


def write_table(rows, path):
    """Rows as CSV, and last as JSON beside it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _short(row[name]) for name in COLUMNS if name in row} for row in rows)
    artefacts.write_text(Path(path).with_suffix(".csv"), text.getvalue())
    artefacts.write_json(Path(path).with_suffix(".json"), rows)


def markdown(names, lines):
    """A Markdown table: column ``names``, and ``lines`` of as many texts."""
    rows = [f"| {' | '.join(cells)} |" for cells in (names, *lines)]
    return "\n".join([rows[0], "|---" * len(names) + "|", *rows[1:]])


def table(rows, with_paper=False, columns=TABLE):
    """Rows as a Markdown table, best first in each scene, with the scene's mean point and, if asked, the paper's.

    The arms of the ablations are left out: they have a smaller budget.
    """
    rows, lines = without_ablations(rows), []
    for scene in dict.fromkeys(row["scene"] for row in rows):
        ranked = sorted((row for row in rows if row["scene"] == scene), key=lambda row: row["mse"])
        lines += [_cells(row) for row in ranked]
        lines.append([scene, "*mean point*", f"{ranked[0]['mean_point_mse']:.4f}", *[""] * 9])
    if with_paper:
        paper = "*best ViT, teacher DUSt3R*"
        lines += [[f"*paper, {kind}s*", paper, f"{mse}", *[""] * 9] for kind, mse in PAPER.items()]
    return markdown(columns, [[line[TABLE.index(name)] for name in columns] for line in lines])


def camera_table(rows):
    """Rows as a Markdown table of how well they find the camera, and of what and how long they learned.

    Scenes and teachers are in the order in which they come; best first where both are the same.
    """
    by = itemgetter("scene", "teacher")
    taught = list(dict.fromkeys(by(row) for row in rows))
    ranked = sorted(rows, key=lambda row: (taught.index(by(row)), row["mse"]))
    names = ("scene", "teacher", "student", "minutes", "images seen", "MSE m²", "where shown", "on rays", "median cm",
             "to depth m²", "to depth cm", "camera cm", "degrees", "within 5 cm, 5°", "within 2 cm, 2°")  # fmt: skip
    lines = [[row["scene"], row["teacher"] + " + stereo" * row.get("stereo", False), row["label"],
              f"{row['train_seconds'] / 60:.0f}", f"{row['steps'] * row['batch']:,}", f"{row['mse']:.4f}",
              _metres2(row.get("shown_mse")), _metres2(row.get("rays_mse")), f"{100 * row['median']:.1f}",
              f"{row['depth_mse']:.4f}", f"{100 * row['depth_median']:.1f}", *place_cells(located(row))[:4]]
             for row in ranked]  # fmt: skip
    return markdown(names, lines)


def _centimetres(metres):
    """As text; nothing where it was not measured."""
    return "" if metres is None else f"{100 * metres:.1f}"


def _metres2(mse):
    """As text; nothing where it was not measured."""
    return "" if mse is None else f"{mse:.4f}"


def control_table(rows, control):
    """Distance from the depth camera, over all that it sees, of students that learned from two teachers' labels.

    Args:
        rows, control: of one teacher and of the other, see ``collect``; what only one of them has of a scene, preset,
            seed and arm is left out.
    """
    same = itemgetter("scene", "preset", "seed", "arm")
    others = {same(row): row for row in control}
    pairs = [(row, others[same(row)]) for row in without_ablations(rows) if same(row) in others]
    teachers = [row["teacher"] for row in (rows[0], control[0])]
    names = ["scene", "student", *(f"{figure}, {name}" for figure in ("median cm", "MSE m²") for name in teachers)]
    lines = [[pair[0]["scene"], pair[0]["label"], *(f"{100 * row['depth_median']:.1f}" for row in pair),
              *(f"{row['depth_mse']:.4f}" for row in pair)] for pair in pairs]  # fmt: skip
    return markdown(names, lines)


def compressed_table(rows):
    """What students are as files, as a Markdown table.

    Args:
        rows: dicts of ``student``, ``form``, ``megabytes``, ``milliseconds`` for one image, ``mse`` in m², and
            ``localised_translation``, the camera's median error in metres, or None.
    """
    lines = [[row["student"], row["form"], f"{row['megabytes']:.1f}", f"{row['milliseconds']:.1f}",
              f"{row['mse']:.4f}", _centimetres(row["localised_translation"])] for row in rows]  # fmt: skip
    return markdown(("student", "as", "MB", "ms an image", "MSE m²", "camera cm"), lines)


def claims_table(found):
    """``claims`` as a Markdown table."""
    return markdown(("claim of the paper", "held if", "what we found", "held?"), [claim.values() for claim in found])


def _cells(row):
    return [row["scene"], row["label"], f"{row['mse']:.4f}", _metres2(row.get("rays_mse")),
            f"{100 * row['median']:.1f}", f"{row['within_10cm']:.1%}", f"{100 * row['depth_median']:.1f}",
            f"{100 * row['localised_translation']:.0f}",
            f"{row['localised_within_5cm_5deg']:.0%}", f"{row['megabytes']:.1f}", f"{row['latency_ms']:.1f}",
            f"{row['train_seconds']:.0f}"]  # fmt: skip


def claims(rows):
    """What the paper claims, how it is tested here, what these rows say, and whether it held.

    Args:
        rows: of one or more scenes, see ``collect``; only the paper's own arms count.

    Returns:
        Dicts of texts: ``claim``, ``test``, ``found``, and ``held``: "held", "did not hold" or "not tested".
    """
    rows = [row for row in rows if row["arm"] in PAPER_ARMS]
    if not rows:
        return []
    best = _best(rows)
    ratios = "; ".join(f"{scene}: {row['mean_point_mse'] / row['mse']:.0f} times lower" for scene, row in best.items())
    sizes = [row["megabytes"] for row in rows]
    return [
        _claim("One image is enough to tell where its points are.",
               "the MSE of the best of the paper's arms is below a tenth of the mean point's",
               ratios,
               all(row["mse"] < 0.1 * row["mean_point_mse"] for row in best.values())),
        _paper_figure(rows, best),
        _vit_or_cnn(rows),
        _compare(rows, "A pretrained backbone is better unfrozen than frozen.", "unfrozen", "frozen"),
        _compare(rows, "Pretraining helps.", "unfrozen", "scratch"),
        _claim("Students are small: 5 to 45 MB.", "at most 45 MB at 32 bits",
               f"{min(sizes):.1f} to {max(sizes):.1f} MB", max(sizes) <= 45),
    ]  # fmt: skip


def open_questions(rows):
    """What the paper left open, and what these rows answer: dicts of ``question`` and ``found``."""
    answers = []
    for scene in dict.fromkeys(row["scene"] for row in rows):
        here = {row["arm"]: row for row in rows if row["scene"] == scene}
        answers += [(question, f"{scene}: {answer}") for question, answer in _answers(here)]
    return [{"question": question, "found": "; ".join(found for asked, found in answers if asked == question)}
            for question in dict.fromkeys(question for question, _ in answers)]  # fmt: skip


def _answers(here):
    """Questions and answers of one scene's rows, by arm."""
    proper = without_ablations(here.values())
    there, deep = (min(proper, key=lambda row: np.nan_to_num(row[figure], nan=np.inf))
                   for figure in ("localised_translation", "depth_median"))  # fmt: skip
    yield (
        "Can a student localise the camera?",
        f"{there['label']} median {100 * there['localised_translation']:.1f} cm, "
        f"{there['localised_rotation']:.1f}°, {there['localised_within_5cm_5deg']:.0%} within 5 cm and 5°",
    )
    yield ("How far are students from the true depth?", f"{deep['label']} median {100 * deep['depth_median']:.1f} cm")
    compared = []
    for start in STARTS:
        own = here.get(f"anchornet-{start}")
        paper = [row for arm, row in here.items() if arm in PAPER_ARMS and PAPER_ARMS[arm].start == start]
        if own and paper:
            best = min(paper, key=lambda row: row["mse"])
            compared.append(f"{own['label']} {own['mse']:.4f} m² against {best['mse']:.4f} ({best['label']})")
    if compared:
        yield "Is a network made for the task better, at the same steps and start?", ", ".join(compared)
    pairs = [(here.get(f"anchornet-{arm.start}"), here.get(name)) for name, arm in ORIGINAL_ARMS.items()]
    for own, peer in (pair for pair in pairs if all(pair)):
        yield ("And better than the networks of the authors' code, at the same start?",
               f"{peer['label']} has {peer['mse'] / own['mse']:.1f} times the MSE of {own['label']}; "
               f"it trains {peer['train_images_per_second']:.0f} images/s, {own['label']} "
               f"{own['train_images_per_second']:.0f}")  # fmt: skip
    frozen = [(name, here[random], here[frozen]) for name, frozen, random in _frozen_pairs()
              if {frozen, random} <= set(here) and not here[frozen]["unpretrained"]]  # fmt: skip
    if frozen:
        gains = ", ".join(f"{name} {random['mse'] / pretrained['mse']:.1f}x" for name, random, pretrained in frozen)
        note = " and ".join(dict.fromkeys(pretrained["weights"] for _, _, pretrained in frozen))
        yield ("What is a pretrained backbone worth, frozen?",
               f"MSE of a random one, divided by that of the pretrained one ({note} weights): {gains}")  # fmt: skip
    losses = {row["loss"]: row for arm, row in here.items()
              if arm in ABLATION_ARMS and ARMS[arm].loss and not row["unpretrained"]}  # fmt: skip
    if "mse" in losses:
        best, *others = sorted(losses.values(), key=lambda row: row["mse"])
        compared = f"the paper's MSE gives {losses['mse']['mse']:.4f}"
        if best["loss"] == "mse":
            compared = ", ".join(f"{row['loss']} gives {row['mse']:.4f}" for row in others[:1])
        yield ("Do other distillation losses help?",
               f"after {best['steps']} steps, one seed: {best['loss']} is best with {best['mse']:.4f} m², "
               f"{compared}")  # fmt: skip


def _frozen_pairs():
    """Names of backbones, each with its frozen arm and the frozen arm whose weights stay random."""
    return [(arm.removesuffix("-frozen-random"), arm.removesuffix("-random"), arm)
            for arm in ABLATION_ARMS if arm.endswith("-frozen-random")]  # fmt: skip


def ablation_groups(rows):
    """Test MSE by one setting at a time, for one scene's rows: a title to settings, and these to m² by start.

    An arm that should have been pretrained and was not is left out.
    """
    mse = {row["arm"]: row["mse"] for row in rows if not row["unpretrained"]}
    steps = {row["arm"]: row["steps"] for row in rows}
    groups = {
        "Backbone, patch and start": {
            name: {**{start: f"{name}-{start}" for start in STARTS}, RANDOM: random}
            for name, _, random in _frozen_pairs()
        },
        "MobileNet frozen, half the budget: loss": {
            ARMS[arm].loss: {"frozen": arm} for arm in ABLATION_ARMS if ARMS[arm].loss
        },
        "MobileNet frozen: steps": _by_budget("mobilenet", "frozen", RECIPES["frozen"].loss, steps),
        "AnchorNet unfrozen: steps": _by_budget("anchornet", "unfrozen", RECIPES["anchornet"].loss, steps),
    }
    found = {}
    for title, group in groups.items():
        trained = {name: {start: mse[arm] for start, arm in arms.items() if arm in mse} for name, arms in group.items()}
        if sum(map(len, trained.values())) > 1:  # one alone is compared with nothing
            found[title] = {name: by_start for name, by_start in trained.items() if by_start}
    return found


def _by_budget(backbone, start, loss, steps):
    """Arms that differ by their budgets alone, by the steps that they took and their start."""
    arms = [arm for arm in ARMS.values() if (arm.backbone, arm.start, arm.weights) == (backbone, start, None)]
    alike = sorted((arm.budget, arm.name) for arm in arms if arm.loss in (None, loss))
    return {f"{steps[name]}": {start: name} for _, name in alike if name in steps}


def located(row):
    """The localisation figures of a row, as ``localisation.pose_errors`` gives them."""
    return {name.removeprefix("localised_"): value for name, value in row.items() if name.startswith("localised_")}


def place_cells(place):
    """Localisation figures as texts for a table."""
    return [f"{100 * place['translation']:.1f}", f"{place['rotation']:.2f}", f"{place['within_5cm_5deg']:.0%}",
            f"{place['within_2cm_2deg']:.0%}", f"{place['milliseconds']:.0f}"]  # fmt: skip


def _best(rows):
    return {scene: min((row for row in rows if row["scene"] == scene), key=lambda row: row["mse"])
            for scene in dict.fromkeys(row["scene"] for row in rows)}  # fmt: skip


def _paper_figure(rows, best):
    """The paper's own figures, which only its own experiment can confirm or contradict."""
    text = "The best student's test MSE is 0.0011 m² (kitchens) and 0.0012 m² (offices)."
    found = "; ".join(f"{scene}: {row['label']} {row['mse']:.4f} m²" for scene, row in best.items())
    if {(row["teacher"], row["preset"]) for row in rows} != {("dust3r", "study")}:
        found = f"not comparable: another teacher, other rooms, a smaller budget; best of the paper's arms here {found}"
        return _untested(text, "below 0.0015, with the paper's teacher and rooms", found)
    return _claim(text, "below 0.0015", f"best {found}", all(row["mse"] < 0.0015 for row in best.values()))


def _vit_or_cnn(rows):
    """A claim on the best ViT and the best CNN of each start, on all scenes that have both."""
    wins, found = [], []
    for scene in dict.fromkeys(row["scene"] for row in rows):
        for start in STARTS:
            here = [row for row in rows if row["scene"] == scene and PAPER_ARMS[row["arm"]].start == start]
            vits, cnns = ([row for row in here if (PAPER_ARMS[row["arm"]].backbone == "vit") == is_vit]
                          for is_vit in (True, False))  # fmt: skip
            if vits and cnns:
                vit, cnn = (min(kind, key=lambda row: row["mse"]) for kind in (vits, cnns))
                wins.append(vit["mse"] < cnn["mse"])
                found.append(f"{scene}, {start}: {vit['mse']:.3f} against {cnn['mse']:.3f} m²")
    text, test = "The ViT is better than the CNNs.", "the best ViT's MSE is below the best CNN's, start by start"
    if not wins:
        return _untested(text, test, "the arms to compare were not trained")
    said = f"in {sum(wins)} of {len(wins)} comparisons (ViT against CNN): {'; '.join(found)}"
    return _claim(text, test, said, all(wins))


def _compare(rows, text, better, worse):
    """A claim on two starts of the same backbone, on all scenes that have both."""
    by_arm = {(row["scene"], row["arm"]): row for row in rows}
    pairs = [(row, by_arm[scene, f"{arm.split('-')[0]}-{worse}"]) for (scene, arm), row in by_arm.items()
             if arm.endswith(f"-{better}") and (scene, f"{arm.split('-')[0]}-{worse}") in by_arm]  # fmt: skip
    pretrained = [(a, b) for a, b in pairs if not a["unpretrained"] and not b["unpretrained"]]
    test = f"{better} has a lower MSE than {worse}, backbone by backbone"
    if not pretrained:
        found = "no pretrained weights were at hand" if pairs else "the arms to compare were not trained"
        return _untested(text, test, found)
    wins = sum(a["mse"] < b["mse"] for a, b in pretrained)
    origins = " and ".join(dict.fromkeys(a["weights"] for a, _ in pretrained))
    return _claim(text, test, f"in {wins} of {len(pretrained)} comparisons ({origins} weights)",
                  wins == len(pretrained))  # fmt: skip


def _claim(text, test, found, held):
    return {"claim": text, "test": test, "found": found, "held": "held" if held else "did not hold"}


def _untested(text, test, found):
    return {"claim": text, "test": test, "found": found, "held": "not tested"}


def _row(metrics):
    own = {name: value for name, value in metrics["against_teacher"].items() if name != "pixels"}
    shown = {f"shown_{name}": metrics["where_shown"].get(name) for name in ("share", "mse")}
    depth = {f"depth_{name}": value for name, value in metrics["against_depth"].items() if name != "pixels"}
    first = {name: metrics[name] for name in ("scene", "teacher", "preset", "seed", "arm", "weights", "machine")}
    arm, preset = ARMS[metrics["arm"]], metrics["settings"]["preset"]
    unpretrained = metrics["weights"] == "random" and arm.start != "scratch" and arm.weights != "random"
    label = metrics["arm"] + (" (random weights)" if unpretrained else "")
    baseline = metrics["mean_point"]["mse"]
    localised = {f"localised_{name}": value for name, value in metrics["localisation"].items()}
    rays = {f"rays_{name}": value for name, value in metrics["on_rays"].items()}
    first["stereo"] = preset.get("stereo", False) and metrics["teacher"] in preset["assisted"]
    return {**first, "label": label, "unpretrained": unpretrained, **own, **shown, "mean_point_mse": baseline, **depth,
            **rays, **localised, **metrics["training"], **metrics["size"], **metrics["timing"]}  # fmt: skip


def _short(value):
    return f"{value:.6g}" if isinstance(value, float) else value
