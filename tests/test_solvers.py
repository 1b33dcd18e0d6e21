"""Solvers on Gaussian data, whose predictions of x_0, flow and marginals are known exactly."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.diffusion.schedules import Schedule, make_betas
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers import (
    DDIMSampler,
    DPMSolver2MSampler,
    DPMSolver2MSDESampler,
    HeunSampler,
)
from ddpm_lightning.samplers.base import CLEAN, Denoise, Level, Solver, levels_of

MEAN, STD = 0.3, 0.5


def grid(num_steps: int, start: float = -3.0, end: float = 2.0) -> list[Level]:
    """Levels evenly spaced in half the log-SNR; the last one is not x_0's."""
    step = (end - start) / num_steps
    points = [start + step * index for index in range(num_steps + 1)]
    return [Level((1 + math.exp(-2 * x)) ** -0.5, (1 + math.exp(2 * x)) ** -0.5) for x in points]


def variance(level: Level) -> float:
    return (level.a * STD) ** 2 + level.s**2


def denoiser(levels: Sequence[Level], mean: float = MEAN) -> Denoise:
    """E[x_0 given x_t] for x_0 from N(mean, STD^2)."""

    def denoise(x_t: Tensor, index: int) -> Tensor:
        level = levels[index]
        return mean + level.a * STD**2 / variance(level) * (x_t - level.a * mean)

    return denoise


class Gaussian:
    """The best prediction of the noise for that data, and a count of the evaluations."""

    def __init__(self, process: Process) -> None:
        self._levels = [*levels_of(process)[-2::-1]]
        self.told: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        index = int(t[0])
        self.told.append(index)
        return self._levels[index].noise(x_t, denoiser(self._levels)(x_t, index))


def errors(sampler: Solver, nums_steps: Sequence[int]) -> list[float]:
    """How far the solver ends from the exact flow, by the number of steps."""
    x_T = torch.tensor([-1.5, -0.3, 0.7, 2.0], dtype=torch.float64)
    found = []
    for num_steps in nums_steps:
        levels = grid(num_steps)
        first, last = levels[0], levels[-1]
        scale = (variance(last) / variance(first)) ** 0.5
        exact = last.a * MEAN + scale * (x_T - first.a * MEAN)
        *_, (x, _) = sampler.solve(denoiser(levels), levels, lambda: x_T)
        found.append(float((x - exact).abs().max()))
    return found


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(DDIMSampler(), 1), (DPMSolver2MSampler(), 2), (HeunSampler(), 2)],
    ids=["ddim", "dpmpp_2m", "heun"],
)
def test_order_of_convergence(sampler: Solver, order: int) -> None:
    found = errors(sampler, (80, 160, 320, 640))
    for coarse, fine in pairwise(found):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)
    assert found[-1] < {1: 2e-3, 2: 1e-5}[order]


def marginal(sampler: Solver, num_steps: int) -> float:
    """The variance at the end, exactly: x is linear in the draws, and these are unit vectors."""
    levels = grid(num_steps)
    units = torch.eye(num_steps + 1, dtype=torch.float64)
    units[0] *= variance(levels[0]) ** 0.5

    draws = iter(units)
    *_, (x, _) = sampler.solve(denoiser(levels, mean=0.0), levels, draws.__next__)
    assert next(draws, None) is None  # x at the first level, then one draw a step
    return float((x**2).sum())


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(DDIMSampler(eta=1.0), 1), (DPMSolver2MSDESampler(), 2)],
    ids=["ddim", "dpmpp_2m_sde"],
)
def test_marginals_with_fresh_noise(sampler: Solver, order: int) -> None:
    wanted = variance(grid(1)[-1])
    found = [abs(marginal(sampler, num_steps) - wanted) for num_steps in (80, 160, 320)]
    for coarse, fine in pairwise(found):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)
    assert found[-1] < {1: 4e-3, 2: 2e-5}[order]


def test_the_mean_with_fresh_noise() -> None:
    for num_steps, tolerance in ((40, 1e-3), (320, 1e-5)):
        levels = grid(num_steps)
        draws = torch.zeros(num_steps + 1, 1, dtype=torch.float64)
        draws[0] = levels[0].a * MEAN
        sampler = DPMSolver2MSDESampler()
        *_, (x, _) = sampler.solve(denoiser(levels), levels, iter(draws).__next__)
        assert float(x) == pytest.approx(levels[-1].a * MEAN, abs=tolerance)


# --- the ends -------------------------------------------------------------------------------------

ALL = [DDIMSampler(), DDIMSampler(eta=1.0), DPMSolver2MSampler(), DPMSolver2MSDESampler()]


