"""The two student networks of the original study's code, as peers: same labels, same frames, same steps, its recipe.

Written from a description of that code: full resolution throughout, or one pixel shuffle from stride 16; no
augmentation, a constant rate. Activations between the layers are taken to be ReLU.
"""

import torch
from torch import nn


class OriginalCNN(nn.Module):
    """5x5 convolutions at full resolution, 3-64-128-256-512, then 1x1 and 5x5 ones that stay at 512 channels."""

    stride = multiple = 1
    channels = 512

    def __init__(self):
        super().__init__()
        widths = (3, 64, 128, 256, 512)
        layers = [nn.Conv2d(a, b, 5, padding=2) for a, b in zip(widths, widths[1:])]
        layers += [nn.Conv2d(512, 512, 1), nn.Conv2d(512, 512, 5, padding=2), nn.Conv2d(512, 512, 1)]
        self.layers = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU(inplace=True))))

    def forward(self, images):
        return self.layers(images)


class OriginalCNNHead(nn.Module):
    """A 1x1 convolution to three coordinates."""

    def __init__(self, channels, _stride):
        super().__init__()
        self.points = nn.Conv2d(channels, 3, 1)

    def forward(self, features):
        # The points themselves in single precision, as in the study's own heads.
        with torch.autocast(features.device.type, enabled=False):
            return self.points(features.float())


class OriginalMobileNetHead(nn.Module):
    """1x1 convolutions to 256 with batch norm, shuffled by 16 to one channel, then 7x7 and 1x1 to coordinates."""

    def __init__(self, channels, stride):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 256, 1), nn.BatchNorm2d(256), nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256), nn.ReLU(inplace=True),
            nn.PixelShuffle(stride), nn.Conv2d(1, 3, 7, padding=3), nn.Conv2d(3, 3, 1),
        )  # fmt: skip

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            return self.layers(features.float())
