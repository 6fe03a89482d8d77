"""DUSt3R in plain torch: the network, and strict loading of its public checkpoints.

Source: Wang et al., *DUSt3R: Geometric 3D Vision Made Easy*, CVPR 2024. Parameters carry the names of the public
checkpoints, which are not part of this repository and are licensed for non-commercial use only.

Two images of one scene go in; out comes a 3D point **in view 1's camera frame** and a confidence for every pixel of
both. The unit of length is arbitrary and differs from pair to pair, and (i, j) is another prediction than (j, i).
"""

import argparse
import json
import os
import pickle
import re
from functools import partial
from pathlib import Path
from statistics import mode

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from kdutils import artefacts

DEFAULT_CHECKPOINT = "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt"
PATCH = 16  # pixels
ROPE_BASE = 100
HEAD_CHANNELS = 64  # of one attention head in every public checkpoint
DPT_WIDTHS = (96, 192, 384, 768)
DPT_FEATURES = 256
OUTPUT_CHANNELS = 4  # x, y, z and confidence
# These take no part in the computation, so a checkpoint may lack them.
UNUSED = re.compile(r"mask_token|downstream_head[12]\.dpt\.scratch\.refinenet4\.resConfUnit1\..*")
HUB_FILES = ("config.json", "model.safetensors")
HUB_TIMEOUT = 5  # seconds
LayerNorm = partial(nn.LayerNorm, eps=1e-6)
Doubling = partial(nn.Upsample, scale_factor=2, mode="bilinear", align_corners=True)


class CheckpointError(ValueError):
    """A checkpoint that cannot be had or used; the message names the file or the tensor, and the remedy if any."""


