"""The splits of a stream: which images they have, and their pixels, read when asked for."""

import bisect
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lightning.data.cache import CONVERSION_VERSION, Channels, like_first
from ddpm_lightning.data.decoding import BrokenImage, decode_item
from ddpm_lightning.data.items import Item, Source, Split, SplitName, fingerprint
from ddpm_lightning.data.order import Indices, permutation
from ddpm_lightning.data.stream_blocks import Block, Items, open_blocks
from ddpm_lightning.data.stream_files import START_DELAYS, StreamError
from ddpm_lightning.data.stream_order import Part
from ddpm_lightning.data.stream_sources import list_files
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import Pixels
from ddpm_lightning.randomness import Stream

_NUM_KEPT = 4  # parts; threads that decode neighbours need few

_SPREAD_PARTS = 32


@dataclass(frozen=True)
class Piece:
    """Images [start, stop) of a block, which has a number in its split."""

    block: Block
    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int, delays: Sequence[float]) -> Items:
        """Read the piece's images [start, stop); see `Block.read`."""
        return self.block.read(self.start + start, self.start + stop, delays)

    def name(self, index: int) -> str:
        """What to call the piece's image `index` in a message."""
        return self.block.name(self.start + index)


class PieceItems:
    """The undecoded images of some pieces one after another (see `items.Split`).

    Args:
        pieces: Not empty.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        self._ends = list(itertools.accumulate(map(len, pieces), initial=0))
        self._lock = threading.Lock()
        self._kept: dict[int, Items] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Item:
        number = bisect.bisect_right(self._ends, index) - 1
        with self._lock:
            if number not in self._kept:
                if len(self._kept) == _NUM_KEPT:
                    del self._kept[next(iter(self._kept))]
                piece = self.pieces[number]
                self._kept[number] = piece.read(0, len(piece), START_DELAYS)
            items = self._kept[number]
        return as_item(items, index - self._ends[number])

    def name(self, index: int) -> str:
        """What its block calls it."""
        number = bisect.bisect_right(self._ends, index) - 1
        return self.pieces[number].name(index - self._ends[number])

    def spread(self, limit: int) -> Indices:
        """Give indices of at most `limit` images, from pieces spread over all of them."""
        count = min(_SPREAD_PARTS, len(self.pieces), limit)
        chosen = np.linspace(0, len(self.pieces) - 1, count).astype(np.int64).tolist()
        each = limit // count
        return np.concatenate(
            [
                np.arange(
                    self._ends[number], min(self._ends[number] + each, self._ends[number + 1])
                )
                for number in chosen
            ]
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"pieces": self.pieces}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["pieces"])  # type: ignore[misc]


class StreamImages:
    """Images that are read from their source whenever they are asked for.

    Args:
        pieces: Where they are.
        size: (height, width), or None for the size that they all have.
        channels: 1, 3, or None for what the first one has.
        identity: Hex digits that tell the files from others.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        size: tuple[int, int] | None,
        channels: Channels | None,
        identity: str,
    ) -> None:
        self.items = PieceItems(pieces)
        self._size = size
        self._channels = channels
        self._identity = identity

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, indices: Indices) -> Pixels:
        """Read and decode the images at `indices`, int64 [n], as uint8 [n, C, H, W].

        Those of one piece are best asked for together.
        """
        pixels = np.empty((len(indices), *self.image_shape), dtype=np.uint8)
        for row, index in zip(pixels, indices.tolist(), strict=True):
            self._decode_into(row, self.items[index], partial(self.items.name, index))
        return pixels

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W): the first image's."""
        first = self._decode(self.items[0], lambda: self.items.name(0))
        channels, height, width = first.shape
        return channels, height, width

    @cached_property
    def sha256(self) -> str:
        """Hex digits that tell these images, in this order, from any others."""
        chosen = describe(self.items.pieces)
        return fingerprint([self._identity, chosen, self._size, self._channels, CONVERSION_VERSION])

    def spread(self, limit: int) -> Indices:
        """Give indices of at most `limit` images, int64, spread over the set."""
        return self.items.spread(limit)

    def decode(self, items: Items, picks: Indices, out: Pixels, name: Callable[[int], str]) -> None:
        """Decode images of a window.

        Args:
            items: The window's.
            picks: Which of them, int64 [n].
            out: Where to, uint8 [n, C, H, W].
            name: What to call each in a message.

        Raises:
            StreamError: One is broken, or is not like the first.
        """
        if isinstance(items, np.ndarray) and self._fits(items):
            chosen = items[picks]
            out[:] = chosen[:, None] if chosen.ndim == 3 else chosen.transpose(0, 3, 1, 2)
            return
        for row, pick in zip(out, picks.tolist(), strict=True):
            self._decode_into(row, as_item(items, pick), partial(name, pick))

    def _fits(self, pixels: Pixels) -> bool:
        """Whether pixels [n, H, W] or [n, H, W, C] need no scaling and no other channels."""
        channels, height, width = self.image_shape
        grey = pixels.ndim == 3 or pixels.shape[3] == 1
        return pixels.shape[1:3] == (height, width) and channels == (1 if grey else 3)

    def _decode_into(self, row: Pixels, item: Item, name: Callable[[], str]) -> None:
        pixels = self._decode(item, name)
        if pixels.shape != row.shape:
            try:
                pixels = like_first(name(), pixels, self.items.name(0), row)
            except InputError as error:
                raise StreamError(str(error)) from error
        row[:] = pixels

    def _decode(self, item: Item, name: Callable[[], str]) -> Pixels:
        pixels = decode_item(lambda: item, self._size, self._channels)
        if isinstance(pixels, BrokenImage):
            raise StreamError(
                f"{name()} cannot be decoded: {pixels}; mend or remove it (a stream leaves no "
                "image out: its order counts them all)"
            )
        return pixels


