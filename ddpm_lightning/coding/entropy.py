"""Symbols to bytes and back, where any number of the first bytes gives the first symbols.

The range coder is `constriction`'s. A stream is read twice, once as if zeros followed it and once
as if ones did: range coding keeps the order of streams, so that a symbol that comes out alike is
certain whatever was cut off.
"""

import numpy as np
from constriction import stream
from numpy.typing import NDArray

Symbols = NDArray[np.int32]

LEAST_PROBABILITY = 2.0**-24
"""No symbol has a smaller one: the coder's weights are fixed-point numbers of 24 bits."""

# Most significant byte first: the coder's words are digits, and a cut takes the small ones.
_WORD = np.dtype(">u4")
# The coder looks at 64 bits at a time, which may all be beyond the cut.
_PADDING = 8

_CATEGORICAL = stream.model.Categorical(perfect=False)
_UNIFORM = stream.model.Uniform()


class SymbolWriter:
    """Collects symbols, each with the probabilities that the reader will have for it."""

    def __init__(self) -> None:
        self._encoder = stream.queue.RangeEncoder()
        self._sent: list[tuple[Symbols, Symbols | NDArray[np.float64]]] = []
        self.num_bits = 0.0
        """The sum of -log2 P(symbol); the bytes are at most two more than that."""

    def put(self, symbols: Symbols, probabilities: NDArray[np.float64]) -> None:
        """Add symbols.

        Args:
            symbols: int32 [N] in [0, K).
            probabilities: float64 [N, K], rows summing to 1; `LEAST_PROBABILITY` is the least.
        """
        self._encoder.encode(symbols, _CATEGORICAL, probabilities)
        self._sent.append((symbols, probabilities))
        chosen = probabilities[np.arange(len(symbols)), symbols]
        self.num_bits -= float(np.log2(np.maximum(chosen, LEAST_PROBABILITY)).sum())

    def put_uniform(self, symbols: Symbols, sizes: Symbols) -> None:
        """Add symbols that are equally likely: int32 [N], each in [0, sizes[n]), sizes from 2."""
        self._encoder.encode(symbols, _UNIFORM, sizes)
        self._sent.append((symbols, sizes))
        self.num_bits += float(np.log2(sizes).sum())

    def to_bytes(self) -> bytes:
        """Give the shortest stream in which all symbols are certain."""
        data: bytes = self._encoder.get_compressed().astype(_WORD).tobytes()
        # The coder ends on whole words, at a point somewhere within the last symbol's range: a
        # shorter number in there is that point's first digits, or the next number of as many.
        for length in range(max(0, len(data) - _PADDING), len(data)):
            digits = int.from_bytes(data[:length])
            for number in (digits, digits + 1):
                if number < 256**length and self._is_whole(shorter := number.to_bytes(length)):
                    return shorter
        return data

    def _is_whole(self, data: bytes) -> bool:
        reader = SymbolReader(data)
        return all(np.array_equal(reader.take(given), symbols) for symbols, given in self._sent)


class SymbolReader:
    """Reads what a `SymbolWriter` wrote, or the beginning of it.

    Args:
        data: The stream's first bytes, any number.
    """

    def __init__(self, data: bytes) -> None:
        fill = _PADDING + -len(data) % _WORD.itemsize
        words = [np.frombuffer(data + end * fill, dtype=_WORD) for end in (b"\x00", b"\xff")]
        self._decoders = [stream.queue.RangeDecoder(word.astype(np.uint32)) for word in words]
        self._is_cut = False

    def take(self, given: Symbols | NDArray[np.float64]) -> Symbols:
        """Give the next symbols that are certain.

        Args:
            given: What the writer had: probabilities float64 [N, K], or sizes int32 [N].

        Returns:
            int32 [M], M <= N; fewer than N where the stream ends, and none ever after.
        """
        model = _UNIFORM if given.ndim == 1 else _CATEGORICAL
        symbols: list[int] = []
        while not self._is_cut and len(symbols) < len(given):
            row = given[len(symbols)][None]
            try:
                low, high = [int(decoder.decode(model, row)[0]) for decoder in self._decoders]
            except AssertionError:  # the coder's word for digits that no symbol has
                self._is_cut = True
                break
            self._is_cut = low != high
            if not self._is_cut:
                symbols.append(low)
        return np.array(symbols, dtype=np.int32)
