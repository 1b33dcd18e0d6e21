"""One pass of a Trainer over numbered images, whose results go to the disk batch by batch."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader
from tqdm import tqdm

from ddpm_lightning.bars import bar_options


class BatchTask(LightningModule):
    """Makes something of batches of numbers, dealt to the ranks in turn.

    Args:
        numbers: All of them; batches are the same whatever has been done already and however many
            ranks there are, so that a run that goes on gives the same bits.
        batch_size: Numbers in a batch.
        title: What the bar says is being done.
        num_steps: In how many steps a batch is made.
    """

    def __init__(self, numbers: Sequence[int], batch_size: int, title: str, num_steps: int) -> None:
        super().__init__()
        self._batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        self._title = title
        self._num_steps = num_steps
        self._bar: tqdm[Any] | None = None
        self._total = 0

    @abstractmethod
    def make(self, numbers: Sequence[int]) -> None:
        """Make a batch and write what is made of it; `advance` after each step."""

    @abstractmethod
    def is_done(self, numbers: Sequence[int]) -> bool:
        """Whether what is made of a batch is on the disk."""

    def advance(self, num_images: int) -> None:
        """Let the bar advance by one step of so many images."""
        assert self._bar is not None
        # rounding must not carry it beyond its end
        self._bar.update(min(num_images / self._num_steps, self._total - self._bar.n))

    def predict_dataloader(self) -> DataLoader[Sequence[int]]:
        """Give this rank's batches that are not on disk yet."""
        share = self._batches[self.global_rank :: self.trainer.world_size]
        todo = [batch for batch in share if not self.is_done(batch)]
        self._total = sum(map(len, share))
        self._bar = tqdm(
            total=self._total,
            initial=self._total - sum(map(len, todo)),
            desc=f"{self._title} ({self._num_steps} steps an image)",
            unit="image",
            disable=not self.trainer.is_global_zero,
            bar_format="{desc} {n:.0f}/{total} |{bar}| {elapsed}<{remaining}, {rate_fmt}",
            **bar_options(),
        )
        # As many on every rank, empty ones at the end: Lightning stops a rank that has none.
        num_batches = math.ceil(len(self._batches) / self.trainer.world_size)
        padding: list[Sequence[int]] = [[] for _ in range(num_batches - len(todo))]
        return DataLoader([*todo, *padding], batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, numbers: Sequence[int], batch_idx: int) -> None:
        """Make a batch, unless it is an empty one."""
        if numbers:
            self.make(numbers)

    def on_predict_end(self) -> None:
        """Wait for the other ranks' files."""
        if self._bar is not None:
            self._bar.close()
        self.trainer.strategy.barrier()
