"""torchrun and SLURM as far as they can be had without a cluster."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from ddpm_lightning.commands.clusters import Torchrun
from ddpm_lightning.commands.trainer import make_trainer
from tests.children import SlowUNet
from tests.command_line import ended
from tests.processes import ROOT
from tests.test_dying import SMALL
from tests.training import assert_same_training, load

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def environment_of(trainer: Trainer) -> object:
    return trainer._accelerator_connector.cluster_environment


@pytest.mark.parametrize(
    ("num_restarts", "uses_agent", "port"),
    [(0, "True", 29400), (2, "True", 29404), (2, "False", 29400)],
)
def test_restarted_ranks_have_a_store_of_their_own(
    num_restarts: int, uses_agent: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": num_restarts,
        "TORCHELASTIC_USE_AGENT_STORE": uses_agent,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29400,
        "WORLD_SIZE": 1,
        "RANK": 0,
        "LOCAL_RANK": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    environment = environment_of(make_trainer("cpu", "1", 1))
    assert isinstance(environment, Torchrun)
    assert environment.main_port == environment.main_port == port
    is_served_by_agent = num_restarts == 0 and uses_agent == "True"
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == str(is_served_by_agent)


SRUN = """#!/bin/bash
# Two ranks on this machine, told of a signal as SLURM tells all tasks of a step.
shift
export SLURM_NTASKS=2 SLURM_NODEID=0
trap 'kill -TERM ${ranks[@]}' TERM
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    ranks+=($!)
done
echo $$ > srun.pid
status=0
for rank in ${ranks[@]}; do
    wait $rank
    code=$?
    while kill -0 $rank 2> /dev/null; do  # it was only the signal that ended the waiting
        wait $rank
        code=$?
    done
    ((code > status)) && status=$code
done
exit $status
"""

SCONTROL = """#!/bin/bash
echo "$@" >> requeued
"""


class Slurm:
    """Stand-ins for srun and scontrol: they show what our script does, not what SLURM does."""

    def __init__(self, folder: Path, pictures: Path) -> None:
        self._folder = folder
        self._cache = pictures.parent / "cache"
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "experiments").mkdir()
        (folder / "experiments" / "cifar10.yaml").write_text("{}\n")

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        (self._folder / "srun.pid").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", str(ROOT / "docs" / "slurm.sbatch"), *arguments],
            cwd=self._folder,
            env={
                **os.environ,
                "PATH": f"{self._folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "DDPM_LIGHTNING_CACHE": str(self._cache),
                "SLURM_JOB_ID": "4711",
                "SLURM_JOB_NAME": "ddpm",
                "SLURM_NNODES": "1",
                "SLURM_NTASKS_PER_NODE": "2",
            },
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def signal(self, job: subprocess.Popen[str]) -> None:
        """Do what --signal=TERM@120 asks for, and see to it that the job ends."""
        os.kill(int((self._folder / "srun.pid").read_text()), signal.SIGTERM)
        job.communicate(timeout=60)


@pytest.mark.slow
def test_a_job_of_slurm_is_requeued_and_goes_on(pictures: Path, tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, pictures)
    net = f"{SlowUNet.__module__}.{SlowUNet.__name__}"
    small = {**SMALL, "data.source": pictures, "model.net": net, "trainer.max_steps": 30}
    options = [text for key, value in small.items() for text in (f"--{key}", str(value))]
    with ended(slurm.submit(*options, "--run_dir", "plain")) as plain:
        output = plain.communicate(timeout=240)[0]
    assert plain.returncode == 0, output
    assert not (tmp_path / "requeued").exists()

    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    with ended(slurm.submit(*options, "--run_dir", "cut")) as cut:
        for _ in range(6000):
            if last.exists() or cut.poll() is not None:
                break
            time.sleep(0.02)
        slurm.signal(cut)
    assert cut.returncode == 143
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert 1 <= load(last)["global_step"] < 30
    with ended(slurm.submit(*options, "--run_dir", "cut")) as again:
        output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output
    assert_same_training(last, tmp_path / "plain" / "checkpoints" / "last.ckpt")
    assert not list(tmp_path.rglob("hpc_ckpt*"))
