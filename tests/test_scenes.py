"""The reader of scenes: geometry against closed forms, every known defect, the real camera paths and a real scene."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kdutils import artefacts, geometry, scenes

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
PATHS, REDKITCHEN = SHARED / "12scenes_poses", SHARED / "redkitchen"
ROOMS = [
    "apt1_kitchen", "apt1_living", "apt2_bed", "apt2_kitchen", "apt2_living", "apt2_luke", "office1_gates362",
    "office1_gates381", "office1_lounge", "office1_manolis", "office2_5a", "office2_5b",
]  # fmt: skip
COLOR, DEPTH = (96, 130), (48, 64)  # as in 12Scenes, the two cameras' images differ in shape too
COLOR_K = np.array([[110.0, 0, 66], [0, 109, 47], [0, 0, 1]])
DEPTH_K = np.array([[56.0, 0, 32.5], [0, 57, 23], [0, 0, 1]])
NORMAL, OFFSET = np.array([0.2, -0.3, 1.0]), 2.5  # the plane n.x = d in the depth camera's frame


def row_major(matrix):
    full = np.eye(4)
    full[: len(matrix), : len(matrix)] = matrix
    return " ".join(f"{value:.9g}" for value in full.ravel())


def info_text(color=COLOR, depth=DEPTH, color_k=COLOR_K, depth_k=DEPTH_K, color_pose=None, depth_pose=None):
    return f"""m_versionNumber = 4
