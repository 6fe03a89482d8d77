"""Writing the study's files so that a half-written one is never mistaken for a whole one, and their manifests.

A file is written aside, flushed to the disk and renamed. A stage writes its manifest (a JSON object with a key
``settings``) last and discards an old one first, so a manifest that is there vouches for the files it describes.
"""

import hashlib
import json
import mmap
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip


class ArtefactError(ValueError):
    """An artefact is missing or unreadable; the message names the file, the cause and a remedy."""


def write_aside(path, write):
    """Let ``write(aside)`` make a file beside ``path``, flush it to the disk, and rename it to ``path``.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; a file that was at ``path`` is still there.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(aside)
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            if aside.exists():
                aside.unlink()
        _sync_folder(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises the last
        cause = getattr(error, "strerror", None) or error
        raise OSError(f"{path}: could not be written ({cause}). Make space or choose a folder that can be written to, "
                      "and run it again: what was finished before is kept.") from error  # fmt: skip


@contextmanager
def alone(folder):
    """Work on a folder's files while no other process does; one that does is waited for.

    The lock is the system's, so it is gone with the process that held it, however that ended.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{folder.name}: another process works on it, waiting until it has ended", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def remove_asides(folder):
    """Remove what a killed run was writing in ``folder``."""
    for aside in Path(folder).glob(".*.aside"):
        aside.unlink()


def write_text(path, text):
    """Write ``text`` as UTF-8, whole or not at all."""
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path, obj):
    """Write ``obj`` as indented JSON; numpy scalars and arrays, sets and paths become plain JSON."""
    write_text(path, json.dumps(obj, indent=2, default=_plain) + "\n")


def write_tensors(path, tensors):
    """Write a dict of numpy arrays as safetensors, whole or not at all."""
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    write_aside(path, lambda aside: save_file(arrays, aside))


def read_json(path):
    """The object in a JSON file.

    Raises:
        ArtefactError: the file is missing or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path}: missing; run the stage that writes it") from error
    except ValueError as error:
        raise ArtefactError(f"{path}: no valid JSON ({error}); delete it and run the stage that writes it") from error


def read_tensors(path):
    """The arrays of a safetensors file as a dict of read-only, memory-mapped numpy arrays.

    Raises:
        ArtefactError: the file is missing, truncated, or no safetensors file.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="np"):  # checks the header, and that the file is as long as it says
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _map_tensor(path, 8 + length, entry) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise ArtefactError(f"{path}: missing; run the stage that writes it") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ArtefactError(f"{path}: unreadable ({error}); delete it and run the stage that writes it") from error


def is_whole(path):
    """Whether ``read_tensors`` can read a file. It maps the arrays and reads the header only."""
    try:
        read_tensors(path)
    except ArtefactError:
        return False
    return True


def release(array):
    """Give back the memory of what was read of a memory-mapped array; it is read from the file again when needed."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def discard(path):
    """Remove a file if it is there, and make that last: do so with a manifest before its files are replaced."""
    path = Path(path)
    if path.exists():
        path.unlink(missing_ok=True)  # another process may have been faster
        _sync_folder(path.parent)


def digest(obj):
    """First 16 hex digits of the SHA-256 of ``obj`` as canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(_canonical(obj).encode()).hexdigest()[:16]


def file_digest(path):
    """First 16 hex digits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def manifest_matches(path, settings):
    """Whether the manifest at ``path`` is there, readable, and was written with exactly these ``settings``."""
    try:
        manifest = read_json(path)
    except (ArtefactError, OSError):
        return False
    return isinstance(manifest, dict) and _canonical(manifest.get("settings")) == _canonical(settings)


def _canonical(obj):
    # There and back first: integer keys become strings, and then sort as they do when read from a file.
    plain = json.loads(json.dumps(obj, default=_plain))
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def _plain(obj):
    if isinstance(obj, (np.ndarray, np.generic)):
        return obj.tolist()
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if isinstance(obj, (set, frozenset)):
        return sorted(obj)
    raise TypeError(f"{type(obj).__name__} has no place in JSON")


def _sync_folder(folder):
    if os.name == "nt":  # Windows has no folder handles to flush
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _map_tensor(path, data_start, entry):
    dtype, shape, (begin, end) = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
    if begin == end:  # an empty array cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=data_start + begin, shape=shape)
