"""Tars of images: where each member lies, found once and kept, so that any may be read alone.

Members are never unpacked: their names are names and no paths.
"""

import io
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddpm_lightning.bars import bar_options
from ddpm_lightning.data.cache import locked
from ddpm_lightning.data.image_folder import SUFFIXES
from ddpm_lightning.data.items import fingerprint
from ddpm_lightning.data.order import Indices
from ddpm_lightning.data.stream_files import START_DELAYS, File, RangeFile, Stamp, patiently
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import write_atomically

INDEX_VERSION = 1
"""Count up when other members count, or the files of the index change."""

_BUFFER_BYTES = 2**22  # one request reads the headers of many small members


@dataclass(frozen=True)
class TarIndex:
    """The images in a tar. Kept on disk and mapped: memory does not grow with their number.

    Attributes:
        file: The tar.
        stamp: The version that was looked at.
        path: Holds offset and size of each image, int64 [n, 2]; the names lie beside it.
    """

    file: File
    stamp: Stamp
    path: Path

    def __len__(self) -> int:
        return len(self._table)

    def sizes(self) -> Indices:
        """Bytes of each image, int64 [n]."""
        sizes: Indices = self._table[:, 1]
        return sizes

    def members(self, first: int, last: int) -> list[tuple[int, int]]:
        """(offset, size) of images [first, last)."""
        return [(offset, size) for offset, size in self._table[first:last].tolist()]

    def name(self, number: int) -> str:
        """What an image is called, for messages."""
        names = self.path.with_suffix(".names").read_text().split("\0")
        return f"{names[number]!r} in {self.file.name}"

    @cached_property
    def _table(self) -> Indices:
        table: Indices = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if table.ndim != 2 or table.shape[1] != 2 or table.dtype != np.int64:
            raise ValueError(f"{self.path} is no index")
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "stamp": self.stamp, "path": self.path}


def index_tar(file: File, cache_dir: Path) -> TarIndex:
    """Find the images in a tar, from the cache where it was looked at before.

    Args:
        file: The tar.
        cache_dir: Where indices are kept.

    Raises:
        InputError: It is no whole tar, or a sample has several images in it.
    """
    stamp = patiently(file.stat, START_DELAYS)
    path = cache_dir / f"tar-{fingerprint([INDEX_VERSION, file.name, *stamp])[:32]}.npy"
    index = TarIndex(file, stamp, path)
    with locked(path, f"the index of {file.name}"):
        try:
            len(index)
        except (OSError, ValueError, EOFError):  # not there, or damaged
            names, table = _scan(file, stamp)
            text = "\0".join(names).encode(errors="backslashreplace")
            write_atomically(path.with_suffix(".names"), lambda out: out.write(text))
            write_atomically(path, lambda out: np.save(out, table))
    return index


def _scan(file: File, stamp: Stamp) -> tuple[list[str], Indices]:
    """List the names of the images, and their offsets and sizes."""
    names: list[str] = []
    table: list[tuple[int, int]] = []
    raw = io.BufferedReader(RangeFile(file, stamp, START_DELAYS), _BUFFER_BYTES)
    try:
        with (
            tarfile.open(fileobj=raw, mode="r:") as tar,
            tqdm(desc=f"Indexing {file.name}", unit=" members", delay=2, **bar_options()) as bar,
        ):
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                bar.update()
                if member.isreg() and not member.issparse() and _is_image(member.name):
                    names.append(member.name)
                    table.append((member.offset_data, member.size))
            end = tar.offset
    except tarfile.TarError as error:
        raise InputError(f"{file.name}: not a whole tar ({error}); make or copy it anew") from error
    # tarfile takes whatever is no header for the end
    raw.seek(end)
    if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise InputError(
            f"{file.name}: not a whole tar (no end mark after {len(names):,} images); make or copy "
            "it anew"
        )
    _refuse_pairs(file.name, names)
    return names, np.array(table, dtype=np.int64).reshape(-1, 2)


def _is_image(name: str) -> bool:
    hidden = name.rpartition("/")[2].startswith(".")
    return name.lower().endswith(SUFFIXES) and not hidden


def _refuse_pairs(tar: str, names: list[str]) -> None:
    """Refuse a picture and its mask, 1.jpg and 1.seg.png: nobody wants to train on masks, too.

    Raises:
        InputError: There is such a pair.
    """
    whole = {name.rpartition(".")[0]: name for name in names}
    for name in names:
        folder, slash, base = name.rpartition("/")
        key = folder + slash + base.partition(".")[0]
        if whole.get(key, name) != name:
            raise InputError(
                f"{tar}: {whole[key]!r} and {name!r} are two images of one sample; make a tar with "
                "one image per sample"
            )
