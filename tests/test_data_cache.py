"""Decoding once: what is kept, what is refused, and what is left when it goes wrong."""

import hashlib
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_lightning.data import cache
from ddpm_lightning.data.cache import (
    CachedImages,
    Channels,
    OnError,
    default_cache_dir,
    locked,
    open_images,
)
from ddpm_lightning.data.decoding import THREADS
from ddpm_lightning.data.sources import open_source
from ddpm_lightning.errors import InputError
from tests.command_line import ended

NUM_IMAGES = 30  # more than one block of images per thread

# Run in a process of its own: decode a folder slowly, and print the hash of its pixels.
BUILD = """
import sys, time
from pathlib import Path
from ddpm_lightning.data.cache import open_images
from ddpm_lightning.data.items import Source
from ddpm_lightning.data.sources import open_source

folder, cache_dir, log, seconds = sys.argv[1:]
source = open_source(folder)
images = source.splits["train"]

class Slow:
    def __len__(self):
        return len(images)
    def name(self, index):
        return images.name(index)
    def __getitem__(self, index):
        time.sleep(float(seconds))
        with open(log, "a") as file:
            file.write(f"{index}\\n")
        return images[index]

slow = Source(source.name, source.fingerprint, {"train": Slow()})
print(open_images(slow, "train", None, None, "stop", Path(cache_dir)).sha256)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(NUM_IMAGES):
        Image.new("L", (6, 4), index).save(folder / f"{index:02}.png")
    return folder


def build(
    folder: Path,
    size: tuple[int, int] | None = None,
    channels: Channels | None = None,
    on_error: OnError = "stop",
) -> CachedImages:
    """Decode `folder` into a folder beside it."""
    source = open_source(str(folder))
    return open_images(source, "train", size, channels, on_error, folder.parent / "cache")


def build_elsewhere(folder: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    arguments = [str(folder), str(folder.parent / "cache"), str(log), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *arguments], stdout=subprocess.PIPE, text=True
    )


def finished(folder: Path) -> list[Path]:
    return [path.parent for path in (folder.parent / "cache").glob("*/meta.json")]


def test_images_in_order(folder: Path) -> None:
    cached = build(folder)
    assert cached.shape == (NUM_IMAGES, 1, 4, 6)
    assert cached.images.dtype == np.uint8
    assert cached.images[:, 0, 0, 0].tolist() == list(range(NUM_IMAGES))
    assert cached.sha256 == hashlib.sha256(cached.images.tobytes()).hexdigest()
    assert (cached.num_skipped, cached.skipped_names) == (0, ())
    assert not cached.images.flags.writeable


def test_second_time_reads_what_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = build(folder)
    monkeypatch.setattr(cache, "decode_split", None)
    assert build(folder) == cached


def test_pickled_as_a_path(folder: Path) -> None:
    cached = build(folder)
    _ = cached.images
    data = pickle.dumps(cached)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).images, cached.images)


def test_each_choice_has_its_own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    assert build(folder, size=(2, 3)).shape == (NUM_IMAGES, 1, 2, 3)
    assert build(folder, channels=3).shape == (NUM_IMAGES, 3, 4, 6)
    build(folder, on_error="skip")
    monkeypatch.setattr(cache, "CONVERSION_VERSION", 0)
    build(folder)
    (folder / "00.png").unlink()
    build(folder)
    assert len(finished(folder)) == 6


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", "/some/where")
    assert default_cache_dir() == Path("/some/where")
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/ddpm_lightning")


@pytest.mark.parametrize("kind", ["folder is a file", "read-only"])
def test_unusable_cache_folder(tmp_path: Path, folder: Path, kind: str) -> None:
    cache_dir = tmp_path / "cache"
    if kind == "folder is a file":
        cache_dir.touch()
    elif os.geteuid() == 0:
        cache_dir = Path("/proc/ddpm_lightning")  # root may write anywhere but there
    else:
        cache_dir.mkdir(mode=0o555)
    with pytest.raises(InputError, match="cannot hold the decoded images .* --data.cache_dir"):
        open_images(open_source(str(folder)), "train", None, None, "stop", cache_dir)


# images that differ


def test_another_size_is_refused(folder: Path) -> None:
    Image.new("L", (5, 4)).save(folder / "17.png")
    Image.new("L", (9, 9)).save(folder / "18.png")
    with pytest.raises(InputError) as caught:
        build(folder)
    assert str(caught.value) == (
        f"{folder / '17.png'} is 4 x 5 (height x width) but {folder / '00.png'} is 4 x 6; "
        f"scale all to one size by --data.image_size N"
    )
    assert finished(folder) == []
    assert build(folder, size=(4, 6)).shape == (NUM_IMAGES, 1, 4, 6)


def test_colours_among_grey_are_refused(folder: Path) -> None:
    Image.new("RGB", (6, 4)).save(folder / "17.png")
    with pytest.raises(InputError, match=r"17\.png has colours but .*00\.png is grey.*channels 3"):
        build(folder)
    assert build(folder, channels=1).shape == (NUM_IMAGES, 1, 4, 6)


def test_grey_among_colours_is_repeated(folder: Path) -> None:
    Image.new("RGB", (6, 4), (1, 2, 3)).save(folder / "00.png")
    images = build(folder).images
    assert images[0, :, 0, 0].tolist() == [1, 2, 3]
    assert images[29, :, 0, 0].tolist() == [29, 29, 29]


# broken images


def truncated(path: Path) -> None:
    Image.effect_noise((6, 4), 50).save(path)
    path.write_bytes(path.read_bytes()[:-30])


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


BREAK: dict[str, Callable[[Path], object]] = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    "float pixels": lambda path: Image.new("F", (6, 4)).save(path, "TIFF"),
    "bomb": bomb,
    "missing": dangle,
}


@pytest.mark.parametrize("kind", BREAK)
def test_broken_image(folder: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    broken = folder / "11.png"
    BREAK[kind](broken)
    with pytest.raises(InputError) as caught:
        build(folder)
    assert str(caught.value).startswith(f"{broken} cannot be decoded: ")
    assert str(caught.value).endswith("by --data.on_error skip")
    assert "\n" not in str(caught.value)
    # its traceback lives on, but no thread that a garbage collector would have to wait for
    assert not [one for one in threading.enumerate() if one.name.startswith(THREADS)]
    with caplog.at_level(logging.WARNING):
        cached = build(folder, on_error="skip")
    assert (cached.num_skipped, cached.skipped_names) == (1, (str(broken),))
    expected = [index for index in range(NUM_IMAGES) if index != 11]
    assert cached.images[:, 0, 0, 0].tolist() == expected
    assert caplog.messages == [f"{folder} (train): left out 1 broken images: {broken}"]


def test_first_names_of_many_broken_images(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(7):
        (folder / f"{index:02}.png").write_bytes(b"")
    cached = build(folder, on_error="skip")
    assert cached.num_skipped == 7
    assert len(cached.skipped_names) == 5
    assert caplog.messages[0].endswith(f"{folder / '04.png'}, …")


def test_nothing_but_broken_images(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of its 30 images can be decoded"):
        build(folder, on_error="skip")
    assert finished(folder) == []


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_unusable_source_is_no_broken_image(tmp_path: Path, on_error: OnError) -> None:
    (tmp_path / "set").mkdir()
    header = (0x0803).to_bytes(4, "big") + (2).to_bytes(4, "big") * 3
    (tmp_path / "set" / "train-images-idx3-ubyte").write_bytes(header + b"1234567")
    with pytest.raises(InputError, match="train-images-idx3-ubyte is truncated"):
        build(tmp_path / "set", on_error=on_error)


# several processes, and accidents


def test_three_processes_build_once(tmp_path: Path, folder: Path) -> None:
    log = tmp_path / "log"
    with ExitStack() as stack:
        processes = [stack.enter_context(ended(build_elsewhere(folder, log, 0.02))) for _ in "123"]
        hashes = [process.communicate(timeout=60)[0] for process in processes]
    assert len(set(hashes)) == 1
    assert hashes[0].strip() == build(folder).sha256
    assert sorted(map(int, log.read_text().split())) == list(range(NUM_IMAGES))
    assert len(finished(folder)) == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_long_wait_is_told_once_for_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: str
) -> None:
    monkeypatch.setattr(cache, "_QUIET_SECONDS", 0.05)
    monkeypatch.setenv("RANK", rank)
    path = tmp_path / "cache" / "it"
    entered = threading.Event()

    def wait() -> None:
        with locked(path, "the decoded images"):
            entered.set()

    with caplog.at_level(logging.INFO, "ddpm_lightning"), ThreadPoolExecutor(1) as pool:
        with locked(path, "the decoded images"):
            waiting = pool.submit(wait)
            assert not entered.wait(1)
        waiting.result(timeout=60)
    told = f"waiting for another process that makes the decoded images, in {path.parent}"
    assert caplog.messages == ([told] if rank == "0" else [])


def test_killed_build_leaves_nothing_usable(tmp_path: Path, folder: Path) -> None:
    log = tmp_path / "log"
    with ended(build_elsewhere(folder, log, 0.05)) as process:
        deadline = time.monotonic() + 120
        while not log.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    (partial,) = (tmp_path / "cache").glob("*.partial")
    assert finished(folder) == []
    cached = build(folder)
    assert not partial.exists()
    assert cached.images[:, 0, 0, 0].tolist() == list(range(NUM_IMAGES))


def test_full_disk_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # bytes a file may grow to
    try:
        with pytest.raises(OSError, match="File too large"):
            build(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert build(folder).shape[0] == NUM_IMAGES


CHANGE: dict[str, Callable[[Path], object]] = {
    "shorter pixels": lambda folder: (folder / "images.bin").write_bytes(b"1234"),
    "no pixels": lambda folder: (folder / "images.bin").unlink(),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "other meta": lambda folder: (folder / "meta.json").write_text('{"shape": [1, 2]}'),
}


@pytest.mark.parametrize("kind", CHANGE)
def test_changed_cache_is_built_anew(folder: Path, kind: str) -> None:
    cached = build(folder)
    CHANGE[kind](cached.folder)
    assert build(folder) == cached
    assert build(folder).images[7, 0, 0, 0] == 7
