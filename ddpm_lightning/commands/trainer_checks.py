"""What of Lightning's Trainer does not go with this project, refused before any work."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

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
    if isinstance(options.val_check_interval, float):
        raise InputError(
            f"--trainer.val_check_interval {options.val_check_interval}: data has no end to take "
            "a share of; give a whole number of optimizer steps"
        )
    for name in ("max_steps", "accumulate_grad_batches", "val_check_interval"):
        value = options[name]
        if isinstance(value, int) and value < 1 and not (name == "max_steps" and value == -1):
            raise InputError(f"--trainer.{name} {value}: must be at least 1")
    if options.gradient_clip_val is not None and options.gradient_clip_val <= 0:
        raise InputError(
            f"--trainer.gradient_clip_val {options.gradient_clip_val}: must be more than 0; "
            "null clips nothing"
        )
    if options.gradient_clip_algorithm == "value":
        raise InputError("--trainer.gradient_clip_algorithm value: only norm is supported")


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


def check_strategy(trainer: Trainer) -> None:
    """Refuse what this project's parts would be silently wrong on.

    Raises:
        InputError: Parameters or optimizer are sharded, or the device has no float64.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(_sharded(type(trainer.strategy).__name__))
    if trainer.strategy.root_device.type == "mps":
        raise InputError(
            "--trainer.accelerator mps: has no float64, which the schedule's tables are in; "
            "use --trainer.accelerator cpu"
        )


def _sharded(strategy: str) -> str:
    return (
        f"--trainer.strategy {strategy}: not supported; the average of the weights, clipping and "
        "checkpoints need all parameters on each device; use ddp"
    )
