"""The whole training step against diffusers': `python -m benchmarks.training`."""

import argparse
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import Row, alternate, keep, make_row, rates, text_of
from benchmarks.peers import DiffusersStep, diffusers_unet
from ddpm_lightning import DDPM, UNet
from ddpm_lightning.commands.allocator import keep_freed_memory
from ddpm_lightning.data.datamodule import ImageDataModule

NUM_IMAGES = 512

CIFAR10 = (3, 3, 128, (1, 2, 2, 2), 2, (1,), 0.1)
"""The paper's network (Ho et al. 2020, appendix B)."""
SMALL = (1, 1, 32, (1, 2, 2), 1, (2,), 0.0)


def make_pixels(size: int, channels: int) -> NDArray[np.uint8]:
    """Draw uint8 [N, H, W, C]: what is in the images does not matter here."""
    shape = (NUM_IMAGES, size, size, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


class OurStep:
    """One training step: data, noise, loss, clipping, Adam, EMA, as `fit` takes it.

    Args:
        net: The network.
        pixels: See `make_pixels`.
        batch_size: Images in a step.
    """

    def __init__(self, net: UNet, pixels: NDArray[np.uint8], batch_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()  # images and their cache, to the end
        folder = Path(self._folder.name)
        source = folder / "images"
        source.mkdir()
        for index, image in enumerate(pixels):
            Image.fromarray(image.squeeze()).save(source / f"{index:04}.png")
        data = ImageDataModule(
            str(source), batch_size=batch_size, flip=True, val_fraction=0, cache_dir=str(folder)
        )
        data.prepare_data()
        self._model = DDPM(net, schedule="linear").train()
        self._batches = iter(data.train_dataloader())
        self._parameters = list(net.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=2e-4)
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    def __call__(self) -> None:
        """Take it."""
        losses, _ = self._model.losses(next(self._batches), seed=0)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        parameters = [parameter.detach() for parameter in self._parameters]
        torch._foreach_lerp_(self._average, parameters, 1e-4)


STEPS: list[OurStep | DiffusersStep] = []
"""The one that this process takes, where it is a process of one side."""


def prepare(is_ours: bool, arguments: tuple[object, ...], batch_size: int, size: int) -> None:
    """Make this process one side; each has its own, for `fit` changes how memory is freed."""
    net = UNet(*arguments)  # type: ignore[arg-type]
    pixels = make_pixels(size, net.in_channels)
    if is_ours:
        keep_freed_memory()
        STEPS.append(OurStep(net, pixels, batch_size))
    else:
        STEPS.append(DiffusersStep(diffusers_unet(net), pixels, batch_size))


def take(num_steps: int) -> None:
    """Take steps, in a process that has been prepared."""
    for _ in range(num_steps):
        STEPS[0]()


def training_row(
    name: str,
    what: str,
    arguments: tuple[object, ...],
    batch_size: int,
    size: int,
    steps: int,
    runs: int,
    target: float,
) -> Row:
    """Compare images a second."""
    spawn = get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn, prepare, (True, arguments, batch_size, size)) as ours,
        ProcessPoolExecutor(1, spawn, prepare, (False, arguments, batch_size, size)) as peer,
    ):
        rounds = alternate(
            lambda: ours.submit(take, steps).result(),
            lambda: peer.submit(take, steps).result(),
            runs,
        )
    rows = rates(rounds, steps * batch_size)
    return make_row(name, what, "images/s", rows, "at least", target)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    rows = []
    for row in (
        ("train-small", "28x28, 32-64-64 channels, batch 64", SMALL, 64, 28, 3, runs, 1.4),
        ("train-large", "the paper's CIFAR-10 network, batch 16", CIFAR10, 16, 32, 1, runs, 1.2),
    ):
        rows.append(training_row(*row))
        print(text_of(rows[-1]), flush=True)
    keep(rows)


if __name__ == "__main__":
    main()
