"""Small training runs, and what several test files look at in them."""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch import Tensor, nn

from ddpm_lightning import UNet
from ddpm_lightning.callbacks import AtomicCheckpointIO
from ddpm_lightning.checkpoints import content_sha256
from ddpm_lightning.cli import TRAINER_DEFAULTS
from ddpm_lightning.cli import main as cli_main
from ddpm_lightning.commands.shell import logger
from ddpm_lightning.data.batches import Batch
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.diffusion.timesteps import draw_timesteps
from ddpm_lightning.module import DDPM
from ddpm_lightning.randomness import Stream, hash_indices

Net = TypeVar("Net", bound=nn.Module)

NUM_TIMESTEPS = 20


class BufferedUNet(UNet):
    """A user's network with a buffer, which DDP sends around at each pass, in validation too."""

    def __init__(
        self,
        base_channels: int = 64,
        channel_mults: Sequence[int] = (1,),
        attention_levels: Sequence[int] = (),
        num_classes: int = 0,
    ) -> None:
        super().__init__(
            1, 1, base_channels, channel_mults, 1, attention_levels, num_classes=num_classes
        )
        self.register_buffer("count", torch.ones(3), persistent=False)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        assert len(x), "an empty batch"
        return super().forward(x, t, labels)


def tiny_net(dropout: float = 0.0) -> UNet:
    """A U-Net of one level, its weights redrawn: at its own initialisation it is almost zero."""
    net = UNet(1, 1, 32, (1,), 1, (), dropout)
    return redraw(net)


def redraw(net: Net, seed: int = 0) -> Net:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return net


def tiny_module(net: nn.Module | None = None, **options: Any) -> DDPM:
    options = {
        "schedule": "linear",
        "prediction": "noise",
        "num_timesteps": NUM_TIMESTEPS,
        "lr_warmup_steps": 2,
        "optimizer": lambda params: torch.optim.Adam(params, lr=1e-3),
        **options,
    }
    return DDPM(tiny_net() if net is None else net, **options)


def make_data(pictures: Path, **options: Any) -> ImageDataModule:
    """The fixture `pictures` as batches of 8."""
    options = {"batch_size": 8, "flip": True, **options}
    return ImageDataModule(str(pictures), cache_dir=str(pictures.parent / "cache"), **options)


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """A Trainer as `fit` makes it, but silent; options are the Trainer's."""
    own = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "plugins": [AtomicCheckpointIO()],
        "callbacks": list(callbacks),
        "default_root_dir": folder,
    }
    return Trainer(**{**TRAINER_DEFAULTS, **own, **options})


class Recorder(Callback):
    """Keeps what passes by after each micro-batch; put it after the callbacks that it observes."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[Tensor] = []
        self.t: list[Tensor] = []
        self.positions: list[int] = []
        self.weights: list[Tensor] = []
        self.grad_norms: list[float] = []
        self.events: list[tuple[str, int]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.initial = flat_weights(pl_module.net)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(trainer.global_step)
        self.losses.append(outputs["losses"])
        self.t.append(outputs["t"])
        self.positions += batch.positions.tolist()
        self.weights.append(flat_weights(pl_module.net))
        self.grad_norms.append(0.0 if pl_module.grad_norm is None else float(pl_module.grad_norm))
        self.events.append(("batch", trainer.global_step))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.events.append(("validation", trainer.global_step))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        self.events.append(("save", trainer.global_step))

    def at(self, kind: str) -> list[int]:
        """The steps at which something happened."""
        return [step for name, step in self.events if name == kind]


class MemoryLogger(Logger):
    """Keeps scalars as {tag: {step: value}}."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[str, dict[int, float]] = {}

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        for tag, value in metrics.items():
            assert step not in self.scalars.setdefault(tag, {}), f"{tag} logged twice at {step}"
            self.scalars[tag][step] = value

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None: ...


def flat_weights(net: nn.Module) -> Tensor:
    """All parameters as one float64 vector, a copy."""
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


def flat_state(state: dict[str, Tensor]) -> Tensor:
    """The same of a state_dict."""
    return torch.cat([value.double().flatten() for value in state.values()])


def loss_by_hand(net: nn.Module, image: Tensor, position: int, seed: int) -> Tensor:
    """The loss of one uint8 [C, H, W], from the paper's equations and its own three draws."""
    key = int(hash_indices(seed, Stream.NOISE, [position])[0]) % 2**32
    noise = torch.empty(image.shape).normal_(generator=torch.Generator().manual_seed(key))
    t = draw_timesteps(seed, positions(position), NUM_TIMESTEPS)
    betas = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)
    alpha_cumprod = (1 - betas)[: int(t) + 1].prod()
    x_0 = image.float() / 127.5 - 1
    x_t = (alpha_cumprod.sqrt() * x_0 + (1 - alpha_cumprod).sqrt() * noise).float()
    loss: Tensor = ((noise - net(x_t[None], t)[0]) ** 2).mean()
    return loss


def positions(*values: int) -> Any:
    return torch.tensor(values).numpy()


def batch_of(num_images: int, first: int = 0, seed: int = 0) -> Batch:
    """Random 8 x 8 images at consecutive positions."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num_images, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Batch(images, positions(*range(first, first + num_images)))


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint that was changed on purpose, with the digest of what it now holds."""
    checkpoint["content_sha256"] = content_sha256(checkpoint)
    torch.save(checkpoint, path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint as anyone would."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def assert_same(ours: Any, theirs: Any, at: str = "") -> None:
    """Two nests of dicts, lists, tensors and plain values are equal to the last bit."""
    assert type(ours) is type(theirs), at
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), at
        for key in ours:
            assert_same(ours[key], theirs[key], f"{at}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), at
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{at}.{index}")
    elif isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype, at
        assert torch.equal(ours, theirs), at
    else:
        assert ours == theirs, at


TRAINED = ("global_step", "state_dict", "ema_state_dict", "optimizer_states", "lr_schedulers")


def assert_same_training(ours: Path, theirs: Path) -> None:
    """Two checkpoints hold the same weights, averages, moments and learning rate, bit for bit."""
    one, other = load(ours), load(theirs)
    for key in TRAINED:
        assert_same(one[key], other[key], key)


def events(run: Path) -> EventAccumulator:
    """TensorBoard's reading of a run's folder."""
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def scalars(run: Path, tag: str) -> dict[int, float]:
    """A curve of a run as {step: value}; a step that is there twice fails."""
    points = [(event.step, event.value) for event in events(run).Scalars(tag)]
    assert len(points) == len(dict(points)), f"{tag} has a step twice: {points}"
    return dict(points)


@contextmanager
def command_line(*arguments: object) -> Iterator[None]:
    """The command line of this process; what a command does to its logger is undone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ddpm_lightning", *map(str, arguments)])
        patch.setattr(logger, "handlers", logger.handlers)
        patch.setattr(logger, "propagate", logger.propagate)
        yield


def fit_here(*arguments: object) -> None:
    """Run `fit` in this process; for one device only, since others would start pytest again."""
    with command_line("fit", *arguments):
        assert cli_main() == 0
