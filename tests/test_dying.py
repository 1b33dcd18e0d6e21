"""A rank that dies ends the job with its error, or torchrun begins again where it was."""

from pathlib import Path

import pytest

from tests.children import MortalUNet, SlowUNet
from tests.processes import NETWORK, TORCHRUN, TRAINER, Job, cut_cable, two_nodes
from tests.training import assert_same_training, fit_here, load, scalars

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

NET = f"{MortalUNet.__module__}.{MortalUNet.__name__}"

SMALL = {
    "model.net": NET,
    "model.num_timesteps": 20,
    "model.lr_warmup_steps": 0,
    "data.batch_size": 8,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.log_every_n_steps": 5,
    "trainer.val_check_interval": 1000,
    "samples.every_n_steps": 0,
    "fid.every_n_steps": 0,
    "checkpoints.every_n_steps": 1,
    "checkpoints.keep_every_n_steps": 0,
}


def options(pictures: Path, run: Path, **others: object) -> list[str]:
    trainer = {f"trainer.{key}": value for key, value in others.items()}
    values = {"data.source": pictures, "run_dir": run, **SMALL, **trainer}
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def fate(mark: Path, rank: int, how: str, at: int = 3, busy: bool = True) -> dict[str, str]:
    """How one rank is to die; unless told, the others are busy for ever and do not notice."""
    values = {"DIE_MARK": str(mark), "DIE_RANK": str(rank), "DIE_HOW": how, "DIE_AT": str(at)}
    return values | ({"DIE_BUSY": ""} if busy else {})


def assert_ends(job: Job, mark: Path) -> str:
    """After the death nothing is left of a job within a minute, on a machine that has more to do.

    Its output ends when the last process does that could write to it.
    """
    job.wait_for(mark)
    output = job.output(timeout=60)
    assert job.process.returncode != 0, output
    return output


def die(
    folder: Path, pictures: Path, launcher: tuple[str, ...], command: list[str], **how: object
) -> str:
    """Run a command on two ranks of which one dies; gives the output."""
    mark = folder / "died"
    environment = fate(mark, **how)  # type: ignore[arg-type]
    arguments = (*launcher, *command)
    with Job(folder, pictures, *arguments, environment=environment) as job:
        return assert_ends(job, mark)


TWO_RANKS = {"max_steps": 20, "devices": 2, "strategy": "ddp"}


def test_a_killed_rank_ends_the_job(pictures: Path, tmp_path: Path) -> None:
    command = ["fit", *options(pictures, tmp_path / "run", **TWO_RANKS)]
    output = die(tmp_path, pictures, TRAINER, command, rank=1, how="kill")
    assert "[rank: 1] Child process" in output
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 2


