"""What the README and the page of measurements say and show must be what the repository holds."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from kdutils.reporting import BRIEF_TABLE, beside, camera_table, claims_table, compressed_table, spread, table

REPOSITORY = Path(__file__).resolve().parent.parent
README, MEASUREMENTS, DATA = (REPOSITORY / folder / "README.md" for folder in (".", "figures", "data"))
ROWS = json.loads((REPOSITORY / "figures" / "results.json").read_text())


def tracked():
    listing = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("this is no git checkout")
    return listing.stdout.split()


@pytest.mark.parametrize("page", [README, MEASUREMENTS, DATA], ids=lambda page: page.parent.name)
def test_every_link_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text())
    assert targets
    for path, anchor in targets:
        if not path.startswith("http"):
            target = page.parent / path if path else page
            assert target.exists(), path
            assert not anchor or anchor in anchors(target), (path, anchor)


def anchors(page):
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def marked(name, page=README):
    return re.search(f"<!-- {name} -->(.*)<!-- /{name} -->", page.read_text(), re.DOTALL).group(1).strip()


def test_tables_are_those_that_were_measured():
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "figures"], cwd=REPOSITORY).returncode:
        pytest.skip("the figures are of a run of one's own, or this is no git checkout")
    assert marked("results", MEASUREMENTS) == table(ROWS, with_paper=True, columns=BRIEF_TABLE)
    claims = json.loads((REPOSITORY / "figures" / "claims.json").read_text())
    assert marked("claims") == claims_table([claim for claim in claims if "claim" in claim])
    answers, longer, over_seeds, adamw = (
        json.loads((REPOSITORY / "figures" / f"{name}.json").read_text())
        for name in ("open_questions", "longer", "seeds", "adamw")
    )
    assert marked("compressed", MEASUREMENTS) == compressed_table(answers["compressed"])
    assert marked("longer", MEASUREMENTS) == camera_table(longer)
    assert marked("seeds", MEASUREMENTS) == spread(over_seeds)
    assert marked("adamw", MEASUREMENTS) == beside(adamw, over_seeds, ("AdamW", "Muon"))


def test_a_gpus_figures_are_those_that_were_measured():
    measured = json.loads((REPOSITORY / "figures" / "cuda.json").read_text())
    dust3r, latency = measured["dust3r"], measured["latency"]
    numbers = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\w)", marked("cuda", MEASUREMENTS))
    shown = [float(number) for number in numbers]
    in_full, in_tf32 = (dust3r[f"published_s_per_pair{kind}"] for kind in ("", "_in_tf32"))
    ours, differs = dust3r["ours_s_per_pair"], dust3r["relative_difference"]
    expected = [*(round(1000 * seconds, 1) for seconds in (in_full, in_tf32, ours)),
                *(round(theirs / ours, 1) for theirs in (in_full, in_tf32)),
                *(round(100 * share, 2) for share in differs.values()),
                round(latency["dust3r_ms_a_pair"], 1)]  # fmt: skip
    for arm, milliseconds in latency["ms_an_image"].items():
        if arm != "original-mobilenet":
            expected += [round(milliseconds, 2), round(latency["times_faster_than_a_pair"][arm])]
    assert not set(expected) - set(shown)


def test_results_come_from_the_default_study():
    assert {(row["preset"], row["teacher"], row["seed"]) for row in ROWS} == {("sample", "compact", 0)}
    control = json.loads((REPOSITORY / "figures" / "control.json").read_text())
    assert {(row["preset"], row["teacher"], row["seed"]) for row in control} == {("sample", "depth", 0)}
    assert [(row["scene"], row["arm"]) for row in control] == [(row["scene"], row["arm"]) for row in ROWS]


def test_top_level_is_as_agreed():
    visible = {path.split("/")[0] for path in tracked() if not path.startswith(".")}
    assert visible == {"README.md", "requirements.txt", "notebooks", "kdutils", "data", "figures", "tests"}


def test_no_data_set_and_no_large_file_is_tracked():
    files = [REPOSITORY / path for path in tracked() if (REPOSITORY / path).is_file()]
    assert not [path for path in files if path.name.startswith("frame-") or path.suffix == ".pt"]
    weights = [path for path in files if path.is_relative_to(REPOSITORY / "data" / "weights")]
    assert not [path for path in files if path.stat().st_size > 2_000_000 and path not in weights]
    assert sum(path.stat().st_size for path in weights) < 40_000_000
