"""What of Lightning's Trainer does not go with this project, refused before any work."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.optim import Optimizer

from ddpm_lightning.errors import InputError

SHARDING = ("fsdp", "deepspeed", "modelparallel")


def check_trainer(options: Any) -> None:
    """Refuse options of Lightning's Trainer that it takes but that would not train.

    Raises:
        InputError: There is one.
    """
    if options.max_epochs != -1:
        raise InputError(
            "--trainer.max_epochs: training is counted in optimizer steps, say "
            "--trainer.max_steps N (N x --data.batch_size images)"
        )
    if not isinstance(options.val_check_interval, int | None):
        raise InputError(
            f"--trainer.val_check_interval {options.val_check_interval}: data has no end to take "
            "a share of, and ranks' clocks differ; give a whole number of optimizer steps"
        )
    if options.check_val_every_n_epoch is not None:
        raise InputError(
            "--trainer.check_val_every_n_epoch: data has no epochs; give "
            "--trainer.val_check_interval N optimizer steps"
        )
    for name in ("max_steps", "accumulate_grad_batches", "val_check_interval"):
        value = options[name]
        if isinstance(value, int) and value < 1 and not (name == "max_steps" and value == -1):
            raise InputError(f"--trainer.{name} {value}: must be at least 1")
    limit, accumulate = options.limit_train_batches, options.accumulate_grad_batches
    # up to 1.0 it is a share; Lightning would step at the limit, with a part of a batch
    if limit is not None and limit > 1 and limit % accumulate:
        raise InputError(
            f"--trainer.limit_train_batches {limit:g}: must be a multiple of "
            f"--trainer.accumulate_grad_batches {accumulate}"
        )
    if options.gradient_clip_val is not None and options.gradient_clip_val <= 0:
        raise InputError(
            f"--trainer.gradient_clip_val {options.gradient_clip_val}: must be more than 0; "
            "null clips nothing"
        )
    if options.gradient_clip_algorithm == "value":
        raise InputError("--trainer.gradient_clip_algorithm value: only norm is supported")


def check_scaler(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuse an optimizer that takes gradients as 16-mixed has scaled them.

    Their norm would be clipped, and logged, before the scale is taken out.

    Raises:
        InputError: It does.
    """
    if trainer.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise InputError(
            "--trainer.precision 16-mixed with a fused optimizer: gradients would be clipped while "
            "they are scaled; leave out --model.optimizer.fused, or take bf16-mixed"
        )


def check_whole(strategy: Any, optimizer: str) -> None:
    """Refuse, by name, to shard parameters or the optimizer's state.

    Args:
        strategy: The Trainer's: a name, or options with a `class_path`.
        optimizer: Its class path.

    Raises:
        InputError: One of the two would.
    """
    strategy = strategy if isinstance(strategy, str) else strategy.class_path
    # before Lightning asks for a GPU or a package that would not help
    if any(name in strategy.lower().replace("_", "") for name in SHARDING):
        raise InputError(_sharded(strategy))
    if optimizer.startswith("torch.distributed."):
        raise InputError(
            f"--model.optimizer {optimizer}: not supported; a checkpoint needs the optimizer's "
            "whole state, and this one has a part of it on each rank; use torch.optim.Adam"
        )


def check_device(trainer: Trainer, option: str) -> None:
    """Refuse a device that has no float64.

    Args:
        trainer: Whose.
        option: By which it was chosen.

    Raises:
        InputError: It is of that kind.
    """
    if trainer.strategy.root_device.type == "mps":
        raise InputError(
            f"{option} mps: has no float64, which the schedule's tables are in; use {option} cpu"
        )


def check_parts(trainer: Trainer) -> None:
    """Refuse what this project's parts would be silently wrong on.

    Raises:
        InputError: Parameters or optimizer are sharded, the device has no float64, or a callback
            changes how many batches make a step.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(_sharded(type(trainer.strategy).__name__))
    check_device(trainer, "--trainer.accelerator")
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise InputError(
            "--trainer.callbacks GradientAccumulationScheduler: not supported; a step's images "
            "would change with it; give --trainer.accumulate_grad_batches N"
        )


def _sharded(strategy: str) -> str:
    return (
        f"--trainer.strategy {strategy}: not supported; the average of the weights, clipping and "
        "checkpoints need all parameters on each device; use ddp"
    )
