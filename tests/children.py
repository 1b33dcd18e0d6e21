"""What runs in processes that tests start: a watching callback, and networks that fail."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from ddpm_lightning.data.batches import Batch
from ddpm_lightning.diffusion.timestep_sampling import LossSecondMoment
from tests.training import BufferedUNet


class Seen(Callback):
    """Writes RUN/seen-RANK.pt: what the network was given in training, micro-batch after another.

    x_t is the image, its flip and its noise at once. Beside it RUN/draws-RANK.pt, where t is drawn
    by the losses: what the rank has remembered of them.
    """

    def __init__(self) -> None:
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._seen: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.net.register_forward_pre_hook(self._note)
        if trainer.world_size > 1:
            assert getattr(trainer.strategy.model, "gradient_as_bucket_view", False)

    def _note(self, net: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        if net.training:
            self._inputs = inputs

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert self._inputs is not None
        x_t, t, *_ = self._inputs  # and labels, where the network is told some
        positions = torch.from_numpy(batch.positions)
        self._seen.append({"positions": positions, "images": batch.images, "t": t, "x_t": x_t})

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        root = trainer.strategy.broadcast(trainer.default_root_dir)  # rank 0 alone has a run
        path = Path(root) / f"seen-{trainer.global_rank}.pt"
        whole = {key: torch.cat([seen[key] for seen in self._seen]) for key in self._seen[0]}
        torch.save(whole, path)
        if isinstance(pl_module._timesteps, LossSecondMoment):
            torch.save(pl_module._timesteps.state_dict(), path.with_name(f"draws-{path.name[5:]}"))


def seen(run: Path) -> dict[str, Tensor]:
    """What all ranks of a run saw, in the order of the positions."""
    parts = [torch.load(path, weights_only=True) for path in run.glob("seen-*.pt")]
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order = whole["positions"].argsort()
    return {key: value[order] for key, value in whole.items()}


class MortalUNet(BufferedUNet):
    """Dies in the middle of its work, once, where the environment says so.

    DIE_AT is the number of the forward pass (0: when the network is made, before torchrun's ranks
    have found each other), DIE_RANK whose, DIE_HOW in which way, and DIE_MARK a
    file that is then made. With DIE_BUSY the other ranks are busy for ever from that pass on: as
    if they were in a collective whose backend does not notice.
    """

    def __init__(
        self,
        base_channels: int = 32,
        channel_mults: Sequence[int] = (1,),
        attention_levels: Sequence[int] = (),
    ) -> None:
        super().__init__(base_channels, channel_mults, attention_levels)
        self._num_passes = 0
        if os.environ.get("DIE_AT") == "0":
            self._meet_fate(Path(os.environ["DIE_MARK"]), int(os.environ["RANK"]))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        mark = os.environ.get("DIE_MARK")
        if mark is not None and not x.is_meta:
            self._num_passes += 1
            if self._num_passes == int(os.environ["DIE_AT"]):
                self._meet_fate(Path(mark), torch.distributed.get_rank())
        return super().forward(x, t, labels)

    @staticmethod
    def _meet_fate(mark: Path, rank: int) -> None:
        if rank != int(os.environ["DIE_RANK"]):
            if "DIE_BUSY" in os.environ:
                time.sleep(600)
            return
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return
        match os.environ["DIE_HOW"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise RuntimeError("one rank alone fails")
            case status:
                sys.exit(int(status))


class SlowUNet(BufferedUNet):
    """Takes its time, so that a signal comes in the middle of a run."""

    def __init__(
        self,
        base_channels: int = 32,
        channel_mults: Sequence[int] = (1,),
        attention_levels: Sequence[int] = (),
    ) -> None:
        super().__init__(base_channels, channel_mults, attention_levels)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        time.sleep(0.2)
        return super().forward(x, t, labels)


class SickUNet(BufferedUNet):
    """Gives what is no number in pass SICK_PASS of the training of rank SICK_RANK."""

    _num_passes = 0

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        output = super().forward(x, t, labels)
        self._num_passes += self.training and not x.is_meta
        if self._num_passes != int(os.environ["SICK_PASS"]) or x.is_meta:
            return output
        if torch.distributed.get_rank() != int(os.environ["SICK_RANK"]):
            return output
        return output + torch.nan
