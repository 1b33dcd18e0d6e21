from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from ddpm_lightning.diffusion.objectives import target
from ddpm_lightning.diffusion.process import Prediction, Process, Variance
from ddpm_lightning.diffusion.schedules import make_betas
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers import (
    SAMPLERS,
    Clip,
    DDIMSampler,
    DDPMSampler,
    DPMSolver2MSampler,
    DPMSolver2MSDESampler,
    HeunSampler,
    Network,
    Sampler,
    SamplerName,
    Step,
    make_sampler,
    options_of,
)
from ddpm_lightning.samplers.base import levels_of, make_denoiser
from ddpm_lightning.samplers.ddim import move
from tests.conftest import Golden


def process(variance: Variance = "fixed_small") -> Process:
    return Process(make_betas("linear", 1000), variance)


def run(
    golden: Golden,
    sampler: Sampler,
    p: Process,
    x_T: str = "noise_2",
    net: Network | None = None,
) -> list[Step]:
    """Run a chain, of the analytic network unless told, with the reference noise at each index."""
    num_steps = sampler.count_steps(p)
    net = golden.net_for(p.variance) if net is None else net

    def draws() -> Iterator[Tensor]:
        yield golden[x_T]
        for index in reversed(range(num_steps)):
            yield golden.chain_noise(index)

    return list(sampler(net, p, draws().__next__))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
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
    chosen = DDIMSampler(250) if key == "250" else DDIMSampler(spacing=key)
    by_name = run(golden, chosen, process(), "noise")
    for step, other in zip(steps, by_name, strict=True):
        assert step.t == other.t
        assert torch.equal(step.x_prev, other.x_prev)
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


def test_one_encoding_step_is_the_reference(golden: Golden) -> None:
    p = process()
    levels, denoise = levels_of(p), make_denoiser(golden.net, p, "static")
    for row, t in enumerate([1, 300, 998]):
        x_t = golden["ddim/x_t"][row : row + 1]
        index = 999 - t  # of its level, from the noisiest on
        x_next = move(x_t, denoise(x_t, index), levels[index], levels[index - 1])
        theirs = golden["ddim/x_next"][row : row + 1]
        torch.testing.assert_close(x_next, theirs, rtol=1e-9, atol=1e-12)


def test_encoding_goes_up_by_such_steps(golden: Golden) -> None:
    p, x_0 = process(), golden["x_0"]
    sampler = DDIMSampler(10, clip="none")
    respaced = sampler.respace(p)
    levels, denoise = levels_of(respaced), make_denoiser(golden.net, respaced, "none")
    encoded = list(sampler.encode(golden.net, p, x_0))
    assert len(encoded) == 10
    # the first step: to the lowest timestep, with the noise that the network sees there
    lowest = levels[9]
    first = lowest.a * x_0 + lowest.s * golden.net(x_0, torch.zeros(3))
    torch.testing.assert_close(encoded[0], first, rtol=1e-9, atol=1e-12)
    for index, (x_t, x_next) in enumerate(pairwise(encoded)):
        here = 9 - index
        expected = move(x_t, denoise(x_t, here), levels[here], levels[here - 1])
        assert torch.equal(x_next, expected)


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


@pytest.mark.parametrize(
    "sampler",
    [
        DDPMSampler(7),
        DDIMSampler(7),
        DDPMSampler(),
        DDIMSampler(1),
        DDPMSampler(7, spacing="trailing", clip="dynamic"),
        DDIMSampler(7, eta=1.0, spacing="leading"),
        DPMSolver2MSampler(7),
        DPMSolver2MSampler(1),
        DPMSolver2MSDESampler(7, spacing="log_snr"),
        HeunSampler(7, spacing="3,4"),
        HeunSampler(1, clip="dynamic"),
    ],
)
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
    assert DPMSolver2MSampler().count_steps(process()) == 20
    assert DPMSolver2MSDESampler().count_steps(process()) == 20
    assert HeunSampler().count_steps(process()) == HeunSampler().count_steps(short) == 10
    assert DDPMSampler(spacing="10,15,20").count_steps(process()) == 45
    assert DDIMSampler(50, spacing="ddim50").count_steps(process()) == 50


