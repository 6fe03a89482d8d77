"""A scene in the 12Scenes layout, and the frames that are prepared from it once for the whole study.

Poses are camera-to-world of the colour camera, in metres; see ``geometry`` for the convention.
"""

import os
import re
import struct
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from . import artefacts, geometry, photos

KINDS = {"color": "color.jpg", "depth": "depth.png", "pose": "pose.txt"}
BUILDINGS = ("apt1", "apt2", "office1", "office2")
TENSORS, MANIFEST = "frames.safetensors", "frames.json"
RESTORE = "restore the file from the data set's zip"
_SEQUENCE = re.compile(r"sequence(\d+)\s*\[frames=(\d+)\]\s*\[start=(\d+)\s*;\s*end=(\d+)\]")
_UNREADABLE = (OSError, SyntaxError, ValueError, zlib.error, struct.error, Image.DecompressionBombError)


class SceneError(ValueError):
    """A scene that cannot be used; the message names the file, the line where there is one, and a remedy."""


class BadFrame(ValueError):
    """A frame that cannot be used; ``cause`` holds the message without the file's name."""

    def __init__(self, file, cause):
        super().__init__(f"{file}: {cause}")
        self.cause = cause


@dataclass(frozen=True)
class Sequence:
    """One recording of a scene: ``numbers`` is the range of its frame numbers."""

    name: str
    numbers: range
    is_test: bool


@dataclass(frozen=True)
class View:
    """One frame as the study sees it.

    Attributes:
        image: ``(h, w, 3)`` uint8 RGB.
        depth: ``(h, w)`` float32, metres along z in the colour camera's pixels, 0 where there is no reading.
        pose: ``(4, 4)`` camera-to-world.
        intrinsics: ``(3, 3)`` of ``image``, in pixels.
        number: the frame's number in the scene.
    """

    image: np.ndarray
    depth: np.ndarray
    pose: np.ndarray
    intrinsics: np.ndarray
    number: int


