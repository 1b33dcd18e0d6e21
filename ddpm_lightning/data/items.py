"""What every source gives: named splits of images that are not decoded yet."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ddpm_lightning.errors import InputError
from ddpm_lightning.images import Pixels

SplitName = Literal["train", "val", "test"]

_SPLIT_NAMES: Mapping[str, SplitName] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
Item = bytes | Pixels
"""One image: the bytes of an image file, or its pixels as uint8 [H, W] or [H, W, 3]."""


class Split(Protocol):
    """A sized sequence of images. Several threads read it at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item:
        """Read image `index`.

        Raises:
            InputError: The whole source is unusable.
            Exception: Any other one says that this image is.
        """

    def name(self, index: int) -> str:
        """What to call image `index` in a message: its path, or its row."""


@dataclass(frozen=True)
class Labels:
    """The classes of a split's images.

    Attributes:
        values: int64 [N], one per image, in the split's order; -1 where there is none.
        num_classes: How many classes there are.
        names: What each is called, where the source says.
    """

    values: NDArray[np.int64]
    num_classes: int
    names: tuple[str, ...] = ()


def numbered(values: NDArray[np.int64]) -> Labels:
    """Give the labels of classes that are called by their numbers, up to the highest there."""
    return Labels(values, int(values.max(initial=-1)) + 1)


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes:
        name: What the user wrote.
        fingerprint: Hex digits that change when the content does.
        splits: "train" always, "val" and "test" where the source has them.
        labels: Reads the labels of a split, where it has them. Classes are counted over "train".
    """

    name: str
    fingerprint: str
    splits: Mapping[SplitName, Split]
    labels: Mapping[SplitName, Callable[[], Labels]] = field(default_factory=dict)


class ArraySplit:
    """A split whose pixels fit in memory, loaded when the first one is read.

    Args:
        name: What holds them, for messages.
        num_images: How many `load` returns.
        load: Returns uint8 [N, H, W]. Called once.
    """

    def __init__(self, name: str, num_images: int, load: Callable[[], Pixels]) -> None:
        self._name = name
        self._num_images = num_images
        self._load = load
        self._lock = threading.Lock()
        self._pixels: Pixels | None = None

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> Pixels:
        with self._lock:
            if self._pixels is None:
                self._pixels = self._load()
        pixels: Pixels = self._pixels[index]
        return pixels

    def name(self, index: int) -> str:
        """Say which image of which array it is."""
        return f"{self._name}, image {index}"


def find_splits(source: str, names: Iterable[str]) -> dict[SplitName, str]:
    """Tell which of a source's own names stand for train, val and test; others are left out.

    Raises:
        InputError: Two of them stand for the same.
    """
    found: dict[SplitName, str] = {}
    for name in names:
        if (split := _SPLIT_NAMES.get(name)) is None:
            continue
        if split in found:
            raise InputError(
                f"--data.source {source} has both {found[split]} and {name}; keep one of them"
            )
        found[split] = name
    return found


def fingerprint(content: Any) -> str:
    """Hash a nest of strings, numbers, lists and dicts to 64 hex digits, the same everywhere."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_stamp(path: Path) -> tuple[str, int, int]:
    """Path, size and time of change: what tells a file from its next version without reading it."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
