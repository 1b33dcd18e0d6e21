"""What Lightning restores from a checkpoint, brought in line with what was asked for now."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def align_batches(checkpoint: dict[str, Any], accumulate: int, limit: int | None) -> None:
    """Let Lightning's counts of micro-batches be those of the checkpoint's whole steps.

    It goes on with the counts as they were: with another accumulation, or where it had stopped amid
    a step, its steps would take parts of two batches from then on.

    Args:
        checkpoint: What a checkpoint holds; changed.
        accumulate: Micro-batches of a step from now on.
        limit: Micro-batches of one of Lightning's epochs; None where they have no end.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    total, current = progress["total"], progress["current"]
    ready = checkpoint["global_step"] * accumulate
    if total["ready"] == ready:
        return
    place = ready if limit is None else ready % limit
    for counts, shift in ((total, ready - total["ready"]), (current, place - current["ready"])):
        for name in counts:
            counts[name] += shift


def take_options(optimizer: Optimizer, asked: Optimizer) -> None:
    """Give an optimizer with a restored state the options of a new one.

    Options are restored with the state: a new learning rate would silently be ignored. The state's
    layout in memory is restored, too, and fused optimizers trust that it is the weights'.
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
    for group, options in zip(optimizer.param_groups, asked.param_groups, strict=True):
        group |= {key: value for key, value in options.items() if key != "params"}
        group["initial_lr"] = options["lr"]
    place_steps(optimizer)


def place_steps(optimizer: Optimizer) -> None:
    """Put Adam's counts of steps where its kernels look for them.

    torch loads a checkpoint's to where the options of that time had them: fused kernels read them
    on the device, all others on the CPU, where nothing has to be waited for.
    """
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for weight in group["params"]:
            step = optimizer.state.get(weight, {}).get("step")
            if isinstance(step, Tensor):
                optimizer.state[weight]["step"] = step.to(weight.device if on_device else "cpu")