def rope_tables(size, channels, device):
    """Cosines and sines of RoPE-2D: one half of a head's channels turns by a patch's row, the other by its column.

    Args:
        size: (height, width) of the image in pixels.
        channels: number of channels of one attention head, a multiple of 4.

    Returns:
        Two tensors ``(N, 2, channels / 2)`` for the N patches, row by row.
    """
    rows, columns = (torch.arange(side // PATCH, device=device, dtype=torch.float32) for side in size)
    positions = torch.cartesian_prod(rows, columns)
    half = channels // 2
    exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
    angles = positions[:, :, None] / ROPE_BASE**exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, tables):
    """Apply ``rope_tables`` to queries or keys ``(B, heads, N, channels)``."""
    cos, sin = (table.to(x.dtype) for table in tables)  # or a half-precision x would be worked on in single precision
    halves = x.unflatten(-1, cos.shape[1:])
    first, second = halves.chunk(2, dim=-1)
    turned = halves * cos + torch.cat([-second, first], dim=-1) * sin
    return turned.flatten(-2)


def split_heads(x, heads):
    """``(B, N, C)`` to ``(B, heads, N, C / heads)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query, key, value):
    """Attention over all heads, ``(B, heads, N, channels)`` to ``(B, N, C)``."""
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(attend(rotate(query, rope), rotate(key, rope), value))


class CrossAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.projq, self.projk, self.projv, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, other, rope, other_rope):
        query = rotate(split_heads(self.projq(x), self.heads), rope)
        key = rotate(split_heads(self.projk(other), self.heads), other_rope)
        return self.proj(attend(query, key, split_heads(self.projv(other), self.heads)))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.mlp = MLP(width)

    def forward(self, x, rope):
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = (LayerNorm(width) for _ in range(4))
        self.attn = SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = MLP(width)

    def forward(self, x, other, rope, other_rope):
        x = x + self.attn(self.norm1(x), rope)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(other), rope, other_rope)
        return x + self.mlp(self.norm3(x))


class LinearHead(nn.Module):
    """One linear map from the last tokens to the pixels of a patch."""

    def __init__(self, encoder_width, decoder_width, depth):
        super().__init__()
        self.proj = nn.Linear(decoder_width, OUTPUT_CHANNELS * PATCH**2)

    def finest(self, encoder_tokens, size):
        """Nothing: see ``DPTHead.finest``."""

    def forward(self, layers, size, finest=None):
        return F.pixel_shuffle(as_map(self.proj(layers[-1]), size), PATCH)


class ResidualUnit(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """One level of the DPT head: takes in the level's refined features and doubles the resolution."""

    def __init__(self, width):
        super().__init__()
        self.resConfUnit1, self.resConfUnit2 = ResidualUnit(width), ResidualUnit(width)
        self.enlarge = Doubling()
        self.out_conv = nn.Conv2d(width, width, 1)

    def forward(self, x, features=None):
        if features is not None:
            x = x + features
        # Published the other way round; the two commute, and before the enlargement there are a quarter of the pixels.
        return self.enlarge(self.out_conv(self.resConfUnit2(x)))


class DPTHead(nn.Module):
    """Dense prediction from four layers at four resolutions: Ranftl et al., *Vision Transformers for Dense Prediction*.

    Takes the encoder's tokens and all decoder layers, a list of ``(B, N, C)``, and gives ``(B, 4, H, W)``.
    """

    def __init__(self, encoder_width, decoder_width, depth):
        super().__init__()
        self.hooks = (0, depth // 2, 3 * depth // 4, depth)
        w, half = DPT_WIDTHS, DPT_FEATURES // 2
        levels = [
            nn.Sequential(nn.Conv2d(encoder_width, w[0], 1), nn.ConvTranspose2d(w[0], w[0], 4, stride=4)),
            nn.Sequential(nn.Conv2d(decoder_width, w[1], 1), nn.ConvTranspose2d(w[1], w[1], 2, stride=2)),
            nn.Sequential(nn.Conv2d(decoder_width, w[2], 1)),
            nn.Sequential(nn.Conv2d(decoder_width, w[3], 1), nn.Conv2d(w[3], w[3], 3, stride=2, padding=1)),
        ]
        head = nn.Sequential(
            nn.Conv2d(DPT_FEATURES, half, 3, padding=1),
            Doubling(),
            nn.Conv2d(half, half, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, OUTPUT_CHANNELS, 1),
        )
        scratch = nn.ModuleDict({f"refinenet{level}": Fusion(DPT_FEATURES) for level in (1, 2, 3, 4)})
        to_features = [nn.Conv2d(width, DPT_FEATURES, 3, padding=1, bias=False) for width in DPT_WIDTHS]
        # The published state dict holds the same four tensors under two names each.
        scratch["layer_rn"] = nn.ModuleList(to_features)
        scratch.update({f"layer{level}_rn": conv for level, conv in enumerate(to_features, 1)})
        self.dpt = nn.ModuleDict({"act_postprocess": nn.ModuleList(levels), "scratch": scratch, "head": head})

    def finest(self, encoder_tokens, size):
        """The finest level's features: of one image alone, so worth keeping while it is decoded in several pairs."""
        return self._features(1, encoder_tokens, size)

    def forward(self, layers, size, finest=None):
        third, coarsest = (self._features(level, layers[self.hooks[level - 1]], size) for level in (3, 4))
        # Level 4 is rounded up to whole cells where the patch grid has an odd side.
        running = self._fused(4, coarsest)[..., : third.shape[-2], : third.shape[-1]]
        running = self._fused(3, running, third)
        running = self._fused(2, running, self._features(2, layers[self.hooks[1]], size))
        running = self._fused(1, running, self.finest(layers[0], size) if finest is None else finest)
        return self.dpt["head"](running)

    def _features(self, level, tokens, size):
        maps = self.dpt["act_postprocess"][level - 1](as_map(tokens, size))
        features = self.dpt["scratch"]["layer_rn"][level - 1](maps)
        return features if level == 4 else self.dpt["scratch"][f"refinenet{level}"].resConfUnit1(features)

    def _fused(self, level, *maps):
        return self.dpt["scratch"][f"refinenet{level}"](*maps)


HEADS = {"linear": LinearHead, "dpt": DPTHead}


def as_map(tokens, size):
    """Tokens ``(B, N, C)`` of an image of ``size`` in pixels as a map ``(B, C, H / 16, W / 16)``."""
    return tokens.transpose(1, 2).unflatten(-1, (size[0] // PATCH, size[1] // PATCH))


def points_and_confidence(raw):
    """Points ``(B, H, W, 3)`` and confidence above 1 ``(B, H, W)`` from a head's output ``(B, 4, H, W)``."""
    # Not norm(dim=1), which a CPU takes long for; away from zero, where the root has no slope.
    length = raw[:, :3].square().sum(1, keepdim=True).clamp(min=1e-16).sqrt()
    points = raw[:, :3] * (length.expm1() / length)
    return points.permute(0, 2, 3, 1), 1 + raw[:, 3].exp()


class DUSt3R(nn.Module):
    """The network, with random weights; ``load_checkpoint`` makes one with the public weights.

    Args:
        head_type: ``dpt`` or ``linear``.
        img_size: (height, width) in pixels, or one side, that the weights were trained for; only kept for reference, as
            every side that is a multiple of 16 will do.
        enc_embed_dim, enc_depth, enc_num_heads: width, blocks and attention heads of the encoder.
        dec_embed_dim, dec_depth, dec_num_heads: the same of each of the two decoders.
    """

    def __init__(
        self, head_type="dpt", img_size=(512, 512), enc_embed_dim=1024, enc_depth=24, enc_num_heads=16,
        dec_embed_dim=768, dec_depth=12, dec_num_heads=12,
    ):  # fmt: skip
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.checkpoint, self.digest = "random weights", None
        self.encoder_head_channels = enc_embed_dim // enc_num_heads
        self.decoder_head_channels = dec_embed_dim // dec_num_heads
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec_embed_dim), requires_grad=False)  # of the pretraining
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, enc_embed_dim, PATCH, stride=PATCH)})
        self.enc_blocks = nn.ModuleList(EncoderBlock(enc_embed_dim, enc_num_heads) for _ in range(enc_depth))
        self.enc_norm = LayerNorm(enc_embed_dim)
        self.decoder_embed = nn.Linear(enc_embed_dim, dec_embed_dim)
        self.dec_blocks = nn.ModuleList(DecoderBlock(dec_embed_dim, dec_num_heads) for _ in range(dec_depth))
        self.dec_norm = LayerNorm(dec_embed_dim)
        self.dec_blocks2 = nn.ModuleList(DecoderBlock(dec_embed_dim, dec_num_heads) for _ in range(dec_depth))
        self.downstream_head1, self.downstream_head2 = (
            HEADS[head_type](enc_embed_dim, dec_embed_dim, dec_depth) for _ in range(2)
        )

    def forward(self, image1, image2):
        """Encode and decode a batch of pairs.

        Args:
            image1, image2: ``(B, 3, H, W)`` RGB in [-1, 1]; the two sizes may differ.

        Returns:
            See ``decode``.

        Raises:
            ValueError: a side is no multiple of 16.
        """
        return self.decode(self.encode(image1), self.encode(image2), image1.shape[-2:], image2.shape[-2:])

    def encode(self, image):
        """Encoder tokens ``(B, H / 16 * W / 16, enc_embed_dim)`` of images ``(B, 3, H, W)``, RGB in [-1, 1]."""
        check_size(image.shape[-2:])
        tokens = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)
        # Under autocast the sum over the blocks would otherwise be kept in half precision.
        tokens = tokens.to(self.enc_norm.weight.dtype)
        rope = rope_tables(image.shape[-2:], self.encoder_head_channels, image.device)
        for block in self.enc_blocks:
            tokens = block(tokens, rope)
        return self.enc_norm(tokens)

    def finest(self, tokens, size, view):
        """What the head of ``view`` (1 or 2) makes of the encoder's tokens alone; ``None`` if nothing."""
        head = self.downstream_head1 if view == 1 else self.downstream_head2
        with torch.autocast(tokens.device.type, enabled=False):
            return head.finest(tokens.float(), size)

    def decode(self, tokens1, tokens2, size1, size2=None, finest=(None, None)):
        """Both views' pointmaps from their encoder tokens.

        Args:
            tokens1, tokens2: what ``encode`` gave for the two images.
            size1, size2: (height, width) of the two images in pixels; one is enough where they are alike.
            finest: what ``finest`` gave for the two images, if it is at hand.

        Returns:
            A dict of ``pts3d_1`` and ``pts3d_2_in_view1`` ``(B, H, W, 3)``, both in view 1's camera frame, and of
            ``conf_1`` and ``conf_2`` ``(B, H, W)``, above 1.
        """
        size2 = size1 if size2 is None else size2
        layers1, layers2 = self.decoder_layers(tokens1, tokens2, size1, size2)
        return self.pointmaps(layers1, layers2, size1, size2, finest)

    def pointmaps(self, layers1, layers2, size1, size2, finest=(None, None)):
        """The heads: from what ``decoder_layers`` gave to what ``decode`` returns."""
        with torch.autocast(layers1[0].device.type, enabled=False):  # bfloat16's 8 bits are some 4 mm in a metre
            points1, confidence1 = points_and_confidence(self.downstream_head1(layers1, size1, finest[0]))
            points2, confidence2 = points_and_confidence(self.downstream_head2(layers2, size2, finest[1]))
        return {"pts3d_1": points1, "conf_1": confidence1, "pts3d_2_in_view1": points2, "conf_2": confidence2}

    def decoder_layers(self, tokens1, tokens2, size1, size2):
        """What the heads read: for each view a list of its encoder tokens and every decoder layer ``(B, N, C)``."""
        rope1, rope2 = (rope_tables(size, self.decoder_head_channels, tokens1.device) for size in (size1, size2))
        layers1, layers2 = [tokens1], [tokens2]
        x1, x2 = (self.decoder_embed(tokens).to(tokens.dtype) for tokens in (tokens1, tokens2))
        for block1, block2 in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            x1, x2 = block1(x1, x2, rope1, rope2), block2(x2, x1, rope2, rope1)
            layers1.append(x1)
            layers2.append(x2)
        layers1[-1], layers2[-1] = self.dec_norm(x1), self.dec_norm(x2)
        return layers1, layers2


