"""The bound's terms: the reference's numbers, and what follows without any network."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_lightning.diffusion.clipping import Clip
from ddpm_lightning.diffusion.likelihood import (
    Bound,
    bound_terms,
    discretised_log_likelihood,
    normal_kl,
    prior_bits_per_dim,
    rate_distortion,
    vlb_term,
)
from ddpm_lightning.diffusion.process import Prediction, Process, Variance
from ddpm_lightning.diffusion.schedules import Schedule, make_betas, rescale_to_zero_snr
from ddpm_lightning.images import to_float
from tests.conftest import Golden
from tests.test_diffusion import GOLDEN_PREDICTIONS, GOLDEN_VARIANCES, assert_golden, process

INTERIOR = 127  # a grey level in the middle of the range


def pixels(level: int, num_pixels: int) -> Tensor:
    """x of one grey level, float64 [1, 1, 1, num_pixels]."""
    images = torch.full((1, 1, 1, num_pixels), level, dtype=torch.uint8)
    return to_float(images, torch.float64)


def normal_quantiles(num: int) -> Tensor:
    """Values whose mean of a function is close to its mean over N(0, 1), float64 [1, 1, 1, num]."""
    levels = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    return (math.sqrt(2) * torch.erfinv(2 * levels - 1)).reshape(1, 1, 1, num)


def terms(p: Process, x_0: Tensor, noise: Tensor, error: float | None) -> Tensor:
    """Terms at all t, float64 [T], of a network that says noise + error; zero where it is None."""
    t = torch.arange(p.num_timesteps)
    x_0, noise = (value.expand(len(t), *value.shape[1:]) for value in (x_0, noise))
    x_t = p.q_sample(x_0, t, noise)
    output = torch.zeros_like(x_t) if error is None else noise + error
    return vlb_term(p, output, x_0, x_t, t, clip="none")


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("key", GOLDEN_PREDICTIONS)
@pytest.mark.parametrize("variance", GOLDEN_VARIANCES)
def test_terms_are_the_reference(
    golden: Golden, schedule: Schedule, key: str, variance: Variance
) -> None:
    p = process(schedule, variance, GOLDEN_PREDICTIONS[key])
    x_0, x_t, t = golden["x_0"], golden[f"{schedule}/x_t"], golden["t"]
    output = golden.net_for(variance)(x_t, t)
    clips: tuple[tuple[Clip, str], ...] = (("none", ""), ("static", "_clipped"))
    for clip, suffix in clips:
        theirs = golden[f"{schedule}/{key}/{variance}/vlb_term_bits{suffix}"]
        assert_golden(vlb_term(p, output, x_0, x_t, t, clip), theirs)
        single = vlb_term(p, output.float(), x_0.float(), x_t.float(), t, clip)
        assert single.dtype == torch.float32
        assert_golden(single, theirs.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variance", GOLDEN_VARIANCES)
def test_the_whole_bound_is_the_reference(golden: Golden, variance: Variance) -> None:
    """All terms, each t with noise of its own; the reference has the last t first."""
    p, key = process(variance=variance), f"bits/{variance}"
    noises = (golden.chain_noise(index) for index in range(999, -1, -1))
    bound = bound_terms(golden.net_for(variance), p, golden["x_0"], lambda: next(noises))
    assert next(noises, None) is None
    assert_golden(bound.terms.flip(1), golden[f"{key}/vb"])
    assert_golden(bound.x_0_mse.flip(1), golden[f"{key}/xstart_mse"])
    assert_golden(bound.noise_mse.flip(1), golden[f"{key}/mse"])
    assert_golden(bound.prior, golden[f"{key}/prior_bpd"])
    assert_golden(bound.total, golden[f"{key}/total_bpd"])
    assert_golden(bound.total, bound.prior + bound.terms.sum(dim=1), rtol=1e-14)


def test_rate_and_distortion(golden: Golden) -> None:
    """Eq. 5 summed from the last t down to each index, and 127.5 levels in 1 of x."""
    terms, mse = golden["bits/fixed_large/vb"], golden["bits/fixed_large/xstart_mse"]
    prior = golden["bits/fixed_large/prior_bpd"]
    bound = Bound(prior, terms.flip(1), mse.flip(1), torch.zeros_like(mse))
    rate, rmse = rate_distortion(bound)
    for index in (999, 998, 500, 1, 0):
        known = (prior + terms[:, : 999 - index].sum(dim=1)).mean()
        assert rate[index].item() == pytest.approx(known.item(), rel=1e-12)
        levels = 127.5 * math.sqrt(mse[:, 999 - index].mean().item())
        assert rmse[index].item() == pytest.approx(levels, rel=1e-12)
    assert rate[0].item() == pytest.approx((bound.total - bound.terms[:, 0]).mean().item())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_prior_is_the_reference(golden: Golden, schedule: Schedule) -> None:
    theirs = golden[f"{schedule}/prior_bits_per_dim"]
    assert_golden(prior_bits_per_dim(process(schedule), golden["x_0"]), theirs, atol=1e-17)
    single = prior_bits_per_dim(process(schedule), golden["x_0"].float())
    assert single.dtype == torch.float32
    assert_golden(single, theirs.float(), rtol=1e-4, atol=1e-9)


# --- what follows by itself ----------------------------------------------------------------------


def test_kl_of_known_normals() -> None:
    def kl(*values: float) -> float:
        return normal_kl(*(torch.tensor(value, dtype=torch.float64) for value in values)).item()

    assert kl(0, 0, 1, 0) == pytest.approx(0.5, rel=1e-15)
    assert kl(0, 0, 0, math.log(2)) == pytest.approx(0.09657359027997264, rel=1e-12)
    assert kl(0.3, -9.8, 0.3, -9.8) == 0
    by_integration = torch.distributions.kl_divergence(
        torch.distributions.Normal(0.2, 0.5), torch.distributions.Normal(-0.3, 1.5)
    )
    assert kl(0.2, 2 * math.log(0.5), -0.3, 2 * math.log(1.5)) == pytest.approx(
        by_integration.item(), rel=1e-6
    )


def test_prior_of_known_images() -> None:
    p = process()
    assert prior_bits_per_dim(p, torch.zeros(1, 1, 1, 1, dtype=torch.float64)).item() == (
        pytest.approx(5.87e-10, rel=1e-3)
    )
    for x in (-1.0, 1.0):
        found = prior_bits_per_dim(p, torch.full((2, 3, 4, 4), x, dtype=torch.float64))
        assert_golden(found, torch.full((2,), 2.911294542028646e-05, dtype=torch.float64))
    ends = Process(rescale_to_zero_snr(make_betas("linear", 10)), prediction="v")
    assert prior_bits_per_dim(ends, torch.ones(1, 1, 1, 1)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_std", [-5.0, -1.0, 0.5])
def test_probabilities_of_the_grey_levels_sum_to_1(dtype: torch.dtype, log_std: float) -> None:
    levels = to_float(torch.arange(256, dtype=torch.uint8), dtype)
    for mean in (-1.3, -0.99, 0.0, 0.3337, 1.0):
        logs = discretised_log_likelihood(
            levels, torch.tensor(mean, dtype=dtype), torch.tensor(log_std, dtype=dtype)
        )
        assert logs.max() <= 0
        # each level far from the mean has the floor of 1e-12
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        assert logs.exp().sum().item() == pytest.approx(1, abs=tolerance)


def test_code_lengths_of_known_errors() -> None:
    """Bits of a level when the mean is off by so many levels, at the scale of t = 0."""
    p = process()
    x_0 = pixels(INTERIOR, 1)
    level = to_float(torch.tensor(1, dtype=torch.uint8), torch.float64) + 1

    def bits(error: Tensor | float) -> float:
        log_std = 0.5 * p.log_variance[0]
        return -discretised_log_likelihood(x_0, x_0 + error, log_std).item() / math.log(2)

    assert bits(level) == pytest.approx(2.046612846359445, rel=1e-9)
    assert bits(-level) == pytest.approx(2.046612846359445, rel=1e-9)
    assert bits(0.95136 * level) == pytest.approx(1.976366611433005, rel=1e-9)
    assert bits(1.0) == pytest.approx(39.86313713864835, rel=1e-12)


def test_terms_of_the_true_noise() -> None:
    """With the mean right what is left is the mismatch of the variances, and L_0."""
    for level, l_0 in ((INTERIOR, 1.3056651452870642), (0, 0.5099078789849962)):
        x_0, noise = pixels(level, 2), torch.tensor([[[[0.7, -1.3]]]], dtype=torch.float64)
        large = terms(process(variance="fixed_large"), x_0, noise, 0.0)
        assert large[1:].sum().item() == pytest.approx(0.4864192300440924, rel=1e-9)
        assert large[1:11].sum().item() == pytest.approx(0.398, abs=5e-4)
        small = terms(process(variance="fixed_small"), x_0, noise, 0.0)
        assert small[1:].abs().max().item() < 1e-12
        assert large[0].item() == pytest.approx(l_0, rel=1e-9)
        assert small[0].item() == pytest.approx(l_0, rel=1e-9)


@pytest.mark.parametrize(
    ("variance", "weights"),
    [
        (
            "fixed_large",
            {1: 0.2726920842780491, 499: 0.005503431925619709, 999: 0.010204493468637877},
        ),
        ("fixed_small", {1: 0.5996715121593821}),
    ],
)
def test_the_weight_of_an_error_in_the_noise(variance: Variance, weights: dict[int, float]) -> None:
    """beta^2 / (2 sigma^2 alpha (1 - alphas_cumprod)), Ho et al. 2020, Eq. 12, in nats."""
    p = process(variance=variance)
    x_0, noise = pixels(INTERIOR, 2), torch.tensor([[[[0.7, -1.3]]]], dtype=torch.float64)
    error = 0.5
    cost = (terms(p, x_0, noise, error) - terms(p, x_0, noise, 0.0)) * math.log(2) / error**2
    for t, weight in weights.items():
        assert cost[t].item() == pytest.approx(weight, rel=1e-7)


@pytest.mark.parametrize(
    ("variance", "bound"), [("fixed_large", 16.50928), ("fixed_small", 17.19071)]
)
def test_the_bound_of_a_network_that_says_nothing(variance: Variance, bound: float) -> None:
    """Its mean over the noise: the terms are quadratic in it, so that a mean square of 1 is all."""
    p = process(variance=variance)
    x_0 = pixels(INTERIOR, 2)
    kl = terms(p, x_0, torch.tensor([[[[1.0, -1.0]]]], dtype=torch.float64), None)[1:].sum()
    noise = normal_quantiles(20_000)
    x_0, t = pixels(INTERIOR, 20_000), torch.tensor([0])
    x_t = p.q_sample(x_0, t, noise)
    l_0 = vlb_term(p, torch.zeros_like(x_t), x_0, x_t, t, clip="none")
    assert l_0.item() == pytest.approx(2.51779, abs=2e-4)
    assert (kl + l_0).item() == pytest.approx(bound, abs=2e-4)


@pytest.mark.parametrize("prediction", ["noise", "x_0", "mu", "v"])
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_gradients_are_finite(golden: Golden, prediction: Prediction, variance: Variance) -> None:
    """Of both of its forms at every t, the one that is not taken too, under autocast as without."""
    p = process("linear", variance, prediction)
    t = torch.tensor([0, 1, 999])
    x_0 = golden["x_0"].float()
    x_t = p.q_sample(x_0, t, golden["noise"].float())
    for autocast in (False, True):
        output = torch.zeros(3, 6, 4, 4, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            term = vlb_term(p, output, x_0, x_t, t, clip="none")
        assert term.dtype == torch.float32
        term.sum().backward()  # type: ignore[no-untyped-call]
        assert output.grad is not None
        assert output.grad.isfinite().all()
        # a level of which the mean is far has the least probability, from which nothing is learned
        assert (output.grad[1:].flatten(2).abs().sum(dim=2) > 0).all()
