"""Blocks of a stream: row groups of Parquet files, and runs of tar members and of image files."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from ddpm_lightning.data.image_folder import SUFFIXES
from ddpm_lightning.data.items import Item
from ddpm_lightning.data.order import Indices
from ddpm_lightning.data.stream_files import (
    File,
    LocalFile,
    Stamp,
    patiently,
)
from ddpm_lightning.data.stream_parquet import open_parquet
from ddpm_lightning.data.stream_tar import TarIndex, index_tar
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import Pixels

STREAMED = (".parquet", ".tar", *SUFFIXES)
"""What files of a stream end in, in lower or upper case."""

_BLOCK_IMAGES = 256
_BLOCK_BYTES = 2**21
_NUM_BLOCKS = 512  # that a set has if it is large enough for it, so that its order is well mixed
_UNKNOWN_BYTES = 2**17  # of an image file that nobody has looked at
_GAP_BYTES = 2**16  # between two images of a tar: reading on is cheaper than another request
_NUM_THREADS = 16  # that wait for servers

T = TypeVar("T")
R = TypeVar("R")

Items = list[Item] | Pixels
"""Images: one by one, or uint8 [n, H, W] or [n, H, W, C]."""


class Block(Protocol):
    """Images that are read together."""

    @property
    def num_images(self) -> int:
        """How many they are, at least 1."""

    @property
    def num_bytes(self) -> int:
        """About how much memory they take."""

    def read(self, start: int, stop: int, delays: Sequence[float]) -> Items:
        """Read images [start, stop).

        Args:
            start: The first.
            stop: Behind the last.
            delays: Between the attempts for each range of bytes; see `patiently`.

        Raises:
            StreamError: They cannot be read.
        """

    def name(self, index: int) -> str:
        """What to call image `index` in a message."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a split.

    Attributes:
        blocks: In the order of the files.
        identity: Hex digits of the files' names, sizes and numbers of images: the same wherever
            a copy lies.
        version: Hex digits that also change when a file is written anew.
    """

    blocks: Sequence[Block]
    identity: str
    version: str


def open_blocks(files: Sequence[File], cache_dir: Path) -> Blocks:
    """Look at the files of a split, all of one kind.

    Args:
        files: Parquet files, tars or image files, by the ends of their names.
        cache_dir: Where the indices of tars are kept.

    Raises:
        InputError: They are of several kinds, or one is not what it should be.
    """
    suffixes = {_suffix(file) for file in files}
    if suffixes <= set(SUFFIXES):
        return _image_files(files)
    if suffixes == {".parquet"}:
        found = _in_parallel(open_parquet, files)
        blocks: list[Block] = [block for _, column in found for block in column]
        return _described(files, [stamp for stamp, _ in found], blocks, [len(c) for _, c in found])
    if suffixes == {".tar"}:
        indices = _in_parallel(lambda file: index_tar(file, cache_dir), files)
        total = sum(len(index) for index in indices)
        blocks = [
            TarBlock(index, first, num, size)
            for index in indices
            for first, num, size in _runs(index.sizes(), total)
        ]
        stamps = [index.stamp for index in indices]
        return _described(files, stamps, blocks, [len(index) for index in indices])
    odd = next((file.name for file in files if _suffix(file) not in STREAMED), files[0].name)
    raise InputError(
        f"--data.source: {odd} cannot be streamed with the others; it takes Parquet files, tars "
        f"(not compressed) or images, of one kind in a split"
    )


class TarBlock(NamedTuple):
    """Consecutive images of a tar.

    Attributes:
        tar: Where they are.
        first: The number of the block's first image in it.
        num_images: How many there are.
        num_bytes: Of them all.
    """

    tar: TarIndex
    first: int
    num_images: int
    num_bytes: int

    def read(self, start: int, stop: int, delays: Sequence[float]) -> list[Item]:
        """Read images [start, stop), in as few ranges as is sensible."""
        members: list[tuple[int, int]] = self.tar.members(self.first + start, self.first + stop)
        images: list[Item] = []
        while len(images) < len(members):
            first = last = len(images)
            while (
                last + 1 < len(members) and members[last + 1][0] - sum(members[last]) < _GAP_BYTES
            ):
                last += 1
            begin, end = members[first][0], sum(members[last])
            read = partial(self.tar.file.read, begin, end, self.tar.stamp)
            data = patiently(read, delays)
            for offset, size in members[first : last + 1]:
                images.append(data[offset - begin : offset - begin + size])
        return images

    def name(self, index: int) -> str:
        """The tar and the member."""
        return self.tar.name(self.first + index)


class FilesBlock(NamedTuple):
    """Consecutive image files.

    Attributes:
        files: All files of the split.
        stamps: Their sizes and times of change, int64 [n, 2]; None where nobody has looked.
        first: The number of the block's first file.
        num_images: How many there are.
        num_bytes: Of them all.
    """

    files: Sequence[File]
    stamps: Indices | None
    first: int
    num_images: int
    num_bytes: int

    def read(self, start: int, stop: int, delays: Sequence[float]) -> list[Item]:
        """Read images [start, stop)."""
        wanted = range(self.first + start, self.first + stop)
        if self.stamps is None:
            return [patiently(self.files[index].read_all, delays) for index in wanted]
        return [
            patiently(partial(self.files[index].read, 0, size, Stamp(size, str(changed))), delays)
            for index, (size, changed) in zip(wanted, self.stamps[wanted].tolist(), strict=True)
        ]

    def name(self, index: int) -> str:
        """The file's path or URL."""
        return self.files[self.first + index].name