def check_size(size):
    if any(side % PATCH or not side for side in size):
        raise ValueError(f"image size {tuple(size)}: DUSt3R needs both sides to be multiples of {PATCH}")


def load_checkpoint(source="auto", device="cpu", cache=None, token=None, revision=None):
    """DUSt3R with a checkpoint's weights, in float32 and evaluation mode.

    Args:
        source: the id of a Hugging Face repository (``OWNER/NAME`` or ``OWNER/NAME@REVISION``; ``auto`` is
            ``DEFAULT_CHECKPOINT``), a folder with model.safetensors and config.json, a ``.safetensors`` file, or the
            authors' ``.pth`` file. Without a config.json beside it, attention heads of 64 channels are assumed, as all
            public checkpoints have them.
        device: where the network goes.
        cache: folder of the downloads; by default the hub client's own.
        token: of the Hugging Face hub; the public checkpoints need none.
        revision: commit, tag or branch of the hub repository, so that a run can pin what it loads.

    Raises:
        CheckpointError: the hub cannot be reached, a file is missing or unreadable, a pickle holds more than tensors,
            or a tensor is missing, unknown or of another shape; the message names it.
    """
    file = locate_checkpoint(source, cache, token, revision)
    digest = _checked_digest(file)
    model = _build(_read_tensors(file), file)
    model.checkpoint = file.stem if Path(source).is_file() else _name_of(source)
    model.digest = digest
    return model.to(device, memory_format=torch.channels_last).eval()  # a sixth faster in the DPT head


