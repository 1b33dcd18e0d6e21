"""Denoising diffusion implicit models (Song, Meng, Ermon 2021), and their way back to noise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers.base import (
    Denoise,
    Draw,
    Level,
    Network,
    Solver,
    levels_of,
    make_denoiser,
)


@dataclass(frozen=True)
class DDIMSampler(Solver):
    """DDIM: the same marginals with less, or no, fresh noise.

    Args:
        num_steps: Timesteps to visit; None visits 50, or all where there are fewer.
        eta: 0 is deterministic; 1 has the variance of ancestral sampling with `fixed_small`.
        spacing: Which timesteps those are (see `space_timesteps`).
        clip: How the predicted x_0 is clipped (see `clip_x_0`); the noise is derived again from it.
    """

    eta: float = 0.0

    name: ClassVar[str] = "ddim"
    default_num_steps: ClassVar[int | None] = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta must lie in [0, 1], got {self.eta}")

    def solve(
        self, denoise: Denoise, levels: Sequence[Level], draw: Draw
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go down the levels (see `Solver`)."""
        x_t = draw()
        for index, (here, there) in enumerate(pairwise(levels)):
            pred_x_0 = denoise(x_t, index)
            sigma = self.eta * there.s / here.s * (1 - (here.a / there.a) ** 2) ** 0.5  # Eq. 16
            # rounding may leave a tiny negative under the root when eta is 1
            kept = Level(there.a, max(0.0, there.s**2 - sigma**2) ** 0.5)
            x_t = move(x_t, pred_x_0, here, kept)  # Eq. 12
            if sigma > 0:
                x_t = x_t + sigma * draw()
            yield x_t, pred_x_0

    def encode(self, net: Network, process: Process, x_0: Tensor) -> Iterator[Tensor]:
        """Run the chain backwards (Song et al. 2021, Eq. 14): the noise that gives these images.

        With the last one as x_T, the chain gives the images again, the nearer the more steps there
        are; clipping may prevent that.

        Args:
            net: The network, in eval mode.
            process: The process that it was trained on.
            x_0: Images, float [N, C, H, W] in [-1, 1].

        Yields:
            x_t at each of the sampler's timesteps, upwards.

        Raises:
            InputError: eta is not 0, so that there is no one way back.
        """
        if self.eta != 0:
            raise InputError(f"eta {self.eta:g}: only the chain of eta 0 has a way back to noise")
        process = self.respace(process)
        denoise = make_denoiser(net, process, self.clip)
        levels = levels_of(process)[:-1]
        lowest = len(levels) - 1
        # The network knows no level without noise: it takes the images for ones of the lowest.
        noise = levels[lowest].noise(x_0, denoise(x_0, lowest))
        x_t = levels[lowest].a * x_0 + levels[lowest].s * noise
        yield x_t
        for index in range(lowest, 0, -1):
            x_t = move(x_t, denoise(x_t, index), levels[index], levels[index - 1])
            yield x_t


def move(x_t: Tensor, pred_x_0: Tensor, here: Level, there: Level) -> Tensor:
    """Move images to another level, up or down, along the line from their noise to their x_0.

    This is DDIM's step without fresh noise (Song et al. 2021, Eq. 12), and Euler's on the
    probability-flow ODE.
    """
    return there.a * pred_x_0 + there.s * here.noise(x_t, pred_x_0)