m_sensorName = Structure Sensor
m_colorWidth = {color[1]}
m_colorHeight = {color[0]}
m_depthWidth = {depth[1]}
m_depthHeight = {depth[0]}
m_depthShift = 1000
m_calibrationColorIntrinsic = {row_major(color_k)}
m_calibrationColorExtrinsic = {row_major(np.eye(4) if color_pose is None else color_pose)}
m_calibrationDepthIntrinsic = {row_major(depth_k)}
m_calibrationDepthExtrinsic = {row_major(np.eye(4) if depth_pose is None else depth_pose)}
m_frames.size = 7
"""


def split_text(test, training):
    return (
        f"sequence0 [frames={test}]  [start=0 ; end={test - 1}]\n"
        f"sequence1 [frames={training}]  [start={test} ; end={test + training - 1}]\n"
    )


def plane_depth(intrinsics, size, normal=NORMAL, offset=OFFSET):
    """Depth in metres of the plane normal.x = offset, seen by a camera in whose frame the plane is given."""
    return offset / (geometry.pixel_rays(intrinsics, *size) @ normal)


def write_scene(folder, test=3, training=4, info=None):
    """A scene of ``test`` + ``training`` frames that all see one slanted plane, painted with a horizontal ramp."""
    (folder / "data").mkdir(parents=True)
    (folder / "info.txt").write_text(info or info_text())
    (folder / "split.txt").write_text(split_text(test, training))
    ramp = np.broadcast_to(np.arange(COLOR[1], dtype=np.uint8)[:, None], (*COLOR, 3))
    depth = np.round(plane_depth(DEPTH_K, DEPTH) * 1000).astype(np.uint16)
    for number in range(test + training):
        pose = np.eye(4)
        pose[:3, 3] = number
        Image.fromarray(ramp).save(frame_file(folder, number, "color.jpg"), quality=95)
        Image.fromarray(depth).save(frame_file(folder, number, "depth.png"))
        np.savetxt(frame_file(folder, number, "pose.txt"), pose, fmt="%.6f")
    return folder


def frame_file(folder, number, kind):
    return folder / "data" / f"frame-{number:06d}.{kind}"


@pytest.fixture
def folder(tmp_path):
    return write_scene(tmp_path / "room")


# Geometry


@given(
    old=st.tuples(st.integers(40, 1300), st.integers(40, 1300)),
    new=st.tuples(st.integers(16, 600), st.integers(16, 600)),
    focal=st.floats(50, 2000),
    point=st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.2, 8)),
)
def test_intrinsics_follow_resize_and_crop(old, new, focal, point):
    intrinsics = np.array([[focal, 0, old[1] * 0.51], [0, focal * 1.01, old[0] * 0.48], [0, 0, 1]])
    followed, resized, (top, left) = geometry.resize_and_crop(intrinsics, old, new)
    before, _ = geometry.project(np.array(point), intrinsics)
    after, _ = geometry.project(np.array(point), followed)
    moved = before * (resized[1] / old[1], resized[0] / old[0]) - (left, top)
    np.testing.assert_allclose(after, moved, atol=1e-6 * (1 + np.abs(moved).max()))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.tuples(st.integers(16, 120), st.integers(16, 120)))
def test_view_has_color_and_depth_where_its_intrinsics_say(folder, size):
    view = scenes.Scene.open(folder).view(1, size)
    assert view.image.shape == (*size, 3) and view.image.dtype == np.uint8
    assert view.depth.shape == size and view.depth.dtype == np.float32
    expected = plane_depth(view.intrinsics, size)
    seen = view.depth > 0
    assert seen.mean() > 0.9
    # Half a depth pixel on this slanted plane, and half a millimetre of rounding.
    assert np.abs(view.depth - expected)[seen].max() < 0.03
    assert abs((view.depth - expected)[seen].mean()) < 0.006
    # The ramp's grey level is the original column: the new pixel's ray must lead back to it.
    pixels, _ = geometry.project(geometry.pixel_rays(view.intrinsics, *size), COLOR_K)
    inner = (pixels[..., 0] > 12) & (pixels[..., 0] < COLOR[1] - 12)
    assert np.abs(view.image[..., 0] - (pixels[..., 0] - 0.5))[inner].max() < 2.5


def rotation_y(degrees):
    angle = np.radians(degrees)
    pose = np.eye(4)
    pose[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    return pose


@pytest.mark.parametrize("moved", ["color", "depth"])
def test_extrinsics_are_honoured(tmp_path, moved):
    camera_to_rig = rotation_y(5)
    camera_to_rig[:3, 3] = (0.1, -0.05, 0.04)
    write_scene(tmp_path / "room", info=info_text(**{f"{moved}_pose": camera_to_rig}))
    scene = scenes.Scene.open(tmp_path / "room")
    depth_to_color = camera_to_rig if moved == "depth" else np.linalg.inv(camera_to_rig)
    np.testing.assert_allclose(scene.depth_to_color, depth_to_color, atol=1e-8)
    view = scene.view(0, (24, 32))
    normal = depth_to_color[:3, :3] @ NORMAL  # the plane in the colour camera's frame
    expected = plane_depth(view.intrinsics, (24, 32), normal, OFFSET + normal @ depth_to_color[:3, 3])
    seen = view.depth > 0
    assert seen.mean() > 0.7
    assert np.abs(view.depth - expected)[seen].max() < 0.06
    assert abs(np.median((view.depth - expected)[seen])) < 0.02


def test_splat_keeps_the_nearest():
    intrinsics = np.array([[2.0, 0, 1], [0, 2, 1], [0, 0, 1]])
    depth = np.array([[1.0, 3.0], [0.0, 2.0]])
    coarse = np.array([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]])
    assert scenes.splat_depth(depth, intrinsics, np.eye(4), coarse, (1, 1)).item() == 1


def test_holes_and_edges_are_not_interpolated(folder):
    depth = np.full(DEPTH, 1000, np.uint16)
    depth[:, 20:30], depth[:, 40:] = 0, 4000
    depth[0, 0] = 65535
    Image.fromarray(depth).save(frame_file(folder, 0, "depth.png"))
    assert set(np.unique(scenes.Scene.open(folder).view(0, (90, 125)).depth)) == {0, 1, 4}


# Defects of frames

BAD_POSES = {
    "-1.#INF " * 16: "no finite numbers",
    "INF " * 16: "no finite numbers",
    "nan 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1": "no finite numbers",
    "": "no 4x4",
    "1 0 0 0 0 1 0 0 0 0 1 0": "no 4x4",
    "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1 0": "no 4x4",
    "2 0 0 0 0 2 0 0 0 0 2 0 0 0 0 1": "no rigid",
    "1 0 0 0 0 1 0 0 0 0 -1 0 0 0 0 1": "no rigid",
    "1 0 0 0 0 1 0 0 0 0 1 0 0 0 1 1": "no rigid",
}


@pytest.mark.parametrize("text", BAD_POSES)
def test_bad_pose_is_skipped(folder, text):
    frame_file(folder, 1, "pose.txt").write_text(text)
    scene = scenes.Scene.open(folder)
    assert list(scene.poses) == [0, 2, 3, 4, 5, 6] and list(scene.skipped) == [1]
    assert BAD_POSES[text] in scene.skipped[1]
    with pytest.raises(scenes.BadFrame, match=r"frame-000001\.pose\.txt: pose"):
        scene.view(1, (24, 32))


def test_drifted_rotation_is_made_orthogonal(folder):
    frame_file(folder, 1, "pose.txt").write_text("1.002 0.001 0 1 0 0.999 0 2 0 0 1.001 3 0 0 0 1")
    rotation = scenes.Scene.open(folder).poses[1][:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_missing_file_is_skipped_at_opening(folder, kind):
    frame_file(folder, 5, scenes.KINDS[kind]).unlink()
    assert scenes.Scene.open(folder).skipped == {5: f"{kind} missing"}


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def save_depth(array):
    return lambda file: Image.fromarray(array).save(file)


OTHER_SIZE = save_depth(np.ones((10, 12), np.uint16))
TURNED = Image.Exif()
TURNED[274] = 6  # orientation: to be turned clockwise by a quarter
BAD_IMAGES = {
    "turned color": ("color.jpg", lambda file: Image.open(file).save(file, exif=TURNED), "after its EXIF rotation"),
    "one pixel": ("color.jpg", lambda file: Image.new("RGB", (1, 1)).save(file), "image is 1x1"),
    "truncated color": ("color.jpg", truncate, "color file is missing, truncated"),
    "empty color": ("color.jpg", lambda file: file.write_bytes(b""), "color file is missing, truncated"),
    "color gone since": ("color.jpg", lambda file: file.unlink(), "color file is missing, truncated"),
    "truncated depth": ("depth.png", truncate, "depth file is missing, truncated"),
    "garbage depth": ("depth.png", lambda file: file.write_bytes(b"x" * 99), "depth file is missing, truncated"),
    "zero depth": ("depth.png", save_depth(np.zeros(DEPTH, np.uint16)), "depth holds no reading"),
    "8-bit depth": ("depth.png", save_depth(np.ones(DEPTH, np.uint8)), "depth is not 16-bit grey but of mode L"),
    "RGB depth": ("depth.png", save_depth(np.ones((*DEPTH, 3), np.uint8)), "depth is not 16-bit grey but of mode RGB"),
    "depth of another size": ("depth.png", OTHER_SIZE, "image is 12x10, info.txt says 64x48"),
    "color of another size": ("color.jpg", save_depth(np.ones((10, 12, 3), np.uint8)), "image is 12x10"),
}


@pytest.mark.parametrize("defect", BAD_IMAGES)
def test_bad_image_is_a_bad_frame_and_left_out(folder, tmp_path, defect):
    kind, spoil, cause = BAD_IMAGES[defect]
    scene = scenes.Scene.open(folder)
    spoil(frame_file(folder, 4, kind))
    with pytest.raises(scenes.BadFrame) as caught:
        scene.view(4, (24, 32))
    assert f"frame-000004.{kind}: " in str(caught.value) and cause in str(caught.value)
    frames = scenes.prepare(scene, tmp_path / "out", (24, 32))
    assert frames.number.tolist() == [0, 1, 2, 3, 5, 6] and cause in frames.skipped[4]
    np.testing.assert_array_equal(frames.poses[4], scene.poses[5])
    np.testing.assert_array_equal(frames.image[4], scene.view(5, (24, 32)).image)


COLOR_KINDS = {
    "CMYK": lambda image, file: image.convert("CMYK").save(file, quality=95),
    "grey": lambda image, file: image.convert("L").save(file, quality=95),
    "16-bit grey PNG": lambda image, file: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    .save(file, format="PNG"),
    "RGBA PNG": lambda image, file: image.convert("RGBA").save(file, format="PNG"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLOR_KINDS)
def test_color_of_any_kind_looks_the_same(folder, kind):
    scene = scenes.Scene.open(folder)
    before = scene.view(4, (24, 32)).image.astype(int)
    file = frame_file(folder, 4, "color.jpg")
    COLOR_KINDS[kind](Image.open(file).copy(), file)
    assert np.abs(scene.view(4, (24, 32)).image - before).max() <= 6


def test_frame_of_no_sequence(folder):
    with pytest.raises(scenes.BadFrame, match="in no sequence"):
        scenes.Scene.open(folder).view(99, (24, 32))


# Defects of scenes

BAD_INFO = {
    "m_depthShift = 1000": ("", "key m_depthShift is missing"),
    "m_colorWidth = 130": ("m_colorWidth = wide", r"info.txt:3: m_colorWidth is .* not 'wide'"),
    "m_colorHeight = 96": ("m_colorHeight = 96.5", r"info.txt:4: m_colorHeight"),
    "m_depthHeight = 48": ("m_depthHeight =", r"info.txt:6: m_depthHeight"),
    "m_depthShift = 1000\n": ("m_depthShift = 0\n", r"info.txt:7: m_depthShift is a positive number, not '0'"),
    "m_calibrationColorIntrinsic = 110 ": ("m_calibrationColorIntrinsic = ", r"info.txt:8: m_calibrationColorIntrin"),
    "m_calibrationDepthIntrinsic = 56 ": ("m_calibrationDepthIntrinsic = nan ", r"info.txt:10: "),
    "m_calibrationDepthExtrinsic = 1 ": ("m_calibrationDepthExtrinsic = 3 ", r"info.txt:11: .* rigid"),
}


@pytest.mark.parametrize("old", BAD_INFO)
def test_bad_info(folder, old):
    new, message = BAD_INFO[old]
    assert old in info_text()
    (folder / "info.txt").write_text(info_text().replace(old, new))
    with pytest.raises(scenes.SceneError, match=message) as caught:
        scenes.Scene.open(folder)
    assert scenes.RESTORE in str(caught.value)


TEST_LINE = "sequence0 [frames=3]  [start=0 ; end=2]\n"
BAD_SPLITS = {
    "": "needs sequence0",
    TEST_LINE: "at least one other",
    "sequence1 [frames=3]  [start=0 ; end=2]\n": "needs sequence0",
    TEST_LINE + "sequence1 [frames=": "split.txt:2: 'sequence1 .frames='",
    TEST_LINE + "\n \nsequence1 [frames=4]  [start=6 ; end=3]\n": "split.txt:4",
    TEST_LINE + "sequence1 [frames=9]  [start=3 ; end=6]\n": "split.txt:2",
    TEST_LINE + "sequence1 [frames=5]  [start=2 ; end=6]\n": "split.txt:2: .* repeats",
    TEST_LINE + "sequence0 [frames=4]  [start=3 ; end=6]\n": "split.txt:2: .* repeats",
    "\x00\x7f\xff": "split.txt:1",
}


@pytest.mark.parametrize("text", BAD_SPLITS)
def test_bad_split(folder, text):
    (folder / "split.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(scenes.SceneError, match=BAD_SPLITS[text]):
        scenes.Scene.open(folder)


@pytest.mark.parametrize("name", ["info.txt", "split.txt", "data"])
def test_missing_part_of_a_scene(folder, name):
    (shutil.rmtree if name == "data" else os.remove)(folder / name)
    with pytest.raises(scenes.SceneError, match=f"{name}: missing"):
        scenes.Scene.open(folder)


def test_folder_above_scenes_names_them(folder):
    with pytest.raises(scenes.SceneError, match="is no scene; open one of the scenes in it: room"):
        scenes.Scene.open(folder.parent)
    with pytest.raises(scenes.SceneError, match="is no scene"):
        scenes.Scene.open(folder.parent / "nowhere")


@pytest.mark.parametrize("numbers, what", [(range(7), "test"), (range(3), "test"), (range(3, 7), "training")])
def test_scene_without_usable_frames(folder, numbers, what):
    for number in numbers:
        frame_file(folder, number, "pose.txt").write_text("-1.#INF " * 16)
    with pytest.raises(scenes.SceneError, match=rf"no usable {what} frame is left \({len(numbers)}: pose holds"):
        scenes.Scene.open(folder)


def test_prepare_without_usable_frames_leaves_nothing(folder, tmp_path):
    for number in range(7):
        truncate(frame_file(folder, number, "color.jpg"))
    with pytest.raises(scenes.SceneError, match="no usable test frame is left"):
        scenes.prepare(scenes.Scene.open(folder), tmp_path / "out", (24, 32))
    with pytest.raises(scenes.SceneError, match="run notebook 01 first"):
        scenes.Frames.load(tmp_path / "out")


# Finding and naming


def test_find_scenes_ignores_what_is_no_scene(tmp_path):
    for place in ("apt1/kitchen", "apt2/kitchen", "room"):
        write_scene(tmp_path / place, test=1, training=1)
    (tmp_path / "README.txt").write_text("no scene")
    (tmp_path / "apt1" / "README").write_text("no scene")
    (tmp_path / "apt1" / "notes").mkdir()
    write_scene(tmp_path / ".apt3.unpacking" / "kitchen", test=1, training=1)
    found = scenes.find_scenes(tmp_path)
    assert [str(scene.relative_to(tmp_path)) for scene in found] == ["apt1/kitchen", "apt2/kitchen", "room"]
    assert [scenes.Scene.open(scene).name for scene in found] == ["apt1_kitchen", "apt2_kitchen", "room"]
    assert scenes.Scene.open(found[0], "mine").name == "mine"
    assert scenes.find_scenes(tmp_path / "room") == [tmp_path / "room"]
    assert scenes.find_scenes(tmp_path / "nowhere") == []


# Prepared frames


def test_prepare_is_done_once(folder, tmp_path):
    out, scene = tmp_path / "out", scenes.Scene.open(folder)
    seen = []

    def progress(iterable, total):
        seen.append(total)
        return iterable

    frames = scenes.prepare(scene, out, (24, 32), progress=progress)
    assert frames.size == (24, 32) and len(frames) == 7 and frames.is_test.tolist() == [True] * 3 + [False] * 4
    assert frames.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1]
    for row in range(7):
        view = scene.view(row, (24, 32))
        np.testing.assert_array_equal(frames.image[row], view.image)
        np.testing.assert_array_equal(frames.depth[row], view.depth)
        np.testing.assert_array_equal(frames.poses[row], view.pose)
        np.testing.assert_array_equal(frames.intrinsics, view.intrinsics)
    scenes.prepare(scenes.Scene.open(folder), out, [24, 32], progress=progress)
    assert seen == [7]
    (folder / "split.txt").write_text((folder / "split.txt").read_text() + "\n")  # a blank line is no defect
    os.utime(frame_file(folder, 0, "color.jpg"), ns=(1, 1))
    scenes.prepare(scene, out, (24, 32), progress=progress)
    scenes.prepare(scene, out, (24, 30), progress=progress)
    (out / scenes.TENSORS).unlink()
    scenes.prepare(scene, out, (24, 30), progress=progress)
    assert seen == [7] * 4


def test_prepare_thins_evenly(tmp_path):
    scene = scenes.Scene.open(write_scene(tmp_path / "room", test=5, training=9))
    frames = scenes.prepare(scene, tmp_path / "out", (24, 32), most_train=3, most_test=2)
    assert frames.number.tolist() == [0, 4, 5, 9, 13]
    assert frames.skipped == {}
    assert scenes.prepare(scene, tmp_path / "out", (24, 32), most_train=99).number.tolist() == list(range(14))


def test_broken_preparation_is_not_taken_for_whole(folder, tmp_path):
    out, scene = tmp_path / "out", scenes.Scene.open(folder)

    def stop(iterable, total):
        raise KeyboardInterrupt

    scenes.prepare(scene, out, (24, 32))
    before = (out / scenes.TENSORS).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        scenes.prepare(scene, out, (24, 30), progress=stop)
    assert (out / scenes.TENSORS).read_bytes() == before and len(scenes.Frames.load(out)) == 7
    artefacts.discard(out / scenes.MANIFEST)  # as a crash between the two files would leave it
    with pytest.raises(scenes.SceneError, match="run notebook 01 first"):
        scenes.Frames.load(out)


def test_manifest_counts_the_skipped(folder, tmp_path):
    frame_file(folder, 0, "pose.txt").write_text("INF " * 16)
    truncate(frame_file(folder, 3, "depth.png"))
    truncate(frame_file(folder, 6, "depth.png"))
    frames = scenes.prepare(scenes.Scene.open(folder), tmp_path / "out", (24, 32))
    manifest = artefacts.read_json(tmp_path / "out" / scenes.MANIFEST)
    assert list(frames.skipped) == [0, 3, 6] and sorted(manifest["skipped_by_reason"].values()) == [1, 2]
    assert scenes.Frames.load(tmp_path / "out").skipped == frames.skipped


# Real camera paths


def into_camera(file):
    """World-to-camera as a function of points ``(N, 3)``, one a line of a camera path; by q v q*, not by matrices."""
    rows = np.array([[float(token) for token in line.split()[1:]] for line in file.read_text().splitlines()])
    w, axis = rows[:, :1], rows[:, 1:4]
    square = w**2 + (axis**2).sum(1, keepdims=True)
    return lambda p: p + 2 * np.cross(axis, np.cross(axis, p) + w * p) / square + rows[:, 4:7]


@pytest.mark.skipif(not PATHS.is_dir(), reason="the published camera paths are not at hand")
@pytest.mark.parametrize("truth", ["dslam", "sfm"])
@pytest.mark.parametrize("room", ROOMS)
def test_real_camera_paths_lead_from_world_to_camera(room, truth):
    for part in ("test", "train"):
        file = PATHS / truth / f"{room}_{part}.txt"
        numbers, poses, focals = scenes.read_camera_path(file)
        assert len(numbers) == len(set(numbers)) == len(poses) == len(file.read_text().splitlines())
        assert np.unique(focals).size == 1 and 1100 < focals[0] < 1200
        camera = into_camera(file)
        ahead = poses @ (0, 0, 1, 1)
        np.testing.assert_allclose(camera(poses[:, :3, 3]), 0 * ahead[:, :3], atol=1e-9)
        np.testing.assert_allclose(camera(ahead[:, :3]) - (0, 0, 1), 0 * ahead[:, :3], atol=1e-9)


@pytest.fixture
def memory_folder():
    """A folder in memory where the system has such: twelve thousand small files take seconds on a busy disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.skipif(not PATHS.is_dir(), reason="the published camera paths are not at hand")
