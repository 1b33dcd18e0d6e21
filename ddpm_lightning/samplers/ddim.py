"""Denoising diffusion implicit models (Song, Meng, Ermon 2021)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers.base import Draw, Network, Sampler, Step


@dataclass(frozen=True)
class DDIMSampler(Sampler):
    """DDIM: the same marginals with less, or no, fresh noise.

    Args:
        num_steps: Evenly spaced timesteps to visit; None visits 50, or all where there are fewer.
        eta: 0 is deterministic; 1 has the variance of ancestral sampling with `fixed_small`.
        clip: Clip the predicted x_0 to [-1, 1] at every step; the noise is derived again from it.
    """

    num_steps: int | None = None
    eta: float = 0.0
    clip: bool = True
    default_num_steps: ClassVar[int | None] = 50

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta must lie in [0, 1], got {self.eta}")

    def __call__(self, net: Network, process: Process, draw: Draw) -> Iterator[Step]:
        """Run the chain (see `Sampler`)."""
        process = self.respace(process)
        timesteps = process.timesteps.tolist()  # once: reading from a GPU waits for it
        x_t = draw()
        # Python floats keep the coefficients in float64 until they meet x_t.
        alphas_cumprod = [1.0, *process.alphas_cumprod.tolist()]
        for index in reversed(range(process.num_timesteps)):
            t = process.timesteps.new_full((len(x_t),), index)
            pred_x_0 = process.pred_x_0(net(x_t, process.timesteps[t]), x_t, t)
            if self.clip:
                pred_x_0 = pred_x_0.clamp(-1, 1)
            a, a_prev = alphas_cumprod[index + 1], alphas_cumprod[index]
            noise = (x_t - a**0.5 * pred_x_0) / (1 - a) ** 0.5
            sigma = self.eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5  # Eq. 16
            # Eq. 12; rounding may leave a tiny negative under the root when eta is 1
            x_t = a_prev**0.5 * pred_x_0 + max(0.0, 1 - a_prev - sigma**2) ** 0.5 * noise
            if sigma > 0:
                x_t = x_t + sigma * draw()
            yield Step(timesteps[index], x_t, pred_x_0)