@pytest.mark.parametrize("sampler", [*ALL, HeunSampler()], ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_start_without_any_signal(sampler: Solver, num_steps: int) -> None:
    """As on a schedule of zero terminal SNR: x_T says nothing, and all is finite."""
    between = grid(6)[1 : 2 * num_steps - 1 : 2]
    levels = [Level(0.0, 1.0), *between, CLEAN]
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(8, generator=generator, dtype=torch.float64)

    states = list(sampler.solve(denoiser(levels), levels, draw))
    assert len(states) == num_steps
    assert torch.equal(states[0][1], torch.full((8,), MEAN, dtype=torch.float64))
    assert all(x.isfinite().all() for x, _ in states)
    # the last step goes to the last prediction
    torch.testing.assert_close(states[-1][0], states[-1][1], rtol=1e-12, atol=1e-12)


def test_the_step_from_pure_noise_is_the_posterior_with_fresh_noise() -> None:
    """q(x_n given x_T, x_0) at alphas_cumprod_T = 0 is q(x_n given x_0)."""
    levels = [Level(0.0, 1.0), grid(2)[1], CLEAN]
    draws = iter(torch.tensor([[0.7], [-1.1]], dtype=torch.float64))
    first, _ = next(iter(DPMSolver2MSDESampler().solve(denoiser(levels), levels, draws.__next__)))
    assert float(first) == pytest.approx(levels[1].a * MEAN - 1.1 * levels[1].s, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "sampler", "expected"),
    [
        ("linear", HeunSampler(), 2 * 10 - 1),
        ("linear", HeunSampler(7, spacing="even"), 2 * 7 - 1),
        ("linear", HeunSampler(1), 1),
        ("linear", HeunSampler(200), 2 * 200 - 1),
        ("cosine", HeunSampler(), 2 * 10 - 2),  # its last level is pure noise
        ("cosine", HeunSampler(500), 2 * 500 - 1 - 2),
        ("linear", DPMSolver2MSampler(), 20),
        ("cosine", DPMSolver2MSDESampler(6), 6),
        ("cosine", DDIMSampler(spacing="10,15,20"), 45),
    ],
)
def test_evaluations_are_counted_exactly(
    schedule: Schedule, sampler: Solver, expected: int
) -> None:
    process = Process(make_betas(schedule, 1000))
    net = Gaussian(process)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64)

    steps = list(sampler(net, process, draw))
    assert len(net.told) == sampler.count_evaluations(process) == expected
    assert len(steps) == sampler.count_steps(process)
    assert [step.t for step in steps] == sampler.respace(process).timesteps.flip(0).tolist()
    assert steps[-1].x_prev.isfinite().all()
    assert steps[-1].x_prev.abs().max() <= 1 + 1e-9


def test_heun_asks_at_both_ends_of_each_step_but_the_last() -> None:
    process = Process(make_betas("linear", 1000))
    net = Gaussian(process)
    x_T = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    list(HeunSampler(3, spacing="leading")(net, process, lambda: x_T))
    assert net.told == [666, 333, 333, 0, 0]


# --- the way back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "spacing"), [("linear", "even"), ("cosine", "trailing")])
def test_encoding_and_decoding_come_nearer_with_more_steps(
    schedule: Schedule, spacing: str
) -> None:
    process = Process(make_betas(schedule, 1000))
    generator = torch.Generator().manual_seed(0)
    x_0 = MEAN + STD * torch.randn(4, 1, 4, 4, generator=generator, dtype=torch.float64)
    found = []
    for num_steps in (10, 50, 250, 1000):
        sampler = DDIMSampler(num_steps, spacing=spacing, clip="none")
        net = Gaussian(process)
        encoded = list(sampler.encode(net, process, x_0))
        assert len(encoded) == len(net.told) == num_steps
        *_, last = sampler(net, process, iter([encoded[-1]]).__next__)
        found.append(float((last.x_prev - x_0).abs().mean()) * 127.5)
    assert found == sorted(found, reverse=True)
    assert found[-1] <= 0.5  # of 255 levels
    # what 1000 steps give is the flow's own end: x_0 carried to the last level exactly
    top = levels_of(process)[0]
    exact = top.a * MEAN + (variance(top) / STD**2) ** 0.5 * (x_0 - MEAN)
    assert (encoded[-1] - exact).abs().mean() < 0.02


def test_only_what_is_deterministic_has_a_way_back() -> None:
    process = Process(make_betas("linear", 10))
    with pytest.raises(InputError, match="eta 0.5: only the chain of eta 0 has a way back"):
        next(DDIMSampler(5, eta=0.5).encode(Gaussian(process), process, torch.zeros(1, 1, 1, 1)))


def test_a_single_step_there_and_back() -> None:
    process = Process(make_betas("linear", 1000))

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 0.25)

    x_0 = torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(1, 1, 2, 2)
    sampler = DDIMSampler(1, clip="none")
    (latent,) = sampler.encode(net, process, x_0)
    *_, last = sampler(net, process, lambda: latent)
    torch.testing.assert_close(last.x_prev, x_0, rtol=0, atol=1e-10)
