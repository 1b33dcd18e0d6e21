"""What is done about steps that are not finite."""

import json
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ddpm_lightning.callbacks.checkpoints import Checkpoints
from ddpm_lightning.callbacks.ema import EMA
from ddpm_lightning.callbacks.fid import FID
from ddpm_lightning.callbacks.samples import Samples
from ddpm_lightning.callbacks.shared import TrainerRanks, find_callback, log_scalars, run_folder
from ddpm_lightning.data.datamodule import Batch, ImageDataModule
from ddpm_lightning.errors import SharedError
from ddpm_lightning.images import write_atomically
from ddpm_lightning.module import DDPM
from ddpm_lightning.nonfinite import FirstBadStep, OnNonfinite


class Nonfinite(Callback):
    """Stop at, or count, the steps whose loss or gradient is not finite.

    `DDPM` keeps the first of them on the device, and `EMA` takes none of them in. Here the device
    is asked: every logging interval, before pictures and numbers are made, and before every
    checkpoint, so that none is written from bad weights.

    Args:
        on_nonfinite: Whether such a step stops training, with RUN/nonfinite.json, or is counted.
    """

    def __init__(self, on_nonfinite: OnNonfinite) -> None:
        self.on_nonfinite = on_nonfinite
        self.num_skipped = 0
        self._skipped_before = 0
        self._step = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._skipped_before = self.num_skipped = state_dict["num_skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Note the step that a resumed run goes on from."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DDPM, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Ask where others will ask the device too."""
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if stepped and self._is_due(trainer):
            self._check(trainer, pl_module)
            if self.on_nonfinite == "skip":
                log_scalars(trainer, {"skipped_steps": self.num_skipped})

    def on_validation_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Ask: losses of bad weights say nothing."""
        if trainer.state.fn == "fit":
            self._check(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: DDPM, checkpoint: dict[str, Any]
    ) -> None:
        """Ask, look at the weights themselves, and write the count."""
        self._check(trainer, pl_module)
        # A finite gradient can still make weights that are not, at an absurd learning rate.
        ema = find_callback(trainer, EMA)
        average = ema.average if ema is not None else []
        if not _are_finite([*pl_module.net.parameters(), *average]):
            raise SharedError(
                f"step {trainer.global_step}: the weights are not finite; {self._advice(trainer)}"
            )
        checkpoint["callbacks"][self.state_key] = {"num_skipped": self.num_skipped}

    def _is_due(self, trainer: Trainer) -> bool:
        samples, fid = find_callback(trainer, Samples), find_callback(trainer, FID)
        intervals = (
            trainer.log_every_n_steps,  # type: ignore[attr-defined]
            samples.every_n_steps if samples is not None else 0,
            fid.every_n_steps if fid is not None else 0,
        )
        return self._step == trainer.max_steps or any(
            interval and self._step % interval == 0 for interval in intervals
        )

    def _check(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Ask the device; all ranks do at the same time.

        Raises:
            SharedError: There was a bad step, and it is to stop training.
        """
        rows = TrainerRanks(trainer).concatenate(pl_module.bad_steps.rows(pl_module.device))
        ranks = [FirstBadStep(*row) for row in rows.tolist()]
        self.num_skipped = self._skipped_before + int(max(rank.num_steps for rank in ranks))
        if self.on_nonfinite == "skip" or not any(rank.num_steps for rank in ranks):
            return
        first = min((rank for rank in ranks if rank.num_steps), key=lambda rank: rank.step)
        loss = float(np.mean([rank.loss for rank in ranks]))
        raise SharedError(self._report(trainer, pl_module, int(first.step), loss, first.grad_norm))

    def _report(
        self, trainer: Trainer, pl_module: DDPM, step: int, loss: float, grad_norm: float
    ) -> str:
        """Write RUN/nonfinite.json on rank 0, and give the line that is told."""
        path = run_folder(trainer) / "nonfinite.json"
        record: dict[str, Any] = {
            "step": step,
            "noticed_at_step": trainer.global_step,
            "loss": str(loss),  # JSON has no word for what is not finite
            "grad_norm": str(grad_norm),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "precision": str(trainer.precision),
        }
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule):
            positions = np.arange((step - 1) * data.batch_size, step * data.batch_size)
            record |= {
                "source": data.source,
                "seed": data.seed,
                "positions": [int(positions[0]), int(positions[-1])],
                "training_images": data.training_indices(positions).tolist(),
            }
        if trainer.is_global_zero:
            text = json.dumps(record, indent=2) + "\n"
            write_atomically(path, lambda file: file.write(text.encode()))
        return (
            f"step {step} is not finite (loss {loss:g}, gradient norm {grad_norm:g}; its images: "
            f"{path}); {self._advice(trainer)}"
        )

    @staticmethod
    def _advice(trainer: Trainer) -> str:
        last = Checkpoints.folder(trainer) / "last.ckpt"
        kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was due"
        return (
            f"{kept}. Try a lower --model.optimizer.lr, a lower --trainer.gradient_clip_val, "
            "--trainer.precision 32-true, or --on_nonfinite skip"
        )


@torch.no_grad()
def _are_finite(tensors: list[Tensor]) -> bool:
    # the largest number of each tensor; one answer to wait for
    largest = torch._foreach_norm(tensors, float("inf"))
    return bool(torch.stack([norm.double() for norm in largest]).isfinite().all())
