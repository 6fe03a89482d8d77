"""The one place for settings: what a study is, its presets, and where its artefacts lie."""

import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from kdutils.artefacts import read_json
from kdutils.scenes import BUILDINGS

REPOSITORY = Path(__file__).resolve().parent.parent
TEACHERS = ("depth", "dust3r", "compact")


@dataclass(frozen=True)
class Arm:
    """One student of the study: a backbone, how it starts, and what of it learns.

    ``start`` is "scratch" (random), "frozen" (pretrained, only the head learns) or "unfrozen" (pretrained, all learns).
    ``loss`` and ``budget``, in shares of the preset's, take the place of the recipe's, and ``weights`` that of the
    study's, see ``students.find_weights``.
    """

    name: str
    backbone: str
    start: str
    patch: int | None = None
    loss: str | None = None
    budget: float = 1.0
    weights: str | None = None


def _by_name(*arms):
    return {arm.name: arm for arm in arms}


STARTS = ("frozen", "unfrozen", "scratch")
PAPER_ARMS = _by_name(
    Arm("cnn-scratch", "cnn", "scratch"),
    *(Arm(f"mobilenet-{start}", "mobilenet", start) for start in STARTS),
    *(Arm(f"vit{patch}-{start}", "vit", start, patch) for patch in (16, 32, 64) for start in STARTS),
)
OWN_ARMS = _by_name(
    *(Arm(f"anchornet-{start}", "anchornet", start) for start in STARTS),
)
LONG_ARMS = _by_name(
    Arm("anchornet-long", "anchornet", "unfrozen", budget=8),
    Arm("vit16-long", "vit", "unfrozen", 16, budget=8),
    Arm("anchorvit-long", "anchorvit", "unfrozen", budget=8),
)
ORIGINAL_ARMS = _by_name(
    Arm("original-mobilenet", "original-mobilenet", "unfrozen"),
    Arm("original-cnn", "original-cnn", "scratch"),
)
ABLATION_LOSSES = ("mse", "l1", "huber", "confidence", "laplace", "laplace+mse", "laplace+mse+0.01*reprojection")
ABLATION_ARMS = _by_name(
    *(Arm("-".join(["mobilenet-frozen", *re.findall("[a-z][a-z0-9]+", loss)]), "mobilenet", "frozen", None, loss, 0.5)
      for loss in ABLATION_LOSSES),
    Arm("mobilenet-frozen-eighth", "mobilenet", "frozen", budget=0.125),
    *(Arm(f"{frozen.name}-random", frozen.backbone, "frozen", frozen.patch, weights="random")
      for frozen in (*PAPER_ARMS.values(), *OWN_ARMS.values()) if frozen.start == "frozen"),
)  # fmt: skip
ARMS = {**PAPER_ARMS, **OWN_ARMS, **LONG_ARMS, **ORIGINAL_ARMS, **ABLATION_ARMS}
VIT_ARMS = tuple(name for name, arm in ARMS.items() if arm.backbone in ("vit", "anchorvit"))
CNN_ARMS = tuple(name for name in ARMS if name not in VIT_ARMS)


@dataclass(frozen=True)
class Augmentation:
    """Largest changes; see ``augmentation.Examples.augmented``."""

    rotation: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    colour: float = 0.0
    blur: float = 0.0
    travel: float = 0.0
    look: float = 0.0


MILD = Augmentation(rotation=4, zoom=0.1, shift=0.06, colour=0.15)  # for ten epochs
STRONG = Augmentation(rotation=30, zoom=0.5, shift=0.2, colour=0.2, blur=0.7, travel=0.5, look=15)  # for hundreds


@dataclass(frozen=True)
class Recipe:
    """How a kind of student learns: which loss and schedule ("cosine" or "constant"), augmented or not.

    ``adamw`` has the beginnings of the names of weights that AdamW teaches; of others Muon teaches the matrices
    (``optimisers.choose``).
    """

    learning_rate: float
    loss: str = "mse"  # see losses.choose
    augmented: bool = True
    schedule: str = "cosine"
    weight_decay: float = 0.01
    averaged: bool = False  # the student is the running mean of its weights in the second half
    adamw: tuple[str, ...] = ()
    coarse: float = 0.0  # share of the budget, at first, with images made smaller by the preset's `reduction`


