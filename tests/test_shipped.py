"""Weights that ship: cards, digests, sizes, and that each loads where the study wants it."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import box_world
from safetensors.torch import load_file

from kdutils import backbones, dust3r, shipped, students, teachers
from kdutils.settings import ARMS, Study

NAMES = ("compact_dust3r", *backbones.NAMES)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The shipped weights, copied to where they may be damaged."""
    shutil.copytree(shipped.WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_card_that_is_true(name):
    card, file = shipped.card(name), shipped.locate(name)
    tensors = load_file(file)
    assert card["name"] == name and card["bytes"] == file.stat().st_size
    assert {"trained_on", "settings", "seconds", "machine", "validation", "licence", "log"} <= set(card)
    assert card["validation"] == card["log"][-1] and card["seconds"] > 0
    assert card["log"] == sorted(card["log"], key=lambda entry: entry["step"])
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    assert all(tensor.dtype == torch.float16 and torch.isfinite(tensor).all() for tensor in floats)


def test_together_they_are_light():
    sizes = {name: shipped.locate(name).stat().st_size for name in NAMES}
    assert sizes["compact_dust3r"] <= 16e6 and sum(sizes.values()) <= 40e6
    assert 5e6 <= shipped.card("compact_dust3r")["parameters"] <= 10e6


def test_the_compact_teacher_is_a_dust3r_like_any_other():
    model = dust3r.load_checkpoint(shipped.locate("compact_dust3r").parent)
    with torch.inference_mode():
        said = model(*torch.rand(2, 1, 3, 96, 128))
    assert said["pts3d_1"].shape == (1, 96, 128, 3) and all(torch.isfinite(tensor).all() for tensor in said.values())
    assert (said["conf_1"] > 1).all() and said["pts3d_1"][..., 2].median() > 0


def test_the_compact_teacher_is_asked_like_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    world = box_world(3, (96, 128))
    ask = teachers.build(Study("kitchen", "smoke", "compact", "cpu"), world)
    answer = ask(np.array([[0, 1], [1, 0]]))
    assert ask.name == ask.settings()["teacher"] == "compact"
    assert answer.points_i.shape == (2, 96, 128, 3) and np.isfinite(answer.points_j).all()


@pytest.mark.parametrize("arm", ["mobilenet-frozen", "vit16-frozen", "vit32-unfrozen", "vit64-frozen",
                                 "anchornet-unfrozen"])  # fmt: skip
def test_arms_start_from_them(arm):
    student, origin = students.build(ARMS[arm], (96, 128), "shipped", vit_blocks=4)
    kept, own = shipped.tensors(students.backbone_name(ARMS[arm])), student.backbone.state_dict()
    assert origin.origin == "shipped" and students.backbone_name(ARMS[arm]) in origin.note
    assert set(own) == set(kept) and all(torch.equal(own[name], tensor) for name, tensor in kept.items())


def test_a_vit_fits_itself_to_images_of_another_size():
    student, _ = students.build(ARMS["vit16-frozen"], (120, 160), "shipped", vit_blocks=4)
    assert student.eval()(torch.rand(1, 3, 120, 160)).points.shape == (1, 3, 120, 160)


def test_a_vit_with_half_the_patch_size_sees_a_smooth_image_as_the_other_does_one_of_twice_the_size():
    torch.manual_seed(0)
    image = F.interpolate(torch.rand(1, 3, 6, 8), (48, 64), mode="bicubic")
    larger = F.interpolate(image, scale_factor=2, mode="bicubic")
    fine, coarse = (students.build(ARMS[arm], size, "shipped", vit_blocks=4)[0].backbone
                    for arm, size in (("anchorvit-long", (48, 64)), ("vit16-unfrozen", (96, 128))))  # fmt: skip
    assert fine.stride == 8 and coarse.stride == 16
    with torch.inference_mode():
        said, expected = fine(image), coarse(larger)
    assert (said - expected).norm() < 0.1 * expected.norm()


def test_a_vit_of_another_depth_says_that_its_weights_are_random():
    _, origin = students.build(ARMS["vit16-frozen"], (96, 128), "shipped", vit_blocks=12)
    assert origin.origin == "random" and origin.note.startswith("RANDOM WEIGHTS") and "12" in origin.note


def test_a_damaged_file_is_refused_and_the_way_out_is_named(copies):
    file = copies / "vit16" / shipped.FILE
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(shipped.ShippedError, match="vit16.*damaged.*git checkout"):
        students.build(ARMS["vit16-frozen"], (96, 128), "shipped", vit_blocks=4)


@pytest.mark.parametrize("lost", [shipped.FILE, shipped.CARD])
def test_a_missing_file_is_named(copies, lost):
    (copies / "compact_dust3r" / lost).unlink()
    with pytest.raises(shipped.ShippedError, match=f"{lost}: missing.*git checkout"):
        shipped.locate("compact_dust3r")


def test_weights_are_whole_or_not_vouched_for(tmp_path, monkeypatch):
    model = torch.nn.Linear(3, 2)
    shipped.write(tmp_path / "some", model, {"seconds": 1})
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path)
    torch.testing.assert_close(shipped.tensors("some")["weight"], model.weight.data, atol=1e-3, rtol=0)
    monkeypatch.setattr(shipped, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="could not be written"):
        shipped.write(tmp_path / "some", model, {"seconds": 2})
    assert not (tmp_path / "some" / shipped.CARD).exists()  # the old weights are there, but nothing vouches for them
