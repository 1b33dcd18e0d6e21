"""The numbers that one watches while it trains."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ddpm_lightning.data.datamodule import Batch
from ddpm_lightning.module import DDPM

NUM_QUARTILES = 4


class Mean:
    """A mean of values that arrive in pieces, on any number of ranks, some of which may have none.

    Args:
        num_bins: Keep so many means side by side.
    """

    def __init__(self, num_bins: int = 1) -> None:
        self._num_bins = num_bins
        self._sums: Tensor | None = None

    def add(self, values: Tensor, bins: Tensor | None = None) -> None:
        """Add values [N], each to its bin (int64 [N]; the first when None), without waiting."""
        if self._sums is None:
            self._sums = self._zeros(values.device)
        if bins is None:
            bins = torch.zeros_like(values, dtype=torch.int64)
        pieces = torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)])
        self._sums.index_add_(1, bins, pieces)

    def over_ranks(self, trainer: Trainer) -> list[float]:
        """Sum over the ranks (all must call), start anew, and give each bin's mean, then all's.

        A bin without values has the mean nan.
        """
        sums = self._sums if self._sums is not None else self._zeros(trainer.strategy.root_device)
        sums = trainer.strategy.reduce(sums, reduce_op="sum")  # type: ignore[assignment]
        self._sums = None
        sums = torch.cat([sums, sums.sum(dim=1, keepdim=True)], dim=1)
        means: list[float] = (sums[0] / sums[1]).tolist()
        return means

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(2, self._num_bins, dtype=torch.float64, device=device)


def log_scalars(trainer: Trainer, scalars: dict[str, float]) -> None:
    """Log at the optimizer step.

    Lightning's own way counts batches from 0, which would put a curve one step too early.
    """
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=trainer.global_step)


def log_evaluation(trainer: Trainer, pl_module: DDPM, name: str, losses: Mean) -> None:
    """Log a mean loss under val/ or test/, and offer it to callbacks that monitor it."""
    scalars = {f"{'test' if trainer.testing else 'val'}/{name}": losses.over_ranks(trainer)[-1]}
    if not trainer.sanity_checking:
        pl_module.log_dict(scalars, logger=False)
        log_scalars(trainer, scalars)


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

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:  # type: ignore[override]
        """Note the step that a resumed run goes on from."""
        self._step = trainer.global_step

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: DDPM, batch: Batch, batch_idx: int
    ) -> None:
        """Start the clock: validation and sampling do not count as training."""
        self._start = time.perf_counter()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: DDPM, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Add to the window, and log it where it ends."""
        quartiles = outputs["t"] * NUM_QUARTILES // pl_module.process.num_timesteps
        self._losses.add(outputs["losses"], quartiles)
        self._num_images += len(batch.positions) * trainer.world_size
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        due = stepped and (
            self._step % trainer.log_every_n_steps == 0 or self._step == trainer.max_steps
        )
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

    def on_validation_batch_end(  # type: ignore[override]
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

    def on_validation_epoch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: DDPM
    ) -> None:
        """Log `val/loss`."""
        log_evaluation(trainer, pl_module, "loss", self._val_loss)

    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