@dataclass(frozen=True, eq=False)
class Scene:
    """A scene whose texts are read and whose images are decoded when asked for; made by `Scene.open`.

    Sizes are (height, width), intrinsics ``(3, 3)`` in pixels, ``depth_shift`` is depth units per metre,
    ``depth_to_color`` ``(4, 4)`` takes points from the depth camera's frame to the colour camera's, ``poses`` maps the
    numbers of the usable frames to ``(4, 4)`` camera-to-world, and ``skipped`` those of the others to the reason.
    """

    name: str
    folder: Path
    sequences: list
    color_size: tuple
    depth_size: tuple
    color_intrinsics: np.ndarray
    depth_intrinsics: np.ndarray
    depth_shift: float
    depth_to_color: np.ndarray
    poses: dict
    skipped: dict
    _lookups: dict = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder, name=None):
        """Read a scene's info.txt, split.txt and pose files.

        Args:
            folder: the scene's folder.
            name: the scene's name in the study; by default the folder's, with the building's before it in 12Scenes,
                where two apartments have a kitchen.

        Raises:
            SceneError: the folder is no scene, info.txt or split.txt is bad, or no usable frame is left.
        """
        folder = Path(folder)
        if not (folder / "info.txt").is_file():
            raise SceneError(f"{folder / 'info.txt'}: missing, so {folder} is no scene; {_remedy(folder)}")
        if not (folder / "data").is_dir():
            raise SceneError(f"{folder / 'data'}: missing, the folder of a scene's frames; {RESTORE}")
        sequences = read_split(folder / "split.txt")
        poses, skipped = _read_poses(folder / "data", sequences)
        _require_both(folder, sequences, poses, skipped)
        return cls(name or _name_of(folder), folder, sequences, **read_info(folder / "info.txt"),
                   poses=poses, skipped=skipped)  # fmt: skip

    def numbers(self, is_test):
        """Numbers of the usable frames of the test or of the training sequences, in order."""
        return [n for s in self.sequences if s.is_test == is_test for n in s.numbers if n in self.poses]

    def file(self, number, kind):
        """Path of a frame's file; ``kind`` is color, depth or pose."""
        return self.folder / "data" / f"frame-{number:06d}.{KINDS[kind]}"

    def view(self, number, size):
        """The frame ``number`` resized to cover ``size`` (height, width) and cropped at its centre.

        Raises:
            BadFrame: the frame has no usable pose, or its colour or depth file is bad.
        """
        size = tuple(size)
        if number not in self.poses:
            raise BadFrame(self.file(number, "pose"), self.skipped.get(number, "frame is in no sequence"))
        image, intrinsics = self._color(number, size)
        return View(image, self._depth(number, size, intrinsics), self.poses[number], intrinsics, number)

    def input_digest(self):
        """Digest of info.txt and split.txt, and of the names, sizes and times of the frames' files."""
        texts = [(self.folder / name).read_text(errors="replace") for name in ("info.txt", "split.txt")]
        with os.scandir(self.folder / "data") as entries:
            stats = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries)
        return artefacts.digest([texts, stats])

    def _color(self, number, size):
        intrinsics, resized, (top, left) = geometry.resize_and_crop(self.color_intrinsics, self.color_size, size)
        image = _decode(self.file(number, "color"), self.color_size, photos.to_rgb)
        image = image.resize(resized[::-1], Image.Resampling.LANCZOS)
        return np.asarray(image)[top : top + size[0], left : left + size[1]].copy(), intrinsics

    def _depth(self, number, size, intrinsics):
        file = self.file(number, "depth")
        image = _decode(file, self.depth_size)
        if not image.mode.startswith("I"):  # Pillow's modes of 16-bit grey: I;16, I;16B, and I in older versions
            raise BadFrame(file, f"depth is not 16-bit grey but of mode {image.mode}")
        depth = np.asarray(image).astype(np.float32)
        depth[depth == 65535] = 0  # the Kinect's word for no reading
        if not depth.any():
            raise BadFrame(file, "depth holds no reading")
        depth = self._to_color_pixels(depth / np.float32(self.depth_shift), size, intrinsics)
        if not depth.any():
            raise BadFrame(file, "depth holds no reading inside the image")
        return depth

    def _to_color_pixels(self, depth, size, intrinsics):
        if not np.allclose(self.depth_to_color, np.eye(4), atol=1e-6):
            return splat_depth(depth, self.depth_intrinsics, self.depth_to_color, intrinsics, size)
        if size not in self._lookups:
            self._lookups[size] = _depth_lookup(intrinsics, size, self.depth_intrinsics, depth.shape)
        inside, index = self._lookups[size]
        return np.where(inside, depth.ravel()[index], np.float32(0))


def splat_depth(depth, depth_intrinsics, depth_to_color, intrinsics, size):
    """Carry depth to a camera at another place: each reading goes to the pixel it falls on, the nearest one wins.

    A pixel on which no reading falls stays 0, also where the new image has finer pixels than the depth image.
    """
    points = geometry.unproject(depth, depth_intrinsics)[depth > 0]
    pixels, z = geometry.project(geometry.transform(depth_to_color, points), intrinsics)
    in_front = z > 0
    column, row = np.floor(pixels[in_front]).astype(int).T
    inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
    nearest = np.full(size, np.inf, np.float32)
    np.minimum.at(nearest, (row[inside], column[inside]), z[in_front][inside].astype(np.float32))
    return np.where(np.isfinite(nearest), nearest, np.float32(0))


def find_scenes(folder, depth=3):
    """Scene folders at or below ``folder``, at most ``depth`` levels down, sorted; all else there is ignored."""
    folder = Path(folder)
    if (folder / "data").is_dir() and ((folder / "info.txt").is_file() or (folder / "split.txt").is_file()):
        return [folder]
    if depth == 0 or not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        below = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [scene for name in below for scene in find_scenes(folder / name, depth - 1)]


