"""Reverse channel coding: sends a sample of q, which the sender alone knows, to one who knows p.

Sender and receiver share random candidates drawn from p, and the sender names the one to take
(minimal random coding, Havasi et al. 2019; Ho et al. 2020, Algorithms 3 and 4). Ordered random
coding (Theis & Yosri 2022) picks it so that small numbers are likely: naming a sample then takes
about KL(q || p) bits, and some four more for each sample. As the number of candidates grows like
2^KL, a picture is cut into blocks of few bits.

All is in whitened coordinates: p is N(0, I), and q is N(shift, scale^2 I).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_lightning.diffusion.likelihood import normal_kl
from ddpm_lightning.randomness import NoiseStreams, Stream, hash_indices

Vector = NDArray[np.float64]

BLOCK_BITS = 8.0
"""KL(q || p) of a block at most, where the sender can have it so."""

MAX_EXPONENT = 18
"""A block has 2^18 candidates at most. More would follow q more closely; see `count_candidates`."""

_ROWS = 1024  # candidates are made so many at a time, and the receiver makes only the right ones


class Target(NamedTuple):
    """q in the coordinates in which p is N(0, I): N(shift, scale^2 I)."""

    shift: Vector
    scale: float

    def bits(self) -> float:
        """KL(q || p) in bits."""
        zero = torch.zeros((), dtype=torch.float64)
        kl = normal_kl(torch.from_numpy(self.shift), zero + 2 * math.log(self.scale), zero, zero)
        return float(kl.sum()) / math.log(2)


def derive(key: int, index: int) -> int:
    """Derive a key, uint64, for one part of what `key` stands for."""
    return int(hash_indices(key, Stream.CODEC, [index])[0])


def mix(x: Vector, key: int) -> Vector:
    """Turn a picture so that all coordinates of the result bear alike on all of its own.

    Random signs and a discrete Hartley transform are an orthonormal map, under which isotropic
    Gaussians stay what they are; blocks of the result have nearly equal shares of the KL, while
    blocks of pixels would have theirs where the model is unsure.

    Args:
        x: float64 [D].
        key: Keys the signs.
    """
    return _hartley(_signs(len(x), key) * x)


def unmix(x: Vector, key: int) -> Vector:
    """Undo `mix`."""
    return _signs(len(x), key) * _hartley(x)


def count_candidates(bits: float) -> int:
    """Say how many candidates the sender weighs for a block of so many bits.

    q lies sqrt(2 KL) standard deviations from p along the shift. The number is such that a few
    candidates are expected beyond another 1.5 deviations there, as far as 2^18 reach: samples are
    those of q but for its far tail, which is cut off.
    """
    far = math.sqrt(2 * bits * math.log(2)) + 1.5
    return int(min(2.0**MAX_EXPONENT, max(_ROWS, 4 * math.exp(min(0.5 * far**2, 100)))))


def choose(target: Target, key: int) -> int:
    """Choose the candidate to send (Theis & Yosri 2022, Algorithm 2).

    Args:
        target: q.
        key: Keys the candidates, and the sender's own draws.

    Returns:
        Its number from 0.
    """
    shift, scale = target
    num_candidates = count_candidates(target.bits())
    own = np.random.default_rng(derive(key, num_candidates))
    best, best_score, time, first = 0, math.inf, 0.0, 0
    for rows in _batches(key, len(shift), num_candidates):
        # log q/p, but for what is the same for all of them
        log_ratio = rows @ shift / scale**2
        if scale != 1:
            log_ratio += 0.5 * (1 - scale**-2) * np.einsum("nd,nd->n", rows, rows)
        # The order statistics of as many exponentials as there are candidates, smallest first.
        left = num_candidates - first - np.arange(len(rows))
        times = time + np.cumsum(own.exponential(size=len(rows)) / left)
        scores = np.log(times) - log_ratio
        if scores.min() < best_score:
            best, best_score = first + int(scores.argmin()), float(scores.min())
        time, first = float(times[-1]), first + len(rows)
    return best


def candidate(index: int, dim: int, key: int) -> Vector:
    """Give one candidate, float64 [dim]: what the receiver does with its number."""
    batch, row = divmod(index, _ROWS)
    chosen: Vector = _batch(key, dim, batch)[row]
    return chosen


def _batches(key: int, dim: int, num_candidates: int) -> Iterator[Vector]:
    for first in range(0, num_candidates, _ROWS):
        yield _batch(key, dim, first // _ROWS)[: num_candidates - first]


def _batch(key: int, dim: int, batch: int) -> Vector:
    noise = NoiseStreams([derive(key, batch)], torch.device("cpu")).normal((_ROWS, dim))
    return np.asarray(noise[0].double().numpy())


def _signs(length: int, key: int) -> Vector:
    bits = hash_indices(key, Stream.CODEC, np.arange(length)) >> np.uint64(63)
    return 1 - 2 * bits.astype(np.float64)


def _hartley(x: Vector) -> Vector:
    """Give the discrete Hartley transform, orthonormal and its own inverse."""
    spectrum = np.fft.fft(x, norm="ortho")
    return np.asarray(spectrum.real - spectrum.imag)
