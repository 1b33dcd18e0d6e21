from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ddpm_lightning.diffusion.process import Process, Variance
from ddpm_lightning.diffusion.schedules import make_betas
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers import DDIMSampler, DDPMSampler, Sampler, Step, make_sampler
from tests.conftest import Golden


def process(variance: Variance = "fixed_small") -> Process:
    return Process(make_betas("linear", 1000), variance)


def run(golden: Golden, sampler: Sampler, p: Process, x_T: str = "noise_2") -> list[Step]:
    """Run a chain on the analytic network with the reference noise at each index."""
    num_steps = sampler.count_steps(p)

    def draws() -> Iterator[Tensor]:
        yield golden[x_T]
        for index in reversed(range(num_steps)):
            yield golden.chain_noise(index)

    return list(sampler(golden.net, p, draws().__next__))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_chain_is_the_reference(golden: Golden, variance: Variance) -> None:
    steps = run(golden, DDPMSampler(), process(variance))
    assert [step.t for step in steps] == list(range(999, -1, -1))
    torch.testing.assert_close(
        steps[-1].x_prev, golden[f"ancestral/{variance}/x_0"], rtol=1e-9, atol=1e-12
    )
    # the last step adds nothing: its coefficients are 1 and 0, but for rounding
    torch.testing.assert_close(steps[-1].x_prev, steps[-1].pred_x_0, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("key", ["ddim50", "250", "10,15,20"])
def test_ddim_chain_is_the_reference(golden: Golden, key: str) -> None:
    respaced = process().respace(golden[f"respace/{key}/timesteps"].long())
    steps = run(golden, DDIMSampler(respaced.num_timesteps), respaced, "noise")
    torch.testing.assert_close(
        steps[-1].x_prev, golden[f"respace/{key}/ddim_chain_x_0"], rtol=1e-9, atol=1e-12
    )


def test_one_ddim_step_is_the_reference(golden: Golden) -> None:
    for row, t in enumerate(golden["ddim/t"].long().tolist()):
        p, x_t = process(), golden["ddim/x_t"][row : row + 1]
        # The whole chain up to t visits index t first.
        upto = p.respace(torch.arange(t + 1))
        step = next(iter(DDIMSampler(t + 1)(golden.net, upto, iter([x_t]).__next__)))
        torch.testing.assert_close(
            step.x_prev, golden["ddim/x_prev_eta0"][row : row + 1], rtol=1e-9, atol=1e-12
        )


def test_ddim_with_eta_1_is_ancestral_with_the_small_variance(golden: Golden) -> None:
    for num_steps in (1000, 50):
        ddpm = run(golden, DDPMSampler(num_steps), process("fixed_small"))
        ddim = run(golden, DDIMSampler(num_steps, eta=1.0), process("fixed_small"))
        torch.testing.assert_close(ddim[-1].x_prev, ddpm[-1].x_prev, rtol=1e-7, atol=1e-9)


def test_eta_between_0_and_1_draws_noise(golden: Golden) -> None:
    ends = [run(golden, DDIMSampler(20, eta), process())[-1].x_prev for eta in (0.0, 0.5, 1.0)]
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


def test_deterministic_ddim_draws_only_x_T(golden: Golden) -> None:
    calls = iter([golden["noise"]])
    assert len(list(DDIMSampler(10)(golden.net, process(), calls.__next__))) == 10


@pytest.mark.parametrize("sampler", [DDPMSampler(7), DDIMSampler(7), DDPMSampler(), DDIMSampler(1)])
def test_chains_end_on_a_clean_image(golden: Golden, sampler: Sampler) -> None:
    steps = run(golden, sampler, process())
    assert len(steps) == sampler.count_steps(process())
    torch.testing.assert_close(steps[-1].x_prev, steps[-1].pred_x_0, rtol=1e-10, atol=1e-12)
    assert steps[-1].x_prev.abs().max() <= 1 + 1e-12


def test_samplers_know_how_many_steps_they_take_by_default() -> None:
    short = Process(make_betas("linear", 20))
    assert DDPMSampler().count_steps(process()) == 1000
    assert DDIMSampler().count_steps(process()) == 50
    assert DDIMSampler().count_steps(short) == DDPMSampler().count_steps(short) == 20


def test_clipping_can_be_switched_off(golden: Golden) -> None:
    for clipped, free in [
        (DDPMSampler(20), DDPMSampler(20, clip="none")),
        (DDIMSampler(20), DDIMSampler(20, clip="none")),
    ]:
        assert run(golden, clipped, process())[-1].x_prev.abs().max() <= 1 + 1e-12
        assert run(golden, free, process())[-1].x_prev.abs().max() > 1


def test_float32_chain_stays_close_to_the_reference(golden: Golden) -> None:
    draws = iter([golden["noise"].float()])
    steps = list(
        DDIMSampler(250)(
            golden.net,
            process().respace(golden["respace/250/timesteps"].long()),
            draws.__next__,
        )
    )
    assert steps[-1].x_prev.dtype == torch.float32
    torch.testing.assert_close(
        steps[-1].x_prev, golden["respace/250/ddim_chain_x_0"].float(), rtol=1e-4, atol=1e-5
    )


def test_make_sampler_knows_its_options() -> None:
    assert make_sampler("ddpm") == DDPMSampler()
    assert make_sampler("ddpm", 10) == DDPMSampler(10)
    assert make_sampler("ddim") == DDIMSampler()
    assert make_sampler("ddim", 10, 0.5) == DDIMSampler(10, 0.5)
    with pytest.raises(InputError, match="eta belongs to"):
        make_sampler("ddpm", eta=0.5)
    with pytest.raises(InputError, match=r"eta must lie in \[0, 1\]"):
        make_sampler("ddim", eta=1.5)
