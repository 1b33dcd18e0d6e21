"""Weights, curves and samples do not depend on the number of processes that make them."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training import BufferedUNet, fit_here, flat_state, load, scalars

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parent.parent

# Seven images to validate make one batch of 16: with two ranks or more, some have none at all.
# Not 32 base channels: with one channel in a group, the group norms cancel the biases before them.
# Their gradients are nothing but rounding then, which Adam scales up to whole learning rates.
OPTIONS = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 20,
    "trainer.log_every_n_steps": 10,
    "trainer.val_check_interval": 10,
    "trainer.enable_progress_bar": "false",
    "data.batch_size": 16,
    "data.flip": "true",
    "model.net.base_channels": 64,
    "model.net.channel_mults": "[1]",
    "model.net.attention_levels": "[]",
    "model.num_timesteps": 20,
    "model.lr_warmup_steps": 20,
    "samples.every_n_steps": 20,
    "fid.every_n_steps": 0,
    "samples.num_images": 4,
    "samples.num_steps": 5,
}


def options(pictures: Path | str, run: Path, precision: str, **others: Any) -> list[str]:
    values = {
        "data.source": pictures,
        "model.net": f"{BufferedUNet.__module__}.{BufferedUNet.__name__}",
        **OPTIONS,
        "run_dir": run,
        "trainer.precision": precision,
        **{f"trainer.{key}": value for key, value in others.items()},
    }
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def launch(folder: Path, pictures: Path, *arguments: str, timeout: float = 240) -> str:
    """Run a command in processes of its own; past the time limit all of them are killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpm_lightning", *arguments],
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
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=timeout)[0]
    finally:
        if process.returncode is None:  # hangs: the ranks are in its session
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def assert_equal_runs(ours: Path, theirs: Path, tolerance: float) -> None:
    one, other = (load(run / "checkpoints" / "last.ckpt") for run in (ours, theirs))
    assert one["global_step"] == other["global_step"] == 20
    for key in ("state_dict", "ema_state_dict"):
        distance = (flat_state(one[key]) - flat_state(other[key])).abs().max()
        assert float(distance) <= tolerance, key
    # TensorBoard keeps float32
    for tag in ("train/loss", "train/loss_q1", "train/grad_norm", "val/loss", "val/loss_ema"):
        curve = scalars(ours, tag)
        assert list(curve) == [10, 20], tag
        assert curve == pytest.approx(scalars(theirs, tag), rel=max(1e-5, tolerance)), tag
    assert scalars(ours, "train/images_per_second")[20] > 0
    best = [load(run / "checkpoints" / "best.ckpt")["global_step"] for run in (ours, theirs)]
    assert best[0] == best[1]


def assert_written_once(run: Path, output: str) -> None:
    assert [path.name for path in (run / "samples").iterdir()] == ["step=20.png"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
        "step=20.ckpt",
    ]
    assert len(list(run.glob("events.*"))) == 1
    assert output.count("run: ") == 2  # at the start and at the end


@pytest.fixture(scope="module")
def cache(pictures: Path) -> Path:
    return pictures.parent / "cache"


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("64-true", 1e-12)])
def test_training_does_not_depend_on_ranks_or_accumulation(
    precision: str,
    tolerance: float,
    pictures: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", str(cache))
    one, halves, ranks = (tmp_path / name for name in ("one", "halves", "ranks"))
    fit_here(*options(pictures, one, precision))
    fit_here(*options(pictures, halves, precision, accumulate_grad_batches=2))
    assert_equal_runs(halves, one, tolerance)
    output = launch(
        tmp_path,
        pictures,
        "fit",
        *options(pictures, ranks, precision, devices=2, strategy="ddp"),
    )
    assert_equal_runs(ranks, one, tolerance)
    assert_written_once(ranks, output)


@pytest.mark.slow
def test_training_does_not_depend_on_four_ranks(
    pictures: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", str(cache))
    for precision, tolerance in {"32-true": 1e-5, "64-true": 1e-12}.items():
        one, ranks = tmp_path / f"one {precision}", tmp_path / f"ranks {precision}"
        fit_here(*options(pictures, one, precision))
        output = launch(
            tmp_path,
            pictures,
            "fit",
            *options(
                pictures,
                ranks,
                precision,
                devices=4,
                strategy="ddp",
                accumulate_grad_batches=2,
            ),
        )
        assert_equal_runs(ranks, one, tolerance)
        assert_written_once(ranks, output)


def test_samples_do_not_depend_on_ranks(
    pictures: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five seeds in batches of four: the second rank has one of them, in a batch of its own."""
    monkeypatch.setenv("DDPM_LIGHTNING_CACHE", str(cache))
    run = tmp_path / "run"
    fit_here(*options(pictures, run, "32-true", max_steps=2))
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    chosen = ["--seeds", "0-2,70,9", "--batch_size", "4", "--num_steps", "5"]
    shared = ["sample", checkpoint, *chosen, "--accelerator", "cpu"]
    launch(tmp_path, pictures, *shared, "--devices", "2", "--out", "two")
    launch(tmp_path, pictures, *shared, "--devices", "1", "--out", "one")
    names = sorted(path.name for path in (tmp_path / "one").glob("*.png"))
    assert names == [*(f"{seed:06}.png" for seed in (0, 1, 2, 9, 70)), "grid.png"]
    assert sorted(path.name for path in (tmp_path / "two").glob("*.png")) == names
    for name in names:
        one, two = (np.asarray(Image.open(tmp_path / out / name)) for out in ("one", "two"))
        assert np.array_equal(one, two), name
    assert len({(tmp_path / "one" / name).read_bytes() for name in names}) == len(names)
    # a rank without a batch is no error
    few = ["sample", checkpoint, "--num_images", "2", "--num_steps", "2", "--accelerator", "cpu"]
    launch(tmp_path, pictures, *few, "--devices", "2", "--out", "few")
    assert (tmp_path / "few" / "grid.png").exists()