def _image_files(files: Sequence[File]) -> Blocks:
    """Cut a list of image files into blocks; those on a server are not looked at beforehand."""
    stamps = None
    sizes = np.full(len(files), _UNKNOWN_BYTES)
    if isinstance(files[0], LocalFile):
        seen = ((stamp.size, int(stamp.version)) for stamp in (file.stat() for file in files))
        stamps = np.array(list(seen), dtype=np.int64)
        sizes = stamps[:, 0]
    blocks = [
        FilesBlock(files, stamps, first, num, size) for first, num, size in _runs(sizes, len(files))
    ]
    times = sizes if stamps is None else stamps[:, 1]
    return Blocks(
        blocks,
        _digest(files, zip(sizes.tolist(), strict=True), _common_folder(files)),
        _digest(files, zip(sizes.tolist(), times.tolist(), strict=True)),
    )


def _described(
    files: Sequence[File], stamps: Sequence[Stamp], blocks: list[Block], counts: list[int]
) -> Blocks:
    sizes = (stamp.size for stamp in stamps)
    return Blocks(
        blocks,
        _digest(files, zip(sizes, counts, strict=True), _common_folder(files)),
        _digest(files, stamps),
    )


def _digest(files: Sequence[File], facts: Iterable[Sequence[object]], folder: str = "") -> str:
    """Hash the names of the files, from a folder on, and what is known of each."""
    digest = hashlib.sha256()
    for file, known in zip(files, facts, strict=True):
        digest.update(json.dumps([file.name.removeprefix(folder), *known]).encode())
    return digest.hexdigest()


def _common_folder(files: Sequence[File]) -> str:
    """Give what all names begin with, as far as it is folders."""
    folder = files[0].name.rpartition("/")[0] + "/"
    for file in files:
        while not file.name.startswith(folder):
            folder = folder.rstrip("/").rpartition("/")[0] + "/"
            if folder == "/":
                return ""
    return folder


def _runs(sizes: Indices, total: int) -> Iterable[tuple[int, int, int]]:
    """Cut images of so many bytes into runs: (first, number, bytes)."""
    limit = min(_BLOCK_IMAGES, max(1, total // _NUM_BLOCKS))
    first = num_bytes = 0
    for index, size in enumerate(sizes.tolist()):
        if index > first and (index - first == limit or num_bytes + size > _BLOCK_BYTES):
            yield first, index - first, num_bytes
            first, num_bytes = index, 0
        num_bytes += size
    if len(sizes):
        yield first, len(sizes) - first, num_bytes


def _in_parallel(look: Callable[[T], R], files: Sequence[T]) -> list[R]:
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return list(threads.map(look, files))


def _suffix(file: File) -> str:
    name = file.name.lower()
    return next((suffix for suffix in STREAMED if name.endswith(suffix)), name)