@pytest.mark.parametrize("room", ROOMS)
def test_scene_along_a_real_camera_path(memory_folder, room):
    test, training = (scenes.read_camera_path(PATHS / "dslam" / f"{room}_{part}.txt") for part in ("test", "train"))
    poses = dict(zip(test[0] + training[0], np.concatenate([test[1], training[1]]), strict=True))
    focal, first, last = test[2][0], max(test[0]) + 1, max(training[0])
    intrinsics = np.array([[focal, 0, 648], [0, focal, 484], [0, 0, 1]])
    data = memory_folder / room / "data"
    data.mkdir(parents=True)
    halved = np.diag([0.5, 0.5, 1]) @ intrinsics
    (data.parent / "info.txt").write_text(info_text((968, 1296), (480, 640), intrinsics, halved))
    middle = (first + last) // 2
    starts = [(0, first - 1), (first, middle), (middle + 1, last)]
    (data.parent / "split.txt").write_text(
        "".join(f"sequence{i} [frames={b - a + 1}]  [start={a} ; end={b}]\n" for i, (a, b) in enumerate(starts))
    )
    (memory_folder / "empty").touch()
    lines = ("{:.9g} {:.9g} {:.9g} {:.9g}\n" * 4).format
    for number in range(last + 1):
        stem = f"{data}/frame-{number:06d}."
        os.link(memory_folder / "empty", stem + "color.jpg")
        os.link(memory_folder / "empty", stem + "depth.png")
        with open(stem + "pose.txt", "w") as file:
            file.write(lines(*poses[number].ravel()) if number in poses else "-1.#INF INF INF -1.#INF\n" * 4)
    started = time.process_time()  # whoever else keeps the machine busy does not count
    scene = scenes.Scene.open(data.parent)
    seconds = time.process_time() - started
    assert seconds < 1.5, "opening is meant to be quick even for 4000 frames"
    assert scene.numbers(is_test=True) == test[0] and scene.numbers(is_test=False) == training[0]
    assert sorted(scene.skipped) == sorted(set(range(last + 1)) - set(poses))
    assert scene.color_intrinsics[0, 0] == pytest.approx(focal)
    np.testing.assert_allclose([scene.poses[n] for n in poses], list(poses.values()), atol=1e-7)


