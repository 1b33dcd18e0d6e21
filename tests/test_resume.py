"""Training N steps and resuming for N more is training 2N steps, to the last bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_lightning.callbacks import EMA, Checkpoints, Curves, Samples
from tests.command_line import heed_interrupts
from tests.conftest import NUM_TRAIN
from tests.training import (
    MemoryLogger,
    Recorder,
    assert_same_training,
    load,
    make_data,
    make_trainer,
    scalars,
    tiny_module,
    tiny_net,
)

ROOT = Path(__file__).parent.parent


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


OPTIONS = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 200,
    "trainer.log_every_n_steps": 10,
    "trainer.val_check_interval": 20,
    "trainer.enable_progress_bar": "false",
    "data.batch_size": 8,
    "model.net.base_channels": 32,
    "model.net.channel_mults": "[1]",
    "model.net.attention_levels": "[]",
    "model.net.dropout": 0.1,
    "model.num_timesteps": 20,
    "samples.every_n_steps": 0,
    "fid.every_n_steps": 0,
    "checkpoints.every_n_steps": 10,
    "checkpoints.keep_every_n_steps": 30,
}


def start_fit(folder: Path, pictures: Path, *arguments: str) -> subprocess.Popen[str]:
    options = [text for key, value in OPTIONS.items() for text in (f"--{key}", str(value))]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "ddpm_lightning", "fit", "--data.source", str(pictures)),
            *options,
            *arguments,
        ],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DDPM_LIGHTNING_CACHE": str(pictures.parent / "cache"),
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=heed_interrupts,
    )


def kill_when_there(process: subprocess.Popen[str], path: Path) -> None:
    """Wait for a file, at most two minutes, and kill the process at once."""
    try:
        for _ in range(6000):
            if path.exists():
                break
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            break
    finally:
        process.kill()
    output = process.communicate(timeout=60)[0]
    assert path.exists(), output
    assert process.returncode == -signal.SIGKILL, output


def test_a_killed_run_goes_on_where_it_was(pictures: Path, tmp_path: Path) -> None:
    whole = start_fit(tmp_path, pictures, "--run_dir", "whole")
    killed = start_fit(tmp_path, pictures, "--run_dir", "killed")
    folder = tmp_path / "killed" / "checkpoints"
    try:
        kill_when_there(killed, folder / "step=30.ckpt")
        before = load(folder / "last.ckpt")["global_step"]
        assert 20 <= before < 200
        resumed = start_fit(tmp_path, pictures, "--run_dir", "killed", "--ckpt_path", "last")
        output = resumed.communicate(timeout=300)[0]
        assert resumed.returncode == 0, output
        output = whole.communicate(timeout=300)[0]
        assert whole.returncode == 0, output
    finally:
        whole.kill()
    for name in ("last", "best", *(f"step={step}" for step in (30, 60, 90, 120, 150, 180, 200))):
        ours, theirs = folder / f"{name}.ckpt", tmp_path / "whole" / "checkpoints" / f"{name}.ckpt"
        assert_same_training(ours, theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
    assert not [path for path in folder.iterdir() if path.suffix != ".ckpt"]
    configs = [path.name for path in (tmp_path / "killed").glob("*.yaml")]
    assert configs == ["config.yaml"]
    # Each step of each curve is there once, and what can be equal is.
    for tag in ("val/loss", "val/loss_ema", "train/lr", "train/grad_norm", "train/loss"):
        curve = scalars(tmp_path / "killed", tag)
        assert curve == scalars(tmp_path / "whole", tag), tag
        interval = 20 if tag.startswith("val") else 10
        assert list(curve) == list(range(interval, 201, interval))
