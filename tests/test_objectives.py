"""Losses and weightings: the reference's numbers, equations by hand, and what goes together."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from ddpm_lightning.diffusion.combinations import (
    RULES,
    Combination,
    Loss,
    Weighting,
    all_combinations,
    broken_rule,
    check_combination,
    combinations_table,
)
from ddpm_lightning.diffusion.objectives import Objective, target
from ddpm_lightning.diffusion.process import Prediction, Process, Variance
from ddpm_lightning.diffusion.schedules import Schedule, make_betas, rescale_to_zero_snr
from ddpm_lightning.errors import InputError
from tests.conftest import Golden
from tests.test_diffusion import PREDICTIONS, VARIANCES, assert_golden, process

ALLOWED = [combination for combination in all_combinations() if broken_rule(combination) is None]


def losses(golden: Golden, p: Process, loss: Loss, weighting: Weighting = "none") -> Tensor:
    net = golden.net_for(p.variance)
    return Objective(p, loss, weighting)(net, golden["x_0"], golden["t"], golden["noise"])


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("variance", "key", "loss"),
    [
        ("fixed_small", "simple", "simple"),
        ("fixed_large", "simple", "simple"),
        # of the reference's two other names for it the bound's term is a part only where learned
        ("fixed_small", "rescaled_hybrid", "simple"),
        ("fixed_large", "rescaled_hybrid", "simple"),
        ("learned_range", "simple", "hybrid"),
        ("learned_range", "rescaled_hybrid", "rescaled_hybrid"),
        ("fixed_small", "kl", "vlb"),
        ("fixed_large", "kl", "vlb"),
        ("learned_range", "kl", "vlb"),
    ],
)
def test_losses_are_the_reference(
    golden: Golden, schedule: Schedule, variance: Variance, key: str, loss: Loss
) -> None:
    theirs = golden[f"{schedule}/epsilon/{variance}/training_loss_{key}"]
    assert_golden(losses(golden, process(schedule, variance), loss), theirs)


@pytest.mark.parametrize(
    ("key", "loss"),
    [("simple", "hybrid"), ("rescaled_hybrid", "rescaled_hybrid"), ("kl", "vlb")],
)
def test_losses_of_4000_timesteps_are_the_reference(golden: Golden, key: str, loss: Loss) -> None:
    p = Process(make_betas("linear", 4000, 2.5e-5, 0.005), "learned_range")
    found = Objective(p, loss)(
        golden.learned_net, golden["x_0"], golden["hybrid_4000/t"].long(), golden["noise"]
    )
    assert_golden(found, golden[f"hybrid_4000/training_loss_{key}"])


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_are_those_of_the_papers(golden: Golden, prediction: Prediction) -> None:
    p, t = process(prediction=prediction), golden["t"]
    x_0, noise = golden["x_0"], golden["noise"]
    x_t = p.q_sample(x_0, t, noise)
    a = p.alphas_cumprod[t].sqrt().reshape(3, 1, 1, 1)
    s = (1 - p.alphas_cumprod[t]).sqrt().reshape(3, 1, 1, 1)
    beta = p.betas[t].reshape(3, 1, 1, 1)
    expected = {
        "noise": noise,
        "x_0": x_0,
        "mu": (x_t - beta / s * noise) / (1 - beta).sqrt(),  # Ho et al. 2020, Eq. 10
        "v": a * noise - s * x_0,
    }[prediction]
    true = target(p, x_0, x_t, t, noise)
    assert_golden(true, expected, rtol=1e-8, atol=1e-9)
    found = losses(golden, p, "simple")
    error = (true - golden.net(x_t, t)).square().flatten(1).mean(dim=1)
    assert_golden(found, error)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_weightings_are_those_of_the_papers(golden: Golden, schedule: Schedule) -> None:
    """The timesteps have signal-to-noise ratios on both sides of gamma = 5."""
    gamma = 5.0
    for prediction in PREDICTIONS:
        p = process(schedule, prediction=prediction)
        alphas_cumprod = p.alphas_cumprod[golden["t"]]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        assert snr.min() < gamma < snr.max()
        least = torch.minimum(snr, torch.full_like(snr, gamma))
        expected = {"noise": least / snr, "x_0": least, "v": least / (snr + 1)}
        plain = losses(golden, p, "simple")
        if prediction in expected:
            found = losses(golden, p, "simple", "min_snr")
            assert_golden(found, expected[prediction] * plain)
        if prediction == "noise":
            assert_golden(losses(golden, p, "simple", "p2"), plain / (1 + snr))


def test_min_snr_weighs_the_same_error_alike_however_it_is_predicted(golden: Golden) -> None:
    """An error in x_0 amounts to one in the noise and one in v; the weighted losses are equal."""
    t, x_0, noise = golden["t"], golden["x_0"], golden["noise"]
    wrong_x_0 = x_0 + 0.1 * noise.tanh()
    results = []
    for prediction in ("noise", "x_0", "v"):
        p = process(prediction=prediction)
        x_t = p.q_sample(x_0, t, noise)
        wrong = target(p, wrong_x_0, x_t, t, p.pred_noise(wrong_x_0, x_t, t))
        objective = Objective(p, "simple", "min_snr")
        results.append(objective(Says(wrong), x_0, t, noise))
    assert_golden(results[0], results[1], rtol=1e-7)
    assert_golden(results[2], results[1], rtol=1e-7)


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
@pytest.mark.parametrize("prediction", ["x_0", "v"])
def test_pure_noise_has_a_finite_loss(
    golden: Golden, prediction: Prediction, weighting: Weighting
) -> None:
    p = Process(rescale_to_zero_snr(make_betas("linear", 1000)), prediction=prediction)
    t = torch.full((3,), 999)
    found = Objective(p, "simple", weighting)(golden.net, golden["x_0"], t, golden["noise"])
    assert found.isfinite().all()
    assert (found == 0).all() == (weighting == "min_snr")  # S is 0


def test_the_mean_does_not_learn_from_a_hybrids_bound(golden: Golden) -> None:
    t = torch.tensor([0, 1, 637])
    for prediction in PREDICTIONS:
        p = process("linear", "learned_range", prediction)
        gradients = {}
        for loss in get_args(Loss)[1:]:
            output = golden.learned_net(golden["linear/x_t"], t).requires_grad_()
            found = Objective(p, loss)(Says(output), golden["x_0"], t, golden["noise"])
            gradients[loss] = torch.autograd.grad(found.sum(), output)[0].chunk(2, dim=1)
        fixed = golden.net(golden["linear/x_t"], t).requires_grad_()
        plain = Objective(process("linear", "fixed_small", prediction))
        loss = plain(Says(fixed), golden["x_0"], t, golden["noise"]).sum()
        of_mean = torch.autograd.grad(loss, fixed)[0]
        assert_golden(gradients["hybrid"][0], of_mean)
        assert_golden(gradients["hybrid"][1], gradients["vlb"][1])
        assert (gradients["vlb"][0] - of_mean).abs().max() > 1e-3


# --- what goes together --------------------------------------------------------------------------


def test_which_combinations_are_allowed() -> None:
    """Stated once more, the other way round."""
    fixed, learned = ("fixed_small", "fixed_large"), ("learned", "learned_range")
    weightings = {
        "noise": ("none", "min_snr", "p2"),
        "x_0": ("none", "min_snr"),
        "mu": ("none",),
        "v": ("none", "min_snr"),
    }
    expected = {
        *((p, "simple", w, v) for p in weightings for w in weightings[p] for v in fixed),
        *((p, "vlb", "none", v) for p in weightings for v in fixed + learned),
        *((p, "hybrid", "none", v) for p in weightings for v in learned),
        *((p, "rescaled_hybrid", "none", v) for p in weightings for v in learned),
    }
    assert set(ALLOWED) == expected
    assert len(ALLOWED) == 48
    assert len(list(all_combinations())) == 4 * 4 * 3 * 4


class Says(torch.nn.Module):
    """A network whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.output