BAD_PATHS = {
    "": "empty",
    "frame-000001.color.jpg 1 0 0 0 0 0 0\n": "path.txt:1",
    "frame-000001.color.jpg 1 0 0 0 0 0 0 5\nframe-000002.color.jpg INF 0 0 0 0 0 0 5\n": "path.txt:2",
    "frame-000001.color.jpg 0 0 0 0 0 0 0 5\n": "path.txt:1",
    "\nimage.jpg 1 0 0 0 0 0 0 5\n": "path.txt:2",
}


@pytest.mark.parametrize("text", BAD_PATHS)
def test_bad_camera_path(tmp_path, text):
    (tmp_path / "path.txt").write_text(text)
    with pytest.raises(scenes.SceneError, match=BAD_PATHS[text]):
        scenes.read_camera_path(tmp_path / "path.txt")
    with pytest.raises(scenes.SceneError, match="missing"):
        scenes.read_camera_path(tmp_path / "nowhere.txt")


# A real scene


@pytest.mark.skipif(not REDKITCHEN.is_dir(), reason="the real scene is not at hand")
def test_redkitchen_is_read_whole(tmp_path):
    scene = scenes.Scene.open(REDKITCHEN)
    assert len(scene.numbers(is_test=True)) == 100 and len(scene.numbers(is_test=False)) == 300 and not scene.skipped
    assert scene.color_size == (480, 640) and scene.depth_size == (240, 320)
    frames = scenes.prepare(scene, tmp_path, (48, 64))
    assert frames.is_test.sum() == 100 and len(frames) == 400 and not frames.skipped
    assert (frames.depth == 0).mean() == pytest.approx(0.27, abs=0.02)