RECIPES = {
    "cnn": Recipe(2e-3),
    "mobilenet": Recipe(2e-3),
    "mobilenet-scratch": Recipe(6e-3),
    "vit": Recipe(2e-3),
    "vit-scratch": Recipe(4e-3),
    "frozen": Recipe(5e-3),  # the head alone, on a frozen backbone
    # AdamW for the head: with Muon for it too AnchorNet had 0.0061 m² after 240 s, and 0.0054 without.
    "anchornet": Recipe(6e-3, "laplace+mse", averaged=True, adamw=("head",), coarse=0.6),
    "anchorvit": Recipe(2e-3, "laplace+mse", averaged=True, adamw=("head",), coarse=0.6),
    "original-cnn": Recipe(1e-4, augmented=False, schedule="constant", weight_decay=0.0, adamw=("backbone", "head")),
    "original-mobilenet": Recipe(
        1e-3, augmented=False, schedule="constant", weight_decay=0.0, adamw=("backbone", "head")
    ),
}


def recipe_of(arm):
    """How an arm learns; one from scratch may ask for a higher rate than a pretrained one."""
    usual = RECIPES["frozen" if arm.start == "frozen" else arm.backbone]
    recipe = RECIPES.get(f"{arm.backbone}-{arm.start}", usual)
    return replace(recipe, loss=arm.loss or recipe.loss)


@dataclass(frozen=True)
class Pretraining:
    """How long weights that ship are trained, and how: to the end of ``steps`` or ``seconds``, whichever comes first.

    ``rooms`` rendered ones are learned from at a time; every ``steps_a_room`` steps one gives way to a new one.
    """

    steps: int
    batch: int
    rooms: int
    steps_a_room: int
    learning_rate: float = 1e-3
    seconds: float | None = None
    validations: int = 20
    seed: int = 0
    weight_decay: float = 0.01
    schedule: str = "cosine"
    bfloat16: tuple[str, ...] = ("cuda", "cpu")  # kinds of device that train with it


@dataclass(frozen=True)
class BackbonePretraining(Pretraining):
    """The same for backbones. Batches are in rooms; ``distillation`` weighs the compact DUSt3R's features."""

    distillation: float = 1.0


# "cuda" is the experiment itself, not yet run to its end; "cpu" is what a small machine can do in an hour or two.
COMPACT_PLANS = {
    "smoke": Pretraining(steps=4, batch=2, rooms=2, steps_a_room=4, validations=2),
    "cpu": Pretraining(steps=10_000, batch=8, rooms=200, steps_a_room=25),
    "cuda": Pretraining(steps=120_000, batch=64, rooms=1000, steps_a_room=60, validations=60),
}
BACKBONE_PLANS = {
    "smoke": BackbonePretraining(steps=4, batch=1, rooms=2, steps_a_room=2, validations=2),
    "cpu": BackbonePretraining(steps=1_000_000, batch=2, rooms=150, steps_a_room=20, seconds=1000, validations=10),
    "cuda": BackbonePretraining(steps=40_000, batch=16, rooms=1000, steps_a_room=20, validations=40),
}


@dataclass(frozen=True)
class Preset:
    """Everything that decides a run's result besides scene, teacher, device and seed."""

    scenes: tuple[str, ...]
    size: tuple[int, int]  # (height, width) in pixels of images and labels
    render_every: int  # keep each k-th frame of the sample rooms' camera paths
    most_train: int  # frames; more are thinned evenly
    most_test: int
    pair_graph: str  # overlap, or by the order of capture: swin, logwin, oneref, complete
    window: int  # of swin and logwin
    steps: int  # an arm's budget: at most so many optimiser steps
    batch: int
    validations: int  # in the course of an arm's training
    first_scene_arms: tuple[str, ...]
    other_scene_arms: tuple[str, ...]
    seconds: float | None = None  # an arm's budget: at most so long
    augmentation: Augmentation = MILD
    bfloat16: tuple[str, ...] = ("cuda",)  # kinds of device that train with it
    vit_blocks: int = 12  # the paper has ViTs of 4 and of 12
    teacher: str = "compact"
    other_teacher: str = "compact"  # where DUSt3R's checkpoint cannot be had; it has seen rendered rooms only
    validation_share: float = 0.15  # of each training sequence, in several stretches
    min_confidence: float = 1.5  # pointmap pixels below it are no labels
    # Teachers that known cameras, pictures and other views help: posing, photometric, consistency, completion.
    assisted: tuple[str, ...] = ("compact",)
    stereo: bool = False  # fills what these leave out, in minutes: for budgets long enough to gain by it
    reduction: int = 1  # of images in the coarse part of a recipe: a student learns from more of them in the same time
    compile: bool = False  # torch.compile: for budgets of many minutes
    deterministic: bool = False  # on CUDA, at a price; the CPU always is


