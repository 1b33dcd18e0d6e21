"""The exceptions that are told in one line: the user can mend this, or wanted it."""


class InputError(ValueError):
    """Bad input from outside: an option, a file, a folder, a checkpoint.

    Its message is one line that names the key or file and says what would be right. The command
    line prints that line and exits with status 2; from Python it is an ordinary `ValueError`.
    """


class CacheError(InputError):
    """The cache's folder cannot be written; the remedy is the same whatever it is for."""


class SharedError(InputError):
    """What all ranks of a job find at the same moment, and end with: the first tells of it."""


class Stopped(Exception):
    """A signal ended training, and what is needed to go on is on disk.

    Args:
        message: The line that says so; "" where another process says it.
        status: The exit status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
