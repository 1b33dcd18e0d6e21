"""When checkpoints are written, and how: whole or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from ddpm_lightning.callbacks.fid import FID
from ddpm_lightning.callbacks.shared import (
    TrainerRanks,
    find_callback,
    make_run_folder,
    run_folder,
)
from ddpm_lightning.callbacks.signals import is_stopping, stop
from ddpm_lightning.checkpoints import load_checkpoint
from ddpm_lightning.data.datamodule import Batch
from ddpm_lightning.data.stream_batches import StreamLost
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import write_atomically
from ddpm_lightning.module import DDPM


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, then rename: whenever a process dies, the old file is whole.

    Lightning's own writer goes through the system's temporary folder, from where a file may have
    to be copied, and holds the whole file in memory first.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, creating its folder."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in it is executed, whatever is asked for."""
        return load_checkpoint(path, mmap=False)


class Checkpoints(Checkpoint):
    """Keep RUN/checkpoints/last.ckpt, step=N.ckpt and best.ckpt.

    The last step is always saved. Files of the same step are one file under several names.

    Args:
        every_n_steps: Optimizer steps between refreshes of last.ckpt; 0 saves only at the end.
        keep_every_n_steps: Optimizer steps between those kept for good, as step=N.ckpt; 0 keeps
            only the final one.
        monitor: best.ckpt is where this metric was lowest, such as fd_efficientnet-lite0_1k/ema;
            without an average of the weights, val/loss takes the place of val/loss_ema.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        keep_every_n_steps: int = 500,
        monitor: str = "val/loss_ema",
    ) -> None:
        if every_n_steps < 0 or keep_every_n_steps < 0:
            raise InputError("checkpoints.every_n_steps and .keep_every_n_steps: at least 0")
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.monitor = monitor
        self._lowest = float("inf")
        self._step = 0
        self._saved_step = -1

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        """Give the folder that a trainer's checkpoints go to."""
        return Path(trainer.default_root_dir) / "checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """Give the lowest value so far and what of, which best.ckpt thus carries itself."""
        return {"lowest": self._lowest, "monitor": self.monitor}

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """See what is there already: a resumed run must not replace a better best.ckpt."""
        self._step = trainer.global_step
        make_run_folder(trainer)
        steps = TrainerRanks(trainer).concatenate(torch.tensor([[self._step]]))
        if len(set(steps.flatten().tolist())) > 1:
            raise InputError(
                f"the ranks go on from different steps ({steps.flatten().tolist()}); "
                "--run_dir must be a folder that all nodes share"
            )
        if trainer.is_global_zero:
            self._tidy(self.folder(trainer))
        self._lowest = trainer.strategy.broadcast(self._lowest)
        if self._is_best(trainer):  # by a number that a signal had cut short, and is there now
            self._save(trainer, ["best"])

    def _tidy(self, folder: Path) -> None:
        """Remove what a killed process left half-written, and see how good best.ckpt is."""
        for part in folder.glob(".*.part*"):
            part.unlink()
        best = folder / "best.ckpt"
        if best.exists():
            state = load_checkpoint(best)["callbacks"][self.state_key]
            # the best by another metric says nothing about this one
            if state.get("monitor", self.monitor) == self.monitor:
                self._lowest = state["lowest"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DDPM, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save where it is due; where validation follows at once, it is saved after that.

        Raises:
            Stopped: A signal has come; last.ckpt is of this step.
        """
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if stepped and not self._validation_follows(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Save where it is due."""
        if trainer.sanity_checking or not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            return
        self._check_monitor(trainer)
        is_stopping(trainer, agree=True)  # it may have taken long
        self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Save the last step, unless that has just been done."""
        step = trainer.global_step
        if step and self._saved_step != step:
            self._save(trainer, ["last", f"step={step}"])
        elif step and trainer.is_global_zero:
            _link(self.folder(trainer) / "last.ckpt", self.folder(trainer) / f"step={step}.ckpt")

    def on_exception(self, trainer: Trainer, pl_module: DDPM, exception: BaseException) -> None:
        """Keep what was trained until a stream could not be read on: all ranks stop there."""
        if isinstance(exception, StreamLost):
            is_stopping(trainer, agree=True)  # a signal may have ended the wait
            self._save(trainer, ["last"] if trainer.global_step else [])

    def _is_best(self, trainer: Trainer) -> bool:
        """Compare the monitored metric's newest value with the lowest so far."""
        fid = find_callback(trainer, FID)
        metrics: dict[str, Any] = {**(fid.latest if fid else {}), **trainer.callback_metrics}
        value = metrics.get(self.monitor)
        if value is None and self.monitor == "val/loss_ema":  # there is no average
            value = metrics.get("val/loss")
        if value is None or not float(value) < self._lowest:
            return False
        self._lowest = float(value)
        return True

    def _check_monitor(self, trainer: Trainer) -> None:
        fid = find_callback(trainer, FID)
        names = {"val/loss_ema", *trainer.callback_metrics, *(fid.names if fid else [])}
        if self.monitor not in names:
            raise InputError(
                f"--checkpoints.monitor {self.monitor}: no such metric; there are "
                f"{', '.join(sorted(names))}"
            )

    @staticmethod
    def _validation_follows(trainer: Trainer) -> bool:
        interval = trainer.val_check_batch or float("inf")  # None where time decides
        num_done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        return sum(trainer.num_val_batches) > 0 and num_done % interval == 0

    def _save_if_due(self, trainer: Trainer) -> None:
        names = ["best"] if self._is_best(trainer) else []
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0:
            names.append("last")
        if self.keep_every_n_steps and step % self.keep_every_n_steps == 0:
            # last is written after it: the newest file is always last
            names.append(f"step={step}")
            names.append("last")
        if is_stopping(trainer):
            names.append("last")
        self._save(trainer, names)
        if is_stopping(trainer):
            stop(trainer)

    def _save(self, trainer: Trainer, names: list[str]) -> None:
        """Write one file, and give it its other names."""
        if not names:
            return
        folder = run_folder(trainer, "checkpoints")
        first, *others = [folder / f"{name}.ckpt" for name in dict.fromkeys(names)]
        # A run that goes on from here logs from here on: what came before must be on disk.
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(first)
        if "last" in names:
            self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            for other in others:
                _link(first, other)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, replacing what had that name, atomically."""
    part = target.with_name(f".{target.name}.part{os.getpid()}")
    part.unlink(missing_ok=True)
    try:
        part.hardlink_to(source)
    except OSError:  # a file system without hard links
        write_atomically(part, lambda file: file.write(source.read_bytes()))
    part.replace(target)
    # a rename between two names of one file does nothing
    part.unlink(missing_ok=True)
