"""What all samplers share: their signature and timesteps, and the levels that solvers go down."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ddpm_lightning.diffusion.clipping import Clip, clip_x_0
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.diffusion.timesteps import (
    BY_LOG_SNR,
    check_spacing,
    space_by_log_snr,
    space_timesteps,
)
from ddpm_lightning.errors import InputError

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t float [N, C, H, W], t int64 [N]) -> what `Process.pred_x_0` reads, such as the noise."""

Draw = Callable[[], Tensor]
"""Gives fresh standard normal noise for the whole batch, float [N, C, H, W], at every call."""


class Step(NamedTuple):
    """The state after one step of the chain."""

    t: int  # the timestep that the network was told (the first, where a step tells it two)
    x_prev: Tensor  # the less noisy images, float [N, C, H, W]; x_0 after the last step
    pred_x_0: Tensor  # the clean images predicted at this step, clipped as the sampler clips


class Start(NamedTuple):
    """Where a chain starts that does not start from pure noise."""

    x_t: Tensor  # float [N, C, H, W]
    t: int  # zero-based, in [0, T)


@dataclass(frozen=True)
class Sampler(ABC):
    """Turns noise into images; subclasses are frozen dataclasses, their fields the record.

    Args:
        num_steps: Timesteps to visit; None visits what the spacing or the sampler has by default.
        spacing: Which timesteps those are (see `space_timesteps` and `space_by_log_snr`).
        clip: How the predicted x_0 is clipped at every step (see `clip_x_0`).
    """

    num_steps: int | None = None
    spacing: str = field(default="even", kw_only=True)
    clip: Clip = field(default="static", kw_only=True)

    name: ClassVar[str]
    default_num_steps: ClassVar[int | None] = None  # None: all timesteps

    def __post_init__(self) -> None:
        held = check_spacing(self.spacing)
        if None not in (held, self.num_steps) and held != self.num_steps:
            raise InputError(
                f"num_steps {self.num_steps}: the spacing {self.spacing} has {held} steps; leave "
                "num_steps out"
            )

    @abstractmethod
    def __call__(self, net: Network, process: Process, draw: Draw) -> Iterator[Step]:
        """Run the chain, yielding each step; the last one's `x_prev` is the sample.

        Args:
            net: The network, in eval mode.
            process: The process that it was trained on.
            draw: The first call gives x_T, each later one the noise of a step.
        """

    def count_steps(self, process: Process) -> int:
        """Count the timesteps that the chain visits: the steps that it yields."""
        num_steps = check_spacing(self.spacing) if self.num_steps is None else self.num_steps
        if num_steps is not None:
            return num_steps
        return min(self.default_num_steps or process.num_timesteps, process.num_timesteps)

    def count_evaluations(self, process: Process) -> int:
        """Count the network evaluations that one image takes."""
        return self.count_steps(process)

    def respace(self, process: Process) -> Process:
        """Give the process on this sampler's timesteps.

        Raises:
            InputError: The process has not so many, or not in this spacing.
        """
        num_timesteps, num_steps = process.num_timesteps, self.count_steps(process)
        if self.spacing == BY_LOG_SNR:
            timesteps = space_by_log_snr(process.alphas_cumprod, num_steps)
        else:
            timesteps = space_timesteps(num_timesteps, num_steps, self.spacing)
        return process if len(timesteps) == num_timesteps else process.respace(timesteps)

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
        if len(timesteps) < process.num_timesteps:
            process = process.respace(timesteps)
        return replace(self, num_steps=len(timesteps), spacing="even"), process  # all there are


class Level(NamedTuple):
    """A level of noise: x_t = a x_0 + s noise."""

    a: float  # sqrt(alphas_cumprod)
    s: float  # sqrt(1 - alphas_cumprod)

    @property
    def half_log_snr(self) -> float:
        """Give lambda = log(a / s) (Lu et al. 2022, section 2); infinite at both ends."""
        if self.a == 0:
            return -math.inf
        return math.log(self.a / self.s) if self.s > 0 else math.inf

    def noise(self, x_t: Tensor, pred_x_0: Tensor) -> Tensor:
        """Give the noise that x_t holds if its x_0 is the predicted one."""
        return (x_t - self.a * pred_x_0) / self.s


CLEAN = Level(1.0, 0.0)

Denoise = Callable[[Tensor, int], Tensor]
"""(x_t, the index of its level) -> predicted x_0, shaped like x_t."""


def levels_of(process: Process) -> list[Level]:
    """List a process's levels, the noisiest first, and x_0's as the last one."""
    # Python floats keep the coefficients in float64 until they meet x_t.
    alphas_cumprod = process.alphas_cumprod.flip(0).tolist()
    return [*(Level(value**0.5, (1 - value) ** 0.5) for value in alphas_cumprod), CLEAN]


def make_denoiser(net: Network, process: Process, clip: Clip) -> Denoise:
    """Make the function that predicts x_0 at the levels of a process, whatever the net predicts."""

    def denoise(x_t: Tensor, index: int) -> Tensor:
        t = process.timesteps.new_full((len(x_t),), process.num_timesteps - 1 - index)
        return clip_x_0(process.pred_x_0(net(x_t, process.timesteps[t]), x_t, t), clip)

    return denoise


@dataclass(frozen=True)
class Solver(Sampler):
    """A sampler that needs to know no more than the levels and a prediction of x_0 at each."""

    def __call__(self, net: Network, process: Process, draw: Draw) -> Iterator[Step]:
        """Run the chain (see `Sampler`)."""
        process = self.respace(process)
        timesteps = process.timesteps.flip(0).tolist()  # once: reading from a GPU waits for it
        denoise = make_denoiser(net, process, self.clip)
        states = self.solve(denoise, levels_of(process), draw)
        for t, (x_prev, pred_x_0) in zip(timesteps, states, strict=True):
            yield Step(t, x_prev, pred_x_0)

    @abstractmethod
    def solve(
        self, denoise: Denoise, levels: Sequence[Level], draw: Draw
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go down the levels, yielding x at the next one and the x_0 predicted at this one.

        Args:
            denoise: Predicts x_0.
            levels: From noise to images, S + 1 of them; the last need not be x_0's.
            draw: The first call gives x at the first level, each later one the noise of a step.
        """
