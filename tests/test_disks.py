"""Disks that are full or read-only in earnest: each in a mount namespace of its own."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ddpm_lightning.checkpoints import load_checkpoint
from tests.fit_process import OPTIONS
from tests.processes import TRAINER, Job


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    trial = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(trial, capture_output=True, check=False, timeout=60).returncode == 0


pytestmark = pytest.mark.skipif(not can_mount(), reason="needs mount namespaces, and so root")

# Each of them runs a command, and ends with its status.
FULL = """
mkdir disk
mount -t tmpfs -o size=8m none disk
status=0
"$@" || status=$?
cp -a disk saved
exit $status
"""
READ_ONLY_FROM_THE_START = """
mkdir disk
mount -t tmpfs -o ro none disk
"$@"
"""
READ_ONLY_AFTER_A_WHILE = """
"$@" &
until [ -e disk/run/checkpoints/last.ckpt ]; do
    kill -0 $!
    sleep 0.02
done
mount --bind disk/run/checkpoints disk/run/checkpoints
mount -o remount,bind,ro disk/run/checkpoints
wait $!
"""


def fit(folder: Path, pictures: Path, script: str) -> str:
    """Train without end in disk/run until that fails, and give the line that says why."""
    values = {**OPTIONS, "data.source": pictures, "run_dir": "disk/run", "trainer.max_steps": -1}
    options = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    within = ("unshare", "--mount", "sh", "-e", "-c", script, "sh")
    with Job(folder, pictures, *TRAINER, "fit", *options, within=within) as job:
        output = job.output()
    assert job.process.returncode == 2, output
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


def assert_whole(checkpoints: Path) -> None:
    """All that is there can be read, and last.ckpt is the newest."""
    steps = {path.name: load_checkpoint(path)["global_step"] for path in checkpoints.iterdir()}
    assert steps["last.ckpt"] == max(steps.values()) > 0


@pytest.mark.slow
def test_a_full_disk(pictures: Path, tmp_path: Path) -> None:
    line = fit(tmp_path, pictures, FULL)
    last = "disk/run/checkpoints/last.ckpt"
    assert f"No space left on device; the last good checkpoint is {last}" in line
    assert_whole(tmp_path / "saved" / "run" / "checkpoints")


def test_a_disk_that_becomes_read_only(pictures: Path, tmp_path: Path) -> None:
    line = fit(tmp_path, pictures, READ_ONLY_AFTER_A_WHILE)
    last = "disk/run/checkpoints/last.ckpt"
    assert line.startswith("error: disk/run/checkpoints/")
    assert f".ckpt: Read-only file system; the last good checkpoint is {last}" in line
    assert_whole(tmp_path / last[: -len("/last.ckpt")])


@pytest.mark.slow
def test_a_disk_that_is_read_only(pictures: Path, tmp_path: Path) -> None:
    line = fit(tmp_path, pictures, READ_ONLY_FROM_THE_START)
    assert "Read-only file system: 'disk/run'" in line
