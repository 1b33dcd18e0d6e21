"""Training N steps and resuming for N more is training 2N steps, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from ddpm_lightning.callbacks import EMA, Checkpoints, Curves, Samples
from tests.conftest import NUM_TRAIN
from tests.faults import survive
from tests.training import (
    MemoryLogger,
    Recorder,
    assert_same_training,
    make_data,
    make_trainer,
    tiny_module,
    tiny_net,
)


class Train:
    """Trains in one folder after another, with the same options but the number of steps.

    Args:
        dropout: The network's.
        num_workers: The data's.
        options: The Trainer's.
    """

    def __init__(
        self, root: Path, pictures: Path, dropout: float, num_workers: int, **options: Any
    ) -> None:
        self._root = root
        self._pictures = pictures
        self._dropout = dropout
        self._num_workers = num_workers
        self._options = options
        self.recorder = Recorder()
        self.logger = MemoryLogger()

    def __call__(self, name: str, steps: int, resume: Path | None = None) -> Path:
        """Train, and give the folder of the checkpoints."""
        self.recorder, self.logger = Recorder(), MemoryLogger()
        trainer = make_trainer(
            self._root / name,
            Curves(),
            EMA(0.9),
            Samples(every_n_steps=4, num_images=2, num_steps=2),
            self.recorder,
            Checkpoints(every_n_steps=3, keep_every_n_steps=1),
            max_steps=steps,
            logger=self.logger,
            log_every_n_steps=5,
            **self._options,
        )
        torch.manual_seed(len(name))  # what the global generator's state is does not matter
        data = make_data(self._pictures, num_workers=self._num_workers)
        trainer.fit(tiny_module(tiny_net(self._dropout)), data, ckpt_path=resume)
        return self._root / name / "checkpoints"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("accumulate", "dropout", "num_workers"), [(1, 0.0, 0), (2, 0.0, 0), (2, 0.3, 0), (1, 0.3, 2)]
)
def test_resuming_is_going_on(
    accumulate: int, dropout: float, num_workers: int, pictures: Path, tmp_path: Path
) -> None:
    """From a step before, at and after a validation, and on both sides of an epoch's border.

    An epoch has 3.75 steps; it validates at 4, 8 and 12 and logs at 5, 10 and 12.
    """
    train = Train(
        tmp_path,
        pictures,
        dropout,
        num_workers,
        accumulate_grad_batches=accumulate,
        val_check_interval=4 * accumulate,
    )
    whole = train("whole", 12)
    seen, curves = train.recorder, train.logger.scalars
    assert seen.positions == list(range(12 * 8))
    assert len(seen.positions) > 3 * NUM_TRAIN
    for start in (6,) if num_workers else (3, 4, 6):
        first = train(f"{start} steps", start)
        assert_same_training(first / "last.ckpt", whole / f"step={start}.ckpt")
        # from its end, and from the middle of the whole run
        for name, checkpoint in {
            "resumed": first / "last.ckpt",
            "restarted": whole / f"step={start}.ckpt",
        }.items():
            resumed = train(f"{name} at {start}", 12, resume=checkpoint)
            assert_same_training(resumed / "last.ckpt", whole / "last.ckpt")
            assert train.recorder.positions == seen.positions[start * 8 :]
            assert train.recorder.steps == seen.steps[start * accumulate :]
            validated = [step for step in (4, 8, 12) if step > start]
            assert train.recorder.at("validation") == validated
            assert train.recorder.at("save") == list(range(start + 1, 13))
            for tag in ("val/loss", "val/loss_ema"):
                assert train.logger.scalars[tag] == {step: curves[tag][step] for step in validated}
            assert train.logger.scalars["train/loss"][12] == curves["train/loss"][12]


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_goes_on_from_before_its_decay_is_the_longer_run(
    pictures: Path, tmp_path: Path
) -> None:
    def train(name: str, steps: int, resume: Path | None = None) -> Path:
        saving = Checkpoints(every_n_steps=0, keep_every_n_steps=5)
        trainer = make_trainer(tmp_path / name, EMA(0.9), saving, max_steps=steps)
        module = tiny_module(lr_decay_steps=3)
        trainer.fit(module, make_data(pictures), ckpt_path=resume)
        return tmp_path / name / "checkpoints"

    short, whole = train("short", 8), train("whole", 12)
    longer = train("longer", 12, resume=short / "step=5.ckpt")  # its decay begins after that
    assert_same_training(longer / "last.ckpt", whole / "last.ckpt")


def test_a_killed_run_goes_on_where_it_was(pictures: Path, tmp_path: Path) -> None:
    """Killed in the write of a checkpoint, then in training."""
    first, second = survive(tmp_path, pictures, num_kills=2, seed=0)
    assert first.whole is not None
    assert second.started_at is not None
    assert 10 <= second.started_at <= first.whole
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["killed", "whole"]


@pytest.mark.usefixtures("one_thread")
def test_another_accumulation_goes_on_with_whole_batches(pictures: Path, tmp_path: Path) -> None:
    """From one to two micro-batches a step, from a step that is odd, and back."""
    one, two = (
        Train(
            tmp_path / str(accumulate),
            pictures,
            0.0,
            0,
            accumulate_grad_batches=accumulate,
            val_check_interval=4 * accumulate,
        )
        for accumulate in (1, 2)
    )
    whole = one("whole", 12)
    curves = one.logger.scalars
    first = one("first", 3)
    second = two("second", 7, resume=first / "last.ckpt")
    assert two.recorder.positions == list(range(3 * 8, 7 * 8))
    assert two.recorder.steps == [3, 4, 4, 5, 5, 6, 6, 7]
    assert two.recorder.at("validation") == [4]
    third = one("third", 12, resume=second / "last.ckpt")
    assert one.recorder.positions == list(range(7 * 8, 12 * 8))
    assert one.recorder.steps == list(range(8, 13))
    assert one.recorder.at("validation") == [8, 12]
    ours, theirs = (torch.load(path / "last.ckpt")["state_dict"] for path in (third, whole))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)
    loss = one.logger.scalars["val/loss"][12]
    assert loss == pytest.approx(curves["val/loss"][12], rel=1e-4)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("limit", [1.0, 6])
def test_a_stop_amid_a_step_is_made_up_for(limit: float, pictures: Path, tmp_path: Path) -> None:
    """As --trainer.max_time may stop: after the first micro-batch of step 6 of two each."""

    class Stop(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            trainer.should_stop = trainer.global_step == 5 and batch.positions[0] == 5 * 8

    def train(name: str, *callbacks: Callback, resume: Path | None = None) -> Path:
        trainer = make_trainer(
            tmp_path / name,
            EMA(0.9),
            *callbacks,
            Checkpoints(every_n_steps=0),
            max_steps=9,
            accumulate_grad_batches=2,
            val_check_interval=8,
            limit_train_batches=limit,
        )
        trainer.fit(tiny_module(), make_data(pictures), ckpt_path=resume)
        return tmp_path / name / "checkpoints" / "last.ckpt"

    whole, recorder = train("whole"), Recorder()
    cut = train("cut", Stop())
    assert torch.load(cut)["global_step"] == 5
    progress = torch.load(cut)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["total"]["ready"] == 11
    resumed = train("resumed", recorder, resume=cut)
    assert recorder.positions == list(range(5 * 8, 9 * 8))
    assert recorder.steps == [5, 6, 6, 7, 7, 8, 8, 9]
    assert_same_training(resumed, whole)
