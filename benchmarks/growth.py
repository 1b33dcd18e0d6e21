"""How cost grows with size: `python -m benchmarks.growth` draws docs/growth.png and keeps rows."""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.harness import PAGE, Action, Row, keep, make_row, seconds_of, text_of
from benchmarks.memory import MEGABYTE, peak
from benchmarks.peers import CPU
from benchmarks.training import OurStep, make_pixels
from ddpm_lightning import UNet
from ddpm_lightning.allocator import keep_freed_memory
from ddpm_lightning.commands.sweep_charts import make_figure, write_figure
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.metrics.features import make_extractor
from ddpm_lightning.metrics.frechet import MomentSums, frechet_distance
from ddpm_lightning.metrics.judge import Collector

ROWS_PER_GROUP = 100
NUM_TURNS = 3


class Chart(NamedTuple):
    """What grows, and with what.

    Attributes:
        row: Of the table.
        name: Of the size.
        unit: Of the cost.
        cost: Gives it for a size, in a process of its own.
        sizes: Ascending.
        power: The work is proportional to the size to this power.
    """

    row: str
    name: str
    unit: str
    cost: Callable[[int], float]
    sizes: Sequence[int]
    power: int


def step_seconds(channels: int, batch_size: int, size: int) -> float:
    """Give the median seconds of a training step of a small network."""
    keep_freed_memory()
    net = UNet(1, 1, channels, (1, 2, 2), 1, (2,))
    step: Action = OurStep(net, make_pixels(size, 1), batch_size)
    step()
    return median(seconds_of(step) for _ in range(3))


def of_batch(batch_size: int) -> float:
    """Give the seconds of a step of so many images."""
    return step_seconds(32, batch_size, 16)


def of_side(size: int) -> float:
    """Give the seconds of a step of images of such a side."""
    return step_seconds(32, 8, size)


def of_channels(channels: int) -> float:
    """Give the seconds of a step of a network of such a width."""
    return step_seconds(channels, 8, 16)


def of_judged(num_images: int) -> float:
    """Give the seconds from so many images to their Frechet distance from a reference."""
    keep_freed_memory()
    torch.manual_seed(0)
    extractor = make_extractor("efficientnet-lite0")
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    num_features = extractor(images).features.shape[1]  # the first call does what is done once
    sums = MomentSums(num_features, CPU)
    sums.add(torch.randn(2 * num_features, num_features))
    reference = sums.moments()
    collector = Collector(extractor, ["fd"])
    start = time.perf_counter()
    for first in range(0, num_images, len(images)):
        collector.add(images[: num_images - first])
    frechet_distance(collector.finish().moments, reference)
    return time.perf_counter() - start


def of_streamed(num_images: int) -> float:
    """Give the megabytes that it takes to read from so many images of 32x32x3."""
    draws = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.parquet"
        schema = pa.schema([("image", pa.binary(32 * 32 * 3))])
        with pq.ParquetWriter(path, schema, compression="none") as writer:
            for _ in range(num_images // ROWS_PER_GROUP):
                rows = draws.integers(0, 256, (ROWS_PER_GROUP, 32 * 32 * 3), dtype=np.uint8)
                table = pa.table(
                    [pa.array([row.tobytes() for row in rows], schema[0].type)], schema
                )
                writer.write_table(table)
        before = peak()
        data = ImageDataModule(
            folder, batch_size=64, val_fraction=0, streaming=True, cache_dir=f"{folder}/cache"
        )
        data.prepare_data()
        batches = iter(data.train_dataloader())
        for _ in range(num_images // 64):
            next(batches)
    return (peak() - before) / MEGABYTE


CHARTS = (
    Chart("growth-batch", "batch", "seconds a step", of_batch, (4, 8, 16, 32, 64), 1),
    Chart("growth-side", "side in pixels", "seconds a step", of_side, (8, 16, 32, 64), 2),
    Chart("growth-channels", "base channels", "seconds a step", of_channels, (32, 64, 128, 256), 2),
    Chart("growth-judged", "images judged", "seconds", of_judged, (64, 256, 1024, 4096), 1),
    Chart("growth-stream", "images of a stream", "MB", of_streamed, (10_000, 40_000, 160_000), 1),
)


def take_turns(chart: Chart) -> list[list[float]]:
    """Measure all sizes, turn by turn: the machine's moods are then in each size alike."""
    turns: list[list[float]] = []
    for turn in range(NUM_TURNS):
        turns.append([])
        for size in chart.sizes:
            with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
                turns[turn].append(pool.submit(chart.cost, size).result())
            print(f"{chart.name} {size}: {turns[turn][-1]:.3g} {chart.unit}", flush=True)
    return turns


def row_of(chart: Chart, turns: Sequence[Sequence[float]]) -> Row:
    """Fit each turn's power of the size with which the cost grows; compare it with the work's."""
    sizes = np.log(chart.sizes)
    powers = [float(np.polyfit(sizes, np.log(costs), 1)[0]) for costs in turns]
    first, last = chart.sizes[0], chart.sizes[-1]
    what = f"power of the {chart.name}, {first:,} to {last:,}, by which {chart.unit} grow"
    rounds = [(power, float(chart.power)) for power in powers]
    return make_row(chart.row, f"{what}; against the work's", "", rounds, "at most", 1)


def draw(costs: Sequence[Sequence[float]]) -> None:
    """Draw what each size of each chart costs, beside a line that grows as the work does."""
    figure = make_figure(3.2 * len(CHARTS), 3)
    for axes, chart, found in zip(figure.subplots(1, len(CHARTS)), CHARTS, costs, strict=True):
        work = [(size / chart.sizes[0]) ** chart.power for size in chart.sizes]
        axes.loglog(chart.sizes, found, "o-")
        axes.loglog(chart.sizes, [found[0] * each for each in work], ":", label="as the work")
        axes.set_xticks(chart.sizes, [f"{size:,}" for size in chart.sizes])
        axes.minorticks_off()
        axes.set_xlabel(chart.name)
        axes.set_ylabel(chart.unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    write_figure(PAGE.with_name("growth.png"), figure)


def main() -> None:
    """Measure, print, draw and keep."""
    argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__).parse_args()
    torch.set_num_threads(1)  # as the processes that are measured
    costs: list[list[float]] = []
    rows: list[Row] = []
    for chart in CHARTS:
        turns = take_turns(chart)
        costs.append([median(found) for found in zip(*turns, strict=True)])
        rows.append(row_of(chart, turns))
        print(text_of(rows[-1]), flush=True)
    draw(costs)
    keep(rows)


if __name__ == "__main__":
    main()
