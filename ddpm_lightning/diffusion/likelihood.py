"""The terms of the variational bound on the negative log-likelihood, in bits per dimension."""

import math

import torch
from torch import Tensor

from ddpm_lightning.diffusion.clipping import Clip
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.images import HALF_LEVEL

EDGE = 0.999
"""Beyond +-EDGE a pixel is at the end of its range, whose bin reaches to infinity (Eq. 13)."""

FLOOR = 1e-12
"""Least probability of a pixel, so that its logarithm stays finite; the authors' code has it."""


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
