"""SIGTERM and Ctrl-C while training: all ranks finish the same step, and it is saved."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from ddpm_lightning.callbacks.shared import find_callback
from ddpm_lightning.data.datamodule import Batch
from ddpm_lightning.data.stream_batches import StreamLoader
from ddpm_lightning.errors import Stopped
from ddpm_lightning.module import DDPM

SERVED = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A signal came while something was made that can be made again."""


class Signals(Callback):
    """Let a signal stop training at the end of an optimizer step, the same one on every rank.

    The handler only takes a note; whoever works for long asks for it (`check_signals`), and
    `Checkpoints` saves and stops. Validation is finished first. A second Ctrl-C ends the process
    at once; files are written whole or not at all, so that nothing is damaged by that. It comes
    before the callbacks that ask.

    Lightning's own way is put aside: it knows no Ctrl-C, exits with status 0, communicates within
    a signal handler, and makes the host wait for the device at each batch.

    Args:
        go_on: The command that goes on with the run.
    """

    def __init__(self, go_on: str) -> None:
        self.is_stopping = False
        self._go_on = go_on
        self._received = 0
        self._is_training = False
        self._step = 0
        self._trainer: Trainer | None = None
        self._group: dist.ProcessGroup | None = None

    # --- hearing -------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Take over from Lightning, which puts all handlers back in the end."""
        self._trainer = trainer
        self._step = trainer.global_step
        if trainer.world_size > 1:
            # on the host, so that nobody waits for a device
            self._group = dist.new_group(backend="gloo")
            loop = trainer.fit_loop.epoch_loop
            loop._broadcast_sigterm_tensor = lambda: None
        if threading.current_thread() is threading.main_thread():  # Python knows no other way
            for number in SERVED:
                # what a shell starts in its background is to ignore Ctrl-C
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._hear)
        if trainer.received_sigterm:  # before this
            self._received = signal.SIGTERM

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: DDPM, batch: Batch, batch_idx: int
    ) -> None:
        """From the first step on, there is something to save."""
        self._is_training = True

    def _hear(self, number: int, frame: FrameType | None) -> None:
        assert self._trainer is not None
        launcher = self._trainer.strategy.launcher
        if not self._is_training:
            raise KeyboardInterrupt  # which Lightning passes on, killing what it has launched
        if number == self._received == signal.SIGINT:
            if launcher is not None:
                launcher.kill(signal.SIGKILL)
            sys.stderr.write("stopped at once; the last checkpoint is the newest\n")
            sys.stderr.flush()
            os._exit(128 + signal.SIGINT)
        if launcher is not None and not self._received:
            # not as it came: from a terminal, all have it already
            launcher.kill(signal.SIGTERM)
        # a signal of the user's own says more than what a launcher made of it
        self._received = signal.SIGINT if self._received == signal.SIGINT else number
        loader = self._trainer.train_dataloader
        if isinstance(loader, StreamLoader):
            loader.end_wait()

    # --- agreeing and stopping -----------------------------------------------------------------

    def check(self) -> None:
        """Stop making something.

        Raises:
            Interrupted: A signal has come.
        """
        if self._received and self._is_training:
            raise Interrupted

    def agree(self) -> bool:
        """Tell whether any rank has received a signal; all ranks must call."""
        if self._group is not None and not self.is_stopping:
            # 2 for SIGINT, 1 for SIGTERM: a rank that was told by another has a SIGTERM
            ours = {0: 0, signal.SIGTERM: 1, signal.SIGINT: 2}[self._received]
            highest = torch.tensor(ours)
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._group)
            self._received = (0, signal.SIGTERM, signal.SIGINT)[int(highest)]
        self.is_stopping = self._received != 0
        return self.is_stopping

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DDPM, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Agree at the end of an optimizer step, before others begin what takes long."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.agree()

    def stop(self, trainer: Trainer) -> None:
        """End training, when what is needed to go on has been written.

        Raises:
            Stopped: Always.
        """
        name = signal.Signals(self._received).name
        message = f"stopped by {name} at step {trainer.global_step}; go on with: {self._go_on}"
        status = 128 + self._received
        leave_quietly(trainer, status)
        raise Stopped(message, status)

    def on_fit_end(self, trainer: Trainer, pl_module: DDPM) -> None:
        """Tell of a signal that came when the last step was done, so that nothing is lost."""
        if self.agree():
            self.stop(trainer)


def leave_quietly(trainer: Trainer, status: int) -> None:
    """End a rank that is not the first, where all end: the first says why.

    Raises:
        Stopped: It is not.
    """
    if not trainer.is_global_zero:
        environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        # Lightning's observer kills the whole job, rank 0 in its last words included, when a
        # process that it launched fails
        raise Stopped("", status if environment.creates_processes_externally else 0)


def check_signals(trainer: Trainer) -> None:
    """Stop making something that can be made again.

    Raises:
        Interrupted: A signal has come while training.
    """
    signals = find_callback(trainer, Signals)
    if signals is not None:
        signals.check()


def is_stopping(trainer: Trainer, agree: bool = False) -> bool:
    """Tell whether the ranks have agreed to stop.

    Args:
        trainer: Theirs.
        agree: Let them agree now; all must call.
    """
    signals = find_callback(trainer, Signals)
    if signals is None:
        return False
    return signals.agree() if agree else signals.is_stopping


def stop(trainer: Trainer) -> None:
    """End training, when the ranks have agreed to and what is needed to go on is written.

    Raises:
        Stopped: Always.
    """
    signals = find_callback(trainer, Signals)
    assert signals is not None
    signals.stop(trainer)
