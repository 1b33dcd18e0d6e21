"""Interpolation between images through their noised versions."""

from torch import Tensor

from ddpm_lightning.diffusion.process import Process


def mix_noised(
    process: Process, x_0: Tensor, noise: Tensor, num_noising_steps: int, weights: Tensor
) -> Tensor:
    """Mix two images, both noised by some steps (Ho et al. 2020, section 4.4).

    x_t = (1 - lambda) x_t^a + lambda x_t^b, where both come from q(x_t | x_0) with noise that is
    the same for all lambda. The mixture is linear, as the paper's is: halfway between two
    independent noises there is less of it.

    Args:
        process: The forward process.
        x_0: The two images, float [2, C, H, W] in [-1, 1].
        noise: Of each, standard normal, shaped like x_0.
        num_noising_steps: In [0, num_timesteps], the paper's t; without any it is the images
            themselves that are mixed.
        weights: lambda of each mixture, float [L] in [0, 1].

    Returns:
        The mixtures, float [L, C, H, W].
    """
    x_t = x_0
    if num_noising_steps:
        t = process.timesteps.new_full((2,), num_noising_steps - 1)
        x_t = process.q_sample(x_0, t, noise)
    share = weights.reshape(-1, 1, 1, 1)
    return (1 - share) * x_t[:1] + share * x_t[1:]
