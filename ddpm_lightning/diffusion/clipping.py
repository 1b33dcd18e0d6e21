"""Keeping the predicted x_0 in the range of images."""

from typing import Literal

import torch
from torch import Tensor

Clip = Literal["static", "dynamic", "none"]

QUANTILE = 0.995  # Saharia et al. 2022, section 2.3; imagen's value


def clip_x_0(x_0: Tensor, clip: Clip) -> Tensor:
    """Clip predicted clean images.

    Args:
        x_0: Predicted clean images, float [N, C, H, W].
        clip: `static` clamps to [-1, 1], as the authors of DDPM do. `dynamic` clamps each image to
            [-c, c], where c is its 0.995 quantile of |x_0|, at least 1, and divides by c (Saharia
            et al. 2022, section 2.3). `none` leaves them as they are.

    Returns:
        Shaped like x_0.
    """
    if clip == "static":
        return x_0.clamp(-1, 1)
    if clip == "dynamic":
        limits = _quantile(x_0.abs().flatten(1)).clamp(min=1).reshape(-1, *[1] * (x_0.ndim - 1))
        return x_0.clamp(-limits, limits) / limits
    if clip == "none":
        return x_0
    raise ValueError(f"clip must be static, dynamic or none, got {clip}")


def _quantile(values: Tensor) -> Tensor:
    """Give each row's 0.995 quantile; torch.quantile does not take more than 2^24 numbers."""
    ordered = values.sort(dim=1).values
    position = QUANTILE * (values.shape[1] - 1)
    below = int(position)
    above = min(below + 1, values.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], position - below)