def as_item(items: Items, index: int) -> Item:
    """Give one image as `decode_item` takes it."""
    item: Item = items[index]
    if isinstance(item, np.ndarray) and item.ndim == 3 and item.shape[2] == 1:
        return item[..., 0]
    return item


def describe(pieces: Sequence[Piece]) -> list[list[int]]:
    """Say which images of a split some pieces are, in plain numbers."""
    return [[piece.number, piece.start, piece.stop] for piece in pieces]


def read_window(pieces: Sequence[Piece], parts: Sequence[Part], delays: Sequence[float]) -> Items:
    """Read the parts of a window; see `Block.read`."""
    found = [pieces[part.block].read(part.start, part.stop, delays) for part in parts]
    arrays = [items for items in found if isinstance(items, np.ndarray)]
    if len(arrays) == len(found) and len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    return [item for items in found for item in items]


def open_stream(
    source: str,
    size: tuple[int, int] | None,
    channels: Channels | None,
    val_fraction: float,
    seed: int,
    cache_dir: Path,
) -> tuple[Source, StreamImages]:
    """Open the splits of a stream.

    Where it has neither a val nor a test split, val is a share of the training blocks: the first
    of them in a seeded order, the last of these in part, so that the number is exact.

    Args:
        source: See `stream_sources.list_files`.
        size: See `StreamImages`.
        channels: See `StreamImages`.
        val_fraction: That share, in [0, 1).
        seed: Of that order.
        cache_dir: Where the indices of tars are kept.

    Returns:
        The splits to validate and test on, undecoded, and the training images.

    Raises:
        InputError: There is no such stream, or it cannot be read.
    """
    splits = {
        split: open_blocks(files, cache_dir) for split, files in list_files(source).items() if files
    }
    pieces: dict[SplitName, list[Piece]] = {
        split: [
            Piece(block, number, 0, block.num_images) for number, block in enumerate(found.blocks)
        ]
        for split, found in splits.items()
    }
    pieces = {split: found for split, found in pieces.items() if found}
    if "train" not in pieces:
        raise InputError(f"--data.source {source}: has no images to train on")
    if pieces.keys() == {"train"}:
        train, val = _hold_out(pieces["train"], val_fraction, seed)
        pieces = {"train": train, **({"val": val} if val else {})}
    version = fingerprint([[split, found.version] for split, found in sorted(splits.items())])
    chosen = [[split, describe(found)] for split, found in sorted(pieces.items())]
    held_out: dict[SplitName, Split] = {
        split: PieceItems(found) for split, found in pieces.items() if split != "train"
    }
    return (
        Source(source, fingerprint(["stream", version, chosen]), held_out),
        StreamImages(pieces["train"], size, channels, splits["train"].identity),
    )


def _hold_out(
    pieces: list[Piece], val_fraction: float, seed: int
) -> tuple[list[Piece], list[Piece]]:
    """Divide pieces into those to train on and those to validate on, at least one image each."""
    num_images = sum(map(len, pieces))
    num_val = min(round(val_fraction * num_images), num_images - 1)
    if val_fraction and num_images > 1:
        num_val = max(1, num_val)
    train: list[Piece] = []
    val: list[Piece] = []
    for number in permutation(len(pieces), seed, Stream.SPLIT, 0).tolist():
        piece = pieces[number]
        cut = min(num_val, len(piece))
        num_val -= cut
        val += [Piece(piece.block, number, 0, cut)] if cut else []
        train += [Piece(piece.block, number, cut, len(piece))] if cut < len(piece) else []
    return (
        sorted(train, key=lambda piece: piece.number),
        sorted(val, key=lambda piece: piece.number),
    )
