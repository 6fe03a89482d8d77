"""The depth camera as a teacher, and shards that survive whatever happens between two of them."""

import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, box_world
from numpy.testing import assert_allclose, assert_array_equal

from kdutils import labelling, pairs, scenes, teachers

SIZE, PER_SHARD = (12, 16), 4


def frames_of(world, depth=None):
    depth = world.depth if depth is None else depth
    number = np.arange(len(depth))
    return scenes.Frames(world.image, depth, world.poses, world.intrinsics, number, world.sequence, {})


class CountingTeacher(teachers.DepthTeacher):
    """The depth teacher, noting what it is asked; from ``killed_at`` pairs on it kills its own process."""

    def __init__(self, frames, killed_at=None):
        super().__init__(frames)
        self.asked, self.killed_at = [], killed_at

    def __call__(self, asked):
        if self.killed_at is not None and len(self.asked) >= self.killed_at:
            signal.raise_signal(signal.SIGKILL)
        self.asked += np.asarray(asked).tolist()
        return super().__call__(asked)


def make_labels(folder, inputs="same", killed_at=None, per_shard=PER_SHARD):
    """Labels of a small world: 7 images, 22 pairs, 6 shards of which the last is short."""
    world = box_world(7, SIZE)
    graph = pairs.sequence_pairs(world.sequence, "swin", 2)
    teacher = CountingTeacher(frames_of(world), killed_at)
    shards = labelling.label_pairs(teacher, graph, SIZE, folder, inputs, per_shard)
    return shards, teacher


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# The depth teacher


def test_depth_teacher_says_the_closed_form_times_a_scale():
    world = box_world(3, SIZE)
    asked = np.array([[0, 1], [2, 0], [1, 2]])
    said = teachers.DepthTeacher(frames_of(world))(asked)
    for k, (i, j) in enumerate(asked):
        into_i = np.linalg.inv(world.poses[i])
        for points, image in ((said.points_i[k], i), (said.points_j[k], j)):
            expected = world.points[image] @ into_i[:3, :3].T + into_i[:3, 3]
            assert_allclose(points, expected * teachers.pair_scale(asked)[k], atol=1e-4)
    assert_array_equal(said.pairs, asked)
    assert said.points_i.dtype == said.confidence_j.dtype == np.float32


def test_holes_have_the_lowest_confidence_and_a_finite_point():
    world = box_world(2, SIZE)
    depth = world.depth.copy()
    depth[0, :5] = 0
    said = teachers.DepthTeacher(frames_of(world, depth))(np.array([[0, 1], [1, 0]]))
    assert (said.confidence_i[0, :5] == 1).all() and (said.confidence_j[1, :5] == 1).all()
    assert (said.confidence_i[0, 5:] > 1).all() and (said.confidence_i[1] > 1).all()
    assert all(np.isfinite(array).all() for array in said)


def test_confidence_falls_with_distance():
    world = box_world(1, SIZE)
    depth = np.linspace(0.5, 8, world.depth.size, dtype=np.float32).reshape(world.depth.shape)
    said = teachers.DepthTeacher(frames_of(world, depth))(np.array([[0, 0]]))
    assert (np.diff(said.confidence_i.ravel()) < 0).all()


def test_scene_without_any_reading_is_all_holes():
    world = box_world(2, SIZE)
    said = teachers.DepthTeacher(frames_of(world, np.zeros_like(world.depth)))(np.array([[0, 1]]))
    assert (said.confidence_i == 1).all() and np.isfinite(said.points_i).all()


def test_scales_differ_from_pair_to_pair_and_repeat():
    graph = pairs.complete_pairs(40)
    scale = teachers.pair_scale(graph)
    assert len(np.unique(scale)) == len(graph)
    assert scale.min() >= 0.5 and scale.max() <= 2
    assert np.log2(scale).std() > 0.4  # spread evenly over two octaves it is 0.58
    assert_array_equal(teachers.pair_scale(graph[::-1])[::-1], scale)
    assert_array_equal(teachers.pair_scale(graph[7:8]), scale[7:8])