@pytest.mark.parametrize("prediction", ["x_0", "mu", "v"])
@pytest.mark.parametrize("clip", get_args(Clip))
@pytest.mark.parametrize("name", get_args(SamplerName))
def test_what_the_network_predicts_does_not_matter(
    golden: Golden, name: SamplerName, clip: Clip, prediction: Prediction
) -> None:
    p = process()
    other = Process(p.betas, p.variance, prediction=prediction)

    def net(x: Tensor, t: Tensor) -> Tensor:
        noise = golden.net(x, t)
        return target(other, p.pred_x_0(noise, x, t), x, t, noise)

    sampler = make_sampler(name, 6, clip=clip)
    steps = zip(run(golden, sampler, p), run(golden, sampler, other, net=net), strict=True)
    for mine, theirs in steps:
        torch.testing.assert_close(mine.x_prev, theirs.x_prev, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("name", get_args(SamplerName))
def test_a_learned_variance_counts_where_it_is_drawn_with(
    golden: Golden, name: SamplerName, prediction: Prediction
) -> None:
    """Solvers have no use for it; an ancestral step has the one that the network tells."""
    betas = make_betas("linear", 20)

    def images(variance: Variance, told: float | None, num_steps: int = 20) -> Tensor:
        """Draw with log beta-tilde as the learned variance, unless told another value."""
        p = Process(betas, variance, prediction=prediction)

        def net(x: Tensor, t: Tensor) -> Tensor:
            output = golden.net(x, t)
            if not p.learns_variance:
                return output
            logs = p.posterior_log_variance[t].reshape(-1, 1, 1, 1)
            second = logs.expand_as(x) if told is None else torch.full_like(x, told)
            return torch.cat([output, second], dim=1)

        return run(golden, make_sampler(name, num_steps, clip="none"), p, net=net)[-1].x_prev

    is_ancestral = name == "ddpm"
    for num_steps in (20, 6):
        fixed = images("fixed_small", None, num_steps)
        torch.testing.assert_close(images("learned_range", -1.0, num_steps), fixed)
        another = images("learned_range", 0.5, num_steps)
        assert torch.equal(another, fixed) != is_ancestral
    torch.testing.assert_close(images("learned", None), images("fixed_small", None))
    if is_ancestral:  # the network knows no variance of longer steps
        with pytest.raises(InputError, match="variance learned: .* take all timesteps"):
            images("learned", None, 6)
    else:
        assert torch.equal(images("learned", None, 6), images("fixed_small", None, 6))


def test_clipping_can_be_switched_off(golden: Golden) -> None:
    for clipped, free in [
        (DDPMSampler(20), DDPMSampler(20, clip="none")),
        (DDIMSampler(20), DDIMSampler(20, clip="none")),
        (DPMSolver2MSampler(20), DPMSolver2MSampler(20, clip="none")),
        (DPMSolver2MSDESampler(20), DPMSolver2MSDESampler(20, clip="none")),
        (HeunSampler(20), HeunSampler(20, clip="none")),
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
    assert make_sampler("heun", spacing="even", clip="none") == HeunSampler(
        spacing="even", clip="none"
    )
    for name in get_args(SamplerName):
        assert type(make_sampler(name)) is SAMPLERS[name]
        assert make_sampler(name, 3, clip="dynamic").clip == "dynamic"
        assert set(options_of(name)) == {field.name for field in fields(SAMPLERS[name])}
        if name != "ddim":
            with pytest.raises(InputError, match="eta belongs to the ddim sampler; leave it out"):
                make_sampler(name, eta=0.5)
    assert tuple(SAMPLERS) == get_args(SamplerName)
    with pytest.raises(InputError, match="num_steps 3: the spacing ddim5 has 5 steps"):
        make_sampler("ddim", 3, spacing="ddim5")
    with pytest.raises(InputError, match="spacing evn: none of even, leading, trailing"):
        make_sampler("heun", spacing="evn")
    with pytest.raises(InputError, match=r"eta must lie in \[0, 1\]"):
        make_sampler("ddim", eta=1.5)