def read_info(file):
    """The calibration in an info.txt, as the fields of `Scene`.

    Raises:
        SceneError: a key is missing, or its value is not what it should be.
    """
    lines = [text.partition("=") for text in Path(file).read_text(errors="replace").splitlines()]
    entries = {key.strip(): (number, value.strip()) for number, (key, equals, value) in enumerate(lines, 1) if equals}

    def get(key, wanted, accept, shape=()):
        if key not in entries:
            raise SceneError(f"{file}: key {key} is missing; {RESTORE}")
        number, text = entries[key]
        values = _numbers(text)
        if values is None or values.size != np.prod(shape) or not accept(values.reshape(shape)):
            raise SceneError(f"{file}:{number}: {key} is {wanted}, not '{text}'; {RESTORE}")
        return values.reshape(shape)

    def size(camera):
        return tuple(int(get(f"m_{camera}{side}", "a whole number of pixels", lambda v: v > 0 and v == v.round()))
                     for side in ("Height", "Width"))  # fmt: skip

    def intrinsics(camera):
        key, wanted = f"m_calibration{camera}Intrinsic", "a 4x4 matrix with positive focal lengths"
        return get(key, wanted, lambda m: m[0, 0] > 0 and m[1, 1] > 0 and m[2, 2] == 1, (4, 4))[:3, :3]

    def extrinsic(camera):  # takes points from this camera's frame to the one that both cameras share
        return get(f"m_calibration{camera}Extrinsic", "a rigid 4x4 motion", _is_rigid, (4, 4))

    return {
        "color_size": size("color"), "color_intrinsics": intrinsics("Color"),
        "depth_size": size("depth"), "depth_intrinsics": intrinsics("Depth"),
        "depth_shift": float(get("m_depthShift", "a positive number", lambda v: v > 0)),
        "depth_to_color": geometry.invert(extrinsic("Color")) @ extrinsic("Depth"),
    }  # fmt: skip


def read_split(file):
    """The sequences in a split.txt, in order of their numbers; by the data set's convention, sequence0 is the test set.

    Raises:
        SceneError: the file is missing or garbled, sequences overlap, or there is no test or no training sequence.
    """
    if not Path(file).is_file():
        raise SceneError(f"{file}: missing; {RESTORE}")
    sequences = {}
    for number, text in enumerate(Path(file).read_text(errors="replace").splitlines(), 1):
        if not text.strip():
            continue
        match = _SEQUENCE.fullmatch(text.strip())
        index, count, start, end = map(int, match.groups()) if match else (0, 0, 0, 0)
        if count < 1 or count != end - start + 1:
            raise SceneError(f"{file}:{number}: '{text}' is no 'sequence0 [frames=2]  [start=0 ; end=1]'; {RESTORE}")
        overlaps = any(start <= s.numbers[-1] and s.numbers[0] <= end for s in sequences.values())
        if overlaps or index in sequences:
            raise SceneError(f"{file}:{number}: '{text}' repeats frames or the name of a sequence above; {RESTORE}")
        sequences[index] = Sequence(f"sequence{index}", range(start, end + 1), index == 0)
    if 0 not in sequences or len(sequences) < 2:
        raise SceneError(f"{file}: needs sequence0 (test) and at least one other (training); {RESTORE}")
    return [sequences[index] for index in sorted(sequences)]


def read_camera_path(file):
    """A camera path published as lines of ``rgb_file qw qx qy qz tx ty tz focal``, world-to-camera.

    Returns:
        The frame numbers (list), the poses ``(N, 4, 4)`` camera-to-world, and the focal lengths ``(N,)`` in pixels.

    Raises:
        SceneError: the file is missing or empty, or a line is not of that form.
    """
    if not Path(file).is_file():
        raise SceneError(f"{file}: missing; fetch the published camera paths of 12Scenes")
    numbers, rows = [], []
    for line, text in enumerate(Path(file).read_text(errors="replace").splitlines(), 1):
        name, _, rest = text.strip().partition(" ")
        match, row = re.search(r"frame-(\d+)", name), _numbers(rest)
        if not name:
            continue
        if not match or row is None or row.size != 8 or not row[:4].any():
            raise SceneError(f"{file}:{line}: expected 'rgb_file qw qx qy qz tx ty tz focal'; fetch the file again")
        numbers.append(int(match.group(1)))
        rows.append(row)
    if not rows:
        raise SceneError(f"{file}: empty; fetch the file again")
    rows = np.array(rows)
    world_to_camera = np.tile(np.eye(4), (len(rows), 1, 1))
    world_to_camera[:, :3, :3] = _rotations(rows[:, :4])
    world_to_camera[:, :3, 3] = rows[:, 4:7]
    return numbers, geometry.invert(world_to_camera), rows[:, 7]


