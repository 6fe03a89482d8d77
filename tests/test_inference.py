"""DUSt3R over many pairs: once an image, in any order, in little memory, and the same to the last bit."""

import json
import os
import random
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from test_dust3r import SIZE, random_model, saved
from test_labelling import contents

from kdutils import dust3r, inference, labelling, pairs

PAIRS = np.array([[0, 1], [1, 0], [1, 2], [2, 1], [0, 2], [2, 0], [3, 0]])
HALF = {"rtol": 1e-3, "atol": 1e-5}  # half precision


@pytest.fixture(autouse=True)
def without_waiting(one_thread):
    """Networks this small only wait for a second thread."""


@pytest.fixture(scope="module", params=["linear", "dpt"])
def model(request):
    return random_model(head_type=request.param, dec_depth=4)


def make_frames(count, size=SIZE):
    return SimpleNamespace(image=np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8))


@torch.inference_mode()
def direct(model, *images):
    return model(*(torch.from_numpy(image)[None].permute(0, 3, 1, 2) / 255 * 2 - 1 for image in images))


def assert_bitwise_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert_array_equal(one, other)


def test_answers_every_pair_as_the_network_does(model):
    frames = make_frames(4)
    answer = inference.DUSt3RTeacher(frames, model, batch=3)(PAIRS)
    assert answer.points_i.shape == answer.points_j.shape == (7, *SIZE, 3)
    assert_array_equal(answer.pairs, PAIRS)
    for k, (i, j) in enumerate(PAIRS):
        expected = direct(model, frames.image[i], frames.image[j])
        for ours, name in zip(answer[1:], ("pts3d_1", "pts3d_2_in_view1", "conf_1", "conf_2"), strict=True):
            assert_allclose(ours[k], expected[name][0], **HALF)


def counted(model, monkeypatch):
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda images: encoded.append(len(images)) or encode(images))
    return encoded


@pytest.mark.parametrize("memory", [0, 3000, 10**9])
def test_every_image_is_encoded_once_whatever_the_memory(model, monkeypatch, tmp_path, memory):
    expected = inference.DUSt3RTeacher(make_frames(4), model, batch=2)(PAIRS)
    monkeypatch.setattr(inference, "CPU_BYTES", memory)
    encoded = counted(model, monkeypatch)
    teacher = inference.DUSt3RTeacher(make_frames(4), model, batch=2, folder=tmp_path)
    for _ in range(2):
        assert_bitwise_equal(teacher(PAIRS), expected)
    assert encoded == [1] * 4
    assert list(tmp_path.iterdir()) == []  # the file of encoded images has no name, so a killed run leaves none


@pytest.mark.parametrize("together", [2, 3, 8])
def test_images_that_are_encoded_together_say_what_they_say_alone(model, together):
    frames, graph = make_frames(5), np.array([[0, 4], [4, 0], [2, 1], [3, 2]])
    alone, grouped = (inference.DUSt3RTeacher(frames, model) for _ in range(2))
    grouped.encoded = together
    for one, other in zip(alone(graph), grouped(graph)):
        assert_allclose(one, other, **HALF)


