"""Pictures of Gaussian samples, block by block: what both sides must know to find the blocks.

A picture's coordinates are mixed and cut into equal blocks. How many there are follows from one
small number, the level, that goes before them: about how many bits the picture takes. It changes
little from picture to picture of a chain, and costs about one bit where it stays. A block's
candidate goes by the number of binary digits of its own number, which is likelier the smaller it
is, and then the digits.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpm_lightning.coding.channel import (
    BLOCK_BITS,
    MAX_EXPONENT,
    Target,
    Vector,
    candidate,
    choose,
    derive,
    mix,
    unmix,
)
from ddpm_lightning.coding.entropy import SymbolReader, SymbolWriter

# What each level foresees for the whole picture, in bits. Below a block's worth coarse steps will
# do; above, steps of a factor sqrt(2) in the number of blocks.
_FORESEEN = np.array([0.25, 1.0, 4.0, *(BLOCK_BITS * 2.0 ** (np.arange(40) / 2))])
_LEVELS = np.arange(len(_FORESEEN))


class _Layout(NamedTuple):
    """The blocks that a level means, and how long the numbers of their candidates tend to be."""

    starts: NDArray[np.int64]  # [B], where each block begins
    growth: float  # P(a number has e + 1 digits) / P(it has e)

    def exponents(self) -> NDArray[np.float64]:
        """Give P(e), [B, MAX_EXPONENT + 1]: geometric, like the probabilities of Zipf's law."""
        weights = self.growth ** np.arange(MAX_EXPONENT + 1)
        return np.broadcast_to(weights / weights.sum(), (len(self.starts), MAX_EXPONENT + 1)).copy()


def _lay_out(level: int, dim: int) -> _Layout:
    num_blocks = min(dim, math.ceil(_FORESEEN[level] / BLOCK_BITS))
    starts = np.arange(num_blocks) * dim // num_blocks
    # A number of the candidates in use has about as many digits as the block has bits.
    mean = min(_FORESEEN[level] / num_blocks, MAX_EXPONENT)
    return _Layout(starts, mean / (1 + mean))


def _level_probabilities(previous: int) -> NDArray[np.float64]:
    """Give P(level | the one before), [1, levels]: staying is likely, and leaps can be had."""
    weights = (1.0 + np.abs(_LEVELS - previous)) ** -2.0
    return np.asarray((weights / weights.sum())[None])


class BlockWriter:
    """Sends samples of Gaussians.

    Args:
        writer: Where the symbols go.
        key: Keys all that sender and receiver share.
    """

    def __init__(self, writer: SymbolWriter, key: int) -> None:
        self._writer = writer
        self._key = key
        self._count = 0
        self._level = 0

    def send(self, target: Target) -> Vector:
        """Send a sample of q.

        Args:
            target: q, where p is N(0, I).

        Returns:
            The sample as the receiver has it, float64 [D].
        """
        key = derive(self._key, self._count)
        mixed = Target(mix(target.shift, key), target.scale)
        level = self._choose_level(mixed)
        starts, _ = layout = _lay_out(level, len(mixed.shift))
        blocks = np.split(mixed.shift, starts[1:])
        indices = np.array(
            [
                choose(Target(block, target.scale), derive(key, number))
                for number, block in enumerate(blocks)
            ]
        )
        exponents = np.frexp(indices + 1)[1] - 1
        self._writer.put(np.array([level], dtype=np.int32), _level_probabilities(self._level))
        self._writer.put(exponents.astype(np.int32), layout.exponents())
        if exponents.any():
            digits = indices + 1 - 2**exponents
            some = exponents > 0
            sizes = 2 ** exponents[some]
            self._writer.put_uniform(digits[some].astype(np.int32), sizes.astype(np.int32))
        self._level, self._count = level, self._count + 1
        return _picture(indices, layout, len(mixed.shift), key)

    def _choose_level(self, mixed: Target) -> int:
        """Find the level with the shortest description, of those whose blocks are small enough."""
        dim = len(mixed.shift)
        squares = mixed.shift**2
        spread = Target(np.zeros(1), mixed.scale).bits()
        lengths = -np.log2(_level_probabilities(self._level)[0])
        for level in _LEVELS.tolist():
            starts, growth = _lay_out(level, dim)
            sizes = np.diff(starts, append=dim)
            bits = np.add.reduceat(squares, starts) / (2 * math.log(2)) + sizes * spread
            # A number has about as many digits as the block has bits: e of them, each one bit, and
            # -log2 P(e) = -log2(1 - growth) - e log2(growth) to tell e.
            digits = np.minimum(bits, MAX_EXPONENT)
            lengths[level] += (digits * (1 - np.log2(growth)) - np.log2(1 - growth)).sum()
            if bits.max() > BLOCK_BITS and len(starts) < dim:
                lengths[level] = math.inf
        return int(lengths.argmin())


class BlockReader:
    """Receives what a `BlockWriter` sent.

    Args:
        reader: Where the symbols come from.
        key: As the writer's.
    """

    def __init__(self, reader: SymbolReader, key: int) -> None:
        self._reader = reader
        self._key = key
        self._count = 0
        self._level = 0

    def receive(self, dim: int) -> Vector | None:
        """Give the next sample, float64 [dim]; None where the stream ends before its end."""
        level = self._reader.take(_level_probabilities(self._level))
        if not len(level):
            return None
        layout = _lay_out(int(level[0]), dim)
        exponents = self._reader.take(layout.exponents())
        if len(exponents) < len(layout.starts):
            return None
        some = exponents > 0
        digits = self._reader.take((2 ** exponents[some]).astype(np.int32))
        if len(digits) < some.sum():
            return None
        indices = 2 ** exponents.astype(np.int64) - 1
        indices[some] += digits
        key = derive(self._key, self._count)
        self._level, self._count = int(level[0]), self._count + 1
        return _picture(indices, layout, dim, key)

    def imagine(self, dim: int) -> Vector:
        """Give a sample of p in place of the next one, float64 [dim]; takes nothing."""
        key = derive(self._key, self._count)
        self._count += 1
        return _picture(np.zeros(1, dtype=np.int64), _lay_out(0, dim), dim, key)


def _picture(indices: NDArray[np.int64], layout: _Layout, dim: int, key: int) -> Vector:
    sizes = np.diff(layout.starts, append=dim)
    blocks = [
        candidate(int(index), int(size), derive(key, number))
        for number, (index, size) in enumerate(zip(indices, sizes, strict=True))
    ]
    return unmix(np.concatenate(blocks), key)
