"""Pictures as numbers: the only place with range arithmetic.

`images` are uint8 [N, C, H, W]; `x` are float in [-1, 1] of the same shape. Files become images in
`decode`, images become files in `write_png` and `write_gif`.
"""

import io
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ddpm_lightning.plain_png import open_plain_png

Pixels = NDArray[np.uint8]

HALF_LEVEL = 1 / 255
"""Half the distance between two grey levels in x."""


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map uint8 images to x in [-1, 1]: x = images / 127.5 - 1 (Ho et al. 2020, section 3.3)."""
    return images.to(dtype) / 127.5 - 1


def rms_levels(mse: Tensor) -> Tensor:
    """Give the root of a mean squared error of x in grey levels, of which x in [-1, 1] has 255."""
    return 127.5 * mse.sqrt()


def to_uint8(x: Tensor) -> Tensor:
    """Map x in [-1, 1] to uint8 images: clamp, then round to the nearest level.

    Truncating instead would darken every image by half a level.
    """
    return ((x.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def levels_to_uint8(levels: NDArray[Any], highest: int) -> Pixels:
    """Map levels in [0, highest] to [0, 255], rounded to the nearest."""
    return np.rint(np.asarray(levels, dtype=np.float64) * (255 / highest)).astype(np.uint8)


def to_rgb(images: Tensor) -> Tensor:
    """Repeat grey to three channels: uint8 [N, 1 or 3, H, W] to [N, 3, H, W]."""
    return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)


def standardise(levels: Tensor, mean: float, std: float) -> Tensor:
    """Map grey levels to what a classifier was trained on: (levels - mean) / std."""
    return (levels - mean) / std


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over uint8 [N, C, H, W].

    Returns:
        Two float32 [C], in grey levels from 0 to 255.
    """
    values = images.transpose(0, 1).flatten(1).float()
    return values.mean(dim=1), values.std(dim=1, correction=0)


