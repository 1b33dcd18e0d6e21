"""Reading images: a decoded set against diffusers' recipe, a stream against `datasets`' own."""

import io
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import SHORT, Row, alternate, make_row, rates
from benchmarks.peers import diffusers_batches
from benchmarks.training import write_images
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.images import decode

SIZE, BATCH_SIZE = 32, 128
NUM_MAPPED, NUM_STREAMED = 2_000, 40_000
NUM_FILES, ROWS_PER_GROUP = 8, 100
NUM_WORKERS = 2
SHUFFLE_BUFFER = 1000  # `datasets`' default

Decoder = Literal["ours", "own", "none"]
"""What makes the peer's pixels: our function, its own, or nothing, where the cells are pixels."""


def smooth_pixels(num_images: int) -> NDArray[np.uint8]:
    """Draw uint8 [N, SIZE, SIZE, 3]; noise would make PNGs that no photograph makes."""
    draws = np.random.default_rng(0)
    images = []
    for coarse in draws.integers(0, 256, (num_images, 8, 8, 3), dtype=np.uint8):
        fine = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        images.append(fine ^ draws.integers(0, 4, fine.shape, dtype=np.uint8))  # a sensor's noise
    return np.stack(images)


def data_map(runs: int, budget: float) -> Row:
    """Compare batches from images that are in memory or in the cache."""
    pixels = smooth_pixels(NUM_MAPPED)
    num_ours, num_theirs = 2000, 40  # each for some tenths of a second
    with tempfile.TemporaryDirectory() as folder:
        source = write_images(Path(folder), pixels)
        data = ImageDataModule(
            str(source), batch_size=BATCH_SIZE, flip=True, val_fraction=0, cache_dir=folder
        )
        data.prepare_data()
        ours = iter(data.train_dataloader())
        theirs = diffusers_batches(pixels, BATCH_SIZE)
        rounds = alternate(
            lambda: [next(ours) for _ in range(num_ours)],
            lambda: [next(theirs) for _ in range(num_theirs)],
            runs,
            budget,
        )
    return make_row(
        "data-map",
        "batches of 128, 32x32, one process, flips: ours uint8, diffusers' recipe float",
        "images/s",
        rates(rounds, num_ours * BATCH_SIZE, num_theirs * BATCH_SIZE),
        "at least",
        20,
    )


def write_parquet(folder: Path, cells: list[Any], kind: pa.DataType) -> None:
    """Write a column `image` to several files."""
    share = math.ceil(len(cells) / NUM_FILES)
    for index in range(NUM_FILES):
        part = pa.array(cells[index * share : (index + 1) * share], kind)
        path = folder / f"train-{index:05}.parquet"
        pq.write_table(pa.table({"image": part}), path, row_group_size=ROWS_PER_GROUP)


def our_stream(folder: Path) -> Iterator[Tensor]:
    """Give uint8 [N, 3, SIZE, SIZE] for ever, in this project's order."""
    data = ImageDataModule(
        str(folder),
        batch_size=BATCH_SIZE,
        val_fraction=0,
        num_workers=NUM_WORKERS,
        streaming=True,
        cache_dir=str(folder / "cache"),
    )
    data.prepare_data()
    for batch in data.train_dataloader():
        yield batch.images


def _decode_all(examples: list[dict[str, bytes]]) -> Tensor:
    decoded = [decode(example["image"], (SIZE, SIZE), 3) for example in examples]
    return torch.from_numpy(np.stack(decoded))


def _stack_all(examples: list[dict[str, Image.Image]]) -> Tensor:
    pixels = np.stack([np.asarray(example["image"]) for example in examples])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _view_all(examples: list[dict[str, bytes]]) -> Tensor:
    pixels = np.frombuffer(b"".join(example["image"] for example in examples), np.uint8)
    images = torch.from_numpy(pixels.reshape(-1, SIZE, SIZE, 3).copy())
    return images.permute(0, 3, 1, 2).contiguous()


COLLATE: dict[Decoder, Callable[[list[Any]], Tensor]] = {
    "ours": _decode_all,
    "own": _stack_all,
    "none": _view_all,
}


def their_stream(folder: Path, decoder: Decoder) -> Iterator[Tensor]:
    """Give the same for ever from `datasets`, with its shuffle buffer."""
    files = sorted(str(path) for path in folder.glob("train-*.parquet"))
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    if decoder == "own":
        stream = stream.cast_column("image", datasets.Image())
    loader: DataLoader[Any] = DataLoader(
        stream.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER).repeat(None),
        BATCH_SIZE,
        num_workers=NUM_WORKERS,
        collate_fn=COLLATE[decoder],
    )
    yield from loader


def _compare(
    name: str,
    what: str,
    decoder: Decoder,
    epochs: float,
    target: float,
    runs: int,
    budget: float,
) -> Row:
    torch.set_num_threads(1)  # the workers are the parallelism
    datasets.disable_progress_bars()
    pixels = smooth_pixels(NUM_STREAMED)
    num_batches = int(NUM_STREAMED * epochs) // BATCH_SIZE
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if decoder == "none":
            cells = [image.tobytes() for image in pixels]
            write_parquet(path, cells, pa.binary(SIZE * SIZE * 3))
        else:
            write_parquet(path, [_png(image) for image in pixels], pa.binary())
        ours, theirs = our_stream(path), their_stream(path, decoder)
        rounds = alternate(
            lambda: [next(ours) for _ in range(num_batches)],
            lambda: [next(theirs) for _ in range(num_batches)],
            runs,
            budget,
        )
    return make_row(
        name, what, "images/s", rates(rounds, num_batches * BATCH_SIZE), "at least", target
    )


def data_stream_png(runs: int, budget: float) -> Row:
    """Compare streams of encoded images, which our function decodes on both sides."""
    what = (
        "shuffled Parquet of 32x32 PNGs, two workers, whole epochs of 40,000, against `datasets`' "
        "streaming with the same decoder"
    )
    # the whole set: at its end `datasets` fills its buffer anew, for a second or more
    return _compare("data-stream-png", what, "ours", 1, 1.5, runs, budget)


def data_stream_png_within(runs: int, budget: float) -> Row:
    """Compare the same between two ends of the set, as a set of millions would have it."""
    what = "as data-stream-png, in turns of a tenth of the set: its end is seldom in one"
    return _compare("data-stream-png-within", what, "ours", 0.1, 1.5, SHORT * runs, budget)


def data_stream_png_own(runs: int, budget: float) -> Row:
    """Compare the same as their users have them, each with its own decoder."""
    what = "the same, each with its own decoder: `datasets` has Pillow read the file"
    return _compare("data-stream-png-own", what, "own", 1, 1.5, runs, budget)


def data_stream_raw(runs: int, budget: float) -> Row:
    """Compare streams of pixels."""
    what = "the same of raw uint8 (binaries of a fixed size)"
    return _compare("data-stream-raw", what, "none", 2, 3, runs, budget)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
