"""What commands share: announcements, exit statuses, errors of one line."""

import errno
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ddpm_lightning.errors import InputError, Stopped
from ddpm_lightning.peers import end_with_parent, watched_by_torchruns_ranks

logger = logging.getLogger("ddpm_lightning")

# The file system's own refusals: the user can mend them, a traceback does not help.
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}


# What allocators say that raise no error of their own kind.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that there is no memory left, of a device or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def announce(text: str) -> None:
    """Tell the user where things are, on stdout."""
    logger.info(text)


def run_command(command: Callable[[], object]) -> int:
    """Run a command; bad input becomes one line on stderr and the exit status 2.

    Returns:
        The status: the command's own where it gives one; 130 where Ctrl-C stopped it.
    """
    _set_up_output()
    end_with_parent()
    received: int = signal.SIGINT

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        raise KeyboardInterrupt

    # As Ctrl-C, which Lightning passes on to the processes that it has launched; while training,
    # the callback Signals takes both over.
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with watched_by_torchruns_ranks():
            result = command()
    except (InputError, MisconfigurationException) as error:
        return _fail(str(error))
    except Stopped as stopped:
        if str(stopped):
            announce(str(stopped))
        return stopped.status
    except KeyboardInterrupt:
        return 128 + received
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning makes it a plain failure
            return 128 + received
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(
            "out of memory: a smaller --batch_size, where the command has one, or fewer images "
            f"take less ({str(error)[:200]})"
        )
    except OSError as error:
        if error.errno in DISK_ERRORS:
            return _fail(str(error))
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return result if isinstance(result, int) else 0


def new_file(path: str | Path) -> Path:
    """Give the path of a file that a command will write; its folder may have to be made.

    Raises:
        InputError: There is something already.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"--out {path}: exists, and nothing is overwritten; choose another")
    return path


@contextmanager
def refusals_of(option: str) -> Iterator[None]:
    """Make what is raised about the value of an option an `InputError` that names the option."""
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{option}: {error}") from error


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return 2


def _set_up_output() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Lightning's notes on devices and its advertisements
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # but it must say which rank has died before it kills the others
    logging.getLogger("lightning.fabric.strategies.launchers").setLevel(logging.INFO)
    for message in (
        r".*does not have many workers.*",  # images come from a memory map, faster than workers
        r".*your dataloader is not resumable.*",  # it starts at trainer.global_step
        r".*LeafSpec.*",  # Lightning's own use of a deprecated name
        r".*all_gather is deprecated.*",  # the same
        r".*GPU available but not used.*",
        r".*sync_dist=True.*",  # what is logged is the mean over all ranks already
        r".*predict returned None.*",  # the images are on disk
        r".*Total length of `list` across ranks is zero.*",  # without validation images
    ):
        warnings.filterwarnings("ignore", message)
