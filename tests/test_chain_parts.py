"""Chains that start in the middle, mixtures of noised images, derived seeds."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ddpm_lightning.diffusion.interpolation import mix_noised
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.diffusion.schedules import make_betas
from ddpm_lightning.errors import InputError
from ddpm_lightning.randomness import NUM_SEEDS, derive_seed
from ddpm_lightning.samplers import (
    DDIMSampler,
    DDPMSampler,
    DPMSolver2MSampler,
    DPMSolver2MSDESampler,
    HeunSampler,
    Sampler,
    Start,
)
from tests.conftest import Golden
from tests.training import NUM_TIMESTEPS, tiny_module

SAMPLERS = [
    DDPMSampler(),
    DDPMSampler(10),
    DDIMSampler(),
    DDIMSampler(10, spacing="trailing"),
    DDIMSampler(10, 0.7, spacing="log_snr"),
    DDIMSampler(spacing="ddim20", clip="none"),
    HeunSampler(10),
]
# Their steps need predictions of earlier ones, so that a part's first step is of first order.
MULTISTEP = [DPMSolver2MSampler(10), DPMSolver2MSDESampler(spacing="4,6")]


def process(num_timesteps: int = 100) -> Process:
    return Process(make_betas("linear", num_timesteps))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_part_of_a_chain_is_its_end(golden: Golden, sampler: Sampler) -> None:
    """From a state of the whole chain, with the noise that was left, it ends where that ends."""
    draws: list[Tensor] = []

    def draw() -> Tensor:
        angle = torch.tensor(float(len(draws)))
        draws.append(golden["noise"] * torch.cos(angle) + golden["noise_2"] * torch.sin(angle))
        return draws[-1]

    states, num_drawn = [], []
    whole = sampler(golden.net, process(), draw)
    for step in whole:
        states.append(step)
        num_drawn.append(len(draws))
    num_steps = sampler.count_steps(process())
    assert len(states) == num_steps
    for done in (0, num_steps // 3, num_steps - 2):
        x_t, t = states[done].x_prev, states[done + 1].t
        left = iter([x_t, *draws[num_drawn[done] :]])
        part, upto = sampler.below(process(), t)
        rest = list(part(golden.net, upto, left.__next__))
        assert [step.t for step in rest] == [step.t for step in states[done + 1 :]]
        torch.testing.assert_close(rest[-1].x_prev, states[-1].x_prev, rtol=1e-9, atol=1e-11)
        assert next(left, None) is None


@pytest.mark.parametrize("sampler", [*SAMPLERS, *MULTISTEP])
def test_a_part_visits_t_and_what_is_below(sampler: Sampler) -> None:
    visited = sampler.respace(process()).timesteps
    for t in (99, 63, 1, 0):
        part, upto = sampler.below(process(), t)
        timesteps = part.respace(upto).timesteps.tolist()
        assert timesteps == [*visited[visited < t].tolist(), t]
        assert part.count_steps(upto) == part.num_steps == len(timesteps)
    # the whole chain is the whole process, to the last bit
    whole, all_of_it = sampler.below(process(), int(visited[-1]))
    for name, table in whole.respace(all_of_it).named_buffers():
        assert torch.equal(table, sampler.respace(process()).get_buffer(name)), name
    for t in (-1, 100):
        with pytest.raises(InputError, match="timestep"):
            sampler.below(process(), t)


def test_the_module_goes_on_from_a_start() -> None:
    """Its first noise is then the seeds' first draw."""
    module = tiny_module(image_shape=(1, 8, 8)).eval()
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    *_, last = module.denoise([5, 6], DDPMSampler(), Start(x_t.double(), 7))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    def draws() -> Iterator[Tensor]:
        yield x_t
        while True:
            yield torch.stack([torch.randn(1, 8, 8, generator=g) for g in generators])

    upto = module.process.respace(torch.arange(8))
    *_, expected = DDPMSampler()(module, upto, draws().__next__)
    assert last.x_prev.dtype == torch.float32
    assert torch.equal(last.x_prev, expected.x_prev)
    # from the top it is the whole chain
    starts = torch.stack([torch.randn(1, 8, 8, generator=g.manual_seed(3)) for g in generators])
    *_, whole = module.denoise([5, 6], DDIMSampler(), Start(starts, NUM_TIMESTEPS - 1))
    *_, same = module.denoise([3, 3], DDIMSampler())
    assert torch.equal(whole.x_prev, same.x_prev)


@pytest.mark.parametrize("num_noising_steps", [0, 1, 40, 100])
def test_mixtures(num_noising_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0, 0.25, 0.5, 1], dtype=torch.float64)
    mixed = mix_noised(process(), x_0, noise, num_noising_steps, weights)
    alpha_cumprod = (1 - make_betas("linear", 100))[:num_noising_steps].prod()  # 1 of none
    a, b = alpha_cumprod.sqrt() * x_0 + (1 - alpha_cumprod).sqrt() * noise
    expected = torch.stack([a, 0.75 * a + 0.25 * b, (a + b) / 2, b])
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    # from the other end it is the same
    swapped = mix_noised(process(), x_0.flip(0), noise.flip(0), num_noising_steps, 1 - weights)
    torch.testing.assert_close(mixed, swapped, rtol=1e-12, atol=1e-14)


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(seed, *keys) for seed in range(9) for keys in ((0,), (1,), (0, 1), (1, 0))}
    assert len(seeds | set(range(9))) == 9 * 4 + 9
    assert all(0 <= seed < NUM_SEEDS for seed in seeds)
    assert derive_seed(3, 1, 2) == derive_seed(derive_seed(3, 1), 2)
    assert derive_seed(3) == 3
