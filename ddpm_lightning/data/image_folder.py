"""A folder of image files, with or without train/, val/ and test/ in it."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_lightning.data.items import Labels, Source, SplitName, find_splits, fingerprint
from ddpm_lightning.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""What image files end in, in lower or upper case."""


class File(NamedTuple):
    """A file below a folder.

    Attributes:
        path: From the folder on.
        size: Bytes.
        changed: Nanoseconds since 1970.
    """

    path: str
    size: int
    changed: int


class ImageFiles:
    """A split made of one file per image.

    Args:
        folder: Where they are.
        paths: From there on, in the split's order.
    """

    def __init__(self, folder: Path, paths: list[str]) -> None:
        self._folder = folder
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> bytes:
        path = self._folder / self._paths[index]
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device would be read for ever
            raise OSError("not a file")
        return path.read_bytes()

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self._folder / self._paths[index])


def list_files(folder: Path) -> list[File]:
    """List the files at any depth, sorted by path; hidden ones and hidden folders are left out."""
    return sorted(_walk(folder, "", ()))


def open_image_folder(source: str, folder: Path, files: list[File]) -> Source:
    """Sort the image files of a folder into splits.

    Args:
        source: What the user wrote.
        folder: Where the files are.
        files: What `list_files(folder)` gave.

    Raises:
        InputError: See `sort_into_splits`.
    """
    splits = sort_into_splits(source, folder, files)
    paths = {split: [file.path for file in part] for split, part in splits.items()}
    names = _split_folders(source, folder)
    return Source(
        source,
        # Sizes and times stand for the content: reading it all would take as long as decoding it.
        fingerprint(["image folder", str(folder.resolve()), sorted(splits.items())]),
        {split: ImageFiles(folder, part) for split, part in paths.items()},
        folder_labels(source, {split: (names[split], part) for split, part in paths.items()}),
    )


def sort_into_splits(source: str, folder: Path, files: list[File]) -> dict[SplitName, list[File]]:
    """Tell the images of each split.

    Args:
        source: What the user wrote.
        folder: Where the files are. With a subfolder train, that is the training split, and val
            (or valid, or validation) and test are the others; without one, all images are training
            images.
        files: What `list_files(folder)` gave.

    Raises:
        InputError: train has no images, or two subfolders stand for one split.
    """
    names = _split_folders(source, folder)
    images = [file for file in files if file.path.lower().endswith(SUFFIXES)]
    splits = {
        split: [file for file in images if not name or file.path.startswith(name + os.sep)]
        for split, name in names.items()
    }
    if not splits["train"]:
        raise InputError(f"--data.source {source} has no images in its subfolder train")
    return {split: part for split, part in splits.items() if part}


def _split_folders(source: str, folder: Path) -> dict[SplitName, str]:
    """Name the subfolder of each split; "" stands for the folder itself."""
    if (folder / "train").is_dir():
        return find_splits(source, [item.name for item in folder.iterdir() if item.is_dir()])
    return {"train": ""}


def folder_labels(
    source: str, splits: Mapping[SplitName, tuple[str, Sequence[str]]]
) -> dict[SplitName, Callable[[], Labels]]:
    """Take the subfolders of each split's folder for classes, in the order of their names.

    Args:
        source: What the user wrote.
        splits: The folder's name ("" for the whole source) and the images' paths, which begin with
            it.

    Returns:
        What reads the labels of each split whose images all lie in subfolders.
    """
    classes = {
        split: [Path(path).relative_to(name).parts[0] for path in paths]
        for split, (name, paths) in splits.items()
        if all(len(Path(path).relative_to(name).parts) > 1 for path in paths)
    }
    names = tuple(sorted(set(classes.get("train", ()))))
    numbers = {name: number for number, name in enumerate(names)}

    def read(split: SplitName) -> Labels:
        for name in classes[split]:
            if name not in numbers:
                raise InputError(
                    f"--data.source {source}: {splits[split][0]}/{name} is no class, for the "
                    "training images have no subfolder of that name; rename or remove it"
                )
        values = np.array([numbers[name] for name in classes[split]], dtype=np.int64)
        return Labels(values, len(names), names)

    return {split: partial(read, split) for split in classes}


def _walk(folder: Path, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[File]:
    status = (folder / prefix).stat()
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to a folder that it lies in
        return
    with os.scandir(folder / prefix) as entries:
        for entry in entries:
            path = prefix + entry.name
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except OSError:
                # A link to nowhere or to itself is listed, so that reading it fails and is told.
                status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield from _walk(folder, path + os.sep, (*ancestors, identity))
            else:
                yield File(path, status.st_size, status.st_mtime_ns)
