import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_lightning.diffusion.objectives import target
from ddpm_lightning.diffusion.process import Prediction, Process, Variance
from ddpm_lightning.diffusion.schedules import Schedule, make_betas, rescale_to_zero_snr
from ddpm_lightning.diffusion.timesteps import draw_timesteps, space_timesteps
from ddpm_lightning.errors import InputError
from tests.conftest import Golden

SCHEDULES: list[Schedule] = list(get_args(Schedule))
VARIANCES: list[Variance] = list(get_args(Variance))
PREDICTIONS: list[Prediction] = list(get_args(Prediction))
ENDLESS: list[Prediction] = ["x_0", "v"]  # those that work where alphas_cumprod is 0


def process(
    schedule: Schedule = "linear",
    variance: Variance = "fixed_small",
    prediction: Prediction = "noise",
) -> Process:
    return Process(make_betas(schedule, 1000), variance, prediction=prediction)


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
        ("jsd", 0.0),
    ],
)
def test_schedules_end_where_the_authors_do(schedule: Schedule, last_alphas_cumprod: float) -> None:
    last = process(schedule, prediction="x_0").alphas_cumprod[-1].item()
    assert last == pytest.approx(last_alphas_cumprod, rel=1e-9)


def test_linear_schedule_facts() -> None:
    alphas_cumprod = process().alphas_cumprod[[0, 1, 99, 499, 999]]
    expected = [0.9999, 0.9997800920720721, 0.89701814567496, 0.07858724288177824]
    expected.append(4.035829765375676e-05)
    assert_golden(alphas_cumprod, torch.tensor(expected, dtype=torch.float64))
    improved = make_betas("linear", 4000, 2.5e-5, 0.005)
    assert (1 - improved).prod().item() == pytest.approx(4.246652275802249e-05, rel=1e-9)


def test_cosine_caps_only_the_last_beta() -> None:
    betas = make_betas("cosine", 1000)
    assert betas[0].item() == pytest.approx(4.128422482196914e-05, rel=1e-9)
    assert betas[998].item() == pytest.approx(0.7499993929011166, rel=1e-9)
    assert (betas == 0.999).sum() == 1
    assert (1 - betas)[:500].prod().item() == pytest.approx(0.4938435904406382, rel=1e-9)
    longer = make_betas("cosine", 4000)
    assert longer[0].item() == pytest.approx(9.865818813681315e-06, rel=1e-9)
    assert (1 - longer).prod().item() == pytest.approx(1.5179804688514517e-10, rel=1e-9)


def test_jsd_takes_signal_away_evenly() -> None:
    alphas_cumprod = (1 - make_betas("jsd", 1000)).cumprod(0)
    expected = torch.arange(999, -1, -1, dtype=torch.float64) / 1000
    assert_golden(alphas_cumprod, expected)
    assert alphas_cumprod[499].item() == pytest.approx(0.5, rel=1e-12)


def test_sigmoid_schedule_is_the_logistic_function() -> None:
    """Of a symmetric piece of it the middle is a half, whatever it is scaled by."""
    betas = make_betas("sigmoid", 1000)
    alphas_cumprod = (1 - betas).cumprod(0)
    assert alphas_cumprod[499].item() == pytest.approx(0.5, rel=1e-12)

    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for t in (0, 299, 998):
        at = logistic(-3 + 6 * (t + 1) / 1000)
        expected = (logistic(3) - at) / (logistic(3) - logistic(-3))
        assert alphas_cumprod[t].item() == pytest.approx(expected, rel=1e-9)
    assert (betas == 0.999).sum() == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [2, 7, 1000])
def test_rescaling_takes_all_signal_from_the_last_step(
    schedule: Schedule, num_timesteps: int
) -> None:
    before = make_betas(schedule, num_timesteps)
    betas = rescale_to_zero_snr(before)
    assert betas[-1] == 1
    assert ((betas > 0) & (betas < 1))[:-1].all()
    assert betas[0].item() == pytest.approx(before[0].item(), rel=1e-9)
    signal = (1 - betas).cumprod(0).sqrt()
    old = (1 - before).cumprod(0).sqrt()
    if num_timesteps > 2:  # shifted and scaled: ratios of differences stay
        ratio = (old[0] - old[1]) / (old[0] - old[-1])
        assert ((signal[0] - signal[1]) / signal[0]).item() == pytest.approx(ratio.item(), rel=1e-9)
    assert_golden(rescale_to_zero_snr(betas), betas)
    with pytest.raises(InputError, match="at least 2"):
        rescale_to_zero_snr(make_betas(schedule, 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 1000])
