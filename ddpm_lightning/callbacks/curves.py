"""The numbers that one watches while it trains."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer

from ddpm_lightning.callbacks.shared import Mean, find_callback, log_evaluation, log_scalars
from ddpm_lightning.callbacks.utilisation import peak_of
from ddpm_lightning.data.datamodule import Batch
from ddpm_lightning.module import DDPM

NUM_QUARTILES = 4


@contextmanager
def aside(trainer: Trainer) -> Iterator[None]:
    """Do something that does not count as training."""
    start = time.perf_counter()
    yield
    curves = find_callback(trainer, Curves)
    if curves is not None:
        curves.set_aside(time.perf_counter() - start)


class Curves(Callback):
    """Log loss (whole and by quarter of the timesteps), gradient norm, learning rate and speed.

    A window runs from one logging step to the next (`--trainer.log_every_n_steps`). The losses
    are means over all its images, on all ranks and micro-batches; the device is waited for once.
    The speed includes waiting for data, but not validation, drawing and judging. `train/tflops` is
    that of the network's arithmetic on all ranks, in TFLOP/s, and `train/mfu` the share of what
    their devices can do, where that is known (model FLOPs utilisation, Chowdhery et al. 2022,
    appendix B).
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self._losses = Mean(NUM_QUARTILES)
        self._restored: Tensor | None = None
        self._val_loss = Mean()
        self._num_images = 0
        self._window_start = 0.0
        self._seconds_aside = 0.0
        self._validation_start = 0.0
        self._lr = 0.0
        self._step = 0
        self._flops_per_image = 0
        self._peak: float | None = None

    def set_aside(self, seconds: float) -> None:
        """Leave time that was not spent on training out of the window's speed."""
        self._seconds_aside += seconds

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: DDPM, checkpoint: dict[str, Any]
    ) -> None:
        """Write the losses of the window so far."""
        sums = self._losses.sums_over_ranks(trainer)
        checkpoint["callbacks"][self.state_key] = {"losses": sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until the ranks are known."""
        self._restored = state_dict["losses"]

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Start the first window, or go on with that which a resumed run was in."""
        if self._restored is not None and trainer.is_global_zero:
            self._losses.restore(self._restored.to(trainer.strategy.root_device))
        self._restored = None
        self._step = trainer.global_step
        # a gradient takes two products where the output took one
        self._flops_per_image = 3 * pl_module.flops_per_image
        self._peak = peak_of(trainer.strategy.root_device, str(trainer.precision))
        self._window_start = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: DDPM, optimizer: Optimizer
    ) -> None:
        """Note the rate of this step: the scheduler moves on before the batch ends."""
        self._lr = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DDPM, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Add to the window, and log it where it ends."""
        quartiles = outputs["t"] * NUM_QUARTILES // pl_module.process.num_timesteps
        self._losses.add(outputs["losses"], quartiles, outputs["weights"])
        self._num_images += len(batch.positions) * trainer.world_size
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        at_interval = interval and self._step % interval == 0  # 0 logs at the end only
        due = stepped and (at_interval or self._step == trainer.max_steps)
        if not due:
            return
        *quarters, loss = self._losses.over_ranks(trainer)
        assert pl_module.grad_norm is not None
        grad_norm = float(pl_module.grad_norm)  # the device has been waited for
        now = time.perf_counter()
        seconds = now - self._window_start - self._seconds_aside
        self.latest = {
            "train/loss": loss,
            **{f"train/loss_q{index}": value for index, value in enumerate(quarters, start=1)},
            "train/grad_norm": grad_norm,
            "train/lr": self._lr,
            **self._speeds(self._num_images / seconds, trainer.world_size),
        }
        log_scalars(trainer, self.latest)
        self._num_images, self._seconds_aside, self._window_start = 0, 0.0, now

    def _speeds(self, images_per_second: float, num_devices: int) -> dict[str, float]:
        flops = self._flops_per_image * images_per_second
        speeds = {"train/images_per_second": images_per_second, "train/tflops": flops / 1e12}
        return speeds | ({"train/mfu": flops / self._peak / num_devices} if self._peak else {})

    def on_validation_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Stop the clock."""
        self._validation_start = time.perf_counter()

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
        """Log `val/loss`, and let the clock run again."""
        self.set_aside(time.perf_counter() - self._validation_start)
        log_evaluation(trainer, pl_module, "loss", self._val_loss)

    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
