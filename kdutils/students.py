"""The students: one RGB image in, one 3D point in the world frame for every pixel out.

The arms of arXiv 2412.02039 share the same end, a pixel-shuffle head, and differ in what comes before it: a plain CNN,
MobileNetV3-Large or a Vision Transformer. Backbones and their pretrained weights are timm's. The study's own student is
in ``anchornet``, whose head a Vision Transformer can have as well (``anchorvit``), the two of the original study's code
in ``original``. Weights pretrained on rendered rooms come with the study (``shipped``), for where timm's cannot be had.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT as HF_ENDPOINT
from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdutils import anchornet, artefacts, losses, original, shipped
from kdutils.settings import Arm

# timm's names; the hub's repository is the same under "timm/".
TIMM_MODELS = {
    **dict.fromkeys(("mobilenet", "original-mobilenet"), "mobilenetv3_large_100.ra_in1k"),
    **dict.fromkeys(("vit", "anchorvit"), "vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
}
SHIPPED_AS = {"original-mobilenet": "mobilenet", "anchorvit": "vit16"}
ANCHORVIT_PATCH = 8  # pixels, where images are not reduced for an AnchorNet
HUB_SECONDS = 5
LEAST_LOG_SCALE = -6.0  # 2.5 mm: nothing here is known better


@dataclass(frozen=True)
class Weights:
    """Where a backbone's weights came from: ``origin`` is "hub", "shipped", "file", "random"; ``note`` says more."""

    origin: str
    note: str
    path: str | None = None


class Prediction(NamedTuple):
    """World points ``(B, 3, H, W)`` in metres, and the logarithm of their uncertainty in metres, or None.

    The uncertainty ``(B, 1, H, W)`` is the expected distance between a predicted and a true point.
    """

    points: torch.Tensor
    log_scale: torch.Tensor | None


class Student(nn.Module):
    """Backbone, head, and the step from the network's unit to metres in the world frame.

    Takes images ``(B, 3, H, W)`` in [0, 1] and returns a ``Prediction``, made of offsets from the scene's centre in
    units of its extent.
    """

    def __init__(self, backbone, head, size):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.size = tuple(size)
        self.frozen = False
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("extent", torch.ones(()))

    def place(self, points):
        """Set the scene's centre and extent from labelled world points ``(M, 3)`` in metres."""
        self.centre.copy_(points.mean(0))
        self.extent.copy_((points - self.centre).square().mean().sqrt())
        if hasattr(self.head, "place"):
            self.head.place((points - self.centre) / self.extent)
        return self

    def freeze_backbone(self):
        """Only the head learns; batch norm keeps its stored statistics."""
        self.frozen = True
        self.backbone.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images):
        height, width = images.shape[-2:]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(padded(images, self.backbone.multiple))
        said = self.head(features)[..., :height, :width].float()
        points = self.centre[:, None, None] + self.extent * said[:, :3]
        return Prediction(points, said[:, 3:].clamp(min=LEAST_LOG_SCALE) if said.shape[1] > 3 else None)


def padded(images, multiple):
    """Images ``(B, 3, H, W)`` whose border is repeated until their sides are multiples of ``multiple``."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


class PixelShuffleHead(nn.Module):
    """Two 1x1 layers, pixel shuffle to a quarter of the image's resolution, bilinear to all of it, a 3x3 refinement.

    Surfaces are smooth: a free channel for each of a patch's pixels is noisier and slower to learn than every fourth.
    """

    coarse = 4

    def __init__(self, channels, stride, outputs=3, hidden=256):
        super().__init__()
        self.shuffle = stride // self.coarse
        self.mix = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.GELU())
        # A 1x1 convolution written as a matrix product, which is far faster on a grid of few large patches.
        self.points = nn.Linear(hidden, outputs * self.shuffle**2)
        self.refine = nn.Conv2d(outputs, outputs, 3)

    def forward(self, features):
        mixed = self.mix(features).float()
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 has steps of a centimetre in a room
            patches = self.points(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            points = F.pixel_shuffle(patches, self.shuffle)
            points = F.interpolate(points, scale_factor=self.coarse, mode="bilinear", align_corners=False)
            return points + self.refine(anchornet.bordered(points))


class VanillaCNN(nn.Module):
    """Plain 5x5 convolutions: four that halve the resolution, then three that see far around."""

    stride, multiple, channels = 16, 16, 128

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 96, self.channels)
        halving = [_convolution(a, b, stride=2) for a, b in zip(widths, widths[1:])]
        level = [_convolution(self.channels, self.channels, stride=1) for _ in range(3)]
        self.layers = nn.Sequential(*halving, *level)

    def forward(self, images):
        return self.layers(images - 0.5)


class MobileNet(nn.Module):
    """MobileNetV3-Large up to stride 16 (112 channels)."""

    stride, multiple, channels = 16, 16, 112

    def __init__(self):
        super().__init__()
        self.body = timm.create_model(TIMM_MODELS["mobilenet"], features_only=True, out_indices=(3,))
        self.body.blocks = self.body.blocks[:5]  # timm keeps the stages after stride 16, where nothing is read
        self.normalise = Normalise(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def load(self, path):
        full = timm.create_model(TIMM_MODELS["mobilenet"], pretrained=True, pretrained_cfg_overlay={"file": path})
        own = self.body.state_dict()
        self.body.load_state_dict({name: full.state_dict()[name] for name in own})

    def forward(self, images):
        return self.body(self.normalise(images))[0]


class VisionTransformer(nn.Module):
    """ViT-Tiny (width 192), its first blocks; other patch sizes resample the pretrained patch embedding (FlexiViT).

    Images of another size than ``size`` resample the position embedding.
    """

    channels = 192

    def __init__(self, size, patch, blocks=12):
        super().__init__()
        self.stride, self.multiple, self.blocks = patch, patch, blocks
        self.size = tuple(patch * count for count in _grid(size, patch))
        self.body = self._create()
        self.normalise = Normalise(IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)

    def _create(self, **options):
        body = timm.create_model(
            TIMM_MODELS["vit"], img_size=self.size, patch_size=self.stride, num_classes=0, global_pool="",
            dynamic_img_size=True, **options,
        )  # fmt: skip
        body.blocks = body.blocks[: self.blocks]
        return body

    def load(self, path):
        self.body = self._create(pretrained=True, pretrained_cfg_overlay={"file": path})

    def forward(self, images):
        tokens = self.body(self.normalise(images))[:, self.body.num_prefix_tokens :]
        rows, columns = (side // self.stride for side in images.shape[-2:])
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))


class Normalise(nn.Module):
    """Images in [0, 1] to the mean and deviation that a pretrained backbone expects."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None], persistent=False)

    def forward(self, images):
        return (images - self.mean) / self.deviation


