"""What all samplers share: their signature."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

from torch import Tensor

from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.diffusion.timesteps import space_timesteps

Network = Callable[[Tensor, Tensor], Tensor]
"""epsilon_theta: (x_t float [N, C, H, W], t int64 [N]) -> noise shaped like x_t."""

Draw = Callable[[], Tensor]
"""Gives fresh standard normal noise for the whole batch, float [N, C, H, W], at every call."""


class Step(NamedTuple):
    """The state after one evaluation of the network."""

    t: int  # the timestep that the network was told
    x_prev: Tensor  # the less noisy images, float [N, C, H, W]; x_0 after the last step
    pred_x_0: Tensor  # the clean images predicted at this step, in [-1, 1]


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
