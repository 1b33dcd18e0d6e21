"""Ancestral sampling (Ho et al. 2020, Algorithm 2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.samplers.base import Draw, Network, Sampler, Step


@dataclass(frozen=True)
class DDPMSampler(Sampler):
    """Ancestral sampling: every step draws from p(x_{t-1} | x_t).

    Args:
        num_steps: Timesteps to visit; None visits all of them.
        spacing: Which timesteps those are (see `space_timesteps`).
        clip: How the predicted x_0 is clipped (see `clip_x_0`); the authors' code has static.
    """

    name: ClassVar[str] = "ddpm"

    def __call__(self, net: Network, process: Process, draw: Draw) -> Iterator[Step]:
        """Run the chain (see `Sampler`)."""
        process = self.respace(process)
        timesteps = process.timesteps.tolist()  # once: reading from a GPU waits for it
        x_t = draw()
        for index in reversed(range(process.num_timesteps)):
            t = process.timesteps.new_full((len(x_t),), index)
            output = net(x_t, process.timesteps[t])
            mean, log_variance, pred_x_0 = process.p_mean_variance(output, x_t, t, self.clip)
            x_t = mean + (0.5 * log_variance).exp() * draw() if index > 0 else mean
            yield Step(timesteps[index], x_t, pred_x_0)
