"""The students: shapes, sizes, what is frozen, and where pretrained weights come from."""

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
from conftest import ROOT
from safetensors.torch import load_file, save_file

from kdutils import students
from kdutils.settings import ARMS

SIZE = (96, 128)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with weights as timm's hub has them, but drawn by a seed."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    for name in students.TIMM_MODELS.values():
        save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")
    return folder


def build(arm, size=SIZE, weights="auto"):
    return students.build(ARMS[arm], size, weights)


# Shapes and sizes


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_maps_images_to_points(arm, weights):
    student, _ = build(arm, weights=weights)
    points = student.eval()(torch.rand(2, 3, *SIZE))
    assert points.shape == (2, 3, *SIZE) and points.dtype == torch.float32
    assert torch.isfinite(points).all()


@pytest.mark.parametrize("arm", [name for name in ARMS if name.endswith("scratch")])
@pytest.mark.parametrize("size", [(90, 130), (64, 64), (50, 200)])
def test_sizes_that_the_stride_does_not_divide(arm, size):
    student, _ = build(arm, size)
    assert student.eval()(torch.rand(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("size", [SIZE, (384, 512)])
@pytest.mark.parametrize("arm", [name for name in ARMS if name.endswith("scratch")])
def test_students_are_small(arm, size):
    student, _ = build(arm, size)
    megabytes = 4 * sum(p.numel() for p in student.parameters()) / 1e6
    assert 3 < megabytes < 45


def test_padding_repeats_the_border_and_is_cut_off():
    student, _ = build("cnn-scratch", (60, 75))
    image = torch.rand(1, 3, 60, 75)
    padded = torch.nn.functional.pad(image, (0, 5, 0, 4), mode="replicate")
    student.eval()
    assert torch.equal(student(image), student(padded)[..., :60, :75])


def test_one_image_does_not_depend_on_its_batch():
    student, _ = build("mobilenet-scratch")
    images = torch.rand(3, 3, *SIZE)
    student.eval()
    torch.testing.assert_close(student(images)[1:2], student(images[1:2]), atol=1e-5, rtol=1e-4)


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
    said = student.place(points).eval()(torch.rand(1, 3, *SIZE))
    torch.testing.assert_close(said, points.mean(0)[:, None, None].expand(1, 3, *SIZE))


def test_extent_is_the_deviation_and_scales_the_offsets():
    student, _ = build("cnn-scratch")
    student.eval()
    image = torch.rand(1, 3, *SIZE)
    offsets = student(image).detach()
    points = torch.tensor([[1.0, 2, 3], [1, 2, -3], [1, 2, 3], [1, 2, -3]])
    student.place(points)
    assert student.centre.tolist() == [1, 2, 0]
    assert float(student.extent) == pytest.approx(3**0.5)  # 3 m on one coordinate of three
    expected = torch.tensor([1.0, 2, 0])[:, None, None] + 3**0.5 * offsets
    torch.testing.assert_close(student(image), expected)


# Freezing


@pytest.mark.parametrize("arm", ["mobilenet-frozen", "vit32-frozen"])
def test_frozen_backbone_stays_while_the_head_learns(arm, weights):
    student, _ = build(arm, weights=weights)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.1)
    student.train()
    student(torch.rand(2, 3, *SIZE)).square().mean().backward()
    optimiser.step()
    assert all(p.grad is None for p in student.backbone.parameters())
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    head = {f"head.{name}" for name in student.head.state_dict()}
    assert moved == head and "head.mix.1.running_mean" in moved


@pytest.mark.parametrize("arm", ["mobilenet-unfrozen", "vit32-unfrozen", "cnn-scratch"])
def test_unfrozen_backbone_learns(arm, weights):
    student, _ = build(arm, weights=weights)
    student.train()
    student(torch.rand(2, 3, *SIZE)).square().mean().backward()
    assert all(p.requires_grad for p in student.parameters())
    silent = [name for name, p in student.backbone.named_parameters() if p.grad is None]
    assert silent == []


# Weights


def test_given_weights_are_in_the_mobilenet(weights):
    student, origin = build("mobilenet-unfrozen", weights=weights)
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
missing = students.find_weights("vit")
print(missing.origin, missing.note, sep="|")
"""


def test_reached_hub_gives_its_weights_and_says_what_it_lacks(hub, weights, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    reached, missing = (line.split("|") for line in done.stdout.splitlines())
    name = students.TIMM_MODELS["mobilenet"]
    given = load_file(weights / f"{name}.safetensors")["conv_stem.weight"]
    assert reached[:2] == ["hub", f"pretrained, timm/{name}"]
    assert float(reached[2]) == pytest.approx(float(given.abs().sum()), rel=1e-6)
    assert missing[0] == "random" and missing[1].startswith("RANDOM WEIGHTS")
