"""How far a student's points lie from the teacher's labels and from the depth camera's, how large it is, how fast.

Predictions are kept apart from their evaluation, so that a figure can be computed anew without training again.
"""

import platform
import time
from pathlib import Path

import numpy as np
import torch

from kdutils import artefacts, geometry, registration
from kdutils.parallel import in_threads
from kdutils.training import half_precision, predict

VERSION = 3  # raise it when a student's metrics are measured otherwise: those on disk are then measured anew
PREDICTIONS = "predictions.safetensors"  # of an arm for the test frames, in its folder
BANDS_CM = (5, 10)
SAME_PLACE = 0.05  # metres: the side of the cubes in which points count as of one place, or of neighbouring ones


def point_errors(predicted, truth, mask):
    """Error figures of predicted points.

    Args:
        predicted, truth: ``(N, H, W, 3)`` in metres, one frame.
        mask: ``(N, H, W)`` bool, the pixels that count.

    Returns:
        A dict: ``mse`` per coordinate in m² (the paper's figure), ``rmse``, ``median``, ``p90`` of the distance in
        metres, ``within_5cm`` and ``within_10cm`` as shares, and the number of ``pixels``.

    Raises:
        ValueError: no pixel counts.
    """
    if not mask.any():
        raise ValueError("no pixel to evaluate: the mask is empty")

    def squared_of(frame):
        off = (predicted[frame] - truth[frame]).astype(np.float64)
        return np.einsum("hwc,hwc->hw", off, off)[mask[frame]]

    squared = np.concatenate(in_threads(squared_of, range(len(mask))))
    mean, distance = float(np.mean(squared)), np.sqrt(squared)
    median, p90 = np.percentile(distance, [50, 90])
    return {
        "mse": mean / 3,
        "rmse": mean**0.5,
        "median": float(median),
        "p90": float(p90),
        **{f"within_{cm}cm": float(np.mean(distance < cm / 100)) for cm in BANDS_CM},
        "pixels": int(mask.sum()),
    }


def shown(points, taught, masks):
    """Which points ``(N, H, W, 3)`` lie where a training image has a label: in the same cube or one beside it.

    Args:
        points: in the world, metres. taught, masks: the training images' points ``(M, H, W, 3)``, and the pixels of
            them that have a label ``(M, H, W)``.

    Returns:
        ``(N, H, W)`` bool: True within 5 cm of a label of a training image, False from 18 cm on.
    """
    labelled = in_threads(lambda image: np.unique(_cubes(taught[image][masks[image]])), range(len(taught)))
    beside = [(x << 42) + (y << 21) + z for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)]
    known = np.unique(np.unique(np.concatenate(labelled)) + np.array(beside)[:, None])

    def among_known(frame):
        few, which = np.unique(_cubes(frame), return_inverse=True)
        return np.isin(few, known)[which].reshape(frame.shape[:-1])

    return np.stack(in_threads(among_known, points))


def _cubes(points):
    """One number for the cube that each of the points ``(..., 3)`` lies in, within 50 km of the world's origin."""
    x, y, z = np.moveaxis(np.floor(points / SAME_PLACE).astype(np.int64) + 2**20, -1, 0)
    return (x << 42) + (y << 21) + z