class TinyNet(torch.nn.Module):
    """One convolution that knows the time."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(2, outputs, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        times = (t / 20).reshape(-1, 1, 1, 1).expand_as(x)
        output: Tensor = self.layer(torch.cat([x, times], dim=1))
        return output


@pytest.mark.parametrize("combination", ALLOWED, ids="-".join)
def test_each_allowed_combination_trains(combination: Combination) -> None:
    torch.manual_seed(0)
    p = Process(make_betas("linear", 20), combination.variance, prediction=combination.prediction)
    net = TinyNet(p.count_outputs(1))
    objective = Objective(p, combination.loss, combination.weighting)
    x_0, noise = torch.rand(20, 1, 8, 8) * 2 - 1, torch.randn(20, 1, 8, 8)
    found = objective(net, x_0, torch.arange(20), noise)
    assert found.shape == (20,)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    found.mean().backward()  # type: ignore[no-untyped-call]
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        # each output channel learns
        assert (parameter.grad.reshape(p.count_outputs(1), -1).abs().sum(dim=1) > 0).all()
    torch.optim.SGD(net.parameters(), 1e-4).step()
    with torch.no_grad():
        assert objective(net, x_0, torch.arange(20), noise).mean() < found.mean()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("loss", get_args(Loss))
def test_each_other_combination_is_refused_by_name(loss: Loss, variance: Variance) -> None:
    refused = [
        combination
        for combination in all_combinations()
        if (combination.loss, combination.variance) == (loss, variance)
        and broken_rule(combination) is not None
    ]
    for combination in refused:
        with pytest.raises(InputError) as error:
            check_combination(*combination)
        rule = broken_rule(combination)
        assert rule is not None
        named = [f"--model.{name} {getattr(combination, name)}" for name in rule.options]
        assert str(error.value) == f"{named[0]} with {named[1]}: {rule.reason}"
        assert "; " in rule.reason  # the remedy
        p = Process(make_betas("linear", 20), variance, prediction=combination.prediction)
        with pytest.raises(InputError):
            Objective(p, combination.loss, combination.weighting)


def test_unknown_names_are_refused() -> None:
    for index, name in enumerate(Combination._fields):
        values = ["noise", "simple", "none", "fixed_small"]
        values[index] = "magic"
        with pytest.raises(InputError, match=f"{name} must be one of .*; got 'magic'"):
            check_combination(*values)  # type: ignore[arg-type]


def test_the_table_says_what_is_allowed() -> None:
    head, *rows = combinations_table().split("\n\n")[0].splitlines()
    *_, noise, x_0, mu, v = head.split()
    assert [noise, x_0, mu, v] == PREDICTIONS
    cells = {}
    for row in rows:
        words = row.replace(", ", ",").split()
        for variance in words[2].split(","):
            for prediction, cell in zip(PREDICTIONS, words[3:], strict=True):
                cells[prediction, words[0], words[1], variance] = cell
    assert len(cells) == 192
    assert {key for key, cell in cells.items() if cell == "yes"} == set(ALLOWED)
    for key, cell in cells.items():
        if cell != "yes":
            assert broken_rule(Combination(*key)) is RULES[int(cell) - 1]  # type: ignore[arg-type]
    for number, rule in enumerate(RULES, start=1):
        assert f"\n{number}. {' with '.join(rule.options)}: {rule.reason}" in combinations_table()
    assert math.prod(map(len, map(get_args, (Prediction, Loss, Weighting, Variance)))) == 192
