"""Sample rooms: the ray caster against closed forms and against itself, and what lies on disk."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from kdutils import geometry, rooms
from kdutils.rooms import building, light, solids
from kdutils.rooms import files as files_on_disk

SMALL = {"sequences": (16, 24, 24), "every": 4, "color_size": (60, 80), "depth_size": (48, 64)}
SIZE = (90, 120)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Splitting small operations over threads is slow on a busy machine; the workers of write_room do without, too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def built():
    return {kind: rooms.build_room(kind, 5) for kind in rooms.KINDS}


BAKE = light.bake_light


def bake_coarsely(scene, workers=0):
    return BAKE(scene, spacing=10.0)


@pytest.fixture
def dim(monkeypatch):
    """Coarse light, for what does not depend on it: lighting a room takes longer than a small room's frames."""
    monkeypatch.setattr(building, "bake_light", bake_coarsely)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "bake_light", bake_coarsely)
        return rooms.write_room(tmp_path_factory.mktemp("rooms") / "kitchen", "kitchen", 3, **SMALL)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def view(room, poses):
    k = rooms.intrinsics_for(SIZE, "color")
    return k, *(x.numpy() for x in rooms.render(room, poses, k, SIZE))


def outside_distance(scene, points):
    """Distance in metres, at least, from points ``(N, 3)`` to each primitive's bounding box: ``(N, P)``, 0 inside."""
    local = np.einsum("pji,npj->npi", scene.rotation.numpy(), points[:, None] - scene.centre.numpy())
    return np.linalg.norm(np.maximum(np.abs(local) - scene.half.numpy(), 0), axis=-1)


def test_depth_is_that_of_an_empty_box(built):
    room = built["kitchen"]
    first = {
        name: getattr(room.scene, name)[:1] for name in ("shape", "centre", "rotation", "half", "seed", "material")
    }
    empty = replace(room, scene=replace(room.scene, **first))
    pose = rooms.camera_path(room, 1, 0, 5)[0]
    k, _, depth = view(empty, pose[None])
    rays = geometry.pixel_rays(k, *SIZE) @ pose[:3, :3].T
    walls = np.array([[-room.size[0] / 2, -room.size[1] / 2, 0], [room.size[0] / 2, room.size[1] / 2, room.size[2]]])
    expected = np.where(rays > 0, (walls[1] - pose[:3, 3]) / rays, (walls[0] - pose[:3, 3]) / rays).min(-1)
    np.testing.assert_allclose(depth[0], expected, atol=2e-5)


@pytest.mark.parametrize("kind", rooms.KINDS)
def test_tiles_see_what_a_search_through_all_primitives_sees(built, kind):
    room = built[kind]
    poses = rooms.camera_path(room, 41, 1, 5)[::20]
    k, _, depths = view(room, poses)
    matrix, offset = room.scene.unit_map()
    for pose, depth in zip(torch.tensor(poses, dtype=torch.float32), depths):
        rays = torch.tensor(geometry.pixel_rays(k, *SIZE), dtype=torch.float32).reshape(-1, 3)[::7] @ pose[:3, :3].T
        origin, direction = matrix @ pose[:3, 3] + offset, matrix @ rays.T
        solid = solids.entry(room.scene.shape[1:], origin[1:, :, None], direction[1:]).amin(0)
        wall = solids.leaving(origin[:1, :, None], direction[:1])[0]
        error = (torch.minimum(solid, wall) - torch.tensor(depth.reshape(-1)[::7])).abs()
        assert (error < 1e-4).float().mean() > 0.995


def test_round_shapes_are_hit_where_they_are():
    shape = torch.tensor([solids.BOX, solids.CYLINDER, solids.BALL])
    origin = torch.tensor([-3.0, 0.6, 0.6]).repeat(3, 1)[..., None]
    direction = torch.tensor([1.0, 1e-9, 1e-9]).repeat(3, 1)[..., None]
    expected = [2, 3 - 0.8, 3 - (1 - 0.72) ** 0.5]
    torch.testing.assert_close(solids.entry(shape, origin, direction)[:, 0], torch.tensor(expected))


