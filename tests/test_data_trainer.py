"""Batches under a real trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ddpm_lightning.data.datamodule import Batch, ImageDataModule
from ddpm_lightning.errors import InputError
from tests.test_data_datamodule import assert_equal, join, take


class Recorder(LightningModule):
    """Keeps the batches it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Batch] = []
        self.num_validated = 0

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        self.seen.append(batch)
        return self.weight * batch.images.float().mean()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self.num_validated += len(batch.images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(folder: Path, num_workers: int = 0) -> ImageDataModule:
    return ImageDataModule(
        batch_size=300, flip=True, num_workers=num_workers, cache_dir=str(folder / "cache")
    )


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Recorder]:
    def train(num_workers: int = 0, checkpoint: Path | None = None, **options: Any) -> Recorder:
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            accumulate_grad_batches=2,
            default_root_dir=tmp_path,
            **{"max_epochs": -1, **options},
        )
        module = Recorder()
        trainer.fit(module, data(tmp_path, num_workers), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module

    return train


@pytest.mark.filterwarnings("ignore")
def test_trainer_sees_the_sequence_and_resumes_in_it(
    train: Callable[..., Recorder], tmp_path: Path
) -> None:
    whole = take(data(tmp_path).train_dataloader(), 8)
    module = train(max_steps=4, num_workers=2)
    assert_equal(join(module.seen), join(whole[:4]))
    assert module.num_validated == 90  # the sanity check
    module = train(max_steps=8, checkpoint=tmp_path / "last.ckpt")
    assert_equal(join(module.seen), join(whole[4:]))


@pytest.mark.filterwarnings("ignore")
def test_short_epochs_go_on_in_the_sequence(train: Callable[..., Recorder], tmp_path: Path) -> None:
    whole = take(data(tmp_path).train_dataloader(), 4)
    module = train(max_epochs=2, limit_train_batches=4)
    assert_equal(join(module.seen), join(whole))
    assert module.num_validated == 2 * 90 + 90  # two epochs, and the sanity check before them


@pytest.mark.filterwarnings("ignore")
def test_overfitting_is_refused(train: Callable[..., Recorder]) -> None:
    with pytest.raises(InputError, match=r"--trainer.overfit_batches"):
        train(overfit_batches=2, max_steps=1)
