"""Plain PNGs are decoded without Pillow's reading of the file, to the same pixels."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ddpm_lightning.images import convert, decode
from ddpm_lightning.plain_png import open_plain_png

LEVELS = np.random.default_rng(0).integers(0, 256, (9, 13, 4), dtype=np.uint8)


def png(mode: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(LEVELS).convert(mode).save(file, "PNG", **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(name + content).to_bytes(4)
    return len(content).to_bytes(4) + name + content + check


def by_pillow(data: bytes, size: tuple[int, int] | None, channels: int | None) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return convert(image, size, channels)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16"])
@pytest.mark.parametrize(("size", "channels"), [(None, None), ((9, 13), 1), ((5, 5), 3)])
def test_pixels_are_those_that_pillow_gives(
    mode: str, size: tuple[int, int] | None, channels: int | None
) -> None:
    data = png(mode)
    assert (open_plain_png(data) is not None) == (mode in ("L", "RGB"))
    expected = by_pillow(data, size, channels)
    found = decode(data, size, channels)
    assert found.shape == expected.shape
    assert (found == expected).all()


@pytest.mark.parametrize("compress_level", [0, 1, 9])
def test_filters_and_several_chunks_of_pixels(compress_level: int) -> None:
    rows = np.tile(np.arange(200, dtype=np.uint8), (150, 1))
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "PNG", compress_level=compress_level)
    data = file.getvalue()
    start = data.index(b"IDAT") - 4
    length = int.from_bytes(data[start : start + 4])
    content = data[start + 8 : start + 8 + length]
    halves = chunk(b"IDAT", content[:50]) + chunk(b"IDAT", content[50:])
    split = data[:start] + halves + data[start + 12 + length :]
    for each in (data, split):
        image = open_plain_png(each)
        assert image is not None
        assert (np.asarray(image) == rows).all()


def test_what_changes_no_pixel_is_passed_over() -> None:
    data = png("RGB", dpi=(72, 72))
    assert b"pHYs" in data
    image = open_plain_png(data)
    assert image is not None
    assert (np.asarray(image) == LEVELS[..., :3]).all()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return png("RGB", exif=exif)


def described() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b")
    return png("L", pnginfo=text)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(turned(), id="rotated"),
        pytest.param(described(), id="text"),
        pytest.param(png("L", transparency=3), id="transparent level"),
        pytest.param(png("RGB", icc_profile=b"x" * 20), id="colour profile"),
    ],
)
def test_what_pillow_must_read_is_left_to_it(data: bytes) -> None:
    assert open_plain_png(data) is None
    assert (decode(data, None, 3) == by_pillow(data, None, 3)).all()


def test_interlaced_files_are_left_to_pillow() -> None:
    # one pixel is the same with and without interlacing
    header = struct.pack(">2I5B", 1, 1, 8, 0, 0, 0, 1)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\x07")) + chunk(b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + body
    assert open_plain_png(data) is None
    assert decode(data, None, None).tolist() == [[[7]]]


def test_damage_is_left_to_pillow() -> None:
    data = png("RGB")
    for stop in range(len(data)):
        assert open_plain_png(data[:stop]) is None
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        assert open_plain_png(bytes(changed)) is None