def locate_checkpoint(source="auto", cache=None, token=None, revision=None):
    """The checkpoint's file, downloaded if need be; see ``load_checkpoint`` for arguments and errors."""
    source = DEFAULT_CHECKPOINT if source == "auto" else source
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        repository, _, pinned = str(source).partition("@")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or path.suffix in (".safetensors", ".pth"):
            raise CheckpointError(f"{source}: no such file or folder, and no id of a Hugging Face repository")
        path = _download(repository, cache, token, pinned or revision)
    if not (path / "model.safetensors").is_file():
        raise CheckpointError(f"{path / 'model.safetensors'}: missing; put the checkpoint there, or give its path")
    return path / "model.safetensors"


def _name_of(source):
    return Path(DEFAULT_CHECKPOINT if source == "auto" else str(source).partition("@")[0]).resolve().name


def _checked_digest(file):
    digest = artefacts.file_digest(file)
    stated = file.resolve().name  # the hub's cache names a large file by the SHA-256 that the hub states
    if re.fullmatch("[0-9a-f]{64}", stated) and not stated.startswith(digest):
        raise CheckpointError(f"{file}: damaged, as its SHA-256 begins with {digest} and not with {stated[:16]}; "
                              f"delete {file.resolve()}, and it is downloaded again")  # fmt: skip
    return digest


