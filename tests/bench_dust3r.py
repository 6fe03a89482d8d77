"""DUSt3R's speed over a pair graph, beside the published tool's procedure: same weights, pairs and machine.

The published procedure is rebuilt here from its description, around our network: every pair is a batch of its own,
both of its images are encoded anew, attention is written out, and all predictions stay in memory. Run it with

    python tests/bench_dust3r.py                                     # the full network at 512 x 384: twenty minutes
    python tests/bench_dust3r.py --checkpoint FILE --device cuda
    python tests/bench_dust3r.py --tiny --images 1000 --most-pairs 10000 --published 0      # memory over a whole scene

Without a checkpoint weights are random: times and memory are the same, and so is the arithmetic that is compared.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kdutils import dust3r, evaluation, inference, labelling, pairs  # noqa: E402

TINY = {"enc_embed_dim": 64, "enc_depth": 2, "enc_num_heads": 4, "dec_embed_dim": 64, "dec_depth": 2,
        "dec_num_heads": 4, "head_type": "linear"}  # fmt: skip


def main():
    options = parse()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = (dust3r.load_checkpoint(options.checkpoint, device) if options.checkpoint
             else calmed(dust3r.DUSt3R(**TINY if options.tiny else {})).to(device).eval())  # fmt: skip
    frames = SimpleNamespace(image=smooth_images(options.images, options.size))
    graph = pairs.window_pairs(options.images, options.window, cyclic=True)[: options.most_pairs]
    result = {"machine": evaluation.machine(device), "images": options.images, "pairs": len(graph),
              "size": options.size, "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.published:
            some = graph[np.linspace(0, len(graph) - 1, options.published).astype(int)]
            if device.type == "cuda":  # the published demo allows TF32; points are compared with single precision's
                allow_tf32(True)
                result["published_s_per_pair_in_tf32"] = published(model, frames.image, some)[1]
                allow_tf32(False)
            theirs, result["published_s_per_pair"] = published(model, frames.image, some)
            torch.backends.cudnn.allow_tf32 = True  # torch's default, with which ours runs
        model.to(memory_format=torch.channels_last)
        labelled(model, frames, graph[: 128 if device.type == "cuda" else 1], Path(folder) / "warm")
        result["ours_s_per_pair"] = labelled(model, frames, graph, Path(folder) / "whole")
        result["parts_s"] = parts_of(model, frames, graph, Path(folder) / "parts")
        result["peak_host_memory_GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if options.published:
            result["times_faster"] = result["published_s_per_pair"] / result["ours_s_per_pair"]
            result["relative_difference"] = difference(inference.DUSt3RTeacher(frames, model), some, theirs)
    print(json.dumps(result, indent=2))


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="hub id, folder or file")
    parser.add_argument("--tiny", action="store_true", help="a tiny network with a linear head")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--window", type=int, default=5, help="of the pair graph swin, both directions")
    parser.add_argument("--most-pairs", type=int, default=10**9)
    parser.add_argument("--published", type=int, default=4, help="pairs done as published, evenly spread; 0 for none")
    parser.add_argument("--size", type=int, nargs=2, default=(384, 512), help="height and width")
    parser.add_argument("--folder", help="where predictions go for a while; by default the system's")
    return parser.parse_args()


def calmed(model):
    """Random weights whose points stay within a few metres, as trained ones do."""
    for head in (model.downstream_head1, model.downstream_head2):
        last = head.proj if isinstance(head, dust3r.LinearHead) else head.dpt["head"][-1]
        last.weight.data *= 0.1
    return model


def allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def smooth_images(count, size):
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((count, 3, 8, 8), np.float32))
    return np.concatenate([
        (255 * torch.nn.functional.interpolate(one[None], size, mode="bicubic").clamp(0, 1)).byte()
        .permute(0, 2, 3, 1).numpy() for one in coarse
    ])  # fmt: skip


def written_out(query, key, value):
    weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(-2)


@torch.inference_mode()
def published(model, images, graph):
    """Predictions of the pairs, kept in memory, and seconds a pair."""
    ours, dust3r.attend = dust3r.attend, written_out
    kept, device = [], model.enc_norm.weight.device
    try:
        for number, pair in enumerate(tqdm([graph[0], *graph], desc="as published", unit="pair")):
            if number == 1:  # the first one only warms up
                started = time.perf_counter()
            views = (torch.from_numpy(images[i])[None].to(device).permute(0, 3, 1, 2) / 127.5 - 1 for i in pair)
            kept.append({name: value.cpu().numpy() for name, value in model(*views).items()})
        return kept[1:], (time.perf_counter() - started) / len(graph)
    finally:
        dust3r.attend = ours


def labelled(model, frames, graph, folder):
    """Seconds a pair; the disk works while the network does."""
    folder.mkdir()
    teacher = inference.DUSt3RTeacher(frames, model, folder=folder)
    started = time.perf_counter()
    labelling.label_pairs(teacher, graph, frames.image.shape[1:3], folder / "labels", "bench",
                          progress=lambda **of: tqdm(desc=folder.name, unit="pair", **of))  # fmt: skip
    seconds = (time.perf_counter() - started) / len(graph)
    shutil.rmtree(folder)
    return seconds


def parts_of(model, frames, graph, folder):
    """Where the time goes, in seconds: a run of its own, for a clock on each part makes a GPU wait."""
    parts, device = {}, model.enc_norm.weight.device
    for name in ("encode", "decoder_layers", "finest", "pointmaps"):
        setattr(model, name, timed(getattr(model, name), parts, name, device))
    write, labelling.write_shard = labelling.write_shard, timed(labelling.write_shard, parts, "disk")
    try:
        labelled(model, frames, graph, folder)
    finally:
        labelling.write_shard = write
    return {name: round(seconds, 2) for name, seconds in parts.items()}


def timed(function, parts, name, device=None):
    def wrapped(*args, **kwargs):
        with stopwatch(parts, name, device):
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def stopwatch(parts, name, device):
    started = time.perf_counter()
    yield
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    parts[name] = parts.get(name, 0) + time.perf_counter() - started


def difference(teacher, graph, theirs):
    """Distance of our points from theirs, relative to the points' length."""
    errors = []
    for which, answer in teacher.predictions(graph):
        for place, k in enumerate(which):
            for name in ("pts3d_1", "pts3d_2_in_view1"):
                ours, reference = answer[name][place].cpu().numpy(), theirs[k][name][0]
                errors.append(np.linalg.norm(ours - reference, axis=-1) / np.linalg.norm(reference, axis=-1))
    return {"median": float(np.median(errors)), "largest": float(np.max(errors))}


if __name__ == "__main__":
    main()