@dataclass(frozen=True, eq=False)
class Frames:
    """The prepared frames of a scene: N frames of one size, as memory-mapped arrays; made by `prepare`.

    Attributes:
        image: ``(N, h, w, 3)`` uint8 RGB.
        depth: ``(N, h, w)`` float32, metres along z, 0 where there is no reading.
        poses: ``(N, 4, 4)`` camera-to-world.
        intrinsics: ``(3, 3)`` in pixels, shared by all frames.
        number, sequence: ``(N,)`` int64, the frame's number and that of its sequence; sequence 0 is the test set.
        skipped: numbers of the frames left out as unusable, to the reason.
    """

    image: np.ndarray
    depth: np.ndarray
    poses: np.ndarray
    intrinsics: np.ndarray
    number: np.ndarray
    sequence: np.ndarray
    skipped: dict

    @classmethod
    def load(cls, folder):
        """Open what `prepare` wrote into ``folder``; SceneError if it is not there or not whole."""
        try:
            manifest = artefacts.read_json(Path(folder) / MANIFEST)
            skipped = {int(number): reason for number, reason in manifest["skipped"].items()}
            return cls(**artefacts.read_tensors(Path(folder) / TENSORS), skipped=skipped)
        except (artefacts.ArtefactError, KeyError, TypeError, AttributeError) as error:
            raise SceneError(f"{folder}: no prepared frames, run notebook 01 first ({error})") from error

    def __len__(self):
        return len(self.number)

    @property
    def is_test(self):
        """``(N,)`` bool: the frames of the test set."""
        return np.asarray(self.sequence) == 0

    @property
    def size(self):
        """(height, width) of the images, in pixels."""
        return self.image.shape[1:3]


def prepare(scene, out, size, most_train=None, most_test=None, progress=None):
    """Decode a scene's usable frames once, at one size, into ``out``; nothing is done if that is there already.

    Args:
        scene: the `Scene`.
        out: folder for the frames (safetensors) and their manifest (JSON).
        size: (height, width) of the prepared images, in pixels.
        most_train, most_test: keep at most so many frames, evenly spaced; all by default.
        progress: wraps the loop over the frames, called as ``progress(iterable, total=count)`` like tqdm.

    Returns:
        The `Frames`.

    Raises:
        SceneError: all training or all test frames turn out bad.
    """
    out, size = Path(out), tuple(int(side) for side in size)
    settings = {"scene": scene.name, "size": size, "most_train": most_train, "most_test": most_test,
                "input": scene.input_digest(), "format": 1}  # fmt: skip
    if artefacts.manifest_matches(out / MANIFEST, settings):
        try:
            return Frames.load(out)
        except SceneError:
            pass  # the frames went missing under their manifest: make them again
    test, training = scene.numbers(is_test=True), scene.numbers(is_test=False)
    numbers = np.array(_spread(test, most_test) + _spread(training, most_train))
    image, depth, bad = _decode_all(scene, numbers, size, progress)
    good = np.array([number not in bad for number in numbers])
    skipped = dict(sorted((scene.skipped | bad).items()))
    kept = numbers if good.all() else numbers[good]
    _require_both(scene.folder, scene.sequences, set(kept.tolist()), skipped)
    tensors = {
        "image": image if good.all() else image[good],
        "depth": depth if good.all() else depth[good],
        "poses": np.stack([scene.poses[number] for number in kept]),
        "intrinsics": geometry.resize_and_crop(scene.color_intrinsics, scene.color_size, size)[0],
        "number": kept,
        "sequence": np.array([int(s.name[8:]) for n in kept for s in scene.sequences if n in s.numbers]),
    }
    artefacts.discard(out / MANIFEST)
    artefacts.write_tensors(out / TENSORS, tensors)
    artefacts.write_json(out / MANIFEST, {"settings": settings, "frames": len(kept), "skipped": skipped,
                                          "skipped_by_reason": Counter(skipped.values())})  # fmt: skip
    return Frames.load(out)


def _decode_all(scene, numbers, size, progress):
    image = np.zeros((len(numbers), *size, 3), np.uint8)
    depth = np.zeros((len(numbers), *size), np.float32)
    bad = {}

    def decode(place):
        try:
            view = scene.view(int(numbers[place]), size)
            image[place], depth[place] = view.image, view.depth
        except BadFrame as error:
            bad[int(numbers[place])] = error.cause

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        done = pool.map(decode, range(len(numbers)))
        for _ in progress(done, total=len(numbers)) if progress else done:
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return image, depth, bad


