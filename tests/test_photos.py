"""Photographs of all kinds: upright 8-bit RGB at DUSt3R's sizes, and intrinsics that still point at the same things."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from PIL import Image

from kdutils import inference, photos

ORIENTATION = 274  # EXIF tag


def gradient(width=96, height=64):
    """Red grows to the right and green downwards."""
    u, v = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([u, v, 0 * u], -1).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (384, 512)), ((968, 1296), (368, 512)), ((640, 480), (512, 384)), ((500, 500), (384, 512)),
     ((100, 512), (96, 512)), ((30, 40), (384, 512))],
)  # fmt: skip
def test_sizes_are_those_dust3r_was_trained_with(size, expected):
    image, _ = photos.resized_and_cropped(Image.new("RGB", size[::-1]))
    assert image.shape == (*expected, 3)


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (300, 300)])
def test_small_model_gets_the_centre_square(size):
    image, _ = photos.resized_and_cropped(Image.new("RGB", size[::-1]), 224)
    assert image.shape == (224, 224, 3)


@given(st.integers(64, 700), st.integers(64, 700), st.sampled_from([512, 224]))
def test_intrinsics_follow_resize_and_crop(height, width, long_edge):
    """A spot in the picture stays on the ray of its camera."""
    if max(height, width) > 8 * min(height, width):
        return
    intrinsics = np.array([[400, 0, 0.45 * width], [0, 410, 0.55 * height], [0, 0, 1]])
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    plain = Image.fromarray(np.stack([u * 255 / width, v * 255 / height, 0 * u], -1).round().astype(np.uint8))
    image, scaled = photos.resized_and_cropped(plain, long_edge, intrinsics)
    at = np.array([image.shape[0] // 2, image.shape[1] // 2])
    ray = np.linalg.inv(scaled) @ [at[1] + 0.5, at[0] + 0.5, 1]
    before = intrinsics @ ray
    found = image[tuple(at)][:2] / 255 * (width, height)
    assert_allclose(before[:2] / before[2], found, atol=0.01 * max(height, width))


def test_every_kind_of_image_becomes_rgb(tmp_path):
    plain = gradient()
    grey = np.asarray(plain)[..., 0]
    plain.save(tmp_path / "rgb.png")
    plain.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    plain.convert("RGBA").save(tmp_path / "rgba.png")
    plain.quantize(64).save(tmp_path / "palette.png")
    names = ["rgb.png", "cmyk.jpg", "rgba.png", "palette.png", "grey.png", "grey16.png"]
    opened = photos.open_photos([tmp_path / name for name in names])
    assert opened.skipped == {} and len(opened.image) == 6
    colour, *others = (image.astype(int) for image in opened.image)
    for name, other in zip(names[1:4], others[:3], strict=True):
        assert np.abs(colour - other).mean() < 6, name
    for name, other in zip(names[4:], others[3:], strict=True):
        assert np.abs(colour[..., :1] - other).max() <= 2, name


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned clockwise by a quarter
    gradient().save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = photos.open_photos([tmp_path / "turned.jpg"]).image[0].astype(int)
    assert image.shape == (512, 336, 3)
    assert image[0, :, 1].argmin() > 300 and image[:, 0, 0].argmax() > 480  # green grew down, now it grows to the left


def test_unusable_files_are_named_and_left_out(tmp_path):
    gradient().save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    names = ["empty", "cut", "text", "missing"]
    files = [tmp_path / "good.jpg", *(tmp_path / f"{name}.jpg" for name in names), tmp_path / "dot.png"]
    opened = photos.open_photos(files, intrinsics=np.eye(3))
    assert opened.files == files[:1] and len(opened.image) == len(opened.intrinsics) == 1
    assert sorted(opened.skipped) == sorted(map(str, files[1:]))
    assert "1x1" in opened.skipped[str(tmp_path / "dot.png")] and all(opened.skipped.values())


def test_photos_go_straight_to_the_teacher(tmp_path, one_thread):
    from test_dust3r import random_model

    gradient(96, 64).save(tmp_path / "wide.png")
    gradient(64, 96).save(tmp_path / "high.png")
    opened = photos.open_photos([tmp_path / "wide.png", tmp_path / "high.png"], long_edge=96)
    teacher = inference.DUSt3RTeacher(opened, random_model())
    for which, answer in teacher.predictions([[0, 1], [1, 0]]):
        assert answer["pts3d_1"].shape[1:3] == opened.image[int(which[0])].shape[:2]
