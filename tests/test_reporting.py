"""Rows, tables, claims and answers of metrics on disk, and of rows that are made up."""

import csv
import json
from dataclasses import asdict

import pytest
from numpy.testing import assert_allclose

from kdutils import artefacts, evaluation, reporting, training
from kdutils.settings import ABLATION_ARMS, ARMS, PAPER_ARMS, Study


def metrics(arm, mse, weights="random", seed=0):
    against = {"mse": mse, "rmse": 0.1, "median": 0.25, "p90": 0.3, "within_5cm": 0.4, "within_10cm": 0.5, "pixels": 9}
    study = Study("kitchen", "smoke", "depth", "cpu", seed)
    plan, preset = training.plan_for(study, ARMS[arm]), study.describe()
    return {
        "scene": "kitchen", "teacher": "depth", "preset": "smoke", "seed": 0, "arm": arm, "weights": weights,
        "weights_note": "", "against_teacher": against, "against_depth": {**against, "mse": 2 * mse},
        "where_shown": {"share": 0.9, **against, "mse": mse / 2},
        "on_rays": {"mse": mse / 4, "median": 0.2, "depth_mse": mse, "depth_median": 0.22},
        "mean_point": {**against, "mse": 1.0}, "size": {"parameters": 7, "megabytes": 28e-6, "half_megabytes": 14e-6},
        "localisation": {"translation": 0.07, "rotation": 2.5, "within_5cm_5deg": 0.3, "within_2cm_2deg": 0.1},
        "training": {"steps": round(200 * ARMS[arm].budget), "batch": 8, "loss": ARMS[arm].loss or "mse"},
        "timing": {"latency_ms": 1 / 3, "localised_milliseconds": 6.0, "train_seconds": 2.0,
                   "train_images_per_second": 800.0},
        "machine": "a machine",
        "settings": {"student": {"plan": asdict(plan)}, "preset": preset, "measured_by": evaluation.VERSION},
    }  # fmt: skip


MEASURED = {"vit16-frozen": 0.5, "cnn-scratch": 0.123456789, "anchornet-long": 0.05, "anchornet-scratch": 0.1,
            "anchornet-unfrozen": 0.15, "original-mobilenet": 0.7, "original-cnn": 0.6,
            "mobilenet-frozen-l1": 0.02, "mobilenet-frozen-mse": 0.2, "mobilenet-frozen-eighth": 0.4}  # fmt: skip


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    study = Study("kitchen", "smoke", "depth", "cpu")
    for arm, mse in MEASURED.items():
        found = metrics(arm, mse, "shipped" if arm.startswith(("mobilenet", "anchornet")) else "random")
        if arm in ABLATION_ARMS:  # whose cameras are not looked for
            found["localisation"] = found["on_rays"] = {}
            del found["timing"]["localised_milliseconds"]
        path = study.run_folder(arm) / "metrics.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(found))
    return reporting.collect(study)


def test_collected_rows_follow_the_arms(rows):
    assert [row["arm"] for row in rows] == [arm for arm in ARMS if arm in MEASURED]
    assert rows[0]["mse"] == 0.123456789 and rows[0]["depth_mse"] == 2 * 0.123456789
    assert rows[0]["shown_mse"] == 0.123456789 / 2 and rows[0]["shown_share"] == 0.9
    assert rows[0]["rays_mse"] == 0.123456789 / 4 and rows[0]["rays_depth_median"] == 0.22
    assert rows[0]["mean_point_mse"] == 1 and rows[0]["latency_ms"] == 1 / 3 and rows[0]["parameters"] == 7
    assert rows[0]["localised_rotation"] == 2.5 and rows[0]["train_images_per_second"] == 800
    assert reporting.located(rows[0]) == {**metrics("cnn-scratch", 1)["localisation"], "milliseconds": 6.0}


