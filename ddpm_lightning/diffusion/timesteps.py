"""Which timesteps: drawn for training, chosen for sampling."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.randomness import Stream, hash_uniform


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


def space_timesteps(num_timesteps: int, num_steps: int) -> Tensor:
    """Choose evenly spaced timesteps from 0 to T - 1, both included (improved-diffusion's "N").

    The last one is always T - 1, so that a chain starts where x_T is pure noise.

    Args:
        num_timesteps: T.
        num_steps: S, in [1, T].

    Returns:
        int64 [S], increasing.

    Raises:
        InputError: num_steps is out of range.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise InputError(f"num_steps must lie in 1..{num_timesteps}, got {num_steps}")
    if num_steps == 1:
        return torch.tensor([num_timesteps - 1])
    stride = (num_timesteps - 1) / (num_steps - 1)
    # A running float sum and round-half-to-even, as in the reference code: a product would round
    # a few timesteps to their neighbours.
    cursors = np.cumsum(np.full(num_steps, stride)) - stride
    return torch.from_numpy(np.rint(cursors).astype(np.int64))
