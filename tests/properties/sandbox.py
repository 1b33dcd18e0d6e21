"""Runs commands where nothing is lost: in this process, in an empty folder, for a few steps."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from lightning.pytorch import Trainer

from ddpm_lightning.callbacks import FID, Samples
from ddpm_lightning.callbacks.shared import find_callback
from ddpm_lightning.cli import CLI
from ddpm_lightning.commands.sample import SampleTask
from tests.command_line import TINY, Result, run_here, tree
from tests.test_bad_input import assert_refused

NUM_STEPS = 10  # of the run whose checkpoints are gone on from
MANY = 4  # steps or images: more of them are not waited for


class Enough(BaseException):
    """A command would do what was asked for now, and it would take long."""


class Sandbox:
    """A folder to run commands in, within another one that shows what is written beside it.

    Args:
        root: The other folder.
        source: A folder of images to train on.
    """

    def __init__(self, root: Path, source: Path) -> None:
        self.here = root / "a" / "here"
        self.here.mkdir(parents=True)
        self._home = root / "home"
        self._home.mkdir()
        self._root = root
        (self.here / "tiny.yaml").write_text(
            TINY.format(source=source).replace("max_steps: 10", "max_steps: 2")
        )

    def run(self, *arguments: str) -> Result | None:
        """Run a command; None where it was stopped because it would do well, but for long.

        A refused command must have told one line and left no trace.
        """
        before = tree(self.here)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HOME", str(self._home))
                self._stop_early(patch)
                result = run_here(self.here, *arguments)
        except Enough:
            return None
        if result.status == 0:
            assert "Traceback" not in result.err
        else:
            assert_refused(result)
            # Lightning looks at a checkpoint last, when a new run has written what it will do
            if "cannot go on from it" not in result.err:
                assert tree(self.here) == before
        return result

    def written_beside(self) -> set[str]:
        """What there is beside `here` and the decoded images."""
        ours = (self.here, self.here.parent / "here-cache")
        return {
            str(path.relative_to(self._root))
            for path in self._root.rglob("*")
            if path.is_file() and not any(path.is_relative_to(folder) for folder in ours)
        }

    @staticmethod
    def _stop_early(patch: pytest.MonkeyPatch) -> None:
        before_fit, predict = CLI.before_fit, Trainer.predict

        def before_fit_or_stop(cli: CLI) -> None:
            before_fit(cli)
            trainer = cli.trainer
            samples, fid = find_callback(trainer, Samples), find_callback(trainer, FID)
            assert samples and fid
            is_short = (
                0 < trainer.max_steps <= NUM_STEPS + MANY
                and (trainer.min_steps or 0) <= MANY
                and trainer.accumulate_grad_batches <= MANY
                and samples.num_images <= MANY
                and not fid.every_n_steps
                and trainer.world_size == 1
                and not cli.datamodule.num_workers
            )
            if not is_short:
                raise Enough

        def predict_or_stop(trainer: Trainer, task: Any, **options: Any) -> object:
            is_sample = isinstance(task, SampleTask)
            num_images = sum(map(len, task._batches)) if is_sample else task._num_all
            if trainer.world_size > 1 or num_images > MANY:
                raise Enough
            return predict(trainer, task, **options)

        patch.setattr(CLI, "before_fit", before_fit_or_stop)
        patch.setattr(Trainer, "predict", predict_or_stop)


@contextmanager
def sandbox(source: Path, checkpoint: Path | None = None) -> Iterator[Sandbox]:
    """A fresh one, with a copy of a checkpoint as whole.ckpt."""
    with TemporaryDirectory() as folder:
        made = Sandbox(Path(folder), source)
        if checkpoint is not None:
            shutil.copy(checkpoint, made.here / "whole.ckpt")
        yield made
