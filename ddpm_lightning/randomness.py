"""Random numbers as pure functions of (seed, stream, index).

Training draws are keyed by the position of an image in the global order, sampling draws by the
image's own seed. Nothing here has state, so a slice of a batch never needs the whole, and a resumed
run needs no saved generator.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_SEEDS = 2**32
"""Seeds lie in [0, NUM_SEEDS): torch's CPU generator uses 32 bits and ignores the others."""


class Stream(IntEnum):
    """What a draw is for; equal indices in different streams are independent."""

    ORDER = 0
    SPLIT = 1
    FLIP = 2
    TIMESTEP = 3
    NOISE = 4
    DROPOUT = 5
    STRATUM = 6
    WINDOW = 7
    LABEL = 10
    CODEC = 16  # compressed files depend on this number
    DERIVED = 17


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014): one step of the generator from state `x`."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash_indices(
    seed: int, stream: Stream, indices: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Hash (seed, stream, index) to 64 uniform bits per index.

    Args:
        seed: The run's seed, >= 0.
        stream: What the bits are for.
        indices: Non-negative, int64 [N].

    Returns:
        uint64 [N]; element n depends on `indices[n]` only.
    """
    key = _mix(_mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(stream))
    return _mix(key ^ _mix(np.asarray(indices, dtype=np.uint64)))


def hash_uniform(seed: int, stream: Stream, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform float64 [N] in [0, 1), one per index (see `hash_indices`)."""
    bits = hash_indices(seed, stream, indices) >> np.uint64(11)  # as many as a float64 holds
    return bits.astype(np.float64) * 2.0**-53


def derive_seed(seed: int, *keys: int) -> int:
    """Derive another seed in [0, NUM_SEEDS), as independent of `seed` as a plain one is.

    Args:
        seed: In [0, NUM_SEEDS).
        keys: Non-negative; tell apart what is derived from one seed.
    """
    for key in keys:
        seed = int(hash_indices(seed, Stream.DERIVED, [key])[0]) % NUM_SEEDS
    return seed


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without making the host wait for what runs there."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # from ordinary memory the copy would be synchronous
    return tensor.to(device, non_blocking=True)


class NoiseStreams:
    """One generator per image: draw k of image n is a pure function of (seeds[n], k).

    Args:
        seeds: One per image, each in [0, NUM_SEEDS) (other bits are dropped).
        device: Where the generators live. Values are bit-equal on the CPU, and on one model of
            GPU; small GPUs draw images of 256x256 in another order than large ones.
        pin_memory: Draw into page-locked memory, for `to_device`.
    """

    def __init__(
        self,
        seeds: Sequence[int] | NDArray[np.uint64],
        device: torch.device,
        pin_memory: bool = False,
    ) -> None:
        self._device = device
        self._pin_memory = pin_memory
        self._generators = [
            torch.Generator(device).manual_seed(int(seed) % NUM_SEEDS) for seed in seeds
        ]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal noise, float32 [len(seeds), *shape] on the generators' device."""
        noise = torch.empty(
            (len(self._generators), *shape),
            dtype=torch.float32,  # whatever the default: another dtype has other draws
            device=self._device,
            pin_memory=self._pin_memory,
        )
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise
