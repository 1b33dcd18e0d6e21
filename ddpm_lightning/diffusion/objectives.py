"""What the network learns: targets, losses and weightings."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_lightning.diffusion.combinations import Loss, Weighting, check_combination
from ddpm_lightning.diffusion.likelihood import vlb_term
from ddpm_lightning.diffusion.process import Process

MIN_SNR_GAMMA = 5.0
"""Hang et al. 2023, section 3.4."""

P2_K, P2_GAMMA = 1.0, 1.0
"""Choi et al. 2022, section 3.2."""

HYBRID_NUM_TIMESTEPS = 1000
"""The T at which the bound's term weighs 1 in `rescaled_hybrid`: Nichol & Dhariwal's lambda of
0.001 (2021, section 3.1) on the sum over T terms, of which one is drawn."""


@dataclass(frozen=True)
class Objective:
    """The loss of an image at a timestep.

    Args:
        process: Says what the network predicts, and which variance it has.
        loss: `simple` is the squared error of the prediction (Ho et al. 2020, Eq. 14), a mean over
            pixels; `vlb` the term of the variational bound at t in bits/dim (Eq. 5), not times T;
            `hybrid` their sum, in which the bound teaches the variance alone (Nichol & Dhariwal
            2021, Eq. 16); `rescaled_hybrid` the same with the bound's term times T / 1000.
        weighting: Factor of the squared error by timestep: `min_snr` (Hang et al. 2023) or `p2`
            (Choi et al. 2022).

    Raises:
        InputError: They do not go together, or with the process (see `check_combination`).
    """

    process: Process
    loss: Loss = "simple"
    weighting: Weighting = "none"

    def __post_init__(self) -> None:
        process = self.process
        check_combination(process.prediction, self.loss, self.weighting, process.variance)

    def __call__(
        self, net: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Take the loss of each image.

        Args:
            net: Maps (x_t, t) to its output, float [N, C or 2C, H, W] (see `Process.split`).
            x_0: Clean images, float [N, C, H, W] in [-1, 1].
            t: Zero-based steps, int64 [N].
            noise: Standard normal, shaped like x_0.

        Returns:
            Float [N] in the dtype of x_0.
        """
        process = self.process
        x_t = process.q_sample(x_0, t, noise)
        output = net(x_t, process.timesteps[t]).to(x_0.dtype)  # bfloat16 under autocast
        if self.loss == "vlb":
            return vlb_term(process, output, x_0, x_t, t, clip="none")
        prediction, told = process.split(output, x_t)
        error = target(process, x_0, x_t, t, noise) - prediction
        losses = error.square().flatten(1).mean(dim=1) * self._weights(t, x_0.dtype)
        if told is None:
            return losses
        frozen = torch.cat([prediction.detach(), told], dim=1)
        bound = vlb_term(process, frozen, x_0, x_t, t, clip="none")
        rescaled = self.loss == "rescaled_hybrid"
        return losses + bound * (process.num_timesteps / HYBRID_NUM_TIMESTEPS if rescaled else 1)

    def _weights(self, t: Tensor, dtype: torch.dtype) -> Tensor | float:
        """Give the factors of the squared errors, [N]; each is a function of the SNR S at t."""
        if self.weighting == "none":
            return 1.0
        alphas_cumprod = self.process.alphas_cumprod[t]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        if self.weighting == "p2":
            weights = (P2_K + snr) ** -P2_GAMMA
        else:  # min(S, gamma) on the squared error of x_0, and what amounts to that on the others
            weights = snr.clamp(max=MIN_SNR_GAMMA)
            if self.process.prediction != "x_0":
                weights /= {"noise": snr, "v": snr + 1}[self.process.prediction]
        return weights.to(dtype)


def target(process: Process, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Give what the network should say at (x_t, t), by the process's `prediction`.

    Args:
        process: The process.
        x_0: Clean images, float [N, C, H, W] in [-1, 1].
        x_t: The same at step t.
        t: Zero-based steps, int64 [N].
        noise: What is in x_t.

    Returns:
        The noise, x_0, the posterior's mean (Ho et al. 2020, Eq. 7) or v, shaped like x_0.
    """
    match process.prediction:
        case "noise":
            return noise
        case "x_0":
            return x_0
        case "mu":
            return process.posterior(x_0, x_t, t).mean
        case "v":
            return process.v(x_0, t, noise)
