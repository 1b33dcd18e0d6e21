"""Pictures while it trains."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from ddpm_lightning.callbacks.curves import aside
from ddpm_lightning.callbacks.ema import EMA
from ddpm_lightning.callbacks.neighbours import TrainingNeighbours
from ddpm_lightning.callbacks.shared import (
    TrainerRanks,
    find_callback,
    log_scalars,
    make_run_folder,
    run_folder,
    sampler_options,
)
from ddpm_lightning.callbacks.signals import Interrupted, check_signals, is_stopping
from ddpm_lightning.data.batches import Batch, ImageSet
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import (
    channel_statistics,
    make_class_grid,
    make_grid,
    to_uint8,
    write_png,
)
from ddpm_lightning.module import DDPM
from ddpm_lightning.samplers import SamplerName, make_guidance, make_sampler

STRIP_IMAGES = 4
STRIP_STEPS = 10


class Samples(Callback):
    """Draw a grid from fixed seeds every so many steps and at the end; each rank draws its share.

    The grid of the averaged weights (the raw ones', where there is no average) is written to
    RUN/samples/step=N.png. TensorBoard gets it too, with the raw weights' grid, a strip of x_t and
    pred_x_0 along the chain, the channels' mean and standard deviation beside the data's, and
    samples above the training images nearest to them (see `TrainingNeighbours`). Training goes on
    as if nothing had been drawn: no global random state is touched.

    Args:
        every_n_steps: Optimizer steps from grid to grid; 0 draws none at all.
        num_images: Images in the grid, from seeds 0, 1, ...
        sampler: Its name.
        num_steps: Timesteps to visit; None is the sampler's default.
        spacing: Which timesteps those are, as `sample` has it; None is the sampler's default.
        num_train: Training images that samples are compared with; 0 compares none, and so does a
            stream, from which they would be read again for each grid.
        guidance: How strongly images are drawn towards their classes, in a grid with a row for each
            class; None, which is 1, for a network without classes.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        num_images: int = 64,
        sampler: SamplerName = "ddim",
        num_steps: int | None = None,
        spacing: str | None = None,
        num_train: int = 10_000,
        guidance: float | None = None,
    ) -> None:
        if min(every_n_steps, num_train) < 0 or num_images < 1:
            raise InputError(
                "samples.every_n_steps and samples.num_train must be at least 0, "
                "samples.num_images 1"
            )
        self.every_n_steps = every_n_steps
        self.num_images = num_images
        with sampler_options("samples"):
            self.sampler = make_sampler(sampler, num_steps, spacing=spacing)
            self.guidance = make_guidance(guidance, rescale=None)
        self._neighbours = TrainingNeighbours(num_train) if num_train else None
        self.latest: Path | None = None
        self._step = 0
        self._drawn_step = 0
        self._is_owed = False

    def state_dict(self) -> dict[str, Any]:
        """Tell whether a signal came before the grid of the checkpoint's step was drawn."""
        return {"is_owed": self._is_owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what is owed."""
        self._is_owed = state_dict["is_owed"]

    def check(self, model: DDPM) -> None:
        """Refuse early what cannot be drawn.

        Raises:
            InputError: The schedule has not the sampler's timesteps, or the network cannot be
                guided.
        """
        if self.every_n_steps:
            with sampler_options("samples"):
                self.sampler.respace(model.process)
                model.check_guidance(self.guidance)

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Note the step that a resumed run goes on from, and refuse impossible options early."""
        self._step = trainer.global_step
        make_run_folder(trainer)
        is_owed, self._is_owed = self._is_owed, False
        self.check(pl_module)
        if self.every_n_steps and is_owed:
            self._draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DDPM, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Draw where a grid is due."""
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if self.every_n_steps and stepped and self._step % self.every_n_steps == 0:
            with aside(trainer):
                self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Draw the last step, if that has not just been done."""
        if self.every_n_steps and trainer.global_step and self._drawn_step != trainer.global_step:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Draw, unless a signal comes before it is done: then it is owed."""
        self._drawn_step = trainer.global_step
        self._is_owed = True
        if is_stopping(trainer):
            return
        with suppress(Interrupted):
            self._draw_all(trainer, pl_module)
            self._is_owed = False

    def _draw_all(self, trainer: Trainer, pl_module: DDPM) -> None:
        ema = find_callback(trainer, EMA)
        raw, strip = self._sample(trainer, pl_module)
        grids = {"raw": raw}
        if ema is not None and ema.is_active:
            with ema.scope(pl_module):
                grids["ema"], strip = self._sample(trainer, pl_module)
        if trainer.is_global_zero:
            self._write(trainer, grids, strip, pl_module.labels_of(range(self.num_images)))

    def _write(
        self,
        trainer: Trainer,
        grids: dict[str, Tensor],
        strip: Tensor,
        labels: Sequence[int] | None,
    ) -> None:
        best = grids.get("ema", grids["raw"])
        pictures = {
            f"samples/{name}": make_class_grid(images, labels) for name, images in grids.items()
        }
        pictures["samples/denoising"] = strip
        scalars = _channel_scalars(trainer, best)
        data = trainer.datamodule  # type: ignore[attr-defined]
        is_at_hand = data is not None and isinstance(data.train_images, ImageSet)
        if self._neighbours is not None and is_at_hand:
            compared = self._neighbours.compare(trainer, best)
            pictures["neighbours"] = compared.picture
            scalars |= compared.scalars
        self.latest = run_folder(trainer, "samples") / f"step={trainer.global_step}.png"
        write_png(self.latest, make_class_grid(best, labels))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, picture in pictures.items():
                    logger.experiment.add_image(name, picture, trainer.global_step)
        log_scalars(trainer, scalars)

    def _sample(self, trainer: Trainer, pl_module: DDPM) -> tuple[Tensor, Tensor]:
        """Sample the grid's images, uint8 [N, C, H, W], and lay out the strip, uint8 [C, H, W].

        All ranks must call, and get both. Rank 0 alone would let the others wait for longer than
        their time-out, where images are large and chains long.

        Raises:
            Interrupted: A rank has received a signal.
        """
        ranks = TrainerRanks(trainer)
        shares: list[Tensor] = []
        with suppress(Interrupted):  # until the others know
            seeds = ranks.share(range(self.num_images))
            shares += self._sample_share(trainer, pl_module, seeds)
        if is_stopping(trainer, agree=True):
            raise Interrupted
        images, chains = (
            ranks.concatenate(rows.flatten(1)).reshape(-1, *rows.shape[1:]) for rows in shares
        )
        # a row of steps for x_t and one for pred_x_0, image by image
        cells = chains.transpose(1, 2).flatten(0, 2)
        return images, make_grid(cells, num_columns=chains.shape[1])

    def _sample_share(
        self, trainer: Trainer, pl_module: DDPM, seeds: range
    ) -> tuple[Tensor, Tensor]:
        """Sample some of the images, of which there may be none.

        Returns:
            Images, uint8 [N, C, H, W], and of those that the strip shows the way there, uint8
            [<= N, steps, 2, C, H, W]: x_t and pred_x_0.
        """
        assert pl_module.image_shape is not None
        num_steps = self.sampler.count_steps(pl_module.process)
        shown = {round(i * (num_steps - 1) / (STRIP_STEPS - 1)) for i in range(STRIP_STEPS)}
        num_chains = len(range(STRIP_IMAGES)[seeds.start : seeds.stop])
        images = torch.empty(0, *pl_module.image_shape, dtype=torch.uint8)
        columns = [images.new_empty(0, 2, *pl_module.image_shape)] * len(shown)
        if seeds:
            columns = []
            labels = pl_module.labels_of(seeds)
            chain = pl_module.denoise(seeds, self.sampler, labels=labels, guidance=self.guidance)
            for index, step in enumerate(chain):
                check_signals(trainer)
                if index in shown:
                    pair = torch.stack([step.x_prev, step.pred_x_0], dim=1)[:num_chains]
                    columns.append(to_uint8(pair).cpu())
            images = to_uint8(step.x_prev).cpu()
        return images, torch.stack(columns, dim=1)


def _channel_scalars(trainer: Trainer, images: Tensor) -> dict[str, float]:
    sources = {"samples": channel_statistics(images)}
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is not None:
        sources["data"] = data.channel_statistics
    scalars = {}
    for source, (means, stds) in sources.items():
        for channel, (mean, std) in enumerate(zip(means, stds, strict=True)):
            scalars[f"channel_{channel}/mean_{source}"] = float(mean)
            scalars[f"channel_{channel}/std_{source}"] = float(std)
    return scalars
