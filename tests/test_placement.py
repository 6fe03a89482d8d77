"""What runs on CUDA mixes no tensors of two devices: on a machine without CUDA, torch's fake tensors tell.

A fake tensor has a shape, a type and a device, but no numbers. So this says nothing of results, kernels or speed.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode

from kdutils import augmentation, backbones, compact, dust3r, endless, inference, losses, students, training
from kdutils.settings import ARMS, Study

SIZE = (96, 128)
NETWORK = {"enc_embed_dim": 96, "enc_depth": 1, "enc_num_heads": 3, "dec_embed_dim": 96, "dec_depth": 4,
           "dec_num_heads": 3}  # fmt: skip
CUDA = torch.device("cuda")
pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")


@pytest.fixture
def fake(monkeypatch):
    """The fake tensors' mode, without what asks for a driver even so: backward pass, autocast, the memory's size."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    return FakeTensorMode(allow_non_fake_inputs=True)


def on_cuda(module):
    """A module's parameters and buffers, as if it had been moved; a tensor that is neither stays on the CPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    return module


def examples_on(device):
    """Eight frames that learn on CUDA and lie on ``device``."""
    count = 8
    return augmentation.Examples(
        torch.empty(count, *SIZE, 3, dtype=torch.uint8, device=device), torch.empty(count, *SIZE, device=device),
        torch.empty(count, *SIZE, dtype=torch.bool, device=device), torch.empty(count, *SIZE, device=device),
        torch.empty(count, 3, 3, device=device), torch.empty(count, 4, 4, device=device), CUDA)  # fmt: skip


def student_of(name):
    """A student of an arm on the CPU, and how it learns."""
    study = Study("kitchen", "hour")
    plan = replace(training.plan_for(study, ARMS[name]), batch=4)
    plan = replace(plan, recipe=replace(plan.recipe, averaged=False))  # fake modules cannot be copied
    needed = losses.needs_uncertainty(plan.recipe.loss)
    return students.build(ARMS[name], SIZE, "random", study.preset.vit_blocks, needed)[0], plan


def step_of(student, plan, examples, folder):
    """The loss of one training step."""
    run = training._Run(folder, {}, student, plan, None)
    run.learner = student
    return run._learn(examples, torch.arange(len(examples)), 0.6)


@pytest.mark.parametrize("lies", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ["cnn-scratch", "mobilenet-frozen", "vit16-unfrozen", "vit64-scratch",
                                  "mobilenet-frozen-laplace-mse-reprojection", "original-mobilenet"])  # fmt: skip
def test_a_training_step_stays_on_the_device_wherever_the_frames_lie(name, lies, fake, tmp_path):
    student, plan = student_of(name)
    with fake, training.half_precision(CUDA):
        assert torch.mm(*torch.empty(2, 1, 1, device=CUDA)).dtype == torch.bfloat16  # or this would be single precision
    with fake:
        assert step_of(on_cuda(student), plan, examples_on(lies), tmp_path).device.type == "cuda"


def test_a_tensor_left_on_the_cpu_is_found_out(fake, tmp_path):
    """The check itself: this is what the test above would say."""
    student, plan = student_of("cnn-scratch")
    with fake:
        on_cuda(student).centre = torch.zeros(3)
        with pytest.raises(FakeTensorDeviceMismatchError):
            step_of(student, plan, examples_on("cuda"), tmp_path)


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_the_labelling_engine_stays_on_the_models_device(head, fake):
    model = dust3r.DUSt3R(head_type=head, img_size=SIZE, **NETWORK)
    frames = SimpleNamespace(image=np.zeros((4, *SIZE, 3), np.uint8))
    with fake:
        teacher = inference.DUSt3RTeacher(frames, on_cuda(model))
        answers = teacher._decode(np.array([[0, 1], [2, 3]]))
    assert teacher.is_half and teacher.encoded > 1 and {answer.device.type for answer in answers.values()} == {"cuda"}


@pytest.mark.parametrize("name", backbones.NAMES)
def test_a_backbones_objectives_stay_on_the_device(name, fake):
    teacher = dust3r.DUSt3R("linear", SIZE, backbones.TEACHER_CHANNELS, 1, 3, 96, 1, 3)
    learner = backbones.Learner(name)
    with fake:
        on_cuda(learner)
        images, points = torch.empty(2, 2, backbones.VIEWS, 3, *SIZE, device=CUDA)
        features = learner(images.flatten(0, 1), bfloat16=True)
        tokens = backbones.teacher_features(on_cuda(teacher), images.flatten(0, 1), bfloat16=True)
        loss = learner.distances(features, points).mean() + learner.unlikeness(features, tokens)
    assert loss.device.type == "cuda"


def test_the_compact_teachers_objective_stays_on_the_device(fake, monkeypatch):
    monkeypatch.setattr(compact, "generator_on", lambda device, generator: None)  # a real one asks for a driver
    learner = compact.Learner()
    with fake:
        views = [endless.RoomViews(torch.empty(6, *SIZE, 3, dtype=torch.uint8, device=CUDA),
                                   torch.empty(6, *SIZE, dtype=torch.half, device=CUDA),
                                   torch.empty(6, 4, 4, device=CUDA), torch.empty(3, 3, device=CUDA), None)
                 for _ in range(2)]  # fmt: skip
        pairs = compact.Pairs(views, np.array([[0, 2], [1, 3]]))  # no tensor: a fake one has no numbers to be read
        loss = compact.loss_of(on_cuda(learner), pairs.recoloured(torch.Generator()), 3, bfloat16=True)
    assert loss.device.type == "cuda"