def test_build_gives_the_depth_teacher():
    study = namedtuple("Study", "teacher")("depth")
    teacher = teachers.build(study, frames_of(box_world(2, SIZE)))
    assert teacher.settings() == {"teacher": "depth"}


# Shards


def test_shards_round_trip_within_half_precision(tmp_path):
    shards, teacher = make_labels(tmp_path / "labels")
    read = list(shards)
    assert len(read) == len(shards) == 6
    assert [len(shard.pairs) for shard in read] == [4, 4, 4, 4, 4, 2]
    said = teacher(shards.pairs)
    for name, expected in said._asdict().items():
        found = np.concatenate([getattr(shard, name) for shard in read])
        assert_allclose(found, expected, rtol=2**-11, atol=1e-6)
    assert read[0].points_i.dtype == np.float32


def test_shards_can_be_read_twice(tmp_path):
    shards, _ = make_labels(tmp_path / "labels")
    assert_array_equal(np.concatenate([s.pairs for s in shards]), np.concatenate([s.pairs for s in shards]))


def test_pairs_among_some_images_are_numbered_anew(tmp_path):
    shards, teacher = make_labels(tmp_path / "labels")
    some = shards.among([5, 2, 3])
    assert some.pairs.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]  # 2-3 and 3-5 of the window of two
    expected = teacher(np.array([[2, 3], [3, 2], [3, 5], [5, 3]]))
    assert_allclose(some.points_j, expected.points_j, rtol=2**-11, atol=1e-6)


def test_finished_labels_ask_nothing_and_write_nothing(tmp_path):
    make_labels(tmp_path / "labels")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").iterdir()}
    _, teacher = make_labels(tmp_path / "labels")
    assert teacher.asked == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").iterdir()} == before


def damage(folder, kind):
    """As a killed run leaves it: no manifest, and the last shards missing, cut short or half renamed."""
    (folder / "pairs.json").unlink()
    labelling.shard_path(folder, 5).unlink()
    path = labelling.shard_path(folder, 4)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty"])
def test_damaged_shards_alone_are_made_again(tmp_path, kind):
    shards, _ = make_labels(tmp_path)
    whole = contents(tmp_path)
    damage(tmp_path, kind)
    _, teacher = make_labels(tmp_path)
    assert teacher.asked == shards.pairs[16:].tolist()
    assert contents(tmp_path) == whole


