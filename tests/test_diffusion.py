import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_lightning.diffusion.objectives import simple_loss
from ddpm_lightning.diffusion.process import Process, Variance
from ddpm_lightning.diffusion.schedules import Schedule, make_betas
from ddpm_lightning.diffusion.timesteps import draw_timesteps, space_timesteps
from ddpm_lightning.errors import InputError
from tests.conftest import Golden

SCHEDULES: list[Schedule] = list(get_args(Schedule))
VARIANCES: list[Variance] = list(get_args(Variance))


def process(schedule: Schedule = "linear", variance: Variance = "fixed_small") -> Process:
    return Process(make_betas(schedule, 1000), variance)


def assert_golden(ours: Tensor, theirs: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, check_dtype=False)


# --- schedules ---------------------------------------------------------------------------------


def test_cosine_schedule_is_the_reference(golden: Golden) -> None:
    assert_golden(make_betas("cosine", 1000), golden["betas_cosine_1000"])


@pytest.mark.parametrize(
    ("schedule", "last_alphas_cumprod"),
    [
        ("linear", 4.035829765375676e-05),
        ("quad", 7.334124595808159e-04),
        ("warmup10", 4.613686681671336e-09),
        ("warmup50", 2.6061351337022697e-07),
        ("const", 1.6829673572159268e-09),
        ("cosine", 2.4287669070348567e-09),
    ],
)
def test_schedules_end_where_the_authors_do(schedule: Schedule, last_alphas_cumprod: float) -> None:
    last = process(schedule).alphas_cumprod[-1].item()
    assert last == pytest.approx(last_alphas_cumprod, rel=1e-9)


def test_linear_schedule_facts() -> None:
    alphas_cumprod = process().alphas_cumprod[[0, 1, 99, 499, 999]]
    expected = [0.9999, 0.9997800920720721, 0.89701814567496, 0.07858724288177824]
    assert_golden(alphas_cumprod[:4], torch.tensor(expected, dtype=torch.float64))
    improved = make_betas("linear", 4000, 2.5e-5, 0.005)
    assert (1 - improved).prod().item() == pytest.approx(4.246652275802249e-05, rel=1e-9)


def test_cosine_caps_only_the_last_beta() -> None:
    betas = make_betas("cosine", 1000)
    assert betas[0].item() == pytest.approx(4.128422482196914e-05, rel=1e-9)
    assert betas[998].item() == pytest.approx(0.7499993929011166, rel=1e-9)
    assert (betas == 0.999).sum() == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 1000])
def test_every_schedule_is_valid_at_any_length(schedule: Schedule, num_timesteps: int) -> None:
    betas = make_betas(schedule, num_timesteps)
    assert betas.shape == (num_timesteps,)
    assert betas.dtype == torch.float64
    assert ((betas > 0) & (betas < 1)).all()
    for variance in VARIANCES:
        tables = dict(Process(betas, variance).named_buffers())
        assert all(table.isfinite().all() for table in tables.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 0), "num_timesteps must be at least 1, got 0"),
        (("linear", 10, 0.0), "0 < beta_start"),
        (("linear", 10, 0.1, 1.0), "beta_end < 1"),
        (("linaer", 10), "linear, quad"),
    ],
)
def test_bad_schedules_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_betas(*arguments)  # type: ignore[arg-type]


# --- process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_forward_process_is_the_reference(golden: Golden, schedule: Schedule) -> None:
    t = golden["t"]
    x_t = process(schedule).q_sample(golden["x_0"], t, golden["noise"])
    assert_golden(x_t, golden[f"{schedule}/x_t"])
    posterior = process(schedule).posterior(golden["x_0"], golden[f"{schedule}/x_t"], t)
    assert_golden(posterior.mean, golden[f"{schedule}/posterior_mean"])
    theirs = golden[f"{schedule}/posterior_log_variance"]
    assert_golden(posterior.log_variance.expand_as(theirs), theirs)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_reverse_step_is_the_reference(
    golden: Golden, schedule: Schedule, variance: Variance
) -> None:
    x_t, t = golden[f"{schedule}/x_t"], golden["t"]
    reverse = process(schedule, variance).p_mean_variance(golden.net(x_t, t), x_t, t)
    key = f"{schedule}/epsilon/{variance}"
    theirs = golden[f"{key}/p_log_variance"]
    assert_golden(reverse.mean, golden[f"{key}/p_mean"])
    assert_golden(reverse.log_variance.expand_as(theirs), theirs)
    assert_golden(reverse.pred_x_0, golden[f"{key}/pred_x_0"])


