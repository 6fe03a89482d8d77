"""The students: shapes, sizes, anchors, what is frozen, and where pretrained weights come from."""

import functools
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
import timm
import torch
from conftest import HIGH, LOW, ROOT, box_world
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kdutils import anchornet, losses, students, training
from kdutils.settings import ABLATION_ARMS, ARMS, LONG_ARMS, ORIGINAL_ARMS, OWN_ARMS, PAPER_ARMS

SIZE, SMALL = (96, 128), (32, 48)
SCRATCH = [name for name in ARMS if name.endswith("scratch")]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with weights as timm's hub has them, but drawn by a seed."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    for name in set(students.TIMM_MODELS.values()):
        save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")
    return folder


def build(arm, size=SIZE, weights="auto", **options):
    return students.build(ARMS[arm], size, weights, **options)


def points_of(student, images):
    return student(images).points


# Shapes and sizes


@pytest.mark.parametrize("arm", [*PAPER_ARMS, *OWN_ARMS, *LONG_ARMS, *ORIGINAL_ARMS])
def test_every_arm_maps_images_to_points(arm, weights):
    size = SMALL if arm == "original-cnn" else SIZE  # this one is slow
    student, _ = build(arm, size, weights)
    points, log_scale = student.eval()(torch.rand(2, 3, *size))
    assert points.shape == (2, 3, *size) and points.dtype == torch.float32
    assert torch.isfinite(points).all()
    assert (log_scale is None) == (not arm.startswith("anchor"))


