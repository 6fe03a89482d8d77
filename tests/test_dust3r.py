"""DUSt3R: against outputs of the published implementation, and by properties that need no reference."""

import argparse
import hashlib
import json
import os
import re
import socket
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kdutils import dust3r

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
# One attention head of 64 channels on either side, as is assumed where no config.json says otherwise.
TINY = {"head_type": "linear", "img_size": 64, "enc_embed_dim": 64, "enc_depth": 2, "enc_num_heads": 1,
        "dec_embed_dim": 64, "dec_depth": 2, "dec_num_heads": 1}  # fmt: skip
SIZE = (32, 48)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for a second thread, and for seconds where other programs keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference_file(name):
    if not (REFERENCE / name).is_file():
        pytest.skip(f"{REFERENCE / name} is not there: it is no part of the repository")
    return REFERENCE / name


def fraction(x):
    return x - np.floor(x)


def reference_image(seed, shape):
    values = 2 * fraction(np.sin(78.233 * np.arange(np.prod(shape)) + seed) * 43758.5453) - 1
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def reference_tensor(name, shape):
    name = re.sub(r"scratch\.layer_rn\.(\d)\.", lambda match: f"scratch.layer{int(match[1]) + 1}_rn.", name)
    phase = zlib.crc32(name.encode()) % 10007 / 10007 * 2 * np.pi
    values = 2 * fraction(np.sin(12.9898 * np.arange(np.prod(shape)) + phase) * 43758.5453) - 1
    if len(shape) == 1:
        values = 1 + 0.1 * values if name.endswith("weight") else 0.05 * values
    else:
        last = re.fullmatch(r"downstream_head[12]\.(proj|dpt\.head\.4)\.weight", name)
        values = values * np.sqrt(3 / np.prod(shape[1:])) * (0.1 if last else 1)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def reference_model(config):
    with torch.device("meta"):
        model = dust3r.DUSt3R(**config).eval()
    values = {parameter: reference_tensor(name, parameter.shape) for name, parameter in model.named_parameters()}
    state = model.state_dict(keep_vars=True)  # names a shared parameter twice
    model.load_state_dict({name: values[parameter] for name, parameter in state.items()}, assign=True)
    return model


