"""The study's own student: a small residual pyramid that says where a pixel lies relative to anchors in the scene.

Features at stride 4, as fine as edges need, with what stride 8 and 16 see around them (a feature pyramid). Each cell
spreads its belief over anchors, which lie where the scene's points are (k-means; GLACE does so with cluster centres),
and adds an offset; a convex upsampling (RAFT) takes cells to pixels, so that a pixel at an edge can choose a side.
"""

import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import nn

ROWS = 192
ANCHORS = 64
WIDTHS = (32, 64, 96, 160)  # at stride 2, 4, 8, 16
BLOCKS = (1, 2, 3)  # residual blocks at stride 4, 8, 16


def reduction(size):
    """By how much images of ``size`` (height, width) are reduced, to about ``ROWS`` rows."""
    return max(1, round(size[0] / ROWS))


class AnchorPyramid(nn.Module):
    """Images ``(B, 3, H, W)`` in [0, 1], sides multiples of ``multiple``, to features ``(B, C, H/stride, W/stride)``.

    Images of many rows are first reduced to about ``ROWS``, so that a cell sees the same share of them. The features at
    stride 2 come along, folded to stride 4: where exactly an edge runs is known there.
    """

    channels = WIDTHS[1] + 4 * WIDTHS[0]

    def __init__(self, size):
        super().__init__()
        self.reduction = reduction(size)
        self.stride, self.multiple = 4 * self.reduction, 16 * self.reduction
        half, quarter, eighth, sixteenth = WIDTHS
        self.stem = convolution(3, half, stride=2)
        self.quarter = self._halving(half, quarter, BLOCKS[0])
        self.eighth = self._halving(quarter, eighth, BLOCKS[1])
        self.sixteenth = self._halving(eighth, sixteenth, BLOCKS[2])
        self.to_eighth, self.to_quarter = nn.Conv2d(sixteenth, eighth, 1), nn.Conv2d(eighth, quarter, 1)
        self.merge_eighth, self.merge_quarter = Residual(eighth), Residual(quarter)

    @staticmethod
    def _halving(inputs, outputs, blocks):
        return nn.Sequential(convolution(inputs, outputs, stride=2), *(Residual(outputs) for _ in range(blocks)))

    def forward(self, images):
        reduced = F.avg_pool2d(images, self.reduction) if self.reduction > 1 else images
        half = self.stem(4 * (reduced - 0.45))
        quarter = self.quarter(half)
        eighth = self.eighth(quarter)
        eighth = self.merge_eighth(eighth + _doubled(self.to_eighth(self.sixteenth(eighth))))
        quarter = self.merge_quarter(quarter + _doubled(self.to_quarter(eighth)))
        return torch.cat([quarter, F.pixel_unshuffle(half, 2)], 1)


class AnchorHead(nn.Module):
    """Features to world points and uncertainty: ``(B, 4, H, W)``, in units of the scene's extent from its centre."""

    def __init__(self, channels, stride):
        super().__init__()
        self.stride = stride
        self.belief = nn.Conv2d(channels, ANCHORS, 1)
        self.offset = nn.Conv2d(channels, 4, 1)  # and the logarithm of the uncertainty
        self.mixture = nn.Conv2d(channels, 9 * stride**2, 1)
        self.register_buffer("anchors", torch.zeros(ANCHORS, 3))

    def place(self, points):
        """Put the anchors where the labelled points ``(M, 3)`` are, in the head's unit."""
        few = points[torch.linspace(0, len(points) - 1, min(len(points), 20_000)).long()]
        centres, _ = kmeans2(few.cpu().double().numpy(), ANCHORS, minit="++", rng=0, missing="warn")
        self.anchors.copy_(torch.from_numpy(centres))

    def forward(self, features):
        belief, offset, mixture = (part(features).float() for part in (self.belief, self.offset, self.mixture))
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 has steps of a centimetre in a room
            anchored = torch.einsum("bkhw,kc->bchw", belief.softmax(1), self.anchors)
            cells = torch.cat([anchored + 0.25 * offset[:, :3], offset[:, 3:]], 1)
            return convex_upsampling(cells, mixture, self.stride)


class Residual(nn.Module):
    """Two 3x3 convolutions beside a way past them; at first it is that way alone."""

    def __init__(self, channels):
        super().__init__()
        self.first = convolution(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.second[1].weight)

    def forward(self, x):
        return F.relu(x + self.second(self.first(x)))


def convolution(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def convex_upsampling(cells, mixture, stride):
    """Each pixel is a weighted mean of the 3x3 cells around its own (RAFT, arXiv 2003.12039, section 3.3).

    Args:
        cells: ``(B, C, h, w)``. mixture: ``(B, 9 * stride², h, w)``, weights before the softmax.

    Returns:
        ``(B, C, h * stride, w * stride)``.
    """
    count, channels, height, width = cells.shape
    border, three = bordered(cells), range(3)
    # Not F.unfold, which a GPU does image by image; and a matrix product, for to multiply and then add up would need
    # C times the memory of the weights, which are by far the largest maps here.
    around = torch.stack([border[..., row : row + height, col : col + width] for row in three for col in three], -1)
    around = around.permute(0, 2, 3, 1, 4).flatten(0, 2)
    weights = mixture.permute(0, 2, 3, 1).reshape(-1, 9, stride**2).softmax(1)
    fine = torch.bmm(around, weights).view(count, height, width, channels, stride, stride)
    return fine.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, height * stride, width * stride)


def bordered(maps):
    """Maps ``(B, C, H, W)`` with their border repeated once around them: ``(B, C, H + 2, W + 2)``."""
    if not torch.compiler.is_compiling():
        return F.pad(maps, (1, 1, 1, 1), mode="replicate")
    # torch 2.14 compiles the backward pass of that for another memory layout than its CPU code keeps to.
    rows = torch.cat([maps[:, :, :1], maps, maps[:, :, -1:]], 2)
    return torch.cat([rows[..., :1], rows, rows[..., -1:]], 3)


def _doubled(features):
    return F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
