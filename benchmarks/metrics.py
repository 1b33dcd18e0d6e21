"""What judging costs beside what cannot be avoided: `python -m benchmarks.metrics`.

Prints a table of ratios, each of two times (or sizes) that were taken in turn in this run.
"""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import scipy.linalg
import torch
from torch import Tensor, nn

from ddpm_lightning.images import to_rgb
from ddpm_lightning.metrics.features import Extractor, Features, make_extractor
from ddpm_lightning.metrics.frechet import Moments, MomentSums, frechet_distance
from ddpm_lightning.metrics.judge import Collector
from tests.extractors import images, write_inception

BATCH_SIZE = 64
NUM_IMAGES = 50_000
NUM_FEATURES = 2048  # Inception's
MEGABYTE = 2**20
ROW = "{:<58}{:>10}{:>10}{:>8}  {}"


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> tuple[float, float, float]:
    """Take the times of two things in turn.

    Returns:
        Median seconds of each, and the median of the ratios.
    """
    pairs = []
    for _ in range(repeats):
        times = []
        for run in (theirs, ours):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        pairs.append(times)
    return (
        statistics.median(mine for _, mine in pairs),
        statistics.median(other for other, _ in pairs),
        statistics.median(mine / other for other, mine in pairs),
    )


def extraction(extractor: Extractor, repeats: int) -> None:
    """Collect a batch's moments, or run nothing but the extractor's forward pass."""
    pixels = images(BATCH_SIZE, 32)
    collector = Collector(extractor, ["fd"])

    @torch.no_grad()
    def bare() -> None:
        extractor.extract(to_rgb(pixels))

    collector.add(pixels)  # what is done once
    bare()
    ours, theirs, ratio = compare(lambda: collector.add(pixels), bare, repeats)
    name = f"{extractor.name}, {BATCH_SIZE} images, against its forward pass"
    print(ROW.format(name, f"{ours:.3f} s", f"{theirs:.3f} s", f"{ratio:.3f}", "at most 1.05"))


def solve(name: str, num_images: int, repeats: int) -> None:
    """Solve for the Frechet distance, or take scipy's root of the covariances' product."""
    scales = torch.logspace(0, -2, NUM_FEATURES, dtype=torch.float64)
    sides = []
    for seed in (0, 1):
        sums = MomentSums(NUM_FEATURES, torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        shape = (num_images, NUM_FEATURES)
        sums.add(torch.randn(shape, generator=generator, dtype=torch.float64) * scales)
        sides.append(sums.moments())
    a, b = sides

    def theirs() -> None:
        scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())

    seconds, their_seconds, ratio = compare(lambda: frechet_distance(a, b), theirs, repeats)
    name = f"distance of {NUM_FEATURES} features ({name}), against sqrtm"
    print(
        ROW.format(
            name, f"{seconds:.2f} s", f"{their_seconds:.2f} s", f"{ratio:.3f}", "at most 0.333"
        )
    )


def peak_memory(keeps_all: bool) -> float:
    """Accumulate random features; give the megabytes that it took. For a process of its own."""

    def extract(pixels: Tensor) -> Features:
        return Features(torch.randn(len(pixels), NUM_FEATURES), None)

    extractor = Extractor("random", "fd", {}, nn.Identity(), False, extract)
    collector = Collector(extractor, ["kid"] if keeps_all else ["fd"])
    pixels = torch.zeros(BATCH_SIZE, 3, 1, 1, dtype=torch.uint8)
    before = _peak()
    for start in range(0, NUM_IMAGES, BATCH_SIZE):
        collector.add(pixels[: NUM_IMAGES - start])
    found: Moments = collector.finish().moments
    assert found.num_images == NUM_IMAGES
    return (_peak() - before) / MEGABYTE


def _peak() -> int:
    """Give the highest memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory() -> None:
    """Compare sums alone with keeping all features, as KID needs them."""
    sizes = []
    for keeps_all in (False, True):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            sizes.append(pool.submit(peak_memory, keeps_all).result())
    name = f"memory of {NUM_IMAGES:,} x {NUM_FEATURES}: sums, against all for KID"
    ours, theirs = sizes
    print(ROW.format(name, f"{ours:.0f} MB", f"{theirs:.0f} MB", f"{ours / theirs:.3f}", ""))


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    print(ROW.format("", "ours", "other", "ratio", "target"))
    memory()  # first: a process starts with its parent's peak
    extraction(make_extractor("efficientnet-lite0"), repeats=25)
    with tempfile.TemporaryDirectory() as folder:  # its real weights would take as long
        weights = Path(folder) / "weights.pth"
        extraction(make_extractor("inception", weights, write_inception(weights, True)), repeats=3)
    solve("more images", 4096, repeats=3)
    solve("fewer images", 1000, repeats=3)


if __name__ == "__main__":
    main()
