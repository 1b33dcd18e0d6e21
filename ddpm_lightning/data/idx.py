"""IDX files, as MNIST and Fashion-MNIST come (http://yann.lecun.com/exdb/mnist, "FILE FORMATS")."""

import gzip
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ddpm_lightning.data.items import (
    ArraySplit,
    Labels,
    Source,
    SplitName,
    file_stamp,
    fingerprint,
    numbered,
)
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import Pixels

_FILES: Mapping[SplitName, str] = {
    "train": "train-images-idx3-ubyte",
    "test": "t10k-images-idx3-ubyte",
}
_LABEL_FILES: Mapping[SplitName, str] = {
    "train": "train-labels-idx1-ubyte",
    "test": "t10k-labels-idx1-ubyte",
}
_MAGIC = 0x0803  # 0x08: unsigned bytes; 0x03: three dimensions (images, rows, columns)
_HEADER = 16  # bytes: the magic number and three sizes, big-endian int32
_LABEL_MAGIC = 0x0801  # one dimension
_LABEL_HEADER = 8


def is_idx_folder(folder: Path) -> bool:
    """Whether any of the image files is there."""
    return any(_find(folder, name) for name in _FILES.values())


def open_idx(source: str, folder: Path) -> Source:
    """Open a folder with a training file and perhaps a test file, gzipped or not.

    Raises:
        InputError: No training file, or a header that is not one of IDX images. A body that is
            too short or too long is found when the first image is read.
    """
    files = {split: file for split, name in _FILES.items() if (file := _find(folder, name))}
    if "train" not in files:
        raise InputError(f"--data.source {source} has no {_FILES['train']} or {_FILES['train']}.gz")
    splits = {split: _open_file(file) for split, file in files.items()}
    stamps = [file_stamp(file.resolve()) for file in files.values()]
    labels = {
        split: partial(_read_labels, file, len(splits[split]))
        for split, name in _LABEL_FILES.items()
        if split in splits and (file := _find(folder, name))
    }
    return Source(source, fingerprint(["idx", stamps]), splits, labels)


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((file for file in candidates if file.is_file()), None)


def _open_file(file: Path) -> ArraySplit:
    header = _read(file, _HEADER)
    if len(header) < _HEADER or int.from_bytes(header[:4], "big") != _MAGIC:
        raise InputError(
            f"{file} is not an IDX file of images: those begin with the "
            f"bytes 00 00 08 03 and three sizes"
        )
    num_images, height, width = np.frombuffer(header[4:], dtype=">i4").tolist()
    if min(num_images, height, width) < 1:
        raise InputError(f"{file} says it holds {num_images} images of {height} x {width}")

    def load() -> Pixels:
        size = num_images * height * width
        body = _read(file, _HEADER + size + 1)[_HEADER:]
        if len(body) != size:
            kind = "truncated" if len(body) < size else "longer than its header says"
            raise InputError(
                f"{file} is {kind}: {num_images} images of {height} x {width} take {size} bytes; "
                f"copy or download it again"
            )
        return np.frombuffer(body, dtype=np.uint8).reshape(num_images, height, width)

    return ArraySplit(str(file), num_images, load)


def _read_labels(file: Path, num_images: int) -> Labels:
    content = _read(file, _LABEL_HEADER + num_images + 1)
    header = _LABEL_MAGIC.to_bytes(4, "big") + num_images.to_bytes(4, "big")
    if content[:_LABEL_HEADER] != header or len(content) != len(header) + num_images:
        raise InputError(
            f"{file} is not an IDX file of {num_images} labels, as many as there are images: it "
            "begins with the bytes 00 00 08 01 and their number; copy or download it again"
        )
    return numbered(np.frombuffer(content[_LABEL_HEADER:], dtype=np.uint8).astype(np.int64))


def _read(file: Path, num_bytes: int) -> bytes:
    """Read the first `num_bytes` of the content, or all where it is shorter."""
    try:
        with file.open("rb") as stream:
            content = gzip.GzipFile(fileobj=stream) if file.suffix == ".gz" else stream
            return content.read(num_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read ({error}); copy or download it again") from error
