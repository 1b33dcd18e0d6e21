"""Image files of every kind, whole and damaged, become the pixels they hold or one line."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import convert
from tests.command_line import tree
from tests.properties.cases import Cases, bounds

Array = NDArray[Any]

# What Pillow writes, and the modes that it takes for it.
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "WEBP": ("L", "LA", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "TIFF": (
        *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"),
        *("I", "I;16", "I;16B", "F"),
    ),
    "PPM": ("1", "L", "RGB", "I", "I;16"),
}
WITH_EXIF = ("PNG", "JPEG", "WEBP", "TIFF")
ALL_MODES = sorted({mode for modes in MODES.values() for mode in modes} | {"HSV", "La", "RGBa"})
SUFFIXES = ("png", "jpg", "webp", "bmp", "gif", "tiff", "ppm", "PNG", "jpeg", "pgm")
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B")

# How the rows and columns of a file become those that are seen (EXIF 2.3, tag 0x0112).
TURN: dict[int, Callable[[Array], Array]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, k=-1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, k=1),
}


@dataclass
class Picture:
    """A file of a folder of images.

    Attributes:
        told: What it is.
        suffix: Of its name.
        data: Its content.
        upright: The content of the same file without EXIF; None where it was damaged.
        orientation: EXIF's.
    """

    told: str
    suffix: str
    data: bytes = field(repr=False)
    upright: bytes | None = field(default=None, repr=False)
    orientation: int = 1


sizes = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from([(1, 1), (1, 7), (10_000, 1), (1, 10_000), (300, 200)]),
)


@st.composite
def image_objects(draw: st.DrawFn, modes: tuple[str, ...]) -> Image.Image:
    """An image of random pixels, palettes and transparency."""
    mode, (width, height) = draw(st.sampled_from(modes)), draw(sizes)
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    depth = len(Image.new(mode, (1, 1)).getbands())
    if mode in ("I", "I;16", "I;16B", "F"):
        highest = draw(st.sampled_from([1, 255, 65535]))
        levels = random.integers(0, highest, (height, width), endpoint=True)
        kinds = {"I": "<i4", "I;16": "<u2", "I;16B": ">u2", "F": "<f4"}
        return Image.frombytes(mode, (width, height), levels.astype(kinds[mode]).tobytes())
    pixels = random.integers(0, 256, height * (width + 7) * depth, dtype=np.uint8).tobytes()
    num_bytes = (width + 7) // 8 * height if mode == "1" else width * height * depth
    image = Image.frombytes(mode, (width, height), pixels[:num_bytes])
    if mode in ("P", "PA"):
        image.putpalette(random.integers(0, 256, 768, dtype=np.uint8).tobytes())
    if mode in ("P", "L", "RGB") and draw(st.booleans()):
        transparent = draw(st.integers(0, 255))
        image.info["transparency"] = (transparent, 0, 9) if mode == "RGB" else transparent
    return image


@st.composite
def whole_pictures(draw: st.DrawFn) -> Picture:
    """A file as Pillow writes it, under any image's suffix."""
    kind = draw(st.sampled_from(sorted(MODES)))
    image = draw(image_objects(MODES[kind]))
    options: dict[str, Any] = {}
    transparent = image.info.pop("transparency", None)
    if transparent is not None and (kind == "PNG" or (kind, image.mode) == ("GIF", "P")):
        options["transparency"] = transparent
    if kind == "WEBP":
        options["lossless"] = True
    if kind == "TIFF":
        options["compression"] = draw(st.sampled_from([None, "tiff_lzw", "tiff_adobe_deflate"]))
    if kind in ("GIF", "WEBP", "PNG", "TIFF") and draw(st.integers(0, 4)) == 0:
        options |= {"save_all": True, "append_images": [image.copy(), image.copy()]}
    orientation = draw(st.integers(1, 8)) if kind in WITH_EXIF else 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    try:
        upright = write(image, kind, **options)
        data = write(image, kind, **options, exif=exif) if orientation > 1 else upright
    except OSError:  # a combination that Pillow does not write
        image, kind, orientation = image.convert("RGB"), "PNG", 1
        data = upright = write(image, kind)
    told = f"{kind} of {image.mode} {image.size}, orientation {orientation}, {[*options]}"
    return Picture(told, draw(st.sampled_from(SUFFIXES)), data, upright, orientation)


