"""Bits/dim of test images."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from tqdm import tqdm

from ddpm_lightning.bars import bar_options
from ddpm_lightning.callbacks.ema import EMA
from ddpm_lightning.callbacks.shared import Mean, find_callback, log_evaluation
from ddpm_lightning.data.datamodule import Batch
from ddpm_lightning.errors import InputError
from ddpm_lightning.module import DDPM


class Likelihood(Callback):
    """Log the variational bound of test images, with all its terms, when `test` runs.

    It is `test/bits_per_dim` for the raw weights and `test/bits_per_dim_ema` for the averaged ones.

    Args:
        num_images: The first so many test images, each of which takes as many evaluations of the
            network as there are timesteps; 0 for none.
    """

    def __init__(self, num_images: int = 32) -> None:
        if num_images < 0:
            raise InputError(f"--likelihood.num_images {num_images}: must be at least 0")
        self.num_images = num_images
        self._raw = Mean()
        self._averaged = Mean()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: DDPM,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the bound of those images of a batch that are among the first."""
        count = int((batch.positions < self.num_images).sum())  # positions rise
        if not count:
            return
        labels = None if batch.labels is None else batch.labels[:count]
        batch = Batch(batch.images[:count], batch.positions[:count], labels)
        self._add(self._raw, trainer, pl_module, batch, "raw")
        ema = find_callback(trainer, EMA)
        if ema is not None and ema.is_active:
            with ema.scope(pl_module):
                self._add(self._averaged, trainer, pl_module, batch, "ema")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Log the means."""
        if not self.num_images:
            return
        log_evaluation(trainer, pl_module, "bits_per_dim", self._raw)
        ema = find_callback(trainer, EMA)
        if ema is not None and ema.is_active:
            log_evaluation(trainer, pl_module, "bits_per_dim_ema", self._averaged)

    def _add(
        self, mean: Mean, trainer: Trainer, pl_module: DDPM, batch: Batch, weights: str
    ) -> None:
        bar = tqdm(
            total=pl_module.process.num_timesteps,
            desc=f"bits/dim of images {batch.positions[0]}-{batch.positions[-1]} ({weights})",
            leave=False,
            disable=not trainer.is_global_zero,
            **bar_options(),
        )
        # the context in which Lightning ran the step on the raw weights
        with bar, trainer.precision_plugin.val_step_context():
            mean.add(pl_module.bound(batch, after_step=bar.update).total)
