"""The teacher over a pair graph: predictions stream to disk in shards, and a killed run goes on after the last one."""

import shutil
from pathlib import Path

import numpy as np

from kdutils import artefacts
from kdutils.teachers import PairPointmaps

BYTES_PER_PIXEL = 2 * 4 * 2  # two views, x y z and confidence, half precision


class PairShards:
    """The pair predictions of one scene on disk; iterating yields one ``PairPointmaps`` a shard, in float32.

    Raises:
        FileNotFoundError: the labelling was not finished; the message says which notebook finishes it.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "pairs.json").exists():
            raise FileNotFoundError(f"{self.folder}: no pair predictions. Run notebook 02 for this scene first.")
        self.manifest = artefacts.read_json(self.folder / "pairs.json")

    def __len__(self):
        return self.manifest["shards"]

    def __iter__(self):
        return (read_shard(shard_path(self.folder, k)) for k in range(len(self)))

    @property
    def pairs(self):
        """All directed pairs ``(P, 2)``."""
        return np.array(self.manifest["pairs"])


def label_pairs(teacher, pairs, size, folder, inputs, pairs_per_shard=64, progress=None):
    """Ask the teacher about every pair and keep its answers.

    Args:
        teacher: see ``kdutils.teachers``.
        pairs: ``(P, 2)`` directed pairs of frame indices.
        size: (height, width) of the pointmaps, to state the disk space beforehand.
        folder: where shards and the manifest ``pairs.json`` go.
        inputs: digest of the frames; labels of other frames are made anew.
        progress: called with the iterable of shards, e.g. ``tqdm``.

    Raises:
        OSError: less disk space is free than the shards will take.
    """
    folder = Path(folder)
    settings = {**teacher.settings(), "inputs": inputs, "graph": artefacts.digest(pairs.tolist()),
                "pairs_per_shard": pairs_per_shard}  # fmt: skip
    if artefacts.manifest_matches(folder / "pairs.json", settings):
        return PairShards(folder)
    _start_or_resume(folder, settings)
    _check_disk(folder, len(pairs), size)
    chunks = [pairs[k : k + pairs_per_shard] for k in range(0, len(pairs), pairs_per_shard)]
    for k, chunk in enumerate(progress(chunks) if progress else chunks):
        if not is_whole(shard_path(folder, k)):
            write_shard(shard_path(folder, k), teacher(chunk))
    manifest = {"settings": settings, "shards": len(chunks), "pairs": pairs.tolist()}
    artefacts.write_json(folder / "pairs.json", manifest)
    return PairShards(folder)


def shard_path(folder, number):
    return folder / f"pairs-{number:05d}.safetensors"


def write_shard(path, pointmaps):
    """Half precision costs at most half a millimetre a metre, and half the disk."""
    arrays = {name: np.asarray(array) for name, array in pointmaps._asdict().items()}
    halves = {name: a.astype(np.float16) if a.dtype.kind == "f" else a for name, a in arrays.items()}
    artefacts.write_tensors(path, halves)


def read_shard(path):
    arrays = artefacts.read_tensors(path)
    return PairPointmaps(**{name: a.astype(np.float32) if a.dtype.kind == "f" else a for name, a in arrays.items()})


def is_whole(path):
    try:
        read_shard(path)
    except artefacts.ArtefactError:
        return False
    return True


def _start_or_resume(folder, settings):
    """Shards of other settings are removed; shards of the same unfinished run stay."""
    if not artefacts.manifest_matches(folder / "started.json", settings):
        shutil.rmtree(folder, ignore_errors=True)
        artefacts.write_json(folder / "started.json", {"settings": settings})


def _check_disk(folder, pairs, size):
    needed = pairs * size[0] * size[1] * BYTES_PER_PIXEL
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: {needed / 1e9:.1f} GB needed for {pairs} pairs, {free / 1e9:.1f} GB free. "
                      "Free some space, or choose a smaller pair graph or image size.")  # fmt: skip