def _download(repository, cache, token, revision):
    """Folder with the repository's files: the cached ones, or else downloaded by the hub's client.

    The client shows its progress and goes on after a broken connection, but starts a file anew after a killed run.
    """
    from huggingface_hub import constants, errors, hf_hub_download, utils

    # The client reads the variable only once, when it is first imported.
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    wanted = {"repo_id": repository, "revision": revision, "cache_dir": cache, "token": token, "endpoint": endpoint}
    fetch = partial(hf_hub_download, **wanted, etag_timeout=HUB_TIMEOUT)
    try:
        for name in HUB_FILES:
            try:
                file = fetch(filename=name, local_files_only=True)
            except errors.LocalEntryNotFoundError:
                # Without a hub the client would go on trying for a minute and more.
                utils.get_session().head(endpoint, timeout=HUB_TIMEOUT)
                file = fetch(filename=name)
    except Exception as error:  # of the hub's client, of its transport, or of the system
        raise CheckpointError(
            f"{repository}: {name} could not be had from {endpoint} ({type(error).__name__}: {_first_line(error)}). "
            f"Two ways out: download {' and '.join(HUB_FILES)} by hand from https://huggingface.co/{repository} and "
            "give their folder as the checkpoint; or choose the teacher 'depth', which needs no checkpoint."
        ) from error
    return Path(file).parent


def _read_tensors(file):
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to load the file without this protection, so it is not shown.
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        cause = f"refused, as its pickle calls for {culprit[1]}" if culprit else "damaged, or no checkpoint"
        raise CheckpointError(f"{file}: {cause}; get the checkpoint's .safetensors file instead") from None
    except Exception as error:  # a damaged file fails in many ways
        raise CheckpointError(f"{file}: unreadable ({_first_line(error)}); download it again") from error
    tensors = contents.get("model", contents) if isinstance(contents, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{file}: holds no dict of tensors under 'model'")
    return tensors


def _first_line(error):
    return (str(error).strip() or "no details").splitlines()[0]


def _build(given, file):
    """The network that the tensors describe, with exactly these tensors."""
    tensors = {_canonical(name): tensor for name, tensor in given.items()}
    with torch.device("meta"):  # spares the memory and the time of random weights
        model = DUSt3R(**_architecture(tensors, file))
    expected = model.state_dict()
    shapes = {_canonical(name): tensor.shape for name, tensor in expected.items()}
    faults = [f"{name} is missing" for name in shapes if name not in tensors and not UNUSED.fullmatch(name)]
    faults += [f"{name} is unknown" for name in tensors if name not in shapes]
    twice = [name for name in given if name != _canonical(name) and _canonical(name) in given]
    faults += [f"{name} is not {_canonical(name)}" for name in twice if not given[name].equal(given[_canonical(name)])]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{file}: no DUSt3R of a known kind: tensor " + "; tensor ".join(faults[:5]) + more)
    unused = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in tensors}
    complete = {name: tensor.float() for name, tensor in (tensors | unused).items()}
    model.load_state_dict({name: complete[_canonical(name)] for name in expected}, assign=True)
    return model


def _canonical(name):
    return re.sub(r"scratch\.layer_rn\.(\d)\.", lambda match: f"scratch.layer{int(match[1]) + 1}_rn.", name)


def _architecture(tensors, file):
    """Arguments of ``DUSt3R``: what the tensors show; the rest from the config.json beside the file if there is one."""
    config_file = file.with_name("config.json")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{config_file}: no valid JSON ({error}); download it again") from error
    shown = {}
    for side in ("enc", "dec"):
        shown[f"{side}_depth"], shown[f"{side}_embed_dim"] = _depth_and_width(tensors, side, file)
    for key, value in shown.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{config_file}: {key} is {config[key]}, but {file.name} shows {value}")
    for side in ("enc", "dec"):
        width = shown[f"{side}_embed_dim"]
        heads = shown[f"{side}_num_heads"] = config.get(f"{side}_num_heads", width // HEAD_CHANNELS)
        if not heads or width % (4 * heads):
            raise CheckpointError(f"{file}: {width} channels make no {heads} heads; {config_file} must say how many")
    head_type = "dpt" if any(".dpt." in name for name in tensors) else "linear"
    return {**shown, "head_type": head_type, "img_size": config.get("img_size", 512)}


def _depth_and_width(tensors, side, file):
    norms = re.compile(rf"{side}_blocks2?\.(\d+)\.norm")
    found = [(int(match[1]), tensor.numel()) for name, tensor in tensors.items() if (match := norms.match(name))]
    if not found:
        raise CheckpointError(f"{file}: no DUSt3R checkpoint, as tensors {side}_blocks.* are missing")
    blocks, widths = zip(*found, strict=True)
    # The commonest, so that one bad tensor is named and not all the others.
    return max(blocks) + 1, mode(widths)
