"""How t is drawn in training: by position alone, evenly, or where the losses are."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_lightning.diffusion.timestep_sampling import (
    HISTORY,
    TIMESTEP_SAMPLERS,
    UNIFORM_SHARE,
    LossSecondMoment,
    StratifiedTimesteps,
    TimestepSampler,
    TimestepSampling,
    UniformTimesteps,
)
from ddpm_lightning.diffusion.timesteps import draw_timesteps
from ddpm_lightning.errors import InputError


def warm(num_timesteps: int = 10, seed: int = 0) -> LossSecondMoment:
    """A sampler whose losses are known: those at t are near t + 1."""
    sampler = LossSecondMoment(num_timesteps)
    t = torch.arange(num_timesteps).repeat(HISTORY + 3)
    noise = torch.rand(len(t), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sampler.update(t, t + 1 + noise)
    return sampler


SAMPLERS: list[TimestepSampler] = [UniformTimesteps(10), StratifiedTimesteps(10), warm()]


def ids(sampler: TimestepSampler) -> str:
    return type(sampler).__name__


def test_each_name_has_its_class() -> None:
    assert tuple(TIMESTEP_SAMPLERS) == get_args(TimestepSampling)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=ids)
@pytest.mark.parametrize("batch_size", [12, 7])
def test_draws_depend_on_seed_and_position_alone(sampler: TimestepSampler, batch_size: int) -> None:
    """Whatever slices ranks and micro-batches take, within a step or across steps."""
    positions = np.arange(5 * batch_size, 9 * batch_size)
    whole = sampler.draw(3, positions, batch_size)
    assert whole.t.dtype == torch.int64
    assert 0 <= int(whole.t.min()) <= int(whole.t.max()) < 10
    for rows in (slice(0, batch_size), slice(2, 5), slice(batch_size - 2, None), [20, 3, 21]):
        part = sampler.draw(3, positions[rows], batch_size)
        assert torch.equal(part.t, whole.t[rows])
        assert torch.equal(part.weights, whole.weights[rows])
    assert not torch.equal(sampler.draw(4, positions, batch_size).t, whole.t)
    assert not torch.equal(sampler.draw(3, positions + 4 * batch_size, batch_size).t, whole.t)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=ids)
def test_weighted_means_are_those_of_the_uniform_draw(sampler: TimestepSampler) -> None:
    drawn = sampler.draw(0, np.arange(100_000), 100)
    values = torch.arange(1.0, 11, dtype=torch.float64).square()  # a function of t
    assert (drawn.weights * values[drawn.t]).mean().item() == pytest.approx(38.5, rel=1e-2)
    assert drawn.weights.mean().item() == pytest.approx(1, rel=1e-2)


def test_uniform_draws_are_what_they_were() -> None:
    positions = np.arange(1000)
    drawn = UniformTimesteps(50).draw(7, positions, 10)
    assert torch.equal(drawn.t, draw_timesteps(7, positions, 50))
    assert (drawn.weights == 1).all()


@pytest.mark.parametrize(("num_timesteps", "batch_size"), [(10, 10), (1000, 64), (10, 64), (7, 3)])
def test_a_stratified_batch_covers_the_timesteps_evenly(
    num_timesteps: int, batch_size: int
) -> None:
    sampler = StratifiedTimesteps(num_timesteps)
    batches = []
    for step in range(20):
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        t = sampler.draw(1, positions, batch_size).t
        sorted_t = t.sort().values
        parts = torch.arange(batch_size) * num_timesteps / batch_size
        assert (sorted_t >= parts.floor()).all()
        assert (sorted_t < (parts + num_timesteps / batch_size).ceil()).all()
        batches.append(t)
    if num_timesteps == batch_size:  # each t once, in another order at each step
        assert all(batch.sort().values.equal(torch.arange(10)) for batch in batches)
        assert len({tuple(batch.tolist()) for batch in batches}) == 20


def test_stratified_draws_are_uniform_at_each_position() -> None:
    """Over many steps, the first image of a batch has seen every t alike."""
    t = StratifiedTimesteps(10).draw(0, np.arange(0, 40_000, 4), 4).t
    counts = t.bincount(minlength=10).double()
    assert ((counts - 1000) ** 2 / 1000).sum().item() < 27.9  # 0.999 quantile, 9 degrees


# --- by loss second moment -----------------------------------------------------------------------


def test_draws_are_uniform_until_every_timestep_has_its_losses() -> None:
    sampler, positions = LossSecondMoment(3), np.arange(200)
    uniform = UniformTimesteps(3).draw(5, positions, 8)
    losses = [torch.full((HISTORY - 1,), 2.0), torch.ones(1)]
    for t in range(3):
        for part in losses:
            drawn = sampler.draw(5, positions, 8)
            assert torch.equal(drawn.t, uniform.t)
            assert (drawn.weights == 1).all()
            assert (sampler.probabilities() == 1 / 3).all()
            sampler.update(torch.full((len(part),), t), part * 4**t)
    assert not torch.equal(sampler.draw(5, positions, 8).t, uniform.t)


def test_probabilities_follow_the_root_of_the_second_moment() -> None:
    sampler = LossSecondMoment(4)
    generator = torch.Generator().manual_seed(0)
    seen: list[list[float]] = [[] for _ in range(4)]
    for _ in range(30):  # many of one timestep in a batch, too: the newest ten count
        t = torch.randint(4, (25,), generator=generator)
        losses = torch.rand(25, generator=generator, dtype=torch.float64) + t
        sampler.update(t, losses)
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            seen[step].append(loss)
    moments = [sum(loss**2 for loss in losses[-HISTORY:]) / HISTORY for losses in seen]
    roots = np.sqrt(moments)
    expected = roots / roots.sum() * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / 4
    probabilities = sampler.probabilities()
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    assert probabilities.sum() == pytest.approx(1, rel=1e-12)
    drawn = sampler.draw(0, np.arange(100_000), 8)
    counts = drawn.t.bincount(minlength=4).double()
    wanted = 100_000 * torch.from_numpy(expected)
    chi_square = ((counts - wanted) ** 2 / wanted).sum()
    assert chi_square.item() < 16.3  # 0.999 quantile at 3 degrees of freedom
    torch.testing.assert_close(drawn.weights, torch.from_numpy(1 / (4 * expected))[drawn.t])


def test_a_timestep_without_loss_is_not_forgotten() -> None:
    sampler = LossSecondMoment(2)
    sampler.update(torch.tensor([0, 1]).repeat(HISTORY), torch.tensor([0.0, 1.0]).repeat(HISTORY))
    assert sampler.probabilities()[0] == pytest.approx(UNIFORM_SHARE / 2)
    drawn = sampler.draw(0, np.arange(100_000), 1)
    assert 20 < int((drawn.t == 0).sum()) < 90


def test_its_state_is_all_that_it_draws_from() -> None:
    sampler, other, positions = warm(), LossSecondMoment(10), np.arange(500)
    state = sampler.state_dict()
    other.load_state_dict(state)
    sampler.update(torch.tensor([1, 1]), torch.tensor([50.0, 60.0]))
    assert not torch.equal(other.draw(0, positions, 1).t, sampler.draw(0, positions, 1).t)
    other.update(torch.tensor([1, 1]), torch.tensor([50.0, 60.0]))
    assert torch.equal(other.draw(0, positions, 1).t, sampler.draw(0, positions, 1).t)
    assert all(torch.equal(state[name], warm().state_dict()[name]) for name in state)


@pytest.mark.parametrize(
    "state", [{}, {"losses": torch.zeros(10, HISTORY)}, warm(9).state_dict(), {"losses": [1]}]
)
def test_another_state_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="loss_second_moment: the checkpoint has no"):
        LossSecondMoment(10).load_state_dict(state)
