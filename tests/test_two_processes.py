"""Two processes that torchrun starts train one student together."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("accelerate")

TOGETHER = """
import json, pathlib, sys
import torch, test_training
from kdutils import augmentation, training

torch.set_num_threads(1)
taken, take = [], augmentation.Examples.__getitem__
augmentation.Examples.__getitem__ = lambda self, index: taken.append(list(map(int, index))) or take(self, index)
weights, validate = [], training._Run._validate


def watched(run, *arguments):
    weights.append([float(tensor.detach().double().abs().sum()) for tensor in run.student.parameters()])
    return validate(run, *arguments)


training._Run._validate = watched
budget = json.loads(sys.argv[3])
_, manifest, _ = test_training.run(pathlib.Path(sys.argv[1]), arm=sys.argv[2], **budget)
said = {"weights": weights, "steps": manifest["steps"], "history": manifest["history"],
        "halves": [index for index in taken if len(index) == 2]}
pathlib.Path(sys.argv[1], f"rank{training.RANK}.json").write_text(json.dumps(said))
torch.distributed.destroy_process_group()
"""


def together(folder, arm, budget):
    """Train an arm with two processes; what each of them says of it."""
    (folder / "together.py").write_text(TOGETHER)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(folder / "together.py"), str(folder), arm, json.dumps(budget)],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("arm", "budget"),
    [("cnn-scratch", {"steps": 4, "validations": 2}),
     ("anchornet-scratch", {"steps": 4, "validations": 1}),
     ("cnn-scratch", {"steps": 10**9, "seconds": 2.5, "validations": 3})],
    ids=["steps", "running mean", "seconds"],
)  # fmt: skip
def test_two_processes_train_one_student(tmp_path, arm, budget):
    first, second = together(tmp_path, arm, budget)
    folder = tmp_path / "runs" / "kitchen" / "depth" / arm
    assert sorted(path.name for path in folder.iterdir()) == ["student.json", "student.safetensors"]
    manifest = json.loads((folder / "student.json").read_text())
    assert manifest["steps"] == first["steps"] == second["steps"]
    assert [row["step"] for row in first["history"]] == [row["step"] for row in second["history"]]
    assert manifest["history"] == first["history"]
    assert budget["steps"] == 10**9 or manifest["steps"] == 4
    assert first["weights"] == second["weights"] and len(first["weights"]) == len(manifest["history"])
    assert all(len(weights) > 10 for weights in first["weights"])
    # Each saw its own half of every batch of four.
    halves = [[*one, *other] for one, other in zip(first["halves"], second["halves"])]
    assert len(first["halves"]) == len(second["halves"]) == manifest["steps"]
    assert all(len(set(batch)) == 4 for batch in halves)