def _spread(numbers, most):
    if most is None or len(numbers) <= most:
        return numbers
    return [numbers[place] for place in np.linspace(0, len(numbers) - 1, most).round().astype(int)]


def _decode(file, size, converted=None):
    try:
        with Image.open(file) as image:
            if image.size != size[::-1]:
                raise BadFrame(file, f"image is {image.width}x{image.height}, info.txt says {size[1]}x{size[0]}")
            image.load()
            image = converted(image) if converted else image
    except BadFrame:
        raise
    except _UNREADABLE as error:
        raise BadFrame(file, f"{file.name.split('.')[1]} file is missing, truncated or no image") from error
    if image.size != size[::-1]:
        raise BadFrame(file, f"image is {image.width}x{image.height} after its EXIF rotation, info.txt says otherwise")
    return image


def _depth_lookup(intrinsics, size, depth_intrinsics, depth_size):
    # From the new pixel to the reading under it, never between readings: a mean across an edge is on neither side.
    pixels, _ = geometry.project(geometry.pixel_rays(intrinsics, *size), depth_intrinsics)
    column, row = np.moveaxis(np.floor(pixels).astype(int), -1, 0)
    inside = (row >= 0) & (row < depth_size[0]) & (column >= 0) & (column < depth_size[1])
    return inside, np.where(inside, row * depth_size[1] + column, 0)


def _read_poses(data, sequences):
    with os.scandir(data) as entries:  # one listing instead of three look-ups a frame
        names = {entry.name for entry in entries}
    poses, skipped = {}, {}
    for number in (number for sequence in sequences for number in sequence.numbers):
        missing = [kind for kind, end in KINDS.items() if f"frame-{number:06d}.{end}" not in names]
        try:
            if missing:
                raise BadFrame(data, f"{' and '.join(missing)} missing")
            poses[number] = _read_pose(f"{data}/frame-{number:06d}.{KINDS['pose']}")
        except BadFrame as error:
            skipped[number] = error.cause
    return poses, skipped


def _read_pose(file):
    try:
        with open(file, encoding="ascii", errors="replace") as text:
            tokens = text.read().split()
    except OSError as error:
        raise BadFrame(file, "pose file is unreadable") from error
    if len(tokens) != 16:
        raise BadFrame(file, "pose is no 4x4 matrix")
    values = _numbers(" ".join(tokens))
    if values is None:
        raise BadFrame(file, "pose holds values that are no finite numbers")
    pose = values.reshape(4, 4)
    if not _is_rigid(pose):
        raise BadFrame(file, "pose is no rigid motion")
    # Tracking lets rotations drift off orthogonality, and everything downstream inverts them by transposing.
    u, _, vt = np.linalg.svd(pose[:3, :3])
    pose[:3, :3] = u @ vt
    return pose


def _numbers(text):
    try:
        values = np.array([float(token) for token in text.split()])
    except ValueError:  # such as -1.#INF, which Windows wrote for infinity
        return None
    return values if np.isfinite(values).all() else None


def _is_rigid(pose, tolerance=1e-2):
    rotation = pose[:3, :3]
    return (
        np.abs(rotation @ rotation.T - np.eye(3)).max() < tolerance
        and np.linalg.det(rotation) > 0
        and np.abs(pose[3] - (0, 0, 0, 1)).max() < tolerance
    )


def _rotations(quaternions):
    w, x, y, z = (quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True)).T
    rows = [[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]]  # fmt: skip
    return np.moveaxis(np.array(rows), -1, 0)


def _require_both(folder, sequences, usable, skipped):
    for is_test, what in ((True, "test"), (False, "training")):
        if not any(number in usable for s in sequences if s.is_test == is_test for number in s.numbers):
            reasons = ", ".join(f"{count}: {reason}" for reason, count in Counter(skipped.values()).most_common(5))
            raise SceneError(f"{folder}: no usable {what} frame is left ({reasons}); {RESTORE}")


def _name_of(folder):
    folder = folder.resolve()
    return f"{folder.parent.name}_{folder.name}" if folder.parent.name in BUILDINGS else folder.name


def _remedy(folder):
    below = [str(scene.relative_to(folder)) for scene in find_scenes(folder)]
    return f"open one of the scenes in it: {', '.join(below)}" if below else RESTORE
