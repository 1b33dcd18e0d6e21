"""Kill runs at moments drawn from a seed, and compare their ends with an undisturbed run's.

python -m tests.faults --kills 20 --seed 0
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image

from ddpm_lightning.checkpoints import load_checkpoint
from tests.fit_process import assert_same_run, start_fit

STEPS_PER_KILL = 20  # with a checkpoint at every tenth
PATIENCE = 600  # seconds until a process does what is waited for

Process = subprocess.Popen[str]


class Kill(NamedTuple):
    """Where one process began and ended."""

    number: int
    aim: str
    started_at: int | None
    step: int | None
    where: str
    whole: int | None

    def row(self) -> str:
        """Give the line of the table."""
        cells = [self.number, self.aim, self.started_at, self.step, self.where, self.whole]
        return "| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |"


HEADER = (
    "| kill | aimed at | went on from step | killed at step | where | newest whole checkpoint |\n"
    "|---|---|---|---|---|---|"
)


class Disturbed:
    """A run that is killed over and over.

    Args:
        folder: Where its folder `killed` goes.
        source: The images that it trains on.
        num_kills: How often it is killed.
        seed: What the moments are drawn from.
    """

    def __init__(self, folder: Path, source: Path, num_kills: int, seed: int) -> None:
        self._folder = folder
        self._source = source
        self._num_kills = num_kills
        self._random = random.Random(seed)
        self._checkpoints = folder / "killed" / "checkpoints"
        self._told = folder / "told"

    def start(self, name: str = "killed") -> Process:
        """Start a process that goes on where the run of this name is, if there is one."""
        told = self._told if name == "killed" else self._folder / f"told by {name}"
        told.unlink(missing_ok=True)
        return start_fit(
            self._folder,
            self._source,
            *("--run_dir", name, "--ckpt_path", "auto"),
            *("--trainer.max_steps", str(STEPS_PER_KILL * (self._num_kills + 1))),
            told=told,
        )

    def kills(self) -> Iterator[Kill]:
        """Start and kill, every other time in the middle of a checkpoint's write."""
        for number in range(self._num_kills):
            aim = "a write" if number % 2 == 0 else "a start" if number % 10 == 9 else "a step"
            # each within steps of its own, so that the run does not end before its last kill
            step = STEPS_PER_KILL * number + self._random.randint(1, STEPS_PER_KILL)
            delay = self._random.random()
            process = self.start()
            try:
                self._wait(process, aim, step, delay)
            finally:
                process.kill()
            output = process.communicate(timeout=60)[0]
            assert process.returncode == -signal.SIGKILL, output
            yield self._seen(process, number + 1, aim)

    def _wait(self, process: Process, aim: str, step: int, delay: float) -> None:
        """Return at the moment to kill."""
        if aim == "a start":
            # no later than its first step: at full speed it would use up the steps of later kills
            end = time.monotonic() + 10 * delay
            while self._steps()[1] is None and time.monotonic() < end:
                time.sleep(0.005)
            return
        end = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < end:
            _, now = self._steps()
            is_there = now is not None and now >= step
            if is_there and aim == "a step":
                time.sleep(0.05 * delay)
                return
            sizes = [size for _, size in self._parts(process)] if is_there else []
            # as soon as there is a file, or some of its bytes
            if sizes and (delay < 0.5 or max(sizes) > 0):
                return
            time.sleep(0.0002 if is_there else 0.005)

    def _seen(self, process: Process, number: int, aim: str) -> Kill:
        started_at, step = self._steps()
        parts = self._parts(process)
        where = "in training" if step is not None else "in its start"
        if parts:
            name, size = parts[0]
            where = f"in the write of {name} ({size:,} bytes of it)"
        whole = [load_checkpoint(path)["global_step"] for path in self._checkpoints.glob("*.ckpt")]
        return Kill(number, aim, started_at, step, where, max(whole, default=None))

    def _steps(self) -> tuple[int | None, int | None]:
        """The step that the process went on from, and the newest that it has begun."""
        try:
            first, now = map(int, self._told.read_text().split())
        except (FileNotFoundError, ValueError):  # not there, or nothing in it
            return None, None
        return first, now

    def _parts(self, process: Process) -> list[tuple[str, int]]:
        """Checkpoints that a process is writing, and how much of them there is."""
        if not self._checkpoints.is_dir():
            return []
        with os.scandir(self._checkpoints) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(f".part{process.pid}")]
        found = []
        for name in names:
            try:
                size = (self._checkpoints / name).stat().st_size
            except FileNotFoundError:  # written
                continue
            found.append((name[1:].partition(".part")[0], size))
        return found


def survive(folder: Path, source: Path, num_kills: int, seed: int) -> Iterator[Kill]:
    """Kill a run so often, then let it come to its end.

    Raises:
        AssertionError: Its end is not that of an undisturbed run, bit for bit.
    """
    disturbed = Disturbed(folder, source, num_kills, seed)
    whole = disturbed.start("whole")
    last = None
    try:
        yield from disturbed.kills()
        last = disturbed.start()
        for process in (last, whole):
            output = process.communicate(timeout=PATIENCE)[0]
            assert process.returncode == 0, output
    finally:
        whole.kill()
        if last is not None:
            last.kill()
    assert_same_run(folder / "killed", folder / "whole")


def main() -> int:
    """Print the table; 1 where anything differs, or a kill came too late."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.faults")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills = []
    with TemporaryDirectory() as name:
        source = Path(name) / "pictures"
        source.mkdir()
        generator = np.random.default_rng(0)
        for index in range(40):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(source / f"{index}.png")
        print(HEADER, flush=True)
        try:
            for kill in survive(Path(name), source, options.kills, options.seed):
                print(kill.row(), flush=True)
                kills.append(kill)
        except AssertionError:
            traceback.print_exc()
            print(f"error: FAILED after {len(kills)} kills", file=sys.stderr)
            return 1
    num_in_writes = sum(kill.where.startswith("in the write") for kill in kills)
    print(
        f"{len(kills)} kills, {num_in_writes} of them in the middle of a checkpoint's write: "
        "weights, average, optimizer state and curves are those of the undisturbed run, "
        "bit for bit"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
