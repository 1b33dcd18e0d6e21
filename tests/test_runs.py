"""Run folders: their numbers, their checkpoints, and who may write to them."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpm_lightning.errors import InputError
from ddpm_lightning.runs import (
    Run,
    choose_run,
    find_checkpoint,
    is_rank_zero,
    new_run,
    numbered_runs,
)

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def checkpoint(run: Run, name: str, time: int) -> Path:
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    path = run.checkpoints / name
    path.touch()
    os.utime(path, ns=(time, time))
    return path


def test_numbers_go_on_from_the_highest_as_numbers() -> None:
    experiment = Path("runs/digits")
    assert numbered_runs(experiment) == []
    assert [new_run(experiment).root.name for _ in range(10)] == [str(n) for n in range(1, 11)]
    (experiment / "3").rmdir()
    for other in ("x", "12b", "²", "-20"):
        (experiment / other).mkdir()
    assert new_run(experiment).root == experiment / "11"
    assert [run.root.name for run in numbered_runs(experiment)][-3:] == ["9", "10", "11"]


def test_runs_that_start_at_once_get_folders_of_their_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: new_run(Path("runs/digits")), range(40)))
    assert {run.root.name for run in runs} == {str(number) for number in range(1, 41)}


def test_newest_checkpoint_is_the_one_written_last_and_never_best() -> None:
    run = Run(Path("run"))
    assert run.newest_checkpoint() is None
    checkpoint(run, "step=20.ckpt", time=1)
    last = checkpoint(run, "last.ckpt", time=2)
    checkpoint(run, "best.ckpt", time=3)
    (run.checkpoints / ".last.ckpt.part77").touch()
    assert run.newest_checkpoint() == last
    # a name does not say when it was written: this run was started again from its beginning
    assert checkpoint(run, "step=10.ckpt", time=4) == run.newest_checkpoint()


def test_discard_removes_what_was_created_unless_it_is_used() -> None:
    Path("there").mkdir()
    run = Run.create(Path("there/a/b"))
    run.discard()
    assert list(Path("there").iterdir()) == []
    Path("there").rmdir()

    one, two = new_run(Path("runs/digits")), new_run(Path("runs/digits"))
    one.discard()
    assert two.root.is_dir()
    (two.root / "config.yaml").touch()
    two.discard()
    assert two.config.is_file()
    Run(Path("runs")).discard()  # it did not create that
    assert two.config.is_file()


@pytest.mark.parametrize("name", RANK_VARIABLES)
def test_only_rank_zero_makes_folders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_rank_zero()
    monkeypatch.setenv(name, "0")
    assert is_rank_zero()
    monkeypatch.setenv(name, "1")
    assert not is_rank_zero()
    assert choose_run(None, "digits", None) == (None, None)
    assert choose_run("elsewhere", "digits", None) == (None, None)
    assert not list(Path().iterdir())


def test_which_run_and_checkpoint_an_option_means() -> None:
    assert choose_run(None, "digits", "auto") == (Run(Path("runs/digits/1")), None)
    assert choose_run("mine", "digits", None) == (Run(Path("mine")), None)
    assert choose_run("mine", "digits", None) == (Run(Path("mine")), None)  # still empty

    first = Run(Path("runs/digits/1"))
    last = checkpoint(first, "last.ckpt", time=1)
    new_run(Path("runs/digits"))  # has no checkpoint: died early
    for word in ("last", "auto"):
        assert choose_run(None, "digits", word) == (first, str(last))
        assert choose_run("runs/digits/1", "other", word) == (first, str(last))
        assert find_checkpoint(None, "digits", word) == (first, str(last))
    assert find_checkpoint(None, "digits", str(last)) == (None, str(last))
    assert find_checkpoint(None, "digits", None) == (None, None)
    assert choose_run(None, "digits", str(last)) == (Run(Path("runs/digits/3")), str(last))
    assert choose_run("mine", "digits", str(last)) == (Run(Path("mine")), str(last))

    # a run that died before its first checkpoint is begun again in its folder, if asked for
    Path("mine/config.yaml").touch()
    assert choose_run("mine", "digits", "auto") == (Run(Path("mine")), None)


@pytest.mark.parametrize(
    ("run_dir", "ckpt_path", "match"),
    [
        ("full", None, "--run_dir full: not empty"),
        ("file", None, "--run_dir file: a file"),
        ("file", "auto", "--run_dir file: a file"),
        ("full", "last", "--ckpt_path last: no checkpoint under full"),
        (None, "last", "--ckpt_path last: no checkpoint under runs/digits"),
        (None, "missing.ckpt", "--ckpt_path missing.ckpt: no such file"),
        (None, "full", "--ckpt_path full: no such file"),
    ],
)
def test_refused(run_dir: str | None, ckpt_path: str | None, match: str) -> None:
    Path("full").mkdir()
    Path("full/x").touch()
    Path("file").touch()
    with pytest.raises(InputError, match=match):
        choose_run(run_dir, "digits", ckpt_path)
    assert not Path("runs").exists()