def test_killed_process_goes_on_where_it_was(tmp_path):
    shards, _ = make_labels(tmp_path / "whole")
    code = f"import test_labelling; test_labelling.make_labels({str(tmp_path / 'killed')!r}, killed_at=12)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", env={"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError):
        labelling.PairShards(tmp_path / "killed")
    _, teacher = make_labels(tmp_path / "killed")
    # The shard before the fatal question may have been on its way to the disk.
    assert teacher.asked in (shards.pairs[12:].tolist(), shards.pairs[8:].tolist())
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("changed", [{"inputs": "other"}, {"per_shard": 5}])
def test_changed_settings_label_anew(tmp_path, changed):
    make_labels(tmp_path / "labels")
    shards, teacher = make_labels(tmp_path / "labels", **changed)
    assert teacher.asked == shards.pairs.tolist()
    assert len(list((tmp_path / "labels").glob("pairs-*.safetensors"))) == len(shards)


def test_labels_killed_while_old_ones_are_removed_are_not_taken_for_whole(tmp_path, monkeypatch):
    folder = tmp_path / "labels"
    make_labels(folder)
    (folder / "labels.json").write_text("{}")

    def killed(folder, ignore_errors):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        make_labels(folder, inputs="other")
    assert not list(folder.glob("*.json"))


def test_changed_graph_labels_anew(tmp_path):
    make_labels(tmp_path)
    world = box_world(7, SIZE)
    teacher = CountingTeacher(frames_of(world))
    graph = pairs.sequence_pairs(world.sequence, "oneref")
    shards = labelling.label_pairs(teacher, graph, SIZE, tmp_path, "same", PER_SHARD)
    assert teacher.asked == shards.pairs.tolist() == graph.tolist()


def test_too_little_disk_is_said_beforehand(tmp_path):
    teacher = CountingTeacher(frames_of(box_world(2, SIZE)))
    side = int((shutil.disk_usage(tmp_path).free * 2) ** 0.5)
    with pytest.raises(OSError, match="GB needed for 2 pairs.*smaller pair graph or image size"):
        labelling.label_pairs(teacher, np.array([[0, 1], [1, 0]]), (side, side), tmp_path / "labels", "same")
    assert teacher.asked == []


class Bar:
    """Notes what a progress bar is told."""

    def __init__(self, total, initial):
        self.told = [(total, initial)]

    def update(self, pairs):
        self.told.append(pairs)

    def close(self):
        self.told.append("closed")


def test_progress_counts_pairs_and_starts_where_a_killed_run_stopped(tmp_path):
    bars = []

    def progress(**of):
        bars.append(Bar(**of))
        return bars[-1]

    def label():
        teacher = teachers.DepthTeacher(frames_of(box_world(3, SIZE)))
        return labelling.label_pairs(teacher, pairs.complete_pairs(3), SIZE, tmp_path, "same", 4, progress)

    label()
    (tmp_path / "pairs.json").unlink()
    labelling.shard_path(tmp_path, 1).unlink()
    label()
    label()
    assert [bar.told for bar in bars] == [[(6, 0), 4, 2, "closed"], [(6, 4), 2, "closed"]]


def test_shards_are_as_large_as_stated(tmp_path):
    labels, _ = make_labels(tmp_path, per_shard=None)
    assert len(labels) == 1 and labelling.SHARD_BYTES > labelling.disk_bytes(22, SIZE)
    stated, taken = labelling.disk_bytes(22, SIZE), labelling.shard_path(tmp_path, 0).stat().st_size
    assert stated <= taken <= stated + 22 * 16 + 1000  # the pairs themselves, and a header


def test_what_half_precision_cannot_hold_stays_finite(tmp_path):
    far = np.full((1, *SIZE, 3), [1e9, -np.inf, 1], np.float32)
    sure = np.full((1, *SIZE), np.inf, np.float32)
    labelling.write_shard(tmp_path / "a", teachers.PairPointmaps(np.array([[0, 1]]), far, far, sure, sure))
    read = labelling.read_shard(tmp_path / "a")
    assert all(np.isfinite(array).all() for array in read)
    assert read.points_i[0, 0, 0].tolist() == [65504, -65504, 1]


def test_full_disk_loses_nothing(tmp_path):
    """A limit on the size of files stands for the full disk: the shard's write fails part-way all the same."""
    whole, _ = make_labels(tmp_path / "whole")
    make_labels(tmp_path / "full")
    damage(tmp_path / "full", "missing")
    before = contents(tmp_path / "full")
    code = ("import resource, signal, test_labelling; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
            f"test_labelling.make_labels({str(tmp_path / 'full')!r})")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", env={"PYTHONPATH": str(ROOT)}, timeout=60,
                          capture_output=True, text=True)  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "pairs-00004.safetensors" in last and "run it again" in last
    assert contents(tmp_path / "full") == before
    make_labels(tmp_path / "full")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_missing_labels_name_the_notebook(tmp_path):
    with pytest.raises(FileNotFoundError, match="notebook 02"):
        labelling.PairShards(tmp_path)


@pytest.mark.parametrize(("batch", "size", "pairs"), [(2, (384, 512), 10), (32, (384, 512), 64), (7, (384, 512), 14),
                                                      (99, (384, 512), 64), (None, (96, 128), 64)])  # fmt: skip
def test_a_shard_holds_two_of_a_gpus_batches(batch, size, pairs):
    teacher = SimpleNamespace(largest_batch=batch) if batch else SimpleNamespace()
    assert labelling._fitting_shard(teacher, size) == pairs