@pytest.mark.parametrize("arm", [*SCRATCH, "original-mobilenet", "anchorvit-long"])
@pytest.mark.parametrize("size", [(90, 130), (64, 64), (50, 200)])
def test_sizes_that_the_stride_does_not_divide(arm, size, weights):
    student, _ = build(arm, size, weights)
    assert points_of(student.eval(), torch.rand(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("size", [SIZE, (384, 512)])
@pytest.mark.parametrize("arm", [*SCRATCH, "anchorvit-long"])
def test_students_are_small(arm, size):
    student, _ = build(arm, size)
    megabytes = 4 * sum(p.numel() for p in student.parameters()) / 1e6
    assert 3 < megabytes < 45


def test_ablations_are_frozen_students_some_of_them_with_random_weights():
    random = {name: arm for name, arm in ABLATION_ARMS.items() if arm.weights == "random"}
    rest = [arm for name, arm in ABLATION_ARMS.items() if name not in random]
    assert {(arm.backbone, arm.start, arm.patch) for arm in rest} == {("mobilenet", "frozen", None)}
    assert {name.removesuffix("-random") for name in random} == {name for name in ARMS if name.endswith("frozen")
                                                                 and not name.endswith("unfrozen")}  # fmt: skip
    assert all(students.find_weights(arm, arm.weights).origin == "random" for arm in random.values())


@pytest.mark.parametrize("arm", ["cnn-scratch", "vit32-scratch", "mobilenet-scratch"])
def test_a_pixel_shuffle_head_says_its_uncertainty_when_asked(arm):
    student, _ = build(arm, (50, 70), uncertainty=True)
    points, log_scale = student.eval()(torch.rand(2, 3, 50, 70))
    assert points.shape == (2, 3, 50, 70) and log_scale.shape == (2, 1, 50, 70)
    assert torch.isfinite(log_scale).all() and log_scale.std() > 0
    assert not torch.equal(log_scale, points[:, 2:])


@pytest.mark.parametrize("arm", ["cnn-scratch", "anchornet-scratch"])
def test_nothing_is_known_better_than_the_least_uncertainty(arm):
    student, _ = build(arm, SMALL, uncertainty=True)
    last = student.head.offset if arm.startswith("anchornet") else student.head.refine
    torch.nn.init.constant_(last.bias, -100.0)
    log_scale = student.eval()(torch.rand(1, 3, *SMALL)).log_scale
    assert torch.equal(log_scale, torch.full_like(log_scale, students.LEAST_LOG_SCALE))


@pytest.mark.parametrize("arm", ["cnn-scratch", "vit16-scratch", "anchornet-scratch", "anchorvit-long"])
def test_half_precision_inside_gives_single_precision_points(arm):
    student = build(arm, SMALL, uncertainty=True)[0].place(torch.randn(500, 3) + 40).eval()
    images = torch.rand(1, 3, *SMALL)
    exact = student(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = student(images)
    assert all(tensor.dtype == torch.float32 for tensor in rough)
    assert not torch.equal(rough.points, exact.points)
    assert (rough.points - exact.points).abs().max() < 0.05  # metres; bfloat16 of 40 m would be off by 0.12


@pytest.mark.parametrize("arm", ["cnn-scratch", "vit16-scratch", "anchornet-scratch", "anchorvit-long", "original-cnn"])
def test_points_are_not_rounded_where_the_network_works_in_bfloat16(arm):
    size = (8, 16) if arm == "original-cnn" else SMALL  # it keeps full resolution, and not every CPU has bfloat16
    student = build(arm, size)[0].eval()
    for parameter in student.head.parameters():
        parameter.data.fill_(1.2345 if parameter.ndim == 1 else 0)  # a point's coordinates are the last layer's bias
    if arm.startswith("anchor"):
        student.head.anchors.fill_(1.2345)
    with torch.inference_mode():
        exact = student(images := torch.rand(1, 3, *size)).points
        with torch.autocast("cpu", torch.bfloat16):
            half = student(images).points
    assert (exact - exact.mean()).abs().max() < 1e-4 and abs(exact.mean()) > 1
    torch.testing.assert_close(half, exact, atol=1e-4, rtol=0)  # bfloat16 has steps of 8e-3 there


def with_statistics(student):
    """Batch norms as after a training: ones that change nothing would hide a mistake."""
    generator = torch.Generator().manual_seed(3)
    norms = [module for module in student.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.3, generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.normal_(0, 0.3, generator=generator)
    return len(norms)


DEPLOYED = ["cnn-scratch", "mobilenet-scratch", "vit16-scratch", "anchornet-scratch", "original-mobilenet"]


@pytest.mark.parametrize("arm", DEPLOYED)
def test_a_deployed_student_has_no_batch_norm_and_the_same_answers(arm, weights):
    torch.manual_seed(0)
    student = build(arm, SMALL, weights, uncertainty=arm not in ORIGINAL_ARMS)[0].place(torch.randn(500, 3)).eval()
    assert with_statistics(student) > 0
    deployed, images = students.deployed(student), torch.rand(2, 3, *SMALL)
    assert with_statistics(deployed) == 0
    with torch.inference_mode():
        said, expected = deployed(images), student(images)
    for one, other in zip(said, expected):
        assert one is other is None or (one - other).abs().max() < 1e-4 * other.abs().max()


@pytest.mark.parametrize("arm", DEPLOYED)
def test_bfloat16_weights_answer_as_autocast_does(arm, weights):
    torch.manual_seed(0)
    student = build(arm, SMALL, weights)[0].place(torch.randn(500, 3)).eval()
    images = torch.rand(2, 3, *SMALL)
    with torch.inference_mode():
        exact = student(images).points
        with torch.autocast("cpu", torch.bfloat16):
            expected = student(images).points
            said = students.deployed(student, torch.bfloat16)(images).points
    assert said.dtype == torch.float32
    assert (said - exact).norm() < 2 * (expected - exact).norm()


def test_to_deploy_a_student_leaves_it_as_it_is():
    student = build("anchornet-scratch", SMALL)[0].train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    students.deployed(student, torch.bfloat16)
    after = student.state_dict()
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_vision_transformer_can_be_short(weights):
    student, _ = build("vit16-unfrozen", SMALL, weights, vit_blocks=4)
    given, own = load_file(weights / f"{students.TIMM_MODELS['vit']}.safetensors"), student.backbone.body.state_dict()
    assert len(student.backbone.body.blocks) == 4
    assert torch.equal(own["blocks.3.attn.qkv.weight"], given["blocks.3.attn.qkv.weight"])
    assert points_of(student.eval(), torch.rand(1, 3, *SMALL)).shape == (1, 3, *SMALL)


def test_a_vision_transformer_sees_images_of_other_sizes_as_one_made_for_them_would(weights):
    made, other = (build("anchorvit-long", size, weights)[0] for size in (SIZE, SMALL))
    positions = students.resample_abs_pos_embed(other.backbone.body.pos_embed, [12, 16], [4, 6])
    other.load_state_dict({**made.state_dict(), "backbone.body.pos_embed": other.backbone.body.pos_embed})
    made.backbone.body.pos_embed = torch.nn.Parameter(positions)
    image = torch.rand(1, 3, *SIZE)
    with torch.inference_mode():
        torch.testing.assert_close(other.eval()(image).points, made.eval()(image).points, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size, patch", [(SIZE, 8), ((192, 256), 8), ((384, 512), 16)])
def test_patches_of_an_anchorvit_are_larger_where_images_are_reduced_for_an_anchornet(size, patch):
    assert build("anchorvit-long", size, "random")[0].backbone.stride == patch


def test_padding_repeats_the_border_and_is_cut_off():
    image = torch.rand(1, 3, 60, 75)
    padded = torch.nn.functional.pad(image, (0, 5, 0, 4), mode="replicate")
    for arm in ("cnn-scratch", "anchornet-scratch"):
        student = build(arm, (60, 75))[0].eval()
        assert all(torch.equal(said, more[..., :60, :75]) for said, more in zip(student(image), student(padded))
                   if said is not None)  # fmt: skip


def test_one_image_does_not_depend_on_its_batch():
    student, _ = build("mobilenet-scratch")
    images = torch.rand(3, 3, *SIZE)
    student.eval()
    torch.testing.assert_close(points_of(student, images)[1:2], points_of(student, images[1:2]), atol=1e-5, rtol=1e-4)


def test_grid_of_a_vision_transformer_is_row_major():
    backbone = students.VisionTransformer((64, 96), 32)
    backbone.body.blocks = torch.nn.Identity()
    backbone.body.norm = torch.nn.Identity()
    backbone.body.pos_embed = torch.nn.Parameter(torch.zeros_like(backbone.body.pos_embed))
    image = torch.zeros(1, 3, 64, 96)
    image[..., :32, 64:] = 1  # the patch in row 0, column 2
    features = backbone(image)[0].sum(0)
    assert features.shape == (2, 3)
    odd = features != features[1, 0]
    assert odd.nonzero().tolist() == [[0, 2]]


# Metres


@pytest.mark.parametrize("arm", ["cnn-scratch", "vit32-scratch"])
def test_a_silent_head_says_the_centre(arm):
    student, _ = build(arm)
    for layer in (student.head.points, student.head.refine):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    points = torch.randn(1000, 3) * 2 + torch.tensor([5.0, -1, 30])
    said = points_of(student.place(points).eval(), torch.rand(1, 3, *SIZE))
    torch.testing.assert_close(said, points.mean(0)[:, None, None].expand(1, 3, *SIZE))


def test_extent_is_the_deviation_and_scales_the_offsets():
    student, _ = build("cnn-scratch")
    student.eval()
    image = torch.rand(1, 3, *SIZE)
    offsets = points_of(student, image).detach()
    points = torch.tensor([[1.0, 2, 3], [1, 2, -3], [1, 2, 3], [1, 2, -3]])
    student.place(points)
    assert student.centre.tolist() == [1, 2, 0]
    assert float(student.extent) == pytest.approx(3**0.5)  # 3 m on one coordinate of three
    expected = torch.tensor([1.0, 2, 0])[:, None, None] + 3**0.5 * offsets
    torch.testing.assert_close(points_of(student, image), expected)


# Anchors


@pytest.fixture(scope="module")
def room():
    """Labelled points of a box room."""
    return torch.tensor(box_world(4, (24, 32), step=0.4).points, dtype=torch.float32).view(-1, 3)


def anchors_of(student):
    """The anchors in metres."""
    return student.centre + student.extent * student.head.anchors


def test_anchors_lie_where_the_scene_is(room):
    student = build("anchornet-scratch", SMALL)[0].place(room)
    anchors = anchors_of(student)
    low, high = room.amin(0), room.amax(0)
    assert anchors.shape == (anchornet.ANCHORS, 3) == (64, 3)
    assert (anchors >= low - 1e-4).all() and (anchors <= high + 1e-4).all()
    assert (low.numpy() > LOW - 1e-3).all() and (high.numpy() < HIGH + 1e-3).all()
    assert len(anchors.unique(dim=0)) == 64
    nearest = torch.cdist(room, anchors).amin(1)
    assert nearest.mean() < 0.3 and nearest.max() < 1.5  # metres; the room is 4.5 by 2.5 by 6


def test_anchors_are_the_same_whatever_was_drawn_before(room):
    first, again = (build("anchornet-scratch", SMALL)[0].place(room).head.anchors for _ in range(2))
    assert torch.equal(first, again)


def test_a_belief_in_one_anchor_says_that_anchor(room):
    student = build("anchornet-scratch", SMALL)[0].place(room).eval()
    for layer in (student.head.belief, student.head.offset):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for number in (0, 41):
        torch.nn.init.zeros_(student.head.belief.bias)
        student.head.belief.bias.data[number] = 100
        points, log_scale = student(torch.rand(1, 3, *SMALL))
        expected = anchors_of(student)[number][:, None, None].expand(1, 3, *SMALL)
        torch.testing.assert_close(points, expected, atol=1e-4, rtol=0)
        assert log_scale.abs().max() < 1e-5


def test_anchors_are_kept_with_the_weights(room, tmp_path):
    torch.manual_seed(1)
    student = build("anchornet-scratch", SMALL)[0].place(room).eval()
    training.save_student(student, tmp_path / "student.safetensors")
    again = build("anchornet-scratch", SMALL)[0].eval()
    again.load_state_dict(load_file(tmp_path / "student.safetensors"))
    assert torch.equal(again.head.anchors, student.head.anchors) and student.head.anchors.any()
    image = torch.rand(1, 3, *SMALL)
    assert all(torch.equal(a, b) for a, b in zip(student(image), again(image)))


def test_own_student_takes_at_most_5_megabytes_in_half_precision():
    student, _ = build("anchornet-scratch")
    assert sum(tensor.numel() * 2 for tensor in student.state_dict().values()) < 5e6


def test_residual_blocks_change_nothing_at_first():
    features = torch.rand(1, 8, 5, 6)
    assert torch.equal(anchornet.Residual(8).eval()(features), features)


# Convex upsampling


def upsampled(cells, stride, seed=0, spread=3.0):
    count, _, height, width = cells.shape
    generator = torch.Generator().manual_seed(seed)
    mixture = spread * torch.randn(count, 9 * stride**2, height, width, generator=generator)
    return anchornet.convex_upsampling(cells, mixture, stride)


@given(st.integers(1, 4), st.integers(0, 50), st.floats(-5, 5))
def test_upsampling_keeps_a_constant(stride, seed, value):
    cells = torch.full((2, 3, 4, 5), value)
    expected = torch.full((2, 3, 4 * stride, 5 * stride), value)
    torch.testing.assert_close(upsampled(cells, stride, seed), expected)


@given(st.integers(1, 4), st.integers(0, 50), st.floats(0.1, 30))
def test_each_upsampled_pixel_lies_among_its_nine_cells(stride, seed, spread):
    cells = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    fine = upsampled(cells, stride, seed, spread)
    padded = torch.nn.functional.pad(cells, (1, 1, 1, 1), mode="replicate")
    high, low = (sign * torch.nn.functional.max_pool2d(sign * padded, 3, 1) for sign in (1, -1))
    high, low = (bound.repeat_interleave(stride, 2).repeat_interleave(stride, 3) for bound in (high, low))
    assert fine.shape == (2, 3, 4 * stride, 5 * stride)
    assert (fine <= high + 1e-5).all() and (fine >= low - 1e-5).all()
    assert fine.std() > 0.1


def test_upsampling_does_not_depend_on_the_memory_layout():
    cells, mixture = torch.randn(2, 4, 5, 6), torch.randn(2, 9 * 16, 5, 6)
    last = (maps.contiguous(memory_format=torch.channels_last) for maps in (cells, mixture))
    assert torch.equal(anchornet.convex_upsampling(*last, 4), anchornet.convex_upsampling(cells, mixture, 4))


def test_each_pixel_of_a_cell_chooses_a_neighbour_of_its_own():
    cells = torch.arange(20.0).view(1, 1, 4, 5)
    mixture = torch.zeros(1, 9, 4, 4, 5)
    for pixel, neighbour in enumerate((4, 1, 3, 8)):  # itself, above, left of it, below on the right
        mixture[:, neighbour, pixel] = 100
    fine = anchornet.convex_upsampling(cells, mixture.flatten(1, 2), 2)[0, 0]
    assert fine[2:4, 4:6].round(decimals=4).tolist() == [[7, 2], [6, 13]]  # of the cell in row 1, column 2
    assert fine[0:2, 0:2].round(decimals=4).tolist() == [[0, 0], [0, 6]]  # beyond the border are the cells on it


def test_borders_are_repeated_alike_in_compiled_code(monkeypatch):
    maps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    plain = anchornet.bordered(maps)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(anchornet.bordered(maps), plain) and torch.equal(plain[..., 1:-1, 1:-1], maps)


# The original study's


def convolutions(module):
    return [(layer.in_channels, layer.out_channels, *layer.kernel_size) for layer in module.modules()
            if isinstance(layer, torch.nn.Conv2d)]  # fmt: skip


def test_original_cnn_is_as_wide_as_described():
    student, origin = build("original-cnn", SMALL)
    wide = [(3, 64, 5, 5), (64, 128, 5, 5), (128, 256, 5, 5), (256, 512, 5, 5)]
    assert convolutions(student) == [*wide, (512, 512, 1, 1), (512, 512, 5, 5), (512, 512, 1, 1), (512, 3, 1, 1)]
    assert {layer.stride for layer in student.modules() if isinstance(layer, torch.nn.Conv2d)} == {(1, 1)}
    assert origin.origin == "random"


def test_original_mobilenet_ends_as_described(weights):
    student, _ = build("original-mobilenet", SMALL, weights)
    assert convolutions(student.head) == [(112, 256, 1, 1), (256, 256, 1, 1), (1, 3, 7, 7), (3, 3, 1, 1)]
    norms = [layer for layer in student.head.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    shuffles = [layer for layer in student.head.modules() if isinstance(layer, torch.nn.PixelShuffle)]
    assert len(norms) == 2 and [layer.upscale_factor for layer in shuffles] == [16]


def test_original_students_never_say_their_uncertainty(weights):
    for arm in ORIGINAL_ARMS:
        student, _ = build(arm, (16, 16), weights, uncertainty=True)
        assert student.eval()(torch.rand(1, 3, 16, 16)).log_scale is None


def test_original_cnn_learns():
    torch.manual_seed(0)
    student, _ = build("original-cnn", SMALL)
    world = box_world(1, SMALL)
    image = torch.tensor(world.image).permute(0, 3, 1, 2) / 255
    points = torch.tensor(world.points, dtype=torch.float32)
    student.place(points.view(-1, 3)).train()
    optimiser, costs = torch.optim.AdamW(student.parameters(), lr=1e-4), []
    for _ in range(2):
        cost = losses.masked_mse(points_of(student, image), points.permute(0, 3, 1, 2), torch.ones(1, 1, *SMALL) > 0)
        optimiser.zero_grad()
        cost.backward()
        optimiser.step()
        costs.append(float(cost.detach()))
    assert all(p.grad.any() for p in student.parameters())
    assert costs[1] < costs[0]


# Freezing


@pytest.mark.parametrize("arm", ["mobilenet-frozen", "vit32-frozen"])
def test_frozen_backbone_stays_while_the_head_learns(arm, weights):
    student, _ = build(arm, weights=weights)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.1)
    student.train()
    points_of(student, torch.rand(2, 3, *SIZE)).square().mean().backward()
    optimiser.step()
    assert all(p.grad is None for p in student.backbone.parameters())
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    head = {f"head.{name}" for name in student.head.state_dict()}
    assert moved == head and "head.mix.1.running_mean" in moved


@pytest.mark.parametrize("arm", ["mobilenet-unfrozen", "vit32-unfrozen", "cnn-scratch", "anchornet-scratch"])
def test_unfrozen_backbone_learns(arm, weights):
    student, _ = build(arm, weights=weights)
    student.train()
    points_of(student, torch.rand(2, 3, *SIZE)).square().mean().backward()
    assert all(p.requires_grad for p in student.parameters())
    silent = [name for name, p in student.backbone.named_parameters() if p.grad is None]
    assert silent == []


# Weights


@pytest.mark.parametrize("arm", ["mobilenet-unfrozen", "original-mobilenet"])
def test_given_weights_are_in_the_mobilenet(weights, arm):
    student, origin = build(arm, weights=weights)
    given = load_file(weights / f"{students.TIMM_MODELS['mobilenet']}.safetensors")
    own = student.backbone.body.state_dict()
    assert origin.origin == "file" and students.TIMM_MODELS["mobilenet"] in origin.note
    assert len(own) > 50 and all(torch.equal(tensor, given[name]) for name, tensor in own.items())


@pytest.mark.parametrize("patch", [16, 32, 64])
def test_given_weights_are_in_the_vision_transformer(weights, patch):
    file = weights / f"{students.TIMM_MODELS['vit']}.safetensors"
    student, origin = build(f"vit{patch}-unfrozen", weights=file)
    given, own = load_file(file), student.backbone.body.state_dict()
    resampled = {"pos_embed", "patch_embed.proj.weight"}
    assert origin.origin == "file"
    assert all(torch.equal(tensor, given[name]) for name, tensor in own.items() if name not in resampled)
    embedding = own["patch_embed.proj.weight"]
    assert embedding.shape == (192, 3, patch, patch)
    again = build(f"vit{patch}-unfrozen", weights=file)[0].backbone.body.state_dict()
    assert all(torch.equal(again[name], own[name]) for name in resampled)  # drawn anew it would differ
    if patch == 16:
        assert torch.equal(embedding, given["patch_embed.proj.weight"])


@pytest.mark.parametrize("patch", [32, 64])
def test_resampled_patch_embedding_answers_to_a_larger_picture_alike(weights, patch):
    file = weights / f"{students.TIMM_MODELS['vit']}.safetensors"
    embedding = build(f"vit{patch}-unfrozen", weights=file)[0].backbone.body.patch_embed.proj.weight
    small = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(small, (patch, patch), mode="bicubic", antialias=True)
    given = load_file(file)["patch_embed.proj.weight"]
    answers = (small.flatten(1) @ given.flatten(1).T, large.flatten(1) @ embedding.flatten(1).T)
    assert torch.corrcoef(torch.stack([a.detach().flatten() for a in answers]))[0, 1] > 0.99


def test_scratch_takes_no_weights(weights):
    student, origin = build("mobilenet-scratch", weights=weights)
    given = load_file(weights / f"{students.TIMM_MODELS['mobilenet']}.safetensors")
    assert origin.origin == "random" and "RANDOM" not in origin.note
    assert not torch.equal(student.backbone.body.conv_stem.weight, given["conv_stem.weight"])


@pytest.mark.parametrize("missing", ["no-such-folder", "no-such.safetensors", "", "weights.bin"])
def test_missing_weights_are_an_error_that_names_the_file(tmp_path, missing):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="no such weights. Give .*safetensors"):
        build("mobilenet-frozen", weights=tmp_path / missing)


@pytest.mark.parametrize("arm", ["mobilenet-frozen", "vit16-frozen"])
@pytest.mark.parametrize("kind", ["other names", "other shapes", "garbage", "empty"])
def test_weights_of_another_network_or_damaged_are_an_error_that_names_the_file(tmp_path, weights, arm, kind):
    file = tmp_path / "given.safetensors"
    file.write_bytes(b"" if kind == "empty" else b"garbage" * 9)
    says = "unreadable"
    if kind.startswith("other"):
        given = load_file(weights / f"{students.TIMM_MODELS[ARMS[arm].backbone]}.safetensors")
        renamed = {f"model.{name}": tensor for name, tensor in given.items()}
        narrower = {name: tensor[:3] if tensor.ndim else tensor for name, tensor in given.items()}
        save_file(renamed if kind == "other names" else narrower, file)
        says = "not the weights of .*" + ("are missing" if kind == "other names" else "size mismatch")
    with pytest.raises(ValueError, match=rf"given.safetensors: {says}.*timm's \S+.safetensors"):
        build(arm, weights=file)


# The hub


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_unreachable_hub_is_said_in_capitals_and_soon(monkeypatch, kind):
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if kind == "silent":  # takes the call and never answers
            port.listen()
        monkeypatch.setattr(students, "HF_ENDPOINT", f"http://127.0.0.1:{port.getsockname()[1]}")
        monkeypatch.setattr(students, "HUB_SECONDS", 0.5)
        started = time.perf_counter()
        found = students._from_hub(f"never_kept_{kind}")
    assert found.origin == "random" and found.note.startswith("RANDOM WEIGHTS") and found.path is None
    assert time.perf_counter() - started < 5


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as the download of one file takes; it has no other file."""

    def __init__(self, *args, name, file):
        self.name, self.file = name, file
        super().__init__(*args)

    def do_HEAD(self):
        found = self.path == f"/timm/{self.name}/resolve/main/model.safetensors"
        self.send_response(200 if found or self.path == "/" else 404)
        if found:
            self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
            self.send_header("X-Repo-Commit", "89abcdef0123456789abcdef0123456789abcdef")
        self.send_header("Content-Length", str(self.file.stat().st_size if found else 0))
        self.end_headers()
        return found

    def do_GET(self):
        if self.do_HEAD():
            with self.file.open("rb") as file:
                shutil.copyfileobj(file, self.wfile)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(weights):
    name = students.TIMM_MODELS["mobilenet"]
    handler = functools.partial(Hub, name=name, file=weights / f"{name}.safetensors")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# In a process of its own: the hub's client reads its address and its cache's folder from the environment at import.
ASK = """
from kdutils import students
from kdutils.settings import ARMS
student, origin = students.build(ARMS["mobilenet-frozen"], (96, 128))
print(origin.origin, origin.note, float(student.backbone.body.conv_stem.weight.abs().sum()), sep="|")
missing = students.find_weights(ARMS["vit16-frozen"], "timm")
instead = students.find_weights(ARMS["vit16-frozen"], vit_blocks=4)
print(missing.origin, missing.note, sep="|")
print(instead.origin, instead.note, sep="|")
"""


def test_reached_hub_gives_its_weights_and_says_what_it_lacks(hub, weights, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    reached, missing, instead = (line.split("|") for line in done.stdout.splitlines())
    name = students.TIMM_MODELS["mobilenet"]
    given = load_file(weights / f"{name}.safetensors")["conv_stem.weight"]
    assert reached[:2] == ["hub", f"pretrained, timm/{name}"]
    assert float(reached[2]) == pytest.approx(float(given.abs().sum()), rel=1e-6)
    assert missing[0] == "random" and missing[1].startswith("RANDOM WEIGHTS")
    assert instead[0] == "shipped" and "vit16" in instead[1]
