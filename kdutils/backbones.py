"""Backbones pretrained on endless rendered rooms: ``python -m kdutils.backbones vit16 mobilenet``.

One backbone serves all rooms, and each room has a small head of its own that turns features into points of that room's
world frame (so was ACE's encoder trained: Brachmann et al., CVPR 2023, section 3.3). Here a head is a ridge regression,
solved in closed form from some of the room's views in every step; the backbone learns to make it right on the room's
*other* views (Bertinetto et al., ICLR 2019). That is a student's own task with a frozen backbone, so what is learned is
what such a student needs, and rooms come and go without a head to be learned first.

They also learn to tell, by a linear regressor, the features of the compact DUSt3R's encoder in the same views (a hint:
Romero et al., *FitNets*, ICLR 2015). A room's points alone teach where things are in rooms that look like the rendered
ones; these features, made from pairs of views, are of more use in a real scene.
"""

import argparse
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from kdutils import compact, dust3r, endless, pretraining, shipped, students
from kdutils.augmentation import DRAWS, Examples
from kdutils.settings import BACKBONE_PLANS, MILD, OWN_ARMS, PAPER_ARMS
from kdutils.training import gains_from_half

NAMES = ("mobilenet", "vit16", "vit32", "vit64", "anchornet")
SIZE = (96, 128)  # (height, width) of the images they learn from
VIT_BLOCKS = 4
CELL = 4  # pixels: heads say one point for so many squared
VIEWS = endless.VIEWS  # of a room in a step: all there are, for a student's head is made from hundreds
SUPPORT = 36  # of them make the head, the others measure it
RIDGE = -3.0  # logarithm of the weight of a head's size, to begin with
TEACHER_CHANNELS = compact.CONFIG["enc_embed_dim"]
HELD_OUT_ROOMS = 12


