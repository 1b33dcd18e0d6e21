"""The one exception that means "the user can mend this"."""


class InputError(ValueError):
    """Bad input from outside: an option, a file, a folder, a checkpoint.

    Its message is one line that names the key or file and says what would be right. The command
    line prints that line and exits with status 2; from Python it is an ordinary `ValueError`.
    """
