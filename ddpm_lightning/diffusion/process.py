"""The forward process q and the learned reverse process p (Ho et al. 2020, sections 2 and 3)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ddpm_lightning.diffusion.clipping import Clip, clip_x_0
from ddpm_lightning.errors import InputError

Variance = Literal["fixed_small", "fixed_large"]


class Gaussian(NamedTuple):
    """A diagonal Gaussian over images; `log_variance` broadcasts against `mean`."""

    mean: Tensor
    log_variance: Tensor


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t), and the clean image that it is built on."""

    mean: Tensor
    log_variance: Tensor
    pred_x_0: Tensor


class Process(nn.Module):
    """q and p over one set of timesteps.

    The tables are float64 buffers that follow the module's device but never its dtype, and that
    are not part of any state_dict: the constructor's arguments are their record.

    Args:
        betas: Variances of the forward process, float64 [T], each in (0, 1).
        variance: sigma_t^2 of the reverse process (Ho et al. 2020, section 3.2): `fixed_small` is
            the posterior's beta-tilde_t, `fixed_large` is beta_t.
        timesteps: What the network is told at each index, int64 [T]; 0..T-1 when None. A respaced
            process keeps the original timesteps here.
    """

    betas: Tensor
    timesteps: Tensor
    alphas_cumprod: Tensor
    posterior_mean_coef_x_0: Tensor
    posterior_mean_coef_x_t: Tensor
    posterior_log_variance: Tensor
    log_variance: Tensor

    def __init__(
        self, betas: Tensor, variance: Variance = "fixed_large", timesteps: Tensor | None = None
    ) -> None:
        super().__init__()
        if betas.ndim != 1 or betas.dtype != torch.float64 or not len(betas) > 0:
            raise ValueError(f"betas must be float64 [T], got {betas.dtype} {list(betas.shape)}")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise InputError("every beta must lie in (0, 1)")
        self.variance: Variance = variance
        self.num_timesteps = len(betas)

        alphas = 1 - betas
        alphas_cumprod = alphas.cumprod(0)
        alphas_cumprod_prev = torch.cat([betas.new_ones(1), alphas_cumprod[:-1]])
        # Eq. 7. The variance is 0 at t = 0; the authors' code takes the logarithm of its successor
        # there (never used for sampling, since the last step adds no noise).
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        patched = torch.cat([posterior_variance[1:2], posterior_variance[1:]])
        if self.num_timesteps == 1:
            patched = betas
        log_variance = {
            "fixed_small": patched.log(),
            "fixed_large": torch.cat([patched[:1], betas[1:]]).log(),
        }[variance]

        tables = {
            "betas": betas,
            "timesteps": torch.arange(len(betas)) if timesteps is None else timesteps,
            "alphas_cumprod": alphas_cumprod,
            "posterior_mean_coef_x_0": betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod),
            "posterior_mean_coef_x_t": (1 - alphas_cumprod_prev)
            * alphas.sqrt()
            / (1 - alphas_cumprod),
            "posterior_log_variance": patched.log(),
            "log_variance": log_variance,
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Process":
        # `module.to(torch.bfloat16)` and its kin reach buffers through here. In bfloat16 some ten
        # of the thousand steps would add no noise at all, so only the device is followed.
        for name, table in self.named_buffers(recurse=False):
            setattr(self, name, table.to(fn(table).device))
        return self

    @staticmethod
    def _gather(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Take table[t] in the dtype of x, shaped to broadcast over x: [N, 1, 1, 1]."""
        return table[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise x_0 to step t in one jump (Ho et al. 2020, Eq. 4).

        Args:
            x_0: Clean images, float [N, C, H, W] in [-1, 1].
            t: Zero-based steps, int64 [N] in [0, num_timesteps); t = 0 is one step of noise.
            noise: Standard normal, shaped like x_0.

        Returns:
            x_t, shaped like x_0.
        """
        signal = self._gather(self.alphas_cumprod.sqrt(), t, x_0)
        return signal * x_0 + self._gather((1 - self.alphas_cumprod).sqrt(), t, x_0) * noise

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """Give q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eqs. 6 and 7).

        Args:
            x_0: Clean images, float [N, C, H, W].
            x_t: The same at step t.
            t: Zero-based steps, int64 [N].

        Returns:
            The Gaussian; its log-variance at t = 0, where the variance is 0, is that of t = 1.
        """
        mean = (
            self._gather(self.posterior_mean_coef_x_0, t, x_t) * x_0
            + self._gather(self.posterior_mean_coef_x_t, t, x_t) * x_t
        )
        return Gaussian(mean, self._gather(self.posterior_log_variance, t, x_t))

    def pred_x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Read the network's output as noise and give the clean image it implies (Eq. 15).

        Args:
            output: The network's output at (x_t, t), float [N, C, H, W].
            x_t: Noisy images at step t, shaped like output.
            t: Zero-based steps, int64 [N].

        Returns:
            x_0 = sqrt(1/alphas_cumprod) x_t - sqrt(1/alphas_cumprod - 1) noise, unclipped.
        """
        return (
            self._gather(self.alphas_cumprod.rsqrt(), t, x_t) * x_t
            - self._gather((1 / self.alphas_cumprod - 1).sqrt(), t, x_t) * output
        )

    def p_mean_variance(
        self, output: Tensor, x_t: Tensor, t: Tensor, clip: Clip = "static"
    ) -> Reverse:
        """Give p(x_{t-1} | x_t) (Ho et al. 2020, Eqs. 1 and 11).

        The mean is the posterior's at the predicted x_0. Unclipped that is the paper's Algorithm 2;
        clipped to [-1, 1] first, it is what the authors' code samples with.

        Args:
            output: The network's output at (x_t, t), float [N, C, H, W].
            x_t: Noisy images at step t, shaped like output.
            t: Zero-based steps, int64 [N].
            clip: How the predicted x_0 is clipped (see `clip_x_0`).

        Returns:
            Mean, log-variance and predicted x_0.
        """
        pred_x_0 = clip_x_0(self.pred_x_0(output, x_t, t), clip)
        mean, _ = self.posterior(pred_x_0, x_t, t)
        return Reverse(mean, self._gather(self.log_variance, t, x_t), pred_x_0)

    def respace(self, timesteps: Tensor) -> "Process":
        """Make the process that visits only some timesteps (Nichol & Dhariwal 2021, section 4).

        Args:
            timesteps: Indices into this process, int64 [S], strictly increasing.

        Returns:
            A process of S steps whose marginals are this one's at those timesteps; all of them give
            this process again.
        """
        increasing = bool((timesteps.diff() > 0).all())
        if not len(timesteps) or not increasing or not int(timesteps[0]) >= 0:
            raise InputError("timesteps must be increasing, none negative, and at least one")
        if int(timesteps[-1]) >= self.num_timesteps:
            raise InputError(
                f"timestep {int(timesteps[-1])} is outside the schedule; the last one is "
                f"{self.num_timesteps - 1}"
            )
        timesteps = timesteps.to(self.timesteps.device)
        alphas_cumprod = self.alphas_cumprod[timesteps]
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        return Process(1 - alphas_cumprod / previous, self.variance, self.timesteps[timesteps])
