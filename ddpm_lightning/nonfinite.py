"""Which optimizer steps were not finite, known to the device alone until it is asked."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

OnNonfinite = Literal["stop", "skip"]


class FirstBadStep(NamedTuple):
    """What is kept of bad steps.

    Attributes:
        num_steps: How many there were; with 0 the others say nothing.
        step: The first one's number, counted from 1.
        loss: Its loss, on this rank.
        grad_norm: The norm of its gradient, before clipping.
    """

    num_steps: float
    step: float
    loss: float
    grad_norm: float


class BadSteps:
    """Counts the steps whose gradient is not finite, and keeps the first one.

    `note` never waits for the device.

    Args:
        are_final: No step after a bad one is good: its update was made.
    """

    def __init__(self, are_final: bool) -> None:
        self._are_final = are_final
        self._kept: Tensor | None = None
        self.latest: Tensor | None = None

    def note(self, step: int, loss: Tensor, grad_norm: Tensor, is_bad: Tensor) -> None:
        """Take in one optimizer step.

        Args:
            step: Its number, counted from 1.
            loss: Its loss, a number.
            grad_norm: Its gradient's norm, a number.
            is_bad: Whether it is bad, bool [].
        """
        if self._kept is None:
            self._kept = torch.zeros(4, dtype=torch.float64, device=grad_norm.device)
        count, *first = self._kept
        this = (torch.full_like(count, step), loss.double(), grad_norm.double())
        is_first = is_bad & (count == 0)
        kept = [torch.where(is_first, new, old) for new, old in zip(this, first, strict=True)]
        self._kept = torch.stack([count + is_bad, *kept])
        self.latest = is_bad | (count > 0) if self._are_final else is_bad

    def rows(self, device: torch.device) -> Tensor:
        """Give what is kept as float64 [1, 4], in the order of `FirstBadStep`."""
        if self._kept is None:
            return torch.zeros(1, 4, dtype=torch.float64, device=device)
        return self._kept[None]


def keep_if_bad(is_bad: Tensor, old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Choose between two lists of tensors by a flag, without waiting for the device.

    Args:
        is_bad: Whether the old ones are chosen, bool [].
        old: Each of them, of any shape.
        new: The same shapes and dtypes.
    """
    if is_bad.device.type == "cpu":  # nothing to wait for, and nothing to copy
        return old if is_bad else new
    return select(is_bad, old, new)


def select(is_bad: Tensor, old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Do as `keep_if_bad` does by the device's own kernels, whatever it is."""
    return [torch.where(is_bad, a, b) for a, b in zip(old, new, strict=True)]


def leave_out(optimizer: torch.optim.Optimizer, is_bad: Tensor) -> None:
    """Make the optimizer's coming update change no bit of weights and state, if `is_bad`.

    Args:
        optimizer: Has its gradients.
        is_bad: Whether they are not finite, bool [].
    """
    if isinstance(optimizer, torch.optim.Adam) and optimizer.param_groups[0]["fused"]:
        # read by its kernel, on the device; torch's own GradScaler sets the same
        optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
    elif is_bad:
        # That waits for the device, in every step, as GradScaler does with such optimizers: they
        # count steps on the host. Without gradients they leave all as it is.
        optimizer.zero_grad(set_to_none=True)
