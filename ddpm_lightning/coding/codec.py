"""Pictures to bits and back (Ho et al. 2020, section 4.3, Algorithms 3 and 4).

The sender knows x_0. It sends x_T, then for each step a sample x_{t-1} of q(x_{t-1} | x_t, x_0) to
a receiver who knows p(x_{t-1} | x_t), and at last x_0 itself given the least noisy x_t, by the
discretised decoder and an entropy coder, without loss. After every step the receiver predicts x_0.
The timesteps are few: a respaced process's bound is a little larger, and each step costs a little
more than its KL.

Both run the same chain on the same numbers, one picture at a time, so that what one computes the
other computes to the last bit.

p has the posterior's variance, whatever the model samples with, be it learned: q then differs from
p in its mean only, and no bits pay for unequal variances (0.49 bits/dim with `fixed_large` in 1000
steps, and more in fewer). The network is asked for nothing but the predicted x_0. x_T is sent like
every other step, its p being N(0, I): under a schedule that ends in pure noise that takes next to
no bits, and under any other it is still right.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_lightning.coding.blocks import BlockReader, BlockWriter
from ddpm_lightning.coding.channel import Target, Vector
from ddpm_lightning.coding.entropy import LEAST_PROBABILITY, SymbolReader, Symbols, SymbolWriter
from ddpm_lightning.diffusion.clipping import clip_x_0
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.diffusion.timesteps import space_by_log_snr
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import to_float, to_uint8

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t float64 [1, C, H, W], t int64 [1]) -> its output, as `Process.pred_x_0` takes it."""

# Where x_t tells almost nothing of x_0, steps bring little: each of them costs a bit or two more
# than its KL.
_LEAST_LOG_SNR = -5.0
# And where it tells x_0 to within a few grey levels, what is left is about the noise of each pixel,
# which the entropy coder sends for what it is worth, while a block costs a third more.
_MOST_LOG_SNR = 5.0

# The final Gaussian's width: the process's own times 2^(k/2), k from -8. The network may be surer
# than the noise in the last x_t, or less sure.
_WIDTHS = 2.0 ** ((np.arange(16) - 8) / 2)
_WIDTH_SIZES = np.array([len(_WIDTHS)], dtype=np.int32)


class Progress(NamedTuple):
    """What the receiver has after a step."""

    t: int  # the timestep whose x_t has arrived; -1 is x_0 itself
    rate: float  # measured, bits per dimension up to here
    theoretical: float  # the sum of KL(q || p) on this chain, and at the end of -log2 p(x_0 | x_1)
    rmse: float  # of the picture that it would show, in grey levels of [0, 255]


class Decoded(NamedTuple):
    """What a stream, or its beginning, decodes to."""

    image: Tensor  # uint8 [C, H, W]
    num_steps: int  # x_t that arrived whole
    is_whole: bool  # x_0 arrived, too: the image is exactly what was sent


def space_by_noise(process: Process, num_steps: int) -> Tensor:
    """Choose timesteps at even distances of log SNR, where the bits are.

    A step from t to s takes about (SNR(s) / SNR(t) - 1) / 2 nats for each dimension whose noise
    cannot be predicted, so that steps of one ratio take the fewest bits. The first timestep is
    where log SNR has fallen to 5, the last one T - 1.

    Args:
        process: The process on all its timesteps.
        num_steps: S, in [1, T].

    Returns:
        int64 [S], increasing.

    Raises:
        InputError: num_steps is out of range.
    """
    alphas_cumprod = process.alphas_cumprod
    return space_by_log_snr(alphas_cumprod, num_steps, _MOST_LOG_SNR, _LEAST_LOG_SNR)


def encode(
    net: Network, process: Process, image: Tensor, seed: int
) -> tuple[bytes, list[Progress]]:
    """Send a picture.

    Args:
        net: The network, in eval mode.
        process: The process on the timesteps to visit.
        image: uint8 [C, H, W].
        seed: Keys the randomness that sender and receiver share.

    Returns:
        The stream, and what it had brought after each step.
    """
    x_0 = to_float(image[None], torch.float64)
    writer = SymbolWriter()
    channel = BlockWriter(writer, seed)
    history: list[Progress] = []
    theoretical = 0.0

    p, q = _Gaussian(torch.zeros_like(x_0), 1.0), _noised(process, x_0)
    for index in reversed(range(process.num_timesteps)):
        target = Target(((q.mean - p.mean) / p.std).flatten().numpy(), q.std / p.std)
        x_t = p.at(channel.send(target))
        theoretical += target.bits()
        pred_x_0 = _predict(net, process, x_t, index)
        rmse = (to_uint8(pred_x_0)[0].double() - image).square().mean().sqrt()
        rates = writer.num_bits / image.numel(), theoretical / image.numel()
        history.append(Progress(int(process.timesteps[index]), *rates, float(rmse)))
        p, q = (_previous(process, x, x_t, index) for x in (pred_x_0, x_0))

    levels = image.flatten().numpy().astype(np.int32)
    # one table at a time: at 3x256x256 each takes 400 MB
    costs = [_information(levels, _pixel_probabilities(p, width)) for width in _WIDTHS]
    best = int(np.argmin(costs))
    writer.put_uniform(np.array([best], dtype=np.int32), _WIDTH_SIZES)
    writer.put(levels, _pixel_probabilities(p, _WIDTHS[best]))
    theoretical += costs[best]
    data = writer.to_bytes()
    rates = 8 * len(data) / image.numel(), theoretical / image.numel()
    return data, [*history, Progress(-1, *rates, 0.0)]


