"""Batches as the network gets them: uint8 images and the positions that key their random draws."""

import hashlib
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ddpm_lightning.data.cache import CachedImages
from ddpm_lightning.data.items import SplitName
from ddpm_lightning.data.order import GlobalOrder, Indices
from ddpm_lightning.images import Pixels
from ddpm_lightning.randomness import Stream, hash_indices


class Batch(NamedTuple):
    """Images and what keys their random draws.

    Attributes:
        images: uint8 [N, C, H, W].
        positions: int64 [N]: places in the run's order (training), or in the split (else). They
            stay on the host: Lightning moves tensors only.
        labels: The images' classes, int64 [N]; None where the network is not told them.
    """

    images: Tensor
    positions: NDArray[np.int64]
    labels: Tensor | None = None


class Images(Protocol):
    """Some images of one shape, in a fixed order."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Indices, /) -> Pixels:
        """Give the images at `indices`, int64 [n] in [0, len), as uint8 [n, C, H, W]."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @property
    def sha256(self) -> str:
        """Hex digits that tell these images, in this order, from any others."""

    def spread(self, limit: int) -> Indices:
        """Give indices of at most `limit` images, int64, spread over the set."""


class ImageSet:
    """Some of the images of a decoded split.

    Args:
        cached: The split.
        rows: Which of its images, ascending int64; all when None.
        split: What the source calls the split.
    """

    def __init__(
        self, cached: CachedImages, rows: Indices | None = None, split: SplitName = "train"
    ) -> None:
        self.cached = cached
        self.split: SplitName = split
        self._rows = np.arange(cached.shape[0]) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: Indices) -> Pixels:
        """Copy the images at `indices`, int64 [n] in [0, len), as uint8 [n, C, H, W]."""
        pixels: Pixels = self.cached.images[self._rows[indices]]
        return pixels

    def pick(self, of_split: Indices) -> Indices:
        """Take these images' values from those of all images that the source has in this split."""
        kept = np.delete(of_split, self.cached.skipped) if self.cached.skipped else of_split
        return kept[self._rows]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.cached.shape[1:]

    def spread(self, limit: int) -> Indices:
        """Give indices of at most `limit` images, evenly spread over the set."""
        return np.linspace(0, len(self) - 1, min(limit, len(self))).astype(np.int64)

    @cached_property
    def sha256(self) -> str:
        """Hex digits that tell these images, in this order, from any others."""
        if len(self) == self.cached.shape[0]:
            return self.cached.sha256
        rows = self._rows.astype("<i8").tobytes()
        return hashlib.sha256(self.cached.sha256.encode() + rows).hexdigest()


def mirror_half(pixels: Pixels, positions: Indices, seed: int) -> None:
    """Mirror every second image, on average, left to right, in place: uint8 [N, C, H, W]."""
    mirrored = hash_indices(seed, Stream.FLIP, positions) >> np.uint64(63) == 1
    pixels[mirrored] = pixels[mirrored][..., ::-1]


class TrainingBatches(Dataset[Batch]):
    """Images by position in the run's global order.

    Args:
        images: The training set.
        seed: The run's seed.
        flip: Mirror every second image, on average, left to right.
        labels: The images' classes, int64 [len(images)], if they are asked for.
    """

    def __init__(
        self, images: ImageSet, seed: int, flip: bool, labels: Indices | None = None
    ) -> None:
        self._images = images
        self._labels = labels
        self._order = GlobalOrder(len(images), seed)
        self._seed = seed
        self._flip = flip

    def __getitems__(self, positions: Indices) -> Batch:
        """Make the batch of `positions`: a pure function of them and the seed."""
        indices = self._order.indices(positions)
        pixels = self._images[indices]
        if self._flip:
            mirror_half(pixels, positions, self._seed)
        return _batch(pixels, positions, self._labels, indices)


class PlainBatches(Dataset[Batch]):
    """Images by place in their split, as they are.

    Args:
        images: The validation or test set.
        labels: Their classes, int64 [len(images)], if they are asked for.
    """

    def __init__(self, images: ImageSet, labels: Indices | None = None) -> None:
        self._images = images
        self._labels = labels

    def __getitems__(self, positions: Indices) -> Batch:
        """Make the batch of `positions`."""
        return _batch(self._images[positions], positions, self._labels, positions)


def _batch(pixels: Pixels, positions: Indices, labels: Indices | None, indices: Indices) -> Batch:
    told = None if labels is None else torch.from_numpy(labels[indices])
    return Batch(torch.from_numpy(pixels), positions, told)