@pytest.mark.parametrize("is_old", [False, True])
def test_what_learned_by_another_plan_or_was_measured_otherwise_does_not_count(rows, is_old):
    path = Study("kitchen", "smoke", "depth", "cpu").run_folder("cnn-scratch") / "metrics.json"
    kept = artefacts.read_json(path)
    if is_old:
        del kept["settings"]["measured_by"], kept["on_rays"]
    else:
        kept["settings"]["student"]["plan"]["steps"] += 1
    artefacts.write_json(path, kept)
    assert "cnn-scratch" not in {row["arm"] for row in reporting.collect(Study("kitchen", "smoke", "depth", "cpu"))}


def test_what_learned_from_other_labels_than_those_on_disk_does_not_count(rows):
    study = Study("kitchen", "smoke", "depth", "cpu")
    settings = {"alignment": 1}
    artefacts.write_json(study.labels_folder / "labels.json", {"settings": settings})
    for arm, inputs in (("cnn-scratch", artefacts.digest(settings)), ("vit16-frozen", "others")):
        path = study.run_folder(arm) / "metrics.json"
        kept = artefacts.read_json(path)
        kept["settings"]["student"]["inputs"] = inputs
        artefacts.write_json(path, kept)
    for other in study.runs_folder.iterdir():
        if other.name not in ("cnn-scratch", "vit16-frozen"):
            (other / "metrics.json").unlink()
    assert [row["arm"] for row in reporting.collect(study)] == ["cnn-scratch"]


def test_arms_without_the_pretraining_they_ask_for_are_marked(rows):
    marked = {"vit16-frozen", "original-mobilenet"}  # all others begin with random weights by their own choice
    assert {row["arm"] for row in rows if row["unpretrained"]} == marked
    assert {row["label"] for row in rows} == {arm + " (random weights)" * (arm in marked) for arm in MEASURED}


def test_tables_agree(rows, tmp_path):
    reporting.write_table(rows, tmp_path / "results")
    kept = json.loads((tmp_path / "results.json").read_text())
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert kept == rows and len(table) == len(rows)
    for short, row in zip(table, rows):
        assert {name for name, text in short.items() if text} <= set(row)
        assert ("localised_rotation" in row) == bool(short["localised_rotation"]) == (row["arm"] not in ABLATION_ARMS)
        for name, text in short.items():
            if not text:
                assert name not in row
            elif isinstance(row[name], (int, float)):
                assert_allclose(float(text), row[name], rtol=1e-5)
            else:
                assert text == row[name]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_has_the_arms_proper_best_first(rows):
    names, rule, *lines = cells(reporting.table(rows))
    assert len({len(line) for line in (names, rule, *lines)}) == 1
    proper = [row["label"] for row in sorted(rows, key=lambda row: row["mse"]) if row["arm"] not in ABLATION_ARMS]
    assert [line[1] for line in lines] == [*proper, "*mean point*"]
    assert lines[0][names.index("MSE m²")] == "0.0500" and lines[0][names.index("camera cm")] == "7"
    assert lines[0][names.index("within 5 cm, 5°")] == "30%" and lines[-1][names.index("MSE m²")] == "1.0000"
    with_paper = cells(reporting.table(rows, with_paper=True))
    assert len(with_paper) == len(lines) + 4 and with_paper[-1][2] == "0.0012"
    assert lines[0][names.index("on rays m²")] == "0.0125" and lines[-1][names.index("on rays m²")] == ""


def test_two_runs_beside_each_other_by_their_means():
    first = {"a": {"0": 0.1, "1": 0.3}, "b": {"0": 1.0}, "c": {"0": 1.0}, "d": {"0": 1.0}}
    second = {"b": {"0": 0.02}, "a": {"1": 0.1, "0": 0.1, "2": 9.0}, "d": {"1": 1.0}}
    names, _, *lines = cells(reporting.beside(first, second, ("old", "new")))
    assert names == ["student", "old", "new", "new / old"]
    assert lines == [["b", "1.0000", "0.0200", "0.02"], ["a", "0.2000", "0.1000", "0.50"]]


