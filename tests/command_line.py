"""Commands run in this process or in one of their own, and what they print, return and write."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddpm_lightning.__main__ import main
from tests.training import command_line

# A network and a run as small as they get. {source} is a folder of images.
TINY = """
model:
  net:
    class_path: ddpm_lightning.UNet
    init_args:
      base_channels: 32
      channel_mults: [1]
      num_res_blocks: 1
      attention_levels: []
  num_timesteps: 20
  lr_warmup_steps: 0
data:
  source: {source}
  batch_size: 4
trainer:
  accelerator: cpu
  max_steps: 10
  val_check_interval: 5
  log_every_n_steps: 5
samples:
  every_n_steps: 10
  num_images: 2
  num_steps: 2
fid:
  every_n_steps: 0
checkpoints:
  every_n_steps: 5
  keep_every_n_steps: 5
"""

# The same as options, but two steps long and on the digits.
TINY_OPTIONS = (
    *("--model.net.base_channels", "32", "--model.net.channel_mults", "[1]"),
    *("--model.net.num_res_blocks", "1", "--model.net.attention_levels", "[]"),
    *("--model.num_timesteps", "20", "--data.batch_size", "4", "--trainer.max_steps", "2"),
    *("--trainer.val_check_interval", "2", "--samples.num_images", "2"),
    *("--samples.num_steps", "2", "--trainer.accelerator", "cpu", "--fid.every_n_steps", "0"),
)


class Result(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


def run_here(cwd: Path, *arguments: object) -> Result:
    """Run a command in this process; for one device only, since others would start pytest again.

    On one thread, as in `start_process`: results are the same bits then.
    """
    out, err = StringIO(), StringIO()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        command_line(*arguments),
        pytest.MonkeyPatch.context() as patch,
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        patch.setenv("DDPM_LIGHTNING_CACHE", str(_cache(cwd)))
        try:
            status = main()
        except SystemExit as exit_:
            assert isinstance(exit_.code, int)
            status = exit_.code
        finally:
            torch.set_num_threads(num_threads)
    return Result(status, out.getvalue(), err.getvalue())


def run_well(cwd: Path, *arguments: object) -> Result:
    """Run a command in this process, and see that it ends well."""
    result = run_here(cwd, *arguments)
    assert result.status == 0, result.err
    return result


def grey_pixels(path: Path) -> Tensor:
    """Read a grey image that a command has written, uint8 [1, H, W]."""
    with Image.open(path) as image:
        assert image.mode == "L"
        return torch.from_numpy(np.array(image))[None]


def heed_interrupts() -> None:
    """Undo, in a new process, that a shell lets what it starts in its background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_process(cwd: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start a command as a user does."""
    return subprocess.Popen(
        [sys.executable, "-m", "ddpm_lightning", *map(str, arguments)],
        cwd=cwd,
        env={
            **os.environ,
            "DDPM_LIGHTNING_CACHE": str(_cache(cwd)),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


def run_process(cwd: Path, *arguments: object) -> Result:
    """Run a command as a user does."""
    with ended(start_process(cwd, *arguments)) as process:
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # by which Python shows where its threads are
            out, err = process.communicate(timeout=60)
            pytest.fail(f"{arguments} hangs:\n{out}\n{err}")
    return Result(process.returncode, out, err)


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """See to it that a process does not outlive a test, whatever comes of that."""
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=60)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def train(folder: Path, source: Path) -> Path:
    """Train the tiny network for ten steps by folder/tiny.yaml; gives the run's folder."""
    (folder / "tiny.yaml").write_text(TINY.format(source=source))
    run_well(folder, "fit", "--config", "tiny.yaml")
    return folder / "runs" / "tiny" / "1"


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder: {path: (time of writing, content)}."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns if path.is_file() else 0,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


def _cache(cwd: Path) -> Path:
    return cwd.parent / f"{cwd.name}-cache"
