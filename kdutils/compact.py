"""A compact DUSt3R, trained from scratch on endless rendered rooms: ``python -m kdutils.compact``.

The network is ``dust3r.DUSt3R`` in a small configuration, the objective DUSt3R's (Wang et al., CVPR 2024, section 3.2),
the pairs overlap by 20 to 90 %. Rendering, training and validation run on one device, without a data loader.

DUSt3R starts from a network that was pretrained on millions of image pairs (CroCo). From scratch three things are slow
to learn, and the recipe helps with each. *What a patch shows*: the patch embedding starts as principal components.
*Where a patch is*, for RoPE only says how far two are apart: a linear probe asks the encoder. *Which patches show the
same place*: half of the heads of the decoders' first cross-attentions are asked to look there. Neither probe nor
question is part of the network that ships.
"""

import argparse
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kdutils import augmentation, dust3r, endless, evaluation, pretraining, shipped
from kdutils.settings import COMPACT_PLANS
from kdutils.teachers import PairPointmaps
from kdutils.training import gains_from_half

SIZE = (96, 128)  # (height, width) of the images it learns from
CONFIG = {"head_type": "linear", "enc_embed_dim": 192, "enc_depth": 5, "enc_num_heads": 6,
          "dec_embed_dim": 192, "dec_depth": 3, "dec_num_heads": 6}  # fmt: skip
CONFIDENCE_REWARD = 0.2  # alpha of equation 4
# More of it at first: with the large errors of fresh weights, confidence would fall to where it has no gradient.
EARLY_REWARD, EARLY_STEPS = 5.0, 1000
PLACE_WEIGHT, MATCH_WEIGHT = 0.1, 0.5
MATCHING_BLOCKS = 2  # of each decoder, the first ones
SAME_DEPTH = 0.08  # share by which a place's depth may differ in the view that is to show it
COLOUR, BLUR, GRAIN = 0.15, 0.5, 0.01  # largest changes of a pair's pictures
HELD_OUT_ROOMS, HELD_OUT_PAIRS = 12, 96  # for validation


# ------------------------------------------------------------------------------------------------- network