def test_camera_table_says_what_was_learned_and_what_is_found(rows):
    some = [row for row in rows if row["arm"] in ("cnn-scratch", "anchornet-long")]
    names, _, line, *others = cells(reporting.camera_table([*some, {**some[1], "scene": "office"}]))
    assert [other[:3:2] for other in others] == [["kitchen", "cnn-scratch"], ["office", "anchornet-long"]]
    assert dict(zip(names, line, strict=True)) == {
        "scene": "kitchen", "teacher": "depth", "student": "anchornet-long", "minutes": "0",
        "images seen": "12,800", "MSE m²": "0.0500", "where shown": "0.0250", "on rays": "0.0125", "median cm": "25.0",
        "to depth m²": "0.1000", "to depth cm": "25.0", "camera cm": "7.0", "degrees": "2.50",
        "within 5 cm, 5°": "30%", "within 2 cm, 2°": "10%",
    }  # fmt: skip


@pytest.mark.parametrize("teacher, preset, has_stereo", [("compact", "hour", True), ("depth", "hour", False),
                                                         ("compact", "sample", False)])  # fmt: skip
def test_a_row_says_whether_stereo_helped_its_teacher(teacher, preset, has_stereo):
    found = metrics("cnn-scratch", 0.1)
    found["settings"]["preset"] = Study("kitchen", preset, teacher, "cpu").describe()
    row = reporting._row({**found, "teacher": teacher})
    names, _, line = cells(reporting.camera_table([row]))
    assert row["stereo"] == has_stereo and line[names.index("teacher")] == teacher + " + stereo" * has_stereo


def test_camera_table_leaves_out_what_was_not_measured(rows):
    missing = ("shown_mse", "rays_mse")
    old = {name: value for name, value in rows[0].items() if name not in missing}
    names, _, *lines = cells(reporting.camera_table([old, {**rows[1], **dict.fromkeys(missing)}]))
    assert {line[names.index(name)] for line in lines for name in ("where shown", "on rays")} == {""}


def test_the_control_compares_what_both_teachers_taught(rows):
    control = [{**row, "teacher": "compact", "depth_median": 0.5, "depth_mse": 0.25} for row in rows]
    both = rows[:2] + [row for row in rows if row["arm"] in ABLATION_ARMS]
    other = {"scene": "office"}, {"preset": "hour"}, {"seed": 1}
    others = [{**row, **change} for row in rows for change in other]
    names, _, *lines = cells(reporting.control_table(both + others, control))
    assert names == ["scene", "student", "median cm, depth", "median cm, compact", "MSE m², depth", "MSE m², compact"]
    assert [line[1] for line in lines] == [row["label"] for row in rows[:2]]
    assert lines[0][2:] == [f"{100 * rows[0]['depth_median']:.1f}", "50.0", "0.2469", "0.2500"]
    assert len(cells(reporting.control_table(others, control))) == 2  # no line


def test_a_file_whose_camera_was_not_located_has_none_in_the_table():
    file = {"student": "cnn-scratch", "form": "file", "megabytes": 7.25, "milliseconds": 4.91, "mse": 0.03284}
    text = reporting.compressed_table([{**file, "localised_translation": each} for each in (None, 0.382)])
    assert text.splitlines()[2:] == ["| cnn-scratch | file | 7.2 | 4.9 | 0.0328 |  |",
                                     "| cnn-scratch | file | 7.2 | 4.9 | 0.0328 | 38.2 |"]  # fmt: skip


def test_ablations_compare_what_was_trained(rows):
    assert reporting.ablation_groups(rows) == {  # none with itself alone
        "Backbone, patch and start": {"anchornet": {"unfrozen": 0.15, "scratch": 0.1}},
        "MobileNet frozen, half the budget: loss": {"mse": {"frozen": 0.2}, "l1": {"frozen": 0.02}},
        "MobileNet frozen: steps": {"25": {"frozen": 0.4}, "100": {"frozen": 0.2}},
        "AnchorNet unfrozen: steps": {"200": {"unfrozen": 0.15}, "1600": {"unfrozen": 0.05}},
    }


