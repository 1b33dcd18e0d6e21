"""The forward process q and the learned reverse process p (Ho et al. 2020, sections 2 and 3)."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ddpm_lightning.diffusion.clipping import Clip, clip_x_0
from ddpm_lightning.errors import InputError

Prediction = Literal["noise", "x_0", "mu", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]

LEARNED_VARIANCES: tuple[Variance, ...] = ("learned", "learned_range")


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
        betas: Variances of the forward process, float64 [T], each in (0, 1); the last one may be 1
            where the network predicts x_0 or v.
        variance: sigma_t^2 of the reverse process. `fixed_small` is the posterior's beta-tilde_t,
            `fixed_large` is beta_t (Ho et al. 2020, section 3.2). With the others the network gives
            twice the channels of x_t, and the second half of them tells the variance of each value:
            it is log sigma_t^2 (`learned`), or says where in between log beta-tilde_t (-1) and
            log beta_t (1) that lies (`learned_range`; Nichol & Dhariwal 2021, Eq. 15).
        timesteps: What the network is told at each index, int64 [T]; 0..T-1 when None. A respaced
            process keeps the original timesteps here.
        prediction: What the network gives: the `noise` in x_t, `x_0`, the mean of x_{t-1} (`mu`,
            Ho et al. 2020, Eq. 8), or `v` (Salimans & Ho 2022, see `v`).

    Raises:
        InputError: A beta is out of range, or the prediction leaves x_0 open where it is 1.
    """

    betas: Tensor
    timesteps: Tensor
    alphas_cumprod: Tensor
    posterior_mean_coef_x_0: Tensor
    posterior_mean_coef_x_t: Tensor
    posterior_log_variance: Tensor
    log_variance: Tensor
    pred_x_0_coef_x_t: Tensor
    pred_x_0_coef_output: Tensor

    def __init__(
        self,
        betas: Tensor,
        variance: Variance = "fixed_large",
        timesteps: Tensor | None = None,
        prediction: Prediction = "noise",
    ) -> None:
        super().__init__()
        if betas.ndim != 1 or betas.dtype != torch.float64 or not len(betas) > 0:
            raise ValueError(f"betas must be float64 [T], got {betas.dtype} {list(betas.shape)}")
        _check(betas, variance, prediction)
        self.variance: Variance = variance
        self.prediction: Prediction = prediction
        self.num_timesteps = len(betas)
        # Whether each index leads to the timestep right before its own: none is left out.
        self._has_single_steps = timesteps is None or int(timesteps[-1]) == len(betas) - 1

        alphas = 1 - betas
        alphas_cumprod = alphas.cumprod(0)
        alphas_cumprod_prev = torch.cat([betas.new_ones(1), alphas_cumprod[:-1]])
        # Eq. 7. The variance is 0 at t = 0; the authors' code takes the logarithm of its successor
        # there (never used for sampling, since the last step adds no noise).
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        patched = torch.cat([posterior_variance[1:2], posterior_variance[1:]])
        if self.num_timesteps == 1:
            patched = betas
        tables = {
            "betas": betas,
            "timesteps": torch.arange(len(betas)) if timesteps is None else timesteps,
            "alphas_cumprod": alphas_cumprod,
            "posterior_mean_coef_x_0": betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod),
            "posterior_mean_coef_x_t": (1 - alphas_cumprod_prev)
            * alphas.sqrt()
            / (1 - alphas_cumprod),
            "posterior_log_variance": patched.log(),
            # the fixed one, or the upper end of learned_range, which is not patched
            "log_variance": {
                "fixed_small": patched,
                "fixed_large": torch.cat([patched[:1], betas[1:]]),
            }.get(variance, betas).log(),
        }
        tables |= _pred_x_0_coefs(tables, prediction)
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

    def _check_steps(self, t: Tensor) -> None:
        """Refuse steps outside the schedule: a negative one would count from its end.

        On the CPU alone: asking a GPU would wait for it, at every step.
        """
        if not t.is_cpu:
            return
        steps = t.numpy()
        if (outside := (steps < 0) | (steps >= self.num_timesteps)).any():
            raise InputError(
                f"t {steps[outside][0]}: must lie in 0..{self.num_timesteps - 1}, the schedule"
            )

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise x_0 to step t in one jump (Ho et al. 2020, Eq. 4).

        Args:
            x_0: Clean images, float [N, C, H, W] in [-1, 1].
            t: Zero-based steps, int64 [N] in [0, num_timesteps); t = 0 is one step of noise.
            noise: Standard normal, shaped like x_0.

        Returns:
            x_t, shaped like x_0.

        Raises:
            InputError: A step is outside the schedule.
        """
        self._check_steps(t)
        signal = self._gather(self.alphas_cumprod.sqrt(), t, x_0)
        return signal * x_0 + self._gather((1 - self.alphas_cumprod).sqrt(), t, x_0) * noise

    def v(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Give v = sqrt(alphas_cumprod) noise - sqrt(1 - alphas_cumprod) x_0.

        Salimans & Ho 2022, section 4 and appendix D: what the network learns for the prediction v.

        Args:
            x_0: Clean images, float [N, C, H, W].
            t: Zero-based steps, int64 [N].
            noise: Shaped like x_0.

        Returns:
            v, shaped like x_0.
        """
        return self.q_sample(noise, t, -x_0)  # x_t of the two in each other's places

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

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Part the network's output into the prediction and what tells a learned variance.

        Args:
            output: Float [N, C, H, W], or [N, 2C, H, W] where the variance is learned.
            x_t: Float [N, C, H, W].

        Returns:
            Two [N, C, H, W]; None for the second where the variance is fixed.

        Raises:
            InputError: The output has the channels of another variance.
        """
        channels, found = x_t.shape[1], output.shape[1]
        if found != (wanted := self.count_outputs(channels)):
            raise InputError(
                f"variance {self.variance}: {channels} channels need a network of {wanted} output "
                f"channels, but this one has {found}"
            )
        if not self.learns_variance:
            return output, None
        return output[:, :channels], output[:, channels:]

    @property
    def learns_variance(self) -> bool:
        """Whether the network gives the variance, too."""
        return self.variance in LEARNED_VARIANCES

    def count_outputs(self, channels: int) -> int:
        """Count the channels that the network gives for images of so many."""
        return 2 * channels if self.learns_variance else channels

    def pred_x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Give the clean image that the network's output implies.

        For `noise` that is Eq. 15, sqrt(1/alphas_cumprod) x_t - sqrt(1/alphas_cumprod - 1) noise;
        for `mu`, Eq. 7 solved for x_0; for `v`, sqrt(alphas_cumprod) x_t - sqrt(1 -
        alphas_cumprod) v.

        Args:
            output: The network's output at (x_t, t), float [N, C or 2C, H, W] (see `split`).
            x_t: Noisy images at step t, float [N, C, H, W].
            t: Zero-based steps, int64 [N].

        Returns:
            x_0, shaped like x_t, unclipped.
        """
        prediction, _ = self.split(output, x_t)
        return (
            self._gather(self.pred_x_0_coef_x_t, t, x_t) * x_t
            + self._gather(self.pred_x_0_coef_output, t, x_t) * prediction
        )

    def pred_noise(self, pred_x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Give the noise that a predicted x_0 implies (Eq. 4 solved for it).

        Args:
            pred_x_0: Clean images, float [N, C, H, W], clipped or not.
            x_t: Noisy images at step t, shaped like pred_x_0.
            t: Zero-based steps, int64 [N].

        Returns:
            (x_t - sqrt(alphas_cumprod) x_0) / sqrt(1 - alphas_cumprod), shaped like x_t.
        """
        signal = self._gather(self.alphas_cumprod.sqrt(), t, x_t)
        return (x_t - signal * pred_x_0) / self._gather((1 - self.alphas_cumprod).sqrt(), t, x_t)

    def p_mean_variance(
        self, output: Tensor, x_t: Tensor, t: Tensor, clip: Clip = "static"
    ) -> Reverse:
        """Give p(x_{t-1} | x_t) (Ho et al. 2020, Eqs. 1 and 11).

        The mean is the posterior's at the predicted x_0. Unclipped that is the paper's Algorithm 2;
        clipped to [-1, 1] first, it is what the authors' code samples with. A network that predicts
        `mu` gives the mean itself, which is not clipped, as long as t is one step after t - 1.

        Args:
            output: The network's output at (x_t, t), float [N, C or 2C, H, W] (see `split`).
            x_t: Noisy images at step t, float [N, C, H, W].
            t: Zero-based steps, int64 [N].
            clip: How the predicted x_0 is clipped (see `clip_x_0`).

        Returns:
            Mean, log-variance and predicted x_0.

        Raises:
            InputError: The network's variance is that of shorter steps (`learned`, respaced), or a
                step is outside the schedule.
        """
        self._check_steps(t)
        pred_x_0 = clip_x_0(self.pred_x_0(output, x_t, t), clip)
        mean, _ = self.posterior(pred_x_0, x_t, t)
        prediction, told = self.split(output, x_t)
        if self.prediction == "mu" and self._has_single_steps:
            mean = prediction
        return Reverse(mean, self._reverse_log_variance(told, x_t, t), pred_x_0)

    def _reverse_log_variance(self, told: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        """Give log sigma_t^2; `told` is the second half of the output, shaped like x_t."""
        upper = self._gather(self.log_variance, t, x_t)
        if told is None:
            return upper
        if self.variance == "learned_range":
            share = (told + 1) / 2  # Nichol & Dhariwal 2021, Eq. 15
            return share * upper + (1 - share) * self._gather(self.posterior_log_variance, t, x_t)
        if not self._has_single_steps:
            raise InputError(
                "variance learned: the network knows the variance of steps from t to t - 1 alone; "
                "take all timesteps (num_steps), the ddim sampler, or train with learned_range"
            )
        return told

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
        betas = 1 - alphas_cumprod / previous
        respaced = Process(betas, self.variance, self.timesteps[timesteps], self.prediction)
        # What an output says of x_0 does not depend on the steps taken: mu is that of t - 1. The
        # marginals are copied, too: taken from the betas again, small ones lose digits.
        for name in ("alphas_cumprod", "pred_x_0_coef_x_t", "pred_x_0_coef_output"):
            respaced.register_buffer(name, self.get_buffer(name)[timesteps], persistent=False)
        return respaced


def _pred_x_0_coefs(tables: dict[str, Tensor], prediction: Prediction) -> dict[str, Tensor]:
    """Give the two coefficients of x_0, which is linear in x_t and the prediction."""
    alphas_cumprod = tables["alphas_cumprod"]
    coef_x_0, coef_x_t = tables["posterior_mean_coef_x_0"], tables["posterior_mean_coef_x_t"]
    x_t, output = {
        "noise": (alphas_cumprod.rsqrt(), -(1 / alphas_cumprod - 1).sqrt()),
        "x_0": (torch.zeros_like(coef_x_0), torch.ones_like(coef_x_0)),
        "mu": (-coef_x_t / coef_x_0, 1 / coef_x_0),
        "v": (alphas_cumprod.sqrt(), -(1 - alphas_cumprod).sqrt()),
    }[prediction]
    return {"pred_x_0_coef_x_t": x_t, "pred_x_0_coef_output": output}


def _check(betas: Tensor, variance: Variance, prediction: Prediction) -> None:
    for name, value, known in [
        ("variance", variance, get_args(Variance)),
        ("prediction", prediction, get_args(Prediction)),
    ]:
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    inside = (betas > 0) & (betas < 1)
    if not bool(inside[:-1].all()) or not 0 < float(betas[-1]) <= 1:
        raise InputError("every beta must lie in (0, 1); the last one may be 1")
    alphas_cumprod = (1 - betas).cumprod(0)
    if bool((alphas_cumprod[:-1] == 0).any()):
        raise InputError("alphas_cumprod is 0 before the last timestep; take smaller betas")
    if prediction in ("noise", "mu") and float(alphas_cumprod[-1]) == 0:
        raise InputError(
            f"prediction {prediction}: alphas_cumprod is 0 at the last timestep (schedule jsd, "
            "zero_terminal_snr), where x_t holds nothing of x_0; predict x_0 or v"
        )
