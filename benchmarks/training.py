"""The whole training step against diffusers'."""

import inspect
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import Row, alternate, make_row, own_process, rates
from benchmarks.peers import CPU, DiffusersStep
from ddpm_lightning import DDPM, UNet
from ddpm_lightning.allocator import keep_freed_memory
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.randomness import to_device
from tests.parity.networks import diffusers_unet

NUM_IMAGES = 512
SITTINGS = 5
"""Times that both sides' processes are started: where a process finds its memory, it keeps to it,
and two sittings of the same code differ by up to a tenth."""
LEARNING_RATE = 2e-4

CIFAR10 = (3, 3, 128, (1, 2, 2, 2), 2, (1,), 0.1)
"""The paper's network (Ho et al. 2020, appendix B)."""
SMALL = (1, 1, 32, (1, 2, 2), 1, (2,), 0.0, 0, 1)  # 32 groups in all norms, as diffusers has


def network_options(arguments: tuple[Any, ...]) -> list[str]:
    """Give the options of `fit` for a network of such arguments."""
    return [
        f"--model.net.{name}={list(value) if isinstance(value, tuple) else value}"
        for name, value in zip(inspect.signature(UNet).parameters, arguments, strict=False)
    ]


def make_pixels(size: int, channels: int) -> NDArray[np.uint8]:
    """Draw uint8 [N, H, W, C]: what is in the images does not matter here."""
    shape = (NUM_IMAGES, size, size, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder: Path, pixels: NDArray[np.uint8]) -> Path:
    """Write PNGs of uint8 [N, H, W, C] to a folder below this one, and name it."""
    source = folder / "images"
    source.mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image.squeeze()).save(source / f"{index:05}.png")
    return source


class OurStep:
    """One training step: data, noise, loss, clipping, optimizer, EMA, as `fit` takes it.

    Args:
        net: The network.
        pixels: See `make_pixels`.
        batch_size: Images in a step.
        device: Where the step is taken.
        dtype: The network's precision; below float32 by autocast.
        optimizer: Makes it from the parameters.
    """

    def __init__(
        self,
        net: UNet,
        pixels: NDArray[np.uint8],
        batch_size: int,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=LEARNING_RATE),
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()  # images and their cache, to the end
        folder = Path(self._folder.name)
        source = write_images(folder, pixels)
        data = ImageDataModule(
            str(source), batch_size=batch_size, flip=True, val_fraction=0, cache_dir=str(folder)
        )
        data.prepare_data()
        self._device = device
        self._autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self._model = DDPM(net, schedule="linear", prediction="noise").train().to(device)
        self._batches = iter(data.train_dataloader())
        self._parameters = list(net.parameters())
        self._optimizer = optimizer(self._parameters)
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    def __call__(self) -> None:
        """Take it."""
        batch = next(self._batches)
        batch = batch._replace(images=to_device(batch.images, self._device))
        with self._autocast:
            losses, _ = self._model.losses(batch, seed=0)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        parameters = [parameter.detach() for parameter in self._parameters]
        torch._foreach_lerp_(self._average, parameters, 1e-4)


def our_step(
    arguments: tuple[Any, ...],
    batch_size: int,
    size: int,
    channels_last: bool = False,
    fused: bool | None = None,
    device: torch.device = CPU,
) -> OurStep:
    """Make this project's side; `fit` too changes how memory is freed.

    Args:
        arguments: The network's.
        batch_size: Images in a step.
        size: Of the images.
        channels_last: As `fit --model.channels_last`.
        fused: As `fit --model.optimizer.fused`.
        device: Where the steps are taken.
    """
    keep_freed_memory()
    net = UNet(*arguments)
    if channels_last:
        net.to(memory_format=torch.channels_last)

    adam = partial(torch.optim.Adam, lr=LEARNING_RATE, fused=fused)
    return OurStep(net, make_pixels(size, net.in_channels), batch_size, device, optimizer=adam)


def diffusers_step(arguments: tuple[Any, ...], batch_size: int, size: int) -> DiffusersStep:
    """Make diffusers' side."""
    net = UNet(*arguments)
    return DiffusersStep(diffusers_unet(net), make_pixels(size, net.in_channels), batch_size)


def _compare(
    name: str,
    what: str,
    arguments: tuple[Any, ...],
    batch_size: int,
    size: int,
    steps: int,
    target: float,
    runs: int,
    budget: float,
    channels_last: bool,
) -> Row:
    rounds: list[tuple[float, float]] = []
    for _ in range(SITTINGS):
        with (
            own_process(our_step, arguments, batch_size, size, channels_last, True) as ours,
            own_process(diffusers_step, arguments, batch_size, size) as peer,
        ):
            turns = partial(ours, steps), partial(peer, steps)
            rounds += alternate(*turns, math.ceil(runs / SITTINGS), budget / SITTINGS)
    rows = rates(rounds, steps * batch_size)
    return make_row(name, what, "images/s", rows, "at least", target)


def train_small(runs: int, budget: float) -> Row:
    """Compare whole training steps of a network that a CPU trains."""
    what = "training step (Adam fused) against diffusers', 28x28, 32-64-64 channels, batch 64"
    return _compare("train-small", what, SMALL, 64, 28, 3, 1.4, runs, budget, False)


def train_large(runs: int, budget: float) -> Row:
    """Compare whole training steps of the paper's network."""
    what = (
        "training step (channels_last, Adam fused) against diffusers', the paper's CIFAR-10 "
        "network, batch 16"
    )
    return _compare("train-large", what, CIFAR10, 16, 32, 1, 1.2, runs, budget, True)
