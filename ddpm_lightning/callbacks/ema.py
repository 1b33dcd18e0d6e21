"""An exponential moving average of the network's parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ddpm_lightning.callbacks.shared import Mean, log_evaluation
from ddpm_lightning.data.datamodule import Batch
from ddpm_lightning.errors import InputError
from ddpm_lightning.module import DDPM
from ddpm_lightning.nonfinite import keep_if_bad


class EMA(Callback):
    """Average the parameters over the optimizer steps, in float32, the same on every rank.

    The average starts at the initial weights. Checkpoints carry it as `ema_state_dict`.

    Args:
        decay: Share of the old average kept at each step, in [0, 1); 0 keeps no average at all.
        warmup: Use min(decay, (1 + step) / (10 + step)), so that short runs forget their start;
            the paper's runs have none.
    """

    def __init__(self, decay: float = 0.995, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"ema.decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.warmup = warmup
        self._average: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] = {}
        self._step = 0
        self._val_loss = Mean()

    @property
    def is_active(self) -> bool:
        """Whether there is an average."""
        return bool(self._average)

    @property
    def average(self) -> list[Tensor]:
        """The averaged parameters, in the network's order; empty where there is no average."""
        return list(self._average.values())

    # --- the average ---------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Start from the weights as they are, or from a checkpoint's average."""
        self._start(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Note the step that a resumed run goes on from."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DDPM, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Update once per optimizer step, not per micro-batch."""
        if not self.is_active or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self._step) / (10 + self._step))
        average = self.average
        parameters = [
            parameter.detach().to(mean.dtype)
            for parameter, mean in zip(pl_module.net.parameters(), average, strict=True)
        ]
        if pl_module.bad_steps.latest is not None:
            # of a bad step the average takes itself, which changes no bit of it
            parameters = keep_if_bad(pl_module.bad_steps.latest, average, parameters)
        torch._foreach_lerp_(average, parameters, 1 - decay)

    @contextmanager
    def scope(self, pl_module: DDPM) -> Iterator[None]:
        """Put the average in the place of the parameters, and them back at the end, come what may.

        Pointers are exchanged; nothing is copied (but to a lower precision, where it is one).
        """
        raw = {name: parameter.data for name, parameter in pl_module.net.named_parameters()}
        try:
            for name, parameter in pl_module.net.named_parameters():
                parameter.data = self._average[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in pl_module.net.named_parameters():
                parameter.data = raw[name]

    def _start(self, pl_module: DDPM) -> None:
        if self.decay == 0:
            return
        for name, parameter in pl_module.net.named_parameters():
            value = self._restored.get(f"net.{name}", parameter.detach())
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            # laid out as the parameter is, where a checkpoint's is not: mixed, updates are slow
            self._average[name] = torch.empty_like(parameter, dtype=dtype).copy_(value)
        self._restored = {}

    # --- checkpoints ---------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: DDPM, checkpoint: dict[str, Any]
    ) -> None:
        """Write the average under the keys of the raw weights; buffers are the raw ones."""
        if self.is_active:
            average = {f"net.{name}": value for name, value in self._average.items()}
            checkpoint["ema_state_dict"] = {**checkpoint["state_dict"], **average}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: DDPM, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the average until the module is on its device."""
        restored = checkpoint.get("ema_state_dict", {})
        for name, parameter in pl_module.net.named_parameters():
            if restored.get(f"net.{name}", parameter).shape != parameter.shape:
                raise ValueError(f"the average of net.{name} is not shaped like it")
        self._restored = restored

    # --- validation ----------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Outside of fit, take the checkpoint's average; there is none without a checkpoint."""
        if not self.is_active and self._restored:
            self._start(pl_module)
        self._val_loss = Mean()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: DDPM,
        outputs: Tensor,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the same loss on the averaged weights."""
        if self.is_active:
            # the context in which Lightning ran the step on the raw weights
            with self.scope(pl_module), trainer.precision_plugin.val_step_context():
                self._val_loss.add(pl_module.validation_step(batch, batch_idx))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Log `val/loss_ema`."""
        if self.is_active:
            log_evaluation(trainer, pl_module, "loss_ema", self._val_loss)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
