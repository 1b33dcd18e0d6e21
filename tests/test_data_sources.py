"""What `open_source` finds behind a name or a path, and what it says where there is nothing."""

import gzip
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ddpm_lightning.data.items import SplitName
from ddpm_lightning.data.sources import open_source
from ddpm_lightning.errors import InputError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist


def write_images(folder: Path, *names: str) -> None:
    for level, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(folder / name)


def names(source: str, split: SplitName) -> list[str]:
    images = open_source(source).splits[split]
    return [images.name(index) for index in range(len(images))]


# digits


def test_digits() -> None:
    source = open_source("digits")
    assert list(source.splits) == ["train"]
    images = source.splits["train"]
    assert len(images) == 1797
    first = images[0]
    assert isinstance(first, np.ndarray)
    # The first row of the first digit is 0 0 5 13 9 1 0 0 out of 16.
    assert first[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert images.name(3) == "digits, image 3"


def test_digits_need_no_import_until_one_is_read() -> None:
    code = (
        "import sys; from ddpm_lightning.data.sources import open_source; open_source('digits');"
        "sys.exit(any(name in sys.modules for name in ('sklearn', 'datasets')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# IDX files

PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def idx(pixels: NDArray[np.uint8], magic: int = 0x0803) -> bytes:
    return struct.pack(">4i", magic, *pixels.shape) + pixels.tobytes()


@pytest.mark.parametrize("compressed", [False, True])
def test_idx(tmp_path: Path, compressed: bool) -> None:
    for name, pixels in {"train": PIXELS, "t10k": PIXELS[:1]}.items():
        data = gzip.compress(idx(pixels), mtime=0) if compressed else idx(pixels)
        (tmp_path / f"{name}-images-idx3-ubyte{'.gz' if compressed else ''}").write_bytes(data)
    splits = open_source(str(tmp_path)).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "test": 1}
    np.testing.assert_array_equal(splits["train"][1], PIXELS[1])
    assert splits["train"].name(1).startswith(str(tmp_path / "train-images-idx3-ubyte"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (idx(PIXELS, magic=0x0801), "not an IDX file of images"),
        (idx(PIXELS)[:9], "not an IDX file of images"),
        (idx(PIXELS[:0]), "says it holds 0 images"),
        (idx(PIXELS)[:-1], "truncated: 2 images of 3 x 4 take 24 bytes"),
        (idx(PIXELS) + b"x", "longer than its header says"),
        (gzip.compress(idx(PIXELS), mtime=0)[:-9], "cannot be read"),
        (b"not gzip", "cannot be read"),
    ],
)
def test_malformed_idx(tmp_path: Path, data: bytes, message: str) -> None:
    compressed = message == "cannot be read"
    file = tmp_path / f"train-images-idx3-ubyte{'.gz' if compressed else ''}"
    file.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        _ = open_source(str(tmp_path)).splits["train"][0]
    assert str(file) in str(caught.value)


def test_idx_without_training_file(tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS))
    with pytest.raises(InputError, match="has no train-images-idx3-ubyte"):
        open_source(str(tmp_path))


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=f"{FASHION_MNIST} is not installed")
def test_fashion_mnist() -> None:
    splits = open_source(str(FASHION_MNIST)).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 60000, "test": 10000}
    first = splits["test"][0]
    assert isinstance(first, np.ndarray)
    assert first.shape == (28, 28)


# folders of images


def test_flat_folder_is_all_training_images_in_order(tmp_path: Path) -> None:
    write_images(tmp_path, "b/2.png", "a.PNG", "b/10.JPG", "test/1.webp", ".hidden.png", ".x/1.png")
    (tmp_path / "readme.txt").write_text("not an image")
    assert list(open_source(str(tmp_path)).splits) == ["train"]
    expected = ["a.PNG", "b/10.JPG", "b/2.png", "test/1.webp"]
    assert names(str(tmp_path), "train") == [str(tmp_path / name) for name in expected]


@pytest.mark.parametrize(
    "suffix", ["png", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"]
)
def test_every_suffix(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path, f"image.{suffix}")
    item = open_source(str(tmp_path)).splits["train"][0]
    assert item == (tmp_path / f"image.{suffix}").read_bytes()


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folder_with_splits(tmp_path: Path, val: str) -> None:
    write_images(tmp_path, "train/cat/1.png", "train/2.png", f"{val}/3.png", "test/4.png", "5.png")
    splits = open_source(str(tmp_path)).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "val": 1, "test": 1}


def test_folder_with_two_val_splits(tmp_path: Path) -> None:
    write_images(tmp_path, "train/1.png", "val/1.png", "valid/1.png")
    with pytest.raises(InputError, match="has both val"):
        open_source(str(tmp_path))


def test_folder_with_empty_train(tmp_path: Path) -> None:
    write_images(tmp_path, "test/1.png")
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="no images in its subfolder train"):
        open_source(str(tmp_path))


def test_links_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", "1.png")
    folder = tmp_path / "folder"
    write_images(folder, "deep/0.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere")
    expected = ["dangling.png", "deep/0.png", "link/1.png"]
    assert names(str(folder), "train") == [str(folder / name) for name in expected]
    with pytest.raises(FileNotFoundError):
        _ = open_source(str(folder)).splits["train"][0]


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png", "2.png")
    before = open_source(str(tmp_path)).fingerprint
    assert open_source(str(tmp_path)).fingerprint == before
    (tmp_path / "2.png").write_bytes(b"longer or shorter")
    assert open_source(str(tmp_path)).fingerprint != before


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "pictures", "1.png")
    assert len(open_source("~/pictures").splits["train"]) == 1


# nothing there


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("{folder}/celba", " (did you mean {folder}/celeba?)"),
        ("./nothing/like/it", ""),
        ("~/no such folder", ""),
        ("a/b/c", ""),
        ("", ""),
    ],
)
def test_missing_path_never_goes_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, hint: str
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    (tmp_path / "celeba").mkdir()
    path = source.format(folder=tmp_path)
    with pytest.raises(InputError) as caught:
        open_source(path)
    message = (
        f"--data.source {path!r} does not exist{hint.format(folder=tmp_path)}; it takes digits"
    )
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "prepare", [lambda folder: None, lambda folder: (folder / "a.txt").touch()]
)
def test_folder_without_images(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(tmp_path)
    with pytest.raises(InputError, match=r"has no images in it; it takes a folder with .*\.png"):
        open_source(str(tmp_path))


def test_file_that_is_no_table(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png")
    with pytest.raises(InputError, match="is a file; it takes a folder, or a file that ends in"):
        open_source(str(tmp_path / "1.png"))