_SAMPLE = Preset(
    scenes=("kitchen", "office"), size=(96, 128), render_every=1, most_train=240, most_test=100,
    pair_graph="overlap", window=3, vit_blocks=4, steps=200, batch=8, validations=4,
    first_scene_arms=tuple(name for name in ARMS if name not in (*LONG_ARMS, "original-cnn")),
    other_scene_arms=("cnn-scratch", "mobilenet-unfrozen", "vit16-unfrozen", "vit16-scratch", "anchornet-scratch"),
)  # fmt: skip
PRESETS = {
    "smoke": replace(
        _SAMPLE, scenes=("kitchen",), render_every=8, most_train=24, most_test=8, steps=4, batch=4, validations=2,
    ),
    "sample": _SAMPLE,
    "hour": replace(
        _SAMPLE, scenes=("kitchen",), reduction=2, stereo=True, most_train=400, seconds=240, steps=100_000, batch=32,
        teacher="depth", other_teacher="depth",
        validations=10, augmentation=STRONG, bfloat16=("cuda", "cpu"),
        first_scene_arms=(
            "cnn-scratch", "mobilenet-scratch", "vit16-scratch", "original-mobilenet", *OWN_ARMS, "anchornet-long",
        ),
    ),
    "gpu": replace(
        _SAMPLE, stereo=True, most_train=400, seconds=30, steps=1_000_000, batch=128, validations=10,
        augmentation=STRONG, first_scene_arms=tuple(ARMS), other_scene_arms=(*_SAMPLE.other_scene_arms, *LONG_ARMS),
    ),
    "study": replace(
        _SAMPLE, scenes=("apt1/kitchen", "apt2/kitchen", "office1/gates362", "office2/5a"), size=(384, 512),
        most_train=1000, most_test=400, steps=100_000, seconds=30, batch=16, validations=10, augmentation=STRONG,
        first_scene_arms=tuple(ARMS), other_scene_arms=(*PAPER_ARMS, *OWN_ARMS, "anchornet-long", "anchorvit-long"),
        vit_blocks=12, teacher="dust3r", other_teacher="depth",
    ),
}  # fmt: skip