def test_spread_is_over_the_seeds_that_were_trained(rows, monkeypatch):
    for seed, mse in (7, 0.3), (11, 0.2):
        study = Study("kitchen", "smoke", "depth", "cpu", seed)
        artefacts.write_json(study.run_folder("anchornet-scratch") / "metrics.json",
                             metrics("anchornet-scratch", mse, seed=seed))  # fmt: skip
    by_arm = reporting.over_seeds(Study("kitchen", "smoke", "depth", "cpu", 7))
    assert len(by_arm) == 7 and by_arm["anchornet-scratch"] == {"0": 0.1, "7": 0.3, "11": 0.2}
    names, _, *lines = cells(reporting.spread(by_arm))
    best = ["anchornet-long", "cnn-scratch", "anchornet-unfrozen", "anchornet-scratch"]
    assert len(names) == 4 and [line[0] for line in lines][:4] == best
    assert lines[3] == ["anchornet-scratch", "3", "0.2000", "0.1000 to 0.3000"]
    assert lines[0] == ["anchornet-long", "1", "0.0500", "0.0500 to 0.0500"]


def test_frozen_backbones_are_compared_where_they_were_pretrained(rows):
    base = {**rows[0], "loss": "mse"}
    frozen = {**base, "arm": "vit16-frozen", "mse": 0.2, "weights": "shipped", "unpretrained": False}
    random = {**base, "arm": "vit16-frozen-random", "mse": 0.5, "weights": "random", "unpretrained": False}
    asked = "What is a pretrained backbone worth, frozen?"
    found = {answer["question"]: answer["found"] for answer in reporting.open_questions([frozen, random])}
    assert found[asked].endswith("(shipped weights): vit16 2.5x")
    untaught = reporting.open_questions([{**frozen, "unpretrained": True}, random])
    assert asked not in {answer["question"] for answer in untaught}
    groups = reporting.ablation_groups([frozen, random])
    assert groups == {"Backbone, patch and start": {"vit16": {"frozen": 0.2, "frozen, random weights": 0.5}}}
    assert not reporting.ablation_groups([{**frozen, "unpretrained": True}, random])


def test_open_questions_are_answered_by_the_rows(rows):
    # Neither the best localiser nor the one nearest to the depth camera has to have the least MSE.
    other = {"cnn-scratch": {"localised_translation": 0.06}, "vit16-frozen": {"depth_median": 0.01}}
    rows = [{**row, **other.get(row["arm"], {})} for row in rows]
    found = {answer["question"]: answer["found"] for answer in reporting.open_questions(rows)}
    assert found["Can a student localise the camera?"] == (
        "kitchen: cnn-scratch median 6.0 cm, 2.5°, 30% within 5 cm and 5°"
    )
    assert found["How far are students from the true depth?"] == "kitchen: vit16-frozen (random weights) median 1.0 cm"
    assert found["Is a network made for the task better, at the same steps and start?"] == (
        "kitchen: anchornet-scratch 0.1000 m² against 0.1235 (cnn-scratch)"
    )
    peers = found["And better than the networks of the authors' code, at the same start?"]
    assert "original-cnn has 6.0 times the MSE of anchornet-scratch" in peers
    assert "original-mobilenet (random weights) has 4.7 times the MSE of anchornet-unfrozen" in peers
    assert found["Do other distillation losses help?"] == (
        "kitchen: after 100 steps, one seed: l1 is best with 0.0200 m², the paper's MSE gives 0.2000"
    )
    worse = [{**row, "mse": 0.3} if row["arm"] == "mobilenet-frozen-l1" else row for row in rows]
    found_then = {answer["question"]: answer["found"] for answer in reporting.open_questions(worse)}
    assert found_then["Do other distillation losses help?"] == (
        "kitchen: after 100 steps, one seed: mse is best with 0.2000 m², l1 gives 0.3000"
    )
    two = reporting.open_questions([*rows, *({**row, "scene": "office"} for row in rows)])
    assert len(two) == len(found) and all(answer["found"].count("office: ") >= 1 for answer in two)


# Claims


def row(scene, arm, mse, unpretrained=False, megabytes=8.0, of=("dust3r", "study")):
    return {"scene": scene, "arm": arm, "label": arm, "mse": mse, "mean_point_mse": 1.0, "megabytes": megabytes,
            "teacher": of[0], "preset": of[1], "unpretrained": unpretrained,
            "weights": "random" if unpretrained else "shipped"}  # fmt: skip


