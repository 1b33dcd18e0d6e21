"""Options that say which classes samples have, and what guides them how strongly."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddpm_lightning.checkpoints import Weights, file_sha256, load_checkpoint
from ddpm_lightning.commands.loading import load_unchanged
from ddpm_lightning.commands.options import parse_ranges
from ddpm_lightning.errors import InputError
from ddpm_lightning.module import DDPM
from ddpm_lightning.samplers import Guidance, check_labels, make_guidance


@dataclass(frozen=True)
class Guide:
    """A checkpoint that others are guided by.

    Attributes:
        path: The file.
        sha256: Of its content.
        step: The optimizer step that it was written at.
    """

    path: Path
    sha256: str
    step: int

    @property
    def word(self) -> str:
        """Name it beside other options, such as `by step=650-1f0c2a`; runs share files' names."""
        return f"by {self.path.stem}-{self.sha256[:6]}"

    def describe(self) -> dict[str, Any]:
        """Give what a record says of it."""
        return {"path": str(self.path), "sha256": self.sha256, "step": self.step}

    def load(self, weights: Weights, model: DDPM) -> DDPM:
        """Build what guides a model: the average guides averages, and raw weights raw ones.

        Raises:
            InputError: The file has changed, has no such weights, or is of another kind than the
                model.
        """
        guide = load_unchanged(self.path, self.sha256, weights, "--guide")
        try:
            model.check_guide(guide)
        except InputError as error:
            reason = str(error).removeprefix("guide: ")
            raise InputError(f"--guide {self.path}: {reason}") from error
        return guide


def open_guide(path: str | None, scales: object) -> Guide | None:
    """Look at a checkpoint that is to guide others; None where none is named.

    Args:
        path: The file.
        scales: What --guidance was given.

    Raises:
        InputError: It is no checkpoint, or nothing says how strongly it guides.
    """
    if path is None:
        return None
    if scales is None:
        raise InputError(f"--guide {path}: say how strongly, such as --guidance 2")
    step = int(load_checkpoint(path)["global_step"])
    return Guide(Path(path), file_sha256(path), step)


@dataclass(frozen=True)
class Told:
    """What samples are told: classes in turn, and what guides them.

    Attributes:
        text: The classes as on the command line; None for all of the model's.
        in_turn: The same as numbers: the image of seed i has the one at i modulo their number.
            Empty for a model without classes.
        guidance: How strongly images are guided.
        guide: What guides them; None is the model without labels.
    """

    text: str | None
    in_turn: tuple[int, ...]
    guidance: Guidance | None
    guide: Guide | None

    def labels_of(self, seeds: Sequence[int]) -> list[int] | None:
        """Give the seeds' classes; None for a model without."""
        return [self.in_turn[seed % len(self.in_turn)] for seed in seeds] if self.in_turn else None

    def describe(self) -> dict[str, Any]:
        """Give what images depend on, as plain values."""
        described: dict[str, Any] = {"labels": list(self.in_turn)} if self.in_turn else {}
        if self.guidance is not None:
            described["guidance"] = asdict(self.guidance)
        if self.guide is not None:
            described["guide"] = self.guide.sha256
        return described

    @property
    def slug(self) -> str:
        """Name what is not the default in file names, such as -labels3-guidance2."""
        words = [] if self.text is None else [f"labels{self.text}"]
        words += [] if self.guidance is None else self.guidance.words
        words += [] if self.guide is None else [self.guide.word]
        return "".join(f"-{word}".replace(" ", "") for word in words)


def settle_told(
    model: DDPM,
    labels: str | None,
    guidance: float | None,
    rescale: float | None,
    guide: str | None,
) -> Told:
    """Settle what samples of a model are told.

    Args:
        model: The model.
        labels: Such as 3 or 0-9 or 0,3,5; all classes when None.
        guidance: See `Guidance`.
        rescale: See `Guidance`.
        guide: A checkpoint.

    Raises:
        InputError: Something is out of range, or the model was not trained for it.
    """
    opened = open_guide(guide, guidance)
    made = make_guidance(guidance, rescale)
    if opened is None:
        model.check_guidance(made)
    in_turn = tuple(range(model.num_classes))
    if labels is not None:
        in_turn = tuple(parse_ranges("--labels", labels, "0-9 or 0,3,5"))
        check_labels(in_turn, model.num_classes)
    return Told(labels, in_turn, made or (Guidance() if in_turn else None), opened)
