"""What the commands that draw one labelled picture of a checkpoint share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from ddpm_lightning.bars import bar_options
from ddpm_lightning.checkpoints import Weights
from ddpm_lightning.commands.settings import check_settings
from ddpm_lightning.commands.shell import announce
from ddpm_lightning.commands.subjects import Checkpoint, CheckpointReader
from ddpm_lightning.commands.trainer import choose_device
from ddpm_lightning.errors import InputError
from ddpm_lightning.images import write_png
from ddpm_lightning.metrics.record import describe_guidance, describe_sampler, write_record
from ddpm_lightning.module import DDPM
from ddpm_lightning.samplers import Sampler


class Subject(NamedTuple):
    """What a picture shows: a checkpoint with some of its weights, and how it is sampled.

    Attributes:
        checkpoint: The checkpoint.
        weights: Which of its weights.
        sampler: The sampler.
        model: The model with these weights, on its device.
    """

    checkpoint: Checkpoint
    weights: Weights
    sampler: Sampler
    model: DDPM

    @property
    def num_steps(self) -> int:
        """Steps of a whole chain."""
        return self.sampler.count_steps(self.model.process)

    def describe_sampler(self) -> dict[str, Any]:
        """Describe the sampler for a record."""
        return describe_sampler(self.sampler, self.num_steps)

    def describe_classes(self) -> dict[str, Any]:
        """Say for a record which classes samples have; nothing for a model without."""
        classes = self.model.num_classes
        return {"guidance": describe_guidance(None, classes)} if classes else {}

    def title(self) -> str:
        """Say in a line what it is."""
        sampler = self.describe_sampler()
        run = self.checkpoint.run
        name = self.checkpoint.path if run is None else run.root
        eta = f", eta {sampler['eta']:g}" if sampler.get("eta") else ""
        return (
            f"{name}, step {self.checkpoint.step}, {self.weights} weights, "
            f"{sampler['name']}, {self.num_steps} steps{eta}"
        )


def open_subject(checkpoint: str, weights: Weights, sampler: Sampler, accelerator: str) -> Subject:
    """Load a checkpoint onto one device.

    Raises:
        InputError: It is none, lacks the weights or timesteps, or there is no such device.
    """
    path = Path(checkpoint)
    found = CheckpointReader([weights], [sampler])(path)
    model = DDPM.from_checkpoint(path, weights).to(choose_device(accelerator))
    return Subject(found, weights, sampler, model)


class PictureFile:
    """A picture that is about to be made, and the record beside it.

    Args:
        command: The command's name.
        out: The file, as the user names it; RUN/pictures/COMMAND-step=N-WEIGHTS.png when None.
        subject: What it shows.
        settings: What else it depends on, as plain values.
        beside: Names the other files that are to lie beside it, from its own.

    Raises:
        InputError: There is another one already, or it cannot be a picture's name.
    """

    def __init__(
        self,
        command: str,
        out: str | None,
        subject: Subject,
        settings: dict[str, Any],
        beside: Callable[[Path], Sequence[Path]] = lambda path: (),
    ) -> None:
        checkpoint = subject.checkpoint
        self.path = Path(out) if out else _default_path(command, subject)
        self._beside = beside(self.path)
        self._settings = {
            "command": command,
            "checkpoint": str(checkpoint.path),
            "checkpoint_sha256": checkpoint.sha256,
            "step": checkpoint.step,
            "weights": subject.weights,
            "sampler": subject.describe_sampler(),
            **settings,
        }
        self._claim()

    def write(self, picture: Tensor, results: dict[str, Any] | None = None) -> None:
        """Write the picture, uint8 [C, H, W], and its record, and say where it is.

        Args:
            picture: The picture.
            results: What the record says beside the settings.
        """
        # the record first: a picture without one would be taken for somebody else's
        write_record(self._record, {**self._settings, **(results or {})})
        write_png(self.path, picture)
        announce(f"picture: {self.path}\nrecord: {self._record}")

    @property
    def _record(self) -> Path:
        return self.path.with_suffix(".json")

    def _claim(self) -> None:
        """See that nothing is overwritten but the same picture."""
        if self.path.suffix.lower() != ".png":
            raise InputError(f"--out {self.path}: give a file's name that ends in .png")
        if self.path.is_dir():
            raise InputError(f"--out {self.path}: a folder; give a file's name")
        if self._record.exists():
            check_settings(self._record, self._settings, str(self.path), "there is one")
        else:
            for path in (self.path, *self._beside):
                if path.exists():
                    where = f"--out {self.path}: " + (f"{path} " if path != self.path else "")
                    raise InputError(f"{where}exists, and is no such picture; choose another")
        self.path.parent.mkdir(parents=True, exist_ok=True)


def sampling_bar(num_steps: int, work: str = "sampling") -> "tqdm[Any]":
    """Show a bar that counts steps of batches."""
    return tqdm(total=num_steps, desc=work, unit="step", **bar_options())


def split_batches(seeds: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Divide seeds into batches, as `sample` does.

    Raises:
        InputError: batch_size is less than 1.
    """
    if batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {batch_size}")
    return [seeds[start : start + batch_size] for start in range(0, len(seeds), batch_size)]


def _default_path(command: str, subject: Subject) -> Path:
    checkpoint = subject.checkpoint
    folder = checkpoint.path.parent if checkpoint.run is None else checkpoint.run.root
    return folder / "pictures" / f"{command}-step={checkpoint.step}-{subject.weights}.png"
