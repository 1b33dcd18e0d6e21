"""Which timesteps: drawn for training, chosen for sampling."""

import re
from difflib import get_close_matches

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.randomness import Stream, hash_uniform

BY_LOG_SNR = "log_snr"
SPACINGS = ("even", "leading", "trailing", BY_LOG_SNR)
"""Spacings that go with any number of steps; `ddimN` and sections hold their own."""

# x_t is noise but for a fiftieth there: what a solver has to find out begins after it.
_LEAST_LOG_SNR = -8.0


def draw_timesteps(seed: int, positions: NDArray[np.int64], num_timesteps: int) -> Tensor:
    """Draw t uniformly, one per image (Ho et al. 2020, Algorithm 1, line 3).

    Args:
        seed: The run's seed.
        positions: Positions of the images in the global order, int64 [N].
        num_timesteps: T.

    Returns:
        int64 [N] in [0, T) on the CPU; element n is a function of (seed, positions[n]) only.
    """
    uniform = hash_uniform(seed, Stream.TIMESTEP, positions)
    return torch.from_numpy((uniform * num_timesteps).astype(np.int64))


def check_spacing(spacing: str) -> int | None:
    """Read the name of a spacing (see `space_timesteps`).

    Returns:
        The number of steps that it holds itself; None where any number goes with it.

    Raises:
        InputError: There is no such spacing.
    """
    if spacing in SPACINGS:
        return None
    if re.fullmatch(r"ddim[1-9]\d*", spacing):
        return int(spacing.removeprefix("ddim"))
    if re.fullmatch(r"[1-9]\d*(,[1-9]\d*)+", spacing):
        return sum(map(int, spacing.split(",")))
    if spacing.isdecimal():
        raise InputError(f"spacing {spacing}: a number alone is num_steps; give it there")
    near = get_close_matches(spacing, SPACINGS, n=1)
    raise InputError(
        f"spacing {spacing}: none of {', '.join(SPACINGS)}, ddimN such as ddim50, or sections such "
        "as 10,15,20" + (f"; did you mean {near[0]}?" if near else "")
    )


def space_timesteps(num_timesteps: int, num_steps: int, spacing: str = "even") -> Tensor:
    """Choose the timesteps that a sampler visits, by their numbers alone.

    Args:
        num_timesteps: T.
        num_steps: S, in [1, T].
        spacing: Any but `log_snr` (see `space_by_log_snr`). `even` takes S from 0 to T - 1, both
            included (improved-diffusion's "S", elsewhere linspace). `leading` takes multiples of
            T // S from 0 on and so ends below T - 1; `trailing` goes down from T - 1 by T / S and
            so ends above 0 (both Lin et al. 2023, table 2). `ddimS` takes every i-th from 0 on, by
            the smallest i that gives S of them. `10,15,20` takes that many evenly in equal sections
            of [0, T), S in all (both Nichol & Dhariwal 2021, section 4, as in their code).

    Returns:
        int64 [S], increasing.

    Raises:
        InputError: num_steps is out of range, there is no such spacing, or it has not S steps.
    """
    held = check_spacing(spacing)
    if held is not None and num_steps != held:
        raise InputError(f"num_steps {num_steps}: the spacing {spacing} has {held} steps")
    if not 1 <= num_steps <= num_timesteps:
        raise InputError(f"num_steps must lie in 1..{num_timesteps}, got {num_steps}")
    timesteps: NDArray[np.int64]
    if spacing == "leading":
        timesteps = np.arange(num_steps) * (num_timesteps // num_steps)
    elif spacing == "trailing":
        down = num_timesteps - np.arange(num_steps) * (num_timesteps / num_steps)
        timesteps = np.rint(down)[::-1].astype(np.int64) - 1
    elif spacing == "even":
        timesteps = _evenly(num_timesteps, num_steps)
        if num_steps == 1:
            timesteps += num_timesteps - 1  # where x_T is pure noise
    elif "," in spacing:
        timesteps = _in_sections(num_timesteps, spacing)
    else:
        timesteps = _by_stride(num_timesteps, num_steps)
    return torch.from_numpy(timesteps)


def space_by_log_snr(
    alphas_cumprod: Tensor,
    num_steps: int,
    most: float | None = None,
    least: float = _LEAST_LOG_SNR,
) -> Tensor:
    """Choose timesteps at even distances of log SNR (Lu et al. 2022a, section 3.4).

    Args:
        alphas_cumprod: Float64 [T], decreasing.
        num_steps: S, in [1, T].
        most: The first timestep is the last one that has this log SNR, or more; None takes the one
            that `trailing` ends with.
        least: All of a lower log SNR count as having this. The last timestep is T - 1 always.

    Returns:
        int64 [S], increasing.

    Raises:
        InputError: num_steps is out of range.
    """
    num_timesteps = len(alphas_cumprod)
    first = int(space_timesteps(num_timesteps, num_steps, "trailing")[0])
    alphas = alphas_cumprod.cpu().numpy()
    with np.errstate(divide="ignore"):  # log SNR is -inf where nothing of x_0 is left
        log_snr = np.log(alphas / (1 - alphas))
    if most is None:
        most = max(log_snr[first], least)  # a single timestep is the last one
    log_snr = log_snr.clip(least, most)
    wanted = np.linspace(log_snr[0], log_snr[-1], num_steps)
    chosen = np.searchsorted(-log_snr, -wanted, side="right") - 1
    chosen[-1] = num_timesteps - 1
    # Where the schedule is coarser than that, one has been chosen twice: take its neighbours.
    count = np.arange(num_steps)
    chosen = np.maximum.accumulate(chosen - count) + count
    return torch.from_numpy(np.minimum(chosen, num_timesteps - num_steps + count))


def _evenly(size: int, count: int) -> NDArray[np.int64]:
    """Choose `count` of 0..size - 1 evenly, both ends included; one is the first."""
    stride = (size - 1) / (count - 1) if count > 1 else 0.0
    # A running float sum and round-half-to-even, as in the reference code: a product would round
    # a few timesteps to their neighbours.
    cursors: NDArray[np.float64] = np.cumsum([0.0, *[stride] * (count - 1)])
    return np.rint(cursors).astype(np.int64)


def _in_sections(num_timesteps: int, spacing: str) -> NDArray[np.int64]:
    counts = [int(count) for count in spacing.split(",")]
    size, rest = divmod(num_timesteps, len(counts))
    parts: list[NDArray[np.int64]] = []
    start = 0
    for index, count in enumerate(counts):
        length = size + (index < rest)
        if count > length:
            raise InputError(
                f"spacing {spacing}: section {index + 1} has only {length} of the "
                f"{num_timesteps} timesteps"
            )
        parts.append(start + _evenly(length, count))
        start += length
    return np.concatenate(parts)


def _by_stride(num_timesteps: int, num_steps: int) -> NDArray[np.int64]:
    choices = [range(0, num_timesteps, stride) for stride in range(1, max(2, num_timesteps))]
    chosen = next((choice for choice in choices if len(choice) == num_steps), None)
    if chosen is None:
        near = min((len(choice) for choice in choices), key=lambda count: abs(count - num_steps))
        raise InputError(
            f"spacing ddim{num_steps}: no whole stride visits {num_steps} of {num_timesteps} "
            f"timesteps; the nearest is ddim{near}"
        )
    return np.array(chosen)