def warp_error(view, other, pose):
    """Median grey-level difference between ``view`` and what its points look like in ``other`` placed at ``pose``."""
    world = geometry.transform(view.pose, geometry.unproject(view.depth, view.intrinsics))[view.depth > 0]
    pixels, z = geometry.project(geometry.transform(geometry.invert(pose), world), other.intrinsics)
    inside = (z > 0) & (pixels > 0).all(-1) & (pixels < other.depth.shape[::-1]).all(-1)
    column, row = np.floor(pixels[inside]).astype(int).T
    unhidden = np.abs(other.depth[row, column] - z[inside]) < 0.05
    grey, other_grey = (image.mean(-1) for image in (view.image, other.image))
    return np.median(np.abs(grey[view.depth > 0][inside] - other_grey[row, column])[unhidden])


@pytest.mark.skipif(not REDKITCHEN.is_dir(), reason="the real scene is not at hand")
@pytest.mark.parametrize("first, second", [(10, 14), (60, 63), (150, 155), (330, 334)])
def test_redkitchen_neighbours_agree_through_depth(first, second):
    scene = scenes.Scene.open(REDKITCHEN)
    view, other = scene.view(first, (240, 300)), scene.view(second, (240, 300))
    right = warp_error(view, other, other.pose)
    turned = warp_error(view, other, other.pose @ rotation_y(2))
    assert right < 8 and right < turned
