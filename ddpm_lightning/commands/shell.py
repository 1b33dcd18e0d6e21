"""What commands share: one-line errors, announcements, exit statuses."""

import errno
import logging
import re
import sys
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from ddpm_lightning.errors import InputError

logger = logging.getLogger("ddpm_lightning")

# The file system's own refusals: the user can mend them, a traceback does not help.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def announce(text: str) -> None:
    """Tell the user where things are, on stdout."""
    logger.info(text)


def run_command(command: Callable[[], object]) -> int:
    """Run a command; bad input becomes one line on stderr and the exit status 2."""
    _set_up_output()
    try:
        command()
    except InputError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno in DISK_ERRORS:
            return _fail(str(error))
        raise
    return 0


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
    for message in (
        r".*does not have many workers.*",  # images come from a memory map, faster than workers
        r".*your dataloader is not resumable.*",  # it starts at trainer.global_step
        r".*LeafSpec.*",  # Lightning's own use of a deprecated name
        r".*GPU available but not used.*",
        r".*predict returned None.*",  # the images are on disk
    ):
        warnings.filterwarnings("ignore", message)


class LineErrors(ArgumentParser):
    """A parser whose errors are one line that names the key and the nearest right one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        text = " ".join(str(ex or message).split())
        sys.stderr.write(f"error: {text}{self._suggest(text)}\n")
        sys.exit(2)

    def _suggest(self, text: str) -> str:
        match = re.search(r"[\"']?(?:--)?([A-Za-z_][\w.]+)", text)
        if match is None:
            return ""
        near = get_close_matches(match[1], _option_names(self), n=1)
        return f"; did you mean --{near[0]}?" if near else ""


def parse_options(command: Callable[..., object], name: str) -> dict[str, Any]:
    """Read sys.argv by a command's signature and docstring, which thus are its --help."""
    parser = LineErrors(prog=f"python -m ddpm_lightning {name}", usage="%(prog)s [options] ...")
    parser.add_function_arguments(command, as_group=False, as_positional=True)
    arguments = sys.argv[2:]
    for index, argument in enumerate(arguments):
        default = parser.get_defaults().get(argument.removeprefix("--"))
        bare = arguments[index + 1 : index + 2] not in (["true"], ["false"])
        if isinstance(default, bool) and bare:  # --gif means --gif true
            arguments[index] = f"{argument}=true"
    return dict(parser.parse_args(arguments).as_dict())


def _option_names(parser: Any) -> list[str]:
    return [
        option.removeprefix("--") for action in parser._actions for option in action.option_strings
    ]
