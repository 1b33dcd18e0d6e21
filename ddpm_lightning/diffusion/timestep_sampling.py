"""How the timesteps of training are drawn: alike everywhere, evenly, or where the losses are.

All draws are functions of (seed, position in the order of the data); that by loss second moment is
a function of the losses seen so far, too.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_lightning.diffusion.timesteps import draw_timesteps
from ddpm_lightning.errors import InputError
from ddpm_lightning.randomness import Stream, hash_indices, hash_uniform

TimestepSampling = Literal["uniform", "stratified", "loss_second_moment"]

HISTORY = 10
"""Losses remembered per timestep (Nichol & Dhariwal 2021, section 3.3)."""

UNIFORM_SHARE = 0.001
"""Share of the draws that stays uniform, so that no timestep is forgotten (the authors' code)."""


class Drawn(NamedTuple):
    """Timesteps, int64 [N] on the CPU, and importance weights 1 / (T p(t)), float64 [N]."""

    t: Tensor
    weights: Tensor


class TimestepSampler(ABC):
    """Draws t; the weighted mean of the losses has the expectation of the uniform draw's mean.

    Args:
        num_timesteps: T.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    @abstractmethod
    def draw(self, seed: int, positions: NDArray[np.int64], batch_size: int) -> Drawn:
        """Draw one t for each image.

        Args:
            seed: The run's seed.
            positions: Positions of the images in the global order, int64 [N].
            batch_size: B, images per optimizer step; step k takes positions [kB, (k+1)B).
        """

    def _unweighted(self, t: Tensor) -> Drawn:
        return Drawn(t, torch.ones(len(t), dtype=torch.float64))


class UniformTimesteps(TimestepSampler):
    """Each t is uniform, independent of the others (Ho et al. 2020, Algorithm 1, line 3)."""

    def draw(self, seed: int, positions: NDArray[np.int64], batch_size: int) -> Drawn:
        """Draw (see `TimestepSampler`)."""
        return self._unweighted(draw_timesteps(seed, positions, self.num_timesteps))


class StratifiedTimesteps(TimestepSampler):
    """Each step's B timesteps are one from each of B equal parts of [0, T), in random order.

    The mean of the losses has less variance than with independent draws (Kingma et al. 2021,
    appendix I.1, have evenly spaced ones for the same end).
    """

    def draw(self, seed: int, positions: NDArray[np.int64], batch_size: int) -> Drawn:
        """Draw (see `TimestepSampler`)."""
        steps, rows = np.divmod(positions, batch_size)
        strata = np.empty_like(positions)
        for step in np.unique(steps).tolist():
            here = steps == step
            batch = np.arange(step * batch_size, (step + 1) * batch_size)
            # the rank of each hash among the batch's is a permutation, the same for any slice
            order = hash_indices(seed, Stream.STRATUM, batch).argsort(kind="stable")
            strata[here] = order.argsort()[rows[here]]
        offsets = hash_uniform(seed, Stream.TIMESTEP, positions)
        t = (strata + offsets) / batch_size * self.num_timesteps
        # rounding may reach T
        return self._unweighted(
            torch.from_numpy(np.minimum(t.astype(np.int64), self.num_timesteps - 1))
        )


class LossSecondMoment(TimestepSampler):
    """p(t) follows sqrt(E[L_t^2]) over the last losses at t (Nichol & Dhariwal 2021, section 3.3).

    Uniform until each t has been drawn often enough. Losses come in the order of the positions,
    whatever ranks and micro-batches took them, so that all ranks draw from the same p; p moves by
    rounding when the number of ranks does.
    """

    def __init__(self, num_timesteps: int) -> None:
        super().__init__(num_timesteps)
        # [t, k % HISTORY] is the k-th loss at t, of counts[t]
        self._losses = np.zeros((num_timesteps, HISTORY))
        self._counts = np.zeros(num_timesteps, dtype=np.int64)

    @property
    def _is_warm(self) -> bool:
        return bool((self._counts >= HISTORY).all())

    def probabilities(self) -> NDArray[np.float64]:
        """Give p, float64 [T]."""
        if not self._is_warm:
            return np.full(self.num_timesteps, 1 / self.num_timesteps)
        weights = np.sqrt(np.square(self._losses).mean(axis=1))
        share = UNIFORM_SHARE / self.num_timesteps
        probabilities: NDArray[np.float64] = weights / weights.sum() * (1 - UNIFORM_SHARE) + share
        return probabilities

    def draw(self, seed: int, positions: NDArray[np.int64], batch_size: int) -> Drawn:
        """Draw (see `TimestepSampler`)."""
        if not self._is_warm:
            return self._unweighted(draw_timesteps(seed, positions, self.num_timesteps))
        probabilities = self.probabilities()
        cumulative = probabilities.cumsum()
        uniform = hash_uniform(seed, Stream.TIMESTEP, positions) * cumulative[-1]
        t = np.searchsorted(cumulative, uniform, side="right")
        t = np.minimum(t, self.num_timesteps - 1)  # rounding may reach T
        weights = 1 / (self.num_timesteps * probabilities[t])
        return Drawn(torch.from_numpy(t), torch.from_numpy(weights))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses of a whole step, without importance weights.

        Args:
            t: int64 [B], in the order of the positions.
            losses: Float [B].
        """
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self._losses[step, self._counts[step] % HISTORY] = loss
            self._counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Give what p depends on: losses, float64 [T, HISTORY], and counts, int64 [T]."""
        return {
            "losses": torch.from_numpy(self._losses.copy()),
            "counts": torch.from_numpy(self._counts.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            InputError: It is another number of timesteps', or nothing of the kind.
        """
        ours = self.state_dict()
        for name, value in ours.items():
            theirs = state.get(name)
            if not isinstance(theirs, Tensor) or theirs.shape != value.shape:
                raise InputError(
                    f"timestep_sampling loss_second_moment: the checkpoint has no {name} of "
                    f"{self.num_timesteps} timesteps to go on from"
                )
        self._losses = state["losses"].double().numpy().copy()
        self._counts = state["counts"].long().numpy().copy()


TIMESTEP_SAMPLERS: dict[TimestepSampling, type[TimestepSampler]] = {
    "uniform": UniformTimesteps,
    "stratified": StratifiedTimesteps,
    "loss_second_moment": LossSecondMoment,
}
