"""Decode a split once into one file of pixels; every later run, rank and worker maps that file."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from ddpm_lightning.bars import bar_options
from ddpm_lightning.data.decoding import BrokenImage, decode_split
from ddpm_lightning.data.items import Source, Split, SplitName, fingerprint
from ddpm_lightning.errors import CacheError, InputError
from ddpm_lightning.images import Pixels
from ddpm_lightning.runs import is_rank_zero

Channels = Literal[1, 3]
OnError = Literal["stop", "skip"]

CONVERSION_VERSION = 1
"""Count up when `images.decode` gives other pixels than before: it makes old caches void."""

_NUM_SKIPPED_NAMES = 5
_QUIET_SECONDS = 3.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedImages:
    """The pixels of a split, on disk. Pickled as a path, so that each process maps the file itself.

    Attributes:
        folder: Where they are.
        shape: (N, C, H, W).
        sha256: Of the pixels, as hex digits.
        num_skipped: How many broken images were left out.
        skipped_names: What the first of those are called.
        skipped: Which those are of the source's images; None in caches that did not note it.
    """

    folder: Path
    shape: tuple[int, int, int, int]
    sha256: str
    num_skipped: int
    skipped_names: tuple[str, ...]
    skipped: tuple[int, ...] | None = ()

    @cached_property
    def images(self) -> Pixels:
        """uint8 [N, C, H, W], mapped and read-only."""
        return np.memmap(self.folder / "images.bin", dtype=np.uint8, mode="r", shape=self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "images"}


def default_cache_dir() -> Path:
    """$DDPM_LIGHTNING_CACHE, or ~/.cache/ddpm_lightning."""
    folder = os.environ.get("DDPM_LIGHTNING_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "ddpm_lightning"


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Keep out the other processes that would build this file or folder of the cache.

    Where another one is at it, it is waited for; a wait that is long is told.

    Args:
        path: What is to be built; the folder that it lies in is made if need be.
        what: What it holds, as users know it.

    Raises:
        CacheError: The cache's folder cannot be written.
    """
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=_QUIET_SECONDS)
        except Timeout:
            if is_rank_zero():  # once for all of a job
                _log.info("waiting for another process that makes %s, in %s", what, path.parent)
            lock.acquire()
    except OSError as error:
        raise CacheError(
            f"{path.parent} cannot hold {what} ({error}); name another folder by "
            "--data.cache_dir or $DDPM_LIGHTNING_CACHE"
        ) from error
    try:
        yield
    finally:
        lock.release()


def open_images(
    source: Source,
    split_name: SplitName,
    size: tuple[int, int] | None,
    channels: Channels | None,
    on_error: OnError,
    cache_dir: Path,
) -> CachedImages:
    """Map the pixels of a split; decode them first if no earlier run has.

    Several processes may ask at once: one builds, the others wait. A build that is killed leaves
    nothing that would be taken for a whole one.

    Args:
        source: Where the images are.
        split_name: Which of its splits.
        size: (height, width), or None for the size that they all have.
        channels: 1, 3, or None for what the first image has.
        on_error: Whether a broken image stops the build or is left out.
        cache_dir: Where the files go; made if need be.

    Raises:
        InputError: An image is broken, all are, or one differs from the first in size or channels.
        OSError: The disk is full, or the like.
    """
    recipe = [source.fingerprint, split_name, size, channels, on_error, CONVERSION_VERSION]
    folder = cache_dir / fingerprint(recipe)[:32]
    cached = _read(folder)
    if cached is not None:
        return cached
    with locked(folder, "the decoded images"):
        cached = _read(folder)
        if cached is None:  # else another process has built it while this one waited
            cached = _build(folder, source, split_name, size, channels, on_error)
    return cached