@pytest.mark.parametrize("variance", VARIANCES)
def test_float32_is_close_to_the_reference(golden: Golden, variance: Variance) -> None:
    x_t, t = golden["linear/x_t"].float(), golden["t"]
    reverse = process(variance=variance).p_mean_variance(golden.net(x_t, t), x_t, t)
    assert reverse.mean.dtype == torch.float32
    assert_golden(
        reverse.mean, golden[f"linear/epsilon/{variance}/p_mean"].float(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_simple_loss_is_the_reference(golden: Golden, schedule: Schedule) -> None:
    loss = simple_loss(golden.net, process(schedule), golden["x_0"], golden["t"], golden["noise"])
    assert_golden(loss, golden[f"{schedule}/epsilon/fixed_small/training_loss_simple"])


def test_reverse_facts() -> None:
    small, large = process(), process(variance="fixed_large")
    at = torch.tensor([0, 1, 999])
    facts = [-9.81672513529567, -9.028686371949341, -3.912023005428146]
    assert_golden(large.log_variance[at], torch.tensor(facts, dtype=torch.float64))
    assert small.log_variance[0] == small.log_variance[1]
    assert small.posterior_mean_coef_x_0[0].item() == pytest.approx(1, abs=1e-12)
    assert small.posterior_mean_coef_x_t[0].item() == 0
    coefficients = [
        small.posterior_mean_coef_x_0[1].item(),
        small.posterior_mean_coef_x_t[1].item(),
        small.posterior_mean_coef_x_0[999].item(),
        small.posterior_mean_coef_x_t[999].item(),
    ]
    expected = [0.5452914995102903, 0.4547084989905303, 1.2835148717224682e-4, 0.9899486782675173]
    assert coefficients == pytest.approx(expected, rel=1e-9)


def test_posterior_follows_from_bayes() -> None:
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    p = process()
    x_0, x_t, t = 0.3, -0.7, 400
    beta, before = p.betas[t].item(), p.alphas_cumprod[t - 1].item()
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (math.sqrt(1 - beta) * x_t / beta + math.sqrt(before) * x_0 / (1 - before)) / precision
    posterior = p.posterior(
        torch.full((1, 1, 1, 1), x_0, dtype=torch.float64),
        torch.full((1, 1, 1, 1), x_t, dtype=torch.float64),
        torch.tensor([t]),
    )
    assert posterior.mean.item() == pytest.approx(mean, rel=1e-12)
    assert posterior.log_variance.item() == pytest.approx(-math.log(precision), rel=1e-12)


def test_unclipped_mean_is_algorithm_2(golden: Golden) -> None:
    p, x_t, t = process(), golden["linear/x_t"], golden["t"]
    noise = golden.net(x_t, t)
    beta, cumprod = (a[t].reshape(-1, 1, 1, 1) for a in (p.betas, p.alphas_cumprod))
    expected = (x_t - beta / (1 - cumprod).sqrt() * noise) / (1 - beta).sqrt()
    # sqrt(1/alphas_cumprod - 1) cancels digits at t = 0
    assert_golden(
        p.p_mean_variance(noise, x_t, t, clip="none").mean, expected, rtol=1e-8, atol=1e-9
    )


def test_true_noise_gives_back_x_0(golden: Golden) -> None:
    p, t = process(), torch.tensor([0, 500, 999])
    x_t = p.q_sample(golden["x_0"], t, golden["noise"])
    assert_golden(p.pred_x_0(golden["noise"], x_t, t), golden["x_0"], rtol=1e-9, atol=1e-9)


def test_tables_follow_the_device_but_never_the_dtype() -> None:
    p = process().to(torch.bfloat16).half()
    assert p.alphas_cumprod.dtype == torch.float64
    assert p.timesteps.dtype == torch.int64
    assert torch.equal(p.alphas_cumprod, process().alphas_cumprod)
    assert process().to("meta").alphas_cumprod.is_meta
    assert not p.state_dict()


def test_process_refuses_betas_outside_its_range() -> None:
    with pytest.raises(InputError, match=r"\(0, 1\)"):
        Process(torch.tensor([0.1, 1.0], dtype=torch.float64))


# --- timesteps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["ddim50", "250", "10,15,20"])
def test_respaced_betas_are_the_reference(golden: Golden, key: str) -> None:
    timesteps = golden[f"respace/{key}/timesteps"].long()
    respaced = process().respace(timesteps)
    assert torch.equal(respaced.timesteps, timesteps)
    assert_golden(respaced.betas, golden[f"respace/{key}/betas"])


def test_even_spacing_is_the_reference(golden: Golden) -> None:
    assert torch.equal(space_timesteps(1000, 250), golden["respace/250/timesteps"].long())


@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 1000])
def test_even_spacing_reaches_both_ends(num_timesteps: int) -> None:
    for num_steps in {1, min(2, num_timesteps), num_timesteps // 2 + 1, num_timesteps}:
        timesteps = space_timesteps(num_timesteps, num_steps)
        assert len(timesteps) == num_steps
        assert timesteps[-1] == num_timesteps - 1
        assert num_steps == 1 or timesteps[0] == 0
        assert (timesteps.diff() > 0).all()


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps: int) -> None:
    with pytest.raises(InputError, match=r"1\.\.1000"):
        space_timesteps(1000, num_steps)


@pytest.mark.parametrize("variance", VARIANCES)
def test_respacing_to_all_timesteps_is_the_identity(variance: Variance) -> None:
    p = process(variance=variance)
    same = p.respace(torch.arange(1000))
    for name, table in p.named_buffers():
        assert_golden(same.get_buffer(name), table, rtol=1e-9)


@pytest.mark.parametrize("timesteps", [[], [3, 3], [5, 2], [-1, 2], [0, 1000]])
def test_impossible_timesteps_are_refused(timesteps: list[int]) -> None:
    with pytest.raises(InputError, match="timestep"):
        process().respace(torch.tensor(timesteps, dtype=torch.int64))


def test_drawn_timesteps_are_uniform_and_depend_on_position_alone() -> None:
    positions = np.arange(100_000)
    t = draw_timesteps(3, positions, 10)
    assert torch.equal(draw_timesteps(3, positions[500:600], 10), t[500:600])
    assert not torch.equal(draw_timesteps(4, positions, 10), t)
    counts = t.bincount(minlength=10).double()
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum().item()
    assert chi_square < 27.9  # 0.999 quantile at 9 degrees of freedom
