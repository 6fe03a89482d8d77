"""What the README says and shows must be what the repository holds."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from kdutils.evaluation import PAPER

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
ROWS = json.loads((REPOSITORY / "figures" / "results.json").read_text())


def tracked():
    listing = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("this is no git checkout")
    return listing.stdout.split()


def test_every_link_leads_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    missing = [t for t in targets if not t.startswith("http") and not (REPOSITORY / t).exists()]
    assert not missing


def test_results_table_is_the_one_that_was_measured():
    table = re.search(r"<!-- results -->(.*)<!-- /results -->", README, re.DOTALL).group(1)
    lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.strip().splitlines()[2:]]
    said = {(scene, arm): figures for scene, arm, *figures in lines}
    measured = {(row["scene"], row["label"]): shown(row) for row in ROWS}
    means = {(row["scene"], "mean point"): [f"{row['mean_point_mse']:.4f}"] for row in ROWS}
    paper = {(f"{kind}s, paper", "best ViT, teacher DUSt3R"): [f"{mse:.4f}"] for kind, mse in PAPER.items()}
    assert {key: value for key, value in said.items() if key not in means | paper} == measured
    assert {key: said[key][:1] for key in means | paper} == means | paper


def shown(row):
    return [f"{row['mse']:.4f}", f"{row['rmse']:.2f}", f"{100 * row['median']:.1f}", f"{row['within_10cm']:.1%}",
            f"{100 * row['depth_median']:.1f}", f"{row['megabytes']:.1f}", f"{row['latency_ms']:.0f}"]  # fmt: skip


def test_results_come_from_the_default_study():
    assert {(row["preset"], row["teacher"], row["seed"]) for row in ROWS} == {("sample", "depth", 0)}


def test_top_level_is_as_agreed():
    visible = {path.split("/")[0] for path in tracked() if not path.startswith(".")}
    assert visible == {"README.md", "requirements.txt", "notebooks", "kdutils", "data", "figures", "tests"}


def test_no_data_set_and_no_large_file_is_tracked():
    files = [REPOSITORY / path for path in tracked() if (REPOSITORY / path).is_file()]
    assert not [path for path in files if path.name.startswith("frame-") or path.suffix == ".pt"]
    assert not [path for path in files if path.stat().st_size > 2_000_000]
