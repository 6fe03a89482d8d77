"""Pretraining on rendered rooms: what is drawn, what is asked, and that a killed run ends as an undisturbed one."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, rotation
from hypothesis import given
from hypothesis import strategies as st

from kdutils import artefacts, backbones, compact, dust3r, endless, pretraining, rooms, shipped
from kdutils.settings import BACKBONE_PLANS, COMPACT_PLANS
from kdutils.training import TrainingError

SIZE = (32, 48)
TINY = {"head_type": "linear", "enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2,
        "dec_embed_dim": 32, "dec_depth": 2, "dec_num_heads": 2}  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rooms_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rooms")


@pytest.fixture(scope="module")
def some_rooms(rooms_folder):
    return [endless.room_views(number, SIZE, folder=rooms_folder) for number in range(2)]


def drawn_pairs(some_rooms, count=6, seed=0):
    return compact.Pairs.draw(some_rooms, count, torch.Generator().manual_seed(seed))


# Rooms


def test_rooms_are_none_that_the_study_is_measured_on():
    training = {endless.kind_and_seed(number) for number in range(5000)}
    held_out = {endless.kind_and_seed(number, held_out=True) for number in range(5000)}
    sample = {(kind, seed) for kind in rooms.KINDS for seed in range(100_000)}
    assert len(training) == len(held_out) == 5000
    assert not training & held_out and not (training | held_out) & sample
    assert {kind for kind, _ in training} == set(rooms.KINDS)


def test_a_room_shows_what_the_renderer_shows(some_rooms):
    views, room = some_rooms[1], rooms.build_room(*endless.kind_and_seed(1))
    depth = rooms.render(room, views.poses[:4], views.intrinsics, SIZE)[1]
    larger = tuple(4 * side for side in SIZE)
    fine, _ = rooms.render(room, views.poses[:4], rooms.intrinsics_for(larger, "color"), larger)
    expected = fine.float().unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).mean((2, 4))
    assert views.images.shape == (endless.VIEWS, *SIZE, 3) and views.images.dtype == torch.uint8
    torch.testing.assert_close(views.depth[:4].float(), depth, atol=0, rtol=1e-3)
    off = [(views.images[:4].float() - expected.roll(shift, (1, 2))).abs().mean() for shift in ((0, 0), (0, 1), (1, 0))]
    assert off[0] < 0.5 * min(off[1:]) and off[0] < 10  # of 255


def test_edges_overlap_and_join_different_views(some_rooms):
    edges = some_rooms[0].edges
    assert len(edges) > 50 and (edges[:, 0] < edges[:, 1]).all() and edges.max() < endless.VIEWS


def test_a_kept_room_is_the_rendered_one_and_is_not_rendered_again(rooms_folder, some_rooms, monkeypatch):
    monkeypatch.setattr(endless, "render_room", lambda *_: pytest.fail("rendered again"))
    again = endless.room_views(0, SIZE, folder=rooms_folder)
    assert all(torch.equal(a, b) for a, b in zip(vars(again).values(), vars(some_rooms[0]).values()))


def test_pool_holds_the_rooms_of_its_turn_wherever_it_began(rooms_folder):
    began = endless.RoomPool(2, SIZE, folder=rooms_folder)
    began.advance(0)
    began.advance(2)
    resumed = endless.RoomPool(2, SIZE, folder=rooms_folder, turn=2)
    resumed.advance(2)
    assert [torch.equal(a.images, b.images) for a, b in zip(began.rooms, resumed.rooms)] == [True, True]
    assert not torch.equal(began.rooms[0].images, began.rooms[1].images)


# Pairs and what is asked of them


def test_truth_of_both_directions_is_one_room(some_rooms):
    pairs = drawn_pairs(some_rooms)
    count = len(pairs.images[0])
    for view in (0, 1):  # to the world through view 1's pose: (i, j) and (j, i) see the same places
        world = compact.moved(pairs.poses[0], pairs.truth[view])
        other = compact.moved(pairs.poses[0], pairs.truth[1 - view]).roll(count, 0)
        torch.testing.assert_close(world, other, atol=1e-4, rtol=0)


def test_truth_lies_on_the_pixels_own_rays(some_rooms):
    pairs = drawn_pairs(some_rooms)
    x, y, z = pairs.truth[0].unbind(-1)
    focal, centre = pairs.intrinsics[:, 0, 0, None, None], pairs.intrinsics[:, 0, 2, None, None]
    column = torch.arange(SIZE[1]) + 0.5
    torch.testing.assert_close(focal * x / z + centre, column.expand_as(x), atol=1e-3, rtol=0)
    assert (z > 0).all()


def test_matches_are_patches_of_one_place(some_rooms):
    pairs = drawn_pairs(some_rooms, 12)
    columns, half = SIZE[1] // dust3r.PATCH, dust3r.PATCH // 2
    for view in (0, 1):
        found = pairs.matches(view)
        there = found >= 0
        assert 0.1 < there.float().mean() < 0.95
        places = pairs.truth[view][:, half::16, half::16].flatten(1, 2)
        for pair, token in there.nonzero().tolist():
            row, column = divmod(int(found[pair, token]), columns)
            patch = pairs.truth[1 - view][pair, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            distance = (patch - places[pair, token]).norm(dim=-1).min()
            assert distance < 0.15 * places[pair, token].norm() + 0.1


def test_a_view_matches_itself(some_rooms):
    pairs = compact.Pairs(some_rooms[:1], torch.tensor([[3, 3]]))
    tokens = torch.arange(SIZE[0] * SIZE[1] // 256)
    assert torch.equal(pairs.matches(0), tokens.expand(2, -1)) and torch.equal(pairs.matches(1), pairs.matches(0))


@given(st.integers(0, 2**31), st.floats(0.2, 5), st.floats(0.2, 5))
def test_objective_does_not_depend_on_either_sides_scale(seed, scale, true_scale):
    generator = torch.Generator().manual_seed(seed)
    points, truth = torch.randn(2, 2, 3, 4, 5, 3, generator=generator) + 1
    confidences = 1 + torch.rand(2, 3, 4, 5, generator=generator)
    plain = compact.confidence_loss(points, confidences, truth)
    torch.testing.assert_close(compact.confidence_loss(scale * points, confidences, true_scale * truth), plain)


def test_objective_of_a_perfect_answer_is_the_reward_of_its_confidence():
    truth = torch.rand(2, 3, 4, 5, 3) + 1
    confidences = torch.full((2, 3, 4, 5), np.e)
    assert float(compact.confidence_loss(3 * truth, confidences, truth)) == pytest.approx(-0.2, abs=1e-6)


def test_a_wrong_answer_costs_less_with_less_confidence():
    truth, said = torch.rand(2, 2, 3, 4, 5, 3).unbind(0)
    losses = [float(compact.confidence_loss(said, torch.full((2, 3, 4, 5), c), truth)) for c in (1.01, 3.0)]
    assert losses[0] < losses[1]


def test_place_and_match_losses_are_small_for_the_right_answer_alone(some_rooms):
    pairs = drawn_pairs(some_rooms)
    rows, columns = (side // dust3r.PATCH for side in SIZE)
    right = torch.zeros(1, rows * columns, rows + columns)
    for token in range(rows * columns):
        right[0, token, [token // columns, rows + token % columns]] = 50.0
    assert compact.place_loss(right, SIZE) < 1e-6 < compact.place_loss(right.roll(1, 1), SIZE)
    hits = [50 * torch.nn.functional.one_hot(pairs.matches(v).clamp(min=0), rows * columns).float() for v in (0, 1)]
    both_heads = [torch.stack([hit, torch.zeros_like(hit)], 1) for hit in hits]  # only half of them are asked
    assert compact.match_loss([both_heads], pairs) < 1e-6 < compact.match_loss([both_heads[::-1]], pairs)


def test_learner_hears_the_attention_of_the_network_itself(some_rooms):
    learner = compact.Learner(TINY, SIZE).eval()
    pairs = drawn_pairs(some_rooms)
    said, places, logits = learner(*pairs.images)
    both = [torch.cat(views) for views in (pairs.images, pairs.images[::-1])]
    expected = learner.model(*(2 * images - 1 for images in both))
    for name, tensor in expected.items():
        torch.testing.assert_close(said[name], tensor, atol=1e-5, rtol=1e-4)
    assert places.shape == (12, 6, 5) and len(logits) == 2
    assert all(level.shape == (12, 2, 6, 6) for levels in logits for level in levels)


def test_pictures_change_their_light_together(some_rooms):
    pairs = compact.Pairs(some_rooms[:1], torch.tensor([[3, 3]]))
    before = [images.clone() for images in pairs.images]
    after = pairs.recoloured(torch.Generator().manual_seed(3)).images
    assert (after[0] - before[0]).abs().mean() > 0.01
    torch.testing.assert_close(after[0].mean(), after[1].mean(), atol=2e-3, rtol=0)


def test_whitened_patches_are_uncorrelated_and_of_like_spread(some_rooms):
    images = torch.cat([room.images for room in some_rooms]).permute(0, 3, 1, 2) / 255
    embedding = torch.nn.Conv2d(3, 24, 16, stride=16)
    pretraining.whiten(embedding, images)
    tokens = embedding(2 * images - 1).flatten(2).transpose(1, 2).flatten(0, 1)
    covariance = torch.cov(tokens.T)
    assert tokens.mean(0).abs().max() < 1e-3
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-2
    assert 0.2 < covariance.diag().min() and covariance.diag().max() < 1.1


# Heads in closed form


def test_a_rooms_head_is_exact_where_features_are_the_points():
    learner = backbones.Learner("anchornet", SIZE)
    learner.ridge.data.fill_(-30.0)
    cells = torch.nn.functional.pad(torch.rand(1, 200, 3, generator=torch.Generator().manual_seed(0)), (0, 1), value=1)
    turn = torch.tensor(rotation(np.array([0.3, -0.5, 0.2])), dtype=torch.float32)
    truth = cells[..., :3] @ turn + torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(cells @ learner.head(cells, truth), truth, atol=1e-4, rtol=0)


def test_a_head_that_is_held_back_says_the_mean_point():
    learner = backbones.Learner("anchornet", SIZE)
    learner.ridge.data.fill_(20.0)
    cells = torch.nn.functional.pad(torch.randn(1, 500, 5), (0, 1), value=1)
    truth = torch.rand(1, 500, 3)
    said = cells @ learner.head(cells, truth)
    torch.testing.assert_close(said, truth.mean(1, keepdim=True).expand_as(said), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", backbones.NAMES)
def test_every_backbone_learns_from_other_views_than_it_is_asked_about(name, some_rooms):
    learner = backbones.Learner(name, SIZE)
    images, points = backbones.drawn(some_rooms, 2, torch.Generator().manual_seed(0))
    assert images.shape == points.shape == (2, backbones.VIEWS, 3, *SIZE)
    features = learner(images.flatten(0, 1))
    off = learner.distances(features, points)
    assert torch.isfinite(off).all() and off.mean() < 5
    off.mean().backward(retain_graph=True)
    assert all(p.grad is not None for p in learner.backbone.parameters() if p.requires_grad)
    asked = points[:, backbones.SUPPORT :]
    moved = torch.cat([points[:, : backbones.SUPPORT], asked + 100], 1)  # what is asked about makes no head
    assert (learner.distances(features, moved).mean() - off.mean()).abs() > 90


# The teacher's features


@pytest.fixture(scope="module")
def teacher():
    return dust3r.load_checkpoint(shipped.locate(shipped.TEACHER).parent)


@pytest.mark.parametrize("name", backbones.NAMES)
def test_features_that_tell_patches_apart_can_retell_the_teachers(name, teacher):
    learner, image = backbones.Learner(name, SIZE), torch.rand(1, 3, *SIZE)
    tokens = backbones.teacher_features(teacher, image)
    rows, columns = (-(-side // learner.patches) for side in tokens.shape[2:])
    patches = torch.eye(learner.backbone.channels)[: rows * columns].T.unflatten(1, (rows, columns))[None]
    features = patches.repeat_interleave(fine := max(1, 16 // learner.backbone.stride), 2).repeat_interleave(fine, 3)
    whole = torch.zeros(1, tokens.shape[1], rows * learner.patches, columns * learner.patches)
    whole[..., : tokens.shape[2], : tokens.shape[3]] = tokens
    answers = torch.nn.functional.pixel_unshuffle(whole, learner.patches).flatten(2)[0]
    learner.regressor.bias.data.zero_()
    assert learner.unlikeness(features, tokens) > 0.5
    learner.regressor.weight.data[:, : rows * columns, 0, 0] = answers
    assert learner.unlikeness(features, tokens) < 1e-10


def test_the_teachers_features_are_its_encoders_and_all_weigh_alike(teacher):
    images = torch.rand(2, 3, *SIZE)
    seen = backbones.teacher_features(teacher, images)
    tokens = teacher.encode(2 * images - 1).transpose(1, 2).reshape(2, -1, 2, 3)
    assert seen.shape == tokens.shape == (2, backbones.TEACHER_CHANNELS, 2, 3) and not seen.requires_grad
    correlation = torch.corrcoef(torch.stack([seen[1, :, 1, 2], tokens[1, :, 1, 2]]).detach())[0, 1]
    assert correlation > 1 - 1e-5
    torch.testing.assert_close(seen.mean(1), torch.zeros(2, 2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.square().mean(1), torch.ones(2, 2, 3), atol=1e-3, rtol=0)


def test_distillation_makes_the_features_like_the_teachers_also_as_a_second_stage(tmp_path, rooms_folder):
    def run(folder, **changes):
        plan = plan_of(BACKBONE_PLANS, steps_a_room=1000, **changes)
        return backbones.train("vit16", plan, tmp_path / folder, size=SIZE, rooms_folder=rooms_folder)[1:]

    without, _ = run("without", steps=24, distillation=0.0)
    distilled, _ = run("distilled", steps=24)
    assert distilled[-1]["unlikeness"] < 0.8 * without[-1]["unlikeness"]
    log, settings = run("without", steps=48)
    assert log[:2] == without and log[-1]["unlikeness"] < 0.8 * without[-1]["unlikeness"]
    assert [plan["distillation"] for plan in (*settings["earlier_plans"], settings["plan"])] == [0, 1]
    plain, taught = settings["earlier_plans"][0], settings["plan"]
    for stages in ({"plan": taught}, {"plan": plain, "earlier_plans": [taught]}, settings):  # whichever stage it was
        assert "compact DUSt3R" in backbones.trained_on(stages)
    assert "compact DUSt3R" not in backbones.trained_on({"plan": plain, "earlier_plans": [plain]})


def test_a_run_that_starts_from_shipped_weights_goes_on_with_them(tmp_path, rooms_folder):
    plan = plan_of(BACKBONE_PLANS, learning_rate=1e-9)
    learner, log, settings = backbones.train("vit32", plan, tmp_path, size=(96, 128), rooms_folder=rooms_folder,
                                             from_shipped=True)  # fmt: skip
    given = shipped.tensors("vit32")
    assert all((tensor - given[name]).abs().max() < 1e-6 for name, tensor in learner.backbone.state_dict().items())
    card = shipped.card("vit32")
    earlier = [{key: run[key] for key in settings["started_from"]} for run in backbones.runs_of(card)]
    assert settings["started_from"]["sha256"] == card["sha256"] and len(log) == 2
    assert backbones.runs_of({"settings": settings}) == [*earlier, {"settings": settings}]
    assert "compact DUSt3R" in backbones.trained_on({**settings, "plan": {"distillation": 0}})


# Runs


def plan_of(plans, **changes):
    return replace(plans["smoke"], **{"bfloat16": (), "steps_a_room": 2, **changes})


def run_compact(folder, rooms_folder, plan):
    return compact.train(plan, folder, size=SIZE, config=TINY, rooms_folder=rooms_folder)


@pytest.mark.parametrize("recipe", ["compact", "vit16"])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(recipe, tmp_path, rooms_folder, monkeypatch):
    def run(folder):
        if recipe == "compact":
            return run_compact(folder, rooms_folder, plan_of(COMPACT_PLANS))
        return backbones.train("vit16", plan_of(BACKBONE_PLANS), folder, size=SIZE, rooms_folder=rooms_folder)

    whole, log, _ = run(tmp_path / "whole")
    learn = pretraining.Run._learn

    def killed(self, loss, done):
        if self.step == 3:  # after the validation of step 2, with a step that is lost
            raise KeyboardInterrupt
        learn(self, loss, done)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pretraining.Run, "_learn", killed)
        run(tmp_path / "killed")
    again, log_again, _ = run(tmp_path / "killed")
    assert [entry["step"] for entry in log] == [entry["step"] for entry in log_again] == [2, 4]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    for entry, other in zip(log, log_again):
        assert {**entry, "seconds": 0} == {**other, "seconds": 0}


def test_an_ended_run_goes_on_in_a_second_stage_and_its_settings_tell(tmp_path, rooms_folder, monkeypatch):
    first = run_compact(tmp_path, rooms_folder, plan_of(COMPACT_PLANS))[1]
    schedule = []
    monkeypatch.setattr(pretraining, "learning_rate", lambda plan, done: schedule.append(done) or 1e-3)
    _, log, settings = run_compact(tmp_path, rooms_folder, plan_of(COMPACT_PLANS, steps=10))
    assert log[:2] == first and [entry["step"] for entry in log[2:]] == [7, 10]
    assert settings["plan"]["steps"] == 10 and [plan["steps"] for plan in settings["earlier_plans"]] == [4]
    assert settings["plan"]["began_at"]["step"] == 4 and schedule == [step / 6 for step in range(6)]  # a warm restart
    for steps in (4, 6):  # a smaller budget is used up already, and the settings do not claim it
        assert run_compact(tmp_path, rooms_folder, plan_of(COMPACT_PLANS, steps=steps))[1:] == (log, settings)


def test_other_settings_do_not_go_on_with_a_run(tmp_path, rooms_folder):
    first = run_compact(tmp_path, rooms_folder, plan_of(COMPACT_PLANS))[1]
    other = run_compact(tmp_path, rooms_folder, plan_of(COMPACT_PLANS, seed=1))[1]
    assert len(first) == len(other) == 2 and first[0]["loss"] != other[0]["loss"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = torch.nn.Linear(1, 1)
    run = pretraining.Run(tmp_path / "some", {}, model, plan_of(COMPACT_PLANS))
    with pytest.raises(TrainingError, match="no longer finite at step 2.*kept"):
        run.fit(lambda step, generator: model(torch.ones(1, 1)).sum() * float("nan"), dict)
    assert not (tmp_path / "some" / "training.pt").exists()


def test_learning_brings_the_loss_down(tmp_path, rooms_folder):
    plan = plan_of(COMPACT_PLANS, steps=60, batch=4, steps_a_room=1000, validations=3)
    _, log, _ = run_compact(tmp_path, rooms_folder, plan)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


def test_command_trains_and_writes_weights_that_load_with_their_card(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "kdutils.backbones", "mobilenet", "--plan", "smoke", "--device", "cpu",
         "--distillation", "0.5", "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "mobilenet-seed0" / "mobilenet"
    card = json.loads((folder / shipped.CARD).read_text())
    assert card["sha256"] == shipped.sha256(folder / shipped.FILE) and card["bytes"] < 2_000_000
    assert card["settings"]["plan"]["distillation"] == 0.5 and "what the compact DUSt3R sees" in card["trained_on"]
    assert card["settings"]["plan"]["steps"] == 4 and card["log"][-1]["step"] == 4 and "threads" in card["machine"]
    body = backbones.Learner("mobilenet").backbone
    kept = artefacts.read_tensors(folder / shipped.FILE)
    assert set(kept) == set(body.state_dict())


def test_budgets_asked_for_take_the_place_of_the_plans():
    def plan(*arguments):
        parser = argparse.ArgumentParser()
        return pretraining.options(parser, BACKBONE_PLANS, ["--plan", "cpu", "--device", "cpu", *arguments]).plan

    assert plan() == BACKBONE_PLANS["cpu"]
    assert plan("--seconds", "9", "--seed", "3") == replace(BACKBONE_PLANS["cpu"], seconds=9.0, seed=3)
    assert plan("--seconds", "0", "--steps", "7") == replace(BACKBONE_PLANS["cpu"], seconds=0.0, steps=7)
    with pytest.raises(SystemExit):
        plan("--steps", "0")


def test_unknown_backbone_is_named():
    command = [sys.executable, "-m", "kdutils.backbones", "resnet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no such backbone: resnet" in done.stderr and "vit16" in done.stderr


def test_rooms_come_to_the_device_in_order(rooms_folder, some_rooms):
    pool = endless.RoomPool(2, SIZE, "meta", rooms_folder)
    pool.advance(0)
    assert [views.edges.shape for views in pool.rooms] == [views.edges.shape for views in some_rooms]
    for views in pool.rooms:  # pairs are drawn on the CPU
        assert {name for name, tensor in vars(views).items() if tensor.device.type == "cpu"} == {"edges"}
        assert {tensor.device.type for tensor in vars(views).values()} == {"cpu", "meta"}
