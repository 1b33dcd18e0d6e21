"""Options that say which classes samples have, and how strongly."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ddpm_lightning.commands.options import parse_ranges
from ddpm_lightning.module import DDPM
from ddpm_lightning.samplers import Guidance, check_guidance, check_labels, make_guidance


@dataclass(frozen=True)
class Classes:
    """Classes in turn: the image of seed i has the one at i modulo their number.

    Attributes:
        text: The classes as on the command line; None for all of the model's.
        in_turn: The same as numbers.
        guidance: How strongly images are drawn towards them.
    """

    text: str | None
    in_turn: tuple[int, ...]
    guidance: Guidance

    def of(self, seeds: Sequence[int]) -> list[int]:
        """Give the seeds' classes."""
        return [self.in_turn[seed % len(self.in_turn)] for seed in seeds]

    def describe(self) -> dict[str, Any]:
        """Give what images depend on, as plain values."""
        return {"labels": list(self.in_turn), "guidance": asdict(self.guidance)}

    @property
    def slug(self) -> str:
        """Name what is not the default in file names, such as -labels3-guidance2."""
        words = [] if self.text is None else [f"labels{self.text}"]
        return "".join(f"-{word}".replace(" ", "") for word in [*words, *self.guidance.words])


def choose_classes(
    model: DDPM, labels: str | None, guidance: float | None, rescale: float | None
) -> Classes | None:
    """Settle what a model is told; None where it knows no classes.

    Args:
        model: The model.
        labels: Such as 3 or 0-9 or 0,3,5; all classes when None.
        guidance: See `Guidance`.
        rescale: See `Guidance`.

    Raises:
        InputError: Something is out of range, or the model was not trained for it.
    """
    made = make_guidance(guidance, rescale)
    check_guidance(made, model.num_classes, model.label_dropout)
    in_turn = range(model.num_classes)
    if labels is not None:
        numbers = parse_ranges("--labels", labels, "0-9 or 0,3,5")
        check_labels(numbers, model.num_classes)
        return Classes(labels, tuple(numbers), made or Guidance())
    return Classes(None, tuple(in_turn), made or Guidance()) if model.num_classes else None
