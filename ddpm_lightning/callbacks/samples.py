"""Pictures while it trains."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from ddpm_lightning.callbacks.curves import aside
from ddpm_lightning.callbacks.ema import EMA
from ddpm_lightning.callbacks.shared import (
    find_callback,
    log_scalars,
    make_run_folder,
    run_folder,
    sampler_options,
)
from ddpm_lightning.callbacks.signals import Interrupted, check_signals, is_stopping
from ddpm_lightning.data.datamodule import Batch
from ddpm_lightning.diffusion.process import Process
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import channel_statistics, make_grid, to_uint8, write_png
from ddpm_lightning.module import DDPM
from ddpm_lightning.samplers import SamplerName, make_sampler

STRIP_IMAGES = 4
STRIP_STEPS = 10


class Samples(Callback):
    """Draw a grid from fixed seeds every so many steps and at the end, on rank 0.

    The grid of the averaged weights (the raw ones', where there is no average) is written to
    RUN/samples/step=N.png. TensorBoard gets it too, with the raw weights' grid, a strip of x_t and
    pred_x_0 along the chain, and the channels' mean and standard deviation beside the data's.
    Training goes on as if nothing had been drawn: no global random state is touched.

    Args:
        every_n_steps: Optimizer steps from grid to grid; 0 draws none at all.
        num_images: Images in the grid, from seeds 0, 1, ...
        sampler: Its name.
        num_steps: Timesteps to visit; None is the sampler's default.
        spacing: Which timesteps those are, as `sample` has it; None is the sampler's default.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        num_images: int = 64,
        sampler: SamplerName = "ddim",
        num_steps: int | None = None,
        spacing: str | None = None,
    ) -> None:
        if every_n_steps < 0 or num_images < 1:
            raise InputError("samples.every_n_steps must be at least 0, samples.num_images 1")
        self.every_n_steps = every_n_steps
        self.num_images = num_images
        with sampler_options("samples"):
            self.sampler = make_sampler(sampler, num_steps, spacing=spacing)
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

    def check(self, process: Process) -> None:
        """Refuse early what cannot be drawn.

        Raises:
            InputError: The schedule has not the sampler's timesteps.
        """
        if self.every_n_steps:
            with sampler_options("samples"):
                self.sampler.respace(process)

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Note the step that a resumed run goes on from, and refuse impossible options early."""
        self._step = trainer.global_step
        make_run_folder(trainer)
        is_owed, self._is_owed = self._is_owed, False
        self.check(pl_module.process)
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
        """Draw on rank 0, unless a signal comes before it is done: then it is owed."""
        self._drawn_step = trainer.global_step
        self._is_owed = True
        if is_stopping(trainer):
            return
        with suppress(Interrupted):
            if trainer.is_global_zero:
                self._draw_here(trainer, pl_module)
            self._is_owed = False
        is_stopping(trainer, agree=True)

    def _draw_here(self, trainer: Trainer, pl_module: DDPM) -> None:
        ema = find_callback(trainer, EMA)
        raw, strip = self._sample(trainer, pl_module)
        grids = {"raw": raw}
        if ema is not None and ema.is_active:
            with ema.scope(pl_module):
                grids["ema"], strip = self._sample(trainer, pl_module)
        best = grids.get("ema", raw)

        self.latest = run_folder(trainer, "samples") / f"step={trainer.global_step}.png"
        write_png(self.latest, make_grid(best))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, images in grids.items():
                    logger.experiment.add_image(
                        f"samples/{name}", make_grid(images), trainer.global_step
                    )
                logger.experiment.add_image("samples/denoising", strip, trainer.global_step)
        log_scalars(trainer, _channel_scalars(trainer, best))

    def _sample(self, trainer: Trainer, pl_module: DDPM) -> tuple[Tensor, Tensor]:
        """Sample the grid's images, uint8 [N, C, H, W], and lay out the strip, uint8 [C, H, W]."""
        num_steps = self.sampler.count_steps(pl_module.process)
        shown = {round(i * (num_steps - 1) / (STRIP_STEPS - 1)) for i in range(STRIP_STEPS)}
        columns: list[Tensor] = []
        step = None
        for index, step in enumerate(pl_module.denoise(range(self.num_images), self.sampler)):
            check_signals(trainer)
            if index in shown:
                pair = torch.stack([step.x_prev, step.pred_x_0], dim=1)[:STRIP_IMAGES]
                columns.append(to_uint8(pair).cpu())
        assert step is not None
        # [images, x_t and pred_x_0, steps, C, H, W]: a row of steps for each of the two
        cells = torch.stack(columns, dim=2).flatten(0, 2)
        return to_uint8(step.x_prev).cpu(), make_grid(cells, num_columns=len(columns))


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