def test_every_schedule_is_valid_at_any_length(schedule: Schedule, num_timesteps: int) -> None:
    betas = make_betas(schedule, num_timesteps)
    assert betas.shape == (num_timesteps,)
    assert betas.dtype == torch.float64
    assert ((betas > 0) & (betas < 1))[:-1].all()
    ends = schedule == "jsd"  # its last beta is 1
    assert betas[-1] == 1 if ends else 0 < betas[-1] < 1
    for variance in VARIANCES:
        for prediction in ENDLESS if ends else PREDICTIONS:
            tables = dict(Process(betas, variance, prediction=prediction).named_buffers())
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


GOLDEN_VARIANCES: list[Variance] = ["fixed_small", "fixed_large", "learned_range"]
GOLDEN_PREDICTIONS: dict[str, Prediction] = {"epsilon": "noise", "x_0": "x_0", "mu": "mu"}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("key", GOLDEN_PREDICTIONS)
@pytest.mark.parametrize("variance", GOLDEN_VARIANCES)
def test_reverse_step_is_the_reference(
    golden: Golden, schedule: Schedule, key: str, variance: Variance
) -> None:
    x_t, t = golden[f"{schedule}/x_t"], golden["t"]
    p = process(schedule, variance, GOLDEN_PREDICTIONS[key])
    reverse = p.p_mean_variance(golden.net_for(variance)(x_t, t), x_t, t)
    key = f"{schedule}/{key}/{variance}"
    theirs = golden[f"{key}/p_log_variance"]
    assert_golden(reverse.mean, golden[f"{key}/p_mean"])
    assert_golden(reverse.log_variance.expand_as(theirs), theirs)
    assert_golden(reverse.pred_x_0, golden[f"{key}/pred_x_0"])


@pytest.mark.parametrize("variance", GOLDEN_VARIANCES)
def test_float32_is_close_to_the_reference(golden: Golden, variance: Variance) -> None:
    x_t, t = golden["linear/x_t"].float(), golden["t"]
    reverse = process(variance=variance).p_mean_variance(golden.net_for(variance)(x_t, t), x_t, t)
    assert reverse.mean.dtype == reverse.log_variance.dtype == torch.float32
    for ours, key in ((reverse.mean, "p_mean"), (reverse.log_variance, "p_log_variance")):
        theirs = golden[f"linear/epsilon/{variance}/{key}"].float()
        assert_golden(ours.expand_as(theirs), theirs, rtol=1e-4, atol=1e-6)


def test_a_learned_log_variance_is_the_outputs_second_half(golden: Golden) -> None:
    x_t, t = golden["linear/x_t"], golden["t"]
    for prediction in PREDICTIONS:
        output = golden.learned_net(x_t, t)
        learned = process(variance="learned", prediction=prediction)
        reverse = learned.p_mean_variance(output, x_t, t)
        assert torch.equal(reverse.log_variance, x_t.tanh())
        fixed = process(prediction=prediction).p_mean_variance(golden.net(x_t, t), x_t, t)
        assert torch.equal(reverse.mean, fixed.mean)
        assert torch.equal(reverse.pred_x_0, fixed.pred_x_0)
        assert torch.equal(learned.pred_x_0(output, x_t, t).clamp(-1, 1), fixed.pred_x_0)


def test_a_learned_range_ends_at_the_fixed_variances() -> None:
    x_t, t = torch.zeros(3, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 999])
    p = process(variance="learned_range")

    def log_variance(told: float) -> Tensor:
        output = torch.cat([x_t, torch.full_like(x_t, told)], dim=1)
        return p.p_mean_variance(output, x_t, t).log_variance[:, 0, 0, 0]

    assert_golden(log_variance(-1.0), process().log_variance[t])
    assert_golden(log_variance(1.0), process().betas[t].log())  # beta_0, too
    facts = torch.tensor([-9.513532753635925, -9.422705753622505], dtype=torch.float64)
    assert_golden(log_variance(0.0)[:2], facts)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_outputs_of_another_variance_are_refused(
    golden: Golden, prediction: Prediction, variance: Variance
) -> None:
    x_t, t = golden["linear/x_t"], golden["t"]
    p = process("linear", variance, prediction)
    wrong = golden.net(x_t, t) if p.learns_variance else golden.learned_net(x_t, t)
    for read in (p.pred_x_0, p.p_mean_variance):
        with pytest.raises(InputError, match=f"variance {variance}: 3 channels need a network of"):
            read(wrong, x_t, t)


