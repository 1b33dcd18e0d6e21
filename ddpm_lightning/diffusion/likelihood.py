"""The terms of the variational bound on the negative log-likelihood, in bits per dimension."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_lightning.diffusion.clipping import Clip, clip_x_0
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.images import HALF_LEVEL, rms_levels

EDGE = 0.999
"""Beyond +-EDGE a pixel is at the end of its range, whose bin reaches to infinity (Eq. 13)."""

FLOOR = 1e-12
"""Least probability of a pixel, so that its logarithm stays finite; the authors' code has it."""


class Bound(NamedTuple):
    """The bound on the negative log-likelihood of images, part by part (Ho et al. 2020, Eq. 5).

    `total` is `prior` plus the sum of `terms`. Column i of each [N, T] belongs to index i of the
    process; `prior` and `terms` are means over pixels and channels, in bits.

    Attributes:
        prior: L_T, float [N].
        terms: L_0 at index 0, what the image costs once x at index 0 is known (the distortion of
            section 4.3); behind it what each further step to there costs (the rate), float [N, T].
        x_0_mse: Mean squared error of the predicted x_0, clipped, float [N, T].
        noise_mse: Mean squared error of the noise that it implies, float [N, T].
    """

    prior: Tensor
    terms: Tensor
    x_0_mse: Tensor
    noise_mse: Tensor

    @property
    def total(self) -> Tensor:
        """Bits per dimension of each image, float64 [N]."""
        return self.prior.double() + self.terms.double().sum(dim=1)


def normal_kl(
    mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor
) -> Tensor:
    """Give KL(N(mean_1, variance_1) || N(mean_2, variance_2)) of each value, in nats.

    Args:
        mean_1: Float, as all others of any shapes that broadcast.
        log_variance_1: Natural logarithm.
        mean_2: See mean_1.
        log_variance_2: See log_variance_1.

    Returns:
        At least 0, of the common shape.
    """
    difference = log_variance_1 - log_variance_2
    distance = (mean_1 - mean_2).square() * (-log_variance_2).exp()
    return 0.5 * (difference.expm1() - difference + distance)


