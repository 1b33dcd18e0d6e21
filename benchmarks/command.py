"""What `fit` and sampling add to what cannot be avoided."""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.harness import (
    SHORT,
    Action,
    Row,
    alternate,
    make_row,
    own_process,
    rates,
    seconds_of,
    wait_for_device,
)
from benchmarks.peers import CPU
from benchmarks.training import (
    SITTINGS,
    SMALL,
    make_pixels,
    network_options,
    our_step,
    write_images,
)
from ddpm_lightning import DDPM, UNet
from ddpm_lightning import __main__ as command_line
from ddpm_lightning.allocator import keep_freed_memory
from ddpm_lightning.randomness import NoiseStreams
from ddpm_lightning.samplers import DDPMSampler

BATCH_SIZE, SIZE = 64, 28
NUM_STEPS = 5  # of a chain


def start(runs: int, budget: float) -> Row:
    """Compare the time to the first step of the digits experiment with that of bare imports."""
    with tempfile.TemporaryDirectory() as folder:

        def fit() -> None:
            callback = "--trainer.callbacks=benchmarks.first_step.EndsAtFirstStep"
            options = ["fit", f"--run_dir={tempfile.mkdtemp(dir=folder)}/run", callback]
            _call("-m", "ddpm_lightning", *options)

        rounds = alternate(fit, lambda: _call("-c", "import torch, lightning"), runs, budget)
    what = "`fit` to the end of its first step, against `import torch, lightning`"
    return make_row("start", what, "s", rounds, "at most", 2)


def _call(*arguments: str) -> None:
    null = subprocess.DEVNULL
    subprocess.run([sys.executable, *arguments], check=True, stdout=null, stderr=null)


PEERS: list[Callable[[int], None]] = []
ROUNDS: list[tuple[float, float]] = []
"""Of `Turns`, which `fit` makes from options: the peer, and the seconds a step."""


class Turns(Callback):
    """Takes turns with a peer: some steps of the Trainer, then as many of the peer's.

    Args:
        steps: In a turn.
        runs: Rounds, after one that does not count.
        budget: Seconds after which no further round begins.
    """

    def __init__(self, steps: int, runs: int, budget: float) -> None:
        self._steps = steps
        self._runs = runs
        self._end = time.perf_counter() + budget
        self._num_turns = 0
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the first turn."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a turn, let the peer have its own, and start the next."""
        if trainer.global_step % self._steps:
            return
        wait_for_device()
        ours = time.perf_counter() - self._start
        theirs = seconds_of(lambda: PEERS[0](self._steps))
        if self._num_turns:
            ROUNDS.append((ours / self._steps, theirs / self._steps))
        self._num_turns += 1
        is_late = len(ROUNDS) >= 2 and time.perf_counter() > self._end
        trainer.should_stop = len(ROUNDS) == self._runs or is_late
        self._start = time.perf_counter()


def trainer_cost(runs: int, budget: float, device: torch.device = CPU, steps: int = 2) -> Row:
    """Compare so many steps of `fit` with those of a bare loop, each side started several times."""
    rounds: list[tuple[float, float]] = []
    num_rounds = math.ceil(3 * runs / SITTINGS)
    for _ in range(SITTINGS):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            sitting = pool.submit(_sit, num_rounds, budget / SITTINGS, device, steps)
            rounds += sitting.result()
    what = "a step of `fit` against one of a bare loop, 28x28, 32-64-64 channels, batch 64"
    return make_row("trainer-cost", what, "s", rounds, "at most", 1.02)


def _sit(
    num_rounds: int, budget: float, device: torch.device, steps: int
) -> list[tuple[float, float]]:
    """Take so many rounds of `fit`, in this process, and of a bare loop, in one of its own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        own_process(our_step, SMALL, BATCH_SIZE, SIZE, False, None, device) as bare,
    ):
        source = write_images(Path(folder), make_pixels(SIZE, SMALL[0]))
        PEERS.append(bare)
        sys.argv[1:] = [
            "fit",
            *network_options(SMALL),
            "--model.schedule=linear",
            "--model.prediction=noise",
            f"--data.source={source}",
            f"--data.cache_dir={folder}",
            f"--data.batch_size={BATCH_SIZE}",
            "--data.val_fraction=0",
            "--data.flip=true",
            "--fid.every_n_steps=0",
            "--samples.every_n_steps=0",
            "--trainer.max_steps=1000000",
            f"--trainer.accelerator={device.type}",
            "--trainer.devices=1",
            "--trainer.callbacks=benchmarks.command.Turns",
            f"--trainer.callbacks.steps={steps}",
            f"--trainer.callbacks.runs={num_rounds}",
            f"--trainer.callbacks.budget={budget}",
            f"--run_dir={folder}/run",
        ]
        assert command_line.main() == 0
    return ROUNDS


def sampling(is_ours: bool, device: torch.device = CPU) -> Action:
    """Make a chain of ancestral sampling, or of calls of the bare network alone."""
    keep_freed_memory()  # as every command does
    net = UNet(*SMALL)
    model = DDPM(net, image_shape=(SMALL[0], SIZE, SIZE)).eval().to(device)
    sampler = DDPMSampler(num_steps=NUM_STEPS)
    x_t = NoiseStreams(range(BATCH_SIZE), device).normal((SMALL[0], SIZE, SIZE))
    visited = np.linspace(999, 0, NUM_STEPS).astype(int)
    timesteps = [torch.full((BATCH_SIZE,), t, device=device) for t in visited]

    @torch.no_grad()
    def bare() -> None:
        for t in timesteps:
            net(x_t, t)

    return (lambda: model.sample(range(BATCH_SIZE), sampler)) if is_ours else bare


def sampler_cost(runs: int, budget: float) -> Row:
    """Compare evaluations a second of sampling with those of the bare network in a loop."""
    ours, bare = sampling(True), sampling(False)
    rounds = rates(alternate(ours, bare, SHORT * runs, budget), NUM_STEPS * BATCH_SIZE)
    what = "ancestral sampling, images times evaluations, against the bare network in a loop"
    return make_row("sampler-cost", what, "images/s", rounds, "at least", 0.97)