@pytest.mark.parametrize("at", [0, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", [NETWORK])
def test_a_rank_killed_on_another_node_ends_the_job(
    network: str, at: int, pictures: Path, tmp_path: Path
) -> None:
    """Neither torchrun's agents nor Lightning see the death from the other node; we do."""
    run, mark = tmp_path / "run", tmp_path / "died"
    arguments = options(pictures, run, max_steps=20, num_nodes=2, devices=1)
    with two_nodes(
        tmp_path, pictures, "fit", *arguments, environment=fate(mark, rank=1, how="kill", at=at)
    ) as (first, second):
        assert "SIGKILL" in assert_ends(second, mark)
        assert "error: rank 1 has died" in assert_ends(first, mark)


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["meeting", "busy"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["kill", "raise", "3", "0"])
@pytest.mark.parametrize("launcher", [TRAINER, TORCHRUN], ids=["trainer", "torchrun"])
def test_any_death_ends_the_job(
    launcher: tuple[str, ...], how: str, rank: int, busy: bool, pictures: Path, tmp_path: Path
) -> None:
    command = ["fit", *options(pictures, tmp_path / "run", **TWO_RANKS)]
    output = die(tmp_path, pictures, launcher, command, rank=rank, how=how, busy=busy)
    if how == "raise":
        assert "RuntimeError: one rank alone fails" in output
    elif how == "0":
        assert f"RuntimeError: rank {rank} exits in the middle of its work" in output
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["kill", "raise"])
@pytest.mark.parametrize("launcher", [TRAINER, TORCHRUN], ids=["trainer", "torchrun"])
@pytest.mark.parametrize("command", ["sample", "fid"])
def test_any_death_ends_a_command(
    command: str, launcher: tuple[str, ...], how: str, rank: int, pictures: Path, tmp_path: Path
) -> None:
    fit_here(*options(pictures, tmp_path / "run", max_steps=1))
    line = [command, "run/checkpoints/step=1.ckpt", "--accelerator", "cpu", "--devices", "2"]
    line += ["--num_images", "8", "--batch_size", "4", "--num_steps", "5", "--out", "out"]
    if command == "fid":
        line += ["--extractor", "efficientnet-lite0", "--reference", str(pictures)]
    output = die(tmp_path, pictures, launcher, line, rank=rank, how=how)
    if how == "raise":
        assert "RuntimeError: one rank alone fails" in output


def train_undisturbed(folder: Path, pictures: Path) -> Path:
    """What a run of two ranks that nothing happens to ends with."""
    plain = folder / "plain"
    line = options(pictures, plain, **TWO_RANKS | {"max_steps": 10})
    with Job(folder, pictures, *TRAINER, "fit", *line) as job:
        job.succeed()
    return plain


def assert_went_on(run: Path, plain: Path, mark: Path, output: str) -> None:
    assert mark.exists()
    assert output.count(f"run: {run}\n") == 3, output  # at both starts, and at the end
    assert_same_training(*(path / "checkpoints" / "last.ckpt" for path in (run, plain)))
    for tag in ("train/loss", "train/lr"):
        assert scalars(run, tag) == scalars(plain, tag)
    assert [path.name for path in run.glob("*.yaml")] == ["config.yaml"]


@pytest.mark.parametrize("at", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_torchrun_goes_on_after_a_death(at: int, pictures: Path, tmp_path: Path) -> None:
    """Bit for bit; in the first step there is no checkpoint yet, but another run's folder."""
    killed, mark = tmp_path / "killed", tmp_path / "mark"
    plain = train_undisturbed(tmp_path, pictures)
    line = options(pictures, killed, **TWO_RANKS | {"max_steps": 10})
    launcher = (*TORCHRUN[:-2], "--max_restarts", "3", *TORCHRUN[-2:], "fit")
    environment = fate(mark, rank=1, how="kill", at=at, busy=False)
    arguments = (*launcher, *line, "--ckpt_path", "auto")
    with Job(tmp_path, pictures, *arguments, environment=environment) as job:
        output = job.succeed()
    assert_went_on(killed, plain, mark, output)
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "killed", "mark"}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("network", [NETWORK])
def test_two_nodes_go_on_after_a_death(
    network: str, rank: int, pictures: Path, tmp_path: Path
) -> None:
    """Although the other node's rank does not notice by itself."""
    killed, mark = tmp_path / "killed", tmp_path / "mark"
    plain = train_undisturbed(tmp_path, pictures)
    line = [*options(pictures, killed, max_steps=10, num_nodes=2, devices=1), "--ckpt_path", "auto"]
    environment = fate(mark, rank, how="kill", at=6)
    with two_nodes(
        tmp_path, pictures, "fit", *line, environment=environment, max_restarts=3
    ) as jobs:
        outputs = [job.succeed() for job in jobs]
    assert_went_on(killed, plain, mark, "".join(outputs))


@pytest.mark.slow
@pytest.mark.skipif(NETWORK == "loopback", reason="needs network namespaces, and so root")
def test_a_node_that_falls_silent_ends_the_job(pictures: Path, tmp_path: Path) -> None:
    """As one without power does: it closes nothing."""
    line = options(pictures, tmp_path / "run", max_steps=1000, num_nodes=2, devices=1)
    line += ["--model.net", f"{SlowUNet.__module__}.{SlowUNet.__name__}"]
    with two_nodes(tmp_path, pictures, "fit", *line) as jobs:
        jobs[0].wait_for(tmp_path / "run" / "checkpoints" / "last.ckpt")
        cut_cable()
        for rank, job in enumerate(jobs):
            output = job.output(timeout=60)
            assert job.process.returncode != 0, output
            assert f"error: rank {1 - rank} has died" in output
