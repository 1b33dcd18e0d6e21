"""What must never be unpickled."""

from pathlib import Path


class Malicious:
    """Makes a file where it is unpickled.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)
