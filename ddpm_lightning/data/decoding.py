"""Decode a split on all cores, in order, with a bounded number of images in memory."""

import os
import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from PIL import Image, UnidentifiedImageError

from ddpm_lightning import images
from ddpm_lightning.data.items import Item, Split
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import Pixels

_NUM_THREADS = min(16, os.cpu_count() or 1)
THREADS = "decoding"
"""What the names of the threads begin with."""
_BLOCK_SIZE = 8  # images a thread takes at once, so that small ones are worth the handing over


class BrokenImage(ValueError):
    """An image that cannot be decoded; its message is the reason."""


def decode_split(
    split: Split, size: tuple[int, int] | None, channels: int | None
) -> Generator[Pixels | BrokenImage, None, None]:
    """Decode every image by the rule of `images.convert`.

    Args:
        split: Where they are.
        size: (height, width), or None to keep each image's own.
        channels: 1, 3, or None to keep each image's own.

    Yields:
        For each image of the split, in order, uint8 [C, H, W], or why there is none. Who may leave
        before the end has to close this (`contextlib.closing`): a garbage collector would do so in
        any thread, where waiting for the decoding ones may never end.

    Raises:
        InputError: The whole source is unusable.
    """

    def decode_block(start: int) -> list[Pixels | BrokenImage]:
        stop = min(start + _BLOCK_SIZE, len(split))
        return [
            decode_item(partial(split.__getitem__, index), size, channels)
            for index in range(start, stop)
        ]

    pending: deque[Future[list[Pixels | BrokenImage]]] = deque()
    with warnings.catch_warnings(), ThreadPoolExecutor(_NUM_THREADS, THREADS) as threads:
        # An odd file that decodes all the same is used; thousands of warnings would help nobody.
        warnings.filterwarnings("ignore", module="PIL")
        for start in range(0, len(split), _BLOCK_SIZE):
            pending.append(threads.submit(decode_block, start))
            if len(pending) > 2 * _NUM_THREADS:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def decode_item(
    read: Callable[[], Item], size: tuple[int, int] | None, channels: int | None
) -> Pixels | BrokenImage:
    """Decode one image by the rule of `images.convert`; see `decode_split`."""
    try:
        item = read()
        if isinstance(item, bytes):
            return images.decode(item, size, channels)
        return images.convert(Image.fromarray(item), size, channels)
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:
        return BrokenImage("not an image in any format that Pillow reads")
    except Exception as error:  # Pillow's decoders raise whatever a malformed file leads to
        return BrokenImage(" ".join(str(error).split()) or type(error).__name__)
