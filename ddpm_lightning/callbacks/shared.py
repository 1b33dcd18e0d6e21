"""What several callbacks need: means over ranks, logging at the right step, each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.module import DDPM

AnyCallback = TypeVar("AnyCallback", bound=Callback)


def find_callback(trainer: Trainer, kind: type[AnyCallback]) -> AnyCallback | None:
    """Find a trainer's callback of some kind."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


@contextmanager
def sampler_options(callback: str) -> Iterator[None]:
    """Let what is refused about a sampler's option name it as the callback's: --fid.num_steps."""
    try:
        yield
    except InputError as error:
        raise InputError(f"--{callback}.{error}") from error


def make_run_folder(trainer: Trainer) -> None:
    """Make the folder of a trainer's files, at the start of training, on rank 0."""
    if trainer.is_global_zero:
        Path(trainer.default_root_dir).mkdir(parents=True, exist_ok=True)


def vanished(root: Path, step: int) -> str:
    """Say that a run's folder is gone, and what helps."""
    return (
        f"{root}: the run's folder has vanished at step {step}; is the disk still there? Restore "
        "it and go on with --ckpt_path last, or start anew"
    )


def run_folder(trainer: Trainer, name: str = "") -> Path:
    """Give the folder of a trainer's files, or one in it, which rank 0 makes.

    Raises:
        InputError: The former is gone: made anew, it would hold half a run.
    """
    root = Path(trainer.default_root_dir)
    if trainer.is_global_zero:
        if not root.is_dir():
            raise InputError(vanished(root, trainer.global_step))
        (root / name).mkdir(exist_ok=True)
    return root / name


class TrainerRanks:
    """The processes of a trainer (see `metrics.judge.Ranks`)."""

    def __init__(self, trainer: Trainer) -> None:
        self._strategy = trainer.strategy
        self._world_size = trainer.world_size
        self._rank = trainer.global_rank

    def share(self, numbers: range) -> range:
        """Give this rank's part; the parts follow each other in the ranks' order, or are empty."""
        count = len(numbers)
        bounds = (count * rank // self._world_size for rank in (self._rank, self._rank + 1))
        return numbers[slice(*bounds)]

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the ranks."""
        there = tensor.to(self._strategy.root_device)  # a user's extractor may work on the CPU
        total: Tensor = self._strategy.reduce(there, reduce_op="sum")
        return total.to(tensor.device)

    def concatenate(self, rows: Tensor) -> Tensor:
        """Concatenate [N_rank, D] in the order of the ranks; the N may differ."""
        if self._world_size == 1:
            return rows
        device = self._strategy.root_device
        counts = self._strategy.all_gather(torch.tensor(len(rows), device=device)).tolist()
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        gathered = self._strategy.all_gather(padded.to(device)).to(rows.device)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


class Mean:
    """A mean of values that arrive in pieces, on any number of ranks, some of which may have none.

    Args:
        num_bins: Keep so many means side by side.
    """

    def __init__(self, num_bins: int = 1) -> None:
        self._num_bins = num_bins
        self._sums: Tensor | None = None

    def add(
        self, values: Tensor, bins: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Add values [N], without waiting.

        Args:
            values: Float [N].
            bins: Which mean each belongs to, int64 [N]; the first when None.
            weights: What each counts for, float [N]; 1 when None.
        """
        if self._sums is None:
            self._sums = self._zeros(values.device)
        if bins is None:
            bins = torch.zeros_like(values, dtype=torch.int64)
        counts = torch.ones_like(values) if weights is None else weights
        pieces = torch.stack([values.double() * counts.double(), counts.double()])
        self._sums.index_add_(1, bins, pieces)

    def sums_over_ranks(self, trainer: Trainer) -> Tensor:
        """Give what has been added on all ranks (all must call), for `restore` on one of them."""
        sums = self._sums if self._sums is not None else self._zeros(trainer.strategy.root_device)
        return TrainerRanks(trainer).sum(sums.clone())

    def restore(self, sums: Tensor) -> None:
        """Go on from there."""
        self._sums = sums

    def over_ranks(self, trainer: Trainer) -> list[float]:
        """Sum over the ranks (all must call), start anew, and give each bin's mean, then all's.

        A bin without values has the mean nan.
        """
        sums = self.sums_over_ranks(trainer)
        self._sums = None
        sums = torch.cat([sums, sums.sum(dim=1, keepdim=True)], dim=1)
        means: list[float] = (sums[0] / sums[1]).tolist()
        return means

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(2, self._num_bins, dtype=torch.float64, device=device)


def log_scalars(trainer: Trainer, scalars: dict[str, float]) -> None:
    """Log at the optimizer step.

    Lightning's own way counts batches from 0, which would put a curve one step too early.
    """
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=trainer.global_step)


def log_evaluation(trainer: Trainer, pl_module: DDPM, name: str, losses: Mean) -> None:
    """Log a mean loss under val/ or test/, and offer it to callbacks that monitor it."""
    scalars = {f"{'test' if trainer.testing else 'val'}/{name}": losses.over_ranks(trainer)[-1]}
    if not trainer.sanity_checking:
        pl_module.log_dict(scalars, logger=False)
        log_scalars(trainer, scalars)
