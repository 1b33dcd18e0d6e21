"""Samplers: from noise to images.

Each sampler is a frozen dataclass whose fields are its record, and whose call is its whole loop.
"""

from typing import Literal

from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers.base import Draw, Network, Sampler, Start, Step
from ddpm_lightning.samplers.ddim import DDIMSampler
from ddpm_lightning.samplers.ddpm import DDPMSampler

__all__ = [
    "DDIMSampler",
    "DDPMSampler",
    "Draw",
    "Network",
    "Sampler",
    "SamplerName",
    "Start",
    "Step",
    "make_sampler",
]

SamplerName = Literal["ddpm", "ddim"]


def make_sampler(
    name: SamplerName, num_steps: int | None = None, eta: float | None = None
) -> Sampler:
    """Make a sampler from the options of a command line.

    Args:
        name: `ddpm` (ancestral, Ho et al. 2020) or `ddim` (Song et al. 2021).
        num_steps: Network evaluations per image; None is the sampler's own default.
        eta: DDIM's share of fresh noise, in [0, 1]; None is the default.

    Raises:
        InputError: An option does not belong to this sampler, or is out of range.
    """
    given = {"num_steps": num_steps, "eta": eta}
    options = {key: value for key, value in given.items() if value is not None}
    if name == "ddim":
        return DDIMSampler(**options)  # type: ignore[arg-type]
    if eta is not None:
        raise InputError("eta belongs to the ddim sampler; leave it out, or choose ddim")
    return DDPMSampler(num_steps)