def pair_errors(said, own_points, known, poses):
    """Error figures of a teacher's pairwise pointmaps, each pair at the scale that fits it best.

    Args:
        said: ``teachers.PairPointmaps`` of P pairs. own_points: true points ``(N, H, W, 3)`` in each frame's camera,
            metres. known: ``(N, H, W)`` bool, where they are true, or None for everywhere. poses: ``(N, 4, 4)``
            camera-to-world. All at one resolution, whatever it is.

    Returns:
        A dict of medians: ``depth``, relative error along z in view 1; ``points``, both views' error as a share of the
        true distance from view 1's camera; ``rotation``, degrees between the true motion of the camera and the one
        that is read off the pointmaps, over pairs that are there both ways; ``sure`` and ``unsure``, the mean error of
        the more and of the less confident half of all pixels, as a share of the distance; ``unit``, metres in one of
        the teacher's units, and ``unit_spread``, the standard deviation of its logarithm from pair to pair; ``pairs``,
        their number.
    """
    known = np.ones(own_points.shape[:3], bool) if known is None else known
    depth, points, confidence, units, motions = [], [], [], [], {}
    for k, (i, j) in enumerate(said.pairs):
        motion = geometry.invert(poses[i]) @ poses[j]
        truth = np.stack([own_points[i], geometry.transform(motion, own_points[j])])
        answer, there = np.stack([said.points_i[k], said.points_j[k]]).astype(np.float64), known[[i, j]]
        distance = np.linalg.norm(truth, axis=-1)
        scale = np.median(distance[there] / np.linalg.norm(answer, axis=-1)[there].clip(1e-9))
        units.append(scale)
        depth.append(np.abs(scale * answer[0, ..., 2] / truth[0, ..., 2].clip(1e-9) - 1)[there[0]])
        points.append((np.linalg.norm(scale * answer - truth, axis=-1) / distance.clip(1e-9))[there])
        confidence.append(np.stack([said.confidence_i[k], said.confidence_j[k]])[there])
        motions[i, j] = k, motion
    turned = [geometry.rotation_angle(motion[:3, :3].T @ _rotation(said, k, motions[j, i][0]))
              for (i, j), (k, motion) in motions.items() if (j, i) in motions]  # fmt: skip
    depth, points, confidence = (np.concatenate(parts) for parts in (depth, points, confidence))
    sure = confidence > np.median(confidence)
    medians = {"depth": np.median(depth), "points": np.median(points),
               "rotation": np.median(turned) if turned else np.nan, "unit": np.median(units)}  # fmt: skip
    means = {"sure": points[sure].mean(), "unsure": points[~sure].mean(), "unit_spread": np.log(units).std()}
    return {name: float(value) for name, value in (medians | means).items()} | {"pairs": len(said.pairs)}


def _rotation(said, forth, back):
    """How view j is turned in view i's frame: its points there are those in its own frame, from the pair (j, i)."""
    own, seen = said.points_i[back].reshape(-1, 3), said.points_j[forth].reshape(-1, 3)
    weights = said.confidence_i[back].ravel() * said.confidence_j[forth].ravel()
    return registration.decompose(registration.similarity(own, seen, weights - weights.min()))[1]


def size_of(student):
    """Parameters, and megabytes with the buffers that inference needs: at 32 bits, and in half precision."""
    tensors = student.state_dict().values()
    megabytes = sum(t.numel() * t.element_size() for t in tensors) / 1e6
    return {"parameters": sum(p.numel() for p in student.parameters()), "megabytes": megabytes,
            "half_megabytes": megabytes / 2}  # fmt: skip


@torch.inference_mode()
def latency(student, size, repeats=30):
    """Fewest milliseconds for one image ``(1, 3, H, W)`` on the student's device."""
    device = next(student.parameters()).device
    image = torch.rand(1, 3, *size, device=device)

    def answer():
        student(image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with half_precision(device):
        return fewest_milliseconds(answer, repeats)


def fewest_milliseconds(call, repeats=30):
    """Of so many calls the fastest one's time: other work on the machine only adds to it."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def machine(device):
    """What a timing was measured on, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor():
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def keep_predictions(student, images, path):
    """Predict the test frames ``(N, H, W, 3)`` once and keep the points as half-precision offsets from the centre."""
    points, log_scale = predict(student, images)
    centre = student.centre.cpu()
    offsets = (points.permute(0, 2, 3, 1) - centre).half().contiguous()  # by torch: numpy halves slowly
    tensors = {"offsets": offsets.numpy(), "centre": centre.numpy()}
    if log_scale is not None:
        tensors["log_scale"] = log_scale[:, 0].half().contiguous().numpy()
    artefacts.write_tensors(path, tensors)


def read_predictions(path):
    """What ``keep_predictions`` kept: world points ``(N, H, W, 3)`` in metres, log-scale ``(N, H, W)`` or None."""
    kept = artefacts.read_tensors(path)
    scale = kept.get("log_scale")
    return kept["offsets"].astype(np.float32) + kept["centre"], None if scale is None else scale.astype(np.float32)


def mean_point_errors(train_points, truth, mask):
    """The baseline that every student must beat: the mean labelled training point ``(M, 3)``, for every pixel."""
    return point_errors(np.broadcast_to(train_points.mean(0, dtype=np.float64), truth.shape), truth, mask)


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
