"""How the time of `fit`'s steps divides: `python -m benchmarks.breakdown` prints a table."""

import argparse
import re
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.profilers import Profiler

from benchmarks.quality import EXPERIMENT, SOURCE
from benchmarks.training import CIFAR10, SMALL, make_pixels, network_options, write_images
from ddpm_lightning import __main__ as command_line

WARM_UP = 5
"""Steps that do not count."""
NEXT_STEP = "[_TrainingEpochLoop].train_dataloader_next"
PARTS = {
    "data": r"train_dataloader_next|batch_to_device|transfer_batch",
    "forward": r"\[Strategy\]\w+\.training_step$",
    "backward": r"\[Strategy\]\w+\.backward$",
    "clip": r"configure_gradient_clipping",
    "optimizer": r"optimizer_step$|optimizer_zero_grad$",
    "EMA": r"\[Callback\]EMA",
    "logging": r"\[Callback\](Curves|Progress)",
}
"""By what Lightning calls the actions that it times, less those within them."""


class Timed(NamedTuple):
    """What is measured.

    Attributes:
        name: Of the network.
        batch_size: Images in a step.
        steps: That count; the curves take a point at each 25th or 50th.
        shape: Of images that are made for it, C and H = W; None where the options name some.
        options: Of `fit`.
    """

    name: str
    batch_size: int
    steps: int
    shape: tuple[int, int] | None
    options: list[str]


SUBJECTS = (
    Timed(
        "28x28, 32-64-64 channels, Adam fused",
        64,
        50,
        (1, 28),
        [*network_options(SMALL), "--model.optimizer.fused=true"],
    ),
    Timed(
        "the paper's for CIFAR-10, channels last, Adam fused",
        16,
        25,
        (3, 32),
        [*network_options(CIFAR10), "--model.optimizer.fused=true", "--model.channels_last=true"],
    ),
    Timed(
        f"{EXPERIMENT}, by Muon",
        32,
        100,
        None,
        [f"--config={EXPERIMENT}", f"--data.source={SOURCE}", "--trainer.limit_val_batches=0"],
    ),
)
MADE: list["Parts"] = []
"""The profiler that `fit` makes from options."""


class Parts(Profiler):
    """Sums the seconds of each part of a step, each without what is timed within it.

    Args:
        steps: That count.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self._steps = range(WARM_UP, WARM_UP + steps)
        self._step = -1
        self._began = 0.0
        self._open: list[list[float]] = []  # when each action began, and the seconds within it
        MADE.append(self)

    def start(self, action_name: str) -> None:
        """Begin an action, of which the first in a step fetches its batch."""
        now = time.perf_counter()
        if action_name == NEXT_STEP:
            self._step += 1
            if self._step == self._steps.start:
                self._began = now
            elif self._step == self._steps.stop:
                rest = now - self._began - sum(self.seconds.values())
                self.seconds["rest"] = rest
        self._open.append([now, 0.0])

    def stop(self, action_name: str) -> None:
        """End it."""
        began, within = self._open.pop()
        seconds = time.perf_counter() - began
        if self._open:
            self._open[-1][1] += seconds
        part = next((part for part, names in PARTS.items() if re.search(names, action_name)), None)
        if part is not None and self._step in self._steps:
            self.seconds[part] += seconds - within


def measure(subject: Timed) -> dict[str, float]:
    """Give the seconds of a step by part; for a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        data = []
        if subject.shape is not None:
            channels, size = subject.shape
            source = write_images(Path(folder), make_pixels(size, channels))
            data = [f"--data.source={source}", "--data.val_fraction=0", "--data.flip=true"]
        sys.argv[1:] = [
            "fit",
            *subject.options,
            *data,
            f"--data.batch_size={subject.batch_size}",
            f"--data.cache_dir={folder}",
            "--samples.every_n_steps=0",
            "--fid.every_n_steps=0",
            f"--trainer.max_steps={WARM_UP + subject.steps + 1}",
            f"--trainer.profiler={Parts.__module__}.Parts",  # by -m it is not benchmarks.breakdown
            f"--trainer.profiler.steps={subject.steps}",
            f"--run_dir={folder}/run",
        ]
        assert command_line.main() == 0
    (parts,) = MADE
    return {part: seconds / subject.steps for part, seconds in parts.seconds.items()}


def main() -> None:
    """Print a table for docs/benchmarks.md."""
    argparse.ArgumentParser(prog="python -m benchmarks.breakdown", description=__doc__).parse_args()
    rows = []
    for subject in SUBJECTS:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found = pool.submit(measure, subject).result()
        whole = sum(found.values())
        shares = " | ".join(f"{100 * found[part] / whole:.1f} %" for part in (*PARTS, "rest"))
        rows.append(f"| {subject.name} | {subject.batch_size} | {whole:.3g} | {shares} |")
    heads = ("network", "batch", "a step, s", *PARTS, "rest")
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows, sep="\n")


if __name__ == "__main__":
    main()
