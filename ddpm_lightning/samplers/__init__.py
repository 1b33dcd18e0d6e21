"""Samplers: from noise to images.

Each sampler is a frozen dataclass whose fields are its record, and whose loop stands whole in its
`__call__` or, where it needs only predictions of x_0, in its `solve`.
"""

from dataclasses import fields
from typing import Literal, get_args

from ddpm_lightning.diffusion.clipping import Clip
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers.base import Draw, Network, Sampler, Start, Step
from ddpm_lightning.samplers.ddim import DDIMSampler
from ddpm_lightning.samplers.ddpm import DDPMSampler
from ddpm_lightning.samplers.dpm_solver import DPMSolver2MSampler, DPMSolver2MSDESampler
from ddpm_lightning.samplers.guidance import (
    Guidance,
    Guided,
    check_guidance,
    check_labels,
    count_evaluations,
    make_guidance,
)
from ddpm_lightning.samplers.heun import HeunSampler

__all__ = [
    "SAMPLERS",
    "Clip",
    "DDIMSampler",
    "DDPMSampler",
    "DPMSolver2MSDESampler",
    "DPMSolver2MSampler",
    "Draw",
    "Guidance",
    "Guided",
    "HeunSampler",
    "Network",
    "Sampler",
    "SamplerName",
    "Start",
    "Step",
    "check_guidance",
    "check_labels",
    "count_evaluations",
    "make_guidance",
    "make_sampler",
    "options_of",
]

SamplerName = Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun"]

SAMPLERS: dict[str, type[Sampler]] = {
    sampler.name: sampler
    for sampler in (
        DDPMSampler,
        DDIMSampler,
        DPMSolver2MSampler,
        DPMSolver2MSDESampler,
        HeunSampler,
    )
}


def options_of(name: SamplerName) -> list[str]:
    """List the options that a sampler has."""
    return [option.name for option in fields(SAMPLERS[name])]


def make_sampler(
    name: SamplerName,
    num_steps: int | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    clip: Clip | None = None,
) -> Sampler:
    """Make a sampler from the options of a command line; None is the sampler's own default.

    Args:
        name: `ddpm` (ancestral, Ho et al. 2020), `ddim` (Song et al. 2021), `dpmpp_2m` and
            `dpmpp_2m_sde` (DPM-Solver++, Lu et al. 2022), or `heun` (Karras et al. 2022).
        num_steps: Timesteps to visit.
        eta: DDIM's share of fresh noise, in [0, 1].
        spacing: Which timesteps to visit (see `space_timesteps` and `space_by_log_snr`).
        clip: How the predicted x_0 is clipped (see `clip_x_0`).

    Raises:
        InputError: An option does not belong to this sampler, or is out of range.
    """
    given = {"num_steps": num_steps, "eta": eta, "spacing": spacing, "clip": clip}
    options = {option: value for option, value in given.items() if value is not None}
    for option in options:
        if option not in options_of(name):
            having = [other for other in get_args(SamplerName) if option in options_of(other)]
            raise InputError(
                f"{option} belongs to the {', '.join(having)} sampler; leave it out, or choose "
                f"{having[0]}"
            )
    return SAMPLERS[name](**options)  # type: ignore[arg-type]