def test_images_are_encoded_singly_where_memory_has_no_room_for_more(model, monkeypatch):
    expected = inference.DUSt3RTeacher(make_frames(4), model, batch=2)(PAIRS)
    tried, encode = [], model.encode

    def encode_one_at_most(images):
        tried.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return encode(images)

    monkeypatch.setattr(model, "encode", encode_one_at_most)
    teacher = inference.DUSt3RTeacher(make_frames(4), model, batch=2)
    teacher.encoded = 4
    assert_bitwise_equal(teacher(PAIRS), expected)
    assert tried == [4, 1, 1, 1, 1]
    monkeypatch.setattr(model, "encode", lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        inference.DUSt3RTeacher(make_frames(4), model, batch=2)(PAIRS)


def test_without_a_folder_images_are_encoded_again(model, monkeypatch):
    expected = inference.DUSt3RTeacher(make_frames(4), model, batch=2)(PAIRS)
    monkeypatch.setattr(inference, "CPU_BYTES", 0)
    encoded = counted(model, monkeypatch)
    assert_bitwise_equal(inference.DUSt3RTeacher(make_frames(4), model, batch=2)(PAIRS), expected)
    assert len(encoded) > 4


def test_images_of_several_sizes_are_grouped(model):
    sizes = [(32, 48), (48, 32), (32, 48), (16, 64)]
    rng = np.random.default_rng(1)
    frames = SimpleNamespace(image=[rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes])
    teacher = inference.DUSt3RTeacher(frames, model, batch=2)
    answered = []
    for which, answer in teacher.predictions(PAIRS):
        answered += which.tolist()
        for place, k in enumerate(which):
            i, j = PAIRS[k]
            assert answer["pts3d_1"][place].shape == (*sizes[i], 3)
            assert answer["pts3d_2_in_view1"][place].shape == (*sizes[j], 3)
            expected = direct(model, frames.image[i], frames.image[j])
            for name, value in expected.items():
                torch.testing.assert_close(answer[name][place], value[0], rtol=1e-4, atol=1e-5)
    assert sorted(answered) == list(range(len(PAIRS)))
    with pytest.raises(ValueError, match=r"several sizes.*predictions\(\)"):
        teacher(PAIRS)


def test_batch_is_halved_until_it_fits_the_memory(model, monkeypatch):
    expected = inference.DUSt3RTeacher(make_frames(4), model, batch=7)(PAIRS)
    tried, decode = [], model.decoder_layers

    def decode_two_at_most(tokens1, *others):
        tried.append(len(tokens1))
        if len(tokens1) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return decode(tokens1, *others)

    monkeypatch.setattr(model, "decoder_layers", decode_two_at_most)
    teacher = inference.DUSt3RTeacher(make_frames(4), model, batch=7)
    for ours, theirs in zip(teacher(PAIRS), expected, strict=True):
        assert_allclose(ours, theirs, **HALF)
    assert tried[:3] == [7, 3, 1] and teacher.batch <= 2
    monkeypatch.setattr(model, "decoder_layers", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
    with pytest.raises(torch.OutOfMemoryError):
        teacher(PAIRS)


def test_batch_suits_the_size():
    batches = [inference.fitting_batch(torch.device("cpu"), size) for size in ((384, 512), (96, 128), (2048, 2048))]
    assert batches == [2, 32, 1]


def test_names_its_checkpoint(model, tmp_path):
    loaded = dust3r.load_checkpoint(saved(model, tmp_path, name="mine.safetensors"))
    settings = inference.DUSt3RTeacher(make_frames(1), loaded).settings()
    assert settings == {"teacher": "dust3r", "checkpoint": "mine", "sha256": loaded.digest, "precision": "float32"}
    assert json.loads(json.dumps(settings)) == settings


def test_no_pairs_and_a_size_that_is_no_multiple(model):
    empty = inference.DUSt3RTeacher(make_frames(2), model)(np.empty((0, 2), int))
    assert len(empty.points_i) == len(empty.confidence_j) == 0
    with pytest.raises(ValueError, match="multiples of 16"):
        inference.DUSt3RTeacher(make_frames(1, (30, 48)), model)


def label(folder):
    teacher = inference.DUSt3RTeacher(make_frames(12), random_model(head_type="dpt", dec_depth=4), 3, folder)
    return labelling.label_pairs(teacher, pairs.window_pairs(12, 5), SIZE, folder, "same", 4)


def test_ten_kills_at_random_moments_leave_the_files_of_an_undisturbed_run(tmp_path):
    started = time.monotonic()
    label(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    shards, rng, kills = sum(name.startswith("pairs-") for name in whole), random.Random(0), 0
    a_shard_takes = (time.monotonic() - started) / shards
    for number in range(1, 11):  # each gets a little further, and dies at some moment of the shard after
        child = os.fork()
        if child == 0:
            label(tmp_path / "killed")
            os._exit(0)
        while not labelling.shard_path(tmp_path / "killed", number).exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.8) * a_shard_takes)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert kills >= 5  # all ten, unless the machine stands still for a while
    label(tmp_path / "killed")
    left = {name: data for name, data in contents(tmp_path / "killed").items() if not name.endswith(".aside")}
    assert left == whole