def _read(folder: Path) -> CachedImages | None:
    """Open a finished build; None where there is none or its files are not as they were written."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        num_images, num_channels, height, width = meta["shape"]
        cached = CachedImages(
            folder,
            (num_images, num_channels, height, width),
            meta["sha256"],
            meta["num_skipped"],
            tuple(meta["skipped_names"]),
            tuple(meta["skipped"]) if "skipped" in meta else None if meta["num_skipped"] else (),
        )
        whole = (folder / "images.bin").stat().st_size == math.prod(cached.shape)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return cached if whole else None


def _build(
    folder: Path,
    source: Source,
    split_name: SplitName,
    size: tuple[int, int] | None,
    channels: Channels | None,
    on_error: OnError,
) -> CachedImages:
    """Build beside `folder`, then rename; the caller holds the lock."""
    partial = folder.with_suffix(".partial")
    for stale in (folder, partial):  # files that were changed; a build that was killed
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir()
    try:
        label = f"{source.name} ({split_name})"
        meta = _write_images(
            partial / "images.bin", source.splits[split_name], label, size, channels, on_error
        )
        (partial / "meta.json").write_text(json.dumps({"images": label, **meta}, indent=2) + "\n")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    cached = _read(folder)
    assert cached is not None
    return cached


def _write_images(
    path: Path,
    split: Split,
    label: str,
    size: tuple[int, int] | None,
    channels: Channels | None,
    on_error: OnError,
) -> dict[str, Any]:
    """Write the pixels of a split one after another; return what meta.json says about them."""
    digest = hashlib.sha256()
    first: tuple[str, Pixels] | None = None
    skipped: dict[int, str] = {}
    with closing(decode_split(split, size, channels)) as decoded, path.open("wb") as file:
        shown = tqdm(
            decoded,
            desc=f"Decoding {label}",
            total=len(split),
            unit=" images",
            delay=2,  # seconds: what is done at once needs no bar
            **bar_options(),
        )
        for index, pixels in enumerate(shown):
            name = split.name(index)
            if isinstance(pixels, BrokenImage):
                if on_error == "stop":
                    raise InputError(
                        f"{name} cannot be decoded: {pixels}; mend or remove it, or leave such "
                        f"images out by --data.on_error skip"
                    )
                skipped[index] = name
                continue
            if first is None:
                first = (name, pixels)
                _check_space(path, len(split) * pixels.nbytes)
            data = like_first(name, pixels, *first).tobytes()
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if first is None:
        raise InputError(
            f"--data.source {label}: none of its {len(skipped)} images can be decoded; look at "
            f"the first, {next(iter(skipped.values()))}"
        )
    first_skipped = list(skipped.values())[:_NUM_SKIPPED_NAMES]
    if skipped:
        more = ", …" if len(skipped) > _NUM_SKIPPED_NAMES else ""
        names = ", ".join(first_skipped) + more
        _log.warning("%s: left out %d broken images: %s", label, len(skipped), names)
    return {
        "shape": [len(split) - len(skipped), *first[1].shape],
        "sha256": digest.hexdigest(),
        "num_skipped": len(skipped),
        "skipped_names": first_skipped,
        "skipped": list(skipped),
    }


def _check_space(path: Path, num_bytes: int) -> None:
    """Refuse before hours of decoding what will not fit.

    Raises:
        InputError: The disk has less space than that.
    """
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise InputError(
            f"{path.parent.parent}: the decoded images take {num_bytes / 1e9:,.1f} GB and "
            f"{free / 1e9:,.1f} GB are free; name another folder by --data.cache_dir or "
            "$DDPM_LIGHTNING_CACHE"
        )


def like_first(name: str, pixels: Pixels, first_name: str, first: Pixels) -> Pixels:
    """Give an image the first one's channels where nothing is lost by it.

    Raises:
        InputError: It has another size, or colours where the first is grey.
    """
    if pixels.shape[1:] != first.shape[1:]:
        raise InputError(
            f"{name} is {pixels.shape[1]} x {pixels.shape[2]} (height x width) but {first_name} is "
            f"{first.shape[1]} x {first.shape[2]}; scale all to one size by --data.image_size N"
        )
    if len(pixels) > len(first):
        raise InputError(
            f"{name} has colours but {first_name} is grey; say which all should have by "
            f"--data.channels 3 or --data.channels 1"
        )
    return np.broadcast_to(pixels, first.shape)