def test_reverse_facts() -> None:
    small, large = process(), process(variance="fixed_large")
    at = torch.tensor([0, 1, 999])
    facts = [-9.81672513529567, -9.028686371949341, -3.912023005428146]
    assert_golden(large.log_variance[at], torch.tensor(facts, dtype=torch.float64))
    assert small.log_variance[0] == small.log_variance[1]
    variances = small.log_variance.exp()[[1, 999]]
    expected_variances = [5.4531876613021935e-05, 0.01999998352656061]
    assert_golden(variances, torch.tensor(expected_variances, dtype=torch.float64))
    of_x_t, of_noise = small.pred_x_0_coef_x_t[999], small.pred_x_0_coef_output[999]
    assert of_x_t.item() == pytest.approx(157.41045725150062, rel=1e-9)
    assert of_noise.item() == pytest.approx(-157.40728081040757, rel=1e-9)
    snr = small.alphas_cumprod / (1 - small.alphas_cumprod)
    expected_snr = [9999, 4546.357657463682, 8.710448569353932, 0.08528994446263685]
    expected_snr.append(4.0359926511684205e-05)
    found = snr[[0, 1, 99, 499, 999]]
    assert_golden(found, torch.tensor(expected_snr, dtype=torch.float64))
    assert int((snr < 1).nonzero()[0]) == 259
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


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_true_output_gives_back_x_0_and_noise(golden: Golden, prediction: Prediction) -> None:
    p, t = process(prediction=prediction), torch.tensor([0, 500, 999])
    x_0, noise = golden["x_0"], golden["noise"]
    x_t = p.q_sample(x_0, t, noise)
    pred_x_0 = p.pred_x_0(target(p, x_0, x_t, t, noise), x_t, t)
    assert_golden(pred_x_0, x_0, rtol=1e-9, atol=1e-9)
    assert_golden(p.pred_noise(x_0, x_t, t), noise, rtol=1e-9, atol=1e-9)
    posterior = p.posterior(x_0, x_t, t)
    reverse = p.p_mean_variance(target(p, x_0, x_t, t, noise), x_t, t, clip="none")
    assert_golden(reverse.mean, posterior.mean, rtol=1e-9, atol=1e-9)
    assert torch.equal(reverse.log_variance, posterior.log_variance)