def verdicts(rows):
    return {claim["claim"]: claim["held"] for claim in reporting.claims(rows)}


def test_claims_hold_when_the_rows_say_so():
    rows = [row("kitchen", "vit16-unfrozen", 0.0010), row("kitchen", "vit16-frozen", 0.0020),
            row("kitchen", "vit16-scratch", 0.0030), row("kitchen", "cnn-scratch", 0.0040)]  # fmt: skip
    assert set(verdicts(rows).values()) == {"held"}


def test_claims_fail_when_the_rows_say_so():
    rows = [row("office", "vit16-unfrozen", 0.4), row("office", "vit16-frozen", 0.3),
            row("office", "vit16-scratch", 0.2), row("office", "cnn-scratch", 0.15, megabytes=46)]  # fmt: skip
    assert set(verdicts(rows).values()) == {"did not hold"}


def test_claims_are_on_the_papers_own_arms():
    paper = [row("kitchen", "vit16-scratch", 0.2), row("kitchen", "cnn-scratch", 0.3)]
    others = [row("kitchen", arm, 1e-4, megabytes=60) for arm in ARMS if arm not in PAPER_ARMS]
    assert reporting.claims(paper + others) == reporting.claims(paper)
    assert verdicts(paper)["Students are small: 5 to 45 MB."] == "held"


def test_claims_on_pretraining_are_not_tested_without_pretrained_weights():
    rows = [row("office", "vit16-unfrozen", 0.1, unpretrained=True),
            row("office", "vit16-frozen", 0.2, unpretrained=True), row("office", "vit16-scratch", 0.3)]  # fmt: skip
    found = verdicts(rows)
    assert found["A pretrained backbone is better unfrozen than frozen."] == "not tested"
    assert found["Pretraining helps."] == "not tested"
    assert found["The ViT is better than the CNNs."] == "not tested"  # there is no CNN
    reasons = [{claim["found"] for claim in reporting.claims(some) if claim["held"] == "not tested"}
               for some in (rows, [row("office", "vit16-frozen", 0.2)])]  # fmt: skip
    untrained = "the arms to compare were not trained"
    assert reasons == [{"no pretrained weights were at hand", untrained}, {untrained}]


def test_vits_and_cnns_are_compared_start_by_start():
    rows = [row("kitchen", "vit16-frozen", 0.01), row("kitchen", "mobilenet-frozen", 0.02),
            row("kitchen", "vit16-scratch", 0.4), row("kitchen", "vit32-scratch", 0.08),
            row("kitchen", "cnn-scratch", 0.09), row("office", "vit16-scratch", 0.2),
            row("office", "cnn-scratch", 0.1)]  # fmt: skip
    claim = next(claim for claim in reporting.claims(rows) if "ViT" in claim["claim"])
    assert claim["held"] == "did not hold"
    assert claim["found"] == ("in 2 of 3 comparisons (ViT against CNN): kitchen, frozen: 0.010 against 0.020 m²; "
                              "kitchen, scratch: 0.080 against 0.090 m²; office, scratch: 0.200 against 0.100 m²")


def test_the_papers_figures_are_for_kitchens_and_offices():
    rooms = ("kitchen", "apt1/kitchen", "office", "office1/gates362", "office1/lounge", "apt2/bed")
    assert [reporting.paper_mse(room) for room in rooms] == [0.0011, 0.0011, 0.0012, 0.0012, None, None]


@pytest.mark.parametrize("of", [("compact", "study"), ("dust3r", "sample")])
def test_the_papers_figure_is_not_compared_with_another_experiments(of):
    rows = [row("kitchen", "vit16-scratch", 0.2, of=of), row("kitchen", "cnn-scratch", 0.001, of=of)]
    claim = next(claim for claim in reporting.claims(rows) if "0.0011" in claim["claim"])
    assert claim["held"] == "not tested" and claim["found"].endswith("paper's arms here kitchen: cnn-scratch 0.0010 m²")
