"""All ranks end where one has died."""

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ddpm_lightning.errors import SharedError, Stopped
from ddpm_lightning.peers import Centre, Spoke, join, watch_each_other_already


class Together(Callback):
    """End this rank with an error where another has died, instead of waiting for its time-out.

    Lightning sees only the processes that it started itself, and torchrun only those of one node.
    """

    def __init__(self) -> None:
        self._peer: Centre | Spoke | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch; the ranks have found each other by now."""
        if trainer.world_size == 1 or watch_each_other_already():
            return
        if trainer.is_global_zero:
            centre = self._peer = Centre(os.environ["MASTER_ADDR"])
            trainer.strategy.broadcast(centre.invitation)
        else:
            invitation: Any = trainer.strategy.broadcast(None)
            self._peer = join(trainer.global_rank, invitation)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave: all is done."""
        self._leave()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave where this end was asked for: the others are ending in their own time.

        Raises:
            RuntimeError: This rank exits with status 0, which looks to launchers as if it had done.
        """
        if isinstance(exception, KeyboardInterrupt | Stopped | SharedError):
            self._leave()
        elif isinstance(exception, SystemExit) and not exception.code and trainer.world_size > 1:
            raise RuntimeError(
                f"rank {trainer.global_rank} exits in the middle of its work"
            ) from exception

    def _leave(self) -> None:
        if self._peer is not None:
            self._peer.leave()
            self._peer = None