@pytest.mark.parametrize("kind", rooms.KINDS)
def test_two_views_agree(built, kind):
    room = built[kind]
    poses = rooms.camera_path(room, 9, 1, 5)[[0, 8]]
    k, images, depths = view(room, poses)
    points = geometry.transform(geometry.invert(poses[1]) @ poses[0], geometry.unproject(depths[0], k))
    pixels, z = geometry.project(points, k)
    height, width = SIZE
    inside = (z > 0.1) & (pixels > 0).all(-1) & (pixels < (width, height)).all(-1)
    u, v = np.floor(pixels[inside]).astype(int).T
    close = np.abs(depths[1][v, u] - z[inside]) < 0.03 * z[inside]
    assert inside.mean() > 0.3 and close.mean() > 0.8
    difference = np.abs(images[0][inside].astype(float) - images[1][v, u])[close].mean(-1)
    assert np.median(difference) < 8


@pytest.mark.parametrize("kind", rooms.KINDS)
@pytest.mark.parametrize("seed", (0, 1, -2, 7))
def test_cameras_walk_in_free_space(kind, seed):
    room = rooms.furnish(kind, seed)
    paths = [rooms.camera_path(room, n, k, seed) for k, n in enumerate((60, 90, 90))]
    for path in paths:
        assert np.abs(np.linalg.det(path[:, :3, :3]) - 1).max() < 1e-9
        assert (np.abs(path[:, :2, 3]) < np.array(room.size[:2]) / 2 - 0.3).all()
        assert outside_distance(room.scene, path[:, :3, 3])[:, 1:].min() > 0.1
        assert 0.02 < np.linalg.norm(np.diff(path[:, :3, 3], axis=0), axis=1).mean() < 0.09
    apart = np.linalg.norm(paths[0][:, None, :3, 3] - np.concatenate(paths[1:])[:, :3, 3], axis=-1)
    assert apart.min() > 0.03


def test_a_longer_path_begins_like_a_shorter_one(built):
    room = built["office"]
    np.testing.assert_allclose(
        rooms.camera_path(room, 40, 2, 5)[:20, :3, 3], rooms.camera_path(room, 20, 2, 5)[:, :3, 3], atol=0.02
    )


def test_a_frame_does_not_depend_on_its_batch(built):
    room = built["office"]
    poses = rooms.camera_path(room, 9, 0, 5)[::4]
    _, images, depths = view(room, poses)
    for k, pose in enumerate(poses):
        _, image, depth = view(room, pose[None])
        assert (np.abs(depth[0] - depths[k]) < 1e-5).mean() > 0.999
        assert (np.abs(image[0].astype(int) - images[k]) <= 1).mean() > 0.999


def test_pictures_are_not_flat(built):
    for kind in rooms.KINDS:
        poses = rooms.camera_path(built[kind], 61, 0, 5)[::20]
        for image in view(built[kind], poses)[1]:
            assert 50 < image.mean() < 210 and image.std() > 25


def test_layout(written):
    frames = 4 + 6 + 6
    names = {f"frame-{i:06d}.{end}" for i in range(frames) for end in ("color.jpg", "depth.png", "pose.txt")}
    assert {path.name for path in (written / "data").iterdir()} == names
    assert {path.name for path in written.iterdir()} == {"data", "info.txt", "split.txt", "room.json"}
    info = dict(line.split(" = ") for line in (written / "info.txt").read_text().splitlines())
    assert (info["m_colorWidth"], info["m_colorHeight"], info["m_depthWidth"], info["m_depthHeight"]) == (
        "80",
        "60",
        "64",
        "48",
    )
    assert info["m_depthShift"] == "1000" and info["m_frames.size"] == str(frames)
    for camera in ("color", "depth"):
        k = np.array(info[f"m_calibration{camera.title()}Intrinsic"].split(), float).reshape(4, 4)
        np.testing.assert_allclose(k[:3, :3], rooms.intrinsics_for(SMALL[f"{camera}_size"], camera), atol=1e-6)
        extrinsic = np.array(info[f"m_calibration{camera.title()}Extrinsic"].split(), float)
        assert (extrinsic == np.eye(4).ravel()).all()
    assert (written / "split.txt").read_text().splitlines() == [
        "sequence0 [frames=4]  [start=0 ; end=3]",
        "sequence1 [frames=6]  [start=4 ; end=9]",
        "sequence2 [frames=6]  [start=10 ; end=15]",
    ]
    assert json.loads((written / "room.json").read_text())["version"] == rooms.VERSION
    with Image.open(written / "data" / "frame-000000.color.jpg") as image:
        assert image.size == (80, 60)


