"""Every mode that Pillow opens becomes the pixels that the rule in `images.convert` promises."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ddpm_lightning.images import convert, decode

LEVELS = np.array([[0, 64, 255], [128, 1, 200]], dtype=np.uint8)
COLOURS = np.stack([LEVELS, 255 - LEVELS, LEVELS[::-1]], axis=-1)
RED_GREEN_BLUE = np.eye(3, dtype=np.uint8)[None] * 255  # one row of three pixels


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    if transparent:
        image.info["transparency"] = 1
    return image


def sixteen_bit(levels: NDArray[Any], byte_order: str) -> Image.Image:
    mode = {"<": "I;16", ">": "I;16B"}[byte_order]
    data = levels.astype(f"{byte_order}u2").tobytes()
    return Image.frombytes(mode, (levels.shape[1], levels.shape[0]), data)


def test_grey() -> None:
    np.testing.assert_array_equal(decode(encode(Image.fromarray(LEVELS)), None, None), LEVELS[None])


def test_one_bit_is_black_and_white() -> None:
    image = Image.fromarray(LEVELS).convert("1", dither=Image.Dither.NONE)
    assert image.mode == "1"
    assert decode(encode(image), None, None).tolist() == [[[0, 0, 255], [255, 0, 255]]]


def test_rgb() -> None:
    pixels = decode(encode(Image.fromarray(COLOURS)), None, None)
    np.testing.assert_array_equal(pixels, COLOURS.transpose(2, 0, 1))


def test_grey_with_alpha_is_laid_on_white() -> None:
    image = Image.new("LA", (3, 1))
    image.putdata([(100, 255), (100, 0), (0, 51)])
    assert decode(encode(image), None, None).tolist() == [[[100, 255, 204]]]


def test_rgb_with_alpha_is_laid_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(1, 2, 3, 255), (1, 2, 3, 0), (255, 0, 0, 51)])
    expected = [[[1, 255, 255]], [[2, 255, 204]], [[3, 255, 204]]]
    assert decode(encode(image), None, None).tolist() == expected


def test_palette() -> None:
    assert decode(encode(palette(False)), None, None).tolist() == [
        [[10, 200]],
        [[20, 100]],
        [[30, 50]],
    ]


def test_transparent_colour_of_a_palette_is_laid_on_white() -> None:
    pixels = decode(encode(palette(True), transparency=1), None, None)
    assert pixels.tolist() == [[[10, 255]], [[20, 255]], [[30, 255]]]


def test_transparent_grey_level_stays_grey() -> None:
    pixels = decode(encode(Image.fromarray(LEVELS), transparency=128), None, None)
    assert pixels.tolist() == [[[0, 64, 255], [255, 1, 200]]]


def test_cmyk_without_ink_is_white_and_full_black_is_black() -> None:
    image = Image.new("CMYK", (3, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (0, 255, 255, 0)])
    expected = [[[255, 0, 255]], [[255, 0, 0]], [[255, 0, 0]]]
    assert decode(encode(image, "TIFF"), None, None).tolist() == expected


@pytest.mark.parametrize("file_format", ["TIFF", "PNG"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_sixteen_bits_are_rounded_to_eight(byte_order: str, file_format: str) -> None:
    levels = np.array([[0, 128, 129, 65535], [257, 385, 386, 32768]])
    data = encode(sixteen_bit(levels, byte_order), file_format)
    assert decode(data, None, None).tolist() == [[[0, 0, 1, 255], [1, 1, 2, 128]]]


def test_integer_pixels_within_sixteen_bits() -> None:
    image = Image.fromarray(np.array([[0, 65535, 257]], dtype=np.int32))
    assert image.mode == "I"
    assert convert(image, None, None).tolist() == [[[0, 255, 1]]]


@pytest.mark.parametrize("level", [-1, 65536])
def test_integer_pixels_beyond_sixteen_bits_are_refused(level: int) -> None:
    with pytest.raises(ValueError, match="outside 0..65535"):
        convert(Image.fromarray(np.array([[level]], dtype=np.int32)), None, None)


def test_float_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="32-bit float"):
        decode(encode(Image.new("F", (2, 2)), "TIFF"), None, None)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    pixels = decode(encode(Image.fromarray(LEVELS), exif=exif), None, None)
    np.testing.assert_array_equal(pixels[0], np.rot90(LEVELS, k=-1))


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "HSV"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    white = {"YCbCr": (255, 128, 128), "LAB": (255, 128, 128), "HSV": (0, 0, 255)}[mode]
    pixels = convert(Image.new(mode, (2, 1), white), None, None)
    assert pixels.shape == (3, 1, 2)
    assert pixels.min() >= 254


def test_ycbcr_jpeg() -> None:
    grey = Image.new("RGB", (8, 8), (90, 90, 90))
    data = encode(grey.convert("YCbCr"), "JPEG", quality=95)
    np.testing.assert_array_equal(decode(data, None, None), np.full((3, 8, 8), 90))


def test_first_frame_of_an_animation() -> None:
    first, second = Image.new("L", (2, 2), 40), Image.new("L", (2, 2), 90)
    data = encode(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode(data, None, 1), np.full((1, 2, 2), 40))


def test_one_channel_is_luma() -> None:
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B
    assert convert(Image.fromarray(RED_GREEN_BLUE), None, 1).tolist() == [[[76, 150, 29]]]


def test_three_channels_repeat_grey() -> None:
    pixels = convert(Image.fromarray(LEVELS), None, 3)
    np.testing.assert_array_equal(pixels, np.stack([LEVELS] * 3))


@pytest.mark.parametrize("make", [np.zeros, np.ones])
def test_scaling_keeps_the_aspect_and_cuts_the_centre(
    make: Callable[[tuple[int, int]], NDArray[np.float64]],
) -> None:
    wide = (make((4, 12)) * 255).astype(np.uint8)
    wide[:, 4:8] = 100  # the middle third of a 1 x 3 picture
    pixels = convert(Image.fromarray(wide), (4, 4), None)
    np.testing.assert_array_equal(pixels, np.full((1, 4, 4), 100))


def test_size_is_height_and_width() -> None:
    assert convert(Image.fromarray(COLOURS), (5, 7), None).shape == (3, 5, 7)


@pytest.mark.parametrize("data", [b"", b"plain text", encode(Image.fromarray(COLOURS))[:60]])
def test_what_is_no_whole_image_is_refused(data: bytes) -> None:
    with pytest.raises((OSError, ValueError)):
        decode(data, None, None)
