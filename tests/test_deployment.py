"""Students as files for ONNX Runtime: what they say, how large they are, and what becomes of bad ones."""

import re

import numpy as np
import onnx
import pytest
import torch

from kdutils import artefacts, deployment, students, training
from kdutils.settings import ARMS

SIZE = (48, 64)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3), dtype=np.uint8)
KINDS = ("cnn-scratch", "mobilenet-unfrozen", "vit16-frozen", "anchornet-long", "original-mobilenet")


def student_of(arm, uncertainty=False):
    """One whose every batch norm has statistics of its own."""
    torch.manual_seed(0)
    student, _ = students.build(ARMS[arm], SIZE, "random", 2, uncertainty)
    student.place(torch.rand(500, 3) * torch.tensor([5.0, 3.0, 4.0]))
    for layer in student.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            layer.weight.data.uniform_(0.5, 1.5)
    return student.eval()


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """A student, its file, and that of eight bits."""
    student, folder = student_of(request.param), tmp_path_factory.mktemp("files")
    deployment.export(student, folder / "student.onnx")
    deployment.quantise(folder / "student.onnx", folder / "small.onnx", IMAGES)
    return student, folder / "student.onnx", folder / "small.onnx"


def test_a_file_says_what_the_student_says(exported):
    student, path, _ = exported
    expected = training.predict(student, torch.from_numpy(IMAGES))
    points, log_scale = deployment.Runner(path)(IMAGES)
    assert np.abs(points - expected.points.permute(0, 2, 3, 1).numpy()).max() < 1e-3
    assert (log_scale is None) == (expected.log_scale is None)
    if log_scale is not None:
        assert np.abs(log_scale - expected.log_scale[:, 0].numpy()).max() < 1e-3


def test_eight_bits_are_less_than_half_the_size_and_say_about_the_same(exported):
    _, path, small = exported
    assert small.stat().st_size < 0.45 * path.stat().st_size
    whole, coarse = (deployment.Runner(file)(IMAGES)[0] for file in (path, small))
    spread = (whole - whole.mean((0, 1, 2))).std()
    assert np.sqrt(np.mean((whole - coarse) ** 2)) < 0.2 * spread


def test_the_first_convolution_and_the_head_stay_whole(exported):
    student, _, small = exported
    nodes = onnx.load(small).graph.node
    restored = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    working = [node for node in nodes if node.op_type in deployment.QUANTISED]
    whole = [node for node in working if not restored & set(node.input)]
    first = next(node for node in working if node.op_type == "Conv")
    head = [layer for layer in student.head.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    assert first in whole and len(head) < len(whole) < len(working) / 2


def test_a_head_that_learned_its_uncertainty_says_it(tmp_path):
    deployment.export(student_of("cnn-scratch", uncertainty=True), tmp_path / "student.onnx")
    assert deployment.Runner(tmp_path / "student.onnx")(IMAGES)[1].shape == IMAGES.shape[:3]


def test_a_file_lies_alone_and_no_half_of_one_is_left(exported):
    _, path, small = exported
    assert sorted(path.parent.iterdir()) == sorted([path, small])


def test_latency_is_of_one_image(exported):
    assert 0 < deployment.Runner(exported[1]).latency(IMAGES[0], repeats=2) < 10_000


@pytest.mark.parametrize("content", [None, b"", b"no graph"])
def test_a_missing_or_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "student.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(artefacts.ArtefactError, match=re.escape(str(path))):
        deployment.Runner(path)


def test_images_of_another_size_are_refused(exported):
    with pytest.raises(ValueError, match="64x40 pixels, where the file takes 64x48"):
        deployment.Runner(exported[1])(IMAGES[:, :40])
