"""Files are whole or absent, manifests match exactly what they were written with."""

import os
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from kdutils import artefacts

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.dictionaries(st.integers(), inner),
    max_leaves=10,
)


def test_json_round_trip_makes_plain(tmp_path):
    path = tmp_path / "new" / "a.json"
    artefacts.write_json(path, {"array": np.arange(2), "scalar": np.float32(0.5), "path": tmp_path, "set": {2, 1}})
    assert artefacts.read_json(path) == {"array": [0, 1], "scalar": 0.5, "path": str(tmp_path), "set": [1, 2]}


@pytest.mark.parametrize("text", ["", '{"settings": ', "\xff"])
def test_half_written_json_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(artefacts.ArtefactError, match="a.json: no valid JSON"):
        artefacts.read_json(path)
    assert not artefacts.manifest_matches(path, {})


def test_missing_json_names_the_file(tmp_path):
    with pytest.raises(artefacts.ArtefactError, match="a.json: missing"):
        artefacts.read_json(tmp_path / "a.json")


@settings(max_examples=40, deadline=None)  # every file is flushed to the disk
@given(JSON)
def test_digest_and_manifest_survive_the_file(obj):
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/manifest.json"
        artefacts.write_json(path, {"settings": obj, "other": 1})
        assert artefacts.manifest_matches(path, obj)
        assert not artefacts.manifest_matches(path, [obj])
        assert artefacts.digest(artefacts.read_json(path)["settings"]) == artefacts.digest(obj)


def test_digest_ignores_order_but_not_values():
    assert artefacts.digest({"a": 1, "b": (2, 3)}) == artefacts.digest({"b": [2, 3], "a": 1})
    assert artefacts.digest({"a": 1}) != artefacts.digest({"a": 2})
    assert len(artefacts.digest(None)) == 16


def test_file_digest_is_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert artefacts.file_digest(tmp_path / "a") == "ba7816bf8f01cfea"


@pytest.mark.parametrize("dtype", ["?", "u1", "i8", "f2", "f4", "f8", "u2"])
def test_tensors_round_trip(tmp_path, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    tensors = {"plain": array, "strided": array.transpose(2, 0, 1)[::2], "empty": array[:0], "odd": np.ones(3, "u1")}
    artefacts.write_tensors(tmp_path / "t.safetensors", tensors)
    read = artefacts.read_tensors(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert read[name].dtype == expected.dtype
        np.testing.assert_array_equal(read[name], expected)
    with pytest.raises(ValueError, match="read-only"):
        read["plain"][0] = 0


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_tensors_are_refused(tmp_path, length):
    path = tmp_path / "t.safetensors"
    artefacts.write_tensors(path, {"a": np.arange(1000)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(artefacts.ArtefactError, match="t.safetensors: unreadable"):
        artefacts.read_tensors(path)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    artefacts.write_json(path, 1)
    with pytest.raises(TypeError):
        artefacts.write_json(path, object())
    with pytest.raises(Exception):  # noqa: B017 - whatever safetensors says about objects
        artefacts.write_tensors(path, {"a": np.array([object()])})
    assert artefacts.read_json(path) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_what_torch_says_of_a_full_disk_names_the_file(tmp_path):
    def fails(aside):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    with pytest.raises(OSError, match="training.pt: could not be written .*unexpected pos.* Make space"):
        artefacts.write_aside(tmp_path / "training.pt", fails)


def test_discard(tmp_path):
    artefacts.write_text(tmp_path / "a", "ü")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ü"
    artefacts.discard(tmp_path / "a")
    artefacts.discard(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_released_arrays_read_the_same(tmp_path):
    written = np.arange(10_000, dtype=np.float32)
    artefacts.write_tensors(tmp_path / "a", {"x": written})
    mapped = artefacts.read_tensors(tmp_path / "a")["x"]
    before = mapped.copy()
    for array in (mapped, mapped[5:], written):
        artefacts.release(array)
    np.testing.assert_array_equal(mapped, before)


HOLD = "from kdutils import artefacts; import sys, time\nwith artefacts.alone(sys.argv[1]): print('held', flush=True); "


def hold(folder, then):
    held = [sys.executable, "-c", HOLD + then, str(folder)]
    return subprocess.Popen(held, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})


def test_a_folder_is_worked_on_by_one_process_and_free_when_that_is_killed(tmp_path):
    first = hold(tmp_path / "arm", "time.sleep(600)")
    assert first.stdout.readline() == "held\n"
    second = hold(tmp_path / "arm", "print('done')")
    assert "another process works on it" in second.stdout.readline()
    assert second.poll() is None
    first.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=60)[0] == "held\ndone\n"
    first.communicate()
    assert not list(tmp_path.glob("arm/*"))
