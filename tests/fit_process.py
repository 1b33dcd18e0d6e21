"""Real processes of `fit`, and what is compared of the runs that they leave behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lightning.pytorch import Callback, Trainer

from tests.command_line import heed_interrupts
from tests.training import assert_same_training, load, scalars

ROOT = Path(__file__).parent.parent

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


def start_fit(
    folder: Path, pictures: Path, *arguments: str, told: Path | None = None
) -> subprocess.Popen[str]:
    """Start a run of a few seconds; its steps are told in a file, if one is given."""
    if told is not None:
        callback = f"{TellSteps.__module__}.{TellSteps.__name__}"
        arguments = (*arguments, "--trainer.callbacks+", callback)
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
            "TOLD": str(told),
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=heed_interrupts,
    )


class TellSteps(Callback):
    """Tells which step a process went on from, and the one that it is at, in the file TOLD."""

    def on_train_start(self, trainer: Trainer, *arguments: object) -> None:
        self._file = os.open(os.environ["TOLD"], os.O_WRONLY | os.O_CREAT)
        self._first = trainer.global_step
        self._tell(trainer)

    def on_train_batch_start(self, trainer: Trainer, *arguments: object) -> None:
        self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        # in one call, so that nobody reads a half of it
        os.pwrite(self._file, f"{self._first:9} {trainer.global_step:9}".encode(), 0)


def kill_when_there(process: subprocess.Popen[str], path: Path) -> None:
    """Wait for a file, at most two minutes, and kill the process at once."""
    try:
        for _ in range(6000):
            if path.exists() or process.poll() is not None:
                break
            time.sleep(0.02)
    finally:
        process.kill()
    output = process.communicate(timeout=60)[0]
    assert path.exists(), output
    assert process.returncode == -signal.SIGKILL, output


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two runs' checkpoints and curves are equal bit for bit, and nothing else is left behind."""
    names = sorted(path.name for path in (theirs / "checkpoints").iterdir())
    assert all(name.endswith(".ckpt") and not name.startswith(".") for name in names), names
    assert sorted(path.name for path in (ours / "checkpoints").iterdir()) == names
    for name in names:
        assert_same_training(ours / "checkpoints" / name, theirs / "checkpoints" / name)
    assert [path.name for path in ours.glob("*.yaml")] == ["config.yaml"]
    num_steps = load(theirs / "checkpoints" / "last.ckpt")["global_step"]
    # Each step of each curve is there once, and what can be equal is.
    for tag in ("val/loss", "val/loss_ema", "train/lr", "train/grad_norm", "train/loss"):
        curve = scalars(ours, tag)
        assert curve == scalars(theirs, tag), tag
        interval = 20 if tag.startswith("val") else 10
        assert list(curve) == list(range(interval, num_steps + 1, interval))
