"""Run folders: where a run keeps its files, who writes there, and which run an option means."""

import errno
import fcntl
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_lightning.errors import InputError

LOCK_NAME = ".lock"


@dataclass(frozen=True)
class Run:
    """A run's folder: config.yaml, checkpoints/, samples/ and TensorBoard's events.

    Args:
        root: The folder.
        created: The folders that were made for it: itself, and then those above it.
    """

    root: Path
    created: tuple[Path, ...] = field(default=(), compare=False)

    @classmethod
    def create(cls, root: Path) -> "Run":
        """Make the folder, and those above it.

        Raises:
            FileExistsError: It is there already.
        """
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True)
        return cls(root, tuple(missing))

    def discard(self) -> None:
        """Remove what `create` made, unless something is in it by now."""
        with suppress(OSError):
            for folder in self.created:
                folder.rmdir()

    @property
    def config(self) -> Path:
        """The options that the run was started with."""
        return self.root / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Holds last.ckpt, best.ckpt and step=N.ckpt."""
        return self.root / "checkpoints"

    def newest_checkpoint(self) -> Path | None:
        """Give the checkpoint that was written last, or None."""
        files = [path for path in self.checkpoints.glob("*.ckpt") if path.name != "best.ckpt"]
        return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)


class RunLock:
    """Keeps a run's folder to one job, until `release` or the death of the process.

    The system's own lock on RUN/.lock, which ends with the process whatever it died of. (Not the
    lock of `filelock`: processes forked for the data would hold it, too, and outlive a killed one.)

    Args:
        root: The run's folder.

    Raises:
        InputError: Another job writes there.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK_NAME
        self._file = -1
        while not self._is_the_file():  # who held it before may have removed it just now
            self._close()
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(self._file, 100).decode(errors="replace").strip()
                self._close()
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise InputError(
                        f"--run_dir {root}: {holder or 'another process'} is training in it; wait "
                        "for it, or choose another folder"
                    ) from error
                if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    return  # a file system without locks
                raise
        with suppress(OSError):  # a name is a courtesy; the disk may be full
            os.ftruncate(self._file, 0)
            os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        os.register_at_fork(after_in_child=self._close)

    def release(self) -> None:
        """Let others write, and leave nothing behind where the disk lets it."""
        if self._is_the_file():
            with suppress(OSError):  # what ended the run is to be told, and not this
                self._path.unlink(missing_ok=True)
        self._close()

    def _is_the_file(self) -> bool:
        if self._file < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except OSError:
            return False

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def is_rank_zero() -> bool:
    """Tell whether this process is the first of its job, before any process group exists."""
    ranks = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def numbered_runs(experiment_dir: Path) -> list[Run]:
    """Give the runs EXPERIMENT/N in the order of their numbers."""
    if not experiment_dir.is_dir():
        return []
    folders = [path for path in experiment_dir.iterdir() if path.name.isdecimal()]
    return [Run(path) for path in sorted(folders, key=lambda path: int(path.name))]


def new_run(experiment_dir: Path) -> Run:
    """Create EXPERIMENT/N with the next free number; two that ask at once get two folders."""
    while True:
        runs = numbered_runs(experiment_dir)
        number = int(runs[-1].root.name) + 1 if runs else 1
        root = experiment_dir / str(number)
        try:
            return Run.create(root)
        except FileExistsError:
            continue


def find_checkpoint(
    run_dir: str | None, experiment: str, ckpt_path: str | None
) -> tuple[Run | None, str | None]:
    """Find out which checkpoint is meant.

    Args:
        run_dir: `--run_dir`; None for all numbers under runs/EXPERIMENT.
        experiment: The experiment's name.
        ckpt_path: `last` is the newest checkpoint of the folder, or of the highest number that has
            any; `auto` is that too, where there is one; a file is itself; None is none.

    Returns:
        The run that `last` and `auto` found, and the checkpoint's path.

    Raises:
        InputError: There is no such checkpoint, or the experiment's name is a path to elsewhere.
    """
    if Path(experiment).is_absolute() or ".." in Path(experiment).parts:
        raise InputError(
            f"--experiment {experiment}: leads out of runs/; give a name, or --run_dir FOLDER"
        )
    if ckpt_path in ("last", "auto"):
        experiment_dir = Path("runs") / experiment
        candidates = [Run(Path(run_dir))] if run_dir else numbered_runs(experiment_dir)[::-1]
        for run in candidates:
            newest = run.newest_checkpoint()
            if newest is not None:
                return run, str(newest)
        if ckpt_path == "last":
            raise InputError(
                f"--ckpt_path last: no checkpoint under {run_dir or experiment_dir}; "
                "give --run_dir DIR or --ckpt_path FILE (fit starts afresh with --ckpt_path auto)"
            )
        return None, None
    if ckpt_path is not None and not Path(ckpt_path).is_file():
        raise InputError(f"--ckpt_path {ckpt_path}: no such file (or say last, or auto)")
    return None, ckpt_path


def choose_run(
    run_dir: str | None, experiment: str, ckpt_path: str | None
) -> tuple[Run | None, str | None]:
    """Find out which folder a run goes to and which checkpoint it goes on from.

    Args:
        run_dir: `--run_dir`; None for the next number under runs/EXPERIMENT.
        experiment: The experiment's name.
        ckpt_path: See `find_checkpoint`. `last` and `auto` go on in the checkpoint's own folder, a
            file starts a new run from it, None starts afresh.

    Returns:
        The run (None on other ranks than 0 when it is new: only rank 0 writes to it), and the
        checkpoint's path.

    Raises:
        InputError: The folder is not empty, or there is no such checkpoint.
    """
    run, found = find_checkpoint(run_dir, experiment, ckpt_path)
    if run is not None or not is_rank_zero():
        return run, found
    if run_dir is None:
        return new_run(Path("runs") / experiment), found
    root = Path(run_dir)
    if not root.exists():
        return Run.create(root), found
    if not root.is_dir():
        raise InputError(f"--run_dir {run_dir}: a file; choose a folder")
    # With auto, a run that died before its first checkpoint is begun again in its own folder.
    begins_again = ckpt_path == "auto" and Run(root).config.exists()
    if any(path.name != LOCK_NAME for path in root.iterdir()) and not begins_again:
        raise InputError(
            f"--run_dir {run_dir}: not empty, and nothing is overwritten; choose another, "
            "or go on in it with --ckpt_path last"
        )
    return Run(root), found
