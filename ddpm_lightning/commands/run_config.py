"""What a run's config.yaml says, for commands that start from its checkpoints."""

from pathlib import Path
from typing import Any

import yaml

from ddpm_lightning.data.datamodule import ImageDataModule
from ddpm_lightning.errors import InputError
from ddpm_lightning.runs import Run

# What decides which images a run trains on; order and flips do not matter.
IMAGE_OPTIONS = (
    "source",
    "streaming",
    "image_size",
    "channels",
    "val_fraction",
    "on_error",
    "seed",
)


class RunConfig:
    """The options that a run was started with, and those that it went on with where they differ.

    Args:
        files: config.yaml and config.step=N.yaml, the newest last.

    Raises:
        InputError: One cannot be read.
    """

    def __init__(self, files: list[Path]) -> None:
        self._options = {file: _read(file) for file in files}

    @classmethod
    def of(cls, run: Run | None) -> "RunConfig":
        """Read a run's; without a run nothing is known."""
        files = [] if run is None else list(run.root.glob("config*.yaml"))
        return cls(sorted(files, key=lambda file: file.stat().st_mtime_ns))

    def agreed(self, section: str, key: str) -> Any:
        """Give an option's value where all files agree on it, else None."""
        values = self._values(section, key)
        return values[0] if values and all(value == values[0] for value in values) else None

    def newest(self, section: str, key: str) -> Any:
        """Give an option's value in the newest file, or None."""
        return (self._values(section, key) or [None])[-1]

    def training_data(self) -> ImageDataModule:
        """Open the images that the run trains on.

        Raises:
            InputError: They are not known, or not there.
        """
        (first, options), *others = self._options.items()
        data = options["data"]
        for file, other in others:
            if any(data.get(key) != other["data"].get(key) for key in IMAGE_OPTIONS):
                raise InputError(f"the run went on with other images ({first} and {file} differ)")
        try:
            return ImageDataModule(**data)
        except TypeError as error:
            raise InputError(f"{first}: data: {error}") from error

    def _values(self, section: str, key: str) -> list[Any]:
        return [options[section].get(key) for options in self._options.values()]


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        options = yaml.safe_load(file.read_text())
        sections = {key: dict(options.get(key) or {}) for key in ("data", "ema", "trainer")}
        sections["data"]["seed"] = options["seed_everything"]  # which sets it
        return sections
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not a run's options ({reason})") from error