def relative_error(ours, theirs, is_scalar):
    """The largest one; coordinates cross zero, so a point's (or token's) error is relative to its length."""
    if is_scalar:
        ours, theirs = ours[..., None], theirs[..., None]
    return (np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max()


def random_model(**changes):
    torch.manual_seed(0)
    return dust3r.DUSt3R(**TINY | changes).eval()


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def dpt_model():
    return random_model(head_type="dpt", dec_depth=4)


def random_images(count, size=SIZE, seed=1):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def saved(model, folder, drop=(), add=(), name="model.safetensors"):
    """The model as a checkpoint file that holds every shared tensor once."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not re.search(r"layer\d_rn", name)}
    tensors = {name: tensor for name, tensor in (tensors | dict(add)).items() if name not in drop}
    save_file(tensors, folder / name)
    return folder / name


def assert_same_output(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("head_type", ["linear", "dpt"])
@torch.inference_mode()
def test_agrees_with_the_published_implementation(head_type):
    reference = np.load(reference_file(f"dust3r_tiny_{head_type}.npz"))
    config = json.loads(str(reference["config"]))
    batch, height, width, *seeds = (config.pop(key) for key in ("batch", "height", "width", "seed1", "seed2"))
    model, size = reference_model(config), (height, width)
    image1, image2 = (reference_image(seed, (batch, 3, *size)) for seed in seeds)
    ours = model(image1, image2)
    ours["encoder_tokens_1"] = model.encode(image1)
    layers1, layers2 = model.decoder_layers(ours["encoder_tokens_1"], model.encode(image2), size, size)
    ours |= {"decoder_tokens_1": layers1[-1], "decoder_tokens_2": layers2[-1]}
    assert ours.keys() | {"config"} == set(reference)
    for name, array in ours.items():
        assert relative_error(array.numpy(), reference[name], is_scalar="conf" in name) <= 1e-4, name


@pytest.mark.parametrize("head_type", ["linear", "dpt"])
def test_state_dict_is_the_published_one(head_type):
    published = json.loads(reference_file("dust3r_state_dicts.json").read_text())
    with torch.device("meta"):
        model = dust3r.DUSt3R(head_type)
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == published[f"DUSt3R_ViTLarge_BaseDecoder_512_{head_type}"]
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(millions, 2) == {"dpt": 571.17, "linear": 532.34}[head_type]


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (16, 80), (48, 48)])
@torch.inference_mode()
def test_any_shape_of_whole_patches(dpt_model, size):
    output = dpt_model(*random_images(2, size).split(1))
    for name, array in output.items():
        assert array.shape == ((1, *size, 3) if "pts3d" in name else (1, *size))
        assert array.isfinite().all()
    assert min(output["conf_1"].min(), output["conf_2"].min()) >= 1


def test_other_shapes_are_refused(model):
    with pytest.raises(ValueError, match=r"\(30, 48\).*16"):
        model.encode(random_images(1, (30, 48)))


@torch.inference_mode()
def test_landscape_and_portrait_in_one_pair(model):
    output = model(random_images(1, (32, 48)), random_images(1, (64, 32)))
    assert output["pts3d_1"].shape == (1, 32, 48, 3)
    assert output["pts3d_2_in_view1"].shape == (1, 64, 32, 3)


@torch.inference_mode()
def test_pairs_of_a_batch_do_not_mix(dpt_model):
    first, second = random_images(3), random_images(3, seed=2)
    together = dpt_model(first, second)
    alone = dpt_model(first[1:2], second[1:2])
    assert_same_output(alone, {name: array[1:2] for name, array in together.items()})


@torch.inference_mode()
def test_views_are_told_apart_and_both_matter(model):
    first, second = random_images(2).split(1)
    output, swapped = model(first, second), model(second, first)
    assert not torch.allclose(output["pts3d_1"], swapped["pts3d_2_in_view1"], rtol=1e-2)
    changed = model(first, -second)
    assert not torch.equal(output["pts3d_1"], changed["pts3d_1"])


@torch.inference_mode()
def test_swapping_views_and_weights_swaps_the_output(model):
    mirrored = random_model()
    sides = {"dec_blocks.": "dec_blocks2.", "dec_blocks2.": "dec_blocks.",
             "downstream_head1.": "downstream_head2.", "downstream_head2.": "downstream_head1."}  # fmt: skip
    pattern = re.compile("^(" + "|".join(map(re.escape, sides)) + ")")
    state = model.state_dict()
    mirrored.load_state_dict({pattern.sub(lambda match: sides[match[0]], name): state[name] for name in state})
    first, second = random_images(2).split(1)
    output, swapped = model(first, second), mirrored(second, first)
    torch.testing.assert_close(output["pts3d_1"], swapped["pts3d_2_in_view1"])
    torch.testing.assert_close(output["conf_2"], swapped["conf_1"])


@torch.inference_mode()
def test_encoding_once_equals_the_direct_call(model):
    first, second, third = random_images(3).split(1)
    tokens = [model.encode(image) for image in (first, second, third)]
    assert_same_output(model.decode(tokens[0], tokens[1], SIZE), model(first, second))
    assert_same_output(model.decode(tokens[2], tokens[0], SIZE, SIZE), model(third, first))


def test_attention_sees_relative_positions_only():
    query, key = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(3)).double()
    cos, sin = (table.double() for table in dust3r.rope_tables((96, 96), 32, "cpu"))

    def score(row, column, other_row, other_column):
        patches = [6 * row + column, 6 * other_row + other_column]
        (q, k) = (dust3r.rotate(x, (cos[[p]], sin[[p]])) for x, p in zip((query, key), patches, strict=True))
        return float((q * k).sum())

    assert score(0, 1, 2, 4) == pytest.approx(score(3, 2, 5, 5), abs=1e-4)
    assert score(0, 1, 2, 4) != pytest.approx(score(0, 1, 4, 2), abs=1e-2)


def test_points_by_hand():
    raw = torch.tensor([[3.0, 0.0, 4.0, 0.5], [0.0, 0.0, 0.0, -60.0]]).T.reshape(1, 4, 1, 2)
    points, confidence = dust3r.points_and_confidence(raw)
    np.testing.assert_allclose(points[0, 0], [np.array([0.6, 0, 0.8]) * (np.exp(5) - 1), [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(confidence[0, 0], [1 + np.exp(0.5), 1], rtol=1e-6)


@torch.inference_mode()
def test_heads_stay_in_single_precision_under_autocast(model):
    images = random_images(2).split(1)
    exact = model(*images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*images)
    assert {array.dtype for array in rough.values()} == {torch.float32}
    assert_same_output(rough, exact, tolerance=0.05)
    assert not torch.equal(rough["pts3d_1"], exact["pts3d_1"])


@torch.inference_mode()
def test_safetensors_round_trip(dpt_model, tmp_path):
    file = saved(dpt_model, tmp_path)
    loaded = dust3r.load_checkpoint(file)
    images = random_images(2).split(1)
    assert_same_output(loaded(*images), dpt_model(*images))
    assert all(loaded.state_dict()[name].equal(tensor) for name, tensor in dpt_model.state_dict().items())
    assert loaded.state_dict().keys() == dpt_model.state_dict().keys()
    assert loaded.checkpoint == "model" and re.fullmatch("[0-9a-f]{16,64}", loaded.digest)
    assert not loaded.training


def test_shared_tensors_under_their_other_name(dpt_model, tmp_path):
    state = dpt_model.state_dict()
    other = {name: tensor for name, tensor in state.items() if re.search(r"layer\d_rn", name)}
    drop = [name for name in state if "layer_rn" in name]
    loaded = dust3r.load_checkpoint(saved(dpt_model, tmp_path, drop, other))
    name = "downstream_head2.dpt.scratch.layer_rn.2.weight"
    assert torch.equal(loaded.state_dict()[name], state[name])


def test_two_names_with_different_tensors(dpt_model, tmp_path):
    name = "downstream_head1.dpt.scratch.layer{}_rn.weight"
    shape = dpt_model.state_dict()[name.format(1)].shape
    with pytest.raises(dust3r.CheckpointError, match=r"tensor \S+layer_rn.0.weight is not \S+layer1_rn.weight$"):
        dust3r.load_checkpoint(saved(dpt_model, tmp_path, add={name.format(1): torch.zeros(shape)}))


def test_unused_tensors_may_be_missing(dpt_model, tmp_path):
    unused = [name for name in dpt_model.state_dict() if "refinenet4.resConfUnit1" in name] + ["mask_token"]
    assert len(unused) == 9
    loaded = dust3r.load_checkpoint(saved(dpt_model, tmp_path, unused))
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_folder_with_config(tmp_path):
    # Two heads of 32 channels cannot be told from the tensors.
    model = random_model(enc_num_heads=2, dec_num_heads=4)
    folder = tmp_path / "own"
    folder.mkdir()
    saved(model, folder)
    (folder / "config.json").write_text(json.dumps({"enc_num_heads": 2, "dec_num_heads": 4, "img_size": [32, 48]}))
    loaded = dust3r.load_checkpoint(folder)
    assert (loaded.checkpoint, loaded.img_size) == ("own", (32, 48))
    images = random_images(2).split(1)
    with torch.inference_mode():
        assert_same_output(loaded(*images), model(*images))
    (folder / "config.json").write_text(json.dumps({"dec_depth": 3}))
    with pytest.raises(dust3r.CheckpointError, match="dec_depth is 3, but model.safetensors shows 2"):
        dust3r.load_checkpoint(folder)


def test_pth_with_its_arguments(model, tmp_path):
    file = tmp_path / "authors.pth"
    torch.save({"args": argparse.Namespace(lr=1e-4, model="text"), "model": model.state_dict()}, file)
    loaded = dust3r.load_checkpoint(file)
    assert torch.equal(loaded.decoder_embed.weight, model.decoder_embed.weight)
    torch.save({"model": ["no", "tensors"]}, file)
    with pytest.raises(dust3r.CheckpointError, match=r"authors\.pth.*no dict of tensors"):
        dust3r.load_checkpoint(file)


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_malicious_pickle_is_refused_and_not_run(model, tmp_path):
    trace = tmp_path / "it-ran"
    torch.save({"args": Malicious(trace), "model": model.state_dict()}, tmp_path / "bad.pth")
    with pytest.raises(dust3r.CheckpointError, match=r"bad\.pth: refused.*mkdir") as caught:
        dust3r.load_checkpoint(tmp_path / "bad.pth")
    assert not trace.exists()
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        (["enc_norm.bias"], {}, "tensor enc_norm.bias is missing"),
        (["dec_blocks2.1.norm_y.weight"], {}, "tensor dec_blocks2.1.norm_y.weight is missing"),
        ([], {"surprise.weight": torch.zeros(2)}, "tensor surprise.weight is unknown"),
        ([], {"decoder_embed.weight": torch.zeros(64, 63)},
         r"tensor decoder_embed.weight has shape \(64, 63\) instead of \(64, 64\)$"),
        ([], {"enc_blocks.0.norm1.weight": torch.zeros(1)}, r"tensor enc_blocks.0.norm1.weight has shape \(1,\)[^;]*$"),
    ],
)  # fmt: skip
def test_a_bad_tensor_is_named(model, tmp_path, drop, add, message):
    with pytest.raises(dust3r.CheckpointError, match=message):
        dust3r.load_checkpoint(saved(model, tmp_path, drop, add))


def test_bad_sources_are_named(tmp_path):
    for name, content in (("cut.safetensors", b"garbage" * 9), ("cut.pth", b"garbage" * 9), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(dust3r.CheckpointError, match=name):
            dust3r.load_checkpoint(tmp_path / name)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(dust3r.CheckpointError, match="no DUSt3R checkpoint"):
        dust3r.load_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(dust3r.CheckpointError, match="model.safetensors: missing"):
        dust3r.load_checkpoint(tmp_path)
    with pytest.raises(dust3r.CheckpointError, match="no such file"):
        dust3r.load_checkpoint(tmp_path / "nowhere.safetensors")


def test_unreachable_hub_gives_the_two_ways_out(monkeypatch, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    with pytest.raises(dust3r.CheckpointError, match="by hand from .*naver/.*teacher 'depth'"):
        dust3r.load_checkpoint(cache=tmp_path)
    assert time.monotonic() - start < 10


@pytest.fixture
def loopback_hub(model, tmp_path):
    """A hub of one repository on the loopback interface, the list of the requests it got, and the tags of its files."""
    contents = {
        "config.json": json.dumps({"img_size": [64, 64]}).encode(),
        "model.safetensors": saved(model, tmp_path).read_bytes(),
    }
    requests, tags = [], {"model.safetensors": hashlib.sha256(contents["model.safetensors"]).hexdigest()}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.wfile.write(self.answer())

        def answer(self):
            requests.append(f"{self.command} {self.path}")
            content = contents.get(Path(self.path).name, b"")
            self.send_response(200)
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("ETag", f'"{tags.get(Path(self.path).name) or zlib.crc32(content)}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests, tags
    server.shutdown()
    server.server_close()


def test_download_and_then_the_cache(loopback_hub, model, monkeypatch, tmp_path):
    endpoint, requests, _ = loopback_hub
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    wanted = {"source": "someone/tiny", "cache": tmp_path / "cache", "revision": "v1"}
    loaded = dust3r.load_checkpoint(**wanted)
    assert loaded.checkpoint == "tiny"
    assert torch.equal(loaded.enc_norm.weight, model.enc_norm.weight)
    downloads = [request for request in requests if request.startswith("GET")]
    assert downloads == [f"GET /someone/tiny/resolve/v1/{name}" for name in dust3r.HUB_FILES]
    requests.clear()
    assert dust3r.load_checkpoint(**wanted).digest == loaded.digest
    assert not requests


def test_revision_can_stand_in_the_id(loopback_hub, monkeypatch, tmp_path):
    endpoint, requests, _ = loopback_hub
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    dust3r.load_checkpoint("someone/tiny@v2", cache=tmp_path / "cache")
    assert "GET /someone/tiny/resolve/v2/model.safetensors" in requests


def test_download_that_is_not_what_the_hub_states_is_refused(loopback_hub, monkeypatch, tmp_path):
    endpoint, _, tags = loopback_hub
    tags["model.safetensors"] = "a" * 64
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(dust3r.CheckpointError, match=r"damaged, as its SHA-256.*delete .*downloaded again"):
        dust3r.load_checkpoint("someone/tiny", cache=tmp_path / "cache")
