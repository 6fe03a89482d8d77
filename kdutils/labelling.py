"""The teacher over a pair graph: predictions stream to disk in shards, and a killed run goes on after the last one."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kdutils import artefacts
from kdutils.teachers import PairPointmaps

BYTES_PER_PIXEL = 2 * 4 * 2  # two views, x y z and confidence, half precision
SHARD_BYTES = 32 * 2**20  # what waits in memory for the disk, but for teachers that work on more at a time
MOST_PAIRS_PER_SHARD = 64


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
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        return read_shard(shard_path(self.folder, number))

    def answer(self, number):
        """The ``PairPointmaps`` of one pair, by its place among ``pairs``."""
        shard, place = divmod(int(number), self.manifest["settings"]["pairs_per_shard"])
        return read_shard(shard_path(self.folder, shard), slice(place, place + 1))

    @property
    def pairs(self):
        """All directed pairs ``(P, 2)``."""
        return np.array(self.manifest["pairs"], int).reshape(-1, 2)

    def among(self, images):
        """The ``PairPointmaps`` of all pairs between these images, which are numbered anew in ascending order."""
        images = np.unique(images)
        wanted = np.flatnonzero(np.isin(self.pairs, images).all(axis=1))
        pairs, *maps = (np.concatenate(arrays) for arrays in zip(*map(self.answer, wanted)))
        return PairPointmaps(np.searchsorted(images, pairs), *maps)


def label_pairs(teacher, pairs, size, folder, inputs, pairs_per_shard=None, progress=None):
    """Ask the teacher about every pair and keep its answers.

    A run that was killed goes on after its last whole shard, and ends with the files of an undisturbed one.

    Args:
        teacher: see ``kdutils.teachers``.
        pairs: ``(P, 2)`` directed pairs of frame indices.
        size: (height, width) of the pointmaps, in pixels.
        folder: where shards and the manifest ``pairs.json`` go.
        inputs: digest of the frames; labels of other frames are made anew.
        pairs_per_shard: by default as many as make ``SHARD_BYTES``, and on a GPU at least two of its batches.
        progress: called with ``total`` and ``initial``, in pairs, for a bar with ``update(pairs)``, e.g. ``tqdm``.

    Raises:
        OSError: the folder cannot be written to, or less disk space is free than the shards will take. What is there
            stays there.
    """
    folder, pairs = Path(folder), np.asarray(pairs).reshape(-1, 2)
    per_shard = pairs_per_shard or _fitting_shard(teacher, size)
    settings = {**teacher.settings(), "inputs": inputs, "graph": artefacts.digest(pairs.tolist()),
                "pairs_per_shard": per_shard}  # fmt: skip
    chunks = [pairs[k : k + per_shard] for k in range(0, len(pairs), per_shard)]
    if not artefacts.manifest_matches(folder / "pairs.json", settings):
        _start_or_resume(folder, settings)
    todo = [k for k in range(len(chunks)) if not artefacts.is_whole(shard_path(folder, k))]
    if not todo and artefacts.manifest_matches(folder / "pairs.json", settings):
        return PairShards(folder)
    left = sum(len(chunks[k]) for k in todo)
    _check_disk(folder, disk_bytes(left, size) + teacher.scratch_bytes(np.unique(pairs)), left)
    bar = progress(total=len(pairs), initial=len(pairs) - left) if progress else None
    with ThreadPoolExecutor(1) as disk:  # the disk works on one shard while the teacher works on the next
        written = None
        for k in todo:
            answers = teacher(chunks[k])
            if written:
                written.result()
            written = disk.submit(write_shard, shard_path(folder, k), answers)
            if bar is not None:
                bar.update(len(chunks[k]))
        if written:
            written.result()
    if bar is not None:
        bar.close()
    manifest = {"settings": settings, "shards": len(chunks), "pairs": pairs.tolist()}
    artefacts.write_json(folder / "pairs.json", manifest)
    return PairShards(folder)


def _fitting_shard(teacher, size):
    least = 2 * getattr(teacher, "largest_batch", 1)  # so that a GPU has a batch to work on while another one is taken
    return int(np.clip(SHARD_BYTES // disk_bytes(1, size), min(least, MOST_PAIRS_PER_SHARD), MOST_PAIRS_PER_SHARD))


def disk_bytes(pairs, size):
    """Disk space that the predictions of so many pairs take, in bytes; ``size`` is (height, width) in pixels."""
    return pairs * size[0] * size[1] * BYTES_PER_PIXEL


def shard_path(folder, number):
    return folder / f"pairs-{number:05d}.safetensors"


def write_shard(path, pointmaps):
    """Half precision costs at most half a millimetre a metre, and saves half the disk."""
    artefacts.write_tensors(path, {name: _halved(np.asarray(array)) for name, array in pointmaps._asdict().items()})


def _halved(array):
    if array.dtype.kind != "f" or array.dtype == np.float16:  # numpy clips halves slowly: slower than a GPU makes them
        return array
    # Far beyond any room, but infinity would make a pixel's neighbours useless as well wherever a mean is taken.
    largest = np.finfo(np.float16).max
    return np.clip(array, -largest, largest).astype(np.float16)


def read_shard(path, some=slice(None)):
    """The ``PairPointmaps`` of a shard in float32, or of some of its pairs; only those are read."""
    arrays = {name: array[some] for name, array in artefacts.read_tensors(path).items()}
    return PairPointmaps(**{name: a.astype(np.float32) if a.dtype.kind == "f" else a for name, a in arrays.items()})


def _start_or_resume(folder, settings):
    """Shards of other settings are removed; shards of the same unfinished run stay."""
    artefacts.remove_asides(folder)
    if not artefacts.manifest_matches(folder / "started.json", settings):
        for manifest in ("labels.json", "pairs.json", "started.json"):  # before the files that they vouch for
            artefacts.discard(folder / manifest)
        shutil.rmtree(folder, ignore_errors=True)
        artefacts.write_json(folder / "started.json", {"settings": settings})


def _check_disk(folder, needed, pairs):
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: {needed / 1e9:.1f} GB needed for {pairs} pairs, {free / 1e9:.1f} GB free. "
                      "Free some space, or choose a smaller pair graph or image size.")  # fmt: skip
