"""What goes wrong while training, told in one line: memory, disks, checkpoints of others."""

import shlex
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors import checkpoint_connector
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from ddpm_lightning.callbacks.shared import vanished
from ddpm_lightning.callbacks.signals import is_stopping, leave_quietly, stop
from ddpm_lightning.commands.shell import DISK_ERRORS, is_out_of_memory
from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.data.stream_batches import StreamLost
from ddpm_lightning.errors import InputError, SharedError
from ddpm_lightning.runs import Run


class Job(Protocol):
    """What is known of a command when something goes wrong in it.

    It has a trainer and a data module once they have been made.
    """

    run: Run | None
    trainer: Trainer
    datamodule: ImageDataModule
    ckpt_path: str | None


@contextmanager
def told_in_one_line(job: Job) -> Iterator[None]:
    """Make of what machine or checkpoint refuse an `InputError` that says where and what helps."""
    hook = threading.excepthook
    threading.excepthook = _without_tensorboards
    try:
        yield
    except SharedError as error:
        if isinstance(error, StreamLost) and is_stopping(job.trainer):
            stop(job.trainer)
        leave_quietly(job.trainer, 2)
        raise
    except InputError:
        raise
    except Exception as error:
        told = _told(job, error)
        if told is None:
            raise
        raise InputError(told) from error
    finally:
        threading.excepthook = hook


def _told(job: Job, error: Exception) -> str | None:
    if is_out_of_memory(error):
        return _told_of_memory(job, error)
    if isinstance(error, OSError) and job.run is not None:
        if not job.run.root.is_dir():
            return vanished(job.run.root, job.trainer.global_step)
        return _told_of_disk(job.run, error) if error.errno in DISK_ERRORS else None
    if _is_of_restoring(error):
        return f"{job.ckpt_path}: cannot go on from it: {type(error).__name__}: {error}"
    return None


def _is_of_restoring(error: Exception) -> bool:
    """Tell whether Lightning, or what it called, could not take what a checkpoint holds.

    What other versions and programs write into one is theirs; its errors are of any type.
    """
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        frame.f_code.co_filename == checkpoint_connector.__file__
        and frame.f_code.co_name.lstrip("_").startswith(("restore", "resume"))
        for frame in frames
    )


def go_on_command(root: Path) -> str:
    """Give the command that goes on with this process's run, as the shell takes it."""
    arguments = []
    words = iter(sys.argv[1:])
    for word in words:
        if word in ("--run_dir", "--ckpt_path"):
            next(words, None)
        elif not word.startswith(("--run_dir=", "--ckpt_path=")):
            arguments.append(word)
    arguments += ["--ckpt_path", "last", "--run_dir", str(root)]
    return shlex.join(["python", "-m", "ddpm_lightning", *arguments])


def _told_of_memory(job: Job, error: BaseException) -> str:
    trainer, data = getattr(job, "trainer", None), getattr(job, "datamodule", None)
    if trainer is None or data is None:
        return (
            "out of memory while the network was being built: give it fewer "
            f"--model.net.base_channels ({str(error)[:200]})"
        )
    accumulate = trainer.accumulate_grad_batches
    each = data.batch_size // (trainer.world_size * accumulate)
    # what shares out the images of a device next
    factor = next((number for number in range(2, each + 1) if each % number == 0), 1)
    parts = f"--trainer.accumulate_grad_batches {factor * accumulate} or " if factor > 1 else ""
    return (
        f"out of memory at step {trainer.global_step} with --data.batch_size {data.batch_size} "
        f"({each} images at a time on each of {trainer.world_size} x "
        f"{trainer.strategy.root_device.type}): give {parts}more --trainer.devices (the same "
        "result), --model.net.checkpointing true (the same up to rounding, slower), a smaller "
        f"--data.batch_size, or --trainer.precision bf16-mixed ({str(error)[:200]})"
    )


def _told_of_disk(run: Run, error: OSError) -> str:
    where = error.filename or run.root  # TensorBoard's writer does not say which file
    newest = run.newest_checkpoint()
    kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint has been written"
    return f"{where}: {error.strerror}; {kept}"


def _without_tensorboards(arguments: threading.ExceptHookArgs) -> None:
    """Say nothing of TensorBoard's thread: the main one raises the same when it writes next."""
    if not isinstance(arguments.thread, event_file_writer._AsyncWriterThread):
        threading.__excepthook__(arguments)
