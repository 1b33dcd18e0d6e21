"""The progress bar: counted in optimizer steps, with loss, images/s and the time left."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from ddpm_lightning.bars import bar_options
from ddpm_lightning.callbacks.curves import Curves
from ddpm_lightning.callbacks.shared import find_callback
from ddpm_lightning.data.datamodule import Batch
from ddpm_lightning.module import DDPM

BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


class Progress(ProgressBar):
    """One bar for the whole of training."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._is_enabled = True

    def disable(self) -> None:
        """Show nothing: Lightning asks all ranks but the first for it."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._is_enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Open the bar where a resumed run goes on."""
        self._bar = tqdm(
            total=trainer.max_steps if trainer.max_steps > 0 else None,
            initial=trainer.global_step,
            desc="training",
            disable=not self._is_enabled,
            **bar_options(bar_format=BAR_FORMAT if trainer.max_steps > 0 else None),
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DDPM, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Advance with the optimizer."""
        assert self._bar is not None
        curves = find_callback(trainer, Curves)
        if curves is not None and curves.latest:
            loss, speed = (curves.latest[f"train/{k}"] for k in ("loss", "images_per_second"))
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} images/s", refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Close the bar, leaving its last state on the screen."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: DDPM, exception: BaseException) -> None:
        """Close the bar, so that the message stands on a line of its own."""
        self.on_train_end(trainer, pl_module)
