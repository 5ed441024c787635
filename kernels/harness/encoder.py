"""The encoder that every run trains: a small ResNet whose norm sees one sample at a time. Needs torch alone.

    encoder = Encoder(channels=1, axes=2)
    h = encoder(x)                      # x [N, 1, H, W] -> h [N, 128]
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


def conv_norm(conv, width_in, width, kernel, stride=1):
    """Convolution and GroupNorm, which looks at one sample at a time."""
    return nn.Sequential(
        conv(width_in, width, kernel, stride, kernel // 2, bias=False),
        nn.GroupNorm(math.gcd(8, width), width))


class Block(nn.Module):
    """Basic residual block; a stride halves the canvas, and the skip follows by a 1x1 convolution."""

    def __init__(self, conv, width_in, width, stride):
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(conv, width_in, width, 3, stride),
            nn.ReLU(),
            conv_norm(conv, width, width, 3))
        self.skip = conv_norm(conv, width_in, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.skip(x) + self.body(x))


class Encoder(nn.Module):
    """Compact ResNet: [N, C, H, W] or [N, C, D, H, W] -> h [N, 8 width].

    Its stem keeps the canvas; with large=True it divides it by 4, as ResNet's: 7x7 with stride 2, max-pool.
    """

    def __init__(self, channels, axes, width=16, depth=1, large=False):
        super().__init__()
        self.config = dict(
            channels=channels, axes=axes, width=width, depth=depth, large=large)
        self.features = 8 * width
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        kernel, stride = (7, 2) if large else (3, 1)
        self.stem = conv_norm(conv, channels, width, kernel, stride)
        if large:                                                    # before the norm: a quarter of its work
            self.stem.insert(1, nn.MaxPool2d(3, 2, 1) if axes == 2 else nn.MaxPool3d(3, 2, 1))
        self.stem.append(nn.ReLU())
        self.stages = nn.Sequential()
        for _ in range(3):
            for stride in [2] + [1] * (depth - 1):                   # 2 halves the canvas, doubles the width
                self.stages.append(Block(conv, width, stride * width, stride))
                width *= stride
        # oneDNN 3.x gets the gradients of strided 1x1 convolutions, the skips', wrong, or crashes, where
        # fewer than 8 channels lie last.
        if self.features >= 128:
            layout = torch.channels_last if axes == 2 else torch.channels_last_3d
            self.to(memory_format=layout)

    def forward(self, x):
        return self.stages(self.stem(x)).flatten(2).mean(2)          # of [N, 8 width, *S/8 or *S/32]
