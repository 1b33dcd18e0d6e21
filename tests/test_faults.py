"""What goes wrong while training costs what was not saved, and is told in one line."""

import errno
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ddpm_lightning import DDPM, UNet
from ddpm_lightning.callbacks import EMA, Checkpoints, Nonfinite, Signals
from ddpm_lightning.checkpoints import load_checkpoint
from ddpm_lightning.data.batches import Batch
from ddpm_lightning.errors import InputError, Stopped
from ddpm_lightning.nonfinite import keep_if_bad, select
from ddpm_lightning.runs import LOCK_NAME, RunLock
from tests.command_line import TINY, ended, run_here, tree
from tests.fit_process import kill_when_there, start_fit
from tests.malicious import Malicious
from tests.training import (
    MemoryLogger,
    Recorder,
    assert_same,
    assert_same_training,
    load,
    make_data,
    make_trainer,
    scalars,
    tiny_module,
    tiny_net,
)

BAD_STEP = 4


def the_line(err: str) -> str:
    """Give what stands beside the progress bar: one line, which says what is wrong."""
    lines = [line for line in re.split("[\r\n]", err) if line and not line.startswith("training ")]
    assert len(lines) == 1, err
    return lines[0]


# --- signals -------------------------------------------------------------------------------------


def stop_by(process: "subprocess.Popen[str]", number: signal.Signals, path: Path) -> str:
    """Send a signal when a file is there, and give what the process says."""
    try:
        for _ in range(6000):
            if path.exists() or process.poll() is not None:
                break
            time.sleep(0.02)
        process.send_signal(number)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + number, output
    return output


def test_a_signal_ends_a_step_and_costs_nothing(pictures: Path, tmp_path: Path) -> None:
    """SIGTERM, then Ctrl-C, each resumed by the command that was printed."""
    whole = start_fit(tmp_path, pictures, "--run_dir", "whole")
    process = start_fit(tmp_path, pictures, "--run_dir", "stopped")
    folder = tmp_path / "stopped" / "checkpoints"
    for number, awaited in ((signal.SIGTERM, "step=30.ckpt"), (signal.SIGINT, "step=90.ckpt")):
        output = stop_by(process, number, folder / awaited)
        told = re.search(r"stopped by (\w+) at step (\d+); go on with: (.*)\n", output)
        assert told is not None, output
        assert told[1] == number.name
        assert load(folder / "last.ckpt")["global_step"] == int(told[2])
        assert "Traceback" not in output
        words = shlex.split(told[3])
        assert words[:4] == ["python", "-m", "ddpm_lightning", "fit"]
        assert words[-4:] == ["--ckpt_path", "last", "--run_dir", "stopped"]
        process = start_fit(tmp_path, pictures, *words[-4:])
    try:
        for last in (process, whole):
            output = last.communicate(timeout=300)[0]
            assert last.returncode == 0, output
    finally:
        process.kill()
        whole.kill()
    for name in ("last", "best", "step=120", "step=200"):
        theirs = tmp_path / "whole" / "checkpoints" / f"{name}.ckpt"
        assert_same_training(folder / f"{name}.ckpt", theirs)
    for tag in ("val/loss", "val/loss_ema", "train/lr", "train/loss", "train/loss_q1"):
        assert scalars(tmp_path / "stopped", tag) == scalars(tmp_path / "whole", tag), tag
    assert not list((tmp_path / "stopped").glob(".lock"))