@pytest.mark.parametrize("prediction", ENDLESS)
@pytest.mark.parametrize("schedule", ["jsd", "linear"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_a_step_from_pure_noise_is_finite(
    golden: Golden, schedule: Schedule, prediction: Prediction, variance: Variance
) -> None:
    p = Process(rescale_to_zero_snr(make_betas(schedule, 1000)), variance, prediction=prediction)
    t, x_0, noise = torch.full((3,), 999), golden["x_0"], golden["noise"]
    x_t = p.q_sample(x_0, t, noise)
    assert torch.equal(x_t, noise)
    true = target(p, x_0, x_t, t, noise)
    output = torch.cat([true, x_t.tanh()], dim=1) if p.learns_variance else true
    assert_golden(p.pred_x_0(output, x_t, t), x_0)
    assert_golden(p.pred_noise(x_0, x_t, t), noise)
    reverse = p.p_mean_variance(output, x_t, t)
    assert_golden(reverse.mean, p.alphas_cumprod[998].sqrt() * x_0)
    assert reverse.log_variance.isfinite().all()
    alone = p.respace(torch.tensor([999]))
    if variance == "learned":
        with pytest.raises(InputError, match="variance learned: .* learned_range"):
            alone.p_mean_variance(output, x_t, torch.zeros(3, dtype=torch.int64))
    else:
        at_once = alone.p_mean_variance(output, x_t, torch.zeros(3, dtype=torch.int64))
        assert_golden(at_once.mean, x_0)


@pytest.mark.parametrize("prediction", ["noise", "mu"])
def test_pure_noise_needs_another_prediction(prediction: Prediction) -> None:
    with pytest.raises(InputError, match=f"prediction {prediction}: .*predict x_0 or v"):
        process("jsd", prediction=prediction)
    with pytest.raises(InputError, match=f"prediction {prediction}: .*zero_terminal_snr"):
        Process(rescale_to_zero_snr(make_betas("linear", 10)), prediction=prediction)


def test_tables_follow_the_device_but_never_the_dtype() -> None:
    p = process().to(torch.bfloat16).half()
    assert p.alphas_cumprod.dtype == torch.float64
    assert p.timesteps.dtype == torch.int64
    assert torch.equal(p.alphas_cumprod, process().alphas_cumprod)
    assert process().to("meta").alphas_cumprod.is_meta
    assert not p.state_dict()


@pytest.mark.parametrize(
    "betas",
    [[1.0, 0.1], [0.0, 0.1], [0.1, 0.0], [0.1, 1.1], [-0.1, 0.1], [0.1, math.nan], [1.0, 1.0]],
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_process_refuses_betas_outside_its_range(
    betas: list[float], prediction: Prediction
) -> None:
    with pytest.raises(InputError, match=r"\(0, 1\)"):
        Process(torch.tensor(betas, dtype=torch.float64), prediction=prediction)


def test_process_refuses_other_nonsense() -> None:
    with pytest.raises(InputError, match="0 before the last timestep"):
        Process(torch.full((200,), 0.999, dtype=torch.float64), prediction="x_0")
    with pytest.raises(InputError, match="prediction must be one of noise, x_0, mu, v; got 'eps'"):
        process(prediction="eps")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="variance must be one of fixed_small, "):
        process(variance="fixed")  # type: ignore[arg-type]


@pytest.mark.parametrize("t", [-1, 1000])
def test_steps_outside_the_schedule_are_refused(golden: Golden, t: int) -> None:
    p, x, steps = process(), golden["x_0"], torch.tensor([0, 999, t])
    for read in (p.q_sample, p.v):
        with pytest.raises(InputError, match=rf"t {t}: must lie in 0\.\.999, the schedule"):
            read(x, steps, x)
    with pytest.raises(InputError, match=rf"t {t}: must lie in 0\.\.999"):
        p.p_mean_variance(x, x, steps)


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
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_respacing_to_all_timesteps_is_the_identity(
    golden: Golden, variance: Variance, prediction: Prediction
) -> None:
    p = process("linear", variance, prediction)
    same = p.respace(torch.arange(1000))
    assert (same.variance, same.prediction) == (variance, prediction)
    for name, table in p.named_buffers():
        assert_golden(same.get_buffer(name), table, rtol=1e-9)
    x_t, t = golden["linear/x_t"], golden["t"]
    output = golden.net_for(variance)(x_t, t)
    for ours, theirs in zip(
        same.p_mean_variance(output, x_t, t), p.p_mean_variance(output, x_t, t), strict=True
    ):
        assert_golden(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_outputs_mean_the_same_on_fewer_timesteps(golden: Golden, prediction: Prediction) -> None:
    """The true output leads to the true posterior of the longer step; mu is of a single one."""
    p, at = process(prediction=prediction), torch.tensor([3, 500, 999])
    x_0, noise = golden["x_0"], golden["noise"]
    x_t = p.q_sample(x_0, at, noise)
    output = target(p, x_0, x_t, at, noise)
    few, t = p.respace(at), torch.arange(3)
    assert_golden(few.pred_x_0(output, x_t, t), x_0, rtol=1e-9, atol=1e-9)
    expected = few.posterior(x_0, x_t, t).mean
    reverse = few.p_mean_variance(output, x_t, t, clip="none")
    assert_golden(reverse.mean, expected, rtol=1e-9, atol=1e-9)
    twice = few.respace(torch.tensor([0, 2]))
    assert_golden(twice.pred_x_0(output[1:], x_t[1:], torch.tensor([0, 1]))[1], x_0[2], atol=1e-9)


def test_a_learned_variance_is_that_of_single_steps(golden: Golden) -> None:
    x_t, p = golden["linear/x_t"], process(variance="learned")
    output, t = golden.learned_net(x_t, golden["t"]), torch.zeros(3, dtype=torch.int64)
    first = p.respace(torch.arange(10))  # as far as it goes nothing is left out
    assert torch.equal(first.p_mean_variance(output, x_t, t).log_variance, x_t.tanh())
    for timesteps in ([1], [0, 2]):
        few = p.respace(torch.tensor(timesteps))
        few.pred_x_0(output, x_t, t)
        with pytest.raises(InputError, match="variance learned: .* learned_range"):
            few.p_mean_variance(output, x_t, t)


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
