"""Which optimiser moves which weights, and what a step of Muon is."""

import pytest
import torch
from timm.optim import Muon
from timm.optim import muon as timm_muon
from torch import nn

from kdutils import optimisers, students
from kdutils.settings import ARMS, Recipe, recipe_of

SIZE = (32, 48)


def student_of(arm):
    torch.manual_seed(0)
    return students.build(ARMS[arm], SIZE, "random", 1)[0]


def taught(found, kind):
    return {id(weights) for one in found if isinstance(one, kind) for group in one.param_groups
            for weights in group["params"]}  # fmt: skip


def names_of(student, found, kind):
    ids = taught(found, kind)
    return {name for name, weights in student.named_parameters() if id(weights) in ids}


@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
def test_every_weight_that_learns_has_one_optimiser(arm):
    student = student_of(arm.name)
    found = optimisers.choose(student, recipe_of(arm))
    both = [id(weights) for one in found for group in one.param_groups for weights in group["params"]]
    assert sorted(both) == sorted(id(weights) for weights in student.parameters() if weights.requires_grad)
    assert all(group["lr"] == recipe_of(arm).learning_rate for one in found for group in one.param_groups)


def test_matrices_are_muons_and_all_else_is_adamws():
    student = student_of("vit16-scratch")
    names = names_of(student, optimisers.choose(student, recipe_of(ARMS["vit16-scratch"])), Muon)
    assert {"backbone.body.patch_embed.proj.weight", "backbone.body.blocks.0.attn.qkv.weight", "head.mix.0.weight",
            "head.points.weight"} <= names  # fmt: skip
    assert not {"backbone.body.pos_embed", "backbone.body.cls_token"} & names
    assert not any(name.endswith("bias") or "norm" in name for name in names)


def test_depthwise_filters_are_no_matrices():
    student = student_of("mobilenet-scratch")
    names = names_of(student, optimisers.choose(student, recipe_of(ARMS["mobilenet-scratch"])), Muon)
    modules = dict(student.named_modules())
    groups = {modules[name.removesuffix(".weight")].groups for name in names if "conv" in name}
    assert groups == {1}


def test_a_recipe_keeps_parts_for_adamw():
    student, arm = student_of("anchornet-scratch"), ARMS["anchornet-scratch"]
    names = names_of(student, optimisers.choose(student, recipe_of(arm)), Muon)
    assert names and all(name.startswith("backbone") for name in names)


@pytest.mark.parametrize("arm", ["original-mobilenet", "original-cnn"])
def test_the_original_networks_keep_adams_ways(arm):
    student = student_of(arm)
    (only,) = optimisers.choose(student, recipe_of(ARMS[arm]))
    assert isinstance(only, torch.optim.AdamW) and only.defaults["weight_decay"] == 0


@pytest.mark.parametrize("capabilities", [{"amx_bf16": True}, {"avx512_bf16": True}, {}])
def test_a_step_of_muon_is_nearly_orthogonal_and_as_long_as_adamws(capabilities, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    layer = nn.Conv2d(24, 16, 3, bias=False)
    before = layer.weight.detach().clone()
    (muon,) = optimisers.choose(layer, Recipe(1e-3, weight_decay=0.0))
    gradient = torch.outer(torch.randn(16), torch.randn(24 * 9)) + 0.1 * torch.randn(16, 24 * 9)
    layer.weight.grad = gradient.view_as(before)
    muon.step()
    moved = (before - layer.weight.detach()).flatten(1)
    assert torch.linalg.cond(moved) < 2 < 20 < torch.linalg.cond(gradient)
    assert moved.square().mean().sqrt() == pytest.approx(0.2e-3, rel=0.3)  # the length that arXiv 2502.16982 aims at
    assert (moved * gradient).sum() > 0


@pytest.mark.parametrize("capabilities, expected", [
    ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16), ({"avx512_bf16": True}, torch.float32),
    ({"architecture": "arm64", "bf16": True}, torch.float32)])  # fmt: skip
def test_muon_orthogonalises_in_half_precision_only_where_that_is_fast(capabilities, expected, monkeypatch):
    asked = []

    def spy(gradient, steps, coefficients, eps, safety_factor, dtype, scale_eps):
        asked.append(dtype)
        return newton_schulz(gradient, steps, coefficients, eps, safety_factor, dtype, scale_eps)

    newton_schulz = optimisers._NEWTON_SCHULZ
    monkeypatch.setattr(optimisers, "_NEWTON_SCHULZ", spy)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    layer = nn.Linear(32, 32, bias=False)
    (one,) = optimisers.choose(layer, Recipe(1e-3))
    layer.weight.grad = torch.randn(32, 32)
    one.step()
    assert asked == [expected]


@pytest.mark.parametrize("shape", [(16, 300), (300, 16), (16, 32), (16, 16), (4, 4000)])
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("name, steps", [("original", 5), ("quintic", 3), ("polar_express", 5), ("original", 9)])
def test_the_gram_matrix_gives_timms_answer_with_far_less_rounding_than_bfloat16(shape, rank, name, steps, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    torch.manual_seed(0)
    matrix = torch.randn(shape[0], rank) @ torch.logspace(0, -3, rank).diag() @ torch.randn(rank, shape[1])
    coefficients = timm_muon._COEFFICIENTS[name]
    ours = optimisers._orthogonalised(matrix, steps, coefficients, 1e-7, 1.01, False)
    exact, half = (optimisers._NEWTON_SCHULZ(matrix.double(), steps, coefficients, 1e-7, 1.01, dtype)
                   for dtype in (torch.float64, torch.bfloat16))  # fmt: skip
    assert (ours - exact).abs().max() < 0.1 * (half - exact).abs().max()


def test_a_gradient_of_nothing_moves_nothing(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    layer = nn.Linear(64, 8, bias=False)
    before = layer.weight.detach().clone()
    (one,) = optimisers.choose(layer, Recipe(1e-3, weight_decay=0.0))
    layer.weight.grad = torch.zeros(8, 64)
    one.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("arm", ["cnn-scratch", "mobilenet-unfrozen", "vit16-frozen", "anchornet-scratch"])
def test_timm_orthogonalises_all_but_the_three_rows_of_the_last_layer(arm):
    student = student_of(arm)
    for weights in student.parameters():
        weights.grad = torch.randn_like(weights)
    found = optimisers.choose(student, recipe_of(ARMS[arm]))
    for one in found:
        one.step()
    states = {id(weights): state for one in found if isinstance(one, Muon) for weights, state in one.state.items()}
    passed = [
        name
        for name, weights in student.named_parameters()
        if not states.get(id(weights), {"use_muon": True})["use_muon"]
    ]
    assert passed == ([] if arm.startswith("anchornet") else ["head.refine.weight"])
