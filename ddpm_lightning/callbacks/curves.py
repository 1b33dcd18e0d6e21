"""The numbers that one watches while it trains."""

import time
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ddpm_lightning.callbacks.shared import Mean, log_evaluation, log_scalars
from ddpm_lightning.data.datamodule import Batch
from ddpm_lightning.module import DDPM

NUM_QUARTILES = 4


class Curves(Callback):
    """Log loss (whole and by quarter of the timesteps), gradient norm, learning rate and speed.

    A window runs from one logging step to the next (`--trainer.log_every_n_steps`). The losses
    are means over all its images, on all ranks and micro-batches; the device is waited for once.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self._losses = Mean(NUM_QUARTILES)
        self._val_loss = Mean()
        self._num_images = 0
        self._seconds = 0.0
        self._start = 0.0
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Note the step that a resumed run goes on from."""
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: DDPM, batch: Batch, batch_idx: int
    ) -> None:
        """Start the clock: validation and sampling do not count as training."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DDPM, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Add to the window, and log it where it ends."""
        quartiles = outputs["t"] * NUM_QUARTILES // pl_module.process.num_timesteps
        self._losses.add(outputs["losses"], quartiles)
        self._num_images += len(batch.positions) * trainer.world_size
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        at_interval = interval and self._step % interval == 0  # 0 logs at the end only
        due = stepped and (at_interval or self._step == trainer.max_steps)
        if due:
            *quarters, loss = self._losses.over_ranks(trainer)
            assert pl_module.grad_norm is not None
            grad_norm = float(pl_module.grad_norm)
        self._seconds += time.perf_counter() - self._start  # the device was waited for
        if not due:
            return
        self.latest = {
            "train/loss": loss,
            **{f"train/loss_q{index}": value for index, value in enumerate(quarters, start=1)},
            "train/grad_norm": grad_norm,
            # the scheduler has moved on: this is the rate of the next step
            "train/lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "train/images_per_second": self._num_images / self._seconds,
        }
        log_scalars(trainer, self.latest)
        self._num_images, self._seconds = 0, 0.0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: DDPM,
        outputs: Tensor,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the losses of a batch, taken on the raw weights."""
        self._val_loss.add(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Log `val/loss`."""
        log_evaluation(trainer, pl_module, "loss", self._val_loss)

    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