def make_grid(images: Tensor, num_columns: int | None = None, min_width: int = 512) -> Tensor:
    """Lay images out in rows on white, small ones enlarged by a whole factor so that one sees them.

    Args:
        images: uint8 [N, C, H, W], N >= 1.
        num_columns: Images in a row; the smallest square that holds N when None.
        min_width: Enlarge (each pixel to k x k) until the grid is about this wide, at most 8-fold.

    Returns:
        uint8 [C, height, width].
    """
    num_images, num_channels, height, width = images.shape
    columns = min(num_columns or math.ceil(math.sqrt(num_images)), num_images)
    rows = math.ceil(num_images / columns)
    scale = min(8, max(1, round(min_width / (columns * width))))
    images = enlarge(images, scale)
    height, width = height * scale, width * scale
    gap = max(2, scale // 2)
    grid = images.new_full(
        (num_channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255
    )
    for index, image in enumerate(images):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid


def make_class_grid(images: Tensor, labels: Sequence[int] | None) -> Tensor:
    """Lay images out with a row for each class, or as `make_grid` does where that is no rectangle.

    Args:
        images: uint8 [N, C, H, W], N >= 1.
        labels: The images' classes, N of them; None for images without.

    Returns:
        uint8 [C, height, width].
    """
    rows = [
        [image for image, label in zip(images, labels or (), strict=False) if label == number]
        for number in sorted(set(labels or ()))
    ]
    num_columns = max(map(len, rows), default=0)
    # a single class has no rows; many classes with few images would be a tower
    if not 1 < len(rows) <= 4 * num_columns:
        return make_grid(images)
    blank = torch.full_like(images[0], 255)
    cells = [image for row in rows for image in row + [blank] * (num_columns - len(row))]
    return make_grid(torch.stack(cells), num_columns)


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Make each pixel a square of scale x scale: [..., H, W] to [..., H * scale, W * scale]."""
    return images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def centre_crop(images: Tensor, size: int) -> Tensor:
    """Cut the square of size x size at the centre out of [..., H, W]; neither is smaller."""
    top, left = ((length - size) // 2 for length in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def to_pil(image: Tensor) -> Image.Image:
    """Turn a uint8 [C, H, W] with one or three channels into a Pillow image."""
    array = image.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that `path` holds either the old content or the whole new one, never a part.

    Args:
        path: Where to; its folder exists.
        write: Called with a binary file, open for writing beside `path`.

    Raises:
        OSError: The disk is full, gone or not to be written to; it names `path`.
    """
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save hides the disk's error behind one of its own
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError) and reason.errno is not None:
            raise OSError(reason.errno, reason.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):  # a read-only disk refuses this too, and there is nothing on it
            part.unlink(missing_ok=True)


def write_png(path: Path, image: Tensor) -> None:
    """Write a uint8 [C, H, W] as a PNG, atomically."""
    write_atomically(path, lambda file: to_pil(image).save(file, format="PNG"))


def write_gif(path: Path, frames: list[Tensor], comment: str, milliseconds: int = 60) -> None:
    """Write uint8 [C, H, W] frames as an endless GIF that rests two seconds on the last one."""
    first, *others = [to_pil(frame) for frame in frames]
    durations = [milliseconds] * len(others) + [2000]
    write_atomically(
        path,
        lambda file: first.save(
            file,
            "GIF",
            save_all=True,
            append_images=others,
            duration=durations,
            loop=0,
            comment=comment.encode(),
        ),
    )


def comment_of(path: Path) -> str | None:
    """Give a GIF's comment; None where there is no such file, or it has none."""
    try:
        with Image.open(path) as image:
            comment = image.info.get("comment")
    except OSError:
        return None
    return comment.decode() if isinstance(comment, bytes) else None


def decode(data: bytes, size: tuple[int, int] | None, channels: int | None) -> Pixels:
    """Turn the bytes of an image file into uint8 pixels by one documented rule.

    See `convert` for the rule.

    Raises:
        OSError, ValueError: Not an image, truncated, or in a mode with no sensible 8-bit form.
    """
    plain = open_plain_png(data)
    if plain is not None:
        return _convert_upright(plain, size, channels)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return convert(image, size, channels)


def convert(image: Image.Image, size: tuple[int, int] | None, channels: int | None) -> Pixels:
    """Turn a Pillow image into uint8 pixels.

    The rule, in this order: the first frame counts; EXIF rotation is applied; 16-bit grey is
    rounded to 8 bits; transparency is laid on white; palette, CMYK, YCbCr, LAB and HSV become RGB;
    then the channels are made one (ITU-R 601 luma) or three (grey repeated) as asked; then the
    image is scaled, keeping its aspect, to the smallest that covers `size` (antialiased bicubic),
    and cut at the centre.

    Args:
        image: Any mode that Pillow opens but 32-bit float.
        size: (height, width), or None to keep the image's own.
        channels: 1, 3, or None for 1 where the image is grey and 3 where it is not.

    Returns:
        uint8 [C, H, W].

    Raises:
        ValueError: The mode has no sensible 8-bit form.
    """
    ImageOps.exif_transpose(image, in_place=True)
    return _convert_upright(image, size, channels)


def _convert_upright(
    image: Image.Image, size: tuple[int, int] | None, channels: int | None
) -> Pixels:
    """Do what `convert` does after the rotation."""
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no fixed range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image, dtype=np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("integer pixels outside 0..65535; save it with 8 or 16 bits")
        image = Image.fromarray(levels_to_uint8(levels, 65535))
    if image.mode == "La":  # levels times alpha, of which Pillow makes nothing but LA
        image = image.convert("LA")
    if image.has_transparency_data:
        mode = "L" if image.mode in ("LA", "L", "1") else "RGB"
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA")).convert(mode)
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if channels is not None and image.mode != (mode := "L" if channels == 1 else "RGB"):
        image = image.convert(mode)  # which would copy one that has that mode
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BICUBIC)
    # what np.asarray(image) gives, in less time
    flat: Pixels = np.frombuffer(image.tobytes(), np.uint8)
    return flat.reshape(image.height, image.width, -1).transpose(2, 0, 1)
