"""The students' speed: one image against one pair of DUSt3R, and training beside the original study's networks.

    python tests/bench_students.py                       # the machine's best device
    python tests/bench_students.py --train-size 96 128   # for a CPU: the original CNN works at full resolution

All in one run on one machine. DUSt3R has random weights (its times do not depend on them) and runs as this repository
does it: bfloat16 on CUDA. Students answer as `students.deployed` leaves them. Training images are counted at equal
output resolution, batch and precision.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kdutils import dust3r, evaluation, students, training  # noqa: E402
from kdutils.augmentation import Examples  # noqa: E402
from kdutils.settings import ARMS, MILD, Study, recipe_of  # noqa: E402

LATENCY_ARMS = ("anchornet-scratch", "cnn-scratch", "mobilenet-scratch", "vit16-scratch", "vit32-scratch",
                "vit64-scratch", "original-mobilenet")  # fmt: skip
TRAINED_ARMS = ("anchornet-scratch", "original-mobilenet", "original-cnn")
DUST3R_SIZE = (384, 512)


def main():
    options = parse()
    device = torch.device(options.device)
    result = {"machine": evaluation.machine(device), "size": options.size,
              "train_size": options.train_size, "batch": options.batch}  # fmt: skip
    pair = dust3r_milliseconds(device)
    result["dust3r_ms_a_pair"] = pair
    result["ms_an_image"] = {arm: student_milliseconds(arm, options.size, device) for arm in LATENCY_ARMS}
    result["times_faster_than_a_pair"] = {arm: pair / each for arm, each in result["ms_an_image"].items()}
    rates = {arm: [training_rate(arm, options, device) for _ in range(2)][1] for arm in TRAINED_ARMS}  # one to warm up
    own = rates["anchornet-scratch"]
    result |= {"training_images_a_second": rates, "times_their_rate": {arm: own / rate for arm, rate in rates.items()}}
    print(json.dumps(result, indent=2))


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs=2, default=DUST3R_SIZE, help="of the students' images: height, width")
    parser.add_argument("--train-size", type=int, nargs=2, default=DUST3R_SIZE)
    parser.add_argument("--batch", type=int, default=4, help="of the training; the original study's is 4")
    parser.add_argument("--seconds", type=float, default=20, help="of training an arm, twice; one step at least")
    return parser.parse_args()


@torch.inference_mode()
def dust3r_milliseconds(device, repeats=3):
    """Fewest milliseconds for one pair at 512x384."""
    model = dust3r.DUSt3R().to(device).eval().to(memory_format=torch.channels_last)
    images = [torch.rand(1, 3, *DUST3R_SIZE, device=device) for _ in range(2)]
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            model(*images)["conf_2"].cpu()
        times.append(1000 * (time.perf_counter() - started))
    return min(times)


def student_milliseconds(arm, size, device):
    """A GPU replays the student's few hundred kernels as one graph: to launch each takes longer than to run it."""
    student = students.build(replace(ARMS[arm], start="scratch"), size, uncertainty=False)[0]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    student = students.deployed(student, dtype).to(device, memory_format=torch.channels_last)
    return graph_milliseconds(student, size) if device.type == "cuda" else evaluation.latency(student, size, repeats=20)


@torch.inference_mode()
def graph_milliseconds(student, size, repeats=50):
    """Fewest milliseconds for one image that lies on the GPU, in bfloat16, as training and prediction are."""
    image = torch.rand(1, 3, *size, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # a graph is captured after a warm-up on another stream
            for _ in range(3):
                student(image)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            student(image)
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return min(times)


def training_rate(arm, options, device):
    """Images a second, augmentation included, validation not."""
    count, rng = 4 * options.batch, np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *options.train_size, 3), np.uint8)
    depth = np.full(images.shape[:3], 2, np.float32)
    height, width = options.train_size
    intrinsics = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]], np.float32)
    examples = Examples.of(images, depth, depth > 0, depth, intrinsics, np.tile(np.eye(4), (count, 1, 1)), device)
    study, given = Study(device=str(device)), replace(ARMS[arm], start="scratch")
    recipe = recipe_of(given)
    plan = training.Plan(recipe, 10**9, options.seconds, options.batch, validations=1, seed=0,
                         augmentation=MILD if recipe.augmented else None)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        study.workspace = Path(folder)
        everything = np.arange(count)
        _, manifest = training.run_arm(study, given, examples, everything, everything[:1], "bench", plan=plan)
    return manifest["images_per_second"]


if __name__ == "__main__":
    main()