class Learner(nn.Module):
    """The network while it learns, with the probe, and an ear at its first cross-attentions."""

    def __init__(self, config=CONFIG, size=SIZE, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.model = dust3r.DUSt3R(img_size=size, **config)
        self.probe = nn.Linear(config["enc_embed_dim"], sum(side // dust3r.PATCH for side in size))
        self.heads, self._heard = config["dec_num_heads"], []
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for level, blocks in enumerate(zip(self.model.dec_blocks, self.model.dec_blocks2)):
            for attention in (block.cross_attn for block in blocks):
                # It starts as a search for what is alike: queries and keys are the same map.
                nn.init.normal_(attention.projq.weight, std=attention.projq.in_features**-0.5)
                attention.projk.load_state_dict(attention.projq.state_dict())
                for part in (attention.projq, attention.projk) if level < MATCHING_BLOCKS else ():
                    part.register_forward_hook(lambda module, given, said: self._heard.append(said))

    def forward(self, image1, image2, bfloat16=False):
        """Both directions of B pairs; each image is encoded once.

        Args:
            image1, image2: ``(B, 3, H, W)`` in [0, 1].

        Returns:
            What ``DUSt3R.decode`` returns for 2 B pairs, (i, j) and then (j, i); what the probe says of the tokens of
            the images i, then j ``(2 B, N, rows + columns)``; and the logits ``(2 B, heads, N, N)`` with which tokens
            of view 1 look at view 2's and the other way round, a list of such two for each level that is listened to.
        """
        size, device = image1.shape[-2:], image1.device
        self._heard.clear()
        with pretraining.precision(device, bfloat16):
            tokens = self.model.encode(2 * torch.cat([image1, image2]) - 1)
            first, second = tokens.chunk(2)
            layers = self.model.decoder_layers(torch.cat([first, second]), torch.cat([second, first]), size, size)
            places = self.probe(tokens)
        rope = dust3r.rope_tables(size, self.model.decoder_head_channels, device)
        turned = [dust3r.rotate(dust3r.split_heads(said.float(), self.heads), rope) for said in self._heard]
        logits = [query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 for query, key in zip(*[iter(turned)] * 2)]
        return self.model.pointmaps(*layers, size, size), places.float(), list(zip(*[iter(logits)] * 2))


# ------------------------------------------------------------------------------------------------- pairs


class Pairs:
    """B pairs of rendered views in both directions, as input and truth.

    ``images`` of views i and j, each ``(B, 3, H, W)`` in [0, 1]; then, of 2 B pairs, first all (i, j) and then all
    (j, i): ``truth`` of views 1 and 2, ``(2 B, H, W, 3)`` in view 1's frame, metres; ``poses`` of the two, ``(2 B, 4,
    4)`` camera-to-world; ``intrinsics (2 B, 3, 3)``.
    """

    def __init__(self, rooms, edges):
        """``rooms`` are B ``endless.RoomViews``, one a pair; ``edges (B, 2)`` are views in them."""

        def of_both(field):
            return [torch.stack([getattr(room, field)[view] for room, view in zip(rooms, side)])
                    for side in edges.T.tolist()]  # fmt: skip

        self.images = [images.permute(0, 3, 1, 2) / 255 for images in of_both("images")]
        self.intrinsics = torch.stack([room.intrinsics for room in rooms]).repeat(2, 1, 1)
        poses, depths = of_both("poses"), of_both("depth")
        self.poses = [torch.cat(poses), torch.cat(poses[::-1])]
        own = camera_points(torch.cat(depths).float(), self.intrinsics)
        motion = inverse(self.poses[0]) @ self.poses[1]
        self.truth = [own, moved(motion, own.roll(len(rooms), 0))]

    @classmethod
    def draw(cls, rooms, count, generator):
        """``count`` pairs of any of the rooms."""
        chosen = [rooms[k] for k in torch.randint(len(rooms), (count,), generator=generator).tolist()]
        return cls(chosen, torch.stack([r.edges[torch.randint(len(r.edges), (), generator=generator)] for r in chosen]))

    def recoloured(self, generator):
        """In another light, the same for both views of a pair, and with noise."""
        count, device = len(self.images[0]), self.images[0].device
        draws = (2 * torch.rand(count, 7, generator=generator) - 1).to(device)
        source = generator_on(device, generator)
        for k, images in enumerate(self.images):
            noise = torch.randn(images.shape, generator=source, device=device)
            self.images[k] = augmentation.recoloured(images, draws, COLOUR, BLUR) + GRAIN * noise
        return self

    def matches(self, view):
        """For the middle of each patch of ``view`` (0 or 1), the patch ``(2 B, N)`` of the other one that shows it.

        Patches are numbered row by row; -1 where the other view does not show the place.
        """
        half, (height, width) = dust3r.PATCH // 2, self.truth[0].shape[1:3]
        to_other = inverse(self.poses[1 - view]) @ self.poses[0]
        places = moved(to_other, self.truth[view][:, half :: dust3r.PATCH, half :: dust3r.PATCH].flatten(1, 2))
        depth = places[..., 2]
        u, v, _ = torch.einsum("bij,bnj->ibn", self.intrinsics, places / depth.clamp(min=0.1)[..., None]).unbind(0)
        inside = (depth > 0.1) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        u, v = u.clamp(0, width - 1).long(), v.clamp(0, height - 1).long()
        which = torch.arange(len(u), device=u.device)[:, None]
        seen = moved(to_other, self.truth[1 - view][which, v, u])[..., 2]
        visible = inside & ((seen - depth).abs() < SAME_DEPTH * depth)
        return torch.where(visible, v // dust3r.PATCH * (width // dust3r.PATCH) + u // dust3r.PATCH, -1)


def generator_on(device, generator):
    """A source of noise where the images lie: what a CPU draws for a GPU takes longer than the GPU's whole step."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


def inverse(matrices):
    return torch.linalg.inv_ex(matrices)[0]  # _ex: does not wait for the device


def camera_points(depth, intrinsics):
    """Depth ``(B, H, W)`` along z to points ``(B, H, W, 3)`` in the camera's frame."""
    v, u = torch.meshgrid(*(torch.arange(n, device=depth.device) + 0.5 for n in depth.shape[1:]), indexing="ij")
    rays = torch.einsum("bij,hwj->bhwi", inverse(intrinsics), torch.stack([u, v, torch.ones_like(u)], -1))
    return rays * depth[..., None]


def moved(motion, points):
    """B rigid motions ``(B, 4, 4)``, each applied to points ``(B, ..., 3)`` of its own."""
    shift = motion[:, :3, 3].view(-1, *[1] * (points.dim() - 2), 3)
    return torch.einsum("bij,b...j->b...i", motion[:, :3, :3], points) + shift


# ------------------------------------------------------------------------------------------------- objective


def confidence_loss(points, confidences, truth, reward=CONFIDENCE_REWARD):
    """DUSt3R's objective (equations 3 and 4), a mean over pixels and both views.

    Args:
        points, truth: of both views, each ``(B, H, W, 3)`` in view 1's frame; either side's scale is free in each pair.
        confidences: of both views, each ``(B, H, W)``, above 1.
        reward: of confidence, alpha.
    """
    scale, true_scale = mean_distance(points), mean_distance(truth)
    costs = [confidence * (said / scale - true / true_scale).norm(dim=-1) - reward * confidence.log()
             for said, confidence, true in zip(points, confidences, truth)]  # fmt: skip
    return torch.stack(costs).mean()


def mean_distance(points):
    """Mean distance ``(B, 1, 1, 1)`` of both views' points from view 1's camera."""
    distance = torch.stack([view.norm(dim=-1).mean((1, 2)) for view in points]).mean(0)
    return distance.clamp(min=1e-6)[:, None, None, None]


def place_loss(said, size):
    """Cross-entropy of rows and columns of the tokens, from ``said (B, N, rows + columns)``."""
    rows, columns = (side // dust3r.PATCH for side in size)
    row, column = (place.flatten().repeat(len(said)) for place in torch.meshgrid(
        torch.arange(rows, device=said.device), torch.arange(columns, device=said.device), indexing="ij"))  # fmt: skip
    said = said.flatten(0, 1)
    return F.cross_entropy(said[:, :rows], row) + F.cross_entropy(said[:, rows:], column)


def match_loss(logits, pairs):
    """Cross-entropy of half of the heads' attention, where the other view shows a patch's place."""
    targets, costs = [pairs.matches(view) for view in (0, 1)], []
    for level in logits:
        for view, said in enumerate(level):
            asked = said[:, : said.shape[1] // 2]
            target = targets[view][:, None].expand(asked.shape[:-1])
            costs.append(F.cross_entropy(asked.flatten(0, 2), target.flatten(), ignore_index=-1))
    return torch.stack(costs).mean()


def loss_of(learner, pairs, step, bfloat16=False):
    """The objective, and what helps on the way to it."""
    said, places, logits = learner(*pairs.images, bfloat16)
    reward = CONFIDENCE_REWARD * (1 + (EARLY_REWARD - 1) * math.exp(-step / EARLY_STEPS))
    objective = confidence_loss((said["pts3d_1"], said["pts3d_2_in_view1"]), (said["conf_1"], said["conf_2"]),
                                pairs.truth, reward)  # fmt: skip
    size = pairs.images[0].shape[-2:]
    return objective + PLACE_WEIGHT * place_loss(places, size) + MATCH_WEIGHT * match_loss(logits, pairs)


# ------------------------------------------------------------------------------------------------- recipe


def held_out_pairs(size, device, folder=None, rooms=HELD_OUT_ROOMS, count=HELD_OUT_PAIRS):
    """The validation's ``Pairs``, always the same, from rooms that are never learned from."""
    views = list(endless.rooms_of(range(rooms), size, device, folder, held_out=True))
    return Pairs.draw(views, count, torch.Generator().manual_seed(0))


def figures_of(learner, pairs):
    """How good the network is on ``pairs``; see ``evaluation.pair_errors``."""
    said, _, _ = learner(*pairs.images)
    count = len(pairs.images[0])
    both = np.arange(2 * count).reshape(2, count)
    order = np.stack([both.ravel(), both[::-1].ravel()], axis=1)  # each image of each pair is a frame of its own
    answers = PairPointmaps(order, *(said[name].cpu().numpy() for name in
                                     ("pts3d_1", "pts3d_2_in_view1", "conf_1", "conf_2")))  # fmt: skip
    return evaluation.pair_errors(answers, pairs.truth[0].cpu().numpy(), None, pairs.poses[0].cpu().double().numpy())


def train(plan, folder, device="cpu", size=SIZE, config=CONFIG, rooms_folder=None, progress=None):
    """Train the network from scratch, or go on where a killed run was.

    Args:
        plan: ``settings.Pretraining``.
        folder: of the run's state.
        rooms_folder: keeps rendered rooms, see ``endless.RoomPool``.
        progress: callable(done, total, text).

    Returns:
        The trained ``Learner``, the log, and the settings that made it.
    """
    device, settings = torch.device(device), {"size": list(size), "config": config}
    learner = Learner(config, size, plan.seed).to(device)
    count = min(HELD_OUT_ROOMS, plan.rooms)
    held_out = held_out_pairs(size, device, rooms_folder, count, HELD_OUT_PAIRS * count // HELD_OUT_ROOMS)
    run = pretraining.Run(folder, settings, learner, plan, progress)
    pool = endless.RoomPool(plan.rooms, size, device, rooms_folder, run.step // plan.steps_a_room)
    pool.advance(pool.turn, progress)
    if run.step == 0:
        few = torch.cat([room.images[::8] for room in pool.rooms[:40]]).permute(0, 3, 1, 2) / 255
        pretraining.whiten(learner.model.patch_embed["proj"], few)

    def step(number, generator):
        pool.advance(number // plan.steps_a_room)
        pairs = Pairs.draw(pool.rooms, plan.batch, generator).recoloured(generator)
        return loss_of(learner, pairs, number, gains_from_half(device, plan.bfloat16))

    return learner, run.fit(step, partial(figures_of, learner, held_out)), run.settings


def main(argv=None):
    """Train the compact DUSt3R, and with --ship put it where the study finds it."""
    parser = argparse.ArgumentParser(prog="python -m kdutils.compact", description=main.__doc__)
    options = pretraining.options(parser, COMPACT_PLANS, argv)
    folder = pretraining.folder_of(shipped.TEACHER, options)
    learner, log, settings = train(options.plan, folder, options.device, rooms_folder=options.rooms,
                                   progress=pretraining.Log())  # fmt: skip
    pretraining.finish(shipped.TEACHER, learner.model, log, settings, options,
                       "random pairs of rendered kitchens and offices that overlap by 20 to 90 %",
                       {**CONFIG, "img_size": list(SIZE)})  # fmt: skip


if __name__ == "__main__":
    main()