def write(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises far more than is there."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + bytes(4)


def huge_headers(width: int, height: int) -> list[Picture]:
    """Files of a few bytes that say they are huge."""
    size = f"{width} x {height}"
    bmp = struct.pack("<2sI4xI", b"BM", 1000, 54)
    bmp += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 1, 1, 0, 0)
    gif = b"GIF89a" + struct.pack("<2H", width % 65536, height % 65536) + b"\x00\x00\x00,"
    gif += struct.pack("<4xHHB", width % 65536, height % 65536, 0) + b"\x08\x01\x00\x00;"
    ppm = f"P6 {width} {height} 255\n".encode() + bytes(100)
    contents = {"png": png_of(width, height), "bmp": bmp + bytes(99), "gif": gif, "ppm": ppm}
    return [Picture(f"a {suffix} of {size}", suffix, data) for suffix, data in contents.items()]


def turned(orientation: int) -> Picture:
    """A grey PNG that is to be turned."""
    image = Image.frombytes("L", (3, 2), bytes(range(6)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data, upright = write(image, "PNG", exif=exif), write(image, "PNG")
    return Picture(f"PNG, orientation {orientation}", "png", data, upright, orientation)


@st.composite
def damaged_pictures(draw: st.DrawFn) -> Picture:
    """A file that was cut, changed, or is something else."""
    picture = draw(whole_pictures())
    place = draw(st.integers(0, len(picture.data) - 1))
    damage = draw(st.sampled_from(["cut", "flip", "insert", "random", "text", "none", "huge"]))
    data = picture.data
    if damage == "cut":
        data = data[:place]
    elif damage == "flip":
        data = data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
    elif damage == "insert":
        data = data[:place] + draw(st.binary(min_size=1, max_size=20)) + data[place:]
    elif damage == "random":
        data = data[: draw(st.sampled_from([0, 2, 8, 20]))] + draw(st.binary(max_size=300))
    elif damage == "text":
        data = draw(st.text(max_size=100)).encode("utf-8", "surrogatepass")
    elif damage == "none":
        data = b""
    else:
        side = st.sampled_from([0, 1, 13_000, 65_535, 2**31 - 1])
        return draw(st.sampled_from(huge_headers(draw(side), draw(side))))
    return Picture(f"{picture.told}: {damage} at {place}", picture.suffix, data)


def seen(image: Image.Image) -> Array | None:
    """What an image shows, uint8 [H, W] or [H, W, 3], by arithmetic; None where that is long."""
    array: Array = np.asarray(image)
    transparent = image.info.get("transparency")
    if image.mode == "1":
        return np.where(array, np.uint8(255), np.uint8(0))
    if image.mode in ("I", "I;16", "I;16B"):
        return np.rint(array / 257).astype(np.uint8)
    if transparent is not None and image.mode == "L":
        return np.where(array == transparent, np.uint8(255), array)
    if transparent is not None and image.mode == "RGB":
        return np.where((array == transparent).all(axis=2)[..., None], np.uint8(255), array)
    if image.mode in ("L", "RGB"):
        return array
    if image.mode == "P" and transparent is None:
        palette: Array = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        return palette[array]
    if image.mode in ("LA", "RGBA"):
        alpha = array[..., -1:] / 255
        paper: Array = np.rint(array[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        return paper[..., 0] if image.mode == "LA" else paper
    return None


def assert_shows(pixels: Array, image: Image.Image, turn: Callable[[Array], Array]) -> None:
    """Pixels [C, H, W] are those of an image; one level is left to the rounding of transparency."""
    height, width = turn(np.empty((image.height, image.width))).shape
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1 if image.mode in GREY else 3, height, width)
    expected = seen(image)
    if expected is not None:
        expected = turn(expected).reshape(height, width, -1).transpose(2, 0, 1)
        tolerance = 1 if image.mode in ("LA", "RGBA") else 0
        assert np.abs(pixels.astype(int) - expected).max() <= tolerance


# --- modes ---------------------------------------------------------------------------------------


def test_modes(cases: Cases) -> None:
    def check(image: Image.Image) -> bool:
        try:
            pixels = convert(image, None, None)
        except ValueError as error:
            assert image.mode == "F"
            assert "8 or 16 bits" in str(error)
            return True
        assert_shows(pixels, image, TURN[1])
        return False

    every_mode = [Image.new(mode, (3, 2)) for mode in ALL_MODES if mode not in ("P", "PA")]
    cases.run(image_objects(tuple(ALL_MODES)), check, always=every_mode)


# --- files ---------------------------------------------------------------------------------------


@dataclass
class Folder:
    """A folder of images, and how it is read."""

    picture: Picture
    is_alone: bool
    image_size: int | tuple[int, int] | None
    channels: Any
    on_error: Any
    name: str

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        path = folder / f"{self.name}.{self.picture.suffix}"
        path.write_bytes(self.picture.data)
        if not self.is_alone:
            Image.new("RGB", (6, 5), "red").save(folder / "good.png")
        return path

    def open(self, folder: Path) -> ImageDataModule:
        return ImageDataModule(
            str(folder / "images"),
            self.image_size,
            self.channels,
            val_fraction=0,
            on_error=self.on_error,
            cache_dir=str(folder / "cache"),
        )


folders = st.builds(
    Folder,
    picture=st.one_of(whole_pictures(), damaged_pictures()),
    is_alone=st.booleans(),
    image_size=st.sampled_from([None, None, 8, 1, (3, 5)]),
    channels=st.sampled_from([None, None, 1, 3]),
    on_error=st.sampled_from(["stop", "skip"]),
    name=st.sampled_from(
        ["a", "z", "ein Bild", "画像", "a'b\"", "-x", "%s{}", "a\udcff", "x" * 200]
    ),
)


def test_files(cases: Cases, capfd: pytest.CaptureFixture[str]) -> None:
    def check(case: Folder) -> bool:
        with TemporaryDirectory() as name, warnings.catch_warnings(record=True) as warned:
            folder = Path(name)
            path = case.write(folder / "images")
            before = tree(folder / "images")
            refused = not _decodes(case, folder, path)
            assert tree(folder / "images") == before
            # in the cache there are whole builds and the locks of those that were begun
            built = {".bin", ".json", ".lock", ""}
            assert {file.suffix for file in (folder / "cache").rglob("*")} <= built
            assert any((folder / "cache").rglob("images.bin")) != refused
            assert not warned
        captured = capfd.readouterr()
        assert not captured.out
        if "TIFF" not in case.picture.told:  # what libtiff prints cannot be turned off from here
            assert not captured.err
        return refused

    every_turn = [Folder(turned(i), True, None, None, "stop", "a") for i in TURN]
    cases.run(folders, check, always=every_turn)


def _decodes(case: Folder, folder: Path, path: Path) -> bool:
    data = case.open(folder)
    try:
        images = data.train_images
    except InputError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error) or "good.png" in str(error)
        if case.picture.upright is not None and case.is_alone and case.on_error == "stop":
            assert "8 or 16 bits" in str(error)
        return False
    pixels = images[np.arange(len(images))]
    assert pixels.dtype == np.uint8
    assert case.channels in (None, pixels.shape[1])
    if case.image_size is not None:
        size = case.image_size
        assert pixels.shape[2:] == ((size, size) if isinstance(size, int) else size)
    upright = case.picture.upright
    if upright is not None and case.is_alone and case.image_size is case.channels is None:
        with Image.open(io.BytesIO(upright)) as image:
            image.load()
            assert_shows(pixels[0], image, TURN[case.picture.orientation])
    again = case.open(folder).train_images
    assert again.sha256 == images.sha256
    return True


# --- what is no file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "is_image"),
    [
        pytest.param(os.mkfifo, True, id="fifo"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), True, id="device"),
        pytest.param(lambda path: path.symlink_to("nowhere"), True, id="dangling"),
        pytest.param(lambda path: path.symlink_to(path.name), True, id="itself"),
        pytest.param(lambda path: path.symlink_to(path.parent), False, id="parent"),
        pytest.param(Path.mkdir, False, id="folder"),
    ],
)
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], object], is_image: bool) -> None:
    """It is a broken image or none, and nobody waits for what it might give."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("L", (4, 4)).save(folder / "good.png")
    make(folder / "x.png")

    def count(on_error: Any) -> int:
        cache = str(tmp_path / "cache")
        data = ImageDataModule(str(folder), val_fraction=0, on_error=on_error, cache_dir=cache)
        return data.num_train

    with bounds():
        assert count("skip") == 1
        if is_image:
            with pytest.raises(InputError, match=r"x\.png cannot be decoded: "):
                count("stop")
        else:
            assert count("stop") == 1
