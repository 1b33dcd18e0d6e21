"""What all samplers share: their signature."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.diffusion.timesteps import space_timesteps
from ddpm_lightning.errors import InputError

Network = Callable[[Tensor, Tensor], Tensor]
"""epsilon_theta: (x_t float [N, C, H, W], t int64 [N]) -> noise shaped like x_t."""

Draw = Callable[[], Tensor]
"""Gives fresh standard normal noise for the whole batch, float [N, C, H, W], at every call."""


class Step(NamedTuple):
    """The state after one evaluation of the network."""

    t: int  # the timestep that the network was told
    x_prev: Tensor  # the less noisy images, float [N, C, H, W]; x_0 after the last step
    pred_x_0: Tensor  # the clean images predicted at this step, in [-1, 1]


class Start(NamedTuple):
    """Where a chain starts that does not start from pure noise."""

    x_t: Tensor  # float [N, C, H, W]
    t: int  # zero-based, in [0, T)


class Sampler(ABC):
    """Turns noise into images; subclasses are frozen dataclasses, their fields the record."""

    num_steps: int | None
    default_num_steps: ClassVar[int | None] = None

    @abstractmethod
    def __call__(self, net: Network, process: Process, draw: Draw) -> Iterator[Step]:
        """Run the chain, yielding each step; the last one's `x_prev` is the sample.

        Args:
            net: The network, in eval mode.
            process: The process that it was trained on.
            draw: The first call gives x_T, each later one the noise of a step.
        """

    def count_steps(self, process: Process) -> int:
        """Count the network evaluations that one image takes."""
        if self.num_steps is not None:
            return self.num_steps
        return min(self.default_num_steps or process.num_timesteps, process.num_timesteps)

    def respace(self, process: Process) -> Process:
        """Give the process on this sampler's timesteps: `num_steps` evenly spaced ones."""
        num_steps = self.count_steps(process)
        if num_steps == process.num_timesteps:
            return process
        return process.respace(space_timesteps(process.num_timesteps, num_steps))

    def below(self, process: Process, t: int) -> tuple["Sampler", Process]:
        """Give the part of the chain from x_t on: a sampler, and the process for it.

        The part visits t, and those of this sampler's timesteps that are less noisy.

        Args:
            process: The process that the network was trained on.
            t: Zero-based.

        Raises:
            InputError: t is outside the schedule.
        """
        if not 0 <= t < process.num_timesteps:
            raise InputError(f"timestep {t} must lie in 0..{process.num_timesteps - 1}")
        visited = self.respace(process).timesteps
        timesteps = torch.cat([visited[visited < t], visited.new_tensor([t])])
        if len(timesteps) < process.num_timesteps:  # else nothing is left out
            process = process.respace(timesteps)
        part: Sampler = replace(self, num_steps=len(timesteps))  # type: ignore[type-var]
        return part, process