def build(arm, size, weights="auto", vit_blocks=12, uncertainty=False):
    """A student for one arm of the study, freshly started.

    Args:
        arm: ``settings.Arm``.
        size: (height, width) of the images in pixels.
        weights: see ``find_weights``; an arm that names its own keeps to them.
        vit_blocks: of a ViT's twelve, those that are used.
        uncertainty: whether a pixel-shuffle head predicts it; AnchorNet's always does, the original study's never.

    Returns:
        The student and the ``Weights`` that it started from.

    Raises:
        ValueError: weights in a file are of another network.
    """
    backbone = BACKBONES[arm.backbone](arm, size, vit_blocks)
    head = HEADS.get(arm.backbone, partial(PixelShuffleHead, outputs=3 + uncertainty))
    student = Student(backbone, head(backbone.channels, backbone.stride), size)
    if arm.start == "scratch":
        return student, Weights("random", "random weights, as this arm asks for")
    found = find_weights(arm, arm.weights or weights, vit_blocks)
    if found.origin == "shipped":
        _load_shipped(student.backbone, backbone_name(arm))
    elif found.path:
        try:
            student.backbone.load(found.path)
        except RuntimeError as error:
            cause = str(error).splitlines()[-1].strip()
            raise _of_another_network(found.path, TIMM_MODELS[arm.backbone], cause) from error
    if arm.start == "frozen":
        student.freeze_backbone()
    return student, found


