"""What the network learns: targets and losses."""

from collections.abc import Callable

from torch import Tensor

from ddpm_lightning.diffusion.process import Process


def simple_loss(
    net: Callable[[Tensor, Tensor], Tensor], process: Process, x_0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """L_simple: the squared error of the predicted noise (Ho et al. 2020, Eq. 14).

    Args:
        net: epsilon_theta; maps (x_t, t) to noise shaped like x_t.
        process: The forward process.
        x_0: Clean images, float [N, C, H, W] in [-1, 1].
        t: Zero-based steps, int64 [N].
        noise: Standard normal, shaped like x_0.

    Returns:
        The mean over pixels, one per image, [N] in the dtype of x_0.
    """
    x_t = process.q_sample(x_0, t, noise)
    pred_noise = net(x_t, process.timesteps[t]).to(x_0.dtype)  # bfloat16 under autocast
    return (noise - pred_noise).square().flatten(1).mean(dim=1)
