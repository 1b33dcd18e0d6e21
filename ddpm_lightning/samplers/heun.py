"""Heun's method on the probability-flow ODE (Karras et al. 2022, Algorithm 1)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.samplers.base import Denoise, Draw, Level, Solver, levels_of
from ddpm_lightning.samplers.ddim import move

MAX_RATIO = 200.0
"""Of noise to signal: beyond it an image is pure noise, and a straight line in the ratio, which may
run from thousands (the cosine schedule's begins at 20,291; the linear one's at 157) or from
infinity, is no approximation."""


@dataclass(frozen=True)
class HeunSampler(Solver):
    """Heun: a DDIM step, then the mean of the slopes at both its ends; second order.

    In y = x/a and q = s/a the ODE is dy/dq = noise. The last step is DDIM's, and so are those that
    leave pure noise; each other one takes two evaluations of the network.

    Args:
        num_steps: Timesteps to visit; None visits 10, or all where there are fewer.
        spacing: Which timesteps those are (see `space_timesteps`). `trailing` ends with a step of
            the usual length; the step that `even` takes down to t = 0 is long.
        clip: How the predicted x_0 is clipped (see `clip_x_0`); the noise is derived again from it.
    """

    spacing: str = field(default="trailing", kw_only=True)

    name: ClassVar[str] = "heun"
    default_num_steps: ClassVar[int | None] = 10

    def solve(
        self, denoise: Denoise, levels: Sequence[Level], draw: Draw
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go down the levels (see `Solver`)."""
        x_t = draw()
        for index, (here, there) in enumerate(pairwise(levels)):
            pred_x_0 = denoise(x_t, index)
            x_prev = move(x_t, pred_x_0, here, there)
            if _takes_two(here, there):
                slope = here.noise(x_t, pred_x_0)
                next_slope = there.noise(x_prev, denoise(x_prev, index + 1))
                dq = there.s / there.a - here.s / here.a
                x_prev = x_prev + there.a * dq * (next_slope - slope) / 2
            x_t = x_prev
            yield x_t, pred_x_0

    def count_evaluations(self, process: Process) -> int:
        """Count the network evaluations that one image takes."""
        steps = list(pairwise(levels_of(self.respace(process))))
        return len(steps) + sum(_takes_two(here, there) for here, there in steps)


def _takes_two(here: Level, there: Level) -> bool:
    return there.s > 0 and here.s <= MAX_RATIO * here.a