class Study:
    """One scene, one teacher, one preset: what every notebook starts from.

    Artefacts lie under ``data/`` (preset ``sample``) or ``data/PRESET/``, so that presets never overwrite one another;
    the environment variable ``KDUTILS_DATA`` moves them elsewhere. A scene is a name or the path of a scene folder.
    ``seconds`` take the place of the preset's budget, and such students have folders of their own.

    Raises:
        ValueError: an unknown preset, teacher or device, of which the message names the known ones; no budget.
    """

    def __init__(self, scene="kitchen", preset="sample", teacher="auto", device="auto", seed=0, seconds=None):
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
        self.preset_name, self.preset, self.seed, self.seconds = preset, PRESETS[preset], int(seed), seconds
        if seconds is not None:
            if not seconds > 0:
                raise ValueError(f"an arm's budget of {seconds} seconds: give more than 0")
            self.preset = replace(self.preset, seconds=seconds, steps=1_000_000)
        self.asked_teacher = self.preset.teacher if teacher == "auto" else teacher
        if self.asked_teacher not in TEACHERS:
            raise ValueError(f"unknown teacher {teacher!r}: use one of auto, {', '.join(TEACHERS)}")
        self.device = pick_device(device)
        if self.preset.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        self.data = data_folder()
        self.workspace = self.data if preset == "sample" else self.data / preset
        self.given, self.scene = scene, scene_name(scene, self.data / "scenes")
        self.frames_folder = self.workspace / "labels" / self.scene / "frames"

    @property
    def substitution(self):
        """File that says which teacher took the place of the one asked for, and why; it is there only if one did."""
        return self.workspace / "labels" / self.scene / self.asked_teacher / "substitution.json"

    @property
    def teacher(self):
        """The teacher that labels the scene: the one asked for, unless its checkpoint could not be had."""
        return read_json(self.substitution)["teacher"] if self.substitution.exists() else self.asked_teacher

    @property
    def labels_folder(self):
        return self.workspace / "labels" / self.scene / self.teacher

    @property
    def runs_folder(self):
        return self.workspace / "runs" / self.scene / self.teacher

    def run_folder(self, arm):
        seconds = f"-{self.seconds:g}s" if self.seconds else ""
        return self.runs_folder / (arm + (f"-seed{self.seed}" if self.seed else "") + seconds)

    @property
    def notebooks_folder(self):
        """Where executed copies of the scene's notebooks are kept."""
        return self.run_folder("notebooks")

    def figures_folder(self, scenes="all"):
        """``figures/`` for the default study as a whole; a folder of its own below it for all others."""
        root = self.data / "figures" if os.environ.get("KDUTILS_DATA") else REPOSITORY / "figures"
        if scenes == "all" and self.describe() == Study(self.scene).describe():
            return root
        return root / self.title(scenes)

    def title(self, scenes="all"):
        """What tells this study of some scenes from all others, as a folder's name."""
        return "-".join([self.preset_name, self.teacher, f"seed{self.seed}", scenes.replace("/", "_")])

    @property
    def arms(self):
        """The arms this scene is trained with: all of them on the preset's first scene and on scenes of one's own."""
        others = self.preset.scenes[1:]
        return self.preset.other_scene_arms if self.scene in others else self.preset.first_scene_arms

    def describe(self):
        """Settings as plain data, for manifests and for print."""
        return {**asdict(self.preset), "scene": self.scene, "preset": self.preset_name, "teacher": self.teacher,
                "seed": self.seed}  # fmt: skip


def data_folder():
    """Where all that a run reads and writes lies: ``KDUTILS_DATA``, or ``data`` in the repository."""
    return Path(os.environ.get("KDUTILS_DATA") or REPOSITORY / "data").resolve()


def scene_name(scene, scenes_folder):
    """Name of a scene given by name (``kitchen``, ``apt1/kitchen``) or by its folder's path.

    A folder of one's own that is called like a sample room, or lies in a building of 12Scenes, takes its parent's name
    along, so that rooms stay apart.

    Raises:
        ValueError: the path of a folder that is not there.
    """
    if not is_folder(scene):
        if Path(scene).is_absolute() or ".." in Path(scene).parts:
            raise ValueError(f"{scene}: no such folder. Give a scene's folder, or a name such as kitchen, apt1/living")
        return str(scene)
    folder = Path(scene).resolve()
    if folder.is_relative_to(scenes_folder):
        return str(folder.relative_to(scenes_folder))
    is_sample_room = folder.name.split("-")[0] in ("kitchen", "office")
    is_ambiguous = is_sample_room or folder.parent.name in BUILDINGS
    return f"{folder.parent.name}-{folder.name}" if is_ambiguous else folder.name


def is_folder(scene):
    """Whether a scene is given by its folder; a bare name is a folder's only if there is a scene in it."""
    folder = Path(scene)
    return folder.is_dir() and (folder.name != str(scene) or (folder / "info.txt").exists())


def pick_device(device="auto"):
    """``auto`` is CUDA, then Apple's GPU, then the CPU; each of torchrun's processes has a GPU of its own."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = "auto"
    if device != "auto":
        known = device == "cpu" or device.startswith("cuda") and torch.cuda.is_available()
        if not known and not (device == "mps" and torch.backends.mps.is_available()):
            raise ValueError(f"device {device!r} is not to be had here: use auto or cpu")
        return torch.device(device)
    if torch.cuda.is_available():
        place = os.environ.get("LOCAL_RANK")  # torchrun's: one device each
        return torch.device("cuda" if place is None else f"cuda:{place}")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