def load(folder):
    """A trained student from its run's folder, as ``training.run_arm`` left it there; on the CPU, ready to predict.

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    made = artefacts.read_json(Path(folder) / "student.json")["settings"]
    uncertainty = losses.needs_uncertainty(made["plan"]["recipe"]["loss"])
    student, _ = build(Arm(**made["arm"]), made["size"], "random", made["vit_blocks"], uncertainty)
    kept = artefacts.read_tensors(Path(folder) / "student.safetensors")
    student.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in kept.items()})
    return student.eval()


def deployed(student, dtype=torch.float32):
    """A copy of a trained student that answers faster, and the same but for rounding; it cannot be trained further.

    Each batch norm becomes part of the convolution before it. ``dtype`` is what the backbone keeps its weights in:
    bfloat16 where it computes in that (under autocast), which would convert them anew for every image.
    """
    student = _without_batch_norm(copy.deepcopy(student).eval().requires_grad_(False))
    for layer in student.backbone.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(dtype)
    return student


def _without_batch_norm(module):
    children = list(module.named_children())
    for (name, layer), (name_after, after) in zip(children, children[1:]):
        if isinstance(layer, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, after))
            setattr(module, name_after, getattr(after, "act", nn.Identity()))  # timm's norm has its activation in it
    for child in module.children():
        _without_batch_norm(child)
    return module


BACKBONES = {
    "cnn": lambda arm, size, blocks: VanillaCNN(),
    "mobilenet": lambda arm, size, blocks: MobileNet(),
    "vit": lambda arm, size, blocks: VisionTransformer(size, arm.patch, blocks),
    "anchornet": lambda arm, size, blocks: anchornet.AnchorPyramid(size),
    "original-cnn": lambda arm, size, blocks: original.OriginalCNN(),
    "original-mobilenet": lambda arm, size, blocks: MobileNet(),
    "anchorvit": lambda arm, size, blocks: VisionTransformer(size, ANCHORVIT_PATCH * anchornet.reduction(size), blocks),
}
HEADS = {"anchornet": anchornet.AnchorHead, "anchorvit": anchornet.AnchorHead, "original-cnn": original.OriginalCNNHead,
         "original-mobilenet": original.OriginalMobileNetHead}  # fmt: skip


def find_weights(arm, weights="auto", vit_blocks=12):
    """The pretrained weights that an arm (``settings.Arm``) starts from.

    Args:
        weights: "timm" for timm's hub; "shipped" for those that come with the study; "auto" for the first of the two
            that can be had; "random" for none; or a folder with ``TIMM_NAME.safetensors``, or such a file. timm has no
            AnchorNet: there "timm" is "random", and a folder or file is "shipped".
        vit_blocks: of a ViT; shipped weights fit one number only.

    Raises:
        FileNotFoundError: a file or folder was given and does not hold them.
        ValueError: the file is damaged, or of another network.
        shipped.ShippedError: the shipped ones are damaged.
    """
    name = TIMM_MODELS.get(arm.backbone)
    if weights == "random":
        return Weights("random", "random weights, as was asked for")
    if weights in ("auto", "timm") and name:
        found = _from_hub(name)
        if found.path or weights == "timm":
            return found
    elif weights == "timm":
        return Weights("random", "RANDOM WEIGHTS: timm has no such network")
    elif weights not in ("auto", "shipped") and name:
        path = Path(weights)
        path = path / f"{name}.safetensors" if path.is_dir() else path
        if not path.is_file() or path.suffix != ".safetensors":
            raise FileNotFoundError(f"{path}: no such weights. Give {name}.safetensors or a folder that holds it.")
        _check_weights(path, name)
        return Weights("file", f"pretrained, {path.name}", str(path))
    return _from_the_study(backbone_name(arm), vit_blocks)


def _check_weights(path, name):
    """timm would leave random what a file of ViT weights lacks."""
    try:
        with safe_open(path, "pt") as file:
            there = {*file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: unreadable ({error}). Download timm's {name}.safetensors again.") from error
    missing = {weights for weights, _ in timm.create_model(name, num_classes=0).named_parameters()} - there
    if missing:
        raise _of_another_network(path, name, f"{len(missing)} are missing, {min(missing)} for one")


def _of_another_network(path, name, cause):
    return ValueError(f"{path}: not the weights of {name} ({cause}). Give timm's {name}.safetensors.")


def backbone_name(arm):
    """What the shipped weights of an arm's backbone are called, such as vit16."""
    return SHIPPED_AS.get(arm.backbone, arm.backbone + str(arm.patch or ""))


def _from_the_study(name, vit_blocks):
    blocks = shipped.card(name)["settings"].get("vit_blocks")
    if blocks not in (None, vit_blocks):
        return Weights("random", f"RANDOM WEIGHTS: the study's own ViT has {blocks} blocks, not {vit_blocks}")
    return Weights("shipped", f"pretrained on rendered rooms, data/weights/{name}", str(shipped.locate(name)))


def _load_shipped(backbone, name):
    tensors = shipped.tensors(name)
    if isinstance(backbone, VisionTransformer):
        patches, positions, stride = "body.patch_embed.proj.weight", "body.pos_embed", backbone.stride
        old = _grid(shipped.card(name)["settings"]["size"], tensors[patches].shape[-1])
        new, prefix = _grid(backbone.size, stride), backbone.body.num_prefix_tokens
        tensors[positions] = resample_abs_pos_embed(tensors[positions], new, old, prefix)
        tensors[patches] = resample_patch_embed(tensors[patches], [stride, stride])
    backbone.load_state_dict(tensors)


def _grid(size, patch):
    """(rows, columns) of patches that cover an image of ``size`` (height, width)."""
    return [-(-side // patch) for side in size]


@lru_cache
def _from_hub(name):
    kept = try_to_load_from_cache(f"timm/{name}", "model.safetensors")
    if isinstance(kept, str):
        return Weights("hub", f"pretrained, timm/{name}", kept)
    try:
        # The hub's client asks again for half a minute where there is no network: knock first.
        urlopen(Request(HF_ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
        path = hf_hub_download(f"timm/{name}", "model.safetensors", etag_timeout=HUB_SECONDS)
    except Exception as error:  # whatever the network or the hub's client raises, the study goes on and says so
        cause = type(error).__name__
        return Weights("random", f"RANDOM WEIGHTS: timm's hub could not be reached ({cause}) and no file was given")
    return Weights("hub", f"pretrained, timm/{name}", path)


def _convolution(inputs, outputs, stride):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 5, stride=stride, padding=2, bias=False), nn.BatchNorm2d(outputs), nn.GELU()
    )
