"""Judge a run while it trains: wait for its checkpoints."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpm_lightning.commands.judging import POLL_SECONDS
from ddpm_lightning.commands.rows import Row
from ddpm_lightning.commands.run_config import RunConfig
from ddpm_lightning.commands.shell import announce
from ddpm_lightning.commands.subjects import kept_checkpoints
from ddpm_lightning.errors import InputError
from ddpm_lightning.runs import Run, is_rank_zero


class Watcher:
    """Finds the checkpoints that a training run writes.

    Args:
        run: The run.
        make_rows: Makes the rows of checkpoints that have come up, but for those judged before.
        seen: Those that were found before.
    """

    def __init__(
        self, run: Run, make_rows: Callable[[Sequence[Path]], list[Row]], seen: Sequence[Path]
    ) -> None:
        self._run = run
        self._make_rows = make_rows
        self._seen = {path.name for path in seen}

    def __call__(self) -> tuple[list[Row], bool]:
        """Give rows that have come up, and whether the run's last step is among the seen."""
        found = [path for path in kept_checkpoints(self._run) if path.name not in self._seen]
        self._seen |= {path.name for path in found}
        # a run that goes on may have been given more steps
        max_steps = RunConfig.of(self._run).newest("trainer", "max_steps")
        return self._make_rows(found), f"step={max_steps}.ckpt" in self._seen


def await_first_checkpoint(subjects: Sequence[str]) -> Run:
    """Wait until a run has a checkpoint.

    Raises:
        InputError: There is more or less than one run's folder.
    """
    run = Run(Path(subjects[0]).expanduser()) if len(subjects) == 1 else None
    if run is None or not run.config.is_file():
        raise InputError("--watch: give one run's folder, which has a config.yaml")
    if not kept_checkpoints(run) and is_rank_zero():
        announce(f"waiting for the first checkpoint of {run.root}")
    while not kept_checkpoints(run):
        time.sleep(POLL_SECONDS)
    return run