def test_some_poses_are_unusable_and_the_others_exact(written):
    room = rooms.furnish("kitchen", 3)
    expected = np.concatenate([rooms.camera_path(room, n, k, 3)[::4] for k, n in enumerate(SMALL["sequences"])])
    unusable = []
    for i, pose in enumerate(expected):
        tokens = (written / "data" / f"frame-{i:06d}.pose.txt").read_text().split()
        assert len(tokens) == 16
        if "-1.#INF" in tokens:
            unusable.append(i)
        else:
            np.testing.assert_allclose(np.array(tokens, float).reshape(4, 4), pose, atol=1e-9)
    assert sum(i < 4 for i in unusable) == 1 and sum(i >= 4 for i in unusable) == 2


def test_depth_has_noise_and_holes(written):
    depth = np.stack([np.array(Image.open(path)) for path in sorted(written.glob("data/*.depth.png"))])
    assert depth.dtype == np.uint16 and depth.shape == (16, 48, 64)
    assert 0.04 < (depth == 0).mean() < 0.22
    assert 300 < depth[depth > 0].min() and depth.max() < 5000
    flat = np.full((100, 100), 3.0)
    sensed = rooms.sensed_depth(flat, np.zeros_like(flat), np.random.default_rng(0), 140) / 1000
    assert (sensed == 0).mean() < 0.01
    assert np.isclose(sensed[sensed > 0].std(), 0.0012 + 0.0019 * 2.6**2, rtol=0.1)


def test_seed_decides_every_byte(written, tmp_path, dim):
    drawn = torch.get_rng_state()
    again = rooms.write_room(tmp_path / "again", "kitchen", 3, **SMALL)
    assert torch.equal(torch.get_rng_state(), drawn)
    other = rooms.write_room(tmp_path / "other", "kitchen", -4, **{**SMALL, "sequences": (4,)})
    assert files(again) == files(written)
    pictures = [
        np.array(Image.open(room / "data" / "frame-000000.color.jpg")).astype(float) for room in (written, other)
    ]
    assert np.abs(pictures[0] - pictures[1]).mean() > 10


def test_light_is_the_same_again_and_with_other_workers(built):
    scene = rooms.furnish("kitchen", 5).scene
    torch.testing.assert_close(light.bake_light(scene, workers=2).light, built["kitchen"].scene.light)


def test_every_keeps_frames_of_the_same_path(written, tmp_path, dim):
    half = rooms.write_room(tmp_path / "half", "kitchen", 3, **{**SMALL, "every": 8, "sequences": (16,)})
    assert (half / "data" / "frame-000000.pose.txt").read_text() == (
        written / "data" / "frame-000000.pose.txt"
    ).read_text()


def test_a_whole_room_is_left_alone_and_leftovers_are_not_a_room(written, tmp_path, dim, monkeypatch):
    seen = []
    before = os.stat(written / "room.json").st_mtime_ns
    rooms.write_room(written, "kitchen", 3, **SMALL, progress=lambda *step: seen.append(step))
    assert not seen and os.stat(written / "room.json").st_mtime_ns == before

    def killed(*_):
        raise KeyboardInterrupt

    few = {**SMALL, "sequences": (8, 8)}
    with monkeypatch.context() as patch:
        patch.setattr(files_on_disk, "_info", killed)
        with pytest.raises(KeyboardInterrupt):
            rooms.write_room(tmp_path / "room", "office", 1, **few)
    assert not (tmp_path / "room").exists()
    folder = rooms.write_room(tmp_path / "room", "office", 1, **few, progress=lambda *step: seen.append(step))
    assert seen[-1] == (4, 4) and len(list(folder.glob("data/*.jpg"))) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["room"]


def test_a_changed_room_is_written_anew_but_nothing_else_is_replaced(tmp_path, dim):
    few = {**SMALL, "sequences": (4,)}
    folder = rooms.write_room(tmp_path / "room", "office", 1, **few)
    settings = json.loads((folder / "room.json").read_text())
    (folder / "room.json").write_text(json.dumps({**settings, "version": 0}))
    assert json.loads((rooms.write_room(folder, "office", 1, **few) / "room.json").read_text()) == settings
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(FileExistsError):
        rooms.write_room(tmp_path / "mine", "office", 1, **few)


def test_unknown_kind_names_the_kinds(tmp_path):
    with pytest.raises(ValueError, match="kitchen, office"):
        rooms.write_room(tmp_path / "room", "cellar")