def decode(
    net: Network,
    process: Process,
    data: bytes,
    seed: int,
    shape: tuple[int, int, int],
    finish: bool = False,
) -> Decoded:
    """Receive a picture, or what the beginning of a stream tells of it.

    Args:
        net: As the sender's, like the process and the seed.
        process: The process on the timesteps to visit.
        data: The stream, or any number of its first bytes.
        seed: Keys the randomness that sender and receiver share.
        shape: (C, H, W) of the picture.
        finish: Where the stream was cut, draw the missing steps from p; otherwise the image is
            what the last whole step predicts.
    """
    reader = SymbolReader(data)
    channel = BlockReader(reader, seed)
    num_dims = math.prod(shape)
    pred_x_0: Tensor | None = None
    num_steps = 0

    p = _Gaussian(torch.zeros(1, *shape, dtype=torch.float64), 1.0)
    for index in reversed(range(process.num_timesteps)):
        sample = channel.receive(num_dims)
        if sample is not None:
            num_steps += 1
        elif pred_x_0 is None or finish:  # with no step at all, one must begin somewhere
            sample = channel.imagine(num_dims)
        else:
            break
        x_t = p.at(sample)
        pred_x_0 = _predict(net, process, x_t, index)
        p = _previous(process, pred_x_0, x_t, index)

    assert pred_x_0 is not None
    image = to_uint8(pred_x_0)[0]
    if num_steps < process.num_timesteps:
        return Decoded(image, num_steps, False)
    width = reader.take(_WIDTH_SIZES)
    if not len(width):
        return Decoded(image, num_steps, False)
    levels = reader.take(_pixel_probabilities(p, _WIDTHS[width[0]]))
    # The pixels that arrived are exact; the others stay as predicted.
    image.view(-1)[: len(levels)] = torch.from_numpy(levels.astype(np.uint8))
    return Decoded(image, num_steps, len(levels) == num_dims)


class _Gaussian(NamedTuple):
    """An isotropic Gaussian over pictures."""

    mean: Tensor  # float64 [1, C, H, W]
    std: float

    def at(self, sample: Vector) -> Tensor:
        """Give the picture at a point of N(0, I), float64 [D]."""
        return self.mean + self.std * torch.from_numpy(sample).view_as(self.mean)


def _noised(process: Process, x_0: Tensor) -> _Gaussian:
    """Give q(x_T | x_0) (Eq. 4)."""
    alpha_cumprod = float(process.alphas_cumprod[-1])
    return _Gaussian(alpha_cumprod**0.5 * x_0, (1 - alpha_cumprod) ** 0.5)


def _previous(process: Process, x_0: Tensor, x_t: Tensor, index: int) -> _Gaussian:
    """Give q(x_{t-1} | x_t, x_0) (Eqs. 6 and 7); at the last step its mean is x_0."""
    mean, log_variance = process.posterior(x_0, x_t, torch.tensor([index]))
    return _Gaussian(mean, math.exp(0.5 * float(log_variance)))


def _predict(net: Network, process: Process, x_t: Tensor, index: int) -> Tensor:
    t = torch.tensor([index])
    pred_x_0 = process.pred_x_0(net(x_t, process.timesteps[t]), x_t, t)
    if not pred_x_0.isfinite().all():
        raise InputError(
            "a prediction is not finite: the weights have diverged; take an earlier checkpoint"
        )
    return clip_x_0(pred_x_0, "static")


def _pixel_probabilities(p: _Gaussian, width: float) -> NDArray[np.float64]:
    """Give each pixel's probability of each grey level, [D, 256] (Ho et al. 2020, Eq. 13)."""
    levels = to_float(torch.arange(256, dtype=torch.uint8), torch.float64)
    # A level's bin reaches half way to its neighbours, and those at the ends to infinity.
    edges = (levels[1:] + levels[:-1]) / 2
    below = torch.special.ndtr((edges - p.mean.reshape(-1, 1)) / (p.std * width))
    zero, one = below.new_zeros(len(below), 1), below.new_ones(len(below), 1)
    return np.asarray(torch.cat([zero, below, one], dim=1).diff(dim=1).numpy())


def _information(levels: Symbols, probabilities: NDArray[np.float64]) -> float:
    """Give -log2 P of all pixels, in bits."""
    chosen = probabilities[np.arange(len(levels)), levels]
    return -float(np.log2(np.maximum(chosen, LEAST_PROBABILITY)).sum())