class Interrupt(Callback):
    """Sends Ctrl-C to this process in the second step."""

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_run_in_the_background_ignores_ctrl_c(
    ignored: bool, pictures: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    trainer = make_trainer(tmp_path, Interrupt(), Signals("fit"), Checkpoints(), max_steps=4)
    try:
        with nullcontext() if ignored else pytest.raises(Stopped, match="SIGINT at step 2"):
            trainer.fit(tiny_module(), make_data(pictures))
    finally:
        signal.signal(signal.SIGINT, before)
    assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == (4 if ignored else 2)


def test_two_ranks_stop_at_the_same_step(pictures: Path, tmp_path: Path) -> None:
    """Though only the first is told; neither is left behind, and no warning misleads."""
    process = start_fit(
        tmp_path,
        pictures,
        *("--run_dir", "run", "--trainer.devices", "2", "--trainer.strategy", "ddp"),
        *("--trainer.max_steps", "100000", "--trainer.val_check_interval", "20"),
    )
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    output = stop_by(process, signal.SIGTERM, last)
    told = re.findall(r"stopped by SIGTERM at step (\d+); go on with: ", output)
    assert told == [str(load(last)["global_step"])], output
    assert "Traceback" not in output
    assert "sync_dist" not in output


# --- steps that are not finite -------------------------------------------------------------------


def add_at(batch: Batch, position: int, value: float) -> Tensor:
    """Give zeros, and a value for the image at one position, float [N]."""
    added = torch.zeros(len(batch.positions))
    added[torch.from_numpy(batch.positions == position)] = value
    return added


class BadOnce(DDPM):
    """Its loss is not finite in one image of one step."""

    def losses(self, batch: Batch, seed: int, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        losses, t = super().losses(batch, seed, t)
        return losses + add_at(batch, 8 * BAD_STEP - 1, torch.nan), t


def bad_module(**options: Any) -> DDPM:
    return BadOnce(
        tiny_net(),
        schedule="linear",
        num_timesteps=20,
        lr_warmup_steps=0,
        **{"optimizer": lambda params: torch.optim.Adam(params, lr=1e-3), **options},
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("every_n_steps", [1, 3, 0])
def test_a_bad_step_stops_before_anything_is_written(
    every_n_steps: int, pictures: Path, tmp_path: Path
) -> None:
    """At the next checkpoint, or the next logging step, 5 here."""
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        EMA(0.5),
        recorder,
        Nonfinite("stop"),
        Checkpoints(every_n_steps=every_n_steps, keep_every_n_steps=0),
        max_steps=20,
        log_every_n_steps=5,
        val_check_interval=100,
    )
    with pytest.raises(InputError, match=rf"^step {BAD_STEP} is not finite \(loss nan") as error:
        trainer.fit(bad_module(), make_data(pictures))
    assert "\n" not in str(error.value)
    assert "--on_nonfinite skip" in str(error.value)
    assert recorder.steps[-1] == (BAD_STEP if every_n_steps == 1 else 5)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (report["step"], report["loss"]) == (BAD_STEP, "nan")
    assert report["positions"] == [24, 31]
    data = make_data(pictures)
    order = data.train_dataloader().dataset._order  # type: ignore[attr-defined]
    assert report["training_images"] == order.indices(np.arange(24, 32)).tolist()
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert last.exists() == bool(every_n_steps)
    if every_n_steps:
        assert str(last) in str(error.value)
        assert load(last)["global_step"] == 3
        DDPM.from_checkpoint(last)


def test_the_devices_choice_is_that_of_the_host() -> None:
    """On a device nobody may look at the flag: there both lists go through a kernel."""
    old, new = [torch.zeros(2), torch.ones(3)], [torch.full((2,), torch.nan), torch.full((3,), 5.0)]
    for is_bad, expected in ((torch.tensor(True), old), (torch.tensor(False), new)):
        for choose in (select, keep_if_bad):
            for ours, theirs in zip(choose(is_bad, old, new), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


ADAMS = {
    "plain": lambda params: torch.optim.Adam(params, lr=1e-3),
    "fused": lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimizer", ADAMS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_changes_no_bit(
    optimizer: str, accumulate: int, pictures: Path, tmp_path: Path
) -> None:
    recorder, logger, skipping = Recorder(), MemoryLogger(), Nonfinite("skip")
    ema = EMA(0.5)
    averages: list[list[Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            averages.append([mean.clone() for mean in ema.average])

    trainer = make_trainer(
        tmp_path,
        ema,
        recorder,
        Watch(),
        skipping,
        Checkpoints(every_n_steps=1, keep_every_n_steps=1),
        max_steps=6,
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        logger=logger,
        val_check_interval=100,
    )
    trainer.fit(bad_module(on_nonfinite="skip", optimizer=ADAMS[optimizer]), make_data(pictures))
    ends = slice(accumulate - 1, None, accumulate)
    weights, means = recorder.weights[ends], averages[ends]
    assert len(weights) == 6
    assert torch.equal(weights[BAD_STEP - 1], weights[BAD_STEP - 2])
    assert_same(means[BAD_STEP - 1], means[BAD_STEP - 2])
    assert not torch.equal(weights[BAD_STEP], weights[BAD_STEP - 1])
    before, after = (
        load(tmp_path / "checkpoints" / f"step={step}.ckpt") for step in (BAD_STEP - 1, BAD_STEP)
    )
    assert_same(after["optimizer_states"][0]["state"], before["optimizer_states"][0]["state"])
    assert after["global_step"] == BAD_STEP
    assert skipping.num_skipped == 1
    assert logger.scalars["skipped_steps"] == {3: 0, 6: 1}
    # a run that goes on goes on counting
    again = Nonfinite("skip")
    trainer = make_trainer(tmp_path, EMA(0.5), again, Checkpoints(), max_steps=8)
    trainer.fit(
        bad_module(on_nonfinite="skip", optimizer=ADAMS[optimizer]),
        make_data(pictures),
        ckpt_path=tmp_path / "checkpoints" / "step=6.ckpt",
    )
    assert again.num_skipped == 1


def test_the_options_of_bad_steps_on_the_command_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is infinite: stopped with status 2 and one line, or skipped and counted."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "tiny.yaml").write_text(TINY.format(source=pictures))
    losses = DDPM.losses

    def bad(self: DDPM, batch: Batch, seed: int, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found, t = losses(self, batch, seed, t)
        return found + add_at(batch, 17, torch.inf), t

    monkeypatch.setattr(DDPM, "losses", bad)
    line = "fit --config tiny.yaml --trainer.val_check_interval 100 --trainer.max_steps 6"
    result = run_here(here, *line.split(), "--run_dir", "stop")
    assert result.status == 2
    assert the_line(result.err).startswith("error: step ")
    assert (here / "stop" / "nonfinite.json").is_file()
    result = run_here(here, *line.split(), "--run_dir", "skip", "--on_nonfinite", "skip")
    assert result.status == 0, result.err
    assert "skipped: 1 steps that were not finite" in result.out


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["device", "host"])
def test_out_of_memory_names_the_batch_and_what_helps(
    kind: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(*arguments: object) -> None:
        if kind == "device":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        torch.empty(2**60)  # the allocator's own words

    monkeypatch.setattr(DDPM, "losses", losses)
    here = tmp_path / "here"
    here.mkdir()
    (here / "tiny.yaml").write_text(TINY.format(source=pictures))
    result = run_here(here, "fit", "--config", "tiny.yaml")
    assert result.status == 2
    told = the_line(result.err)
    for word in (
        "out of memory",
        "--data.batch_size",
        "--trainer.accumulate_grad_batches 2",
        "--trainer.devices",
        "--model.net.checkpointing true",
        "--trainer.precision bf16-mixed",
    ):
        assert word in told
    one_at_a_time = ("--data.batch_size", 1, "--run_dir", "one")
    told = the_line(run_here(here, "fit", "--config", "tiny.yaml", *one_at_a_time).err)
    assert "--data.batch_size 1 (1 images" in told
    assert "accumulate" not in told


def test_out_of_memory_while_sampling(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(UNet, "forward", forward)
    result = run_here(tmp_path, "sample", small_run, "--num_images", 2, "--accelerator", "cpu")
    assert result.status == 2
    assert "out of memory: a smaller --batch_size" in the_line(result.err)


# --- one run in a folder -------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused(pictures: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "tiny.yaml").write_text(TINY.format(source=pictures))
    line = "fit --config tiny.yaml --run_dir run"
    assert run_here(here, *line.split()).status == 0
    lock = RunLock(here / "run")
    before = tree(here)
    for more in ("--ckpt_path last", "--ckpt_path auto"):
        result = run_here(here, *line.split(), *more.split(), "--trainer.max_steps", "20")
        assert result.status == 2
        assert f"--run_dir run: process {os.getpid()} on " in result.err
        assert result.err.count("\n") == 1
        assert tree(here) == before
    lock.release()
    result = run_here(here, *line.split(), "--ckpt_path", "last", "--trainer.max_steps", "12")
    assert result.status == 0, result.err
    assert not (here / "run" / ".lock").exists()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    script = (
        "import pathlib, time\nfrom ddpm_lightning.runs import RunLock\n"
        f"lock = RunLock(pathlib.Path({str(tmp_path)!r}))\nprint('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    with ended(holder):
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on "):
            RunLock(tmp_path)
    RunLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_trainer(folder, EMA(0.5), Checkpoints(), max_steps=2).fit(
        tiny_module(), make_data(pictures)
    )
    return folder / "checkpoints" / "last.ckpt"


@pytest.mark.filterwarnings("ignore")
def test_a_changed_byte_is_found(small_run: Path, tmp_path: Path) -> None:
    whole = small_run.read_bytes()
    content = load(small_run)
    generator = np.random.default_rng(0)
    places = [*range(0, 600, 40), *generator.integers(0, len(whole), 100).tolist()]
    path = tmp_path / "changed.ckpt"
    num_refused = 0
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        try:
            found = load_checkpoint(path)
        except InputError as error:
            assert "\n" not in str(error)
            num_refused += 1
        else:  # a byte that says nothing, such as padding
            assert_same(found, content)
    assert num_refused > 90


class Vanish(Callback):
    """Removes the run's folder while it trains."""

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == 3:
            shutil.rmtree(trainer.default_root_dir)


@pytest.mark.filterwarnings("ignore")
def test_a_vanished_folder_is_told_and_not_made_anew(pictures: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run", EMA(0.5), Vanish(), Checkpoints(every_n_steps=1), max_steps=6
    )
    with pytest.raises(InputError, match="the run's folder has vanished at step 3") as error:
        trainer.fit(tiny_module(), make_data(pictures))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_vanished_folder_is_told_by_whatever_writes_next(pictures: Path, tmp_path: Path) -> None:
    """Here TensorBoard's writer, whose errors Lightning makes into others."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "tiny.yaml").write_text(TINY.format(source=pictures))
    rarely = ("--checkpoints.every_n_steps", 0, "--checkpoints.keep_every_n_steps", 0)
    vanish = ("--trainer.callbacks+", f"{__name__}.{Vanish.__name__}")
    result = run_here(here, "fit", "--config", "tiny.yaml", *rarely, *vanish)
    assert result.status == 2
    assert "runs/tiny/1: the run's folder has vanished at step 5" in the_line(result.err)
    assert not (here / "runs/tiny/1").exists()


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
def test_curves_that_cannot_be_written_name_the_last_good_checkpoint(
    reason: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor can the lock be removed where nothing can."""
    add_scalar, unlink = SummaryWriter.add_scalar, Path.unlink

    def refuse(writer: SummaryWriter, tag: str, value: float, step: int, *rest: object) -> None:
        if step >= 10:
            raise OSError(reason, os.strerror(reason))
        add_scalar(writer, tag, value, step, *rest)

    def keep_the_lock(path: Path, missing_ok: bool = False) -> None:
        if path.name == LOCK_NAME and reason == errno.EROFS:
            raise OSError(reason, os.strerror(reason), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(SummaryWriter, "add_scalar", refuse)
    monkeypatch.setattr(Path, "unlink", keep_the_lock)
    here = tmp_path / "here"
    here.mkdir()
    (here / "tiny.yaml").write_text(TINY.format(source=pictures))
    only_last = ("--checkpoints.keep_every_n_steps", 0, "--samples.every_n_steps", 0)
    result = run_here(here, "fit", "--config", "tiny.yaml", *only_last)
    assert result.status == 2
    last = "runs/tiny/1/checkpoints/last.ckpt"
    assert f"{os.strerror(reason)}; the last good checkpoint is {last}" in the_line(result.err)
    assert load_checkpoint(here / last)["global_step"] == 5


@pytest.mark.parametrize("by_torch", [True, False])
def test_checkpoints_are_not_executed(by_torch: bool, small_run: Path, tmp_path: Path) -> None:
    path, victim = tmp_path / "planted.ckpt", tmp_path / "victim"
    planted = {**load(small_run), "planted": Malicious(victim)}
    if by_torch:
        torch.save(planted, path)
    else:
        path.write_bytes(pickle.dumps(planted))
    commands = (
        ("sample", path),
        ("fid", path),
        ("fit", "--data.source", tmp_path, "--ckpt_path", path),
    )
    for command in commands:
        result = run_here(tmp_path, *command)
        assert result.status == 2
        assert "not a whole checkpoint file" in the_line(result.err)
    assert not victim.exists()
    pickle.loads(pickle.dumps(planted))  # it would have
    assert victim.exists()


def test_a_full_disk_leaves_the_last_good_checkpoint(pictures: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing a checkpoint fails half-way."""
    kill_when_there(
        start_fit(tmp_path, pictures, "--run_dir", "run"),
        tmp_path / "run" / "checkpoints" / "last.ckpt",
    )
    folder = tmp_path / "run" / "checkpoints"
    for part in folder.glob(".*"):
        part.unlink()
    last = folder / "last.ckpt"
    before = last.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        process = start_fit(tmp_path, pictures, "--run_dir", "run", "--ckpt_path", "last")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    assert "Traceback" not in output
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, output
    assert "File too large" in told[0]
    assert "the last good checkpoint is run/checkpoints/last.ckpt" in told[0]
    assert last.read_bytes() == before
    assert not list(folder.glob(".*"))


def test_out_of_memory_before_there_is_a_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: object, **options: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(UNet, "__init__", too_large)
    result = run_here(tmp_path, "fit", "--model.net.base_channels", 64)
    assert result.status == 2
    assert "while the network was being built" in the_line(result.err)
