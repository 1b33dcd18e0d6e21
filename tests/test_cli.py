"""fit, validate and test, and the answers that come before any command."""

import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddpm_lightning import DDPM
from tests.command_line import (
    TINY,
    TINY_OPTIONS,
    ended,
    run_here,
    run_process,
    run_well,
    start_process,
    train,
    tree,
)
from tests.training import assert_same_training, load, scalars

TWO_STEPS = ("--config", "tiny.yaml", "--trainer.max_steps", "2")
QUIET = ("--samples.every_n_steps", "0", "--trainer.enable_progress_bar", "false")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The run's folder of ten steps; do not write to it."""
    return train(tmp_path_factory.mktemp("trained"), pictures)


@pytest.fixture
def here(tmp_path: Path, pictures: Path) -> Path:
    """A folder with nothing but tiny.yaml."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TINY.format(source=pictures))
    return folder


def files(run: Path) -> set[str]:
    """The files of a run, its TensorBoard events as one."""
    paths = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {"events" if "tfevents" in path.name else str(path) for path in paths}


def options(run: Path, name: str = "config.yaml") -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((run / name).read_text())
    return parsed


# --- before any command --------------------------------------------------------------------------


def test_help_version_and_typos_need_no_torch() -> None:
    program = """
import sys
import ddpm_lightning
from ddpm_lightning.__main__ import main

for argument in ("--help", "--version", "fitt"):
    sys.argv = ["ddpm_lightning", argument]
    print(main())
heavy = {"torch", "lightning", "numpy", "jsonargparse"}
assert not heavy & sys.modules.keys()
try:
    ddpm_lightning.UNett
except AttributeError as error:
    print(error)
from ddpm_lightning import make_betas
assert "torch" in sys.modules and "lightning" not in sys.modules
from ddpm_lightning import DDPM, ImageDataModule, Muon, Process, UNet
print(*sorted(set(ddpm_lightning.__all__) - set(globals())))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    out = ran.stdout
    assert out.startswith("usage: python -m ddpm_lightning COMMAND [OPTIONS]\n")
    pictures = ("progressive", "shared-latents", "interpolate", "neighbours")
    for command in ("fit", "validate", "test", "sample", "fid", *pictures):
        assert f"\n  {command} " in out
    assert "\n0\nddpm_lightning " in out
    assert out.endswith("\n0\n2\nmodule 'ddpm_lightning' has no attribute 'UNett'\n__version__\n")
    assert ran.stderr.startswith("error: no command 'fitt'; did you mean fit? (commands: fit, ")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "sample"])
def test_help_of_a_command(tmp_path: Path, command: str) -> None:
    result = run_well(tmp_path, command, "--help")
    what = "CHECKPOINT [options]" if command == "sample" else "[options]"
    assert result.out.startswith(f"usage: python -m ddpm_lightning {command} {what}\n\n")
    assert "--weights_only" not in result.out
    named = ("--num_images", "--seeds") if command == "sample" else ("--data.batch_size", "--ema")
    assert all(name in result.out for name in named)
    assert not any(tmp_path.iterdir())


# --- a run ---------------------------------------------------------------------------------------


