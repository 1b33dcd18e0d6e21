"""Our samplers against diffusers' schedulers, step by step, where both define the same thing.

Their tables are float32, and are replaced by float64 ones, so that the comparison can be strict.
What differs by design, and is not compared:
- DPMSolverMultistepScheduler's own `linspace` and `leading` visit one timestep more and leave out
  the lowest; it is given our timesteps.
- DDPMScheduler and DDIMScheduler take the neighbour of t to be t - T // S, which is no timestep of
  `linspace`, and of `trailing` only where S divides T.
- HeunDiscreteScheduler corrects every step but the last; we leave those from nearly pure noise
  (noise to signal above 200), which the linear schedule does not have.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.diffusion.schedules import make_betas
from ddpm_lightning.diffusion.timesteps import space_timesteps
from ddpm_lightning.samplers import (
    Clip,
    DDIMSampler,
    DDPMSampler,
    DPMSolver2MSampler,
    DPMSolver2MSDESampler,
    HeunSampler,
    Sampler,
)
from tests.conftest import Golden

BETAS = make_betas("linear", 1000)
PROCESS = Process(BETAS, "fixed_small")
RATIOS = ((1 - PROCESS.alphas_cumprod) / PROCESS.alphas_cumprod).sqrt()  # their sigmas

# how theirs are told to clip as ours do; a maximum of 1 makes their quantile's limit 1
THRESHOLDS: dict[Clip, dict[str, Any]] = {
    "static": {"thresholding": True, "sample_max_value": 1.0},
    "dynamic": {"thresholding": True, "sample_max_value": 1e9},
    "none": {"thresholding": False},
}


def scaled(golden: Golden, x: Tensor, t: Tensor) -> Tensor:
    """A network whose predictions leave [-1, 1], so that clipping shows."""
    return 0.8 * golden.net(x, t)


def ours(golden: Golden, sampler: Sampler, x_T: Tensor) -> list[Tensor]:
    """Our chain's states after each step, its draws keyed by the number of the step."""

    def draws() -> Iterator[Tensor]:
        yield x_T
        for index in range(1000):
            yield golden.chain_noise(index)

    steps = sampler(lambda x, t: scaled(golden, x, t), PROCESS, draws().__next__)
    return [step.x_prev for step in steps]


def timesteps_of(sampler: Sampler) -> list[int]:
    timesteps: list[int] = sampler.respace(PROCESS).timesteps.flip(0).tolist()
    return timesteps


def assert_same(mine: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("theirs", "our_spacing"),
    [("leading", "leading"), ("trailing", "trailing"), ("linspace", "even")],
)
def test_spacings_are_the_same(theirs: str, our_spacing: str) -> None:
    """But for `even`: ties (499.5 of 999 steps), and a single step, which is theirs at t = 0."""
    for num_steps in (7, 20, 50, 300, 1000, *([] if our_spacing == "even" else [1, 999])):
        scheduler = DDIMScheduler(timestep_spacing=theirs)
        scheduler.set_timesteps(num_steps)
        found = space_timesteps(1000, num_steps, our_spacing).flip(0)
        assert torch.equal(found, scheduler.timesteps)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddpm(golden: Golden, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDPMScheduler(
        trained_betas=BETAS.numpy(),
        variance_type="fixed_small",
        clip_sample=True,
        timestep_spacing=spacing,
    )
    scheduler.alphas_cumprod = PROCESS.alphas_cumprod
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(50)
    x, states = golden["noise_2"], []
    for index, t in enumerate(scheduler.timesteps.tolist()):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor",
            lambda *_, index=index, **__: golden.chain_noise(index),
        )
        x = scheduler.step(scaled(golden, x, torch.full((3,), t)), t, x).prev_sample
        states.append(x)
    assert_same(ours(golden, DDPMSampler(50, spacing=spacing), golden["noise_2"]), states, 1e-7)


@pytest.mark.parametrize("clip", ["static", "dynamic", "none"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(golden: Golden, spacing: str, clip: Clip) -> None:
    scheduler = DDIMScheduler(
        trained_betas=BETAS.numpy(),
        set_alpha_to_one=True,
        clip_sample=False,
        timestep_spacing=spacing,
        **THRESHOLDS[clip],
    )
    scheduler.alphas_cumprod = PROCESS.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(50)
    x, states = golden["noise"], []
    for index, t in enumerate(scheduler.timesteps.tolist()):
        noise = golden.chain_noise(index)
        output = scaled(golden, x, torch.full((3,), t))
        x = scheduler.step(
            output, t, x, eta=0.5, use_clipped_model_output=True, variance_noise=noise
        ).prev_sample
        states.append(x)
    sampler = DDIMSampler(50, eta=0.5, spacing=spacing, clip=clip)
    assert_same(ours(golden, sampler, golden["noise"]), states, 1e-9)


@pytest.mark.parametrize("clip", ["static", "dynamic", "none"])
@pytest.mark.parametrize("num_steps", [10, 25])
@pytest.mark.parametrize("stochastic", [False, True])
def test_dpm_solver_2m(golden: Golden, stochastic: bool, num_steps: int, clip: Clip) -> None:
    """Their step casts its input to float32, so that more than 1e-5 cannot be asked."""
    kind = DPMSolver2MSDESampler if stochastic else DPMSolver2MSampler
    sampler = kind(num_steps, clip=clip)
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=BETAS.numpy(),
        solver_order=2,
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
        **THRESHOLDS[clip],
    )
    timesteps = timesteps_of(sampler)
    scheduler.set_timesteps(timesteps=timesteps)
    scheduler.sigmas = torch.cat([RATIOS[timesteps], torch.zeros(1, dtype=torch.float64)])
    x, states = golden["noise"], []
    for index, t in enumerate(timesteps):
        output = scaled(golden, x, torch.full((3,), t))
        noise = golden.chain_noise(index) if stochastic else None
        x = scheduler.step(output, t, x, variance_noise=noise).prev_sample
        states.append(x)
    assert_same(ours(golden, sampler, golden["noise"]), states, 1e-5)


@pytest.mark.parametrize("clip", ["static", "none"])  # theirs has no dynamic clipping
@pytest.mark.parametrize("spacing", ["trailing", "leading", "even"])
def test_heun(golden: Golden, spacing: str, clip: Clip) -> None:
    """Theirs goes down in y = x / a, by two calls a step."""
    sampler = HeunSampler(12, spacing=spacing, clip=clip)
    scheduler = HeunDiscreteScheduler(trained_betas=BETAS.numpy(), clip_sample=clip == "static")
    timesteps = timesteps_of(sampler)
    scheduler.set_timesteps(timesteps=timesteps)
    ratios = RATIOS[timesteps]
    zero = torch.zeros(1, dtype=torch.float64)
    scheduler.sigmas = torch.cat([ratios[:1], ratios[1:].repeat_interleave(2), zero])
    told = np.array([timesteps[0], *np.repeat(timesteps[1:], 2)])
    assert np.array_equal(scheduler.timesteps.numpy(), told)
    assert len(told) == sampler.count_evaluations(PROCESS)
    y = golden["noise"] * (ratios[0] ** 2 + 1).sqrt()
    states = []
    for index, t in enumerate(told.tolist()):
        x = scheduler.scale_model_input(y, t)
        y = scheduler.step(scaled(golden, x, torch.full((3,), t)), t, y).prev_sample
        if index % 2 == 1 or index == len(told) - 1:  # a whole step is done
            ratio = scheduler.sigmas[scheduler.step_index]
            states.append(y / (ratio**2 + 1).sqrt())
    assert_same(ours(golden, sampler, golden["noise"]), states, 1e-9)
