"""DPM-Solver++ of second order, multistep (Lu et al. 2022b), and its form with fresh noise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, expm1
from typing import ClassVar

from torch import Tensor

from ddpm_lightning.diffusion.timesteps import BY_LOG_SNR
from ddpm_lightning.samplers.base import Denoise, Draw, Level, Solver


@dataclass(frozen=True)
class DPMSolver2MSampler(Solver):
    """DPM-Solver++ 2M on the probability-flow ODE: x_0 is extrapolated from two predictions.

    Args:
        num_steps: Timesteps to visit; None visits 20, or all where there are fewer.
        spacing: Which timesteps those are (see `space_timesteps`). `log_snr` makes the steps equal
            in what the method extrapolates in (see `space_by_log_snr`).
        clip: How the predicted x_0 is clipped (see `clip_x_0`).
    """

    spacing: str = field(default=BY_LOG_SNR, kw_only=True)

    name: ClassVar[str] = "dpmpp_2m"
    default_num_steps: ClassVar[int | None] = 20

    def solve(
        self, denoise: Denoise, levels: Sequence[Level], draw: Draw
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go down the levels (see `Solver`; Lu et al. 2022b, Algorithm 2)."""
        x_t, before = draw(), None
        for index, (here, there) in enumerate(pairwise(levels)):
            pred_x_0 = denoise(x_t, index)
            target = extrapolate(pred_x_0, before, levels[max(index - 1, 0) : index + 2])
            h = there.half_log_snr - here.half_log_snr
            x_t = there.s / here.s * x_t - there.a * expm1(-h) * target
            before = pred_x_0
            yield x_t, pred_x_0


@dataclass(frozen=True)
class DPMSolver2MSDESampler(Solver):
    """DPM-Solver++ 2M on the reverse SDE: as `DPMSolver2MSampler`, with fresh noise in each step.

    Args:
        num_steps: Timesteps to visit; None visits 20, or all where there are fewer.
        spacing: Which timesteps those are (see `DPMSolver2MSampler`).
        clip: How the predicted x_0 is clipped (see `clip_x_0`).
    """

    spacing: str = field(default=BY_LOG_SNR, kw_only=True)

    name: ClassVar[str] = "dpmpp_2m_sde"
    default_num_steps: ClassVar[int | None] = 20

    def solve(
        self, denoise: Denoise, levels: Sequence[Level], draw: Draw
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go down the levels (see `Solver`)."""
        x_t, before = draw(), None
        for index, (here, there) in enumerate(pairwise(levels)):
            pred_x_0 = denoise(x_t, index)
            target = extrapolate(pred_x_0, before, levels[max(index - 1, 0) : index + 2])
            h = there.half_log_snr - here.half_log_snr
            x_t = there.s / here.s * exp(-h) * x_t - there.a * expm1(-2 * h) * target
            if there.s > 0:
                x_t = x_t + there.s * (-expm1(-2 * h)) ** 0.5 * draw()
            before = pred_x_0
            yield x_t, pred_x_0


def extrapolate(pred_x_0: Tensor, before: Tensor | None, levels: Sequence[Level]) -> Tensor:
    """Carry the prediction on to the middle of the step, linearly in half the log-SNR.

    Args:
        pred_x_0: Predicted at the level that the step leaves.
        before: Predicted at the level before it; None in the first step.
        levels: The level before, the one that the step leaves, and the one that it goes to.

    Returns:
        D of the method's second order; the prediction itself in the first step, in the one after
        pure noise, and in the last one, down to x_0, which is endless in log-SNR.
    """
    if before is None or levels[-1].s == 0:
        return pred_x_0
    last, here, there = (level.half_log_snr for level in levels)
    r = (here - last) / (there - here)
    return pred_x_0 + (pred_x_0 - before) / (2 * r)