def discretised_log_likelihood(x_0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Give the log-probability of each grey level under N(mean, std^2) (Ho et al. 2020, Eq. 13).

    Args:
        x_0: Levels as float [N, C, H, W] in [-1, 1].
        mean: Shaped like x_0.
        log_std: Broadcasts against x_0.

    Returns:
        Natural logarithms in [log FLOOR, 0], shaped like x_0. Over the 256 levels the probabilities
        sum to 1.
    """
    precision = (-log_std).exp()
    error = x_0 - mean
    # The lower tail is taken of both, where float32 can tell probabilities from 0 but not from 1.
    far, near = (
        _normal_cdf((half - error.abs()) * precision) for half in (-HALF_LEVEL, HALF_LEVEL)
    )
    at_bottom = _normal_cdf((HALF_LEVEL + error) * precision)
    at_top = _normal_cdf((HALF_LEVEL - error) * precision)
    probability = torch.where(x_0 < -EDGE, at_bottom, torch.where(x_0 > EDGE, at_top, near - far))
    return probability.clamp(min=FLOOR).log()


def vlb_term(
    process: Process, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, clip: Clip
) -> Tensor:
    """Give the term of the bound at t (Ho et al. 2020, Eq. 5): L_{t} for t > 0, L_0 for t = 0.

    Args:
        process: The process; its terms over all t and the prior's sum to the bound.
        output: The network's output at (x_t, t), float [N, C or 2C, H, W].
        x_0: Clean images, float [N, C, H, W] in [-1, 1].
        x_t: The same at step t.
        t: Zero-based steps, int64 [N].
        clip: How the predicted x_0 is clipped (see `clip_x_0`).

    Returns:
        The mean over pixels and channels, bits, [N] in the dtype of x_0.
    """
    true = process.posterior(x_0, x_t, t)
    model = process.p_mean_variance(output, x_t, t, clip)
    kl = normal_kl(*true, model.mean, model.log_variance)
    nll = -discretised_log_likelihood(x_0, model.mean, 0.5 * model.log_variance)
    term = torch.where((t == 0).reshape(-1, *[1] * (x_0.ndim - 1)), nll, kl)
    return _to_bits_per_dim(term)


@torch.no_grad()
def bound_terms(
    net: Callable[[Tensor, Tensor], Tensor],
    process: Process,
    x_0: Tensor,
    draw: Callable[[], Tensor],
    clip: Clip = "static",
    after_step: Callable[[], object] | None = None,
) -> Bound:
    """Take all terms of the bound, each t with noise of its own, from the last t to the first.

    Args:
        net: Maps (x_t, t) to its output, float [N, C or 2C, H, W] (see `Process.split`).
        process: The process; a respaced one is another model, with a bound of its own.
        x_0: Clean images, float [N, C, H, W] in [-1, 1].
        draw: Each call gives standard normal noise, shaped like x_0.
        clip: How the predicted x_0 is clipped (see `clip_x_0`); the authors' code has static here.
        after_step: Called after each t.

    Returns:
        The bound's parts, in the dtype of x_0.
    """
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for index in reversed(range(process.num_timesteps)):
        t = process.timesteps.new_full((len(x_0),), index)
        noise = draw()
        x_t = process.q_sample(x_0, t, noise)
        output = net(x_t, process.timesteps[t])
        pred_x_0 = clip_x_0(process.pred_x_0(output, x_t, t), clip)
        columns.append(
            (
                vlb_term(process, output, x_0, x_t, t, clip),
                _mean_square(pred_x_0 - x_0),
                _mean_square(process.pred_noise(pred_x_0, x_t, t) - noise),
            )
        )
        if after_step is not None:
            after_step()
    terms, x_0_mse, noise_mse = (
        torch.stack(parts, dim=1) for parts in zip(*reversed(columns), strict=True)
    )
    return Bound(prior_bits_per_dim(process, x_0), terms, x_0_mse, noise_mse)


def rate_distortion(bound: Bound) -> tuple[Tensor, Tensor]:
    """Give the rate and the distortion at each index (Ho et al. 2020, section 4.3 and Fig. 5).

    Who knows x at index t has been told L_T and the terms behind t, and sees of the image what the
    network predicts from x.

    Args:
        bound: Of N images.

    Returns:
        Bits per dimension, L_T and the terms of indices > t, a mean over images; and the root of
        the mean squared error of the predicted x_0 over all images, in grey levels of 255. Both
        float64 [T].
    """
    terms = bound.terms.double().mean(dim=0)
    behind = torch.cat([terms[1:], terms.new_zeros(1)]).flip(0).cumsum(0).flip(0)
    rate = bound.prior.double().mean() + behind
    return rate, rms_levels(bound.x_0_mse.double().mean(dim=0))


def prior_bits_per_dim(process: Process, x_0: Tensor) -> Tensor:
    """Give L_T = KL(q(x_T | x_0) || N(0, I)) (Ho et al. 2020, Eq. 5), which nothing is learned of.

    Args:
        process: The process.
        x_0: Clean images, float [N, C, H, W] in [-1, 1].

    Returns:
        The mean over pixels and channels, bits, [N] in the dtype of x_0.
    """
    alphas_cumprod = process.alphas_cumprod[-1]
    mean = alphas_cumprod.sqrt().to(x_0.dtype) * x_0
    log_variance = (-alphas_cumprod).log1p().to(x_0.dtype)
    return _to_bits_per_dim(normal_kl(mean, log_variance, mean.new_zeros(()), mean.new_zeros(())))


def _normal_cdf(x: Tensor) -> Tensor:
    """The standard normal's distribution function, as the authors' code approximates it.

    They write (1 + tanh(y)) / 2, which is the same as the logistic function of 2 y.
    """
    return (2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).sigmoid()


def _to_bits_per_dim(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(dim=1) / math.log(2)


def _mean_square(errors: Tensor) -> Tensor:
    return errors.square().flatten(1).mean(dim=1)