class Learner(nn.Module):
    """A student's backbone (see ``students``), and what it learns by: ``distances`` and ``unlikeness``.

    Both take the features as they are, for so does a student's head.
    """

    def __init__(self, name, size=SIZE, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        arm = next(arm for arm in (*PAPER_ARMS.values(), *OWN_ARMS.values()) if name == students.backbone_name(arm))
        self.backbone = students.BACKBONES[arm.backbone](arm, size, VIT_BLOCKS)
        self.fold = self.backbone.stride // CELL
        self.ridge = nn.Parameter(torch.tensor(RIDGE))
        self.patches = max(1, self.backbone.stride // dust3r.PATCH)  # the teacher's, along a side of one of its own
        self.regressor = nn.Conv2d(self.backbone.channels, TEACHER_CHANNELS * self.patches**2, 1)

    def forward(self, images, bfloat16=False):
        """Features ``(B, C, h, w)`` of images ``(B, 3, H, W)`` in [0, 1]."""
        images = students.padded(images, self.backbone.multiple).contiguous(memory_format=torch.channels_last)
        with pretraining.precision(images.device, bfloat16):
            return self.backbone(images).float()

    def distances(self, features, points):
        """How far the heads of R rooms are from the truth, in the views that they were not made from.

        Args:
            features: ``(R * V, C, h, w)``; the first ``SUPPORT`` of a room's V views make its head.
            points: ``(R, V, 3, H, W)``, the views' world points in metres.

        Returns:
            Distances in metres ``(R, (V - SUPPORT) * patches, (stride / CELL)²)``, one for each cell of each patch.
        """
        rooms_and_views = points.shape[:2]
        cells = F.pad(features.permute(0, 2, 3, 1), (0, 1), value=1.0)
        cells = cells.unflatten(0, rooms_and_views).flatten(2, 3)  # (R, V, cells, C + 1)
        points = students.padded(points.flatten(0, 1), self.backbone.multiple)
        middle = points[..., CELL // 2 :: CELL, CELL // 2 :: CELL]
        truth = F.pixel_unshuffle(middle, self.fold).permute(0, 2, 3, 1).unflatten(0, rooms_and_views).flatten(2, 3)
        head = self.head(cells[:, :SUPPORT].flatten(1, 2), truth[:, :SUPPORT].flatten(1, 2))
        off = cells[:, SUPPORT:].flatten(1, 2) @ head - truth[:, SUPPORT:].flatten(1, 2)
        return off.unflatten(-1, (3, -1)).norm(dim=2)

    def head(self, cells, truth):
        """Ridge regression ``(R, C + 1, K)`` from features ``(R, M, C + 1)`` to targets ``(R, M, K)``."""
        squares = cells.mT @ cells / cells.shape[1]
        held_back = self.ridge.exp() * torch.eye(squares.shape[-1], device=squares.device)
        held_back[-1, -1] = 0  # the mean point is free
        solved, _ = torch.linalg.solve_ex(squares + held_back, cells.mT @ truth / cells.shape[1])  # does not wait
        return solved

    def unlikeness(self, features, tokens):
        """Mean squared difference of the teacher's features to what a linear regressor makes of these (FitNets' hint).

        Args:
            features: ``(B, C, h, w)``. tokens: the same images' ``teacher_features``.
        """
        coarse = F.avg_pool2d(features, max(1, dust3r.PATCH // self.backbone.stride))
        retold = F.pixel_shuffle(self.regressor(coarse), self.patches)
        return F.mse_loss(retold[..., : tokens.shape[2], : tokens.shape[3]], tokens)


@torch.no_grad()
def teacher_features(teacher, images, bfloat16=False):
    """The compact DUSt3R's encoder tokens of images ``(B, 3, H, W)`` in [0, 1], normalised: ``(B, C, H/16, W/16)``."""
    with pretraining.precision(images.device, bfloat16):
        tokens = teacher.encode(2 * images - 1).float()
    return dust3r.as_map(F.layer_norm(tokens, tokens.shape[-1:]), images.shape[-2:])


def drawn(rooms, count, generator, augmented=True):
    """Images and points ``(count, VIEWS, 3, H, W)`` of so many of the rooms, each in its views in random order."""
    chosen = [rooms[k] for k in torch.randperm(len(rooms), generator=generator)[:count].tolist()]
    views = [torch.randperm(len(room.images), generator=generator)[:VIEWS].to(room.images.device) for room in chosen]
    images, depth, poses = (torch.cat([getattr(room, field)[few] for room, few in zip(chosen, views)])
                            for field in ("images", "depth", "poses"))  # fmt: skip
    intrinsics = torch.cat([room.intrinsics.expand(VIEWS, 3, 3) for room in chosen])
    seen = torch.ones_like(depth, dtype=torch.bool)
    examples = Examples(images, depth, seen, torch.ones_like(depth), intrinsics, poses, images.device)
    draws = 2 * torch.rand(len(images), DRAWS, generator=generator) - 1
    batch = examples.augmented(draws, **asdict(MILD)) if augmented else examples.batch()
    return [tensor.unflatten(0, (len(chosen), VIEWS)) for tensor in (batch.images, batch.points)]


def figures_of(learner, teacher, rooms):
    """Median distance in metres, and mean unlikeness, on rooms that were never learned from."""
    generator = torch.Generator().manual_seed(0)
    distances, unlikeness = [], []
    for images, points in zip(*drawn(rooms, len(rooms), generator, augmented=False)):
        features = learner(images)
        distances.append(learner.distances(features, points[None]).flatten())
        unlikeness.append(learner.unlikeness(features, teacher_features(teacher, images)))
    return {"median": float(torch.cat(distances).median()), "unlikeness": float(torch.stack(unlikeness).mean())}


def train(name, plan, folder, device="cpu", size=SIZE, rooms_folder=None, progress=None, from_shipped=False):
    """Pretrain one backbone, or go on where a killed run was.

    Args:
        name: one of ``NAMES``. plan: ``settings.BackbonePretraining``; its batch is in rooms.
        folder: of the run's state. rooms_folder: keeps rendered rooms, see ``endless``.
        progress: callable(done, total, text).
        from_shipped: start from the shipped weights, whose makings the settings then tell, with a new optimiser.

    Returns:
        The trained ``Learner``, the log, and the settings that made it.
    """
    device = torch.device(device)
    if name == "mobilenet":  # torch's depthwise convolutions are slower in bfloat16 on a CPU
        plan = replace(plan, bfloat16=tuple(kind for kind in plan.bfloat16 if kind != "cpu"))
    settings = {"backbone": name, "size": list(size), "views": VIEWS, "support": SUPPORT,
                "vit_blocks": VIT_BLOCKS if name.startswith("vit") else None}  # fmt: skip
    learner = Learner(name, size, plan.seed)
    if from_shipped:
        learner.backbone.load_state_dict(shipped.tensors(name))
        settings["started_from"] = {key: shipped.card(name)[key] for key in ("sha256", "settings", "seconds", "log")}
    learner.to(device, memory_format=torch.channels_last)
    teacher = dust3r.load_checkpoint(shipped.locate(shipped.TEACHER).parent, device)
    held_out = list(endless.rooms_of(range(min(HELD_OUT_ROOMS, plan.rooms)), size, device, rooms_folder, True))
    run = pretraining.Run(folder, settings, learner, plan, progress)
    pool = endless.RoomPool(plan.rooms, size, device, rooms_folder, run.step // plan.steps_a_room)
    pool.advance(pool.turn, progress)
    if run.step == 0 and name.startswith("vit") and not from_shipped:
        few = torch.cat([room.images[::8] for room in pool.rooms[:64]]).permute(0, 3, 1, 2) / 255
        pretraining.whiten(learner.backbone.body.patch_embed.proj, students.padded(few, learner.backbone.multiple))

    def step(number, generator):
        pool.advance(number // plan.steps_a_room)
        images, points = drawn(pool.rooms, plan.batch, generator)
        images, bfloat16 = images.flatten(0, 1), gains_from_half(device, plan.bfloat16)
        features = learner(images, bfloat16)
        loss = learner.distances(features, points).mean()
        if plan.distillation:
            loss += plan.distillation * learner.unlikeness(features, teacher_features(teacher, images, bfloat16))
        return loss

    return learner, run.fit(step, partial(figures_of, learner, teacher, held_out)), run.settings


def main(argv=None):
    """Pretrain backbones on rendered rooms, and with --ship put them where the study finds them."""
    parser = argparse.ArgumentParser(prog="python -m kdutils.backbones", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; by default all")
    parser.add_argument("--distillation", type=float, default=1.0, help="weight of the compact DUSt3R's features")
    parser.add_argument("--from-shipped", action="store_true", help="go on from the weights that come with the study")
    options = pretraining.options(parser, BACKBONE_PLANS, argv)
    plan = replace(options.plan, distillation=options.distillation)
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"no such backbone: {', '.join(sorted(unknown))}; use {', '.join(NAMES)}")
    for name in options.names or NAMES:
        learner, log, settings = train(name, plan, pretraining.folder_of(name, options), options.device, SIZE,
                                       options.rooms, pretraining.Log(), options.from_shipped)  # fmt: skip
        pretraining.finish(name, learner.backbone, log, settings, options, trained_on(settings))


def trained_on(settings):
    """What a backbone with these settings learned from, for its card."""
    rendered = "views of rendered kitchens and offices, each room with a head of its own"
    is_distilled = any(plan["distillation"] for run in runs_of({"settings": settings})
                       for plan in (*run["settings"].get("earlier_plans", ()), run["settings"]["plan"]))  # fmt: skip
    return rendered + (", and what the compact DUSt3R sees in them" if is_distilled else "")


def runs_of(card):
    """The runs that made a backbone, the first one first: its card, after those of the weights that it started from."""
    before = card["settings"].get("started_from")
    return [*(runs_of(before) if before else ()), card]


if __name__ == "__main__":
    main()
