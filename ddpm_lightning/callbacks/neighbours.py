"""Does it learn by heart? Samples beside the nearest training images."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from ddpm_lightning.callbacks.curves import aside
from ddpm_lightning.callbacks.ema import EMA
from ddpm_lightning.callbacks.shared import find_callback, log_scalars
from ddpm_lightning.data.batches import ImageSet
from ddpm_lightning.data.datamodule import Batch
from ddpm_lightning.data.order import Indices
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.errors import InputError
from ddpm_lightning.labelled_grid import Group, labelled_grid
from ddpm_lightning.metrics.neighbours import Nearest, NeighbourSearch
from ddpm_lightning.module import DDPM
from ddpm_lightning.samplers import SamplerName, make_sampler

SHOWN = 8
BATCH_SIZE = 64


class Neighbours(Callback):
    """Show samples above their nearest training images every so many steps, on rank 0.

    Nearest is by pixels. TensorBoard gets the picture, and the ratio of two medians: the distance
    of samples to the nearest training image, over that of validation images. About 1 means that
    samples are as new as images that were not trained on; 0 means copies. Training goes on as if
    nothing had been drawn: no global random state is touched.

    Args:
        every_n_steps: Optimizer steps from picture to picture; 0 draws none.
        num_images: Samples of the averaged weights (the raw ones, where there is no average), from
            seeds 0, 1, ...; and validation images, or all where there are fewer.
        num_train: Training images to search, spread evenly, or all where there are fewer. Copies
            of others are not found.
        sampler: Its name.
        num_steps: Network evaluations per image; None is the sampler's default.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        num_images: int = 32,
        num_train: int = 10_000,
        sampler: SamplerName = "ddim",
        num_steps: int | None = None,
    ) -> None:
        if every_n_steps < 0 or min(num_images, num_train) < 1:
            raise InputError(
                "neighbours.every_n_steps must be at least 0, neighbours.num_images and "
                "neighbours.num_train at least 1"
            )
        self.every_n_steps = every_n_steps
        self.num_images = num_images
        self.num_train = num_train
        self.sampler = make_sampler(sampler, num_steps)
        self._distance_val: float | None = None
        self._step = 0

    def check(self, process: Process) -> None:
        """Refuse early what cannot be drawn.

        Raises:
            InputError: The schedule has not so many steps.
        """
        if self.every_n_steps:
            try:
                self.sampler.respace(process)
            except InputError as error:
                raise InputError(f"--neighbours.num_steps: {error}") from error

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Note the step that a resumed run goes on from."""
        self._step = trainer.global_step
        self.check(pl_module.process)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DDPM, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Draw where a picture is due."""
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if self.every_n_steps and stepped and self._step % self.every_n_steps == 0:
            with aside(trainer):
                self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: DDPM) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise InputError("the Neighbours callback needs a data module: it searches its images")
        samples = self._sample(trainer, pl_module)
        train = data.train_images
        chosen = _spread(train, self.num_train)
        nearest = _search(samples, train, chosen)
        distance = float(nearest.distances.quantile(0.5))
        scalars = {"neighbours/distance_samples": distance}
        if data.val_images is not None and self._distance_val is None:
            val = data.val_images
            images = torch.from_numpy(val[_spread(val, self.num_images)]).to(pl_module.device)
            self._distance_val = float(_search(images, train, chosen).distances.quantile(0.5))
        if self._distance_val:  # 0 where validation images are training images
            scalars["neighbours/distance_val"] = self._distance_val
            scalars["neighbours/ratio"] = distance / self._distance_val
        log_scalars(trainer, scalars)
        indices = chosen[nearest.indices[:SHOWN, 0].cpu().numpy()]
        picture = _picture(samples, torch.from_numpy(train[indices]), nearest, len(chosen))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("neighbours", picture, trainer.global_step)

    def _sample(self, trainer: Trainer, pl_module: DDPM) -> Tensor:
        """Sample with the best weights there are: uint8 [num_images, C, H, W]."""
        ema = find_callback(trainer, EMA)
        averaged = nullcontext() if ema is None or not ema.is_active else ema.scope(pl_module)
        with averaged:
            batches = pl_module.batches(range(self.num_images), self.sampler, BATCH_SIZE)
            return torch.cat(list(batches))


def _spread(images: ImageSet, num_images: int) -> Indices:
    """Choose at most so many images, spread evenly over the set: int64."""
    return np.linspace(0, len(images) - 1, min(num_images, len(images))).astype(np.int64)


def _search(queries: Tensor, images: ImageSet, chosen: Indices) -> Nearest:
    """Find the nearest of the chosen images, in grey levels, by their places in `chosen`."""
    search = NeighbourSearch(queries.flatten(1), 1)
    for start in range(0, len(chosen), BATCH_SIZE):
        rows = torch.from_numpy(images[chosen[start : start + BATCH_SIZE]])
        search.add(rows.to(queries.device).flatten(1))
    return search.finish().in_grey_levels(queries[0].numel())


def _picture(samples: Tensor, neighbours: Tensor, nearest: Nearest, num_train: int) -> Tensor:
    """Lay the first samples out above their neighbours, uint8 [C, height, width]."""
    num_shown = len(neighbours)
    images = torch.stack([samples[:num_shown].cpu(), neighbours])
    labels = [[""] * num_shown, [f"{d:.3g}" for d in nearest.distances[:num_shown, 0].tolist()]]
    group = Group([f"seed {seed}" for seed in range(num_shown)], images, "", labels)
    title = (
        f"Samples and the nearest of {num_train:,} training images, with their root mean square "
        "difference in grey levels"
    )
    return labelled_grid(title, ["sample", "nearest"], [group])
