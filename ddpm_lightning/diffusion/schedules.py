"""Noise schedules: the betas of the forward process."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError

Schedule = Literal["linear", "quad", "warmup10", "warmup50", "const", "cosine", "jsd", "sigmoid"]

MAX_BETA = 0.999
"""Cap on beta near t = T where alphas_cumprod is given (Nichol & Dhariwal 2021, section 3.2)."""

SIGMOID_START, SIGMOID_END = -3.0, 3.0
"""Where the sigmoid schedule enters and leaves the logistic function; its tau is 1 (Jabri et al.
2022, appendix B)."""


def make_betas(
    name: Schedule, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    """Make the variances beta_t of the forward process (Ho et al. 2020, Eq. 2).

    Args:
        name: `linear` (the paper's), `quad` (linear in the square root), `warmup10` and `warmup50`
            (linear over the first 10 % or 50 %, then constant), `const` and `jsd` (1/T, 1/(T-1),
            ..., 1) are those of Ho et al.'s code; `cosine` is Nichol & Dhariwal 2021, Eq. 17;
            `sigmoid` is Jabri et al. 2022. The last three take no end points.
        num_timesteps: T, at least 1.
        beta_start: First beta, in (0, beta_end]. The paper's 1e-4 goes with T = 1000.
        beta_end: Last beta, in [beta_start, 1).

    Returns:
        float64 [T], in (0, 1); the last one of `jsd` is 1.

    Raises:
        InputError: A value is out of range, or there is no such schedule.
    """
    if num_timesteps < 1:
        raise InputError(f"num_timesteps must be at least 1, got {num_timesteps}")
    if not 0 < beta_start <= beta_end < 1:
        raise InputError(
            "beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1, "
            f"got {beta_start} and {beta_end}"
        )
    if name not in _SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(_SCHEDULES)}; got {name!r}")
    return _SCHEDULES[name](num_timesteps, beta_start, beta_end)


def rescale_to_zero_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that its last value is 0 (Lin et al. 2023, Alg. 1).

    The first value stays. At the last timestep x_t is then pure noise, as where sampling starts.

    Args:
        betas: float64 [T], each in (0, 1), but the last one may be 1.

    Returns:
        float64 [T]; the last one is 1.

    Raises:
        InputError: T is 1, so that the first value cannot stay.
    """
    if len(betas) < 2:
        raise InputError("zero_terminal_snr: needs num_timesteps of at least 2")
    signal = (1 - betas).cumprod(0).sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alphas_cumprod = signal.square()
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / previous


def _linspace(start: float, end: float, num: int) -> Tensor:
    return torch.linspace(start, end, num, dtype=torch.float64)


def _linear(num_timesteps: int, start: float, end: float) -> Tensor:
    return _linspace(start, end, num_timesteps)


def _quad(num_timesteps: int, start: float, end: float) -> Tensor:
    return _linspace(math.sqrt(start), math.sqrt(end), num_timesteps) ** 2


def _warmup(fraction: float) -> Callable[[int, float, float], Tensor]:
    def betas(num_timesteps: int, start: float, end: float) -> Tensor:
        result = torch.full((num_timesteps,), end, dtype=torch.float64)
        num_warmup = int(fraction * num_timesteps)
        result[:num_warmup] = _linspace(start, end, num_warmup)
        return result

    return betas


def _const(num_timesteps: int, start: float, end: float) -> Tensor:
    return torch.full((num_timesteps,), end, dtype=torch.float64)


def _from_alphas_cumprod(alphas_cumprod: Callable[[Tensor], Tensor], num_timesteps: int) -> Tensor:
    """Make the betas whose alphas_cumprod is a function (up to a factor) of u = (t + 1) / T."""
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    values = alphas_cumprod(u)
    return (1 - values[1:] / values[:-1]).clamp(max=MAX_BETA)


def _cosine(num_timesteps: int, start: float, end: float) -> Tensor:
    return _from_alphas_cumprod(
        lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, num_timesteps
    )


def _sigmoid(num_timesteps: int, start: float, end: float) -> Tensor:
    last = torch.sigmoid(torch.tensor(SIGMOID_END, dtype=torch.float64))
    return _from_alphas_cumprod(
        lambda u: last - torch.sigmoid(u * (SIGMOID_END - SIGMOID_START) + SIGMOID_START),
        num_timesteps,
    )


def _jsd(num_timesteps: int, start: float, end: float) -> Tensor:
    return 1 / torch.arange(num_timesteps, 0, -1, dtype=torch.float64)


_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "quad": _quad,
    "warmup10": _warmup(0.1),
    "warmup50": _warmup(0.5),
    "const": _const,
    "cosine": _cosine,
    "jsd": _jsd,
    "sigmoid": _sigmoid,
}