def test_fit_in_an_empty_folder(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    first = run_process(here, "fit", *TINY_OPTIONS)
    assert first.status == 0, first.err
    assert first.out.startswith("run: runs/digits/1\ndata: 1,707 images of 1x8x8 to train on, 90 ")
    assert "network: UNet, " in first.out
    assert "Warning" not in first.err
    run = here / "runs/digits/1"
    assert files(run) == {
        "config.yaml",
        "events",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "checkpoints/step=2.ckpt",
        "samples/step=2.png",
    }
    assert {path.name for path in here.iterdir()} == {"runs"}
    # what is said at the end is there
    told = dict(line.split(": ", 1) for line in first.out.splitlines()[3:])
    for key in ("run", "samples", "checkpoint"):
        assert (here / told[key]).exists(), told
    program, _, logs = told["curves"].split()
    assert Path(program).exists()
    assert (here / logs).is_dir()
    python, *words = told["more samples"].split()
    assert Path(python).samefile(sys.executable)
    assert words[:3] == ["-m", "ddpm_lightning", "sample"]
    assert (here / words[3]).exists()
    assert options(run)["model"]["net"]["init_args"]["base_channels"] == 32  # the short form

    again = run_well(here, "fit", *TINY_OPTIONS)
    assert again.out.startswith("run: runs/digits/2\n")
    assert_same_training(
        run / "checkpoints/last.ckpt", here / "runs/digits/2/checkpoints/last.ckpt"
    )


def test_the_config_of_a_run_gives_the_run_again(here: Path, trained: Path) -> None:
    config = trained / "config.yaml"
    result = run_well(here, "fit", "--run_dir", "again", "--config", config)
    assert result.out.startswith("run: again\n")
    assert (here / "again/config.yaml").read_text() == config.read_text()
    last = "checkpoints/last.ckpt"
    assert_same_training(here / "again" / last, trained / last)
    assert options(trained)["seed_everything"] == 0
    assert not {"run_dir", "ckpt_path", "config"} & options(trained).keys()


def test_configs_merge_in_order(here: Path) -> None:
    overlay = {
        "model": {"net": {"init_args": {"dropout": 0.25}}, "schedule": "cosine"},
        "data": {"batch_size": 6},
        "trainer": {"max_steps": 1},
    }
    (here / "over.yaml").write_text(yaml.safe_dump(overlay))
    configs = ("--config", "tiny.yaml", "--config", "over.yaml")
    result = run_well(here, "fit", *configs, *QUIET, "--model.net.num_res_blocks", "2")
    assert result.out.startswith("run: runs/tiny+over/1\n")
    found = options(here / "runs/tiny+over/1")
    assert found["data"]["batch_size"] == 6
    assert found["model"]["schedule"] == "cosine"
    assert found["model"]["num_timesteps"] == 20
    network = found["model"]["net"]["init_args"]
    assert network["base_channels"] == 32
    assert network["channel_mults"] == [1]
    assert network["dropout"] == 0.25
    assert network["num_res_blocks"] == 2
    assert found["experiment"] == "tiny+over"

    named = run_well(here, "fit", *configs, *QUIET, "--experiment", "mine")
    assert named.out.startswith("run: runs/mine/1\n")


# --- going on ------------------------------------------------------------------------------------


def test_going_on_from_a_checkpoint(here: Path, trained: Path) -> None:
    run = here / "runs/tiny/1"
    shutil.copytree(trained, run)
    (here / "runs/tiny/2").mkdir()  # died before its first checkpoint
    before = tree(run)

    # last: in its own folder; other options go beside the first ones
    more = ("--config", "tiny.yaml", *QUIET, "--trainer.max_steps")
    result = run_well(here, "fit", *more, 12, "--ckpt_path", "last")
    assert result.out.startswith("run: runs/tiny/1\n")
    assert load(run / "checkpoints/last.ckpt")["global_step"] == 12
    for name in ("config.yaml", "samples/step=10.png", "checkpoints/step=10.ckpt"):
        assert tree(run)[name] == before[name]
    assert files(run) - set(before) - {"events"} == {
        "config.step=10.yaml",
        "checkpoints/step=12.ckpt",
    }
    assert options(run)["trainer"]["max_steps"] == 10
    assert options(run, "config.step=10.yaml")["trainer"]["max_steps"] == 12

    # a file: a new run from its step, the old one as it was
    before = tree(run)
    file = run / "checkpoints/step=10.ckpt"
    result = run_well(here, "fit", *more, 12, "--ckpt_path", file)
    assert result.out.startswith("run: runs/tiny/3\n")
    branch = here / "runs/tiny/3"
    assert files(branch) == {
        "config.yaml",
        "events",
        "checkpoints/last.ckpt",
        "checkpoints/step=12.ckpt",
    }
    assert tree(run) == before
    last = "checkpoints/last.ckpt"
    assert_same_training(branch / last, run / last)  # the same seed, the same steps

    # auto: the newest checkpoint of the folder; of a run that is complete, nothing is lost
    before = tree(run)
    result = run_well(here, "fit", *more, 12, "--ckpt_path", "auto", "--run_dir", run)
    assert result.out.startswith(f"run: {run}\n")
    after = tree(run)
    assert {name: after[name] for name in before if name != "checkpoints"} == {
        name: entry for name, entry in before.items() if name != "checkpoints"
    }


def test_auto_starts_afresh_where_there_is_no_checkpoint(here: Path) -> None:
    run = here / "mine"
    run.mkdir()
    (run / "config.yaml").write_text("model:\n")
    for steps in (1, 2):
        arguments = ("--config", "tiny.yaml", *QUIET, "--trainer.max_steps", steps)
        result = run_well(here, "fit", *arguments, "--run_dir", "mine", "--ckpt_path", "auto")
        assert result.out.startswith("run: mine\n")
        assert load(run / "checkpoints/last.ckpt")["global_step"] == steps
    assert (run / "config.yaml").read_text() == "model:\n"
    assert {"config.step=0.yaml", "config.step=1.yaml"} <= files(run)


# --- validate and test ---------------------------------------------------------------------------


def test_validate_and_test_print_losses_and_write_nothing(here: Path, trained: Path) -> None:
    run = here / "runs/tiny/1"
    shutil.copytree(trained, run)
    before = tree(here)
    config = ("--config", "tiny.yaml", "--ckpt_path")
    file = run_well(here, "validate", *config, run / "checkpoints/last.ckpt")
    last = run_well(here, "validate", *config, "last")
    where = run_well(here, "validate", *config, "last", "--run_dir", run)
    tested = run_well(here, "test", *config, "last", "--likelihood.num_images", 0)
    assert tree(here) == before
    assert file.out == last.out == where.out
    losses = dict(line.split(": ") for line in last.out.splitlines())
    assert losses.keys() == {"val/loss", "val/loss_ema"}
    for name in losses:
        assert float(losses[name]) == pytest.approx(scalars(run, name)[10], abs=1e-5)
    # this folder has no test split, so that test uses the validation images
    assert tested.out == last.out.replace("val/", "test/")


# --- options of the Trainer ----------------------------------------------------------------------


def test_without_logger_and_progress_bar(here: Path) -> None:
    switches = ("--trainer.logger", "false", "--trainer.enable_progress_bar", "false")
    result = run_well(here, "fit", *TWO_STEPS, *switches)
    assert result.err == ""
    assert "curves: " not in result.out
    assert "events" not in files(here / "runs/tiny/1")
    assert "samples/step=2.png" in files(here / "runs/tiny/1")


def test_a_users_own_callbacks_run_beside_ours(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "mine.py").write_text(
        """
from lightning.pytorch import Callback

class Count(Callback):
    def __init__(self, path: str) -> None:
        self.path = path
        self.steps = 0

    def on_train_batch_end(self, *args) -> None:
        self.steps += 1

    def on_train_end(self, trainer, pl_module) -> None:
        names = [type(callback).__name__ for callback in trainer.callbacks]
        with open(self.path, "w") as file:
            print(self.steps, *names, file=file)
"""
    )
    callback = {"class_path": "mine.Count", "init_args": {"path": "count.txt"}}
    (here / "count.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    monkeypatch.syspath_prepend(here)
    run_well(here, "fit", *TWO_STEPS, "--config", "count.yaml")
    steps, *names = (here / "count.txt").read_text().split()
    assert steps == "2"
    assert {"Count", "EMA", "Samples", "Checkpoints", "Curves", "Progress"} <= set(names)
    assert options(here / "runs/tiny+count/1")["trainer"]["callbacks"] == [callback]


def test_validation_counts_optimizer_steps(here: Path) -> None:
    accumulate = ("--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "2")
    result = run_well(here, "fit", "--config", "tiny.yaml", *QUIET, *accumulate)
    assert result.status == 0
    run = here / "runs/tiny/1"
    assert list(scalars(run, "val/loss_ema")) == [2, 4, 6, 8, 10]
    assert list(scalars(run, "train/loss")) == [5, 10]
    assert options(run)["trainer"]["val_check_interval"] == 2


def test_fast_dev_run(here: Path) -> None:
    result = run_well(here, "fit", "--config", "tiny.yaml", "--trainer.fast_dev_run", "true")
    assert load(here / "runs/tiny/1/checkpoints/last.ckpt")["global_step"] == 1
    assert "curves: " not in result.out


def test_a_network_of_the_users_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "own.py").write_text(
        """
import torch

class Net(torch.nn.Module):
    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = torch.nn.Conv2d(1, 1, kernel, padding="same")

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.conv(x)
"""
    )
    monkeypatch.syspath_prepend(here)
    own = ("--model.net", "own.Net", "--model.net.kernel", "5", "--model.num_timesteps", "20")
    small = ("--data.batch_size", "4", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu")
    run_well(here, "fit", *own, *small, *QUIET)
    checkpoint = here / "runs/digits/1/checkpoints/last.ckpt"
    described = load(checkpoint)["hyper_parameters"]["net"]
    assert described == {"class_path": "own.Net", "init_args": {"kernel": 5}}
    assert type(DDPM.from_checkpoint(checkpoint).net).__name__ == "Net"


# --- going on with something else ----------------------------------------------------------------


def test_a_learning_rate_asked_for_on_resume_is_used(here: Path) -> None:
    run_well(here, "fit", *TWO_STEPS, *QUIET)
    adam = ("--model.optimizer", "torch.optim.Adam", "--model.optimizer.lr", "5e-5")
    options = ("--trainer.max_steps=4", "--ckpt_path", "last", "--trainer.log_every_n_steps=1")
    run_well(here, "fit", "--config", "tiny.yaml", *options, *adam, *QUIET)
    assert scalars(here / "runs/tiny/1", "train/lr")[4] == pytest.approx(5e-5)
    group = load(here / "runs/tiny/1/checkpoints/last.ckpt")["optimizer_states"][0]["param_groups"]
    assert group[0]["lr"] == group[0]["initial_lr"] == 5e-5
    # both resumes' options are kept
    assert (here / "runs/tiny/1/config.step=2.yaml").exists()
    step_2 = ("--ckpt_path", "runs/tiny/1/checkpoints/step=2.ckpt")
    run_well(here, "fit", "--config", "tiny.yaml", "--trainer.max_steps=6", *step_2, *QUIET)
    assert (here / "runs/tiny/2/config.yaml").exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--data.batch_size 5", "data.batch_size 4, but this command has 5"),
        ("--seed_everything 3", "data."),
        ("--data.flip true", "data.flip False, but this command has True"),
    ],
)
def test_going_on_with_other_data_is_refused(here: Path, option: str, told: str) -> None:
    run_well(here, "fit", *TWO_STEPS, *QUIET)
    before = tree(here)
    line = ("--config", "tiny.yaml", "--trainer.max_steps", "4", *option.split(), *QUIET)
    result = run_here(here, "fit", *line, "--ckpt_path", "last")
    assert result.status == 2
    assert told in result.err
    assert "--run_dir NEW" in result.err
    assert tree(here) == before
    # a new run from there may have them
    run_well(here, "fit", *line, "--ckpt_path", "runs/tiny/1/checkpoints/last.ckpt")


def test_auto_begins_again_only_in_a_runs_folder(here: Path) -> None:
    (here / "full").mkdir()
    (here / "full" / "letter.txt").write_text("mine")
    line = (*TWO_STEPS, *QUIET, "--run_dir", "full", "--ckpt_path", "auto")
    result = run_here(here, "fit", *line)
    assert result.status == 2
    assert "not empty" in result.err
    (here / "full" / "config.yaml").write_text("")
    run_well(here, "fit", *line)


@pytest.mark.parametrize(
    "option",
    [
        "--trainer.strategy fsdp",
        "--trainer.strategy deepspeed_stage_2",
        "--trainer.strategy model_parallel",
        "--trainer.strategy lightning.pytorch.strategies.FSDPStrategy",
        "--trainer.strategy lightning.pytorch.strategies.DeepSpeedStrategy",
        "--trainer.strategy lightning.pytorch.strategies.ModelParallelStrategy",
        "--model.optimizer torch.distributed.optim.ZeroRedundancyOptimizer",
    ],
)
def test_sharding_is_refused(here: Path, option: str) -> None:
    """By name, before anything else is asked for that would not help."""
    line = option.split()
    if "optimizer" in option:  # the parser itself asks for this one
        line += ["--model.optimizer.optimizer_class", "torch.optim.Adam"]
    result = run_here(here, "fit", *TWO_STEPS, *QUIET, *line)
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert f"{option}: not supported" in result.err
    assert "use ddp" in result.err or "use torch.optim.Adam" in result.err
    assert not (here / "runs").exists()


def test_a_single_callback_is_taken(here: Path) -> None:
    callback = "lightning.pytorch.callbacks.ModelSummary"
    result = run_here(here, "fit", *TWO_STEPS, *QUIET, "--trainer.callbacks", callback)
    assert result.status == 0, result.err


def test_broken_images_left_out_are_told_again(here: Path, pictures: Path) -> None:
    shutil.copytree(pictures, here / "pictures")
    (here / "pictures" / "train" / "zzz.png").write_bytes(b"no image")
    line = (*TWO_STEPS, *QUIET, "--data.source", "pictures", "--data.on_error", "skip")
    for _ in range(2):  # decoding, and from the cache
        assert "(1 broken ones left out)" in run_well(here, "fit", *line).out


def test_validate_without_images_is_refused(here: Path) -> None:
    run_well(here, "fit", *TWO_STEPS, *QUIET)
    line = ("--config", "tiny.yaml", "--data.source", "digits", "--ckpt_path", "last")
    result = run_here(here, "validate", *line, "--data.val_fraction", "0")
    assert result.status == 2
    assert "no images to validate on" in result.err


def test_sigterm_has_its_own_status(here: Path) -> None:
    line = ("--config", "tiny.yaml", "--trainer.max_steps", "100000", *QUIET)
    checkpoint = here / "runs/tiny/1/checkpoints/last.ckpt"
    with ended(start_process(here, "fit", *line)) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        process.communicate(timeout=120)
    assert process.returncode == 143


def test_a_split_that_was_trained_on_is_refused(here: Path) -> None:
    run_well(here, "fit", *TINY_OPTIONS, "--run_dir", "run")
    for command, option in product(
        ("validate", "test"), (("--seed_everything", 1), ("--data.val_fraction", 0.2))
    ):
        line = ("--ckpt_path", "run/checkpoints/last.ckpt", "--likelihood.num_images", 0)
        result = run_here(here, command, *TINY_OPTIONS, *line, *option)
        assert result.status == 2
        assert result.err.count("\n") == 1
        assert "trained on another share of digits" in result.err
        assert "config.yaml" in result.err
